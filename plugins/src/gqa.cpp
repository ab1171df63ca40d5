#include "gqa.h"

#include "launch.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace qwen_aot
{
namespace
{

enum Input
{
    kQkv,
    kPastKey,
    kPastValue,
    kCos,
    kSin,
    kPositionIds,
    kCacheLength,
    kNewTokens,
    kKeyScale, // with an int8 cache
    kValueScale
};

/** Where the norms of queries, and behind them those of keys, stand among the inputs: the last two. */
int32_t first_norm(bool is_int8)
{
    return is_int8 ? kValueScale + 1 : kKeyScale;
}

enum Output
{
    kAttention,
    kPresentKey,
    kPresentValue,
    kPresentKeyScale, // with an int8 cache
    kPresentValueScale
};

constexpr int64_t kHalfBytes = 2;  // fp16 and bf16
constexpr int64_t kFloatBytes = 4; // fp32
constexpr int64_t kLongBytes = 8;  // int64

TensorTable table_of(GqaAttributes const& attributes)
{
    using L = Letter;
    bool const is_int8 = attributes.cache_bits == 8;
    Type const cache = is_int8 ? Type::int8 : Type::compute;
    std::vector<Axis> const slots{L::B, L::Hkv, L::C, L::D};
    std::vector<Axis> const slot_scales{L::B, L::Hkv, L::C};
    TensorTable table;
    table.inputs = {
        {"qkv", Type::compute, {L::B, L::S, L::qkv}},
        {"past_key", cache, slots},
        {"past_value", cache, slots},
        {"cos", Type::float32, {L::P, Axis(L::D, 1, 2)}},
        {"sin", Type::float32, {L::P, Axis(L::D, 1, 2)}},
        {"position_ids", Type::int64, {L::B, L::S}},
        {"cache_length", Type::int64, {L::B}},
        {"new_tokens", Type::int64, {L::B}},
    };
    table.outputs = {
        {"attention", Type::compute, {L::B, L::S, L::HD}},
        {"present_key", cache, slots},
        {"present_value", cache, slots},
    };
    if (is_int8)
    {
        table.inputs.push_back({"key_scale", Type::float16, slot_scales});
        table.inputs.push_back({"value_scale", Type::float16, slot_scales});
        table.outputs.push_back({"present_key_scale", Type::float16, slot_scales});
        table.outputs.push_back({"present_value_scale", Type::float16, slot_scales});
    }
    if (attributes.norm_epsilon > 0)
    {
        table.inputs.push_back({"q_norm", Type::float32, {L::D}});
        table.inputs.push_back({"k_norm", Type::float32, {L::D}});
    }
    int64_t const head_dim = attributes.head_dim;
    table.known.set(L::Hkv, attributes.num_kv_heads)
        .set(L::D, head_dim)
        .set(L::HD, attributes.num_heads * head_dim)
        .set(L::qkv, (attributes.num_heads + int64_t{2} * attributes.num_kv_heads) * head_dim);
    return table;
}

/** What its variants are chosen by. */
Request request_of(GqaAttributes const& attributes, Dtype dtype)
{
    Cache const cache = attributes.cache_bits == 8 ? Cache::int8 : Cache::same;
    return Request()
        .with(Fact::dtype, static_cast<int32_t>(dtype))
        .with(Fact::cache, static_cast<int32_t>(cache))
        .with(Fact::head_dim, attributes.head_dim)
        .with(Fact::group, attributes.num_heads / attributes.num_kv_heads);
}

GqaAttributes const& checked(GqaAttributes const& attributes)
{
    auto const refuse = [](char const* field, auto value, auto const&... why) {
        throw Error(text("field ", field, " is ", value, "; ", why...));
    };
    if (attributes.num_kv_heads < 1)
    {
        refuse("num_kv_heads", attributes.num_kv_heads, "it must be at least 1");
    }
    if (attributes.num_heads < 1 || attributes.num_heads % attributes.num_kv_heads != 0)
    {
        refuse("num_heads", attributes.num_heads, "it must be a multiple of num_kv_heads, ", attributes.num_kv_heads);
    }
    if (attributes.cache_bits != 8 && attributes.cache_bits != 16)
    {
        refuse("cache_bits", attributes.cache_bits, "it must be 16 (the compute type) or 8 (int8)");
    }
    if (!std::isfinite(attributes.norm_epsilon) || attributes.norm_epsilon < 0)
    {
        refuse("norm_epsilon", attributes.norm_epsilon, "it must be positive, or 0 where heads have no norms");
    }
    if (!std::isfinite(attributes.scale) || attributes.scale <= 0)
    {
        refuse("scale", attributes.scale, "it must be positive");
    }
    // Head sizes and groups are the same for every SM, type and tactic.
    select_variant(kTargets[0], Kernel::gqa_decode, request_of(attributes, Dtype::fp16));
    return attributes;
}

struct GqaWorkspace
{
    GqaWorkspace(void* memory, GqaAttributes const& attributes, int64_t batch, int64_t steps, int64_t num_splits)
        : workspace(memory)
    {
        int64_t const heads = attributes.num_heads;
        query = workspace.take(batch * steps * heads * attributes.head_dim * kHalfBytes);
        if (steps == 1)
        {
            partial = workspace.take(batch * heads * num_splits * attributes.head_dim * kFloatBytes);
            partial_lse = workspace.take(batch * heads * num_splits * kFloatBytes);
        }
        position_ids = workspace.take(batch * steps * kLongBytes);
        cache_length = workspace.take(batch * kLongBytes);
        new_tokens = workspace.take(batch * kLongBytes);
    }

    Workspace workspace;
    void* query;                // [B, S, H, D], rotated
    void* partial{nullptr};     // [B, H, num_splits, D]
    void* partial_lse{nullptr}; // [B, H, num_splits]
    // In the place of the inputs, while TensorRT times a step.
    void* position_ids; // [B, S]
    void* cache_length; // [B]
    void* new_tokens;   // [B]
};

/** An output that is written in its input's place. */
struct InPlace
{
    Input past;
    Output present;
    char const* name; // of present
};

constexpr InPlace kInPlace[] = {
    {kPastKey, kPresentKey, "present_key"},
    {kPastValue, kPresentValue, "present_value"},
    {kKeyScale, kPresentKeyScale, "present_key_scale"}, // these with an int8 cache
    {kValueScale, kPresentValueScale, "present_value_scale"},
};

} // namespace

GqaPlugin::GqaPlugin(GqaAttributes const& attributes, nvinfer1::TensorRTPhase phase)
    : Plugin(kName, table_of(checked(attributes)), phase, field_words(kFields, attributes))
    , attributes_(attributes)
{
}

nvinfer1::IPluginV3* GqaPlugin::clone() noexcept
{
    return guarded<nvinfer1::IPluginV3*>(
        kName, nullptr, [&] { return with_tactic(std::make_unique<GqaPlugin>(attributes_, phase())); });
}

/** Fewest slots of a part of decode attention (plugins/launch.py, min_split). */
int64_t GqaPlugin::min_split(int32_t tactic) const
{
    int64_t const slots = std::max(kMinSplit, kMinSplitPerHead * group() * (is_int8() ? 2 : 1));
    return tactic == 1 ? slots : slots / 2;
}

/** Parts that a row of full length is split into: enough for every SM, none smaller than `min_split`
 *  (plugins/launch.py, num_splits). */
int64_t GqaPlugin::num_splits(int64_t batch, int64_t capacity) const
{
    int64_t const rows = batch * attributes_.num_kv_heads;
    int64_t const wanted = (int64_t{kProgramsPerSm} * sm_count_ + rows - 1) / rows;
    return std::max<int64_t>(1, std::min(wanted, capacity / min_split(tactic())));
}

void GqaPlugin::check_extents(Extents const& extents) const
{
    // Inside one head of the cache, kernels count elements with 32 bits; tokens too.
    int64_t const largest = std::numeric_limits<int32_t>::max();
    if (extents.get(Letter::C) * attributes_.head_dim > largest)
    {
        throw Error(text("a cache of ", extents.get(Letter::C), " slots of ", attributes_.head_dim,
            " elements is too large; one head may have 2^31"));
    }
    if (extents.get(Letter::B) * extents.get(Letter::S) > largest)
    {
        throw Error(text(extents.get(Letter::B), " rows of ", extents.get(Letter::S), " tokens are more than 2^31"));
    }
}

size_t GqaPlugin::workspace_bytes(Extents const& smallest, Extents const& largest) const
{
    int64_t const batch = largest.get(Letter::B);
    size_t const prefill = GqaWorkspace(nullptr, attributes_, batch, largest.get(Letter::S), 0).workspace.bytes();
    if (smallest.get(Letter::S) > 1)
    {
        return prefill;
    }
    // The most parts for any GPU, since an engine may run on another than it was built on, with any tactic.
    int64_t const most_splits = std::max<int64_t>(1, largest.get(Letter::C) / min_split(kTactics));
    return std::max(prefill, GqaWorkspace(nullptr, attributes_, batch, 1, most_splits).workspace.bytes());
}

void GqaPlugin::load(Kernels& kernels, nvinfer1::DataType compute)
{
    Dtype const dtype = compute == nvinfer1::DataType::kBF16 ? Dtype::bf16 : Dtype::fp16;
    Request const request = request_of(attributes_, dtype).with(Fact::tactic, tactic());
    rotate_ = kernels.function(Kernel::gqa_rotate, request);
    prefill_ = kernels.function(Kernel::gqa_prefill, request);
    decode_ = kernels.function(Kernel::gqa_decode, request);
    reduce_ = kernels.function(Kernel::gqa_reduce, request);
    if (phase() == nvinfer1::TensorRTPhase::kBUILD)
    {
        timed_lengths_ = kernels.function(Kernel::gqa_timed_lengths, request);
    }
    sm_count_ = kernels.sm_count();
}

/** Whether the builder times the layer: it has memory of its own for each tensor. Then its lengths and positions mean
 *  nothing, and would lead out of the cache. Throws Error where present should lie at past, and doesn't. */
bool GqaPlugin::is_timed(void const* const* inputs, void* const* outputs) const
{
    for (InPlace const* pair = kInPlace; pair != kInPlace + (is_int8() ? 4 : 2); ++pair)
    {
        void const* const past = inputs[pair->past];
        void const* const present = outputs[pair->present];
        if (past == present)
        {
            continue;
        }
        if (phase() == nvinfer1::TensorRTPhase::kBUILD)
        {
            return true;
        }
        throw Error(text(pair->name, " isn't at the address of its past, ", past, ", but at ", present,
            "; bind both to the same memory"));
    }
    return false;
}

void GqaPlugin::launch_step(
    Extents const& extents, void const* const* inputs, void* const* outputs, void* workspace, CUstream stream) const
{
    bool const is_builders = is_timed(inputs, outputs);
    int64_t const batch = extents.get(Letter::B);
    int64_t const steps = extents.get(Letter::S);
    int64_t const capacity = extents.get(Letter::C);
    int64_t const splits = num_splits(batch, capacity);
    GqaWorkspace const memory(workspace, attributes_, batch, steps, splits);

    Sizes sizes;
    sizes.set(Size::B, batch)
        .set(Size::S, steps)
        .set(Size::H, attributes_.num_heads)
        .set(Size::Hkv, attributes_.num_kv_heads)
        .set(Size::all_heads, attributes_.num_heads + int64_t{2} * attributes_.num_kv_heads)
        .set(Size::num_splits, splits);
    Arguments arguments;
    int64_t const new_tokens = std::min(steps, capacity);
    arguments.pointer(Argument::qkv_ptr, inputs[kQkv])
        .pointer(Argument::cos_ptr, inputs[kCos])
        .pointer(Argument::sin_ptr, inputs[kSin])
        .pointer(Argument::q_norm_ptr, has_norms() ? inputs[first_norm(is_int8())] : nullptr)
        .pointer(Argument::k_norm_ptr, has_norms() ? inputs[first_norm(is_int8()) + 1] : nullptr)
        .pointer(Argument::position_ids_ptr, is_builders ? memory.position_ids : inputs[kPositionIds])
        .pointer(Argument::cache_length_ptr, is_builders ? memory.cache_length : inputs[kCacheLength])
        .pointer(Argument::new_tokens_ptr, is_builders ? memory.new_tokens : inputs[kNewTokens])
        .pointer(Argument::query_ptr, memory.query)
        .pointer(Argument::key_ptr, outputs[kPresentKey])
        .pointer(Argument::value_ptr, outputs[kPresentValue])
        .pointer(Argument::key_scale_ptr, is_int8() ? outputs[kPresentKeyScale] : nullptr)
        .pointer(Argument::value_scale_ptr, is_int8() ? outputs[kPresentValueScale] : nullptr)
        .pointer(Argument::output_ptr, outputs[kAttention])
        .pointer(Argument::partial_ptr, memory.partial)
        .pointer(Argument::partial_lse_ptr, memory.partial_lse)
        .real(Argument::scale_log2e, static_cast<float>(attributes_.scale * std::log2(std::exp(1.0))))
        .real(Argument::norm_epsilon, attributes_.norm_epsilon)
        .integer(Argument::S, steps)
        .integer(Argument::C, capacity)
        .integer(Argument::num_heads, attributes_.num_heads)
        .integer(Argument::num_kv_heads, attributes_.num_kv_heads)
        .integer(Argument::head_dim, attributes_.head_dim)
        .integer(Argument::group, group())
        .integer(Argument::num_splits, splits)
        .integer(Argument::min_split, min_split(tactic()))
        .integer(Argument::num_rows, batch)
        .integer(Argument::cached, std::min<int64_t>(kTimedSlots, capacity - new_tokens))
        .integer(Argument::added, new_tokens);

    if (is_builders)
    {
        launch(timed_lengths_, arguments, sizes, stream);
    }
    launch(rotate_, arguments, sizes, stream);
    if (steps != 1)
    {
        launch(prefill_, arguments, sizes, stream);
        return;
    }
    launch(decode_, arguments, sizes, stream);
    if (splits > 1) // otherwise each row is one part, which decode has written to the output
    {
        launch(reduce_, arguments, sizes, stream);
    }
}

} // namespace qwen_aot
