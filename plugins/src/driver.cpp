#include "driver.h"

#include "log.h"

#include <dlfcn.h>

namespace qwen_aot
{
namespace
{

void* find(void* library, char const* symbol)
{
    void* const found = dlsym(library, symbol);
    if (found == nullptr)
    {
        throw Error(text("the CUDA driver (libcuda.so.1) has no function ", symbol, "; update the driver"));
    }
    return found;
}

Driver load()
{
    // Never closed: functions of it may be running until the process ends.
    void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
    {
        throw Error(text("the CUDA driver can't be loaded, which running this plugin needs: ", dlerror()));
    }
    Driver functions{};
#define QWEN_AOT_FIND(member, symbol) functions.member = reinterpret_cast<decltype(&symbol)>(find(library, #symbol));
    QWEN_AOT_DRIVER_FUNCTIONS(QWEN_AOT_FIND)
#undef QWEN_AOT_FIND
    functions.context_get_id = reinterpret_cast<decltype(&cuCtxGetId)>(dlsym(library, "cuCtxGetId"));
    if (CUresult const result = functions.init(0); result != CUDA_SUCCESS)
    {
        throw Error(text("cuInit failed with error ", static_cast<int>(result)));
    }
    return functions;
}

/** What to do about code that the driver doesn't take; nothing for other errors. */
std::string remedy(CUresult result)
{
    switch (result)
    {
    case CUDA_ERROR_INVALID_IMAGE:
    case CUDA_ERROR_NO_BINARY_FOR_GPU:
    case CUDA_ERROR_INVALID_PTX:
    case CUDA_ERROR_UNSUPPORTED_PTX_VERSION: break;
    default: return "";
    }
    int version = 0; // 12080 is 12.8
    if (driver().get_version(&version) != CUDA_SUCCESS)
    {
        return "";
    }
    return text("; this driver is for CUDA ", version / 1000, '.', version % 1000 / 10,
        ", and the code may be of a newer compiler: update the driver (docs/plugins.md says what is needed)");
}

} // namespace

Driver const& driver()
{
    static Driver const functions = load(); // after an exception, the next call loads again
    return functions;
}

void check(CUresult result, char const* what)
{
    if (result == CUDA_SUCCESS)
    {
        return;
    }
    char const* words = nullptr;
    if (driver().get_error_string(result, &words) != CUDA_SUCCESS || words == nullptr)
    {
        words = "unknown error";
    }
    throw Error(text(what, ": ", words, " (CUDA error ", static_cast<int>(result), ")", remedy(result)));
}

RelaxedCapture::RelaxedCapture()
{
    check(driver().exchange_capture_mode(&mode_), "allowing code to be loaded while a stream is captured");
}

RelaxedCapture::~RelaxedCapture()
{
    if (!is_restored_)
    {
        driver().exchange_capture_mode(&mode_);
    }
}

void RelaxedCapture::restore()
{
    check(driver().exchange_capture_mode(&mode_), "restoring what is allowed while a stream is captured");
    is_restored_ = true;
}

} // namespace qwen_aot
