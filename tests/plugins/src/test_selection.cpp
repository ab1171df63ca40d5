/** How a target and a variant are chosen, on a table of the test's own: test_selection TEST. */
#include "harness.h"
#include "kernels.h"
#include "log.h"

namespace qwen_aot
{

// ---- The table: 8.0, 8.6 and 9.0, and PTX of 8.0 ----

namespace
{

Variant const some_variants[] = {
    {"small", Kernel::gqa_decode, 2, {{Fact::head_dim, 64, 64}, {Fact::group, 1, 1}}, "gqa_decode", 4, 0, {1, 1, 1},
        nullptr},
    {"other", Kernel::gqa_prefill, 0, {}, "gqa_prefill", 4, 0, {1, 1, 1}, nullptr},
    {"large", Kernel::gqa_decode, 2, {{Fact::head_dim, 64, 64}, {Fact::group, 2, 16}}, "gqa_decode", 4, 0, {1, 1, 1},
        nullptr},
};
char const* const dtype_words[] = {"fp16", "bf16"};
char const* const cache_words[] = {"same", "int8"};

} // namespace

KernelInfo const kKernels[kNumKernels] = {{"gqa_rotate", 0, nullptr, 0, nullptr},
    {"gqa_prefill", 0, nullptr, 0, nullptr}, {"gqa_decode", 0, nullptr, 0, nullptr}};
char const* const kArgumentNames[kNumArguments] = {};
char const* const kFactNames[kNumFacts] = {"dtype", "cache", "head_dim", "group", "weight_bits", "has_zeros"};
char const* const* const kFactValues[kNumFacts] = {dtype_words, cache_words};
Target const kTargets[] = {{80, false, 3, some_variants}, {86, false, 3, some_variants}, {90, false, 3, some_variants},
    {80, true, 3, some_variants}};
int32_t const kNumTargets = 4;
Compatible const kCompatible[] = {{86, 80}, {89, 86}, {89, 80}};
int32_t const kNumCompatible = 3;

} // namespace qwen_aot

using namespace qwen_aot;

namespace
{

std::string refusal(std::function<void()> const& body)
{
    try
    {
        body();
    }
    catch (Error const& error)
    {
        return error.what();
    }
    return "";
}

Request request(int32_t head_dim, int32_t group)
{
    return Request()
        .with(Fact::dtype, static_cast<int32_t>(Dtype::bf16))
        .with(Fact::head_dim, head_dim)
        .with(Fact::group, group);
}

} // namespace

TEST(an_sm_takes_its_own_cubins)
{
    CHECK(&select_target(80) == &kTargets[0]);
    CHECK(&select_target(86) == &kTargets[1]);
    CHECK(&select_target(90) == &kTargets[2]);
}

TEST(a_compatible_sm_takes_the_best_cubins_that_there_are)
{
    CHECK(&select_target(89) == &kTargets[1]);
}

TEST(any_other_later_sm_takes_ptx)
{
    for (int32_t const sm : {87, 100, 103, 121})
    {
        CHECK(&select_target(sm) == &kTargets[3]);
    }
}

TEST(an_earlier_sm_is_refused_with_what_there_is)
{
    CHECK(refusal([] { select_target(75); })
        == "no kernels for SM 7.5; this library has them for 8.0, 8.6, 9.0, 8.0 and later (PTX)");
}

TEST(the_variant_that_serves_is_taken)
{
    CHECK(std::string(select_variant(kTargets[0], Kernel::gqa_decode, request(64, 1)).name) == "small");
    CHECK(std::string(select_variant(kTargets[0], Kernel::gqa_decode, request(64, 2)).name) == "large");
    CHECK(std::string(select_variant(kTargets[0], Kernel::gqa_decode, request(64, 16)).name) == "large");
    CHECK(std::string(select_variant(kTargets[0], Kernel::gqa_prefill, Request()).name) == "other");
}

TEST(a_request_that_none_serves_is_printed)
{
    std::string const words = refusal([] { select_variant(kTargets[1], Kernel::gqa_decode, request(96, 2)); });
    CHECK(words
        == "no variant of gqa_decode for SM 8.6 serves dtype=bf16, head_dim=96, group=2; there are: small; large");
    CHECK(!refusal([] { select_variant(kTargets[1], Kernel::gqa_decode, request(64, 17)); }).empty());
    // A fact that isn't named serves nothing that asks for it.
    CHECK(
        !refusal([] { select_variant(kTargets[1], Kernel::gqa_decode, Request().with(Fact::head_dim, 64)); }).empty());
}

int main(int count, char** arguments)
{
    return count == 2 ? run_test(arguments[1]) : 2;
}
