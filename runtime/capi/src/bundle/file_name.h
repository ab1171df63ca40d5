/** Names of a bundle's files, as its manifest may list them. */
#pragma once

#include <string_view>

namespace qwen_aot
{

/** Whether a name is that of a file in the bundle's folder or below, on every operating system, and not the manifest's
 *  (`check_file_name` in runtime/bundle/files.py). */
bool is_file_name(std::string_view name);

/** The same in words. */
constexpr char kFileNameWords[] =
    "a relative path with '/' inside the bundle's folder. Don't use this bundle unless you "
    "know where it comes from";

/** The end of a name's last part from its last dot on, "" without one: ".onnx". A dot that the part begins with is none. */
std::string_view suffix_of(std::string_view name);

} // namespace qwen_aot
