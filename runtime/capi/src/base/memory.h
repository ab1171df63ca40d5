/** Memory that may run out: nothing here throws, and all of it comes from malloc. */
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

namespace qwen_aot
{

/** Some consecutive elements that belong to somebody else. */
template <class T>
class Span
{
public:
    Span() = default;
    Span(T* data, size_t size)
        : data_(data)
        , size_(size)
    {
    }

    /** The same elements, not to be changed. */
    template <class Mutable, class = std::enable_if_t<std::is_same_v<Mutable const, T>>>
    Span(Span<Mutable> other)
        : Span(other.data(), other.size())
    {
    }

    T* data() const { return data_; }
    size_t size() const { return size_; }
    bool empty() const { return size_ == 0; }
    T& operator[](size_t index) const { return data_[index]; }
    T* begin() const { return data_; }
    T* end() const { return data_ + size_; }
    /** `count` elements from `first` on, which must be there. */
    Span sub(size_t first, size_t count) const { return {data_ + first, count}; }

private:
    T* data_ = nullptr;
    size_t size_ = 0;
};

/** A growing array. What can need memory returns whether there was; if not, nothing changed. */
template <class T>
class Array
{
    static_assert(std::is_nothrow_move_constructible_v<T>);

public:
    Array() = default;
    Array(Array&& other) noexcept
        : data_(std::exchange(other.data_, nullptr))
        , size_(std::exchange(other.size_, 0))
        , capacity_(std::exchange(other.capacity_, 0))
    {
    }
    Array& operator=(Array&& other) noexcept
    {
        Array moved(std::move(other));
        swap(moved);
        return *this;
    }
    Array(Array const&) = delete;
    Array& operator=(Array const&) = delete;
    ~Array()
    {
        clear();
        std::free(data_);
    }

    void swap(Array& other) noexcept
    {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        std::swap(capacity_, other.capacity_);
    }

    T* data() { return data_; }
    T const* data() const { return data_; }
    size_t size() const { return size_; }
    bool empty() const { return size_ == 0; }
    T& operator[](size_t index) { return data_[index]; }
    T const& operator[](size_t index) const { return data_[index]; }
    T* begin() { return data_; }
    T* end() { return data_ + size_; }
    T const* begin() const { return data_; }
    T const* end() const { return data_ + size_; }
    T& back() { return data_[size_ - 1]; }
    T const& back() const { return data_[size_ - 1]; }
    Span<T const> view() const { return {data_, size_}; }
    Span<T> view() { return {data_, size_}; }

    [[nodiscard]] bool reserve(size_t capacity)
    {
        if (capacity <= capacity_)
        {
            return true;
        }
        if (capacity > static_cast<size_t>(-1) / 2 / sizeof(T))
        {
            return false;
        }
        if constexpr (std::is_trivially_copyable_v<T>)
        {
            void* const grown = std::realloc(static_cast<void*>(data_), capacity * sizeof(T));
            if (grown == nullptr)
            {
                return false;
            }
            data_ = static_cast<T*>(grown);
        }
        else
        {
            T* const grown = static_cast<T*>(std::malloc(capacity * sizeof(T)));
            if (grown == nullptr)
            {
                return false;
            }
            for (size_t i = 0; i < size_; ++i)
            {
                new (grown + i) T(std::move(data_[i]));
                data_[i].~T();
            }
            std::free(data_);
            data_ = grown;
        }
        capacity_ = capacity;
        return true;
    }

    [[nodiscard]] bool push(T value)
    {
        if (!grow(1))
        {
            return false;
        }
        new (data_ + size_) T(std::move(value));
        ++size_;
        return true;
    }

    /** Copies elements to the end; they may not be this array's own. */
    [[nodiscard]] bool append(T const* values, size_t count)
    {
        static_assert(std::is_trivially_copyable_v<T>);
        if (!grow(count))
        {
            return false;
        }
        if (count != 0)
        {
            std::memcpy(static_cast<void*>(data_ + size_), values, count * sizeof(T));
        }
        size_ += count;
        return true;
    }

    /** Makes it so long; new elements are value-initialized. Memory of plain numbers that an empty array gets takes room
     *  once it is used, where it is large. */
    [[nodiscard]] bool resize(size_t size)
    {
        if constexpr (std::is_trivially_default_constructible_v<T> && std::is_trivially_copyable_v<T>)
        {
            if (capacity_ == 0 && size != 0)
            {
                data_ = static_cast<T*>(std::calloc(size, sizeof(T)));
                size_ = capacity_ = data_ == nullptr ? 0 : size;
                return data_ != nullptr;
            }
        }
        if (size > size_ && !grow(size - size_))
        {
            return false;
        }
        while (size_ < size)
        {
            new (data_ + size_) T();
            ++size_;
        }
        shrink(size);
        return true;
    }

    /** Drops elements from `size` on. */
    void shrink(size_t size)
    {
        while (size_ > size)
        {
            data_[--size_].~T();
        }
    }

    /** Room for so many more elements, growing as `push` does. */
    [[nodiscard]] bool reserve_more(size_t count) { return grow(count); }

    void pop() { shrink(size_ - 1); }

    /** Takes out one element; those behind it move up. */
    void remove(size_t index)
    {
        for (size_t i = index; i + 1 < size_; ++i)
        {
            data_[i] = std::move(data_[i + 1]);
        }
        pop();
    }

    void clear() { shrink(0); }

private:
    bool grow(size_t more)
    {
        if (more > static_cast<size_t>(-1) / 4 - size_)
        {
            return false;
        }
        if (size_ + more <= capacity_)
        {
            return true;
        }
        size_t const wanted = size_ + more;
        return reserve(wanted > capacity_ * 2 ? wanted : capacity_ * 2);
    }

    T* data_ = nullptr;
    size_t size_ = 0;
    size_t capacity_ = 0;
};

/** Ends an object that `make` made. */
struct Unmake
{
    template <class T>
    void operator()(T* object) const
    {
        object->~T();
        std::free(static_cast<void*>(object));
    }
};

/** The owner of one object. T may not be a base of what it points to: memory is freed by T's address. */
template <class T>
using Box = std::unique_ptr<T, Unmake>;

/** A new object, or none where there is no memory. */
template <class T, class... Arguments>
[[nodiscard]] Box<T> make(Arguments&&... arguments)
{
    void* const place = std::malloc(sizeof(T));
    return Box<T>(place == nullptr ? nullptr : new (place) T(std::forward<Arguments>(arguments)...));
}

} // namespace qwen_aot
