/** ONNX Runtime's C interface as custom ops see it, without its header: functions by their places in `OrtApi`.
 *
 *  The places are those of onnxruntime_c_api.h, which only ever appends; version 24 of the interface has all of them. */
#pragma once

#include <cstddef>
#include <cstdint>

namespace qwen_aot::cpu::ort
{

struct Context; // OrtKernelContext: one call of a kernel
struct Domain;  // OrtCustomOpDomain
struct Failure; // OrtStatus: nullptr is success
struct Info;    // OrtKernelInfo: the node of a kernel
struct SessionOptions;
struct ShapeInfo;
struct Value;

constexpr uint32_t kVersion = 24;

/** ONNXTensorElementDataType. */
enum ElementType : int32_t
{
    kFloat = 1,
    kUint8 = 2,
    kInt8 = 3,
    kInt64 = 7,
    kFloat16 = 10
};

enum ErrorCode : int32_t
{
    kFail = 1,
    kInvalidArgument = 2
};

enum Characteristic : int32_t
{
    kRequired = 0,
    kOptional = 1
};

// clang-format off: one function a line: place, name, result, parameters.
#define QWEN_AOT_ORT_FUNCTIONS(X)                                                                                       \
    X(0, create_status, Failure*, (int32_t code, char const* message))                                                  \
    X(26, create_domain, Failure*, (char const* name, Domain**))                                                        \
    X(27, add_op, Failure*, (Domain*, struct CustomOp const*))                                                          \
    X(28, add_domain, Failure*, (SessionOptions*, Domain*))                                                             \
    X(51, tensor_data, Failure*, (Value*, void** data))                                                                 \
    X(60, element_type, Failure*, (ShapeInfo const*, int32_t* type))                                                    \
    X(61, dimension_count, Failure*, (ShapeInfo const*, size_t* count))                                                 \
    X(62, dimensions, Failure*, (ShapeInfo const*, int64_t* sizes, size_t count))                                       \
    X(65, shape_of, Failure*, (Value const*, ShapeInfo**))                                                              \
    X(85, float_attribute, Failure*, (Info const*, char const* name, float*))                                           \
    X(86, int_attribute, Failure*, (Info const*, char const* name, int64_t*))                                           \
    X(88, input_count, Failure*, (Context const*, size_t* count))                                                       \
    X(90, input, Failure*, (Context const*, size_t index, Value const**))                                               \
    X(91, output, Failure*, (Context*, size_t index, int64_t const* sizes, size_t count, Value**))                      \
    X(99, release_shape, void, (ShapeInfo*))                                                                            \
    X(93, release_status, void, (Failure*))                                                                             \
    X(101, release_domain, void, (Domain*))                                                                             \
    X(249, constant_input, Failure*, (Info const*, size_t index, int* is_constant, Value const**))                      \
    X(274, parallel_for, Failure*, (Context const*, void (*run)(void* user, size_t index), size_t count,                \
        size_t batches, void* user))
// clang-format on

/** The functions, filled once as the library is registered. Immutable afterwards: any threads. */
struct Api
{
#define QWEN_AOT_ORT_MEMBER(place, name, result, parameters) result(*name) parameters = nullptr;
    QWEN_AOT_ORT_FUNCTIONS(QWEN_AOT_ORT_MEMBER)
#undef QWEN_AOT_ORT_MEMBER
};

extern Api api;

/** OrtApiBase. */
struct ApiBase
{
    void const* (*get_api)(uint32_t version);
    char const* (*version)();
};

/** OrtCustomOp as version 17 of the interface has it: what came later is for ops that work in place. */
struct CustomOp
{
    uint32_t version;
    void* (*create_kernel_1)(CustomOp const*, void const* api, Info const*); // unused: of version 1 of the interface
    char const* (*name)(CustomOp const*);
    char const* (*provider)(CustomOp const*);
    int32_t (*input_type)(CustomOp const*, size_t index);
    size_t (*input_types)(CustomOp const*);
    int32_t (*output_type)(CustomOp const*, size_t index);
    size_t (*output_types)(CustomOp const*);
    void (*compute_1)(void* kernel, Context*); // unused
    void (*destroy)(void* kernel);
    int32_t (*input_characteristic)(CustomOp const*, size_t index);
    int32_t (*output_characteristic)(CustomOp const*, size_t index);
    int32_t (*input_memory)(CustomOp const*, size_t index);
    int (*variadic_input_min)(CustomOp const*);
    int (*variadic_input_homogeneous)(CustomOp const*);
    int (*variadic_output_min)(CustomOp const*);
    int (*variadic_output_homogeneous)(CustomOp const*);
    Failure* (*create_kernel)(CustomOp const*, void const* api, Info const*, void** kernel);
    Failure* (*compute)(void* kernel, Context*);
    Failure* (*infer_shapes)(CustomOp const*, void* context);
    int (*first_version)(CustomOp const*);
    int (*last_version)(CustomOp const*);
};

} // namespace qwen_aot::cpu::ort
