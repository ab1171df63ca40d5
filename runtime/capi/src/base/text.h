/** Text that the library owns, with a NUL behind it. */
#pragma once

#include "memory.h"

#include <string_view>

namespace qwen_aot
{

inline bool starts_with(std::string_view text, std::string_view start)
{
    return text.size() >= start.size() && std::memcmp(text.data(), start.data(), start.size()) == 0;
}

inline bool ends_with(std::string_view text, std::string_view end)
{
    return text.size() >= end.size()
        && std::memcmp(text.data() + (text.size() - end.size()), end.data(), end.size()) == 0;
}

class Text
{
public:
    Text() = default;
    Text(Text&&) noexcept = default;
    Text& operator=(Text&&) noexcept = default;

    /** NUL-terminated; "" if it holds nothing. */
    char const* c_str() const { return bytes_.empty() ? "" : bytes_.data(); }
    size_t size() const { return bytes_.empty() ? 0 : bytes_.size() - 1; }
    bool empty() const { return size() == 0; }
    std::string_view view() const { return {c_str(), size()}; }

    [[nodiscard]] bool append(std::string_view text)
    {
        size_t const before = size();
        if (!bytes_.reserve_more(text.size() + 1))
        {
            return false;
        }
        bytes_.shrink(before);
        return bytes_.append(text.data(), text.size()) && bytes_.push('\0');
    }

    [[nodiscard]] bool assign(std::string_view text)
    {
        Text fresh;
        if (!fresh.append(text))
        {
            return false;
        }
        bytes_.swap(fresh.bytes_);
        return true;
    }

    /** Drops what lies behind `size` bytes. */
    void shrink(size_t size)
    {
        if (size < this->size())
        {
            bytes_.shrink(size + 1);
            bytes_.back() = '\0';
        }
    }

    /** Makes it empty; keeps its memory. */
    void clear() { bytes_.clear(); }

private:
    Array<char> bytes_;
};

} // namespace qwen_aot
