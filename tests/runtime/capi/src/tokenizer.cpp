/** Encodes, detokenizes and damages compiled tokenizers. Arguments: their files, which requests name by their place. */
#include "answers.h"

#include "hex.h"

#include "base/crc32.h"
#include "text/normalizer.h"
#include "text/splitter.h"
#include "text/tokenizer.h"

#include <cstring>
#include <ctime>
#include <random>
#include <vector>

using namespace qwen_aot;

namespace
{

constexpr int64_t kVocabSize = 1 << 20;

struct Opened
{
    std::vector<uint8_t> bytes;
    Tokenizer tokenizer;
};

std::vector<uint8_t> read_file(char const* path)
{
    std::vector<uint8_t> bytes;
    std::FILE* const file = std::fopen(path, "rb");
    if (file == nullptr)
    {
        std::perror(path);
        std::exit(1);
    }
    uint8_t block[1 << 16];
    for (size_t count = 0; (count = std::fread(block, 1, sizeof block, file)) != 0;)
    {
        bytes.insert(bytes.end(), block, block + count);
    }
    std::fclose(file);
    return bytes;
}

Span<uint8_t const> view(std::vector<uint8_t> const& bytes)
{
    return {bytes.data(), bytes.size()};
}

JsonValue member(JsonValue value, char const* key)
{
    JsonValue found;
    if (!value.find(key, found))
    {
        std::fprintf(stderr, "a request has no %s\n", key);
        std::exit(1);
    }
    return found;
}

std::vector<int32_t> numbers(JsonValue list)
{
    std::vector<int32_t> found;
    for (size_t i = 0; i < list.size(); ++i)
    {
        found.push_back(static_cast<int32_t>(list.at(i).integer()));
    }
    return found;
}

/** "hex" holds bytes that are no JSON text. */
std::string text_of(JsonValue request)
{
    JsonValue found;
    if (request.find("text", found))
    {
        return std::string(found.string());
    }
    return answers::bytes_of_hex(member(request, "hex").string());
}

double cpu_seconds()
{
    timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

std::string encode(Tokenizer const& tokenizer, JsonValue request)
{
    std::string const text = text_of(request);
    Array<int32_t> ids;
    Error error;
    JsonValue named;
    Status status;
    if (request.find("without", named))
    {
        std::vector<int32_t> const control = numbers(named);
        status = tokenizer.encode_without(text, {control.data(), control.size()}, ids, error);
    }
    else
    {
        status = tokenizer.encode(text, member(request, "allow").boolean(), ids, error);
    }
    return status == Status::ok ? answers::listed(ids) : answers::failed(error);
}

/** The text of each token and of the end. */
std::string detokenize(Tokenizer const& tokenizer, JsonValue request)
{
    Detokenizer detokenizer(&tokenizer);
    std::string pieces;
    Error error;
    for (int32_t const id : numbers(member(request, "ids")))
    {
        Text piece;
        if (detokenizer.push(id, piece, error) != Status::ok)
        {
            return answers::failed(error);
        }
        pieces += answers::quoted(piece.view()) + ", ";
    }
    Text rest;
    if (detokenizer.flush(rest, error) != Status::ok)
    {
        return answers::failed(error);
    }
    return "[" + pieces + answers::quoted(rest.view()) + "]";
}

/** Added tokens of a text, each [start, end, id]. */
std::string find_added(Tokenizer const& tokenizer, JsonValue request)
{
    std::string const text = text_of(request);
    std::string found;
    AddedMatch match;
    for (size_t from = 0; tokenizer.find_added(text, from, match); from = match.end)
    {
        found += (found.empty() ? "[" : ", [") + std::to_string(match.start) + ", " + std::to_string(match.end) + ", "
            + std::to_string(match.id) + "]";
    }
    return "[" + found + "]";
}

/** The words of a text in normal form, added tokens not looked for. */
std::string words(std::vector<uint8_t> const& bytes, JsonValue request)
{
    std::string const text = text_of(request);
    QtokTable table;
    Error error;
    if (QtokTable::open(view(bytes), kVocabSize, table, error) != Status::ok)
    {
        return answers::failed(error);
    }
    Normalizer normalizer(&table);
    std::string_view composed = text;
    if (table.is_nfc() && normalizer.compose(text, composed, error) != Status::ok)
    {
        return answers::failed(error);
    }
    std::string found;
    std::string_view word;
    for (Splitter splitter(&table, composed); splitter.next(word);)
    {
        found += (found.empty() ? "" : ", ") + answers::quoted(word);
    }
    return "[" + found + "]";
}

std::string facts(Tokenizer const& tokenizer, JsonValue request)
{
    std::string const text = text_of(request);
    return "[" + std::to_string(tokenizer.added_id(text)) + ", " + std::to_string(tokenizer.special_id(text)) + "]";
}

std::string open(JsonValue request)
{
    std::vector<uint8_t> const bytes = read_file(std::string(member(request, "path").string()).c_str());
    Tokenizer tokenizer;
    Error error;
    Status status = Tokenizer::open(view(bytes), member(request, "vocab_size").integer(), tokenizer, error);
    JsonValue asked;
    if (status == Status::ok && request.find("piece", asked)) // how many bytes an id stands for
    {
        std::string_view piece;
        (void)tokenizer.piece(static_cast<int32_t>(asked.integer()), piece);
        return std::to_string(piece.size());
    }
    if (status == Status::ok && request.find("text", asked))
    {
        Array<int32_t> ids;
        status = tokenizer.encode(asked.string(), false, ids, error);
    }
    return status == Status::ok ? answers::listed(tokenizer.special_ids()) : answers::failed(error);
}

/** A copy of exactly so many bytes, so that a sanitizer sees what is read behind it. */
class Exact
{
public:
    Exact(uint8_t const* bytes, size_t size)
        : bytes_(new uint8_t[size])
        , size_(size)
    {
        std::memcpy(bytes_, bytes, size);
    }
    Exact(Exact const&) = delete;
    Exact& operator=(Exact const&) = delete;
    ~Exact() { delete[] bytes_; }
    uint8_t* data() { return bytes_; }
    Span<uint8_t const> view() const { return {bytes_, size_}; }

private:
    uint8_t* bytes_;
    size_t size_;
};

/** Flips each bit, or each of every `step`, and cuts at each `step`-th byte: [opened, refused with another status]. */
std::string damage(std::vector<uint8_t> const& bytes, JsonValue request)
{
    auto const step = static_cast<size_t>(member(request, "step").integer());
    size_t opened = 0;
    size_t others = 0;
    auto const look = [&](Span<uint8_t const> damaged) {
        Tokenizer tokenizer;
        Error error;
        Status const status = Tokenizer::open(damaged, kVocabSize, tokenizer, error);
        opened += status == Status::ok ? 1 : 0;
        others += status != Status::ok && (status != Status::bundle || error.message().empty()) ? 1 : 0;
    };
    Exact copy(bytes.data(), bytes.size());
    for (size_t bit = 0; bit < bytes.size() * 8; bit += step)
    {
        copy.data()[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
        look(copy.view());
        copy.data()[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
    }
    for (size_t size = 0; size < bytes.size(); size += step)
    {
        Exact const cut(bytes.data(), size);
        look(cut.view());
    }
    return "[" + std::to_string(opened) + ", " + std::to_string(others) + "]";
}

/** Changes numbers of the file, makes its checksum fit, and uses what opens: how many did, and how many didn't. */
std::string forge(std::vector<uint8_t> const& bytes, JsonValue request)
{
    std::mt19937_64 random(static_cast<uint64_t>(member(request, "seed").integer()));
    std::string const text = text_of(request);
    size_t opened = 0;
    size_t refused = 0;
    for (int64_t run = 0; run < member(request, "runs").integer(); ++run)
    {
        Exact copy(bytes.data(), bytes.size());
        size_t const changes = 1 + random() % 4;
        for (size_t i = 0; i < changes; ++i)
        {
            // Half of them in the header and the directory, which decide where all else is.
            size_t const limit = random() % 2 == 0 ? 272 : bytes.size();
            size_t const place = 24 + random() % (limit - 32) / 4 * 4;
            uint32_t const values[] = {0, 1, 0xFFFFFFFFU, 0x80000000U, static_cast<uint32_t>(random()),
                static_cast<uint32_t>(random() % 400), static_cast<uint32_t>(bytes.size())};
            uint32_t const value = values[random() % (sizeof values / sizeof *values)];
            std::memcpy(copy.data() + place, &value, sizeof value);
        }
        uint32_t const checksum = crc32(copy.view().sub(16, bytes.size() - 16));
        std::memcpy(copy.data() + 12, &checksum, sizeof checksum);
        Tokenizer tokenizer;
        Error error;
        if (Tokenizer::open(copy.view(), kVocabSize, tokenizer, error) != Status::ok)
        {
            ++refused;
            continue;
        }
        ++opened;
        Array<int32_t> ids;
        Text decoded;
        Detokenizer detokenizer(&tokenizer);
        bool is_sound = true;
        for (bool const allow_special_tokens : {true, false})
        {
            Status const status = tokenizer.encode(text, allow_special_tokens, ids, error);
            is_sound = is_sound && (status == Status::ok || status == Status::bundle); // too much made of a character
        }
        for (size_t i = 0; i < ids.size(); ++i)
        {
            is_sound = is_sound && ids[i] >= 0 && ids[i] < kVocabSize
                && detokenizer.push(ids[i], decoded, error) == Status::ok;
        }
        if (!is_sound)
        {
            return answers::failed(error);
        }
    }
    return "[" + std::to_string(opened) + ", " + std::to_string(refused) + "]";
}

/** CPU seconds: of opening, the least of five; of encoding a text so many times over. */
std::string measure(std::vector<uint8_t> const& bytes, JsonValue request)
{
    std::string const text = text_of(request);
    double opening = 1e9;
    Tokenizer tokenizer;
    Error error;
    for (int run = 0; run < 5; ++run)
    {
        double const start = cpu_seconds();
        if (Tokenizer::open(view(bytes), kVocabSize, tokenizer, error) != Status::ok)
        {
            return answers::failed(error);
        }
        opening = std::min(opening, cpu_seconds() - start);
    }
    double encoding = 1e9;
    size_t count = 0;
    for (int64_t run = 0; run < member(request, "runs").integer(); ++run)
    {
        Array<int32_t> ids;
        double const start = cpu_seconds();
        if (tokenizer.encode(text, true, ids, error) != Status::ok)
        {
            return answers::failed(error);
        }
        encoding = std::min(encoding, cpu_seconds() - start);
        count = ids.size();
    }
    return "[" + std::to_string(opening) + ", " + std::to_string(encoding) + ", " + std::to_string(count) + "]";
}

std::string checksums(JsonValue request)
{
    std::string const bytes = text_of(request);
    Exact const copy(reinterpret_cast<uint8_t const*>(bytes.data()), bytes.size());
    return "[" + std::to_string(crc32(copy.view())) + ", " + std::to_string(crc32_portable(copy.view())) + "]";
}

} // namespace

int main(int count, char** arguments)
{
    std::vector<Opened> tables(static_cast<size_t>(count - 1));
    for (size_t i = 0; i < tables.size(); ++i)
    {
        Error error;
        tables[i].bytes = read_file(arguments[i + 1]);
        if (Tokenizer::open(view(tables[i].bytes), kVocabSize, tables[i].tokenizer, error) != Status::ok)
        {
            std::fprintf(stderr, "%s: %s\n", arguments[i + 1], error.message().data());
            return 1;
        }
    }
    return answers::serve([&](JsonValue request) -> std::string {
        std::string_view const what = member(request, "do").string();
        if (what == "open")
        {
            return open(request);
        }
        if (what == "checksums")
        {
            return checksums(request);
        }
        Opened const& table = tables[static_cast<size_t>(member(request, "table").integer())];
        return what == "encode"    ? encode(table.tokenizer, request)
            : what == "detokenize" ? detokenize(table.tokenizer, request)
            : what == "find_added" ? find_added(table.tokenizer, request)
            : what == "facts"      ? facts(table.tokenizer, request)
            : what == "damage"     ? damage(table.bytes, request)
            : what == "forge"      ? forge(table.bytes, request)
            : what == "words"      ? words(table.bytes, request)
            : what == "measure"    ? measure(table.bytes, request)
                                   : "null";
    });
}
