#include "engine/ort_api.h"

#include <cstdio>
#include <cstring>

namespace qwen_aot::ort
{

struct ApiBase
{
    void* const* (*get_api)(uint32_t version);
    char const* (*get_version_string)();
};

namespace
{

constexpr uint32_t kInterfaceVersion = 17;

} // namespace

Status Api::open(char const* path, int32_t minor, char const* target, Api& api, Error& error)
{
    system::Library library;
    if (system::Library::open(path, library, error) != Status::ok)
    {
        Error const reason = error;
        return error.fail(Status::engine_mismatch,
            "%.*s: the bundle's target %s needs ONNX Runtime 1.%d or newer. Name its libonnxruntime.so in the option "
            "or in "
            "QWEN_AOT_ONNXRUNTIME; the Python package onnxruntime has it in onnxruntime/capi",
            static_cast<int>(reason.message().size() < 900 ? reason.message().size() : 900), reason.message().data(),
            target, minor);
    }
    auto const get_base = reinterpret_cast<ApiBase const* (*)()>(library.find("OrtGetApiBase"));
    ApiBase const* const base = get_base == nullptr ? nullptr : get_base();
    if (base == nullptr)
    {
        return error.fail(Status::engine_mismatch,
            "the library %s is not ONNX Runtime (it has no OrtGetApiBase); accepted: libonnxruntime.so of 1.%d or "
            "newer",
            Quoted(path).c_str(), minor);
    }
    char const* const version = base->get_version_string();
    int major = 0;
    int found = 0;
    if (version == nullptr || std::sscanf(version, "%d.%d", &major, &found) != 2 || major != 1 || found < minor)
    {
        return error.fail(Status::engine_mismatch,
            "the library %s is ONNX Runtime %.31s, and the bundle's target %s needs 1.%d or newer: install that, or "
            "name "
            "another libonnxruntime.so in the option or in QWEN_AOT_ONNXRUNTIME",
            Quoted(path).c_str(), version == nullptr ? "of no version" : version, target, minor);
    }
    void* const* const table = base->get_api(kInterfaceVersion);
    if (table == nullptr)
    {
        return error.fail(Status::engine_mismatch,
            "ONNX Runtime %.31s in %s doesn't give version %u of its interface; accepted: a build of 1.%d or newer "
            "that does",
            version, Quoted(path).c_str(), kInterfaceVersion, minor);
    }
    api.base_ = base;
    std::snprintf(api.version_, sizeof api.version_, "%.31s", version);
#define QWEN_AOT_ORT_TAKE(place, name, result, parameters)                                                             \
    api.name = reinterpret_cast<decltype(api.name)>(table[place]);
    QWEN_AOT_ORT_FUNCTIONS(QWEN_AOT_ORT_TAKE)
#undef QWEN_AOT_ORT_TAKE
    library.keep();
    return Status::ok;
}

Status Api::check(Failure* failure, Status status, char const* where, char const* remedy, Error& error) const
{
    if (failure == nullptr)
    {
        return Status::ok;
    }
    Status const told = error.fail(status, "%s: %.900s. %s", where, get_error_message(failure), remedy);
    release_status(failure);
    return told;
}

} // namespace qwen_aot::ort
