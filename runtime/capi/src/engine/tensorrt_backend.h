/** The backend over TensorRT or TensorRT-RTX, past and present bound to one place in device memory. */
#pragma once

#include "engine/backend.h"

namespace qwen_aot
{

/** Checks code, library, GPU and free memory, then loads the engine. All memory of an engine is allocated when it is made; a
 *  step allocates none, but for the first one of each CUDA graph.
 *  bundle: must outlive the backend.
 *  ENGINE_MISMATCH: a library is missing or of another version, there is no GPU or driver, or the GPU can't run this engine.
 *  BUNDLE: the bundle has code that isn't allowed. */
Status open_tensorrt_backend(Bundle const& bundle, EngineOptions const& options, BackendBox& backend, Error& error);

} // namespace qwen_aot
