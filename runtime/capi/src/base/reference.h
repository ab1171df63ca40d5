/** Objects that several handles keep alive. */
#pragma once

#include "memory.h"

#include <atomic>
#include <cstdint>

namespace qwen_aot
{

/** Counts the holders of an object that `make` made; begins with none. Any threads. */
class Shared
{
public:
    void hold() const { count_.fetch_add(1, std::memory_order_relaxed); }
    /** Whether that was the last holder. */
    bool drop() const { return count_.fetch_sub(1, std::memory_order_acq_rel) == 1; }

private:
    mutable std::atomic<uint32_t> count_{0};
};

/** One holder of a T, which derives from Shared and has no subclass. */
template <class T>
class Ref
{
public:
    Ref() = default;
    explicit Ref(T* object)
        : object_(object)
    {
        if (object_ != nullptr)
        {
            object_->hold();
        }
    }
    explicit Ref(Box<T> object)
        : Ref(object.release())
    {
    }
    Ref(Ref const& other)
        : Ref(other.object_)
    {
    }
    Ref(Ref&& other) noexcept
        : object_(std::exchange(other.object_, nullptr))
    {
    }
    Ref& operator=(Ref other) noexcept
    {
        std::swap(object_, other.object_);
        return *this;
    }
    ~Ref()
    {
        if (object_ != nullptr && object_->drop())
        {
            Unmake()(object_);
        }
    }

    T* get() const { return object_; }
    T* operator->() const { return object_; }
    T& operator*() const { return *object_; }
    explicit operator bool() const { return object_ != nullptr; }

private:
    T* object_ = nullptr;
};

} // namespace qwen_aot
