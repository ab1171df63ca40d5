// Does with a plugin library what TensorRT does with it, for a test that fills the tensor descriptions: a small C ABI.
//
// Functions that return a pointer return null on failure; the reason is in `harness_take_log`, with what the library
// logged.

#include <NvInfer.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

using namespace nvinfer1;

extern "C"
{

struct harness_tensor
{
    int32_t type; // of nvinfer1::DataType
    int32_t rank;
    int64_t dims[Dims::MAX_DIMS];
};

struct harness_range
{
    harness_tensor min, opt, max;
};

struct harness_field
{
    char const* name;
    int32_t type; // of nvinfer1::PluginFieldType
    int32_t length;
    void const* data;
};

} // extern "C"

namespace
{

std::string log_text, taken_text;

class Logger : public ILogger
{
public:
    void log(Severity severity, AsciiChar const* text) noexcept override
    {
        char const* const names[] = {"internal error: ", "error: ", "warning: ", "info: ", "verbose: "};
        log_text += names[static_cast<int32_t>(severity)] + std::string(text) + '\n';
    }
};

class LoggerFinder : public ILoggerFinder
{
public:
    ILogger* findLogger() override { return &logger_; }

private:
    Logger logger_;
};

class ResourceContext : public IPluginResourceContext
{
public:
    IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
};

struct Library
{
    IPluginCreatorInterface* const* creators = nullptr;
    int32_t count = 0;
};

struct Plugin
{
    IPluginCreatorV3One* creator;
    std::unique_ptr<IPluginV3> plugin;
    ResourceContext resources;

    template <typename T>
    T* capability(PluginCapabilityType type) const
    {
        return static_cast<T*>(plugin->getCapabilityInterface(type));
    }
};

std::nullptr_t fail(std::string const& what)
{
    log_text += "harness: " + what + '\n';
    return nullptr;
}

Dims make_dims(harness_tensor const& tensor)
{
    Dims dims{};
    dims.nbDims = tensor.rank;
    std::copy(tensor.dims, tensor.dims + tensor.rank, dims.d);
    return dims;
}

PluginTensorDesc make_desc(harness_tensor const& tensor)
{
    return {make_dims(tensor), static_cast<DataType>(tensor.type), TensorFormat::kLINEAR, 0.0F};
}

std::vector<PluginTensorDesc> make_descs(harness_tensor const* tensors, int32_t count)
{
    std::vector<PluginTensorDesc> descs;
    std::transform(tensors, tensors + count, std::back_inserter(descs), make_desc);
    return descs;
}

// As the builder gives them: a dimension that isn't the same in the whole range is -1.
std::vector<DynamicPluginTensorDesc> make_ranges(harness_range const* ranges, int32_t count)
{
    std::vector<DynamicPluginTensorDesc> result;
    std::transform(ranges, ranges + count, std::back_inserter(result), [](harness_range const& range) {
        DynamicPluginTensorDesc desc{
            make_desc(range.opt), make_dims(range.min), make_dims(range.max), make_dims(range.opt)};
        for (int32_t axis = 0; axis < desc.min.nbDims; ++axis)
        {
            if (desc.min.d[axis] != desc.max.d[axis])
                desc.desc.dims.d[axis] = -1;
        }
        return desc;
    });
    return result;
}

int32_t element_bytes(PluginFieldType type)
{
    switch (type)
    {
    case PluginFieldType::kFLOAT32:
    case PluginFieldType::kINT32: return 4;
    case PluginFieldType::kINT64:
    case PluginFieldType::kFLOAT64: return 8;
    case PluginFieldType::kCHAR:
    case PluginFieldType::kINT8: return 1;
    default: return 0;
    }
}

Plugin* create(IPluginCreatorV3One* creator, std::vector<PluginField> const& fields, TensorRTPhase phase)
{
    PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    std::unique_ptr<IPluginV3> plugin(creator->createPlugin("layer", &collection, phase));
    if (!plugin)
        return fail("createPlugin returned null");
    return new Plugin{creator, std::move(plugin), {}};
}

// For an execution context, as the builder makes one to time layers, and as a user does. The given one is gone then.
Plugin* attach(std::unique_ptr<Plugin> const given)
{
    auto* of = given->capability<IPluginV3OneRuntime>(PluginCapabilityType::kRUNTIME);
    auto attached = std::make_unique<Plugin>();
    attached->creator = given->creator;
    attached->plugin.reset(of->attachToContext(&attached->resources));
    if (!attached->plugin)
        return fail("attachToContext returned null");
    return attached.release();
}

} // namespace

extern "C"
{

// Loads the library and gives it a logger. Never unloaded.
void* harness_load(char const* path)
{
    static LoggerFinder finder;
    void* const handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr)
        return fail(dlerror());
    auto const get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(handle, "getCreators"));
    auto const set = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(handle, "setLoggerFinder"));
    if (get == nullptr || set == nullptr)
        return fail("getCreators or setLoggerFinder is missing");
    set(&finder);
    auto library = std::make_unique<Library>();
    library->creators = get(library->count);
    return library.release();
}

// A plugin of the build phase, made by the creator of that name.
void* harness_create(void const* library, char const* name, harness_field const* fields, int32_t count)
{
    auto const* loaded = static_cast<Library const*>(library);
    std::vector<PluginField> collected;
    for (harness_field const* field = fields; field != fields + count; ++field)
    {
        collected.emplace_back(field->name, field->data, static_cast<PluginFieldType>(field->type), field->length);
    }
    for (int32_t index = 0; index < loaded->count; ++index)
    {
        auto* creator = static_cast<IPluginCreatorV3One*>(loaded->creators[index]);
        if (std::strcmp(creator->getPluginName(), name) == 0)
            return create(creator, collected, TensorRTPhase::kBUILD);
    }
    return fail(std::string("no creator of ") + name);
}

