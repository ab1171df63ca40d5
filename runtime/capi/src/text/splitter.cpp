#include "splitter.h"

#include "text/characters.h"

namespace qwen_aot
{
namespace
{

constexpr uint8_t kAnyKind = kLetter | kNumber | kSpace;

/** White space before a word leaves its last character to the word. */
size_t before_word(size_t start, size_t last, size_t stop, size_t end)
{
    return stop < end && last > start ? last : stop;
}

} // namespace

bool Splitter::next(std::string_view& word)
{
    if (place_ >= size_)
    {
        return false;
    }
    size_t const start = place_;
    switch (table_->split_rule())
    {
    case SplitRule::qwen2: place_ = qwen2_end(start); break;
    case SplitRule::gpt2: place_ = gpt2_end(start, size_); break;
    case SplitRule::digits_gpt2:
        if (stretch_ <= start)
        {
            Character const first = at(start, size_);
            if ((first.kind & kDigit) != 0)
            {
                place_ = start + first.length;
                break;
            }
            stretch_ = start;
            for (Character next = first; next.length != 0 && (next.kind & kDigit) == 0; next = at(stretch_, size_))
            {
                stretch_ += next.length;
            }
        }
        place_ = gpt2_end(start, stretch_);
        break;
    }
    if (place_ <= start) // only where a table has classes that contradict each other
    {
        place_ = start + at(start, size_).length;
    }
    word = {reinterpret_cast<char const*>(text_) + start, place_ - start};
    return true;
}

Splitter::Character Splitter::at(size_t place, size_t end) const
{
    if (place >= end)
    {
        return {0, 0, 0};
    }
    Character found;
    found.code = decode_character(text_ + place, found.length);
    found.kind = table_->class_of(found.code);
    return found;
}

// (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
size_t Splitter::qwen2_end(size_t start) const
{
    if (size_t const length = contraction(start, size_, true); length != 0)
    {
        return start + length;
    }
    Character const first = at(start, size_);
    if ((first.kind & kLetter) != 0)
    {
        return run_of(kLetter, start + first.length, size_);
    }
    if ((first.kind & kNumber) != 0)
    {
        return start + first.length;
    }
    Character const second = at(start + first.length, size_);
    if (first.code != '\r' && first.code != '\n' && (second.kind & kLetter) != 0)
    {
        return run_of(kLetter, start + first.length + second.length, size_);
    }
    bool const is_symbol = (first.kind & kAnyKind) == 0;
    if (is_symbol || (first.code == ' ' && second.length != 0 && (second.kind & kAnyKind) == 0))
    {
        size_t end = run_of(0, start + (is_symbol ? 0 : first.length), size_);
        while (end < size_ && (text_[end] == '\r' || text_[end] == '\n'))
        {
            ++end;
        }
        return end;
    }
    size_t end = start;
    size_t last = start;
    size_t line = start; // behind the last line end
    for (Character space = first; (space.kind & kSpace) != 0; space = at(end, size_))
    {
        last = end;
        end += space.length;
        if (space.code == '\r' || space.code == '\n')
        {
            line = end;
        }
    }
    return line > start ? line : before_word(start, last, end, size_);
}

// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
size_t Splitter::gpt2_end(size_t start, size_t end) const
{
    if (size_t const length = contraction(start, end, false); length != 0)
    {
        return start + length;
    }
    Character first = at(start, end);
    size_t from = start;
    if (first.code == ' ' && start + 1 < end)
    {
        from = start + 1;
        first = at(from, end);
    }
    if ((first.kind & kSpace) == 0)
    {
        return run_of(first.kind & kAnyKind, from, end);
    }
    size_t stop = start;
    size_t last = start;
    for (Character space = at(start, end); (space.kind & kSpace) != 0; space = at(stop, end))
    {
        last = stop;
        stop += space.length;
    }
    return before_word(start, last, stop, end);
}

size_t Splitter::contraction(size_t start, size_t end, bool is_folded) const
{
    if (text_[start] != '\'' || end - start < 2)
    {
        return 0;
    }
    uint8_t first = text_[start + 1];
    uint8_t second = end - start > 2 ? text_[start + 2] : 0;
    if (is_folded)
    {
        if (first == 0xC5 && second == 0xBF)
        {
            return 3; // U+017F, the long s, is an s in another case
        }
        first = first >= 'A' && first <= 'Z' ? static_cast<uint8_t>(first | 0x20) : first;
        second = second >= 'A' && second <= 'Z' ? static_cast<uint8_t>(second | 0x20) : second;
    }
    if (first == 's' || first == 't' || first == 'm' || first == 'd')
    {
        return 2;
    }
    return (first == 'r' && second == 'e') || (first == 'v' && second == 'e') || (first == 'l' && second == 'l') ? 3
                                                                                                                 : 0;
}

/** Where characters of exactly these of the three kinds end. */
size_t Splitter::run_of(uint8_t kinds, size_t start, size_t end) const
{
    while (start < end)
    {
        size_t length;
        if ((table_->class_of(decode_character(text_ + start, length)) & kAnyKind) != kinds)
        {
            break;
        }
        start += length;
    }
    return start;
}

} // namespace qwen_aot
