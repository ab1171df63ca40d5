/** Drives a fuzzer (LLVMFuzzerTestOneInput) where clang's libFuzzer is missing: gives it a corpus, then mutants of it.
 *
 *      FUZZER RUNS SEED FILE...
 *
 *  A run's input depends on the corpus, the seed and the run's number alone. At a crash the number and the input are
 *  printed. */

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(uint8_t const* data, size_t size);
extern "C" [[gnu::weak]] void __sanitizer_set_death_callback(void (*callback)());

namespace
{

using Bytes = std::vector<uint8_t>;

Bytes input; // of the run at work
uint64_t run = 0;

void tell_run()
{
    std::fprintf(
        stderr, "\nfailed in run %llu, input of %zu bytes: ", static_cast<unsigned long long>(run), input.size());
    for (size_t i = 0; i < std::min<size_t>(input.size(), 20000); ++i)
    {
        std::fprintf(stderr, "%02x", input[i]);
    }
    std::fprintf(stderr, "\n");
}

void on_signal(int number)
{
    tell_run();
    std::signal(number, SIG_DFL);
    std::raise(number);
}

class Mutator
{
public:
    Mutator(std::vector<Bytes> const& corpus, uint64_t seed)
        : corpus_(corpus)
        , state_(seed)
    {
    }

    Bytes next()
    {
        Bytes bytes = pick();
        size_t const count = size_t{1} << below(4);
        for (size_t i = 0; i < count; ++i)
        {
            mutate(bytes);
        }
        return bytes;
    }

private:
    /** SplitMix64 (Steele, Lea and Flood, 2014). */
    uint64_t random()
    {
        uint64_t mixed = state_ += 0x9E3779B97F4A7C15u;
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9u;
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EBu;
        return mixed ^ mixed >> 31;
    }
    size_t below(size_t limit) { return static_cast<size_t>(random() % limit); }
    Bytes const& pick() { return corpus_[below(corpus_.size())]; }
    size_t place(Bytes const& bytes) { return below(bytes.size() + 1); }

    void mutate(Bytes& bytes)
    {
        size_t const at = place(bytes);
        size_t const left = bytes.size() - at;
        auto const begin = bytes.begin() + static_cast<std::ptrdiff_t>(at);
        switch (below(8))
        {
        case 0: // a bit
            if (left > 0)
            {
                bytes[at] ^= static_cast<uint8_t>(1u << below(8));
            }
            break;
        case 1: // a byte
            if (left > 0)
            {
                bytes[at] = static_cast<uint8_t>(random());
            }
            break;
        case 2: // cut
            if (below(4) == 0)
            {
                bytes.resize(at);
            }
            break;
        case 3: // some bytes out
            bytes.erase(begin, begin + static_cast<std::ptrdiff_t>(below(std::min<size_t>(left, 16) + 1)));
            break;
        case 4: // a part of another input in
        {
            Bytes const other = pick();
            size_t const start = place(other);
            size_t const length = below(std::min<size_t>(other.size() - start, 64) + 1);
            auto const first = other.begin() + static_cast<std::ptrdiff_t>(start);
            bytes.insert(begin, first, first + static_cast<std::ptrdiff_t>(length));
            break;
        }
        case 5: // the end of another input
        {
            Bytes const other = pick();
            bytes.resize(at);
            bytes.insert(bytes.end(), other.begin() + static_cast<std::ptrdiff_t>(place(other)), other.end());
            break;
        }
        case 6: // a number of 1 to 8 bytes that is at some limit
        {
            static constexpr uint64_t kNumbers[] = {0, 1, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF,
                0x80000000, 0xFFFFFFFF, 0x100000000, 0x7FFFFFFFFFFFFFFF, 0x8000000000000000, 0xFFFFFFFFFFFFFFFF};
            uint64_t const number = kNumbers[below(std::size(kNumbers))];
            size_t const length = size_t{1} << below(4);
            for (size_t i = 0; i < std::min(left, length); ++i)
            {
                bytes[at + i] = static_cast<uint8_t>(number >> 8 * i);
            }
            break;
        }
        default: // digits and marks that texts have
        {
            static constexpr char const* kTexts[] = {"0", "-1", "1", "2147483648", "9223372036854775808", "1e999", "\"",
                "\\", "\\u0000", "\\ud83d", "{", "}", "[", "]", ",", ":", "null", "true",
                "\"\":", "{\"a\":", "[[[[[[[["};
            char const* const text = kTexts[below(std::size(kTexts))];
            bytes.insert(begin, text, text + std::strlen(text));
        }
        }
    }

    std::vector<Bytes> const& corpus_;
    uint64_t state_;
};

Bytes read(char const* path)
{
    Bytes bytes;
    FILE* const file = std::fopen(path, "rb");
    if (file == nullptr)
    {
        std::perror(path);
        std::exit(2);
    }
    for (int byte = std::getc(file); byte != EOF; byte = std::getc(file))
    {
        bytes.push_back(static_cast<uint8_t>(byte));
    }
    std::fclose(file);
    return bytes;
}

} // namespace

int main(int argc, char** argv)
{
    if (argc < 4)
    {
        std::fprintf(stderr, "usage: %s RUNS SEED FILE...\n", argv[0]);
        return 2;
    }
    for (int const number : {SIGSEGV, SIGABRT, SIGBUS, SIGILL, SIGFPE, SIGTRAP})
    {
        if (__sanitizer_set_death_callback == nullptr)
        {
            std::signal(number, on_signal);
        }
    }
    if (__sanitizer_set_death_callback != nullptr)
    {
        __sanitizer_set_death_callback(tell_run);
    }
    std::vector<Bytes> corpus;
    for (int i = 3; i < argc; ++i)
    {
        corpus.push_back(read(argv[i]));
    }
    uint64_t const runs = std::strtoull(argv[1], nullptr, 10);
    uint64_t const seed = std::strtoull(argv[2], nullptr, 10);
    for (; run < corpus.size() + runs; ++run)
    {
        input = run < corpus.size() ? corpus[run] : Mutator(corpus, seed << 40 ^ run).next();
        LLVMFuzzerTestOneInput(input.data(), input.size());
    }
    std::printf("%llu runs\n", static_cast<unsigned long long>(run));
    return 0;
}
