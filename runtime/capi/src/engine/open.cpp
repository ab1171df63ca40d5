#include "bundle/file_name.h"
#include "engine/backend.h"
#include "engine/ort_backend.h"
#include "engine/tensorrt_backend.h"

namespace qwen_aot
{

namespace
{

#if !defined(QWEN_AOT_TENSORRT)
constexpr bool kHasTensorRt = false;
#else
constexpr bool kHasTensorRt = true;
#if defined(QWEN_AOT_TENSORRT_RTX)
constexpr char kSuffix[] = ".rtx";
#else
constexpr char kSuffix[] = ".plan";
#endif
#endif

/** Engine files of TensorRT and of TensorRT-RTX: a build has the headers of one of them, or of neither. */
bool is_tensorrt(std::string_view suffix)
{
    return suffix == ".plan" || suffix == ".rtx";
}

} // namespace

Status open_backend(Bundle& bundle, EngineOptions const& options, BackendBox& backend, Error& error)
{
    Manifest const& manifest = bundle.manifest();
    if (options.kernels == Kernels::own && !manifest.text_engine.has_kernels)
    {
        return error.fail(Status::engine_mismatch,
            "the bundle for target %s has no graph for own CPU kernels%s. Let kernels be auto or onnxruntime, or build "
            "it anew",
            Quoted(manifest.target.view()).c_str(),
            manifest.text_engine.has_fast_prefill ? ": --fast-prefill builds have none" : "");
    }
    std::string_view const file = manifest.text_engine.file.view();
    // As the bundle told them apart when it checked what the file reads (Bundle::open): ".onnx" alone has no suffix.
    std::string_view const suffix = suffix_of(file);
    if (suffix == ".onnx")
    {
        return open_ort_backend(bundle, options, backend, error);
    }
    if (is_tensorrt(suffix))
    {
        if (options.threads > 0)
        {
            return error.fail(Status::invalid_argument,
                "threads is %d, and the bundle's engine runs on a GPU: leave it out", options.threads);
        }
#if defined(QWEN_AOT_TENSORRT)
        if (suffix == kSuffix)
        {
            return open_tensorrt_backend(bundle, options, backend, error);
        }
#endif
        bool const is_rtx = suffix == ".rtx";
        return error.fail(Status::unsupported,
            "this build of libqwen_aot %s, and the bundle's engine %s is for target %s: build the library with "
            "-DQWEN_AOT_TENSORRT_INCLUDE_DIR=(folder of %s's NvInferRuntime.h)%s (docs/capi.md)",
            kHasTensorRt ? "has the backend of the other TensorRT" : "has no TensorRT", Quoted(file).c_str(),
            Quoted(manifest.target.view()).c_str(), is_rtx ? "TensorRT-RTX" : "TensorRT",
            is_rtx ? " -DQWEN_AOT_TENSORRT_RTX=ON" : "");
    }
    return error.fail(Status::engine_mismatch,
        "the bundle's engine is %s for target %s, which this version of the library can't run; accepted: .onnx, .plan, "
        ".rtx "
        "files",
        Quoted(file).c_str(), Quoted(manifest.target.view()).c_str());
}

} // namespace qwen_aot
