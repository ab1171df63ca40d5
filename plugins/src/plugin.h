/** What all plugins share: TensorRT's interfaces over a table of tensors, a workspace and a launch of kernels. */
#pragma once

#include "fields.h"
#include "kernels.h"
#include "log.h"
#include "tensors.h"

#include <NvInferRuntime.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

namespace qwen_aot
{

constexpr char const* kNamespace = "qwen_aot";
constexpr char const* kVersion = "1";

/** Parts of the workspace, one after the other. Without memory it only counts. */
class Workspace
{
public:
    explicit Workspace(void* memory)
        : memory_(static_cast<std::byte*>(memory))
    {
    }

    void* take(int64_t bytes)
    {
        std::byte* const part = memory_ == nullptr ? nullptr : memory_ + bytes_;
        bytes_ += (static_cast<size_t>(bytes) + kAlignment - 1) / kAlignment * kAlignment;
        return part;
    }

    size_t bytes() const { return bytes_; }

private:
    static constexpr size_t kAlignment = 256; // that of cudaMalloc
    std::byte* memory_;
    size_t bytes_{0};
};

/** A plugin whose methods are the table's doing; a subclass says what its kernels need. Each override of TensorRT's
 *  catches and logs what is thrown, and returns its error value.
 *
 *  All kernels that a plugin can need are loaded at its first onShapeChange in a CUDA context, which TensorRT calls
 *  before the first step; later shapes load nothing. So enqueue neither loads, allocates nor waits, and may be captured
 *  in a CUDA graph. (A first step that wasn't announced by onShapeChange loads them itself.) */
class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuild,
               public nvinfer1::IPluginV3OneRuntime
{
public:
    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept final;

    // IPluginV3OneCore
    char const* getPluginName() const noexcept final { return name_; }
    char const* getPluginVersion() const noexcept final { return kVersion; }
    char const* getPluginNamespace() const noexcept final { return kNamespace; }

    // IPluginV3OneBuild
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t num_inputs,
        nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t num_outputs) noexcept final;
    int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t num_outputs,
        nvinfer1::DataType const* input_types, int32_t num_inputs) const noexcept final;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t num_inputs, nvinfer1::DimsExprs const*, int32_t,
        nvinfer1::DimsExprs* outputs, int32_t num_outputs, nvinfer1::IExprBuilder& builder) noexcept final;
    bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors,
        int32_t num_inputs, int32_t num_outputs) noexcept final;
    int32_t getNbOutputs() const noexcept final;
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t num_inputs,
        nvinfer1::DynamicPluginTensorDesc const*, int32_t) const noexcept final;
    int32_t getNbTactics() noexcept final;
    int32_t getValidTactics(int32_t* tactics, int32_t num_tactics) noexcept final;
    /** Of plugins with the same attributes, kernels and shapes, TensorRT times one: a model's layers are alike. */
    char const* getTimingCacheID() noexcept final { return timing_id_.c_str(); }

    // IPluginV3OneRuntime
    int32_t setTactic(int32_t tactic) noexcept final;
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* inputs, int32_t num_inputs,
        nvinfer1::PluginTensorDesc const* outputs, int32_t num_outputs) noexcept final;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* input_descriptions, nvinfer1::PluginTensorDesc const*,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept final;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept final { return clone(); }

protected:
    /** `attributes` tells this plugin from others of its name (field_words). */
    Plugin(char const* name, TensorTable table, nvinfer1::TensorRTPhase phase, std::string const& attributes)
        : name_(name)
        , table_(std::move(table))
        , phase_(phase)
        , timing_id_(text(name, ": ", attributes, ", kernels ", kDigest))
    {
    }

    /** What it was created for, and each plugin that it was cloned from. While TensorRT builds, enqueue is called too,
     *  to time the layer with each tactic: on memory of the builder's, whose content means nothing. What decides how
     *  much a step has to do, lengths and ids, is then made by a kernel that runs before. */
    nvinfer1::TensorRTPhase phase() const { return phase_; }

    /** Tiles that TensorRT may choose among, of which it times each; 1: there is nothing to choose. */
    virtual int32_t num_tactics() const = 0;

    /** The one that was chosen, 1 … num_tactics(). */
    int32_t tactic() const { return tactic_; }

    /** A plugin that was just made, with this one's tactic; TensorRT deletes it. */
    template <class P>
    P* with_tactic(std::unique_ptr<P> made) const
    {
        made->tactic_ = tactic_;
        return made.release();
    }

    /** Throws Error if the kernels can't take these extents, of which some may be unknown. */
    virtual void check_extents(Extents const& extents) const = 0;

    /** Bytes of workspace that suffice for every step from the smallest to the largest. */
    virtual size_t workspace_bytes(Extents const& smallest, Extents const& largest) const = 0;

    /** Chooses and loads the functions for all steps of a compute type. Throws Error. */
    virtual void load(Kernels& kernels, nvinfer1::DataType compute) = 0;

    /** Launches a step, with the functions that were loaded last. Throws Error. */
    virtual void launch_step(Extents const& extents, void const* const* inputs, void* const* outputs, void* workspace,
        CUstream stream) const = 0;

private:
    static constexpr int32_t kFirstTactic = 1; // TensorRT keeps 0 for plugins that offer none

    void prepare_step(nvinfer1::PluginTensorDesc const* inputs, Extents const& extents);

    char const* name_;
    TensorTable table_;
    nvinfer1::TensorRTPhase phase_;
    std::string timing_id_;
    std::shared_ptr<Kernels> kernels_; // keeps the functions alive that `load` chose; null: none yet
    nvinfer1::DataType compute_{};     // what they compute in
    Extents checked_;                  // of the last step that may run with them
    int32_t tactic_{kFirstTactic};
    int32_t loaded_tactic_{0}; // that they are of
};

/** What a concrete plugin P declares: kName, its Attributes and their kFields, and a constructor from Attributes and the
 *  phase, which throws Error for attributes that nothing serves. */
template <class P>
class Creator final : public nvinfer1::IPluginCreatorV3One
{
public:
    nvinfer1::IPluginV3* createPlugin(
        char const*, nvinfer1::PluginFieldCollection const* fields, nvinfer1::TensorRTPhase phase) noexcept final
    {
        return guarded<nvinfer1::IPluginV3*>(P::kName, nullptr, [&] {
            auto const attributes = parse_fields(P::kFields, fields);
            auto plugin = std::make_unique<P>(attributes, phase);
            log(nvinfer1::ILogger::Severity::kVERBOSE, P::kName,
                text("created with ", field_words(P::kFields, attributes)).c_str());
            return plugin.release(); // TensorRT deletes it
        });
    }
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept final { return names_.collection(); }
    char const* getPluginName() const noexcept final { return P::kName; }
    char const* getPluginVersion() const noexcept final { return kVersion; }
    char const* getPluginNamespace() const noexcept final { return kNamespace; }

private:
    FieldList<P::kFields.size()> names_{P::kFields, static_cast<typename P::Attributes*>(nullptr)};
};

} // namespace qwen_aot
