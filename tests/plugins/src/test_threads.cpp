/** What the library says of threads, for ThreadSanitizer: test_threads DRIVER TEST, DRIVER being threads_driver.cpp's
 *  library, which lies on the loader's path as libcuda.so.1. */
#include "harness.h"
#include "kernels.h"
#include "log.h"

#include <atomic>
#include <dlfcn.h>
#include <thread>

namespace qwen_aot
{

// ---- The table: 8.0 ----

namespace
{

constexpr unsigned char images[2] = {};
Variant const some_variants[] = {
    {"small", Kernel::gqa_decode, 1, {{Fact::group, 1, 1}}, "gqa_decode", 4, 0, {1, 1, 1}, &images[0]},
    {"large", Kernel::gqa_decode, 1, {{Fact::group, 2, 16}}, "gqa_decode", 4, 99 * 1024, {1, 1, 1}, &images[1]},
};

} // namespace

KernelInfo const kKernels[kNumKernels] = {};
char const* const kArgumentNames[kNumArguments] = {};
char const* const kFactNames[kNumFacts] = {"dtype", "cache", "head_dim", "group", "weight_bits", "has_zeros"};
char const* const* const kFactValues[kNumFacts] = {};
Target const kTargets[] = {{80, false, 2, some_variants}};
int32_t const kNumTargets = 1;
Compatible const kCompatible[] = {{86, 80}};
int32_t const kNumCompatible = 1;

} // namespace qwen_aot

using namespace qwen_aot;

namespace
{

constexpr int num_threads = 8;
constexpr int num_rounds = 300;
void* driver_library = nullptr;

template <class Function>
Function* of_driver(char const* name)
{
    return reinterpret_cast<Function*>(dlsym(driver_library, name));
}

/** Runs body(thread) in several threads at once; the number of calls that gave false. */
int run_in_threads(std::function<bool(int)> const& body)
{
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (int thread = 0; thread < num_threads; ++thread)
    {
        threads.emplace_back([&, thread] {
            for (int round = 0; round < num_rounds; ++round)
            {
                wrong += body(thread) ? 0 : 1;
            }
        });
    }
    for (std::thread& thread : threads)
    {
        thread.join();
    }
    return wrong;
}

/** Both variants in a context, each the one that was asked for. */
bool asks_for_both(Kernels& kernels)
{
    for (int32_t const group : {1, 5})
    {
        Function const function = kernels.function(Kernel::gqa_decode, Request().with(Fact::group, group));
        int const index = group == 1 ? 0 : 1;
        if (function.variant != &kTargets[0].variants[index]
            || static_cast<void const*>(function.handle) != kTargets[0].variants[index].image)
        {
            return false;
        }
    }
    return true;
}

} // namespace

TEST(threads_share_the_kernels_of_a_context)
{
    of_driver<void(uintptr_t)>("threads_set_current")(1);
    std::shared_ptr<Kernels> const kept = Kernels::of_current_context();
    CHECK(run_in_threads([&](int) {
        of_driver<void(uintptr_t)>("threads_set_current")(1);
        std::shared_ptr<Kernels> const kernels = Kernels::of_current_context();
        return kernels == kept && asks_for_both(*kernels);
    }) == 0);
    CHECK(of_driver<int()>("threads_loads")() == 2);
    CHECK(of_driver<int()>("threads_unloads")() == 0);
}

TEST(kernels_come_and_go_in_several_contexts)
{
    CHECK(run_in_threads([](int thread) {
        of_driver<void(uintptr_t)>("threads_set_current")(1 + thread % 3);
        return asks_for_both(*Kernels::of_current_context());
    }) == 0);
    int const loads = of_driver<int()>("threads_loads")();
    CHECK(loads >= 6 && loads % 2 == 0);
    CHECK(of_driver<int()>("threads_unloads")() == loads);
}

int main(int count, char** arguments)
{
    if (count != 3 || (driver_library = dlopen(arguments[1], RTLD_NOW)) == nullptr)
    {
        std::puts("test_threads DRIVER TEST");
        return 2;
    }
    return run_test(arguments[2]);
}