// What the builder does with a profile: workspace bytes, or -1 where a type or a profile is refused.
int64_t harness_configure(void const* plugin, harness_range const* inputs, int32_t num_inputs,
    harness_range const* outputs, int32_t num_outputs)
{
    auto* build = static_cast<Plugin const*>(plugin)->capability<IPluginV3OneBuild>(PluginCapabilityType::kBUILD);
    auto const in = make_ranges(inputs, num_inputs), out = make_ranges(outputs, num_outputs);
    auto all = in;
    all.insert(all.end(), out.begin(), out.end());
    if (build->getNbOutputs() != num_outputs)
        return -1;
    for (int32_t position = 0; position < num_inputs + num_outputs; ++position)
    {
        if (!build->supportsFormatCombination(position, all.data(), num_inputs, num_outputs))
        {
            fail("the type of tensor " + std::to_string(position) + " isn't supported");
            return -1;
        }
    }
    if (build->configurePlugin(in.data(), num_inputs, out.data(), num_outputs) != 0)
        return -1;
    return static_cast<int64_t>(build->getWorkspaceSize(in.data(), num_inputs, out.data(), num_outputs));
}

// What the builder times: a clone, as the network keeps of the plugin that it is given, attached to a context.
void* harness_attach(void* plugin)
{
    std::unique_ptr<Plugin> const given(static_cast<Plugin*>(plugin));
    auto cloned = std::make_unique<Plugin>();
    cloned->creator = given->creator;
    cloned->plugin.reset(given->plugin->clone());
    if (!cloned->plugin)
        return fail("clone returned null");
    return attach(std::move(cloned));
}

// Through a plan and into an execution context: serialized, created for the runtime, attached. The given plugin and
// the deserialized one are gone when the attached one runs.
void* harness_restore(void* plugin)
{
    std::unique_ptr<Plugin> const built(static_cast<Plugin*>(plugin));
    auto* runtime = built->capability<IPluginV3OneRuntime>(PluginCapabilityType::kRUNTIME);
    PluginFieldCollection const* const written = runtime->getFieldsToSerialize();
    if (written == nullptr)
        return fail("getFieldsToSerialize returned null");
    std::vector<std::string> names, data;
    std::vector<PluginField> fields(written->fields, written->fields + written->nbFields);
    for (PluginField const& field : fields)
    {
        int32_t const size = element_bytes(field.type);
        if (size == 0)
            return fail("a serialized field has a type that no attribute has");
        names.emplace_back(field.name);
        data.emplace_back(static_cast<char const*>(field.data), size_t{1} * size * field.length);
    }
    for (size_t index = 0; index < fields.size(); ++index)
    {
        fields[index].name = names[index].c_str();
        fields[index].data = data[index].data();
    }
    built->plugin.reset();
    std::unique_ptr<Plugin> restored(create(built->creator, fields, TensorRTPhase::kRUNTIME));
    return restored ? attach(std::move(restored)) : nullptr;
}

// What the builder times one after the other: writes at most `most`, and returns how many; -1: it was refused.
int32_t harness_tactics(void const* plugin, int32_t* tactics, int32_t most)
{
    auto* build = static_cast<Plugin const*>(plugin)->capability<IPluginV3OneBuild>(PluginCapabilityType::kBUILD);
    int32_t const count = build->getNbTactics();
    if (count < 0 || count > most || build->getValidTactics(tactics, count) != 0)
        return -1;
    return count;
}

// What the library returned: 0 is success.
int32_t harness_set_tactic(void const* plugin, int32_t tactic)
{
    auto* runtime = static_cast<Plugin const*>(plugin)->capability<IPluginV3OneRuntime>(PluginCapabilityType::kRUNTIME);
    return runtime->setTactic(tactic);
}

// Likewise.
int32_t harness_change_shape(void const* plugin, harness_tensor const* inputs, int32_t num_inputs,
    harness_tensor const* outputs, int32_t num_outputs)
{
    auto* runtime = static_cast<Plugin const*>(plugin)->capability<IPluginV3OneRuntime>(PluginCapabilityType::kRUNTIME);
    auto const in = make_descs(inputs, num_inputs), out = make_descs(outputs, num_outputs);
    return runtime->onShapeChange(in.data(), num_inputs, out.data(), num_outputs);
}

int32_t harness_enqueue(void const* plugin, harness_tensor const* inputs, int32_t num_inputs,
    harness_tensor const* outputs, int32_t num_outputs, void const* const* input_data, void* const* output_data,
    void* workspace, void* stream)
{
    auto* runtime = static_cast<Plugin const*>(plugin)->capability<IPluginV3OneRuntime>(PluginCapabilityType::kRUNTIME);
    auto const in = make_descs(inputs, num_inputs), out = make_descs(outputs, num_outputs);
    return runtime->enqueue(
        in.data(), out.data(), input_data, output_data, workspace, static_cast<cudaStream_t>(stream));
}

void harness_destroy(void* plugin)
{
    delete static_cast<Plugin*>(plugin);
}

// What was logged since the last call, a line each, valid until the next one.
char const* harness_take_log()
{
    taken_text = std::exchange(log_text, {});
    return taken_text.c_str();
}

} // extern "C"
