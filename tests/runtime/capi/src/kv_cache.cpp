/** Makes KV caches in checked memory, and does with the last one what each request says. */
#include "checked_memory.h"
#include "requests.h"

#include "engine/kv_cache.h"

#include <memory>

namespace
{

using qwen_aot::JsonValue;
using qwen_aot::Status;

struct Held
{
    explicit Held(JsonValue request)
        : manifest(requests::manifest(request))
        , checked(requests::get(request, "is_lazy").boolean())
        , cache(std::make_unique<qwen_aot::KvCache>(
              requests::get(request, "is_host").boolean() ? static_cast<qwen_aot::Memory&>(host) : checked))
    {
    }

    qwen_aot::Manifest manifest;
    qwen_aot::HostMemory host;
    CheckedMemory checked;
    std::unique_ptr<qwen_aot::KvCache> cache; // goes first
};

std::unique_ptr<Held> held;
std::string warning; // the last one

void take_log(void*, qwen_aot_log_level level, char const* message, size_t length)
{
    warning = level == QWEN_AOT_LOG_WARNING ? std::string(message, length) : "not a warning";
}

/** The memory of an array's rows. */
uint8_t* bytes_of(size_t array)
{
    return reinterpret_cast<uint8_t*>(held->cache->row_address(array, 0));
}

/** Resident bytes of this process. */
int64_t resident()
{
    FILE* const file = std::fopen("/proc/self/statm", "re");
    long total = 0;
    long pages = 0;
    int const read = std::fscanf(file, "%ld %ld", &total, &pages);
    std::fclose(file);
    return read == 2 ? pages * 4096 : -1;
}

/** What there is to see of the cache. */
std::string seen()
{
    qwen_aot::KvCache& cache = *held->cache;
    std::vector<int64_t> lengths(cache.lengths(), cache.lengths() + held->manifest.max_batch);
    std::vector<uint64_t> addresses;
    std::vector<size_t> row_bytes;
    for (size_t i = 0; i < cache.size(); ++i)
    {
        addresses.push_back(cache.row_address(i, 0));
        row_bytes.push_back(cache.row_bytes(i));
    }
    return "{\"status\": 0, \"capacity\": " + std::to_string(cache.capacity())
        + ", \"bytes\": " + std::to_string(cache.bytes()) + ", \"lengths\": " + answers::listed(lengths)
        + ", \"addresses\": " + answers::listed(addresses) + ", \"row_bytes\": " + answers::listed(row_bytes)
        + ", \"resident\": " + std::to_string(resident()) + ", \"warning\": \"" + warning + "\"}";
}

std::string answer(JsonValue request)
{
    using requests::integer;
    std::string_view const action = requests::get(request, "do").string();
    qwen_aot::Error error;
    Status status = Status::ok;
    if (action == "open")
    {
        held = std::make_unique<Held>(request);
        warning.clear();
        if (requests::has(request, "limit"))
        {
            held->checked.limit = static_cast<size_t>(integer(request, "limit"));
        }
        status = held->cache->open(
            held->manifest, integer(request, "max_capacity"), qwen_aot::Log(take_log, nullptr), error);
    }
    else if (action == "reserve")
    {
        status = held->cache->reserve(integer(request, "tokens"), error);
    }
    else if (action == "scrub")
    {
        status = held->cache->scrub(static_cast<int32_t>(integer(request, "row")), integer(request, "end"), error);
    }
    else if (action == "copy_row")
    {
        status = held->cache->copy_row(static_cast<int32_t>(integer(request, "row")),
            static_cast<int32_t>(integer(request, "target")), integer(request, "length"), error);
    }
    else if (action == "set_length")
    {
        held->cache->lengths()[integer(request, "row")] = integer(request, "length");
    }
    else if (action == "fail_after")
    {
        held->checked.calls_until_failure = integer(request, "calls");
    }
    else if (action == "fill") // bytes of a place: a number of its row, head, slot and byte
    {
        for (size_t i = 0; i < held->cache->size(); ++i)
        {
            size_t const bytes = held->cache->row_bytes(i) * static_cast<size_t>(held->manifest.max_batch);
            for (size_t k = 0; k < bytes; ++k)
            {
                bytes_of(i)[k] = static_cast<uint8_t>((k * 2654435761u + i) >> 7);
            }
        }
    }
    else if (action == "touch") // some bytes of a row, so that their pages are taken
    {
        for (size_t i = 0; i < held->cache->size(); ++i)
        {
            std::memset(
                reinterpret_cast<uint8_t*>(held->cache->row_address(i, static_cast<int32_t>(integer(request, "row")))),
                7, static_cast<size_t>(integer(request, "bytes")));
        }
    }
    else if (action == "content")
    {
        std::string result = "{\"status\": 0, \"arrays\": [";
        char digits[3];
        for (size_t i = 0; i < held->cache->size(); ++i)
        {
            result += i == 0 ? "\"" : ", \"";
            size_t const bytes = held->cache->row_bytes(i) * static_cast<size_t>(held->manifest.max_batch);
            for (size_t k = 0; k < bytes; ++k)
            {
                std::snprintf(digits, sizeof digits, "%02x", bytes_of(i)[k]);
                result += digits;
            }
            result += "\"";
        }
        return result + "]}";
    }
    else
    {
        std::exit(1);
    }
    return status == Status::ok ? seen() : answers::failed(error);
}

} // namespace

int main()
{
    int const result = answers::serve(answer);
    held.reset();
    return result;
}
