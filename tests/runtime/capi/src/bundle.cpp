/** Opens bundles; reads, maps and locates their files, and says what of their native code may run. */
#include "bundle/bundle.h"
#include "answers.h"
#include "bundle/bundle_code.h"
#include "hex.h"

namespace
{

using namespace qwen_aot;

std::string_view text_of(JsonValue request, char const* key)
{
    JsonValue value;
    return request.find(key, value) ? value.string() : "";
}

std::string shown(char const* how, Status status, std::string_view content, Error const& error)
{
    return std::string(", \"") + how
        + "\": " + (status == Status::ok ? answers::quoted(answers::hex_of_bytes(content)) : answers::failed(error));
}

/** One file, in every way that there is. */
std::string shown_file(Bundle const& bundle, std::string_view name)
{
    std::string result = std::string("{\"has\": ") + (bundle.has(name) ? "true" : "false");
    Error error;
    Text path;
    Status status = bundle.locate(name, path, error);
    result += shown("locate", status, path.view(), error);
    Array<uint8_t> bytes;
    status = bundle.read(name, bytes, error);
    result += shown("read", status, {reinterpret_cast<char const*>(bytes.data()), bytes.size()}, error);
    system::MappedFile file;
    status = bundle.map(name, file, error);
    result += shown("map", status, {reinterpret_cast<char const*>(file.bytes().data()), file.bytes().size()}, error);
    return result + "}";
}

} // namespace

int main()
{
    Bundle bundle; // the one that was opened last
    return answers::serve([&](JsonValue request) -> std::string {
        JsonValue value;
        Error error;
        if (request.find("file", value))
        {
            return shown_file(bundle, value.string());
        }
        if (request.find("is_allowed", value))
        {
            BundleCode code;
            Status const status = find_bundle_code(bundle, text_of(request, "installed"), value.boolean(), code, error);
            return status != Status::ok ? answers::failed(error)
                                        : "[" + answers::quoted(code.plugin_library.view()) + ", "
                    + (code.runs_engine_code ? "true]" : "false]");
        }
        uint64_t const limit =
            request.find("hash_limit", value) && !value.is_null() ? static_cast<uint64_t>(value.integer()) : UINT64_MAX;
        Status const status = Bundle::open(text_of(request, "open"), limit, bundle, error);
        return status == Status::ok ? answers::quoted(bundle.path()) : answers::failed(error);
    });
}
