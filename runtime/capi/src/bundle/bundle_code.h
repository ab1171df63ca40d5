/** Which native code of a bundle may run: this machine's own plugin library, or what the user allowed by name
 *  (docs/security.md, "Native code"; runtime/backends/tensorrt/bundle_code.py).
 *
 *  A bundle brings code for the host in three forms: the file of the plugin library; a copy of it inside the engine; and the
 *  lean runtime inside a version-compatible engine. Only the first can be compared before it runs. */
#pragma once

#include "base/status.h"
#include "base/text.h"
#include "bundle/bundle.h"

#include <string_view>

namespace qwen_aot
{

/** What an engine may load and run on the host. */
struct BundleCode
{
    Text plugin_library;           // to be loaded before the engine; "": there is none, or the engine holds it
    bool runs_engine_code = false; // whether TensorRT may run what the engine itself carries
};

/** Decides it, before any library is opened. The bundle's plugin library is hashed however large it is, and whether or not
 *  the bundle's files were. Where it equals this machine's own, that one is named and not the bundle's: so nothing can be
 *  exchanged between the look and the load.
 *  bundle: of a TensorRT engine.
 *  installed: path of this machine's own plugin library; "": what QWEN_AOT_PLUGIN_LIBRARY names, if anything.
 *  is_allowed: the caller lets the bundle run code of its own; so does QWEN_AOT_ALLOW_BUNDLE_CODE=1.
 *  BUNDLE: it has code that is neither this machine's own nor allowed, or a changed library. IO: that can't be read. */
Status find_bundle_code(
    Bundle const& bundle, std::string_view installed, bool is_allowed, BundleCode& code, Error& error);

} // namespace qwen_aot
