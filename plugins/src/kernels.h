/** Compiled kernels: the generated table, the choice of a variant, and the variants loaded in one CUDA context. */
#pragma once

#include "driver.h"
#include "kernel_table.h"

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

namespace qwen_aot
{

// ---- What kernel_table.cpp holds (plugins/kernel_table.py writes it) ----

enum class Kind : int32_t
{
    pointer,
    integer, // int32
    real     // float32
};

/** One run-time argument of a kernel. Aligned: a pointer or an integer that must be a multiple of 16. */
struct Parameter
{
    Argument argument;
    Kind kind;
    bool is_aligned;
};

/** One axis of a grid: the product of `sizes`, divided by the variant's `grid_per` of that axis and rounded up. */
struct GridAxis
{
    int32_t num_sizes;
    Size sizes[2];
};

struct KernelInfo
{
    char const* name;
    int32_t num_parameters;
    Parameter const* parameters;
    int32_t num_axes;
    GridAxis const* axes;
};

/** A fact of a request that a variant needs to be in first … last. */
struct Match
{
    Fact fact;
    int32_t first;
    int32_t last;
};

struct Variant
{
    char const* name;
    Kernel kernel;
    int32_t num_matches;
    Match matches[kNumFacts];
    char const* symbol;
    int32_t num_warps;
    int32_t shared_bytes;
    int32_t grid_per[3];
    unsigned char const* image; // a cubin, or PTX with a zero byte after it
};

/** All variants for one SM, which is 10 · major + minor. */
struct Target
{
    int32_t sm;
    bool is_ptx;
    int32_t num_variants;
    Variant const* variants;
};

/** A GPU that runs the cubins of another SM. */
struct Compatible
{
    int32_t device_sm;
    int32_t target_sm;
};

extern KernelInfo const kKernels[kNumKernels];
extern char const* const kArgumentNames[kNumArguments];
extern char const* const kFactNames[kNumFacts];
extern char const* const* const kFactValues[kNumFacts]; // null: an integer
extern Target const kTargets[];
extern int32_t const kNumTargets;
extern Compatible const kCompatible[]; // the best first
extern int32_t const kNumCompatible;
extern char const kDigest[]; // of all of this, the code included

// ---- Choosing ----

/** What is asked of a kernel: a value by fact. */
class Request
{
public:
    Request() { values_.fill(kUnset); }

    Request& with(Fact fact, int32_t value)
    {
        values_[static_cast<size_t>(fact)] = value;
        return *this;
    }

    bool has(Match const& match) const
    {
        int32_t const value = values_[static_cast<size_t>(match.fact)];
        return value != kUnset && match.first <= value && value <= match.last;
    }

    /** "dtype=fp16, head_dim=64". */
    std::string words() const;

private:
    static constexpr int32_t kUnset = -1;
    std::array<int32_t, kNumFacts> values_;
};

/** What a GPU of an SM runs: cubins of its own, cubins of an SM that it is compatible with, or PTX of an earlier one.
 *  Throws Error, with what there is. */
Target const& select_target(int32_t sm);

/** The variant that serves a request. Throws Error, with the request and what there is. */
Variant const& select_variant(Target const& target, Kernel kernel, Request const& request);

// ---- Loading ----

/** A CUDA context: one that is destroyed may leave its address to another, but not its number. */
struct Context
{
    CUcontext handle{nullptr};
    unsigned long long id{0}; // 0 where the driver doesn't number contexts

    bool operator<(Context const& other) const { return std::tie(handle, id) < std::tie(other.handle, other.id); }
};

/** A variant that can be launched. */
struct Function
{
    Variant const* variant{nullptr};
    CUfunction handle{nullptr};
};

/** The variants that are loaded in one CUDA context, each once, until the last plugin that uses it goes. */
class Kernels
{
public:
    /** Those of the calling thread's current context. Threads: safe. Throws Error. */
    static std::shared_ptr<Kernels> of_current_context();

    explicit Kernels(Context context);
    ~Kernels();
    Kernels(Kernels const&) = delete;
    Kernels& operator=(Kernels const&) = delete;

    /** The function that serves a request, loaded if it isn't yet. The context must be current. Threads: safe.
     *  Throws Error. */
    Function function(Kernel kernel, Request const& request);

    /** Streaming multiprocessors of the GPU. */
    int32_t sm_count() const { return sm_count_; }

private:
    Context context_;
    int32_t sm_count_;
    Target const* target_;
    std::mutex mutex_;
    std::vector<CUmodule> modules_;
    std::vector<CUfunction> functions_; // by variant; null: not loaded yet
};

} // namespace qwen_aot
