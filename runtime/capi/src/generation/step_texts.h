/** Texts of a step's events: they stay where they are until the next step. */
#pragma once

#include "base/memory.h"

#include <string_view>

namespace qwen_aot
{

class StepTexts
{
public:
    StepTexts() = default;
    StepTexts(StepTexts const&) = delete;
    StepTexts& operator=(StepTexts const&) = delete;
    ~StepTexts();

    /** Forgets all texts, and keeps their memory. */
    void reset();

    /** Copies a text, with a NUL behind it; false: there is no memory. */
    [[nodiscard]] bool copy(std::string_view text, std::string_view& copied);

private:
    struct Chunk
    {
        Chunk* next;
        size_t capacity;
        size_t size;
        char* bytes() { return reinterpret_cast<char*>(this + 1); }
    };

    Chunk* first_ = nullptr;
    Chunk* current_ = nullptr;
};

} // namespace qwen_aot
