/** Where warnings and notes of a model go. */
#pragma once

#include "qwen_aot.h"

namespace qwen_aot
{

class Log
{
public:
    Log() = default;
    Log(qwen_aot_log_callback callback, void* user)
        : callback_(callback)
        , user_(user)
    {
    }

    /** At most 1,536 bytes. */
    [[gnu::format(printf, 3, 4)]] void write(qwen_aot_log_level level, char const* format, ...) const;

private:
    qwen_aot_log_callback callback_ = nullptr;
    void* user_ = nullptr;
};

} // namespace qwen_aot
