// Only where TensorRT's headers are (QWEN_AOT_TENSORRT_INCLUDE_DIR).
#if defined(QWEN_AOT_TENSORRT)

#include "engine/tensorrt_backend.h"

#include "bundle/bundle_code.h"
#include "engine/cuda_stream.h"
#include "engine/rows.h"
#include "engine/tensorrt_library.h"
#include "engine/tensorrt_step.h"

#include <cstdio>

namespace qwen_aot
{

namespace
{

using namespace tensorrt;

constexpr size_t kAlignment = 256; // bytes, of an input's address: what cuMemAlloc gives, so what kernels may count on
constexpr int32_t kOldestCompatible = 8; // Ampere: where hardware-compatible engines begin

/** The smallest and largest sizes that the steps of a profile will have. */
struct Limits
{
    int64_t rows;
    int64_t tokens;
};

double mebibytes(int64_t bytes)
{
    return static_cast<double>(bytes) / (1 << 20);
}

nvinfer1::DataType data_type(DType type)
{
    switch (type)
    {
    case DType::int64: return nvinfer1::DataType::kINT64;
    case DType::int32: return nvinfer1::DataType::kINT32;
    case DType::float32: return nvinfer1::DataType::kFLOAT;
    case DType::float16: return nvinfer1::DataType::kHALF;
    case DType::bfloat16: return nvinfer1::DataType::kBF16;
    case DType::int8: return nvinfer1::DataType::kINT8;
    }
    return nvinfer1::DataType::kFLOAT;
}

/** Rows of one cache over an engine that others use too. */
class TensorRtEngine final : public RowEngine
{
public:
    TensorRtEngine(cuda::Gpu const& gpu, Manifest const& manifest, Log const& log, Logger& logger,
        nvinfer1::ICudaEngine& engine, system::Mutex& making_contexts)
        : RowEngine(manifest, cache_, prefill_, decode_)
        , stream_(gpu)
        , memory_(stream_, false)
        , cache_(memory_)
        , parts_{manifest, logger, engine, making_contexts, stream_, cache_, present_names_, 0, 0, 0}
        , prefill_(parts_, log)
        , decode_(parts_, log)
    {
    }

    Status open(Log const& log, Error& error);
    void release() override;

protected:
    // A step that is at work on the GPU ends by itself; the chunks of a prompt that haven't begun don't begin.
    void stop() override { }
    void unstop() override { }

private:
    static inline TensorRtEngine* left_behind_ = nullptr; // of the parent process

    TensorRtEngine* next_left_behind_ = nullptr;
    cuda::StreamMemory stream_;
    cuda::CudaMemory memory_;
    KvCache cache_;
    Array<Text> present_names_;
    EngineParts parts_;
    TensorRtStep prefill_;
    TensorRtStep decode_;
};

int32_t profile_index(Manifest const& manifest, std::string_view name)
{
    Array<Profile> const& profiles = manifest.text_engine.profiles;
    for (size_t i = 0; i < profiles.size(); ++i)
    {
        if (profiles[i].name.view() == name)
        {
            return static_cast<int32_t>(i);
        }
    }
    return -1;
}

/** All memory is allocated here, and a step allocates none. */
Status TensorRtEngine::open(Log const& log, Error& error)
{
    Manifest const& facts = manifest();
    cuda::Current const current(stream_.gpu());
    QWEN_AOT_TRY(current.status(error));
    QWEN_AOT_TRY(stream_.open(error));
    QWEN_AOT_TRY(cache_.open(facts, facts.max_capacity(), log, error));
    for (size_t i = 0; i < cache_.size(); ++i)
    {
        Text name;
        QWEN_AOT_TRY(present_name(cache_.tensor(i).name.view(), name, error));
        QWEN_AOT_NEED(present_names_.push(std::move(name)), error, "the names of the cache");
    }
    parts_.activation_bytes = parts_.engine.getDeviceMemorySizeV2();
    QWEN_AOT_TRY(stream_.allocate(static_cast<size_t>(parts_.activation_bytes), parts_.activations, error));
    auto const capacity = static_cast<size_t>(cache_.capacity());
    uint8_t* host = nullptr;
    QWEN_AOT_TRY(stream_.allocate_pinned(capacity * sizeof(int64_t), &host, error));
    for (size_t i = 0; i < capacity; ++i)
    {
        reinterpret_cast<int64_t*>(host)[i] = static_cast<int64_t>(i);
    }
    QWEN_AOT_TRY(stream_.allocate(capacity * sizeof(int64_t), parts_.key_positions, error));
    QWEN_AOT_TRY(stream_.copy_to_device(parts_.key_positions, host, capacity * sizeof(int64_t), error));
    QWEN_AOT_TRY(prefill_.open(profile_index(facts, "prefill"), 1, facts.prefill_chunk, false, error));
    QWEN_AOT_TRY(decode_.open(profile_index(facts, "decode"), facts.max_batch, 1, !kFlavour.captures_graphs, error));
    return stream_.synchronize(error);
}

void TensorRtEngine::release()
{
    if (stream_.gpu().is_of_parent())
    {
        // Nothing of CUDA works in a child process: its contexts are left, where leak checkers see them.
        next_left_behind_ = left_behind_;
        left_behind_ = this;
        return;
    }
    cuda::Gpu const& gpu = stream_.gpu();
    cuda::Current const current(gpu);
    stream_.drain();
    Unmake()(this);
}

class TensorRtBackend final : public Backend
{
public:
    TensorRtBackend(Bundle const& bundle, EngineOptions const& options)
        : bundle_(bundle)
        , log_(options.log)
        , logger_(log_)
    {
    }

