/** A bundle's engine file, loaded once: the weights that all of a model's engines share. */
#pragma once

#include "base/log.h"
#include "bundle/bundle.h"
#include "engine/engine.h"

namespace qwen_aot
{

/** Which kernels run a graph on the CPU; the numbers are those of `qwen_aot_kernels`. */
enum class Kernels : int32_t
{
    automatic = QWEN_AOT_KERNELS_AUTO,
    own = QWEN_AOT_KERNELS_OWN,
    onnxruntime = QWEN_AOT_KERNELS_ONNXRUNTIME
};

/** What `qwen_aot_options` says. */
struct EngineOptions
{
    int32_t threads = 0; // 0: usable_cores
    Kernels kernels = Kernels::automatic;
    Text onnxruntime_path;
    Text tensorrt_path;
    Text cuda_driver_path;
    Text plugins_path;
    Text cpu_kernels_path;
    bool allow_bundle_code = false;
    Log log;
};

/** Immutable once open; any threads. Deleted by `release`. */
class Backend
{
public:
    /** A new cache with its rows. */
    virtual Status make_engine(EngineBox& engine, Error& error) = 0;
    /** Whether this project's own CPU kernels run it. */
    virtual bool has_own_kernels() const { return false; }
    virtual void release() = 0;

protected:
    ~Backend() = default;
};

struct ReleaseBackend
{
    void operator()(Backend* backend) const { backend->release(); }
};
using BackendBox = std::unique_ptr<Backend, ReleaseBackend>;

/** Loads the engine that the manifest names, with the backend of its target (engine/open.cpp).
 *  bundle: must outlive it; its text engine becomes that of own kernels where they run it.
 *  UNSUPPORTED: this build has no such backend. */
Status open_backend(Bundle& bundle, EngineOptions const& options, BackendBox& backend, Error& error);

} // namespace qwen_aot
