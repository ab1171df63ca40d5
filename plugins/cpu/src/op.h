/** A kernel class as ONNX Runtime's custom op. */
#pragma once

#include "tensors.h"

#include <memory>

namespace qwen_aot::cpu
{

struct Port
{
    ort::ElementType type;
    ort::Characteristic characteristic = ort::kRequired;
};

/** The custom op of a kernel.
 *
 *  Kernel has `static constexpr char const* kName`, arrays `kInputs` and `kOutputs` of Port, a constructor that takes
 *  `ort::Info const*` and throws where the node can't be computed, and `void compute(ort::Context*) const`, which any
 *  threads may call at once. */
template <class Kernel>
ort::CustomOp const* custom_op()
{
    static constexpr auto make = [] {
        ort::CustomOp op{};
        op.version = 17;
        op.name = [](ort::CustomOp const*) { return Kernel::kName; };
        op.provider = [](ort::CustomOp const*) -> char const* { return nullptr; };
        op.input_type = [](ort::CustomOp const*, size_t i) -> int32_t { return Kernel::kInputs[i].type; };
        op.input_types = [](ort::CustomOp const*) { return std::size(Kernel::kInputs); };
        op.output_type = [](ort::CustomOp const*, size_t i) -> int32_t { return Kernel::kOutputs[i].type; };
        op.output_types = [](ort::CustomOp const*) { return std::size(Kernel::kOutputs); };
        op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
        op.input_characteristic = [](ort::CustomOp const*, size_t i) -> int32_t {
            return Kernel::kInputs[i].characteristic;
        };
        op.output_characteristic = [](ort::CustomOp const*, size_t i) -> int32_t {
            return Kernel::kOutputs[i].characteristic;
        };
        op.input_memory = [](ort::CustomOp const*, size_t) -> int32_t { return 0; };
        op.variadic_input_min = op.variadic_output_min = [](ort::CustomOp const*) { return 1; };
        op.variadic_input_homogeneous = op.variadic_output_homogeneous = [](ort::CustomOp const*) { return 1; };
        op.create_kernel = [](ort::CustomOp const*, void const*, ort::Info const* info, void** kernel) {
            return guarded([&] { *kernel = std::make_unique<Kernel>(info).release(); });
        };
        op.compute = [](void* kernel, ort::Context* context) {
            return guarded([&] { static_cast<Kernel const*>(kernel)->compute(context); });
        };
        op.first_version = [](ort::CustomOp const*) { return 1; };
        op.last_version = [](ort::CustomOp const*) { return 1; };
        return op;
    };
    static ort::CustomOp const op = make();
    return &op;
}

} // namespace qwen_aot::cpu
