/** Where a bundle's files may lie: in its folder, or, of a hub's snapshot, in the same model's blobs (docs/bundle.md,
 *  "Files"; runtime/bundle/places.py). */
#pragma once

#include "base/status.h"
#include "base/text.h"

#include <string_view>

namespace qwen_aot
{

/** What a name in a bundle's folder leads to. */
struct Place
{
    Text path;    // without any link
    bool is_blob; // it lies in a hub's blobs and not in the folder: size and hash must always be checked
};

/** Follows a name to its end, wherever the links between lead.
 *  name: may hold no NUL and no "..".
 *  BUNDLE: the end is neither in the folder nor where a snapshot's files may be.
 *  IO: the name leads nowhere, or can't be followed. */
Status find_place(std::string_view folder, std::string_view name, Place& place, Error& error);

/** "folder/name" */
[[nodiscard]] bool join_path(std::string_view folder, std::string_view name, Text& path);

/** The most bytes of a path in a message: `%.*s`. */
constexpr int kShownPath = 512;

} // namespace qwen_aot
