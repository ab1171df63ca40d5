/** Hashes pieces of bytes, given as hex: with the CPU's instructions and without. */
#include "bundle/sha256.h"
#include "answers.h"
#include "hex.h"

#include <chrono>

namespace
{

using qwen_aot::JsonValue;
using qwen_aot::Sha256;

std::string hashed(Sha256 hash, JsonValue pieces)
{
    for (size_t i = 0; i < pieces.size(); ++i)
    {
        std::string const bytes = answers::bytes_of_hex(pieces.at(i).string());
        hash.update({reinterpret_cast<uint8_t const*>(bytes.data()), bytes.size()});
    }
    uint8_t digest[Sha256::kBytes];
    hash.finish(digest);
    return answers::quoted(qwen_aot::Sha256Text(digest).c_str());
}

/** Seconds for some megabytes. */
double seconds_of(Sha256::Compress compress, int64_t megabytes)
{
    std::string const block(1 << 20, 'x');
    auto const start = std::chrono::steady_clock::now();
    Sha256 hash(compress);
    for (int64_t i = 0; i < megabytes; ++i)
    {
        hash.update({reinterpret_cast<uint8_t const*>(block.data()), block.size()});
    }
    uint8_t digest[Sha256::kBytes];
    hash.finish(digest);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

} // namespace

int main()
{
    return answers::serve([](JsonValue request) -> std::string {
        JsonValue value;
        if (request.find("megabytes", value))
        {
            auto const accelerated = Sha256::accelerated();
            return "{\"accelerated\": "
                + (accelerated == nullptr ? "null" : std::to_string(seconds_of(accelerated, value.integer())))
                + ", \"portable\": " + std::to_string(seconds_of(Sha256::portable(), value.integer())) + "}";
        }
        if (request.find("parse", value))
        {
            uint8_t digest[Sha256::kBytes];
            bool const is_digest = qwen_aot::parse_sha256(value.string(), digest);
            return is_digest ? answers::quoted(qwen_aot::Sha256Text(digest).c_str()) : "null";
        }
        if (request.find("zeros", value)) // so many bytes
        {
            std::string const part(1000003, '\0');
            Sha256 hash;
            auto left = static_cast<uint64_t>(value.integer());
            for (size_t count = part.size(); left > 0; left -= count)
            {
                count = left < count ? static_cast<size_t>(left) : count;
                hash.update({reinterpret_cast<uint8_t const*>(part.data()), count});
            }
            uint8_t digest[Sha256::kBytes];
            hash.finish(digest);
            return answers::quoted(qwen_aot::Sha256Text(digest).c_str());
        }
        request.find("pieces", value);
        auto const accelerated = Sha256::accelerated();
        return "{\"default\": " + hashed(Sha256(), value)
            + ", \"portable\": " + hashed(Sha256(Sha256::portable()), value)
            + ", \"accelerated\": " + (accelerated == nullptr ? "null" : hashed(Sha256(accelerated), value)) + "}";
    });
}
