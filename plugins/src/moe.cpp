#include "moe.h"

#include "launch.h"

#include <algorithm>
#include <limits>

namespace qwen_aot
{
namespace
{

enum Input
{
    kHidden,
    kExpertIds,
    kExpertWeights,
    kGateUp,
    kDown,
    kGateUpScale, // of 8 and 4 bits
    kDownScale,
    kGateUpZero, // with zeros
    kDownZero
};

constexpr int64_t kHalfBytes = 2;  // fp16 and bf16
constexpr int64_t kFloatBytes = 4; // fp32
constexpr int64_t kIntBytes = 4;   // int32

TensorTable table_of(MoeAttributes const& attributes)
{
    using L = Letter;
    TensorTable table;
    Type const weight = attributes.weight_bits == 16 ? Type::compute : Type::int8;
    int64_t const codes_per_byte = attributes.weight_bits == 4 ? 2 : 1;
    table.inputs = {
        {"hidden", Type::compute, {L::B, L::S, L::M}},
        {"expert_ids", Type::int32, {L::B, L::S, L::k}},
        {"expert_weights", Type::float32, {L::B, L::S, L::k}},
        {"gate_up", weight, {L::E, Axis(L::F, 2), Axis(L::M, 1, codes_per_byte)}},
        {"down", weight, {L::E, L::M, Axis(L::F, 1, codes_per_byte)}},
    };
    Axis const gate_up_blocks(L::M, 1, kQuantBlock);
    Axis const down_blocks(L::F, 1, kQuantBlock);
    if (attributes.weight_bits == 8)
    {
        table.inputs.push_back({"gate_up_scale", Type::compute, {L::E, Axis(L::F, 2)}});
        table.inputs.push_back({"down_scale", Type::compute, {L::E, L::M}});
    }
    if (attributes.weight_bits == 4)
    {
        table.inputs.push_back({"gate_up_scale", Type::compute, {L::E, Axis(L::F, 2), gate_up_blocks}});
        table.inputs.push_back({"down_scale", Type::compute, {L::E, L::M, down_blocks}});
    }
    if (attributes.has_zeros != 0)
    {
        table.inputs.push_back({"gate_up_zero", Type::int8, {L::E, Axis(L::F, 2), gate_up_blocks}});
        table.inputs.push_back({"down_zero", Type::int8, {L::E, L::M, down_blocks}});
    }
    table.outputs = {{"output", Type::compute, {L::B, L::S, L::M}}};
    table.known.set(L::E, attributes.num_experts).set(L::k, attributes.experts_per_token);
    return table;
}

/** What its variants are chosen by. */
Request request_of(MoeAttributes const& attributes, Dtype dtype, int32_t tactic)
{
    return Request()
        .with(Fact::dtype, static_cast<int32_t>(dtype))
        .with(Fact::weight_bits, attributes.weight_bits)
        .with(Fact::has_zeros, attributes.has_zeros)
        .with(Fact::tactic, tactic);
}

MoeAttributes const& checked(MoeAttributes const& attributes)
{
    auto const refuse = [](char const* field, int32_t value, auto const&... why) {
        throw Error(text("field ", field, " is ", value, "; ", why...));
    };
    if (attributes.num_experts < 1)
    {
        refuse("num_experts", attributes.num_experts, "it must be at least 1");
    }
    if (attributes.experts_per_token < 1 || attributes.experts_per_token > attributes.num_experts)
    {
        refuse(
            "experts_per_token", attributes.experts_per_token, "it must be 1 to num_experts, ", attributes.num_experts);
    }
    if (attributes.weight_bits != 16 && attributes.weight_bits != 8 && attributes.weight_bits != 4)
    {
        refuse("weight_bits", attributes.weight_bits, "it must be 16, 8 or 4");
    }
    if (attributes.has_zeros != 0 && (attributes.has_zeros != 1 || attributes.weight_bits != 4))
    {
        refuse("has_zeros", attributes.has_zeros, "it must be 0, or 1 with weight_bits 4");
    }
    return attributes;
}

/** Most blocks that moe_scatter can fill: each expert that is chosen pads less than a block. */
int64_t most_blocks(int64_t num_entries, int64_t num_experts, int64_t block_m)
{
    return (num_entries + std::min(num_experts, num_entries) * (block_m - 1)) / block_m;
}

/** What suffices for the blocks of any tactic. */
struct MoeWorkspace
{
    MoeWorkspace(
        void* memory, int64_t entries, int64_t hidden_size, int64_t inner_size, int64_t num_experts, bool is_decode)
        : workspace(memory)
    {
        inner = workspace.take(entries * inner_size * kHalfBytes);
        partial = workspace.take(entries * hidden_size * kFloatBytes);
        if (!is_decode)
        {
            int64_t const most_places = most_blocks(entries, num_experts, kMoeLargestBlock) * kMoeLargestBlock;
            counts = workspace.take(num_experts * kIntBytes);
            sorted_entries = workspace.take(most_places * kIntBytes);
            block_experts = workspace.take(most_blocks(entries, num_experts, kMoeSmallestBlock) * kIntBytes);
            num_blocks = workspace.take(kIntBytes);
        }
        expert_ids = workspace.take(entries * kIntBytes);
    }

