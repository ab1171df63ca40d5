/** QwenGQA: normalises and rotates queries and keys, writes the cache, attends. docs/plugins.md lists its tensors and attributes. */
#pragma once

#include "plugin.h"

namespace qwen_aot
{

struct GqaAttributes
{
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    int32_t cache_bits; // 16: the cache is of qkv's type; 8: int8 with a scale per head and token
    float norm_epsilon; // of the norms of queries and keys; 0: they have none
    float scale;        // of the scores before the softmax
};

class GqaPlugin final : public Plugin
{
public:
    using Attributes = GqaAttributes;
    static constexpr char const* kName = "QwenGQA";
    static constexpr FieldTable<GqaAttributes, 6> kFields{{
        {"num_heads", &GqaAttributes::num_heads},
        {"num_kv_heads", &GqaAttributes::num_kv_heads},
        {"head_dim", &GqaAttributes::head_dim},
        {"cache_bits", &GqaAttributes::cache_bits},
        {"norm_epsilon", &GqaAttributes::norm_epsilon},
        {"scale", &GqaAttributes::scale},
    }};

    GqaPlugin(GqaAttributes const& attributes, nvinfer1::TensorRTPhase phase);
    nvinfer1::IPluginV3* clone() noexcept final;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept final { return fields_.collection(); }

private:
    int32_t num_tactics() const final { return kTactics; }
    void check_extents(Extents const& extents) const final;
    size_t workspace_bytes(Extents const& smallest, Extents const& largest) const final;
    void load(Kernels& kernels, nvinfer1::DataType compute) final;
    void launch_step(Extents const& extents, void const* const* inputs, void* const* outputs, void* workspace,
        CUstream stream) const final;

    bool is_int8() const { return attributes_.cache_bits == 8; }
    bool has_norms() const { return attributes_.norm_epsilon > 0; }
    int32_t group() const { return attributes_.num_heads / attributes_.num_kv_heads; }
    int64_t min_split(int32_t tactic) const;
    int64_t num_splits(int64_t batch, int64_t capacity) const;
    bool is_timed(void const* const* inputs, void* const* outputs) const;

    GqaAttributes attributes_;
    FieldList<kFields.size()> fields_{kFields, &attributes_};
    // What `load` loaded.
    Function rotate_;
    Function prefill_;
    Function decode_;
    Function reduce_;
    Function timed_lengths_; // in the build phase
    int32_t sm_count_{0};
};

} // namespace qwen_aot
