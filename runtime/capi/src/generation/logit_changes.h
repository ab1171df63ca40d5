/** What is done to a row of logits before a token is chosen: bias, penalties, tokens that may not come.
 *  docs/generation.md states their order and its reasons. */
#pragma once

#include "base/memory.h"
#include "generation/config.h"

#include <cstdint>

namespace qwen_aot
{

/** Token ids, none twice, and how often each has come. */
class TokenCounts
{
public:
    /** Room for one more id, so that `add` needs no memory. */
    [[nodiscard]] bool reserve_one();
    /** One more of an id, for which there is room. */
    void add(int32_t id);
    /** In the order of their first coming. */
    Span<int32_t const> ids() const { return ids_.view(); }
    /** Of the ids. */
    Span<float const> counts() const { return counts_.view(); }

private:
    size_t find(int32_t id) const;

    Array<int32_t> ids_;
    Array<float> counts_;
    Array<uint32_t> places_; // open addressing: an id's place and one, or 0; a power of two, at most half of it used
};

/** One output's changes, and what of its text they depend on. */
class LogitChanges
{
public:
    /** Starts before the first token; false: there is no memory.
     *  settings, ending_ids: must outlive it; the ids can't come before `min_new_tokens`.
     *  prompt_ids: seen by the repetition penalty; within the vocabulary, as the ids of the settings. */
    [[nodiscard]] bool begin(Settings const& settings, Span<int32_t const> prompt_ids, Span<int32_t const> ending_ids);

    /** Whether logits stay as they are, from here on. */
    bool is_off() const;

    /** Changes a row of finite logits. */
    void apply(Span<float> logits) const;

    /** Room for one more token, so that `count` needs no memory. */
    [[nodiscard]] bool reserve_one();
    /** Notes the token that was chosen. */
    void count(int32_t id);

private:
    bool penalizes_seen() const { return settings_->repetition_penalty != 1; }
    bool penalizes_output() const { return settings_->frequency_penalty != 0 || settings_->presence_penalty != 0; }

    Settings const* settings_ = nullptr;
    Span<int32_t const> ending_ids_;
    TokenCounts seen_; // in prompt and output
    TokenCounts output_;
    int64_t left_ = 0; // tokens before one of the ending ids may come
};

} // namespace qwen_aot
