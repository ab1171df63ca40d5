/** Any bytes are an ONNX file or refused; names that are found lie in them. */
#include "bundle/onnx_file.h"

#include <cstdint>
#include <cstdlib>

using namespace qwen_aot;

extern "C" int LLVMFuzzerTestOneInput(uint8_t const* data, size_t size)
{
    Array<std::string_view> locations;
    Error error;
    Status const status = find_data_files({data, size}, "model.onnx", locations, error);
    if (status != Status::ok && (status != Status::bundle || error.message().empty()))
    {
        std::abort();
    }
    for (std::string_view const location : locations)
    {
        auto const* const start = reinterpret_cast<uint8_t const*>(location.data());
        if (!location.empty() && (start < data || location.size() > size - static_cast<size_t>(start - data)))
        {
            std::abort();
        }
    }
    return 0;
}
