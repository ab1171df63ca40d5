#include "log.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstring>

// Visible, so that the compiler knows that objects of these classes come from elsewhere.
#define QWEN_AOT_FOREIGN __attribute__((visibility("default")))

namespace qwen_aot
{

using Severity = nvinfer1::ILogger::Severity; // the same numbers in all versions

/** Finder and logger as TensorRT 10 declares them. Only called, never made or deleted. */
struct QWEN_AOT_FOREIGN Unversioned
{
    class QWEN_AOT_FOREIGN Logger
    {
    public:
        virtual void log(Severity severity, char const* message) noexcept = 0;

    protected:
        virtual ~Logger() = default;
    };

    class QWEN_AOT_FOREIGN Finder
    {
    public:
        virtual Logger* findLogger() = 0;

    protected:
        virtual ~Finder() = default;
    };
};

/** The same in TensorRT 11 and TensorRT-RTX, where both became versioned interfaces: the virtual functions of these
 *  come first. */
struct QWEN_AOT_FOREIGN Versioned
{
    class QWEN_AOT_FOREIGN Logger : public nvinfer1::IVersionedInterface
    {
    public:
        virtual void log(Severity severity, char const* message) noexcept = 0;
    };

    class QWEN_AOT_FOREIGN Finder : public nvinfer1::IVersionedInterface
    {
    public:
        virtual Logger* findLogger() = 0;
    };
};

namespace
{

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};
std::atomic<bool> is_versioned{false};

/** Major version of the TensorRT library that a finder belongs to (TensorRT-RTX: 1), which needn't be that of the
 *  headers this was compiled with. The library isn't linked; the finder's table of virtual functions tells which it
 *  is. */
int32_t major_version_of(nvinfer1::ILoggerFinder const* finder)
{
    void const* virtual_functions = nullptr;
    std::memcpy(&virtual_functions, static_cast<void const*>(finder), sizeof(virtual_functions));
    Dl_info info{};
    void* const library =
        dladdr(virtual_functions, &info) == 0 ? nullptr : dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr)
    {
        return NV_TENSORRT_MAJOR;
    }
    auto const get_major = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibMajorVersion"));
    dlclose(library); // whoever called has it open
    return get_major == nullptr ? NV_TENSORRT_MAJOR : get_major();
}

/** Whether a logger was found and told. */
template <class Layout>
bool tell(nvinfer1::ILoggerFinder* finder, Severity severity, char const* line)
{
    typename Layout::Logger* const logger = reinterpret_cast<typename Layout::Finder*>(finder)->findLogger();
    if (logger == nullptr)
    {
        return false;
    }
    logger->log(severity, line);
    return true;
}

} // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept
{
    if (finder != nullptr)
    {
        int32_t const major = major_version_of(finder);
        is_versioned = major >= 11 || major == 1;
    }
    logger_finder = finder;
}

void log(Severity severity, char const* where, char const* message) noexcept
{
    try
    {
        std::string const line = text("qwen_aot ", where, ": ", message);
        nvinfer1::ILoggerFinder* const finder = logger_finder;
        bool const is_told = finder != nullptr
            && (is_versioned ? tell<Versioned>(finder, severity, line.c_str())
                             : tell<Unversioned>(finder, severity, line.c_str()));
        if (!is_told && severity <= Severity::kERROR)
        {
            std::fprintf(stderr, "%s\n", line.c_str());
        }
    }
    catch (...) // no memory for the line
    {
        std::fprintf(stderr, "qwen_aot %s: %s\n", where, message);
    }
}

} // namespace qwen_aot
