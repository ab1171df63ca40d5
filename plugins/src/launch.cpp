#include "launch.h"

#include "log.h"

#include <limits>

namespace qwen_aot
{
namespace
{

constexpr int64_t kAlignment = 16;
constexpr int32_t kThreadsPerWarp = 32;
constexpr int64_t kMostPrograms[3] = {std::numeric_limits<int32_t>::max(), 65535, 65535};

} // namespace

Arguments& Arguments::pointer(Argument argument, void const* value)
{
    Entry& entry = entries_[static_cast<size_t>(argument)];
    entry.value.pointer = value;
    entry.kind = Kind::pointer;
    entry.is_set = true;
    return *this;
}

Arguments& Arguments::integer(Argument argument, int64_t value)
{
    if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max())
    {
        throw Error(text(
            "argument ", kArgumentNames[static_cast<size_t>(argument)], " is ", value, ", more than 32 bits hold"));
    }
    Entry& entry = entries_[static_cast<size_t>(argument)];
    entry.value.integer = static_cast<int32_t>(value);
    entry.kind = Kind::integer;
    entry.is_set = true;
    return *this;
}

Arguments& Arguments::real(Argument argument, float value)
{
    Entry& entry = entries_[static_cast<size_t>(argument)];
    entry.value.real = value;
    entry.kind = Kind::real;
    entry.is_set = true;
    return *this;
}

void launch(Function const& function, Arguments const& arguments, Sizes const& sizes, CUstream stream)
{
    Variant const& variant = *function.variant;
    KernelInfo const& kernel = kKernels[static_cast<size_t>(variant.kernel)];

    void* values[kMaxArguments + 2];
    for (int32_t i = 0; i < kernel.num_parameters; ++i)
    {
        Parameter const& parameter = kernel.parameters[i];
        Arguments::Entry const& entry = arguments.entries_[static_cast<size_t>(parameter.argument)];
        char const* const name = kArgumentNames[static_cast<size_t>(parameter.argument)];
        if (!entry.is_set || entry.kind != parameter.kind)
        {
            throw Error(text(variant.name, ": argument ", name, entry.is_set ? " is of another kind" : " isn't given"));
        }
        int64_t const number = entry.kind == Kind::pointer
            ? static_cast<int64_t>(reinterpret_cast<intptr_t>(entry.value.pointer))
            : static_cast<int64_t>(entry.value.integer);
        if (parameter.is_aligned && number % kAlignment != 0)
        {
            throw Error(text(variant.name, ": argument ", name, ", ", number, ", isn't a multiple of ", kAlignment));
        }
        values[i] = const_cast<Arguments::Value*>(&entry.value); // the driver's signature isn't const; it only reads
    }
    // Triton's entry points take two more pointers, scratch memory that these kernels have none of.
    void* scratch = nullptr;
    values[kernel.num_parameters] = &scratch;
    values[kernel.num_parameters + 1] = &scratch;

    unsigned int grid[3] = {1, 1, 1};
    for (int32_t axis = 0; axis < kernel.num_axes; ++axis)
    {
        int64_t programs = 1;
        for (int32_t i = 0; i < kernel.axes[axis].num_sizes; ++i)
        {
            programs *= sizes.get(kernel.axes[axis].sizes[i]);
        }
        programs = (programs + variant.grid_per[axis] - 1) / variant.grid_per[axis];
        if (programs < 1 || programs > kMostPrograms[axis])
        {
            throw Error(text(variant.name, ": ", programs, " programs along axis ", axis, "; CUDA takes 1 to ",
                kMostPrograms[axis]));
        }
        grid[axis] = static_cast<unsigned int>(programs);
    }
    CUresult const result = driver().launch_kernel(function.handle, grid[0], grid[1], grid[2],
        static_cast<unsigned int>(variant.num_warps * kThreadsPerWarp), 1, 1,
        static_cast<unsigned int>(variant.shared_bytes), stream, values, nullptr);
    if (result != CUDA_SUCCESS)
    {
        check(result, text("launching ", variant.name).c_str());
    }
}

} // namespace qwen_aot
