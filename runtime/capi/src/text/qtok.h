/** The content of tokenizer.qtok, checked, and what is looked up in it. docs/compiled-text.md states the format. */
#pragma once

#include "base/memory.h"
#include "base/status.h"

#include <cstdint>
#include <cstring>
#include <string_view>

namespace qwen_aot
{

/** A number of a file, which is little-endian as every machine is that this is built for. */
inline uint32_t load_u32(uint8_t const* bytes)
{
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files are read as they lie");
    uint32_t value;
    std::memcpy(&value, bytes, sizeof value);
    return value;
}

inline uint64_t load_u64(uint8_t const* bytes)
{
    uint64_t value;
    std::memcpy(&value, bytes, sizeof value);
    return value;
}

/** How text is cut into words. */
enum class SplitRule : uint32_t
{
    qwen2 = 1,
    digits_gpt2 = 2,
    gpt2 = 3
};

/** What a character is to the reference tokenizer: bits of a class. */
enum CharacterClass : uint8_t
{
    kLetter = 1,
    kNumber = 2,
    kSpace = 4,
    kDigit = 8,       // cut apart before the other rules
    kNormalized = 16, // may be changed by NFC, or change what stands before it
};

/** No token: of a byte without one. */
constexpr uint32_t kNoToken = 0xFFFFFFFFU;

// No build writes more. Without a limit a file of a few megabytes can make each byte of a text, or each token of an answer,
// cost as much.
constexpr uint32_t kMaxAdded = 256;  // bytes of an added token
constexpr uint32_t kMaxPiece = 4096; // bytes that an id stands for

/** Added tokens of one table, sorted by their bytes. */
struct AddedTokens
{
    static constexpr size_t kRowSize = 20;

    uint8_t const* rows = nullptr;
    uint32_t count = 0;
    uint8_t const* texts = nullptr;
    uint64_t first_bytes[4] = {}; // a bit for each byte that a token begins with

    uint32_t id(uint32_t row) const { return load_u32(rows + row * kRowSize); }
    bool is_special(uint32_t row) const { return (load_u32(rows + row * kRowSize + 4) & 1) != 0; }
    std::string_view text(uint32_t row) const
    {
        uint8_t const* const fields = rows + row * kRowSize;
        return {reinterpret_cast<char const*>(texts) + load_u32(fields + 8), load_u32(fields + 12)};
    }
    /** The longest other token that this one begins with, as its row; at least `count` where there is none. */
    uint32_t parent(uint32_t row) const { return load_u32(rows + row * kRowSize + 16); }
    bool may_begin_with(uint8_t byte) const { return (first_bytes[byte >> 6] >> (byte & 63) & 1) != 0; }
};

struct Merge
{
    uint32_t rank;
    uint32_t result;
};

class QtokTable
{
public:
    /** See Tokenizer::open. What lookups can't check cheaply is checked here. */
    static Status open(Span<uint8_t const> bytes, int64_t vocab_size, QtokTable& table, Error& error);

    SplitRule split_rule() const { return split_rule_; }
    bool is_nfc() const { return is_nfc_; }
    uint32_t num_ids() const { return num_ids_; }

    /** The id of a byte; kNoToken where there is none. */
    uint32_t byte_id(uint8_t byte) const { return load_u32(byte_ids_ + 4 * byte); }

    /** What a pair of ids becomes; false where it doesn't. */
    bool find_merge(uint32_t left, uint32_t right, Merge& merge) const
    {
        uint64_t const pair = static_cast<uint64_t>(left) << 32 | right;
        uint64_t const stored = static_cast<uint64_t>(right) << 32 | left;
        uint64_t slot = pair * 0x9E3779B97F4A7C15U >> slot_shift_;
        for (uint32_t probe = 0; probe < max_probes_; ++probe, slot = (slot + 1) & slot_mask_)
        {
            uint8_t const* const entry = merges_ + slot * 16;
            uint64_t const found = load_u64(entry);
            if (found == stored)
            {
                merge = {load_u32(entry + 8), load_u32(entry + 12)};
                return merge.result < num_ids_; // else the file lies
            }
            if (static_cast<uint32_t>(found) == kNoToken)
            {
                return false;
            }
        }
        return false;
    }

    /** The bytes of an id, at most kMaxPiece; empty where there is no such token. */
    std::string_view piece(uint32_t id) const
    {
        if (id >= num_ids_)
        {
            return {};
        }
        uint32_t const start = load_u32(piece_offsets_ + 4 * static_cast<size_t>(id));
        uint32_t const end = load_u32(piece_offsets_ + 4 * (static_cast<size_t>(id) + 1));
        if (start > end || end > pieces_.size() || end - start > kMaxPiece)
        {
            return {}; // the file lies
        }
        return {reinterpret_cast<char const*>(pieces_.data()) + start, end - start};
    }

    /** The class of a character up to U+10FFFF. */
    uint8_t class_of(uint32_t code) const { return class_pages_[class_index_[code >> 8] * 256U + (code & 0xFF)]; }

    /** Looked for in text as it stands. */
    AddedTokens const& added() const { return added_; }
    /** Looked for afterwards, in normalized text. */
    AddedTokens const& added_normalized() const { return added_normalized_; }

    /** What a character decomposes into, as 32-bit numbers; empty: itself. Syllables of Hangul aren't here. */
    Span<uint8_t const> decomposition(uint32_t code) const;
    /** The class of a combining mark, 1 to 255; 0: the character is none. */
    uint8_t combining_order(uint32_t code) const;
    /** The character that two compose to; 0: none. Parts of Hangul aren't here. */
    uint32_t composition(uint32_t first, uint32_t second) const;

private:
    Status read_header(Span<uint8_t const> bytes, int64_t vocab_size, Error& error);
    Status read_added(Span<uint8_t const> rows, Span<uint8_t const> texts, AddedTokens& added, Error& error) const;
    Status read_normalization(Span<uint8_t const> parts, Error& error);

    SplitRule split_rule_ = SplitRule::gpt2;
    bool is_nfc_ = false;
    uint32_t num_ids_ = 0;
    uint32_t max_probes_ = 0;
    uint32_t slot_shift_ = 63;
    uint64_t slot_mask_ = 0;
    uint8_t const* byte_ids_ = nullptr;
    uint8_t const* merges_ = nullptr;
    uint8_t const* piece_offsets_ = nullptr;
    Span<uint8_t const> pieces_;
    uint8_t const* class_index_ = nullptr;
    uint8_t const* class_pages_ = nullptr;
    AddedTokens added_;
    AddedTokens added_normalized_;
    Span<uint8_t const> decompositions_;
    uint8_t const* decomposed_ = nullptr;
    Span<uint8_t const> combining_;
    Span<uint8_t const> compositions_;
};

} // namespace qwen_aot
