/** A fuzzer's entry: any bytes as a compiled tokenizer, and any text through one that opens.
 *
 *  Input: a byte of choices, two bytes that say where the text begins, the file, the text. Choice 1 makes the file's
 *  checksum and size fit, so that what lies behind them is reached. */
#include "base/crc32.h"
#include "text/tokenizer.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

using namespace qwen_aot;

extern "C" int LLVMFuzzerTestOneInput(uint8_t const* input, size_t size)
{
    constexpr int64_t kVocabSize = 1 << 20;
    if (size < 3)
    {
        return 0;
    }
    uint8_t const choices = input[0];
    size_t const wanted = static_cast<size_t>(input[1] | input[2] << 8) * 8;
    size_t const length = wanted < size - 3 ? wanted : size - 3; // of the file
    auto* const file =
        static_cast<uint8_t*>(std::malloc(length != 0 ? length : 1)); // of its own, so that its end is seen
    if (file == nullptr)
    {
        return 0;
    }
    std::memcpy(file, input + 3, length);
    if ((choices & 1) != 0 && length >= 24)
    {
        uint64_t const stated = length;
        std::memcpy(file + 16, &stated, sizeof stated);
        uint32_t const checksum = crc32({file + 16, length - 16});
        std::memcpy(file + 12, &checksum, sizeof checksum);
    }
    Tokenizer tokenizer;
    Error error;
    if (Tokenizer::open({file, length}, kVocabSize, tokenizer, error) == Status::ok)
    {
        std::string_view const text(reinterpret_cast<char const*>(input) + 3 + length, size - 3 - length);
        Array<int32_t> ids;
        Status const status = tokenizer.encode(text, (choices & 2) != 0, ids, error);
        // (A table of normal forms that no text has is seen where it makes too much of one.)
        if (status != Status::ok && status != Status::invalid_argument && status != Status::bundle)
        {
            std::abort();
        }
        Text decoded;
        Detokenizer detokenizer(&tokenizer);
        for (int32_t const id : ids)
        {
            if (id < 0 || id >= kVocabSize || detokenizer.push(id, decoded, error) != Status::ok)
            {
                std::abort();
            }
        }
        if (detokenizer.flush(decoded, error) != Status::ok)
        {
            std::abort();
        }
        AddedMatch match;
        tokenizer.find_added(text, 0, match);
    }
    else if (error.message().empty() || error.status() != Status::bundle)
    {
        std::abort();
    }
    std::free(file);
    return 0;
}
