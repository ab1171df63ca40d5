#include "base/log.h"

#include "base/utf8.h"

#include <cstdarg>
#include <cstdio>

namespace qwen_aot
{

void Log::write(qwen_aot_log_level level, char const* format, ...) const
{
    if (callback_ == nullptr)
    {
        return;
    }
    char message[1537];
    va_list arguments;
    va_start(arguments, format);
    int const wanted = std::vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    size_t length = wanted < 0 ? 0 : static_cast<size_t>(wanted);
    length = length < sizeof message ? length : sizeof message - 1;
    utf8_repair(message, length);
    callback_(user_, level, message, length);
}

} // namespace qwen_aot
