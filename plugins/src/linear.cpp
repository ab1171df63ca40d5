#include "linear.h"

#include "launch.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <tuple>

namespace qwen_aot
{
namespace
{

enum Input
{
    kX,
    kWeight,
    kScale,
    kOptional // zeros, where there are some; then the bias
};

constexpr int64_t kFloatBytes = 4;                // fp32
constexpr int64_t kUnusedBytes = 4 * kFloatBytes; // of workspace that nothing is written to
constexpr int32_t kWholeGroup = -1;

TensorTable table_of(LinearAttributes const& attributes)
{
    using L = Letter;
    int64_t const codes_per_byte = attributes.weight_bits == 4 ? 2 : 1;
    bool const is_whole = attributes.group_size == kWholeGroup;
    Axis const blocks = is_whole ? Axis(L::blocks) : Axis(L::K, 1, attributes.group_size);
    TensorTable table;
    table.inputs = {
        {"x", Type::compute, {L::B, L::S, L::K}},
        {"weight", Type::int8, {Axis(L::N, 1, codes_per_byte), L::K}},
        {"scale", Type::compute, {blocks, L::N}},
    };
    if (attributes.has_zeros != 0)
    {
        table.inputs.push_back({"zero", Type::int8, {blocks, L::N}});
    }
    if (attributes.has_bias != 0)
    {
        table.inputs.push_back({"bias", Type::compute, {L::N}});
    }
    table.outputs = {{"output", Type::compute, {L::B, L::S, L::N}}};
    if (is_whole)
    {
        table.known.set(L::blocks, 1);
    }
    return table;
}

bool has_small_blocks(LinearAttributes const& attributes)
{
    return attributes.group_size > 0 && attributes.group_size <= kLargestSmallBlock;
}

/** What its variants are chosen by. */
Request request_of(LinearAttributes const& attributes, Dtype dtype, int32_t tactic)
{
    return Request()
        .with(Fact::dtype, static_cast<int32_t>(dtype))
        .with(Fact::weight_bits, attributes.weight_bits)
        .with(Fact::has_zeros, attributes.has_zeros)
        .with(Fact::blocks, static_cast<int32_t>(has_small_blocks(attributes) ? Blocks::small : Blocks::large))
        .with(Fact::tactic, tactic);
}

LinearAttributes const& checked(LinearAttributes const& attributes)
{
    auto const refuse = [](char const* field, int32_t value, char const* why) {
        throw Error(text("field ", field, " is ", value, "; ", why));
    };
    if (attributes.weight_bits != 8 && attributes.weight_bits != 4)
    {
        refuse("weight_bits", attributes.weight_bits, "it must be 8 or 4");
    }
    int32_t const group = attributes.group_size;
    if (group != 32 && group != 64 && group != 128 && group != kWholeGroup)
    {
        refuse("group_size", group, "it must be 32, 64, 128, or -1 for all of K");
    }
    if (attributes.weight_bits == 8 && has_small_blocks(attributes))
    {
        refuse("group_size", group, "with weight_bits 8 it must be 128, or -1 for all of K");
    }
    if (attributes.has_zeros != 0 && (attributes.has_zeros != 1 || attributes.weight_bits != 4))
    {
        refuse("has_zeros", attributes.has_zeros, "it must be 0, or 1 with weight_bits 4");
    }
    if (attributes.has_bias != 0 && attributes.has_bias != 1)
    {
        refuse("has_bias", attributes.has_bias, "it must be 0 or 1");
    }
    return attributes;
}

/** A column's number shifted by it is that of its block. */
int32_t group_shift_of(int32_t group_size)
{
    int32_t shift = 0;
    while (group_size != kWholeGroup && group_size >> (shift + 1) != 0)
    {
        ++shift;
    }
    return group_size == kWholeGroup ? kWholeShift : shift;
}

int64_t divided(int64_t value, int64_t per)
{
    return (value + per - 1) / per;
}

/** Columns of K that a program of decode takes, and how many programs share them out. */
struct Split
{
    int64_t size;
    int64_t parts;
};

/** `linear_split` of plugins/launch.py. */
Split split_of(int64_t rows, int64_t columns, int64_t rows_of_program, int64_t sm_count)
{
    int64_t const sms = std::min<int64_t>(sm_count, kLinearMostSms);
    int64_t const wanted = divided(kLinearProgramsPerSm * sms, divided(rows, rows_of_program));
    int64_t const parts = std::max<int64_t>(1, std::min(wanted, columns / kLinearMinSplit));
    int64_t const size = divided(columns / kSizeMultiple, parts) * kSizeMultiple;
    return {size, divided(columns, size)};
}

int64_t partial_bytes(int64_t tokens, int64_t rows, int64_t parts)
{
    return parts > 1 ? parts * tokens * rows * kFloatBytes : kUnusedBytes;
}

} // namespace

LinearPlugin::LinearPlugin(LinearAttributes const& attributes, nvinfer1::TensorRTPhase phase)
    : Plugin(kName, table_of(checked(attributes)), phase, field_words(kFields, attributes))
    , attributes_(attributes)
{
}

nvinfer1::IPluginV3* LinearPlugin::clone() noexcept
{
    return guarded<nvinfer1::IPluginV3*>(
        kName, nullptr, [&] { return with_tactic(std::make_unique<LinearPlugin>(attributes_, phase())); });
}

int32_t LinearPlugin::num_tactics() const
{
    return has_small_blocks(attributes_) || attributes_.has_zeros != 0 ? 1 : kTactics;
}

void LinearPlugin::check_extents(Extents const& extents) const
{
    for (auto const& [letter, name, multiple] :
        {std::tuple(Letter::N, "outputs", kLinearRowMultiple), std::tuple(Letter::K, "inputs", kSizeMultiple)})
    {
        int64_t const size = extents.get(letter);
        if (size != kUnknown && (size < 1 || size % multiple != 0))
        {
            throw Error(text("the number of ", name, " is ", size, "; it must be a multiple of ", multiple));
        }
    }
    int64_t const tokens = extents.get(Letter::B) * extents.get(Letter::S);
    if (tokens > std::numeric_limits<int32_t>::max())
    {
        throw Error(text(tokens, " tokens are too many; there may be ", std::numeric_limits<int32_t>::max()));
    }
}

size_t LinearPlugin::workspace_bytes(Extents const& smallest, Extents const& largest) const
{
    // Of the widest program there are fewest, of which each column is shared out among most.
    int64_t const fewest = smallest.get(Letter::B) * smallest.get(Letter::S);
    int64_t const tokens = std::min<int64_t>(largest.get(Letter::B) * largest.get(Letter::S), kDecodeTokens);
    int64_t const rows = largest.get(Letter::N);
    Split const split = split_of(rows, largest.get(Letter::K), kLinearWidestProgram, kLinearMostSms);
    Workspace workspace(nullptr);
    workspace.take(partial_bytes(tokens, rows, fewest <= kDecodeTokens ? split.parts : 1));
    return workspace.bytes();
}

void LinearPlugin::load(Kernels& kernels, nvinfer1::DataType compute)
{
    Dtype const dtype = compute == nvinfer1::DataType::kBF16 ? Dtype::bf16 : Dtype::fp16;
    Request const request = request_of(attributes_, dtype, tactic());
    decode_ = kernels.function(Kernel::linear_decode, request);
    reduce_ = kernels.function(Kernel::linear_reduce, request);
    prefill_ = kernels.function(Kernel::linear_prefill, request);
    sm_count_ = kernels.sm_count();
}

void LinearPlugin::launch_step(
    Extents const& extents, void const* const* inputs, void* const* outputs, void* workspace, CUstream stream) const
{
    int64_t const tokens = extents.get(Letter::B) * extents.get(Letter::S);
    int64_t const rows = extents.get(Letter::N);
    int64_t const columns = extents.get(Letter::K);
    bool const has_zeros = attributes_.has_zeros != 0;
    bool const has_bias = attributes_.has_bias != 0;
    Split const split = split_of(rows, columns, decode_.variant->grid_per[0], sm_count_);

    Sizes sizes;
    sizes.set(Size::T, tokens).set(Size::N, rows).set(Size::num_splits, split.parts);
    Arguments arguments;
    // Of what isn't there, the pointer is of its type, and nothing is read through it.
    arguments.pointer(Argument::x_ptr, inputs[kX])
        .pointer(Argument::weight_ptr, inputs[kWeight])
        .pointer(Argument::scale_ptr, inputs[kScale])
        .pointer(Argument::zero_ptr, has_zeros ? inputs[kOptional] : inputs[kWeight])
        .pointer(Argument::bias_ptr, has_bias ? inputs[kOptional + attributes_.has_zeros] : outputs[0])
        .pointer(Argument::partial_ptr, workspace)
        .pointer(Argument::output_ptr, outputs[0])
        .integer(Argument::num_tokens, tokens)
        .integer(Argument::group_shift, group_shift_of(attributes_.group_size))
        .integer(Argument::has_zeros, attributes_.has_zeros)
        .integer(Argument::has_bias, attributes_.has_bias)
        .integer(Argument::N, rows)
        .integer(Argument::K, columns)
        .integer(Argument::split_size, split.size)
        .integer(Argument::num_splits, split.parts);

    if (tokens > kDecodeTokens)
    {
        launch(prefill_, arguments, sizes, stream);
        return;
    }
    launch(decode_, arguments, sizes, stream);
    if (split.parts > 1)
    {
        launch(reduce_, arguments, sizes, stream);
    }
}

} // namespace qwen_aot
