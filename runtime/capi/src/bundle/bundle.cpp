#include "bundle/bundle.h"

#include "bundle/file_name.h"
#include "bundle/onnx_file.h"
#include "bundle/places.h"
#include "bundle/sha256.h"

#include <algorithm>
#include <cinttypes>

namespace qwen_aot
{

namespace
{

constexpr uint64_t kMaxManifest = 16u << 20; // one of 110B's 80 layers with an int8 cache takes 0.1 MB
constexpr uint64_t kMaxRead = 64u << 20;

constexpr char kRemedy[] = "copy it again, or delete the bundle and build it anew";

std::string_view text_of(Span<uint8_t const> bytes)
{
    return {reinterpret_cast<char const*>(bytes.data()), bytes.size()};
}

/** Says what the path is instead, where that can be told. */
Status not_a_bundle(std::string_view folder, Error& error)
{
    constexpr char kBuild[] = "a bundle is made from it with `qwen-aot build-engine CHECKPOINT -o BUNDLE`";
    Text path;
    QWEN_AOT_NEED(path.assign(folder), error, "a path");
    system::FileFacts const facts = system::file_facts(path.c_str());
    QWEN_AOT_NEED(join_path(folder, "config.json", path), error, "a path");
    int const size = static_cast<int>(std::min<size_t>(folder.size(), kShownPath));
    if (!facts.exists)
    {
        return error.fail(Status::io,
            "%.*s doesn't exist, or can't be looked at; accepted: a bundle's folder, as `qwen-aot "
            "build-engine` writes it",
            size, folder.data());
    }
    if (suffix_of(folder) == ".gguf" || system::file_facts(path.c_str()).is_regular)
    {
        return error.fail(Status::bundle, "%.*s is a checkpoint, not a bundle: %s", size, folder.data(), kBuild);
    }
    if (!facts.is_folder)
    {
        return error.fail(Status::bundle, "%.*s is a file; accepted: a bundle's folder", size, folder.data());
    }
    return error.fail(Status::bundle, "%.*s has no %s: it is not a bundle, or its build did not end; %s", size,
        folder.data(), kManifestName, kBuild);
}

/** A file that is to be compared with its entry. */
class Entry
{
public:
    /** path: as messages name it. */
    Entry(char const* path, FileEntry const& entry, Error& error)
        : path_(path)
        , entry_(entry)
        , error_(error)
    {
    }

    Status check_size(uint64_t size) const
    {
        auto const expected = static_cast<uint64_t>(entry_.bytes);
        if (size == expected)
        {
            return Status::ok;
        }
        return error_.fail(Status::bundle, "%.*s is %s: %" PRIu64 " bytes, %s says %" PRIu64 "; %s", kShownPath, path_,
            size < expected ? "truncated" : "too long", size, kManifestName, expected, kRemedy);
    }

    Status check_hash(Span<uint8_t const> content) const
    {
        uint8_t digest[Sha256::kBytes];
        Sha256::digest(content, digest);
        return check_digest(digest);
    }

    /** Reads the file: a disk that fails is a status, and would be a signal where it is mapped. */
    Status check_content(char const* place) const
    {
        constexpr uint64_t kPart = uint64_t{1} << 18;
        system::FileReader file;
        Array<uint8_t> part;
        Sha256 hash;
        uint8_t digest[Sha256::kBytes];
        QWEN_AOT_TRY(file.open(place, error_));
        QWEN_AOT_NEED(part.resize(static_cast<size_t>(std::min(kPart, file.size() + 1))), error_, "a part of a file");
        for (size_t count = part.size(); count == part.size();)
        {
            QWEN_AOT_TRY(file.read(part.data(), part.size(), count, error_));
            hash.update({part.data(), count});
        }
        hash.finish(digest);
        return check_digest(digest);
    }

private:
    Status check_digest(uint8_t const (&digest)[Sha256::kBytes]) const
    {
        if (std::memcmp(digest, entry_.sha256, sizeof digest) == 0)
        {
            return Status::ok;
        }
        return error_.fail(Status::bundle, "%.*s is damaged or was changed: its SHA-256 is %s, %s says %s; %s",
            kShownPath, path_, Sha256Text(digest).c_str(), kManifestName, Sha256Text(entry_.sha256).c_str(), kRemedy);
    }

