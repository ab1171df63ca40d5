#include "bundle/bundle_code.h"

#include "bundle/places.h"
#include "bundle/sha256.h"

#include <cstdio>

namespace qwen_aot
{

namespace
{

constexpr char kAllow[] = "QWEN_AOT_ALLOW_BUNDLE_CODE";  // of the environment; "1" is the setter's yes
constexpr char kInstalled[] = "QWEN_AOT_PLUGIN_LIBRARY"; // of the environment
constexpr int kShown = 256;                              // bytes of a path in these messages, which have more to say

/** This machine's own plugin library. */
struct Installed
{
    bool is_there = false; // else there is none to compare with
    Text path;
    char text[kShown + 160] = ""; // its SHA-256, or why there is none
};

Status hash_file(char const* path, Sha256Text& digest, Error& error)
{
    system::MappedFile file;
    uint8_t bytes[Sha256::kBytes];
    QWEN_AOT_TRY(system::MappedFile::open(path, file, error));
    Sha256::digest(file.bytes(), bytes);
    digest = Sha256Text(bytes);
    return Status::ok;
}

Status find_installed(std::string_view option, Installed& installed, Error& error)
{
    std::string_view const named = option.empty() ? std::string_view(system::environment(kInstalled)) : option;
    char const* const by = option.empty() ? kInstalled : "the option";
    if (named.empty())
    {
        std::snprintf(installed.text, sizeof installed.text, "none installed (%s names none)", kInstalled);
        return Status::ok;
    }
    Text given;
    Error reason; // of its absence, which isn't this call's failure
    uint8_t const none[Sha256::kBytes] = {};
    Sha256Text digest(none);
    QWEN_AOT_NEED(given.assign(named), error, "a path");
    Status status = system::real_path(given.c_str(), installed.path, reason);
    status = status == Status::ok ? hash_file(installed.path.c_str(), digest, reason) : status;
    if (status == Status::out_of_memory)
    {
        return error.no_memory("the plugin library's hash");
    }
    installed.is_there = status == Status::ok;
    if (installed.is_there)
    {
        std::snprintf(installed.text, sizeof installed.text, "%s", digest.c_str());
    }
    else
    {
        std::snprintf(installed.text, sizeof installed.text, "none installed (%s names it: %.*s)", by, kShown,
            reason.message().data());
    }
    return Status::ok;
}

Status refuse(char const* what, char const* path, char const* inside, char const* why, char const* sha256,
    char const* claim, Installed const& installed, Error& error)
{
    char const* const given = system::environment(kAllow);
    char remark[128] = "";
    if (*given != '\0')
    {
        std::snprintf(remark, sizeof remark, " (the variable is %.80s; accepted: 1)",
            Quoted({given, strnlen(given, 16)}).c_str());
    }
    return error.fail(Status::bundle,
        "the bundle brings native code, which would run with your rights: %s %.*s%s; %s.\n"
        "  SHA-256 in the bundle: %s%s\n"
        "  of the installed plugin library: %s\n"
        "If you trust whoever built it as you would trust a program of theirs, allow it: "
        "qwen_aot_options_set_allow_bundle_code, or %s=1%s",
        what, kShown, path, inside, why, sha256, claim, installed.text, kAllow, remark);
}

/** This machine's own library where it is the bundle's too, else the bundle's, if that is allowed. */
Status find_library(Bundle const& bundle, std::string_view option, bool is_allowed, Text& library, Error& error)
{
    TensorRtFacts const& facts = bundle.manifest().text_engine.tensorrt;
    Text path;
    Text located;
    uint8_t const none[Sha256::kBytes] = {};
    Sha256Text found(none);
    QWEN_AOT_NEED(join_path(bundle.path(), facts.plugin_file.view(), path), error, "a path");
    Status status = bundle.locate(facts.plugin_file.view(), located, error);
    status = status == Status::ok ? hash_file(located.c_str(), found, error) : status;
    if (status != Status::ok)
    {
        return status == Status::out_of_memory ? status : error.inside("the plugin library");
    }
    if (facts.plugin_sha256.view() != found.c_str())
    {
        return error.fail(Status::bundle,
            "the plugin library %.*s has the SHA-256 %s, and the engine was built with %s: copy the bundle again, or "
            "delete it "
            "and build it anew",
            kShown, path.c_str(), found.c_str(), facts.plugin_sha256.c_str());
    }
    Installed installed;
    QWEN_AOT_TRY(find_installed(option, installed, error));
    if (installed.is_there && facts.plugin_sha256.view() == installed.text)
    {
        library = std::move(installed.path);
        return Status::ok;
    }
    if (is_allowed)
    {
        library = std::move(located);
        return Status::ok;
    }
    return refuse("the plugin library", path.c_str(), "",
        "it isn't this machine's own: if you built it, name it with qwen_aot_options_set_library or in "
        "QWEN_AOT_PLUGIN_LIBRARY",
        found.c_str(), "", installed, error);
}

/** What the engine carries can't be looked at before it runs. */
Status refuse_engine_code(Bundle const& bundle, std::string_view option, Error& error)
{
    Manifest const& manifest = bundle.manifest();
    TensorRtFacts const& facts = manifest.text_engine.tensorrt;
    Text path;
    QWEN_AOT_NEED(join_path(bundle.path(), manifest.text_engine.file.view(), path), error, "a path");
    Installed installed;
    QWEN_AOT_TRY(find_installed(option, installed, error));
    char const* const why =
        "it can't be looked at before it runs; an engine built without --version-compatible has none";
    bool const has_copy = facts.has_plugins && facts.has_plugins_in_engine;
    FileEntry const* const engine = manifest.find_file(manifest.text_engine.file.view());
    Sha256Text const digest(engine->sha256);
    return refuse("code inside the engine", path.c_str(),
        has_copy ? ": a copy of the plugin library" : ": TensorRT's lean runtime", why,
        has_copy ? facts.plugin_sha256.c_str() : digest.c_str(),
        has_copy ? " (so the manifest claims)" : " (the engine's)", installed, error);
}

} // namespace

Status find_bundle_code(
    Bundle const& bundle, std::string_view installed, bool is_allowed, BundleCode& code, Error& error)
{
    TensorRtFacts const& facts = bundle.manifest().text_engine.tensorrt;
    code = BundleCode();
    if (!bundle.manifest().text_engine.has_tensorrt)
    {
        return Status::ok;
    }
    is_allowed = is_allowed || std::string_view(system::environment(kAllow)) == "1";
    code.runs_engine_code = facts.is_version_compatible || (facts.has_plugins && facts.has_plugins_in_engine);
    if (code.runs_engine_code && !is_allowed)
    {
        code = BundleCode();
        return refuse_engine_code(bundle, installed, error);
    }
    if (!facts.has_plugins || facts.has_plugins_in_engine)
    {
        return Status::ok;
    }
    return find_library(bundle, installed, is_allowed, code.plugin_library, error);
}

} // namespace qwen_aot
