/** A library that says it is ONNX Runtime, of the version in the environment's OTHER_ONNXRUNTIME; a newer interface than it
 *  has must not be asked of it, which real ones answer with a line on stderr. */
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace
{

struct ApiBase
{
    void const* (*get_api)(uint32_t version);
    char const* (*get_version_string)();
};

void const* get_api(uint32_t)
{
    if (std::strcmp(std::getenv("OTHER_ONNXRUNTIME"), "9.9.9") < 0)
    {
        std::fprintf(stderr, "the interface was asked of a library that is too old\n");
        std::abort();
    }
    return nullptr;
}

char const* get_version_string()
{
    return std::getenv("OTHER_ONNXRUNTIME");
}

ApiBase const base = {get_api, get_version_string};

} // namespace

extern "C" ApiBase const* OrtGetApiBase()
{
    return std::getenv("OTHER_ONNXRUNTIME") == nullptr ? nullptr : &base;
}
