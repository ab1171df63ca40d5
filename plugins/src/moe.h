/** QwenMoE: each token through its chosen experts. docs/plugins.md lists its tensors and attributes. */
#pragma once

#include "plugin.h"

namespace qwen_aot
{

struct MoeAttributes
{
    int32_t num_experts;
    int32_t experts_per_token;
    int32_t weight_bits; // 16: of hidden's type; 8: int8 per output channel; 4: two codes a byte, blocks along K
    int32_t has_zeros;   // 1: 4-bit weights have zeros besides scales
};

class MoePlugin final : public Plugin
{
public:
    using Attributes = MoeAttributes;
    static constexpr char const* kName = "QwenMoE";
    static constexpr FieldTable<MoeAttributes, 4> kFields{{
        {"num_experts", &MoeAttributes::num_experts},
        {"experts_per_token", &MoeAttributes::experts_per_token},
        {"weight_bits", &MoeAttributes::weight_bits},
        {"has_zeros", &MoeAttributes::has_zeros},
    }};

    MoePlugin(MoeAttributes const& attributes, nvinfer1::TensorRTPhase phase);
    nvinfer1::IPluginV3* clone() noexcept final;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept final { return fields_.collection(); }

private:
    int32_t num_tactics() const final { return kTactics; }
    void check_extents(Extents const& extents) const final;
    size_t workspace_bytes(Extents const& smallest, Extents const& largest) const final;
    void load(Kernels& kernels, nvinfer1::DataType compute) final;
    void launch_step(Extents const& extents, void const* const* inputs, void* const* outputs, void* workspace,
        CUstream stream) const final;

    bool is_decode(int64_t num_tokens) const;

    MoeAttributes attributes_;
    FieldList<kFields.size()> fields_{kFields, &attributes_};
    // What `load` loaded.
    Function decode_gate_up_;
    Function decode_down_;
    Function count_;
    Function scatter_;
    Function gate_up_;
    Function down_;
    Function sum_;
    Function timed_ids_; // in the build phase
};

} // namespace qwen_aot