    Status open(EngineOptions const& options, Error& error);
    Status make_engine(EngineBox& engine, Error& error) override;
    void release() override;

private:
    Status check_facts(Error& error) const;
    Status check_capability(Error& error) const;
    Status check_memory(Error& error) const;
    Status check_rows(Error& error) const;
    Status load(BundleCode const& code, Error& error);
    Status check_signature(Error& error) const;
    Status check_tensor(IoTensor const& tensor, bool is_input, Error& error) const;
    Status check_profile(IoTensor const& tensor, int32_t profile, Limits const& limits, Error& error) const;

    static inline TensorRtBackend* left_behind_ = nullptr; // of the parent process

    Bundle const& bundle_;
    Log log_;
    Logger logger_; // must outlive all objects of the library
    cuda::Gpu gpu_;
    Library library_;
    Owned<nvinfer1::IRuntime> runtime_;
    Owned<nvinfer1::ICudaEngine> engine_;
    system::Mutex making_contexts_;
    TensorRtBackend* next_left_behind_ = nullptr;
};

Status TensorRtBackend::open(EngineOptions const& options, Error& error)
{
    Manifest const& manifest = bundle_.manifest();
    TensorRtFacts const& facts = manifest.text_engine.tensorrt;
    QWEN_AOT_TRY(check_facts(error));
    QWEN_AOT_TRY(check_table(manifest, error));
    QWEN_AOT_TRY(check_rows(error));
    BundleCode code;
    QWEN_AOT_TRY(find_bundle_code(bundle_, options.plugins_path.view(), options.allow_bundle_code, code, error));
    QWEN_AOT_TRY(Library::open(options.tensorrt_path.c_str(), facts, library_, error));
    QWEN_AOT_TRY(gpu_.open(options.cuda_driver_path.c_str(), error));
    QWEN_AOT_TRY(check_capability(error));
    QWEN_AOT_TRY(check_memory(error));
    cuda::Current const current(gpu_);
    QWEN_AOT_TRY(current.status(error));
    QWEN_AOT_TRY(load(code, error));
    return check_signature(error);
}

/** What the manifest must say before anything is opened. */
Status TensorRtBackend::check_facts(Error& error) const
{
    Manifest const& manifest = bundle_.manifest();
    TextEngine const& engine = manifest.text_engine;
    if (!engine.has_tensorrt)
    {
        return error.fail(Status::engine_mismatch,
            "the bundle's engine is %s, but its manifest has no `tensorrt` section; rebuild it",
            Quoted(engine.file.view()).c_str());
    }
    if (!engine.tensorrt.has_weights)
    {
        return error.fail(Status::engine_mismatch,
            "the bundle's engine was built without its weights (--strip-weights), and this runtime doesn't refit "
            "engines: "
            "refit it with TensorRT's Refitter and the checkpoint's weights, or rebuild the bundle without "
            "--strip-weights");
    }
    bool const verifies = engine.logits_rows > 0;
    if (engine.profiles.size() != (verifies ? 3 : 2) || profile_index(manifest, "prefill") < 0
        || profile_index(manifest, "decode") < 0 || (profile_index(manifest, kVerify) < 0) == verifies)
    {
        return error.fail(Status::engine_mismatch, "the engine has %zu profiles; accepted: %s. Rebuild the bundle",
            engine.profiles.size(), verifies ? "prefill, decode and verify" : "prefill and decode");
    }
    if (fixed_capacity(engine) == 0)
    {
        return error.fail(Status::engine_mismatch,
            "the bundle's cache capacity is a letter; accepted: a number of tokens, fixed when a TensorRT engine is "
            "built. "
            "Rebuild the bundle");
    }
    return Status::ok;
}

/** Rows begin where kernels need them to. */
Status TensorRtBackend::check_rows(Error& error) const
{
    Manifest const& manifest = bundle_.manifest();
    for (IoTensor const& tensor : manifest.text_engine.inputs)
    {
        if (!is_cache_input(tensor) || manifest.max_batch == 1)
        {
            continue;
        }
        uint64_t bytes = dtype_bytes(tensor.dtype);
        for (size_t i = 1; i < tensor.shape.size(); ++i)
        {
            bytes *= static_cast<uint64_t>(tensor.shape[i]); // what overflows is refused by its allocation
        }
        if (bytes % kAlignment != 0)
        {
            return error.fail(Status::engine_mismatch,
                "a row of %s has %llu bytes; accepted: multiples of %zu, so that each row can be bound by its address. "
                "Rebuild "
                "the bundle with --max-batch 1, or a capacity that is a multiple of 256 tokens",
                Quoted(tensor.name.view()).c_str(), static_cast<unsigned long long>(bytes), kAlignment);
        }
    }
    return Status::ok;
}

/** The GPU is one of those that the engine was built for. An engine that names none belongs to the GPU that built it:
 *  TensorRT itself checks that. */
Status TensorRtBackend::check_capability(Error& error) const
{
    TensorRtFacts const& facts = bundle_.manifest().text_engine.tensorrt;
    char found[32];
    std::snprintf(found, sizeof found, "%d.%d", gpu_.capability_major(), gpu_.capability_minor());
    char accepted[160] = "";
    size_t length = 0;
    bool is_accepted = facts.compute_capabilities.empty();
    for (Text const& capability : facts.compute_capabilities)
    {
        is_accepted = is_accepted || capability.view() == found;
        int const added = std::snprintf(
            accepted + length, sizeof accepted - length, length == 0 ? "%.12s" : ", %.12s", capability.c_str());
        length += added > 0 && length + static_cast<size_t>(added) < sizeof accepted ? static_cast<size_t>(added) : 0;
    }
    if (facts.is_hardware_compatible)
    {
        is_accepted = is_accepted || gpu_.capability_major() >= kOldestCompatible;
        std::snprintf(accepted, sizeof accepted, "%d.0 and later", kOldestCompatible);
    }
    if (is_accepted)
    {
        return Status::ok;
    }
    return error.fail(Status::engine_mismatch,
        "the GPU %s has compute capability %s; the bundle's engine runs on %s. Use another GPU (CUDA_VISIBLE_DEVICES), "
        "or "
        "rebuild the bundle for this one",
        gpu_.name(), found, accepted);
}

Status TensorRtBackend::check_memory(Error& error) const
{
    Manifest const& manifest = bundle_.manifest();
    TensorRtFacts const& facts = manifest.text_engine.tensorrt;
    uint64_t free = 0;
    uint64_t total = 0;
    QWEN_AOT_TRY(gpu_.memory(free, total, error));
    uint64_t const needed = static_cast<uint64_t>(facts.weight_bytes) + static_cast<uint64_t>(facts.cache_bytes)
        + static_cast<uint64_t>(facts.activation_bytes);
    if (needed <= free)
    {
        return Status::ok;
    }
    return error.fail(Status::engine_mismatch,
        "the GPU %s has %.0f MiB of %.0f MiB free, and the bundle needs about %.0f MiB: weights %.0f MiB, cache %.0f "
        "MiB (%lld "
        "rows of %lld tokens), activations %.0f MiB. End other programs that use the GPU, or rebuild the bundle with a "
        "smaller "
        "--max-context or --max-batch, or a smaller --precision",
        gpu_.name(), mebibytes(static_cast<int64_t>(free)), mebibytes(static_cast<int64_t>(total)),
        mebibytes(static_cast<int64_t>(needed)), mebibytes(facts.weight_bytes), mebibytes(facts.cache_bytes),
        static_cast<long long>(manifest.max_batch), static_cast<long long>(manifest.max_context),
        mebibytes(facts.activation_bytes));
}

/** Deserializes the engine: its weights are in device memory then. */
Status TensorRtBackend::load(BundleCode const& code, Error& error)
{
    Logger::Errors errors;
    runtime_ = library_.make_runtime(logger_);
    if (runtime_ == nullptr)
    {
        return error.fail(Status::engine_mismatch, "%s %s can't start: %s. Check the driver with nvidia-smi",
            kFlavour.title, library_.version(), logger_.take_errors(errors));
    }
    if (code.runs_engine_code) // else TensorRT refuses an engine that carries any, whatever the manifest says
    {
        runtime_->setEngineHostCodeAllowed(true);
    }
    // Into the registry of this runtime alone.
    if (!code.plugin_library.empty()
        && runtime_->getPluginRegistry().loadLibrary(code.plugin_library.c_str()) == nullptr)
    {
        return error.fail(Status::engine_mismatch,
            "%s %s can't load the plugin library %s: %s. Rebuild the bundle with a library that was built for this "
            "machine and "
            "version",
            kFlavour.title, library_.version(), Quoted(code.plugin_library.view()).c_str(),
            logger_.take_errors(errors));
    }
    system::MappedFile file;
    QWEN_AOT_TRY(bundle_.map(bundle_.manifest().text_engine.file.view(), file, error));
    engine_.reset(runtime_->deserializeCudaEngine(file.bytes().data(), file.bytes().size()));
    if (engine_ == nullptr)
    {
        return error.fail(Status::engine_mismatch,
            "%s %s can't load %s: %s. Rebuild the bundle for this GPU and version, or end other programs if the GPU's "
            "memory "
            "ran out",
            kFlavour.title, library_.version(), Quoted(bundle_.manifest().text_engine.file.view()).c_str(),
            logger_.take_errors(errors));
    }
    return Status::ok;
}

/** The engine's tensors are those of the manifest, and its profiles allow what steps will ask. */
Status TensorRtBackend::check_signature(Error& error) const
{
    Manifest const& manifest = bundle_.manifest();
    TextEngine const& table = manifest.text_engine;
    int32_t const count = engine_->getNbIOTensors();
    if (count < 0 || static_cast<size_t>(count) != table.inputs.size() + table.outputs.size())
    {
        return error.fail(Status::engine_mismatch,
            "the engine has %d inputs and outputs and the manifest lists %zu; rebuild the bundle", count,
            table.inputs.size() + table.outputs.size());
    }
    for (int32_t i = 0; i < count; ++i)
    {
        char const* const name = engine_->getIOTensorName(i);
        IoTensor const* listed = nullptr;
        bool is_input = false;
        for (IoTensor const& tensor : table.inputs)
        {
            is_input = is_input || tensor.name.view() == name;
            listed = tensor.name.view() == name ? &tensor : listed;
        }
        for (IoTensor const& tensor : table.outputs)
        {
            listed = tensor.name.view() == name ? &tensor : listed;
        }
        if (listed == nullptr)
        {
            return error.fail(Status::engine_mismatch,
                "the engine has the input or output %s, which the manifest doesn't list; rebuild the bundle",
                Quoted(name).c_str());
        }
        QWEN_AOT_TRY(check_tensor(*listed, is_input, error));
    }
    if (engine_->getNbOptimizationProfiles() != static_cast<int32_t>(table.profiles.size()))
    {
        return error.fail(Status::engine_mismatch, "the engine has %d profiles, the manifest %zu; rebuild the bundle",
            engine_->getNbOptimizationProfiles(), table.profiles.size());
    }
    for (IoTensor const& tensor : table.inputs)
    {
        QWEN_AOT_TRY(check_profile(tensor, profile_index(manifest, "prefill"), {1, manifest.prefill_chunk}, error));
        QWEN_AOT_TRY(check_profile(tensor, profile_index(manifest, "decode"), {manifest.max_batch, 1}, error));
    }
    return Status::ok;
}

Status TensorRtBackend::check_tensor(IoTensor const& tensor, bool is_input, Error& error) const
{
    char const* const name = tensor.name.c_str();
    nvinfer1::TensorIOMode const mode = is_input ? nvinfer1::TensorIOMode::kINPUT : nvinfer1::TensorIOMode::kOUTPUT;
    nvinfer1::Dims const found = engine_->getTensorShape(name);
    bool is_same = engine_->getTensorIOMode(name) == mode && engine_->getTensorDataType(name) == data_type(tensor.dtype)
        && found.nbDims == static_cast<int32_t>(tensor.shape.size());
    for (size_t i = 0; is_same && i < tensor.shape.size(); ++i)
    {
        is_same = found.d[i] == (tensor.shape[i] < 0 ? -1 : tensor.shape[i]);
    }
    if (!is_same)
    {
        return error.fail(Status::engine_mismatch,
            "%s is of another kind, type or shape in the engine than the %s of %s with %zu dimensions in the manifest; "
            "rebuild "
            "the bundle",
            Quoted(tensor.name.view()).c_str(), is_input ? "input" : "output", dtype_name(tensor.dtype),
            tensor.shape.size());
    }
    if (engine_->getTensorLocation(name) != nvinfer1::TensorLocation::kDEVICE)
    {
        return error.fail(Status::engine_mismatch,
            "the engine reads %s in host memory; accepted: device memory. Rebuild the bundle",
            Quoted(tensor.name.view()).c_str());
    }
    return Status::ok;
}

Status TensorRtBackend::check_profile(IoTensor const& tensor, int32_t profile, Limits const& limits, Error& error) const
{
    char const* const name = tensor.name.c_str();
    nvinfer1::Dims const smallest = engine_->getProfileShape(name, profile, nvinfer1::OptProfileSelector::kMIN);
    nvinfer1::Dims const largest = engine_->getProfileShape(name, profile, nvinfer1::OptProfileSelector::kMAX);
    int64_t const capacity = fixed_capacity(bundle_.manifest().text_engine);
    for (size_t i = 0; i < tensor.shape.size(); ++i)
    {
        int64_t low = 1;
        int64_t high = 0;
        switch (-tensor.shape[i])
        {
        case 'B': high = limits.rows; break;
        case 'S': high = limits.tokens; break;
        case 'I':
        case 'T': high = 1; break;
        case 'W':
            low = TensorRtStep::window_of(1, capacity);
            high = capacity;
            break;
        default: continue;
        }
        bool const is_known = smallest.nbDims == static_cast<int32_t>(tensor.shape.size())
            && largest.nbDims == static_cast<int32_t>(tensor.shape.size());
        if (!is_known || smallest.d[i] > low || largest.d[i] < high)
        {
            return error.fail(Status::engine_mismatch,
                "profile %d of the engine takes %c of %lld to %lld in %s; needed: %lld to %lld. Rebuild the bundle",
                profile, static_cast<char>(-tensor.shape[i]), is_known ? static_cast<long long>(smallest.d[i]) : -1,
                is_known ? static_cast<long long>(largest.d[i]) : -1, Quoted(tensor.name.view()).c_str(),
                static_cast<long long>(low), static_cast<long long>(high));
        }
    }
    return Status::ok;
}

Status TensorRtBackend::make_engine(EngineBox& engine, Error& error)
{
    Box<TensorRtEngine> box = make<TensorRtEngine>(gpu_, bundle_.manifest(), log_, logger_, *engine_, making_contexts_);
    QWEN_AOT_NEED(box, error, "an engine");
    TensorRtEngine* const made = box.get();
    EngineBox owned(box.release());
    QWEN_AOT_TRY(made->open(log_, error));
    engine = std::move(owned);
    return Status::ok;
}

void TensorRtBackend::release()
{
    if (gpu_.is_of_parent())
    {
        // Nothing of CUDA works in a child process, and the library would ask it to free memory: all is left, where leak
        // checkers see it.
        next_left_behind_ = left_behind_;
        left_behind_ = this;
        return;
    }
    {
        cuda::Current const current(gpu_);
        engine_.reset();
        runtime_.reset();
    }
    Unmake()(this);
}

} // namespace

Status open_tensorrt_backend(Bundle const& bundle, EngineOptions const& options, BackendBox& backend, Error& error)
{
    Box<TensorRtBackend> opened = make<TensorRtBackend>(bundle, options);
    QWEN_AOT_NEED(opened, error, "an engine");
    TensorRtBackend* const made = opened.get();
    BackendBox owned(opened.release()); // ends what was opened, whatever fails
    QWEN_AOT_TRY(made->open(options, error));
    backend = std::move(owned);
    return Status::ok;
}

} // namespace qwen_aot

#endif // QWEN_AOT_TENSORRT
