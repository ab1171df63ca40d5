/** TensorRT's library: which one a bundle's engine needs, its version, and what it says. */
#pragma once

#include "base/log.h"
#include "bundle/manifest.h"
#include "system/system.h"

#include <NvInferRuntime.h>

namespace qwen_aot::tensorrt
{

/** In what TensorRT and TensorRT-RTX differ; a build has the headers of one, and can run its engines. */
struct Flavour
{
    char const* target;
    char const* title;
    char const* library; // by the system's search
    char const* suffix;  // of its engine files
    /** It captures CUDA graphs itself: it compiles kernels for a shape while slower ones already run, which a graph that was
     *  captured from outside would keep. Source: TensorRT-RTX's documentation, "Working with RTX CUDA Graphs". */
    bool captures_graphs;
};
#if defined(QWEN_AOT_TENSORRT_RTX)
constexpr Flavour kFlavour = {"tensorrt-rtx", "TensorRT-RTX", "libtensorrt_rtx.so.1", ".rtx", true};
#else
constexpr Flavour kFlavour = {"tensorrt", "TensorRT", "libnvinfer.so.10", ".plan", false};
#endif

/** Keeps the latest errors, since TensorRT's calls say no more than that they failed, and hands all messages on. Any threads. */
class Logger final : public nvinfer1::ILogger
{
public:
    explicit Logger(Log const& log)
        : log_(log)
    {
    }

    void log(Severity severity, char const* message) noexcept override;

    /** The latest errors, oldest first, in `text`; forgets them. Returns `text`. */
    struct Errors
    {
        char text[800];
    };
    char const* take_errors(Errors& errors);

    /** It is never deleted by its base; a deleting destructor of its own keeps the one of a C++ library out. */
    static void operator delete(void*) { }

private:
    static constexpr size_t kErrors = 4;

    Log log_;
    system::Mutex mutex_;
    char errors_[kErrors][256] = {};
    size_t count_ = 0;
};

/** An object of the library, which ends it. */
template <class T>
struct Delete
{
    void operator()(T* object) const { delete object; } // its virtual destructor: the library's own
};
template <class T>
using Owned = std::unique_ptr<T, Delete<T>>;

/** An open library. */
class Library
{
public:
    /** Opens it and checks its version before anything is made with it. It stays in the process for good.
     *  path: full; "": the system's search.
     *  ENGINE_MISMATCH: it is missing, or of a version that can't run the engine. */
    static Status open(char const* path, TensorRtFacts const& facts, Library& library, Error& error);

    /** "10.14.1.48". */
    char const* version() const { return version_; }

    /** A new runtime, or none. */
    Owned<nvinfer1::IRuntime> make_runtime(Logger& logger) const;

private:
    void* (*create_runtime_)(void* logger, int32_t version) noexcept = nullptr;
    char version_[64] = "";
};

} // namespace qwen_aot::tensorrt
