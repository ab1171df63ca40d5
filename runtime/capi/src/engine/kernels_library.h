/** Which kernels run a graph on the CPU: this project's own, which are ops in a library of ONNX Runtime's form, or ONNX
 *  Runtime's. */
#pragma once

#include "engine/backend.h"
#include "engine/ort_api.h"

namespace qwen_aot
{

/** Chooses as the Python runtime does (runtime/backends/cpu/kernels.py), and adds own kernels to a session's options where they are chosen. Their library then stays in the process for
 *  good, as ONNX Runtime does.
 *  bundle: of target cpu; its text engine becomes the one for own kernels where they are chosen.
 *  options: what is wanted; the log is told what was chosen.
 *  is_own: set.
 *  ENGINE_MISMATCH: own kernels are wanted, or their library is named by the option or the environment, and they can't be
 *  had; or QWEN_AOT_CPU_INSTRUCTIONS names instructions that this CPU lacks. */
Status choose_kernels(Bundle& bundle, EngineOptions const& options, ort::Api const& api,
    ort::SessionOptions* session_options, bool& is_own, Error& error);

} // namespace qwen_aot
