/** Any bytes are a manifest or refused; what is taken keeps its promises. */
#include "bundle/file_name.h"
#include "bundle/manifest.h"

#include <cstdint>
#include <cstdlib>

using namespace qwen_aot;

extern "C" int LLVMFuzzerTestOneInput(uint8_t const* data, size_t size)
{
    Manifest manifest{};
    Error error;
    Status const status = Manifest::parse({reinterpret_cast<char const*>(data), size}, manifest, error);
    if (status != Status::ok)
    {
        if (status != Status::bundle || error.message().empty())
        {
            std::abort();
        }
        return 0;
    }
    bool is_sound = manifest.vocab_size > 0 && manifest.max_batch > 0 && manifest.max_capacity() > manifest.max_context
        && manifest.find_file(manifest.text_engine.file.view()) != nullptr;
    for (FileEntry const& file : manifest.files)
    {
        is_sound = is_sound && is_file_name(file.name.view()) && manifest.find_file(file.name.view()) == &file;
    }
    for (int32_t const id : manifest.eos_token_ids)
    {
        is_sound = is_sound && id >= 0 && id < manifest.vocab_size;
    }
    if (!is_sound)
    {
        std::abort();
    }
    return 0;
}
