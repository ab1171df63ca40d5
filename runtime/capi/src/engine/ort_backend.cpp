#include "engine/ort_backend.h"

#include "engine/cpu_features.h"
#include "engine/cuda_stream.h"
#include "engine/io_table.h"
#include "engine/kernels_library.h"
#include "engine/ort_step.h"
#include "engine/rows.h"
#include "system/system.h"

#include <cstdio>
#include <cstring>

namespace qwen_aot
{

namespace
{

using ort::Api;

constexpr char kPathVariable[] = "QWEN_AOT_ONNXRUNTIME";

/** Which ONNX Runtime a target needs. */
struct Device
{
    char const* target;
    bool is_gpu;
    int32_t oldest_minor;
};
constexpr Device kDevices[] = {
    {"cpu", false, 32}, // GroupQueryAttention's input 16, query_seqlens, is new in 1.32
    {"cuda", true, 31}, // the newest build for GPUs; QMoE and the opset-24 ops of the graphs have kernels in it
};

/** ONNX Runtime's log of one session. `user`: the backend's Log. */
void take_log(void* user, int32_t severity, char const*, char const*, char const* location, char const* message)
{
    // A run that was told to end says so as an error; who told it knows.
    bool const was_asked_for = std::strstr(message, "terminate flag") != nullptr;
    qwen_aot_log_level const level = was_asked_for || severity < 1 ? QWEN_AOT_LOG_DEBUG
        : severity == 1                                            ? QWEN_AOT_LOG_INFO
        : severity == 2                                            ? QWEN_AOT_LOG_WARNING
                                                                   : QWEN_AOT_LOG_ERROR;
    static_cast<Log const*>(user)->write(level, "ONNX Runtime: %.1200s (%.200s)", message, location);
}

/** ONNX Runtime has one environment in a process, whose log is that of whoever came first; what isn't of a session is
 *  dropped, since it may come after any of ours has gone. */
void drop_log(void*, int32_t, char const*, char const*, char const*, char const*) { }

/** Where an engine on a GPU has its cache. */
struct DeviceMemory
{
    explicit DeviceMemory(cuda::Gpu const& gpu)
        : stream(gpu)
        , memory(stream, true)
    {
    }

    cuda::StreamMemory stream;
    cuda::CudaMemory memory;
};

/** An engine over a shared session. */
class OrtEngine final : public RowEngine
{
public:
    /** device_memory: none on the CPU. */
    OrtEngine(ort::SharedSession const& shared, Manifest const& manifest, Box<DeviceMemory> device_memory)
        : RowEngine(manifest, cache_, prefill_, decode_)
        , shared_(shared)
        , device_memory_(std::move(device_memory))
        , cache_(device_memory_ == nullptr ? static_cast<Memory&>(host_memory_) : device_memory_->memory)
        , prefill_(shared, manifest, cache_, run_options_)
        , decode_(shared, manifest, cache_, run_options_)
    {
    }

    Status open(Log const& log, Error& error)
    {
        Manifest const& facts = manifest();
        QWEN_AOT_TRY(cache_.open(facts, facts.max_capacity(), log, error));
        QWEN_AOT_TRY(shared_.api.check(
            shared_.api.create_run_options(run_options_.fill(shared_.api.release_run_options)), Status::engine_failed,
            "ONNX Runtime can't make run options", "If memory ran out, end other programs", error));
        QWEN_AOT_TRY(prefill_.open(1, facts.prefill_chunk, error));
        return decode_.open(facts.max_batch, 1, error);
    }

    void release() override { Unmake()(this); }

protected:
    // Both only set a flag of the options, and can't fail: onnxruntime_c_api.h, RunOptionsSetTerminate.
    void stop() override { ignore(shared_.api.run_options_set_terminate(run_options_.get())); }
    void unstop() override { ignore(shared_.api.run_options_unset_terminate(run_options_.get())); }

private:
    void ignore(ort::Failure* failure)
    {
        if (failure != nullptr)
        {
            shared_.api.release_status(failure);
        }
    }

    ort::SharedSession const& shared_;
    HostMemory host_memory_;
    Box<DeviceMemory> device_memory_;
    KvCache cache_;
    ort::Owned<ort::RunOptions> run_options_;
    ort::OrtStep prefill_; // two bindings: prefill and decode alternate between shapes that each keep for long
    ort::OrtStep decode_;
};

class OrtBackend final : public Backend
{
public:
    explicit OrtBackend(Bundle& bundle)
        : bundle_(bundle)
    {
    }

