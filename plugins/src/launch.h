/** One kernel launch: arguments and sizes by name, put in the order that the table gives. Allocates nothing. */
#pragma once

#include "kernels.h"

#include <array>
#include <cstdint>

namespace qwen_aot
{

/** What the grids of one plugin's kernels are made of, by name. */
class Sizes
{
public:
    Sizes& set(Size size, int64_t value)
    {
        values_[static_cast<size_t>(size)] = value;
        return *this;
    }
    int64_t get(Size size) const { return values_[static_cast<size_t>(size)]; }

private:
    std::array<int64_t, kNumSizes> values_{};
};

/** Arguments of kernels by name. One set may serve several kernels: each takes what it names. */
class Arguments
{
public:
    Arguments& pointer(Argument argument, void const* value);
    /** Throws Error if the value isn't an int32. */
    Arguments& integer(Argument argument, int64_t value);
    Arguments& real(Argument argument, float value);

private:
    friend void launch(Function const&, Arguments const&, Sizes const&, CUstream);

    union Value
    {
        void const* pointer;
        int32_t integer;
        float real;
    };
    struct Entry
    {
        Value value{};
        Kind kind{};
        bool is_set{false};
    };
    std::array<Entry, kNumArguments> entries_;
};

/** Launches on a stream, after checking what the compiled code relies on: every argument given, of its kind, and
 *  aligned; a grid that CUDA takes. Throws Error. */
void launch(Function const& function, Arguments const& arguments, Sizes const& sizes, CUstream stream);

} // namespace qwen_aot
