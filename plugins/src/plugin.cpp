#include "plugin.h"

#include <algorithm>
#include <numeric>

namespace qwen_aot
{
namespace
{

constexpr int32_t kFailed = -1;

} // namespace

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

int32_t Plugin::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t num_inputs,
    nvinfer1::DynamicPluginTensorDesc const*, int32_t num_outputs) noexcept
{
    return guarded(name_, kFailed, [&] {
        check_count("outputs", num_outputs, table_.outputs);
        for (Bound const bound : {Bound::smallest, Bound::largest})
        {
            check_extents(bind(table_, inputs, num_inputs, bound));
        }
        return 0;
    });
}

int32_t Plugin::getOutputDataTypes(nvinfer1::DataType* output_types, int32_t num_outputs,
    nvinfer1::DataType const* input_types, int32_t num_inputs) const noexcept
{
    return guarded(name_, kFailed, [&] {
        check_count("inputs", num_inputs, table_.inputs);
        check_count("outputs", num_outputs, table_.outputs);
        for (size_t i = 0; i < table_.outputs.size(); ++i)
        {
            output_types[i] = data_type(table_.outputs[i].type, input_types[0]);
        }
        return 0;
    });
}

int32_t Plugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t num_inputs, nvinfer1::DimsExprs const*,
    int32_t, nvinfer1::DimsExprs* outputs, int32_t num_outputs, nvinfer1::IExprBuilder& builder) noexcept
{
    return guarded(name_, kFailed, [&] {
        output_shapes(table_, inputs, num_inputs, outputs, num_outputs, builder);
        return 0;
    });
}

bool Plugin::supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors,
    int32_t num_inputs, int32_t num_outputs) noexcept
{
    return guarded(name_, false, [&] {
        check_count("inputs", num_inputs, table_.inputs);
        check_count("outputs", num_outputs, table_.outputs);
        nvinfer1::PluginTensorDesc const& asked = tensors[position].desc;
        Tensor const& tensor = position < num_inputs ? table_.inputs[static_cast<size_t>(position)]
                                                     : table_.outputs[static_cast<size_t>(position - num_inputs)];
        bool const is_type =
            position == 0 ? is_compute(asked.type) : asked.type == data_type(tensor.type, tensors[0].desc.type);
        return is_type && asked.format == nvinfer1::TensorFormat::kLINEAR;
    });
}

int32_t Plugin::getNbOutputs() const noexcept
{
    return static_cast<int32_t>(table_.outputs.size());
}

size_t Plugin::getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t num_inputs,
    nvinfer1::DynamicPluginTensorDesc const*, int32_t) const noexcept
{
    // There is no error value. Without workspace, enqueue refuses to run.
    return guarded<size_t>(name_, 0, [&] {
        Extents const largest = bind(table_, inputs, num_inputs, Bound::largest);
        check_known(table_, largest);
        return workspace_bytes(bind(table_, inputs, num_inputs, Bound::smallest), largest);
    });
}

int32_t Plugin::getNbTactics() noexcept
{
    return num_tactics() > kFirstTactic ? num_tactics() : 0;
}

int32_t Plugin::getValidTactics(int32_t* tactics, int32_t count) noexcept
{
    return guarded(name_, kFailed, [&] {
        if (count != getNbTactics())
        {
            throw Error(text(count, " tactics were asked for; there are ", getNbTactics()));
        }
        std::iota(tactics, tactics + count, kFirstTactic);
        return 0;
    });
}

int32_t Plugin::setTactic(int32_t tactic) noexcept
{
    return guarded(name_, kFailed, [&] {
        if (tactic < 0 || tactic > getNbTactics())
        {
            throw Error(text("this library has no tactic ", tactic, "; there are 0 (the first) to ", getNbTactics(),
                ". The engine was built with another version of the library: build it again with this one, or load "
                "that"));
        }
        tactic_ = std::max(tactic, kFirstTactic);
        return 0;
    });
}

void Plugin::prepare_step(nvinfer1::PluginTensorDesc const* inputs, Extents const& extents)
{
    nvinfer1::DataType const compute = inputs[0].type;
    if (!is_compute(compute))
    {
        throw Error(text(table_.inputs[0].name, " is of type ", static_cast<int32_t>(compute),
            " (DataType); it must be fp16 or bf16"));
    }
    check_known(table_, extents);
    check_extents(extents);
    std::shared_ptr<Kernels> kernels = Kernels::of_current_context();
    if (kernels != kernels_ || compute != compute_ || tactic_ != loaded_tactic_)
    {
        std::shared_ptr<Kernels> const before = std::move(kernels_); // unloaded, if nothing else needs them, after that
        load(*kernels, compute);
        kernels_ = std::move(kernels);
        compute_ = compute;
        loaded_tactic_ = tactic_;
    }
    checked_ = extents;
}

int32_t Plugin::onShapeChange(nvinfer1::PluginTensorDesc const* inputs, int32_t num_inputs,
    nvinfer1::PluginTensorDesc const*, int32_t num_outputs) noexcept
{
    return guarded(name_, kFailed, [&] {
        check_count("outputs", num_outputs, table_.outputs);
        prepare_step(inputs, bind(table_, inputs, num_inputs));
        return 0;
    });
}

int32_t Plugin::enqueue(nvinfer1::PluginTensorDesc const* input_descriptions, nvinfer1::PluginTensorDesc const*,
    void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    return guarded(name_, kFailed, [&] {
        Extents const extents = bind(table_, input_descriptions, static_cast<int32_t>(table_.inputs.size()));
        if (kernels_ == nullptr || input_descriptions[0].type != compute_ || tactic_ != loaded_tactic_
            || !(extents == checked_))
        {
            prepare_step(input_descriptions, extents);
        }
        if (extents.get(Letter::B) == 0 || extents.get(Letter::S) == 0)
        {
            return 0; // no token
        }
        if (workspace == nullptr)
        {
            throw Error("there is no workspace");
        }
        launch_step(extents, inputs, outputs, workspace, stream);
        return 0;
    });
}

} // namespace qwen_aot
