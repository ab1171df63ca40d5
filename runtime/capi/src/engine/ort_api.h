/** ONNX Runtime's C interface, without its header: a table of the functions that are used, by their places in `OrtApi`.
 *
 *  The places are those of onnxruntime_c_api.h, which only ever appends. All of these functions are there since version 17 of
 *  the interface (ONNX Runtime 1.17: SetUserLoggingFunction is the newest of them), so that is what is asked for; what bundles
 *  need of the library's kernels is newer, and is asked of its version (`open`). */
#pragma once

#include "base/status.h"
#include "system/system.h"

#include <cstddef>
#include <cstdint>

namespace qwen_aot::ort
{

struct Allocator;
struct ApiBase; // OrtApiBase: where a library of ops takes the interface from
struct CudaOptions;
struct Env;
struct Failure; // OrtStatus: nullptr is success
struct IoBinding;
struct MemoryInfo;
struct RunOptions;
struct Session;
struct SessionOptions;
struct TensorInfo; // part of a TypeInfo
struct TypeInfo;
struct Value;

/** Takes what ONNX Runtime logs. `severity`: 2 for warnings, 3 for errors, 4 for what is fatal. */
using LogFunction = void (*)(
    void* user, int32_t severity, char const* category, char const* id, char const* location, char const* message);

/** ONNXTensorElementDataType. */
enum ElementType : int32_t
{
    kFloat = 1,
    kInt8 = 3,
    kInt32 = 6,
    kInt64 = 7,
    kFloat16 = 10,
    kBFloat16 = 16
};

constexpr int32_t kLogErrors = 3;       // ORT_LOGGING_LEVEL_ERROR
constexpr int32_t kOptimizeAll = 99;    // ORT_ENABLE_ALL
constexpr int32_t kDeviceAllocator = 0; // OrtDeviceAllocator
constexpr int32_t kDefaultMemory = 0;   // OrtMemTypeDefault

// clang-format off: one function a line: place, name, result, parameters.
#define QWEN_AOT_ORT_FUNCTIONS(X)                                                                                       \
    X(2, get_error_message, char const*, (Failure const*))                                                              \
    X(4, create_env_with_custom_logger, Failure*, (LogFunction, void* user, int32_t severity, char const* id, Env**))   \
    X(6, disable_telemetry_events, Failure*, (Env const*))                                                              \
    X(7, create_session, Failure*, (Env const*, char const* path, SessionOptions const*, Session**))                    \
    X(10, create_session_options, Failure*, (SessionOptions**))                                                         \
    X(17, disable_mem_pattern, Failure*, (SessionOptions*))                                                             \
    X(22, set_session_log_severity_level, Failure*, (SessionOptions*, int32_t severity))                                \
    X(23, set_session_graph_optimization_level, Failure*, (SessionOptions*, int32_t level))                             \
    X(24, set_intra_op_num_threads, Failure*, (SessionOptions*, int32_t threads))                                       \
    X(25, set_inter_op_num_threads, Failure*, (SessionOptions*, int32_t threads))                                       \
    X(30, session_get_input_count, Failure*, (Session const*, size_t* count))                                           \
    X(31, session_get_output_count, Failure*, (Session const*, size_t* count))                                          \
    X(33, session_get_input_type_info, Failure*, (Session const*, size_t index, TypeInfo**))                            \
    X(34, session_get_output_type_info, Failure*, (Session const*, size_t index, TypeInfo**))                           \
    X(36, session_get_input_name, Failure*, (Session const*, size_t index, Allocator*, char** name))                    \
    X(37, session_get_output_name, Failure*, (Session const*, size_t index, Allocator*, char** name))                   \
    X(39, create_run_options, Failure*, (RunOptions**))                                                                 \
    X(46, run_options_set_terminate, Failure*, (RunOptions*))                                                           \
    X(47, run_options_unset_terminate, Failure*, (RunOptions*))                                                         \
    X(49, create_tensor_with_data_as_ort_value, Failure*, (MemoryInfo const*, void* data, size_t bytes,                 \
        int64_t const* shape, size_t dims, int32_t type, Value**))                                                      \
    X(55, cast_type_info_to_tensor_info, Failure*, (TypeInfo const*, TensorInfo const**))                               \
    X(60, get_tensor_element_type, Failure*, (TensorInfo const*, int32_t* type))                                        \
    X(61, get_dimensions_count, Failure*, (TensorInfo const*, size_t* count))                                           \
    X(62, get_dimensions, Failure*, (TensorInfo const*, int64_t* sizes, size_t count))                                  \
    X(68, create_memory_info, Failure*, (char const* device, int32_t allocator, int id, int32_t memory, MemoryInfo**))  \
    X(69, create_cpu_memory_info, Failure*, (int32_t allocator, int32_t memory, MemoryInfo**))                          \
    X(76, allocator_free, Failure*, (Allocator*, void* memory))                                                         \
    X(78, get_allocator_with_default_options, Failure*, (Allocator**))                                                  \
    X(92, release_env, void, (Env*))                                                                                    \
    X(93, release_status, void, (Failure*))                                                                             \
    X(94, release_memory_info, void, (MemoryInfo*))                                                                     \
    X(95, release_session, void, (Session*))                                                                            \
    X(96, release_value, void, (Value*))                                                                                \
    X(97, release_run_options, void, (RunOptions*))                                                                     \
    X(98, release_type_info, void, (TypeInfo*))                                                                         \
    X(100, release_session_options, void, (SessionOptions*))                                                            \
    X(125, get_available_providers, Failure*, (char*** names, int* count))                                              \
    X(126, release_available_providers, Failure*, (char** names, int count))                                            \
    X(133, run_with_binding, Failure*, (Session*, RunOptions const*, IoBinding const*))                                 \
    X(134, create_io_binding, Failure*, (Session*, IoBinding**))                                                        \
    X(135, release_io_binding, void, (IoBinding*))                                                                      \
    X(136, bind_input, Failure*, (IoBinding*, char const* name, Value const*))                                          \
    X(137, bind_output, Failure*, (IoBinding*, char const* name, Value const*))                                         \
    X(202, synchronize_bound_inputs, Failure*, (IoBinding*))                                                            \
    X(204, session_options_append_cuda, Failure*, (SessionOptions*, CudaOptions const*))                                \
    X(205, create_cuda_provider_options, Failure*, (CudaOptions**))                                                     \
    X(206, update_cuda_provider_options, Failure*, (CudaOptions*, char const* const* keys, char const* const* values,   \
        size_t count))                                                                                                  \
    X(208, release_cuda_provider_options, void, (CudaOptions*))                                                         \
    X(266, set_user_logging_function, Failure*, (SessionOptions*, LogFunction, void* user))
// clang-format on

/** An open library. Immutable: any threads. */
class Api
{
public:
    /** Opens the library and checks its version before anything else is asked of it: an older one asked for a newer interface
     *  prints on stderr. It stays in the process for good: threads and tables of its own outlive its last session.
     *  path: full; or a name, for the system's search.
     *  minor: of the oldest version 1.x that has what the bundle needs.
     *  target: of the bundle, for messages.
     *  ENGINE_MISMATCH: it is missing, isn't ONNX Runtime, or too old. */
    static Status open(char const* path, int32_t minor, char const* target, Api& api, Error& error);

