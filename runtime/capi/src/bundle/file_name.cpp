#include "bundle/file_name.h"

#include "bundle/manifest.h"

namespace qwen_aot
{

bool is_file_name(std::string_view name)
{
    if (name.empty() || name == kManifestName)
    {
        return false;
    }
    size_t start = 0; // of a part
    for (size_t at = 0; at <= name.size(); ++at)
    {
        char const character = at < name.size() ? name[at] : '/';
        // Drive letters, other separators, control characters, patterns.
        if (static_cast<unsigned char>(character) < 0x20
            || std::string_view("\\:<>\"|?*").find(character) != std::string_view::npos)
        {
            return false;
        }
        if (character == '/')
        {
            std::string_view const part(name.data() + start, at - start);
            if (part.empty() || part == "." || part == "..")
            {
                return false;
            }
            start = at + 1;
        }
    }
    return true;
}

std::string_view suffix_of(std::string_view name)
{
    size_t const slash = name.rfind('/');
    size_t const start = slash == std::string_view::npos ? 0 : slash + 1;
    size_t const dot = name.rfind('.');
    if (dot == std::string_view::npos || dot <= start || dot + 1 == name.size())
    {
        return "";
    }
    return {name.data() + dot, name.size() - dot};
}

} // namespace qwen_aot
