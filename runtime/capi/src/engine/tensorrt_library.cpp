// Only where TensorRT's headers are (QWEN_AOT_TENSORRT_INCLUDE_DIR).
#if defined(QWEN_AOT_TENSORRT)

#include "engine/tensorrt_library.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace qwen_aot::tensorrt
{

namespace
{

constexpr size_t kParts = 4; // of a version: major, minor, patch, build

/** The leading numbers of a version, "1.7.1.116" or "10.13.3.9.post1"; how many there are. */
size_t parse_version(char const* text, int64_t* parts)
{
    size_t count = 0;
    while (count < kParts && *text >= '0' && *text <= '9')
    {
        char* end = nullptr;
        parts[count++] = std::strtoll(text, &end, 10);
        if (*end != '.')
        {
            break;
        }
        text = end + 1;
    }
    return count;
}

/** Whether a version loads the engine: the one that built it, to its build number, or with leave a later one. Sources:
 *  NVIDIA's documentation, "Version Compatibility" and "Engine Compatibility" (TensorRT-RTX). */
bool can_run(char const* found, TensorRtFacts const& facts)
{
    int64_t has[kParts] = {};
    int64_t wants[kParts] = {};
    size_t const has_parts = parse_version(found, has);
    size_t const wanted_parts = parse_version(facts.version.c_str(), wants);
    size_t const known = has_parts < wanted_parts ? has_parts : wanted_parts; // some leave the build number out
    for (size_t i = 0; i < known; ++i)
    {
        if (has[i] != wants[i])
        {
            return facts.is_version_compatible && has[i] > wants[i];
        }
    }
    return known > 0;
}

} // namespace

void Logger::log(Severity severity, char const* message) noexcept
{
    bool const is_error = severity == Severity::kERROR || severity == Severity::kINTERNAL_ERROR;
    if (is_error)
    {
        system::Lock const lock(mutex_);
        bool is_known = false;
        for (size_t i = count_ > kErrors ? count_ - kErrors : 0; i < count_; ++i)
        {
            is_known = is_known || std::strncmp(errors_[i % kErrors], message, sizeof errors_[0] - 1) == 0;
        }
        if (!is_known)
        {
            std::snprintf(errors_[count_++ % kErrors], sizeof errors_[0], "%s", message);
        }
    }
    // An error comes back as the failed call's own, so here it is a note.
    log_.write(severity == Severity::kWARNING ? QWEN_AOT_LOG_INFO : QWEN_AOT_LOG_DEBUG, "%s: %.1400s", kFlavour.title,
        message);
}

char const* Logger::take_errors(Errors& errors)
{
    system::Lock const lock(mutex_);
    std::snprintf(errors.text, sizeof errors.text, "it gave no reason");
    size_t length = 0;
    for (size_t i = count_ > kErrors ? count_ - kErrors : 0; i < count_ && length < sizeof errors.text; ++i)
    {
        int const added = std::snprintf(errors.text + length, sizeof errors.text - length,
            length == 0 ? "%.190s" : "; %.190s", errors_[i % kErrors]);
        length += added > 0 ? static_cast<size_t>(added) : 0;
    }
    count_ = 0;
    return errors.text;
}

Status Library::open(char const* path, TensorRtFacts const& facts, Library& library, Error& error)
{
    system::Library opened;
    if (system::Library::open(*path != '\0' ? path : kFlavour.library, opened, error) != Status::ok)
    {
        Error const reason = error;
        return error.fail(Status::engine_mismatch,
            "%.*s: the bundle's engine was built by %s %.40s; install that version, or name its library in the option",
            static_cast<int>(reason.message().size() < 900 ? reason.message().size() : 900), reason.message().data(),
            kFlavour.title, facts.version.c_str());
    }
    using Number = int32_t (*)();
    constexpr char const* kNumbers[kParts] = {
        "getInferLibMajorVersion", "getInferLibMinorVersion", "getInferLibPatchVersion", "getInferLibBuildVersion"};
    int32_t numbers[kParts] = {};
    bool is_whole = true;
    for (size_t i = 0; i < kParts; ++i)
    {
        auto const number = reinterpret_cast<Number>(opened.find(kNumbers[i]));
        is_whole = is_whole && number != nullptr;
        numbers[i] = is_whole ? number() : 0;
    }
    library.create_runtime_ =
        reinterpret_cast<decltype(library.create_runtime_)>(opened.find("createInferRuntime_INTERNAL"));
    if (!is_whole || library.create_runtime_ == nullptr)
    {
        return error.fail(Status::engine_mismatch,
            "the library %s is not %s, or older than this runtime knows; accepted: version %.40s, which built the "
            "bundle's "
            "engine",
            Quoted(*path != '\0' ? path : kFlavour.library).c_str(), kFlavour.title, facts.version.c_str());
    }
    std::snprintf(
        library.version_, sizeof library.version_, "%d.%d.%d.%d", numbers[0], numbers[1], numbers[2], numbers[3]);
    if (numbers[0] != NV_TENSORRT_MAJOR)
    {
        return error.fail(Status::engine_mismatch,
            "%s is %s, and this build of libqwen_aot is for version %d; accepted: that, or a libqwen_aot that was "
            "built with "
            "the headers of version %d",
            kFlavour.title, library.version_, NV_TENSORRT_MAJOR, numbers[0]);
    }
    if (!can_run(library.version_, facts))
    {
        return error.fail(Status::engine_mismatch,
            "%s is %s, and the bundle's engine was built by %.40s; accepted: version %.40s%s. Install it, or rebuild "
            "the bundle "
            "with the version that is installed",
            kFlavour.title, library.version_, facts.version.c_str(), facts.version.c_str(),
            facts.is_version_compatible ? " or later" : "");
    }
    opened.keep();
    return Status::ok;
}

Owned<nvinfer1::IRuntime> Library::make_runtime(Logger& logger) const
{
    // As createInferRuntime of the header, whose symbol isn't there to be linked with.
    return Owned<nvinfer1::IRuntime>(static_cast<nvinfer1::IRuntime*>(create_runtime_(&logger, NV_TENSORRT_VERSION)));
}

} // namespace qwen_aot::tensorrt

#endif // QWEN_AOT_TENSORRT
