/** Choosing the next token: cuts of one row of logits, the draw, log-probabilities, and the Sampler that chains them.
 *  docs/generation.md states the rules. The vocabulary is cut to few candidates before anything is sorted. */
#pragma once

#include "base/memory.h"
#include "generation/config.h"
#include "generation/event.h"
#include "generation/logit_changes.h"
#include "generation/passes.h"
#include "generation/random.h"

#include <cstdint>

namespace qwen_aot
{

/** The index of the largest logit of [V], of equals the lowest; V >= 1, none NaN. */
int32_t argmax(Span<float const> logits, Passes const& passes);

/** What is left of a vocabulary, and the memory that it takes: 20 bytes for each of its tokens. One thread at a time. */
class Candidates
{
public:
    /** Memory for rows of so many logits; false: there is none. */
    [[nodiscard]] bool allocate(size_t vocab_size);

    /** Takes the passes for every processor, or those for this one, as `allocate` does. */
    void use(Passes const& passes) { passes_ = &passes; }
    Passes const& passes() const { return *passes_; }

    /** Takes the k largest of logits [V] and those equal to the smallest of them, or all for k = 0, and divides them by the
     *  temperature. The logits must stay as they are until the draw. */
    void begin(Span<float const> logits, int64_t k, float temperature);

    /** Leaves the fewest likeliest whose probabilities reach p together, at least one; 1 leaves all.
     *  Source: Holtzman et al., "The Curious Case of Neural Text Degeneration" (2019), https://arxiv.org/abs/1904.09751. */
    void keep_top_p(double p);

    /** Leaves those at least p times as probable as the likeliest; 0 leaves all.
     *  Source: Nguyen et al., "Turning Up the Heat: Min-p Sampling" (2024), https://arxiv.org/abs/2407.01082. */
    void keep_min_p(float p);

    /** The id at which the cumulative probability, ids ascending, passes u in [0, 1). */
    int32_t draw(double u);

    /** Weighs what hasn't been yet, so that `weight` may be asked: cuts look at no more than they need. */
    void weigh() { weigh_whole(); }

    size_t size() const { return is_whole_ ? logits_.size() : num_few_; }
    int32_t id(size_t index) const { return is_whole_ ? static_cast<int32_t>(index) : few_[index].id; }
    /** exp(logit - largest logit), each divided by the temperature; after `weigh`. */
    float weight(size_t index) const { return is_whole_ ? weights_[index] : few_[index].weight; }

    /** The natural logarithm of the softmax of logits [V] at `id`, and the `count` likeliest, best first.
     *  top_ids, top_logprobs: [min(count, V)]. Takes the memory of the candidates. */
    double log_probabilities(
        Span<float const> logits, int32_t id, size_t count, int32_t* top_ids, double* top_logprobs);

private:
    struct Candidate
    {
        int32_t id;
        float logit;
        float weight;
    };

    void take_largest(Span<float const> logits, size_t k);
    void find_largest();
    void weigh_block(size_t block);
    void sum_blocks();
    void weigh_whole();
    void weigh_few(float temperature);
    float least_logit(float least_weight) const;
    double sum_from(float least_weight) const;
    void collect(float least_weight);
    double weight_of_whole() const;
    double weight_of_few() const;

    Span<Candidate> few() { return few_.view().sub(0, num_few_); }
    Span<Candidate const> few() const { return few_.view().sub(0, num_few_); }
    /** Leaves those of the few of which something is true. */
    template <class Predicate>
    void keep_if(Predicate is_kept)
    {
        size_t kept = 0;
        for (Candidate const& each : few())
        {
            if (is_kept(each))
            {
                few_[kept++] = each;
            }
        }
        num_few_ = kept;
    }

    Passes const* passes_ = &kPasses;
    Span<float const> logits_;
    float largest_ = 0; // of the logits
    float temperature_ = 1;
    bool is_whole_ = true;
    bool is_weighed_ = false;
    Array<Candidate> few_; // [V], of which `num_few_` are left, ascending ids, where it isn't the whole vocabulary
    size_t num_few_ = 0;
    Array<uint32_t> order_;    // [V]: of candidates that are being cut
    Array<float> weights_;     // [V]: of the whole vocabulary
    Array<double> block_sums_; // of the weights
    Array<float> block_max_;   // of the logits
    Array<float> sorted_;      // of block_max_, or of candidates' logits
};

/** Chooses the tokens of one output; its random numbers are its own and don't depend on the rest of a batch. */
class Sampler
{
public:
    Sampler(Settings const& settings, uint64_t seed, uint32_t choice)
        : settings_(&settings)
        , random_(seed, choice)
    {
    }

    /** Notes what the penalties have seen; false: there is no memory. See LogitChanges::begin. */
    [[nodiscard]] bool begin(Span<int32_t const> prompt_ids, Span<int32_t const> ending_ids)
    {
        return changes_.begin(*settings_, prompt_ids, ending_ids);
    }

    /** Room for one more token, so that `choose` needs no memory. */
    [[nodiscard]] bool reserve_one() { return changes_.reserve_one(); }

    /** The next token from finite logits [V], which are not changed.
     *  changed: memory for V logits. */
    int32_t choose(Span<float const> logits, Span<float> changed, Candidates& candidates);

private:
    Settings const* settings_;
    LogitChanges changes_;
    RandomNumbers random_;
};

} // namespace qwen_aot
