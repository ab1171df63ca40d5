#include "normalizer.h"

#include "text/characters.h"

namespace qwen_aot
{
namespace
{

// Hangul, which is composed by arithmetic: The Unicode Standard, 3.12.
constexpr uint32_t kSyllables = 0xAC00;
constexpr uint32_t kNumSyllables = 11172;
constexpr uint32_t kLeads = 0x1100;
constexpr uint32_t kNumLeads = 19;
constexpr uint32_t kVowels = 0x1161;
constexpr uint32_t kNumVowels = 21;
constexpr uint32_t kTails = 0x11A7; // one before the first: a syllable may have none
constexpr uint32_t kNumTails = 28;

constexpr size_t kFewMarks = 32; // that are sorted by insertion; more of them, by counting

} // namespace

Status Normalizer::compose(std::string_view text, std::string_view& composed, Error& error)
{
    // Only runs that begin with the character before one that matters, up to the next that doesn't, are looked at: what
    // doesn't matter stays as it is and never joins what stands before it.
    auto const* const bytes = reinterpret_cast<uint8_t const*>(text.data());
    composed_.clear();
    size_t copied = 0; // bytes of the text that are done
    size_t previous = 0;
    size_t i = 0;
    while (i < text.size())
    {
        size_t length = 1;
        if (bytes[i] < 0x80)
        {
            previous = i++;
            continue;
        }
        uint32_t code = decode_character(bytes + i, length);
        if ((table_->class_of(code) & kNormalized) == 0)
        {
            previous = i;
            i += length;
            continue;
        }
        run_.clear();
        size_t const start = previous < copied ? copied : previous;
        bool had_memory = composed_.append(bytes + copied, start - copied);
        for (size_t k = start; had_memory && k < i; k += length)
        {
            had_memory = decompose(decode_character(bytes + k, length));
        }
        while (had_memory && i < text.size())
        {
            code = decode_character(bytes + i, length);
            if ((table_->class_of(code) & kNormalized) == 0)
            {
                break;
            }
            had_memory = decompose(code);
            i += length;
        }
        had_memory = had_memory && sort_marks() && append_composed();
        QWEN_AOT_NEED(had_memory, error, "the normal form of a text");
        copied = i;
        previous = i;
    }
    if (copied == 0)
    {
        composed = text;
        return Status::ok;
    }
    QWEN_AOT_NEED(composed_.append(bytes + copied, text.size() - copied), error, "the normal form of a text");
    composed = {reinterpret_cast<char const*>(composed_.data()), composed_.size()};
    return Status::ok;
}

bool Normalizer::decompose(uint32_t code)
{
    if (code >= kSyllables && code < kSyllables + kNumSyllables)
    {
        uint32_t const index = code - kSyllables;
        uint32_t const tail = index % kNumTails;
        return run_.push({kLeads + index / (kNumVowels * kNumTails), 0})
            && run_.push({kVowels + index / kNumTails % kNumVowels, 0}) && (tail == 0 || run_.push({kTails + tail, 0}));
    }
    Span<uint8_t const> const parts = table_->decomposition(code);
    if (parts.empty())
    {
        return run_.push({code, order_of(code)});
    }
    for (size_t i = 0; i < parts.size(); i += 4)
    {
        uint32_t const part = load_u32(parts.data() + i);
        if (!run_.push({part, order_of(part)}))
        {
            return false;
        }
    }
    return true;
}

bool Normalizer::sort_marks()
{
    size_t start = 0;
    while (start < run_.size())
    {
        if (run_[start].order == 0)
        {
            ++start;
            continue;
        }
        size_t end = start;
        while (end < run_.size() && run_[end].order != 0)
        {
            ++end;
        }
        if (end - start <= kFewMarks)
        {
            for (size_t i = start + 1; i < end; ++i)
            {
                Character const mark = run_[i];
                size_t place = i;
                for (; place > start && run_[place - 1].order > mark.order; --place)
                {
                    run_[place] = run_[place - 1];
                }
                run_[place] = mark;
            }
        }
        else
        {
            size_t places[257] = {}; // of the first mark of each order
            for (size_t i = start; i < end; ++i)
            {
                ++places[run_[i].order + 1];
            }
            for (size_t order = 1; order < 257; ++order)
            {
                places[order] += places[order - 1];
            }
            if (!sorted_.resize(end - start))
            {
                return false;
            }
            for (size_t i = start; i < end; ++i)
            {
                sorted_[places[run_[i].order]++] = run_[i];
            }
            std::memcpy(static_cast<void*>(run_.data() + start), sorted_.data(), (end - start) * sizeof(Character));
        }
        start = end;
    }
    return true;
}

bool Normalizer::append_composed()
{
    // The Unicode Standard, 3.11, D117: a character joins the last starter unless something of its order or a higher one,
    // or another starter, stands between them.
    constexpr size_t kNone = static_cast<size_t>(-1);
    size_t size = 0; // of what is composed, at the front of the run
    size_t starter = kNone;
    uint32_t last = 0;
    for (size_t i = 0; i < run_.size(); ++i)
    {
        Character const character = run_[i];
        if (starter != kNone && (last < character.order || starter == size - 1))
        {
            if (uint32_t const code = joined(run_[starter].code, character.code); code != 0)
            {
                run_[starter].code = code;
                continue;
            }
        }
        if (character.order == 0)
        {
            starter = size;
        }
        last = character.order;
        run_[size++] = character;
    }
    for (size_t i = 0; i < size; ++i)
    {
        uint8_t bytes[4];
        if (!composed_.append(bytes, encode_character(run_[i].code, bytes)))
        {
            return false;
        }
    }
    return true;
}

uint32_t Normalizer::joined(uint32_t first, uint32_t second) const
{
    if (first >= kLeads && first < kLeads + kNumLeads && second >= kVowels && second < kVowels + kNumVowels)
    {
        return kSyllables + ((first - kLeads) * kNumVowels + second - kVowels) * kNumTails;
    }
    if (first >= kSyllables && first < kSyllables + kNumSyllables && (first - kSyllables) % kNumTails == 0
        && second > kTails && second < kTails + kNumTails)
    {
        return first + second - kTails;
    }
    return table_->composition(first, second);
}

} // namespace qwen_aot
