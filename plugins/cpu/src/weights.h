/** Weights in large pages: a decode step reads all of them, and small pages cost it a tenth of its time. */
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace qwen_aot::cpu
{

/** Constant bytes: a copy in large pages, or the memory that they were given in.
 *
 *  Copies of all matrices share regions of large pages; a region is given back with the last of them. All copies of a process
 *  together take at most half of the memory that was free (`free_memory`) when it made the first of them. Where the system
 *  has no large pages, or the environment variable QWEN_AOT_CPU_WEIGHTS is "mapped" (processes that run one bundle then share
 *  its file's pages), nothing is copied. */
class Weights
{
public:
    Weights() = default;
    /** data: outlives this object where it isn't copied. Where it is a file's and is copied, its pages no longer count as
     *  this process's. Any thread.
     *  Throws Error: the environment variable is neither "mapped" nor "copied". */
    Weights(void const* data, size_t bytes);

    /** Memory for `bytes` of constants in another order than they were given in, as for a copy; nullptr: nothing is to be
     *  copied, or no longer. At an address that 64 divides. It is given back with its last owner. Any thread.
     *  Throws Error: as above. */
    static std::shared_ptr<void> room(size_t bytes);
    /** Says that constants of which there is a copy won't be read any more: a file's pages no longer count as this process's. */
    static void forget(void const* data, size_t bytes);

    uint8_t const* data() const { return data_; }

private:
    uint8_t const* data_ = nullptr;
    std::shared_ptr<void> copy_; // nullptr: there is none
};

} // namespace qwen_aot::cpu
