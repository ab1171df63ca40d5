/** The backend over ONNX Runtime's CPU and CUDA providers, past and present bound to one buffer. */
#pragma once

#include "engine/backend.h"

namespace qwen_aot
{

/** Opens the bundle's ONNX graph; on the CPU, weights stay memory-mapped where neither ONNX Runtime repacks them nor own
 *  kernels copy them into large pages.
 *  bundle: must outlive the backend.
 *  ENGINE_MISMATCH: ONNX Runtime is missing, too old or another build, can't run this graph, or finds no GPU where the target
 *  needs one. */
Status open_ort_backend(Bundle& bundle, EngineOptions const& options, BackendBox& backend, Error& error);

} // namespace qwen_aot
