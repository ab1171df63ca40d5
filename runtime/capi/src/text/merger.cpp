#include "merger.h"

namespace qwen_aot
{
namespace
{

constexpr size_t kShort = 48; // bytes of a word up to which looking at every pair costs less than a heap
constexpr uint32_t kNone = 0xFFFFFFFFU;
constexpr size_t kBranches = 4;

} // namespace

Status Merger::append(std::string_view word, Array<int32_t>& ids, Error& error)
{
    if (word.size() == 1)
    {
        uint32_t const id = table_->byte_id(static_cast<uint8_t>(word[0]));
        QWEN_AOT_NEED(id == kNoToken || ids.push(static_cast<int32_t>(id)), error, "a text's ids");
        return Status::ok;
    }
    return word.size() <= kShort ? append_short(word, ids, error) : append_long(word, ids, error);
}

Status Merger::append_short(std::string_view word, Array<int32_t>& ids, Error& error) const
{
    uint32_t tokens[kShort];
    uint32_t ranks[kShort]; // of the merge with the token behind; kNone: there is none
    uint32_t results[kShort];
    size_t count = 0;
    for (char const character : word)
    {
        uint32_t const id = table_->byte_id(static_cast<uint8_t>(character));
        if (id != kNoToken)
        {
            tokens[count++] = id;
        }
    }
    auto const look_up = [&](size_t place) {
        Merge merge;
        bool const is_found = place + 1 < count && table_->find_merge(tokens[place], tokens[place + 1], merge);
        ranks[place] = is_found ? merge.rank : kNone;
        results[place] = is_found ? merge.result : 0;
    };
    for (size_t i = 0; i < count; ++i)
    {
        look_up(i);
    }
    while (count > 1)
    {
        size_t best = 0;
        for (size_t i = 1; i + 1 < count; ++i)
        {
            if (ranks[i] < ranks[best])
            {
                best = i;
            }
        }
        if (ranks[best] == kNone)
        {
            break;
        }
        tokens[best] = results[best];
        --count;
        for (size_t i = best + 1; i < count; ++i)
        {
            tokens[i] = tokens[i + 1];
            ranks[i] = ranks[i + 1];
            results[i] = results[i + 1];
        }
        look_up(best);
        if (best > 0)
        {
            look_up(best - 1);
        }
    }
    for (size_t i = 0; i < count; ++i)
    {
        QWEN_AOT_NEED(ids.push(static_cast<int32_t>(tokens[i])), error, "a text's ids");
    }
    return Status::ok;
}

Status Merger::append_long(std::string_view word, Array<int32_t>& ids, Error& error)
{
    symbols_.clear();
    heap_.clear();
    QWEN_AOT_NEED(symbols_.reserve(word.size()) && heap_.reserve(word.size()), error, "a long word's tokens");
    for (char const character : word)
    {
        uint32_t const id = table_->byte_id(static_cast<uint8_t>(character));
        if (id != kNoToken)
        {
            auto const place = static_cast<uint32_t>(symbols_.size());
            QWEN_AOT_NEED(symbols_.push({id, place + 1, place - 1}), error, "a long word's tokens"); // -1 is kNone
        }
    }
    if (symbols_.empty())
    {
        return Status::ok;
    }
    symbols_.back().next = kNone;
    for (uint32_t place = 0; place < symbols_.size(); ++place)
    {
        QWEN_AOT_NEED(add_candidate(place), error, "a long word's tokens");
    }
    while (!heap_.empty())
    {
        Candidate const candidate = take_first();
        auto const place = static_cast<uint32_t>(candidate);
        Symbol& left = symbols_[place];
        Merge merge;
        if (left.id == kNoToken || left.next == kNone || !table_->find_merge(left.id, symbols_[left.next].id, merge)
            || merge.rank != candidate >> 32)
        {
            continue;
        }
        Symbol& right = symbols_[left.next];
        left.id = merge.result;
        left.next = right.next;
        right.id = kNoToken;
        if (left.next != kNone)
        {
            symbols_[left.next].previous = place;
        }
        QWEN_AOT_NEED(add_candidate(place) && (left.previous == kNone || add_candidate(left.previous)), error,
            "a long word's tokens");
    }
    for (uint32_t place = 0; place != kNone; place = symbols_[place].next)
    {
        QWEN_AOT_NEED(ids.push(static_cast<int32_t>(symbols_[place].id)), error, "a text's ids");
    }
    return Status::ok;
}

bool Merger::add_candidate(uint32_t place)
{
    Symbol const& left = symbols_[place];
    Merge merge;
    if (left.next == kNone || !table_->find_merge(left.id, symbols_[left.next].id, merge))
    {
        return true;
    }
    Candidate const candidate = static_cast<uint64_t>(merge.rank) << 32 | place;
    if (!heap_.push(candidate))
    {
        return false;
    }
    size_t hole = heap_.size() - 1;
    while (hole > 0 && candidate < heap_[(hole - 1) / kBranches])
    {
        heap_[hole] = heap_[(hole - 1) / kBranches];
        hole = (hole - 1) / kBranches;
    }
    heap_[hole] = candidate;
    return true;
}

Merger::Candidate Merger::take_first()
{
    Candidate const first = heap_[0];
    Candidate const last = heap_.back();
    heap_.pop();
    size_t const size = heap_.size();
    size_t hole = 0;
    for (size_t child = 1; child < size; child = kBranches * hole + 1)
    {
        size_t const end = child + kBranches < size ? child + kBranches : size;
        size_t least = child;
        for (size_t other = child + 1; other < end; ++other)
        {
            least = heap_[other] < heap_[least] ? other : least;
        }
        if (heap_[least] >= last)
        {
            break;
        }
        heap_[hole] = heap_[least];
        hole = least;
    }
    if (size > 0)
    {
        heap_[hole] = last;
    }
    return first;
}

} // namespace qwen_aot
