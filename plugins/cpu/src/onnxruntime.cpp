#include "onnxruntime.h"

namespace qwen_aot::cpu::ort
{

Api api;

} // namespace qwen_aot::cpu::ort
