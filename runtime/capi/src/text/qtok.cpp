#include "qtok.h"

#include "base/crc32.h"
#include "base/utf8.h"

#include <cinttypes>

namespace qwen_aot
{
namespace
{

constexpr char kMagic[] = {'Q', 'W', 'E', 'N', 'Q', 'T', 'O', 'K'};
constexpr uint32_t kVersion = 1;
constexpr size_t kHeaderSize = 64;
constexpr size_t kSectionAlignment = 64;
constexpr size_t kChecked = 16; // where the bytes begin that the checksum is of
constexpr uint32_t kMaxProbes = 64;
constexpr size_t kNumPages = 0x1100; // of 256 characters each: Unicode's
constexpr char kRebuild[] = "build the bundle again, or copy it again if it was copied";

enum SectionIndex : size_t
{
    kByteIds,
    kMerges,
    kPieceOffsets,
    kPieces,
    kClassIndex,
    kClassPages,
    kAdded,
    kAddedNormalized,
    kAddedTexts,
    kDecompositions,
    kDecomposed,
    kCombining,
    kCompositions,
    kNumSections
};

bool is_character(uint32_t code)
{
    return code < 0xD800 || (code >= 0xE000 && code < 0x110000);
}

bool begins_with(std::string_view text, std::string_view start)
{
    return text.size() >= start.size() && std::memcmp(text.data(), start.data(), start.size()) == 0;
}

Status damaged(Error& error, char const* what)
{
    return error.fail(Status::bundle, "%s; %s", what, kRebuild);
}

/** The row of a sorted table whose first `Keys` numbers are these; null: none is. */
template <size_t Keys, size_t Size>
uint8_t const* find_row(Span<uint8_t const> table, uint32_t const (&keys)[Keys])
{
    size_t low = 0;
    size_t high = table.size() / Size;
    while (low < high)
    {
        size_t const middle = low + (high - low) / 2;
        uint8_t const* const row = table.data() + middle * Size;
        bool is_before = false;
        bool is_same = true;
        for (size_t i = 0; i < Keys && is_same; ++i)
        {
            uint32_t const found = load_u32(row + 4 * i);
            is_before = found < keys[i];
            is_same = found == keys[i];
        }
        if (is_same)
        {
            return row;
        }
        if (is_before)
        {
            low = middle + 1;
        }
        else
        {
            high = middle;
        }
    }
    return nullptr;
}

} // namespace

Status QtokTable::open(Span<uint8_t const> bytes, int64_t vocab_size, QtokTable& table, Error& error)
{
    QtokTable opened;
    QWEN_AOT_TRY(opened.read_header(bytes, vocab_size, error));
    table = opened;
    return Status::ok;
}

Status QtokTable::read_header(Span<uint8_t const> bytes, int64_t vocab_size, Error& error)
{
    uint8_t const* const file = bytes.data();
    if (bytes.size() < kHeaderSize || std::memcmp(file, kMagic, sizeof kMagic) != 0)
    {
        return damaged(error, "this is no compiled tokenizer: it doesn't begin as one");
    }
    if (uint32_t const version = load_u32(file + 8); version != kVersion)
    {
        return error.fail(Status::bundle,
            "the compiled tokenizer is of version %" PRIu32 "; this library reads version %" PRIu32
            ": build the bundle again with the qwen-aot that this library is of",
            version, kVersion);
    }
    if (uint64_t const size = load_u64(file + 16); size != bytes.size())
    {
        return error.fail(Status::bundle,
            "the compiled tokenizer has %zu bytes, and says that it has %" PRIu64 ": it was cut or added to; %s",
            bytes.size(), size, kRebuild);
    }
    if (load_u32(file + 12) != crc32(bytes.sub(kChecked, bytes.size() - kChecked)))
    {
        return damaged(error, "the compiled tokenizer's checksum doesn't fit its content: it is damaged");
    }

    // From here on only a file that was made to be wrong can be.
    uint32_t const rule = load_u32(file + 24);
    is_nfc_ = (load_u32(file + 28) & 1) != 0;
    num_ids_ = load_u32(file + 32);
    max_probes_ = load_u32(file + 36);
    if (rule < static_cast<uint32_t>(SplitRule::qwen2) || rule > static_cast<uint32_t>(SplitRule::gpt2)
        || load_u32(file + 28) > 1 || max_probes_ > kMaxProbes || load_u32(file + 40) != kNumSections
        || bytes.size() < kHeaderSize + 16 * kNumSections)
    {
        return damaged(error, "the compiled tokenizer's header has values that no such file has");
    }
    split_rule_ = static_cast<SplitRule>(rule);
    if (static_cast<int64_t>(num_ids_) > vocab_size)
    {
        return error.fail(Status::bundle,
            "the compiled tokenizer has %" PRIu32 " ids, and the model %" PRId64
            ": it is the tokenizer of another model; build the bundle again",
            num_ids_, vocab_size);
    }
    Span<uint8_t const> sections[kNumSections];
    for (size_t i = 0; i < kNumSections; ++i)
    {
        uint64_t const offset = load_u64(file + kHeaderSize + 16 * i);
        uint64_t const size = load_u64(file + kHeaderSize + 16 * i + 8);
        if (offset % kSectionAlignment != 0 || offset > bytes.size() || size > bytes.size() - offset)
        {
            return damaged(error, "the compiled tokenizer has a section outside of its file");
        }
        sections[i] = bytes.sub(static_cast<size_t>(offset), static_cast<size_t>(size));
    }

    size_t const slots = sections[kMerges].size() / 16;
    if (sections[kByteIds].size() != 4 * 256 || sections[kMerges].size() % 16 != 0 || slots < 2
        || (slots & (slots - 1)) != 0 || sections[kPieceOffsets].size() != 4 * (static_cast<uint64_t>(num_ids_) + 1)
        || sections[kClassIndex].size() != kNumPages || sections[kClassPages].size() % 256 != 0)
    {
        return damaged(error, "the compiled tokenizer has a section of a size that none has");
    }
    byte_ids_ = sections[kByteIds].data();
    for (size_t byte = 0; byte < 256; ++byte)
    {
        if (uint32_t const id = byte_id(static_cast<uint8_t>(byte)); id != kNoToken && id >= num_ids_)
        {
            return damaged(error, "the compiled tokenizer has a byte whose id it lacks");
        }
    }
    merges_ = sections[kMerges].data();
    slot_mask_ = slots - 1;
    slot_shift_ = static_cast<uint32_t>(__builtin_clzll(slots)) + 1;
    piece_offsets_ = sections[kPieceOffsets].data();
    pieces_ = sections[kPieces];
    class_index_ = sections[kClassIndex].data();
    class_pages_ = sections[kClassPages].data();
    for (size_t page = 0; page < kNumPages; ++page)
    {
        if (class_index_[page] >= sections[kClassPages].size() / 256)
        {
            return damaged(error, "the compiled tokenizer has characters whose class it lacks");
        }
    }
    QWEN_AOT_TRY(read_added(sections[kAdded], sections[kAddedTexts], added_, error));
    QWEN_AOT_TRY(read_added(sections[kAddedNormalized], sections[kAddedTexts], added_normalized_, error));
    decompositions_ = sections[kDecompositions];
    combining_ = sections[kCombining];
    compositions_ = sections[kCompositions];
    return read_normalization(sections[kDecomposed], error);
}

Status QtokTable::read_added(
    Span<uint8_t const> rows, Span<uint8_t const> texts, AddedTokens& added, Error& error) const
{
    if (rows.size() % AddedTokens::kRowSize != 0 || rows.size() / AddedTokens::kRowSize > num_ids_)
    {
        return damaged(error, "the compiled tokenizer has more added tokens than ids");
    }
    added.rows = rows.data();
    added.count = static_cast<uint32_t>(rows.size() / AddedTokens::kRowSize);
    added.texts = texts.data();
    size_t sum =
        0; // of lengths: each token has bytes of its own, so that a file can't be written to take days to check
    for (uint32_t row = 0; row < added.count; ++row)
    {
        uint32_t const offset = load_u32(rows.data() + row * AddedTokens::kRowSize + 8);
        uint32_t const length = load_u32(rows.data() + row * AddedTokens::kRowSize + 12);
        if (added.id(row) >= num_ids_ || length == 0 || offset > texts.size() || length > texts.size() - offset
            || length > texts.size() - sum || utf8_valid(added.text(row)) != added.text(row).size())
        {
            return damaged(error, "the compiled tokenizer has an added token without an id or a text");
        }
        if (length > kMaxAdded)
        {
            return damaged(error, "the compiled tokenizer has an added token longer than any that is compiled");
        }
        sum += length;
        bool const is_sorted = row == 0 || added.text(row - 1) < added.text(row);
        uint32_t const parent = added.parent(row);
        bool const has_parent = parent != kNoToken;
        if (!is_sorted || (has_parent && (parent >= row || !begins_with(added.text(row), added.text(parent)))))
        {
            return damaged(error, "the compiled tokenizer's added tokens are out of order");
        }
        auto const first = static_cast<uint8_t>(added.text(row).front());
        added.first_bytes[first >> 6] |= uint64_t{1} << (first & 63);
    }
    return Status::ok;
}

Status QtokTable::read_normalization(Span<uint8_t const> parts, Error& error)
{
    decomposed_ = parts.data();
    bool is_sound = parts.size() % 4 == 0 && decompositions_.size() % 12 == 0 && combining_.size() % 8 == 0
        && compositions_.size() % 12 == 0;
    for (size_t i = 0; is_sound && i < parts.size(); i += 4)
    {
        is_sound = is_character(load_u32(parts.data() + i));
    }
    for (size_t i = 0; is_sound && i < decompositions_.size(); i += 12)
    {
        uint64_t const start = load_u32(decompositions_.data() + i + 4);
        uint64_t const count = load_u32(decompositions_.data() + i + 8);
        is_sound = count >= 1 && count <= 18 && start + count <= parts.size() / 4; // 18: Unicode's longest is shorter
    }
    for (size_t i = 0; is_sound && i < combining_.size(); i += 8)
    {
        uint32_t const order = load_u32(combining_.data() + i + 4);
        is_sound = order >= 1 && order <= 255;
    }
    for (size_t i = 0; is_sound && i < compositions_.size(); i += 12)
    {
        uint32_t const code = load_u32(compositions_.data() + i + 8);
        is_sound = is_character(code) && code != 0;
    }
    return is_sound ? Status::ok : damaged(error, "the compiled tokenizer's normalization table is out of order");
}

Span<uint8_t const> QtokTable::decomposition(uint32_t code) const
{
    uint32_t const keys[] = {code};
    uint8_t const* const row = find_row<1, 12>(decompositions_, keys);
    if (row == nullptr)
    {
        return {};
    }
    return {decomposed_ + 4 * static_cast<size_t>(load_u32(row + 4)), 4 * static_cast<size_t>(load_u32(row + 8))};
}

uint8_t QtokTable::combining_order(uint32_t code) const
{
    uint32_t const keys[] = {code};
    uint8_t const* const row = find_row<1, 8>(combining_, keys);
    return row == nullptr ? 0 : static_cast<uint8_t>(load_u32(row + 4));
}

uint32_t QtokTable::composition(uint32_t first, uint32_t second) const
{
    uint32_t const keys[] = {first, second};
    uint8_t const* const row = find_row<2, 12>(compositions_, keys);
    return row == nullptr ? 0 : load_u32(row + 8);
}

} // namespace qwen_aot