    Status open(EngineOptions const& options, Error& error);
    Status make_engine(EngineBox& engine, Error& error) override;
    bool has_own_kernels() const override { return has_own_kernels_; }
    void release() override;

private:
    Status open_session(EngineOptions const& options, Device const& device, Error& error);
    Status create_session(ort::SessionOptions const* session_options, Error& error);
    Status check_provider(Device const& device, Error& error);
    Status add_provider(ort::SessionOptions* session_options, Device const& device, Error& error);
    Status check_signature(bool is_input, Array<IoTensor> const& table, Error& error);
    Status check_tensor(bool is_input, size_t index, Array<IoTensor> const& table, Error& error);

    static inline OrtBackend* left_behind_ = nullptr; // of the parent process

    Bundle& bundle_;
    bool has_own_kernels_ = false;
    Log log_;
    cuda::Gpu gpu_; // of target cuda only
    ort::SharedSession shared_;
    int64_t process_ = system::process_id();
    OrtBackend* next_left_behind_ = nullptr;
};

Status OrtBackend::open(EngineOptions const& options, Error& error)
{
    Manifest const& manifest = bundle_.manifest();
    log_ = options.log;
    Device const* device = nullptr;
    for (Device const& known : kDevices)
    {
        device = manifest.target.view() == known.target ? &known : device;
    }
    if (device == nullptr)
    {
        return error.fail(Status::engine_mismatch,
            "the bundle's target is %s and its engine an ONNX graph; accepted: cpu, cuda",
            Quoted(manifest.target.view()).c_str());
    }
    if (manifest.text_engine.has_fast_prefill && !has_exact_integer_products())
    {
        return error.fail(Status::engine_mismatch,
            "the bundle was built with --fast-prefill, whose integer products need a CPU with VNNI (avx_vnni or "
            "avx512_vnni), "
            "and this one has neither (or %s hides it): its results would be wrong. Rebuild without --fast-prefill",
            kNoVnni);
    }
    QWEN_AOT_TRY(check_table(manifest, error));
    char const* path = options.onnxruntime_path.c_str();
    path = *path != '\0' ? path : system::environment(kPathVariable);
    path = *path != '\0' ? path : "libonnxruntime.so.1";
    QWEN_AOT_TRY(Api::open(path, device->oldest_minor, device->target, shared_.api, error));
    if (device->is_gpu)
    {
        QWEN_AOT_TRY(check_provider(*device, error));
        QWEN_AOT_TRY(gpu_.open(options.cuda_driver_path.c_str(), error));
        QWEN_AOT_TRY(open_session(options, *device, error));
    }
    else
    {
        system::HugePages pages; // under the weights that ONNX Runtime packs for the CPU
        QWEN_AOT_TRY(open_session(options, *device, error));
        pages.collapse_new_memory();
    }
    QWEN_AOT_TRY(check_signature(true, manifest.text_engine.inputs, error));
    return check_signature(false, manifest.text_engine.outputs, error);
}

Status OrtBackend::open_session(EngineOptions const& options, Device const& device, Error& error)
{
    Api const& api = shared_.api;
    constexpr char kMemory[] = "If memory ran out, end other programs";
    auto const check = [&](ort::Failure* failure, char const* what) {
        return api.check(failure, Status::engine_mismatch, what, kMemory, error);
    };
    QWEN_AOT_TRY(check(api.create_env_with_custom_logger(
                           drop_log, nullptr, ort::kLogErrors, "qwen_aot", shared_.env.fill(api.release_env)),
        "ONNX Runtime can't start"));
    QWEN_AOT_TRY(check(api.disable_telemetry_events(shared_.env.get()), "ONNX Runtime can't leave out telemetry"));
    QWEN_AOT_TRY(check(api.create_cpu_memory_info(ort::kDeviceAllocator, ort::kDefaultMemory,
                           shared_.host_memory.fill(api.release_memory_info)),
        "ONNX Runtime can't describe memory"));
    QWEN_AOT_TRY(check(device.is_gpu ? api.create_memory_info("Cuda", ort::kDeviceAllocator, 0, ort::kDefaultMemory,
                                           shared_.cache_memory.fill(api.release_memory_info))
                                     : api.create_cpu_memory_info(ort::kDeviceAllocator, ort::kDefaultMemory,
                                           shared_.cache_memory.fill(api.release_memory_info)),
        "ONNX Runtime can't describe memory"));
    shared_.is_gpu = device.is_gpu;
    ort::Owned<ort::SessionOptions> owned;
    QWEN_AOT_TRY(
        check(api.create_session_options(owned.fill(api.release_session_options)), "ONNX Runtime can't make options"));
    ort::SessionOptions* const session_options = owned.get();
    int32_t const threads = options.threads > 0 ? options.threads : system::usable_cores();
    constexpr char kOptions[] = "ONNX Runtime refuses an option";
    QWEN_AOT_TRY(check(api.set_user_logging_function(session_options, take_log, &log_), kOptions));
    QWEN_AOT_TRY(check(api.set_session_log_severity_level(session_options, ort::kLogErrors), kOptions));
    QWEN_AOT_TRY(check(api.set_intra_op_num_threads(session_options, threads), kOptions));
    QWEN_AOT_TRY(check(api.set_inter_op_num_threads(session_options, 1), kOptions));
    // A memory pattern is kept for every combination of input shapes, and ours change all the time.
    QWEN_AOT_TRY(check(api.disable_mem_pattern(session_options), kOptions));
    QWEN_AOT_TRY(check(api.set_session_graph_optimization_level(session_options, ort::kOptimizeAll), kOptions));
    if (device.is_gpu)
    {
        QWEN_AOT_TRY(add_provider(session_options, device, error));
    }
    else
    {
        QWEN_AOT_TRY(choose_kernels(bundle_, options, api, session_options, has_own_kernels_, error));
    }
    return create_session(session_options, error);
}

Status OrtBackend::create_session(ort::SessionOptions const* session_options, Error& error)
{
    Api const& api = shared_.api;
    // The graph's weights lie in files beside it, so it is opened where it stands and not where a link leads.
    Text path;
    QWEN_AOT_NEED(
        path.append(bundle_.path()) && path.append("/") && path.append(bundle_.manifest().text_engine.file.view()),
        error, "a path");
    char where[200];
    std::snprintf(where, sizeof where, "onnxruntime %s can't load %.140s", api.version(), Quoted(path.view()).c_str());
    return api.check(
        api.create_session(shared_.env.get(), path.c_str(), session_options, shared_.session.fill(api.release_session)),
        Status::engine_mismatch, where,
        "Rebuild the bundle, or install the version of onnxruntime that its manifest names", error);
}

/** Whether this build of ONNX Runtime has the provider at all. */
Status OrtBackend::check_provider(Device const& device, Error& error)
{
    Api const& api = shared_.api;
    char** names = nullptr;
    int count = 0;
    QWEN_AOT_TRY(api.check(api.get_available_providers(&names, &count), Status::engine_mismatch,
        "ONNX Runtime can't list its providers", "Install another build", error));
    bool has_provider = false;
    for (int i = 0; i < count; ++i)
    {
        has_provider = has_provider || std::strcmp(names[i], "CUDAExecutionProvider") == 0;
    }
    QWEN_AOT_TRY(api.check(api.release_available_providers(names, count), Status::engine_mismatch,
        "ONNX Runtime can't list its providers", "Install another build", error));
    if (!has_provider)
    {
        return error.fail(Status::engine_mismatch,
            "onnxruntime %s has no CUDAExecutionProvider, which target %s needs: name the libonnxruntime.so of a build "
            "with "
            "CUDA (the Python package onnxruntime-gpu has one, in onnxruntime/capi)",
            api.version(), device.target);
    }
    return Status::ok;
}

Status OrtBackend::add_provider(ort::SessionOptions* session_options, Device const& device, Error& error)
{
    Api const& api = shared_.api;
    char where[200];
    std::snprintf(where, sizeof where, "the CUDA provider of onnxruntime %s can't be used for target %s", api.version(),
        device.target);
    constexpr char kRemedy[] =
        "It needs an NVIDIA GPU with its driver, and CUDA's and cuDNN's libraries where the loader "
        "finds them (LD_LIBRARY_PATH)";
    auto const check = [&](ort::Failure* failure) {
        return api.check(failure, Status::engine_mismatch, where, kRemedy, error);
    };
    ort::Owned<ort::CudaOptions> options;
    QWEN_AOT_TRY(check(api.create_cuda_provider_options(options.fill(api.release_cuda_provider_options))));
    // By default each extension of the arena doubles it, which leaves no room for the cache beside the weights.
    char const* const keys[] = {"arena_extend_strategy"};
    char const* const values[] = {"kSameAsRequested"};
    QWEN_AOT_TRY(check(api.update_cuda_provider_options(options.get(), keys, values, 1)));
    return check(api.session_options_append_cuda(session_options, options.get()));
}

/** The graph's inputs or outputs are those of the manifest's table. */
Status OrtBackend::check_signature(bool is_input, Array<IoTensor> const& table, Error& error)
{
    Api const& api = shared_.api;
    ort::Session const* const session = shared_.session.get();
    size_t count = 0;
    QWEN_AOT_TRY(api.check(
        is_input ? api.session_get_input_count(session, &count) : api.session_get_output_count(session, &count),
        Status::engine_mismatch, "ONNX Runtime can't describe the graph", "Rebuild the bundle", error));
    if (count != table.size())
    {
        return error.fail(Status::engine_mismatch,
            "the graph has %zu %s and the manifest lists %zu; rebuild the bundle", count,
            is_input ? "inputs" : "outputs", table.size());
    }
    // As many of each, and all of the graph's are listed: names of a graph's inputs don't come twice.
    for (size_t i = 0; i < count; ++i)
    {
        QWEN_AOT_TRY(check_tensor(is_input, i, table, error));
    }
    return Status::ok;
}

Status OrtBackend::check_tensor(bool is_input, size_t index, Array<IoTensor> const& table, Error& error)
{
    Api const& api = shared_.api;
    ort::Session const* const session = shared_.session.get();
    auto const check = [&](ort::Failure* failure) {
        return api.check(
            failure, Status::engine_mismatch, "ONNX Runtime can't describe the graph", "Rebuild the bundle", error);
    };
    ort::Allocator* allocator = nullptr; // the library's own, not to be freed
    QWEN_AOT_TRY(check(api.get_allocator_with_default_options(&allocator)));
    char* name = nullptr;
    QWEN_AOT_TRY(check(is_input ? api.session_get_input_name(session, index, allocator, &name)
                                : api.session_get_output_name(session, index, allocator, &name)));
    IoTensor const* listed = nullptr;
    for (IoTensor const& tensor : table)
    {
        listed = tensor.name.view() == name ? &tensor : listed;
    }
    Quoted const quoted(name);
    QWEN_AOT_TRY(check(api.allocator_free(allocator, name)));
    if (listed == nullptr)
    {
        return error.fail(Status::engine_mismatch,
            "the graph has the %s %s, which the manifest doesn't list; rebuild the bundle",
            is_input ? "input" : "output", quoted.c_str());
    }
    ort::Owned<ort::TypeInfo> type_info;
    QWEN_AOT_TRY(
        check(is_input ? api.session_get_input_type_info(session, index, type_info.fill(api.release_type_info))
                       : api.session_get_output_type_info(session, index, type_info.fill(api.release_type_info))));
    ort::TensorInfo const* info = nullptr; // part of type_info; none if it isn't a tensor
    QWEN_AOT_TRY(check(api.cast_type_info_to_tensor_info(type_info.get(), &info)));
    int32_t type = 0;
    size_t num_dims = 0;
    int64_t sizes[8] = {};
    if (info != nullptr)
    {
        QWEN_AOT_TRY(check(api.get_tensor_element_type(info, &type)));
        QWEN_AOT_TRY(check(api.get_dimensions_count(info, &num_dims)));
    }
    bool is_same = type == ort::element_type(listed->dtype) && num_dims == listed->shape.size() && num_dims <= 8;
    if (is_same)
    {
        QWEN_AOT_TRY(check(api.get_dimensions(info, sizes, num_dims)));
    }
    for (size_t i = 0; is_same && i < num_dims; ++i)
    {
        // Letters of the table, and what the graph leaves open, stand for any size.
        is_same = sizes[i] < 0 || listed->shape[i] < 0 || sizes[i] == listed->shape[i];
    }
    if (!is_same)
    {
        return error.fail(Status::engine_mismatch,
            "%s is of element type %d with %zu dimensions in the graph, and %s with %zu dimensions, or of other sizes, "
            "in the "
            "manifest; rebuild the bundle",
            quoted.c_str(), type, num_dims, dtype_name(listed->dtype), listed->shape.size());
    }
    return Status::ok;
}

Status OrtBackend::make_engine(EngineBox& engine, Error& error)
{
    Box<DeviceMemory> device_memory;
    if (shared_.is_gpu)
    {
        device_memory = make<DeviceMemory>(gpu_);
        QWEN_AOT_NEED(device_memory, error, "an engine");
        cuda::Current const current(gpu_);
        QWEN_AOT_TRY(current.status(error));
        QWEN_AOT_TRY(device_memory->stream.open(error));
    }
    Box<OrtEngine> made = make<OrtEngine>(shared_, bundle_.manifest(), std::move(device_memory));
    QWEN_AOT_NEED(made, error, "an engine");
    QWEN_AOT_TRY(made->open(log_, error));
    engine = EngineBox(made.release());
    return Status::ok;
}

void OrtBackend::release()
{
    if (system::process_id() != process_)
    {
        // A session waits for its threads when it ends, and a child process has none of them: it is left, where leak checkers
        // see it.
        next_left_behind_ = left_behind_;
        left_behind_ = this;
        return;
    }
    Unmake()(this);
}

} // namespace

Status open_ort_backend(Bundle& bundle, EngineOptions const& options, BackendBox& backend, Error& error)
{
    Box<OrtBackend> opened = make<OrtBackend>(bundle);
    QWEN_AOT_NEED(opened, error, "an engine");
    QWEN_AOT_TRY(opened->open(options, error));
    backend = BackendBox(opened.release());
    return Status::ok;
}

} // namespace qwen_aot
