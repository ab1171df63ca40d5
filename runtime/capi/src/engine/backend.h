/** A bundle's engine file, loaded once: the weights that all of a model's engines share. */
#pragma once

#include "base/log.h"
#include "bundle/bundle.h"
#include "engine/engine.h"

namespace qwen_aot
{

/** What `qwen_aot_options` says. */
struct EngineOptions
{
    int32_t threads = 0; // 0: usable_cores
    Text onnxruntime_path;
    Text tensorrt_path;
    Text cuda_driver_path;
    Text plugins_path;
    bool allow_bundle_code = false;
    Log log;
};

/** Immutable once open; any threads. Deleted by `release`. */
class Backend
{
public:
    /** A new cache with its rows. */
    virtual Status make_engine(EngineBox& engine, Error& error) = 0;
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
 *  bundle: must outlive it. UNSUPPORTED: this build has no such backend. */
Status open_backend(Bundle const& bundle, EngineOptions const& options, BackendBox& backend, Error& error);

} // namespace qwen_aot
