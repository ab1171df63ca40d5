/** What the CPU's instructions do to a bundle: whether 8-bit products are exact. */
#pragma once

namespace qwen_aot
{

/** Environment variable: set to anything, this CPU counts as one without VNNI. */
constexpr char kNoVnni[] = "QWEN_AOT_NO_VNNI";

/** Whether ONNX Runtime's kernels of unsigned times signed 8-bit products are exact on this CPU.
 *
 *  x86-64 without VNNI adds pairs of products in 16 bits, which saturate: a product may come out half as large. Source: ONNX
 *  Runtime's documentation of quantization, "When and why do I need to try U8U8?". Other CPUs count as exact. */
bool has_exact_integer_products();

} // namespace qwen_aot