    Workspace workspace;
    void* inner;                   // [T·k, F]
    void* partial;                 // [T·k, M]
    void* counts{nullptr};         // [E]
    void* sorted_entries{nullptr}; // [blocks·block_m]
    void* block_experts{nullptr};  // [blocks]
    void* num_blocks{nullptr};     // [1]
    void* expert_ids;              // [T, k], in the place of the input, while TensorRT times a step
};

} // namespace

MoePlugin::MoePlugin(MoeAttributes const& attributes, nvinfer1::TensorRTPhase phase)
    : Plugin(kName, table_of(checked(attributes)), phase, field_words(kFields, attributes))
    , attributes_(attributes)
{
}

nvinfer1::IPluginV3* MoePlugin::clone() noexcept
{
    return guarded<nvinfer1::IPluginV3*>(
        kName, nullptr, [&] { return with_tactic(std::make_unique<MoePlugin>(attributes_, phase())); });
}

bool MoePlugin::is_decode(int64_t num_tokens) const
{
    return num_tokens <= kDecodeTokens && attributes_.experts_per_token <= kDecodeChoices;
}

void MoePlugin::check_extents(Extents const& extents) const
{
    for (auto const& [letter, name] : {std::pair(Letter::M, "hidden size"), std::pair(Letter::F, "intermediate size")})
    {
        int64_t const size = extents.get(letter);
        if (size != kUnknown && (size < 1 || size % kSizeMultiple != 0))
        {
            throw Error(text("the ", name, " is ", size, "; it must be a multiple of ", kSizeMultiple));
        }
    }
    int64_t const largest = std::numeric_limits<int32_t>::max() - kMoeLargestBlock * int64_t{attributes_.num_experts};
    int64_t const tokens = extents.get(Letter::B) * extents.get(Letter::S);
    if (tokens * attributes_.experts_per_token > largest)
    {
        throw Error(text(tokens, " tokens of ", attributes_.experts_per_token, " experts are too many; there may be ",
            largest / attributes_.experts_per_token, " tokens"));
    }
}

size_t MoePlugin::workspace_bytes(Extents const&, Extents const& largest) const
{
    // More tokens never need less: the path of many tokens needs all that the other does.
    int64_t const tokens = largest.get(Letter::B) * largest.get(Letter::S);
    MoeWorkspace const memory(nullptr, tokens * attributes_.experts_per_token, largest.get(Letter::M),
        largest.get(Letter::F), attributes_.num_experts, is_decode(tokens));
    return memory.workspace.bytes();
}

void MoePlugin::load(Kernels& kernels, nvinfer1::DataType compute)
{
    Dtype const dtype = compute == nvinfer1::DataType::kBF16 ? Dtype::bf16 : Dtype::fp16;
    Request const request = request_of(attributes_, dtype, tactic());
    decode_gate_up_ = kernels.function(Kernel::moe_decode_gate_up, request);
    decode_down_ = kernels.function(Kernel::moe_decode_down, request);
    count_ = kernels.function(Kernel::moe_count, request);
    scatter_ = kernels.function(Kernel::moe_scatter, request);
    gate_up_ = kernels.function(Kernel::moe_gate_up, request);
    down_ = kernels.function(Kernel::moe_down, request);
    sum_ = kernels.function(Kernel::moe_sum, request);
    if (phase() == nvinfer1::TensorRTPhase::kBUILD)
    {
        timed_ids_ = kernels.function(Kernel::moe_timed_ids, request);
    }
}

void MoePlugin::launch_step(
    Extents const& extents, void const* const* inputs, void* const* outputs, void* workspace, CUstream stream) const
{
    int64_t const tokens = extents.get(Letter::B) * extents.get(Letter::S);
    int64_t const choices = attributes_.experts_per_token;
    int64_t const experts = attributes_.num_experts;
    int64_t const hidden_size = extents.get(Letter::M);
    int64_t const inner_size = extents.get(Letter::F);
    int64_t const entries = tokens * choices;
    bool const is_few = is_decode(tokens);
    MoeWorkspace const memory(workspace, entries, hidden_size, inner_size, experts, is_few);
    int64_t const block_m = gate_up_.variant->grid_per[0];
    bool const is_builders = phase() == nvinfer1::TensorRTPhase::kBUILD;

    Sizes sizes;
    sizes.set(Size::T, tokens)
        .set(Size::k, choices)
        .set(Size::E, experts)
        .set(Size::M, hidden_size)
        .set(Size::F, inner_size)
        .set(Size::padded_entries, most_blocks(entries, experts, block_m) * block_m);
    Arguments arguments;
    arguments.pointer(Argument::hidden_ptr, inputs[kHidden])
        .pointer(Argument::given_ids_ptr, inputs[kExpertIds])
        .pointer(Argument::expert_ids_ptr, is_builders ? memory.expert_ids : inputs[kExpertIds])
        .pointer(Argument::expert_weights_ptr, inputs[kExpertWeights])
        .pointer(Argument::inner_ptr, memory.inner)
        .pointer(Argument::partial_ptr, memory.partial)
        .pointer(Argument::output_ptr, outputs[0])
        .pointer(Argument::counts_ptr, memory.counts)
        .pointer(Argument::sorted_entries_ptr, memory.sorted_entries)
        .pointer(Argument::block_experts_ptr, memory.block_experts)
        .pointer(Argument::num_blocks_ptr, memory.num_blocks)
        .integer(Argument::num_tokens, tokens)
        .integer(Argument::num_entries, entries)
        .integer(Argument::num_experts, experts)
        .integer(Argument::k, choices)
        .integer(Argument::M, hidden_size)
        .integer(Argument::F, inner_size)
        .integer(Argument::block_m, block_m);
    bool const has_scales = attributes_.weight_bits < 16;
    bool const has_zeros = attributes_.has_zeros != 0;
    auto const use_matrix = [&](Input codes, Input scale, Input zero) {
        arguments.pointer(Argument::weight_ptr, inputs[codes])
            .pointer(Argument::scale_ptr, has_scales ? inputs[scale] : nullptr)
            .pointer(Argument::zero_ptr, has_zeros ? inputs[zero] : nullptr);
    };

    if (is_builders)
    {
        launch(timed_ids_, arguments, sizes, stream);
    }
    if (!is_few)
    {
        launch(count_, arguments, sizes, stream);
        launch(scatter_, arguments, sizes, stream);
    }
    use_matrix(kGateUp, kGateUpScale, kGateUpZero);
    launch(is_few ? decode_gate_up_ : gate_up_, arguments, sizes, stream);
    use_matrix(kDown, kDownScale, kDownZero);
    launch(is_few ? decode_down_ : down_, arguments, sizes, stream);
    launch(sum_, arguments, sizes, stream);
}

} // namespace qwen_aot
