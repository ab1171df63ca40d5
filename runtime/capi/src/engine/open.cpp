#include "base/text.h"
#include "engine/backend.h"
#include "engine/ort_backend.h"

namespace qwen_aot
{

Status open_backend(Bundle const& bundle, EngineOptions const& options, BackendBox& backend, Error& error)
{
    Manifest const& manifest = bundle.manifest();
    std::string_view const file = manifest.text_engine.file.view();
    if (ends_with(file, ".onnx"))
    {
        return open_ort_backend(bundle, options, backend, error);
    }
    return error.fail(Status::engine_mismatch,
        "the bundle's engine is %s for target %s, which this version of the library can't run; accepted: .onnx, .plan, "
        ".rtx "
        "files",
        Quoted(file).c_str(), Quoted(manifest.target.view()).c_str());
}

} // namespace qwen_aot
