/** QwenLinear: a projection with integer weights. docs/plugins.md lists its tensors and attributes. */
#pragma once

#include "plugin.h"

namespace qwen_aot
{

struct LinearAttributes
{
    int32_t weight_bits; // 8: int8; 4: two codes a byte
    int32_t group_size;  // columns of K that share a scale: 32, 64, 128, or -1, all
    int32_t has_zeros;   // 1: 4-bit weights have zeros besides scales
    int32_t has_bias;    // 1: the last input is a bias
};

class LinearPlugin final : public Plugin
{
public:
    using Attributes = LinearAttributes;
    static constexpr char const* kName = "QwenLinear";
    static constexpr FieldTable<LinearAttributes, 4> kFields{{
        {"weight_bits", &LinearAttributes::weight_bits},
        {"group_size", &LinearAttributes::group_size},
        {"has_zeros", &LinearAttributes::has_zeros},
        {"has_bias", &LinearAttributes::has_bias},
    }};

    LinearPlugin(LinearAttributes const& attributes, nvinfer1::TensorRTPhase phase);
    nvinfer1::IPluginV3* clone() noexcept final;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept final { return fields_.collection(); }

private:
    int32_t num_tactics() const final;
    void check_extents(Extents const& extents) const final;
    size_t workspace_bytes(Extents const& smallest, Extents const& largest) const final;
    void load(Kernels& kernels, nvinfer1::DataType compute) final;
    void launch_step(Extents const& extents, void const* const* inputs, void* const* outputs, void* workspace,
        CUstream stream) const final;

    LinearAttributes attributes_;
    FieldList<kFields.size()> fields_{kFields, &attributes_};
    // What `load` loaded.
    Function decode_;
    Function reduce_;
    Function prefill_;
    int32_t sm_count_{0};
};

} // namespace qwen_aot
