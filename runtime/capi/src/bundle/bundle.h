/** A bundle's folder, checked: every file that the manifest lists is there, whole, and where it may lie. */
#pragma once

#include "base/log.h"
#include "base/status.h"
#include "base/text.h"
#include "bundle/manifest.h"
#include "system/system.h"

#include <cstdint>
#include <string_view>

namespace qwen_aot
{

class Bundle
{
public:
    /** hash_limit: files of more bytes are checked by size alone (not those in a hub's blobs).
     *  IO, BUNDLE: the message names the file and what to do. */
    static Status open(std::string_view path, uint64_t hash_limit, Bundle& bundle, Error& error);

    /** What its manifest says; the text engine is that of own kernels once they are used. */
    Manifest const& manifest() const { return manifest_; }
    /** Makes the graph for own kernels, which there must be, the text engine's. While nothing else uses the manifest. */
    void use_kernels() { manifest_.text_engine.use_kernels(); }
    /** The folder as it was given. */
    std::string_view path() const { return path_.view(); }
    bool has(std::string_view name) const { return manifest_.find_file(name) != nullptr; }
    /** Where a listed file lies, links followed. */
    Status locate(std::string_view name, Text& path, Error& error) const;
    /** Reads a listed file of at most 64 MiB; the bytes that come out are the ones that were hashed. */
    Status read(std::string_view name, Array<uint8_t>& bytes, Error& error) const;
    /** Maps a listed file, and compares its hash where the limit asks for it. */
    Status map(std::string_view name, system::MappedFile& file, Error& error) const;

private:
    Status find(std::string_view name, FileEntry const*& entry, Error& error) const;

    Text path_;
    uint64_t hash_limit_ = 0;
    Manifest manifest_{};
};

} // namespace qwen_aot
