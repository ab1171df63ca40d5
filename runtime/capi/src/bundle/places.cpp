#include "bundle/places.h"

#include "system/system.h"

namespace qwen_aot
{

namespace
{

/** The folder that a path without links lies in; "" of the root's. */
std::string_view parent_of(std::string_view path)
{
    size_t const slash = path.rfind('/');
    return slash == std::string_view::npos ? "" : std::string_view(path.data(), slash);
}

std::string_view name_of(std::string_view path)
{
    size_t const slash = path.rfind('/');
    return slash == std::string_view::npos ? path : std::string_view(path.data() + slash + 1, path.size() - slash - 1);
}

/** The model of the snapshot that a folder, without links, is or lies in, "models--X" with its path; "": it is in none. */
std::string_view model_of(std::string_view root)
{
    for (std::string_view snapshot = root; !snapshot.empty(); snapshot = parent_of(snapshot))
    {
        std::string_view const model = parent_of(parent_of(snapshot));
        if (name_of(parent_of(snapshot)) == "snapshots" && starts_with(name_of(model), "models--"))
        {
            return model;
        }
    }
    return "";
}

bool is_within(std::string_view path, std::string_view folder)
{
    if (folder == "/") // all paths without links are
    {
        return true;
    }
    return path == folder || (path.size() > folder.size() && path[folder.size()] == '/' && starts_with(path, folder));
}

} // namespace

bool join_path(std::string_view folder, std::string_view name, Text& path)
{
    path.clear();
    return path.append(folder) && path.append("/") && path.append(name);
}

Status find_place(std::string_view folder, std::string_view name, Place& place, Error& error)
{
    Text given;
    Text root;
    QWEN_AOT_NEED(given.assign(folder), error, "a path");
    QWEN_AOT_TRY(system::real_path(given.c_str(), root, error));
    QWEN_AOT_NEED(join_path(folder, name, given), error, "a path");
    QWEN_AOT_TRY(system::real_path(given.c_str(), place.path, error));
    std::string_view const found = place.path.view();
    place.is_blob = false;
    if (is_within(found, root.view()))
    {
        return Status::ok;
    }
    std::string_view const model = model_of(root.view());
    std::string_view const parent = parent_of(found);
    place.is_blob = !model.empty() && parent_of(parent) == model && name_of(parent) == "blobs";
    if (place.is_blob)
    {
        return Status::ok;
    }
    return error.fail(Status::bundle,
        "%.*s is a link to %.*s, outside the bundle; a bundle is self-contained (of a hub's snapshot, links may lead "
        "to the "
        "same model's blobs): copy the files themselves into it (cp -rL), or rebuild",
        kShownPath, given.c_str(), kShownPath, found.data());
}

} // namespace qwen_aot
