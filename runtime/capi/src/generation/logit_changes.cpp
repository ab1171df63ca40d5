#include "generation/logit_changes.h"

#include <cmath>

namespace qwen_aot
{

size_t TokenCounts::find(int32_t id) const
{
    size_t const mask = places_.size() - 1;
    // Fibonacci hashing: neighboring ids, as a prompt has, spread over the table.
    size_t place = static_cast<size_t>(static_cast<uint32_t>(id) * 0x9E3779B97F4A7C15 >> 32) & mask;
    while (places_[place] != 0 && ids_[places_[place] - 1] != id)
    {
        place = (place + 1) & mask;
    }
    return place;
}

bool TokenCounts::reserve_one()
{
    if (!ids_.reserve_more(1) || !counts_.reserve_more(1))
    {
        return false;
    }
    if ((ids_.size() + 1) * 2 <= places_.size())
    {
        return true;
    }
    Array<uint32_t> grown;
    if (!grown.resize(places_.empty() ? 32 : places_.size() * 2))
    {
        return false;
    }
    places_.swap(grown);
    for (size_t i = 0; i < ids_.size(); ++i)
    {
        places_[find(ids_[i])] = static_cast<uint32_t>(i + 1);
    }
    return true;
}

void TokenCounts::add(int32_t id)
{
    size_t const place = find(id);
    if (places_[place] == 0)
    {
        // There is room: see `reserve_one`.
        (void)ids_.push(id);
        (void)counts_.push(0);
        places_[place] = static_cast<uint32_t>(ids_.size());
    }
    counts_[places_[place] - 1] += 1;
}

bool LogitChanges::begin(Settings const& settings, Span<int32_t const> prompt_ids, Span<int32_t const> ending_ids)
{
    settings_ = &settings;
    ending_ids_ = ending_ids;
    left_ = settings.min_new_tokens;
    if (penalizes_seen())
    {
        for (int32_t const id : prompt_ids)
        {
            if (!seen_.reserve_one())
            {
                return false;
            }
            seen_.add(id);
        }
    }
    return true;
}

bool LogitChanges::is_off() const
{
    return left_ <= 0 && settings_->logit_bias.empty() && settings_->suppress_tokens.empty() && !penalizes_output()
        && !penalizes_seen();
}

void LogitChanges::apply(Span<float> logits) const
{
    // Source: `logit_bias` of OpenAI's API.
    for (Bias const& each : settings_->logit_bias)
    {
        logits[static_cast<size_t>(each.id)] += each.bias;
    }
    if (penalizes_seen())
    {
        // Source: Keskar et al., "CTRL" (2019), https://arxiv.org/abs/1909.05858, with the sign rule of transformers'
        // RepetitionPenaltyLogitsProcessor.
        auto const penalty = static_cast<float>(settings_->repetition_penalty);
        for (int32_t const id : seen_.ids())
        {
            float& logit = logits[static_cast<size_t>(id)];
            logit = logit < 0 ? logit * penalty : logit / penalty;
        }
    }
    if (penalizes_output())
    {
        // Source: OpenAI, https://platform.openai.com/docs/api-reference/parameter-details; in vLLM's order.
        auto const frequency = static_cast<float>(settings_->frequency_penalty);
        auto const presence = static_cast<float>(settings_->presence_penalty);
        Span<float const> const counts = output_.counts();
        for (size_t i = 0; i < counts.size(); ++i)
        {
            float& logit = logits[static_cast<size_t>(output_.ids()[i])];
            float const taken = frequency * counts[i]; // rounded by itself, as numpy does
            logit = (logit - taken) - presence;
        }
    }
    if (left_ > 0)
    {
        for (int32_t const id : ending_ids_)
        {
            if (static_cast<size_t>(id) < logits.size()) // a checkpoint may name ids that it lacks
            {
                logits[static_cast<size_t>(id)] = -INFINITY;
            }
        }
    }
    // Source: transformers' SuppressTokensLogitsProcessor.
    for (int32_t const id : settings_->suppress_tokens)
    {
        logits[static_cast<size_t>(id)] = -INFINITY;
    }
}

bool LogitChanges::reserve_one()
{
    return (!penalizes_seen() || seen_.reserve_one()) && (!penalizes_output() || output_.reserve_one());
}

void LogitChanges::count(int32_t id)
{
    left_ -= left_ > 0 ? 1 : 0;
    if (penalizes_seen())
    {
        seen_.add(id);
    }
    if (penalizes_output())
    {
        output_.add(id);
    }
}

} // namespace qwen_aot