    char const* path_;
    FileEntry const& entry_;
    Error& error_;
};

Status read_manifest(std::string_view folder, Manifest& manifest, Error& error)
{
    Text path;
    Place place{};
    QWEN_AOT_NEED(join_path(folder, kManifestName, path), error, "a path");
    if (!system::file_facts(path.c_str()).is_regular)
    {
        return not_a_bundle(folder, error);
    }
    QWEN_AOT_TRY(find_place(folder, kManifestName, place, error));
    if (system::file_facts(place.path.c_str()).size > kMaxManifest)
    {
        return error.fail(Status::bundle, "%.*s has more than %" PRIu64 " bytes, which no build writes: %s", kShownPath,
            path.c_str(), kMaxManifest, kRemedy);
    }
    Array<uint8_t> content;
    QWEN_AOT_TRY(system::read_file(place.path.c_str(), kMaxManifest, content, error));
    Status const status = Manifest::parse(text_of({content.data(), content.size()}), manifest, error);
    return status == Status::bundle ? error.inside(folder) : status;
}

/** A file is there, where it may lie, and as the manifest says.
 *  hash_limit: of more bytes, its size is enough, unless it lies in a hub's blobs. */
Status check_file(std::string_view folder, FileEntry const& entry, uint64_t hash_limit, Error& error)
{
    Text path;
    Place place{};
    QWEN_AOT_NEED(join_path(folder, entry.name.view(), path), error, "a path");
    system::FileFacts const facts = system::file_facts(path.c_str());
    if (facts.exists || facts.is_link)
    {
        QWEN_AOT_TRY(find_place(folder, entry.name.view(), place, error));
    }
    if (!facts.is_regular)
    {
        return error.fail(facts.exists ? Status::bundle : Status::io,
            "%.*s is missing or not a file, though %s lists it: copy the whole folder, or rebuild", kShownPath,
            path.c_str(), kManifestName);
    }
    Entry const check(path.c_str(), entry, error);
    QWEN_AOT_TRY(check.check_size(facts.size));
    if (facts.size > hash_limit && !place.is_blob)
    {
        return Status::ok;
    }
    return check.check_content(place.path.c_str());
}

/** The name relative to the bundle's folder of what a graph calls `location`: beside the graph, as pathlib joins it. Empty
 *  where it can't be a listed file's. */
Status resolve_location(std::string_view graph, std::string_view location, Text& name, Error& error)
{
    name.clear();
    size_t const slash = graph.rfind('/');
    if (!location.empty() && location[0] == '/')
    {
        return Status::ok; // an absolute path
    }
    if (slash != std::string_view::npos)
    {
        QWEN_AOT_NEED(name.append({graph.data(), slash}), error, "a path");
    }
    size_t start = 0;
    for (size_t at = 0; at <= location.size(); ++at)
    {
        if (at < location.size() && location[at] != '/')
        {
            continue;
        }
        std::string_view const part(location.data() + start, at - start);
        start = at + 1;
        if (part.empty() || part == ".")
        {
            continue; // "a//b" and "./a" are "a/b" and "a"
        }
        QWEN_AOT_NEED((name.empty() || name.append("/")) && name.append(part), error, "a path");
    }
    return Status::ok;
}

/** A graph may read its weights from listed files only: whatever opens it follows the names in it. */
Status check_data_files(std::string_view folder, Manifest const& manifest, std::string_view graph, Error& error)
{
    Text path;
    Place place{};
    QWEN_AOT_NEED(join_path(folder, graph, path), error, "a path");
    QWEN_AOT_TRY(find_place(folder, graph, place, error));
    system::MappedFile file;
    Array<std::string_view> locations;
    QWEN_AOT_TRY(system::MappedFile::open(place.path.c_str(), file, error));
    QWEN_AOT_TRY(find_data_files(file.bytes(), path.c_str(), locations, error));
    Text name;
    for (size_t i = 0; i < locations.size(); ++i)
    {
        if (i > 0 && locations[i] == locations[i - 1])
        {
            continue; // a file has many tensors
        }
        QWEN_AOT_TRY(resolve_location(graph, locations[i], name, error));
        if (manifest.find_file(name.view()) == nullptr)
        {
            return error.fail(Status::bundle,
                "%.*s names the data file %s; accepted: a file that %s lists. Don't use this bundle unless you know "
                "where it "
                "comes from",
                kShownPath, path.c_str(), Quoted(locations[i]).c_str(), kManifestName);
        }
    }
    return Status::ok;
}

} // namespace

Status Bundle::open(std::string_view path, uint64_t hash_limit, Bundle& bundle, Error& error)
{
    Bundle opened;
    if (path.empty() || path.find('\0') != std::string_view::npos)
    {
        return error.fail(Status::invalid_argument, "the bundle's path is empty or holds a NUL; accepted: a folder");
    }
    QWEN_AOT_NEED(opened.path_.assign(path), error, "a path");
    opened.hash_limit_ = hash_limit;
    QWEN_AOT_TRY(read_manifest(path, opened.manifest_, error));
    for (FileEntry const& entry : opened.manifest_.files)
    {
        QWEN_AOT_TRY(check_file(path, entry, hash_limit, error));
    }
    TextEngine const& engine = opened.manifest_.text_engine; // nothing here opens the vision engine
    if (suffix_of(engine.file.view()) == ".onnx")
    {
        QWEN_AOT_TRY(check_data_files(path, opened.manifest_, engine.file.view(), error));
    }
    if (engine.has_kernels)
    {
        QWEN_AOT_TRY(check_data_files(path, opened.manifest_, engine.kernels.file.view(), error));
    }
    bundle = std::move(opened);
    return Status::ok;
}

Status Bundle::find(std::string_view name, FileEntry const*& entry, Error& error) const
{
    entry = manifest_.find_file(name);
    if (entry != nullptr)
    {
        return Status::ok;
    }
    return error.fail(
        Status::bundle, "the bundle %.*s has no file %s", kShownPath, path_.c_str(), Quoted(name).c_str());
}

Status Bundle::locate(std::string_view name, Text& path, Error& error) const
{
    FileEntry const* entry = nullptr;
    Place place{};
    QWEN_AOT_TRY(find(name, entry, error));
    QWEN_AOT_TRY(find_place(path_.view(), name, place, error));
    path = std::move(place.path);
    return Status::ok;
}

Status Bundle::read(std::string_view name, Array<uint8_t>& bytes, Error& error) const
{
    FileEntry const* entry = nullptr;
    Place place{};
    Text path;
    Array<uint8_t> content;
    QWEN_AOT_TRY(find(name, entry, error));
    QWEN_AOT_TRY(find_place(path_.view(), name, place, error));
    QWEN_AOT_NEED(join_path(path_.view(), name, path), error, "a path");
    QWEN_AOT_TRY(system::read_file(place.path.c_str(), kMaxRead, content, error));
    Entry const check(path.c_str(), *entry, error);
    QWEN_AOT_TRY(check.check_size(content.size()));
    QWEN_AOT_TRY(check.check_hash({content.data(), content.size()}));
    bytes = std::move(content);
    return Status::ok;
}

Status Bundle::map(std::string_view name, system::MappedFile& file, Error& error) const
{
    FileEntry const* entry = nullptr;
    Place place{};
    Text path;
    system::MappedFile mapped;
    QWEN_AOT_TRY(find(name, entry, error));
    QWEN_AOT_TRY(find_place(path_.view(), name, place, error));
    QWEN_AOT_NEED(join_path(path_.view(), name, path), error, "a path");
    QWEN_AOT_TRY(system::MappedFile::open(place.path.c_str(), mapped, error));
    Entry const check(path.c_str(), *entry, error);
    QWEN_AOT_TRY(check.check_size(mapped.bytes().size()));
    if (mapped.bytes().size() <= hash_limit_ || place.is_blob)
    {
        QWEN_AOT_TRY(check.check_hash(mapped.bytes()));
    }
    file = std::move(mapped);
    return Status::ok;
}

} // namespace qwen_aot