    /** "1.32.0". */
    char const* version() const { return version_; }

    ApiBase const* base() const { return base_; }

    /** Turns a failure into an error, and frees it. `where`: what failed, with what to do behind the library's own words
     *  in `remedy`. */
    Status check(Failure* failure, Status status, char const* where, char const* remedy, Error& error) const;

#define QWEN_AOT_ORT_MEMBER(place, name, result, parameters) result(*name) parameters = nullptr;
    QWEN_AOT_ORT_FUNCTIONS(QWEN_AOT_ORT_MEMBER)
#undef QWEN_AOT_ORT_MEMBER

private:
    ApiBase const* base_ = nullptr;
    char version_[32] = "";
};

/** The owner of an object of the library. */
template <class T>
class Owned
{
public:
    Owned() = default;
    Owned(Owned const&) = delete;
    Owned& operator=(Owned const&) = delete;
    ~Owned() { reset(); }

    T* get() const { return object_; }
    /** Where a new object is put; `release` will free it. */
    T** fill(void (*release)(T*))
    {
        reset();
        release_ = release;
        return &object_;
    }
    void reset()
    {
        if (object_ != nullptr)
        {
            release_(object_);
            object_ = nullptr;
        }
    }

private:
    T* object_ = nullptr;
    void (*release_)(T*) = nullptr;
};

} // namespace qwen_aot::ort
