#include "generation/sampling.h"

#include "generation/passes.h"

#include <algorithm>
#include <cmath>

namespace qwen_aot
{
namespace
{

constexpr size_t kFewToSort = 32;      // candidates that are sorted and not split
constexpr float kSmallest = 0x1p-126F; // what weighs less weighs nothing

size_t block_count(size_t count)
{
    return (count + kBlock - 1) / kBlock;
}

size_t block_size(size_t count, size_t block)
{
    return std::min(kBlock, count - block * kBlock);
}

/** The k-th largest of some numbers, k >= 1, which are put in another order. */
float kth_largest(Span<float> numbers, size_t k)
{
    std::nth_element(numbers.begin(), numbers.begin() + (k - 1), numbers.end(), [](float a, float b) { return a > b; });
    return numbers[k - 1];
}

} // namespace

int32_t argmax(Span<float const> logits, Passes const& passes)
{
    // The part with the first largest one, in one pass, and then its place there. From the end: a row was read to its end just
    // now (RowEngine looks for NaN), so that is what is left in the nearer caches, which hold less than a row.
    constexpr size_t kStride = 1024;
    float best = -INFINITY;
    size_t best_start = 0;
    for (size_t part = (logits.size() + kStride - 1) / kStride; part-- > 0;)
    {
        size_t const start = part * kStride;
        float const found = passes.largest(logits.data() + start, std::min(kStride, logits.size() - start));
        if (found >= best)
        {
            best = found;
            best_start = start;
        }
    }
    size_t i = best_start;
    while (i + 1 < logits.size() && logits[i] != best)
    {
        ++i;
    }
    return static_cast<int32_t>(i);
}

bool Candidates::allocate(size_t vocab_size)
{
    size_t const blocks = block_count(vocab_size);
    passes_ = &best_passes();
    return few_.resize(vocab_size) && order_.reserve(vocab_size) && weights_.resize(vocab_size)
        && block_sums_.resize(blocks) && block_max_.resize(blocks) && sorted_.resize(vocab_size);
}

void Candidates::begin(Span<float const> logits, int64_t k, float temperature)
{
    logits_ = logits;
    temperature_ = temperature;
    num_few_ = 0;
    is_whole_ = k <= 0 || static_cast<uint64_t>(k) >= logits.size();
    is_weighed_ = !is_whole_;
    if (is_whole_)
    {
        find_largest();
        return;
    }
    take_largest(logits, static_cast<size_t>(k));
    weigh_few(temperature);
}

void Candidates::take_largest(Span<float const> logits, size_t k)
{
    size_t const blocks = block_count(logits.size());
    float least = -INFINITY;
    // (A block is too short for the wider passes to be faster.)
    for (size_t block = blocks; block-- > 0;) // as in argmax
    {
        block_max_[block] = kPasses.largest(logits.data() + block * kBlock, block_size(logits.size(), block));
    }
    if (k < blocks)
    {
        // The k-th largest of the blocks' largest is at most the k-th largest of all.
        std::copy(block_max_.begin(), block_max_.begin() + blocks, sorted_.begin());
        least = kth_largest(sorted_.view().sub(0, blocks), k);
    }
    size_t count = 0;
    for (size_t block = 0; block < blocks; ++block)
    {
        if (block_max_[block] < least)
        {
            continue;
        }
        size_t const first = block * kBlock;
        for (size_t i = first; i < first + block_size(logits.size(), block); ++i)
        {
            if (logits[i] >= least)
            {
                few_[count] = {static_cast<int32_t>(i), logits[i], 0};
                sorted_[count++] = logits[i];
            }
        }
    }
    float const threshold = kth_largest(sorted_.view().sub(0, count), k);
    num_few_ = count;
    keep_if([threshold](Candidate const& each) { return each.logit >= threshold; });
}

void Candidates::find_largest()
{
    largest_ = -INFINITY;
    for (size_t block = block_count(logits_.size()); block-- > 0;) // as in argmax
    {
        block_max_[block] = kPasses.largest(logits_.data() + block * kBlock, block_size(logits_.size(), block));
        largest_ = std::max(largest_, block_max_[block]);
    }
}

/** Weighs one block of the whole vocabulary, and notes its sum. */
void Candidates::weigh_block(size_t block)
{
    size_t const first = block * kBlock;
    block_sums_[block] = passes_->weigh(logits_.data() + first, block_size(logits_.size(), block), temperature_,
        largest_ / temperature_, weights_.data() + first);
}

/** The sums of the blocks' weights, without keeping the weights: they would push the logits out of the cache. */
void Candidates::sum_blocks()
{
    if (is_weighed_)
    {
        return;
    }
    for (size_t block = 0; block < block_count(logits_.size()); ++block)
    {
        block_sums_[block] = passes_->weigh(logits_.data() + block * kBlock, block_size(logits_.size(), block),
            temperature_, largest_ / temperature_, nullptr);
    }
}

/** Weighs the whole vocabulary, once. */
void Candidates::weigh_whole()
{
    if (is_weighed_)
    {
        return;
    }
    for (size_t block = 0; block < block_count(logits_.size()); ++block)
    {
        weigh_block(block);
    }
    is_weighed_ = true;
}

void Candidates::weigh_few(float temperature)
{
    largest_ = -INFINITY;
    for (Candidate& each : few())
    {
        largest_ = std::max(largest_, each.logit);
        each.logit = each.logit / temperature;
    }
    float const top = largest_ / temperature;
    float logits[kBlock];
    float weights[kBlock];
    for (size_t first = 0; first < num_few_; first += kBlock)
    {
        size_t const count = std::min(kBlock, num_few_ - first);
        for (size_t i = 0; i < count; ++i)
        {
            logits[i] = few_[first + i].logit;
        }
        (void)passes_->weigh(logits, count, 1, top, weights);
        for (size_t i = 0; i < count; ++i)
        {
            few_[first + i].weight = weights[i];
        }
    }
}

/** A logit below which nothing weighs so much: whole blocks are passed over by it. */
float Candidates::least_logit(float least_weight) const
{
    constexpr float kMargin = 0.001F; // more than all roundings
    return largest_ + (std::log(least_weight) - kMargin) * temperature_ - std::fabs(largest_) * 1e-6F;
}

/** The weight of all in the whole vocabulary that weigh at least so much. */
double Candidates::sum_from(float least_weight) const
{
    float const least = least_logit(least_weight);
    double sum = 0;
    for (size_t block = 0; block < block_count(logits_.size()); ++block)
    {
        if (block_max_[block] >= least)
        {
            sum += passes_->sum_from(weights_.data() + block * kBlock, block_size(logits_.size(), block), least_weight);
        }
    }
    return sum;
}

/** Cuts the whole vocabulary to what weighs at least so much; blocks that have nothing of it needn't be weighed. */
void Candidates::collect(float least_weight)
{
    float const least = least_logit(least_weight);
    size_t count = 0;
    for (size_t block = 0; block < block_count(logits_.size()); ++block)
    {
        if (block_max_[block] < least)
        {
            continue;
        }
        if (!is_weighed_)
        {
            weigh_block(block);
        }
        size_t const first = block * kBlock;
        for (size_t i = first; i < first + block_size(logits_.size(), block); ++i)
        {
            // Without a branch: which weigh enough isn't foreseen.
            few_[count] = {static_cast<int32_t>(i), logits_[i], weights_[i]};
            count += weights_[i] >= least_weight ? 1 : 0;
        }
    }
    num_few_ = count;
    for (Candidate& each : few())
    {
        each.logit = each.logit / temperature_;
    }
    is_whole_ = false;
    is_weighed_ = true;
}

double Candidates::weight_of_whole() const
{
    double sum = 0;
    for (size_t block = 0; block < block_count(logits_.size()); ++block)
    {
        sum += block_sums_[block];
    }
    return sum;
}

double Candidates::weight_of_few() const
{
    double sum = 0;
    for (Candidate const& each : few())
    {
        sum += static_cast<double>(each.weight);
    }
    return sum;
}

void Candidates::keep_top_p(double p)
{
    if (p >= 1)
    {
        return;
    }
    double held = 0;       // the weight of what stays for sure
    float edge = INFINITY; // what weighs as much stays for sure
    double goal;
    if (is_whole_)
    {
        weigh_whole();
        goal = p * weight_of_whole();
        // Where the likely ones are few, what is above one of these holds p of the probability.
        for (float const least : {1e-1F, 1e-2F, 1e-3F, 1e-4F, 1e-5F, 1e-6F, kSmallest})
        {
            double const sum = sum_from(least);
            if (sum >= goal || least == kSmallest)
            {
                collect(least);
                break;
            }
            held = sum;
            edge = least;
        }
    }
    else
    {
        goal = p * weight_of_few();
    }

    order_.clear();
    for (size_t i = 0; i < num_few_; ++i)
    {
        if (few_[i].weight < edge)
        {
            (void)order_.push(static_cast<uint32_t>(i)); // there is room for all
        }
    }
    auto const is_before = [this](uint32_t a, uint32_t b) {
        return few_[a].logit > few_[b].logit || (few_[a].logit == few_[b].logit && a < b);
    };
    // A candidate stays if those before it haven't reached the goal yet: the place where they do is looked for in the half
    // that it lies in, again and again.
    size_t first = 0; // `held` is the weight of all before it
    size_t last = order_.size();
    uint32_t number = 1;
    while (last - first > kFewToSort)
    {
        number = number * 1664525 + 1013904223; // no order of the candidates makes bad pivots likely
        size_t const chosen = first + static_cast<size_t>((static_cast<uint64_t>(number) * (last - first)) >> 32);
        std::swap(order_[chosen], order_[last - 1]);
        uint32_t const pivot = order_[last - 1];
        size_t middle = first;
        double weight = 0;
        for (size_t i = first; i + 1 < last; ++i)
        {
            uint32_t const each = order_[i];
            if (is_before(each, pivot))
            {
                weight += static_cast<double>(few_[each].weight);
                order_[i] = order_[middle];
                order_[middle++] = each;
            }
        }
        std::swap(order_[middle], order_[last - 1]);
        if (held + weight >= goal)
        {
            last = middle;
        }
        else
        {
            held += weight + static_cast<double>(few_[pivot].weight);
            first = middle + 1;
        }
    }
    std::sort(order_.begin() + first, order_.begin() + last, is_before);
    while (first < last && held < goal)
    {
        held += static_cast<double>(few_[order_[first++]].weight);
    }
    for (size_t i = first; i < order_.size(); ++i)
    {
        few_[order_[i]].weight = -1;
    }
    keep_if([](Candidate const& each) { return each.weight >= 0; });
}

void Candidates::keep_min_p(float p)
{
    if (p == 0)
    {
        return;
    }
    if (is_whole_)
    {
        collect(p);
        return;
    }
    keep_if([p](Candidate const& each) { return each.weight >= p; });
}

int32_t Candidates::draw(double u)
{
    // Rounding at the end never leads to one without weight: the goal lies below the whole sum, and where it is rounded up to
    // a part's sum, the last one there that weighs something is taken.
    size_t first = 0;
    size_t last = size();
    double before = 0;
    double goal;
    if (is_whole_)
    {
        sum_blocks();
        size_t const blocks = block_count(last);
        double const sum = weight_of_whole();
        goal = std::min(u * sum, std::nextafter(sum, 0.0));
        size_t block = 0;
        while (block + 1 < blocks && before + block_sums_[block] <= goal)
        {
            before += block_sums_[block++];
        }
        first = block * kBlock;
        last = first + block_size(last, block);
        weigh_block(block);
    }
    else
    {
        double const sum = weight_of_few();
        goal = std::min(u * sum, std::nextafter(sum, 0.0));
    }
    size_t found = first;
    double inside = 0;
    for (size_t i = first; i < last; ++i)
    {
        double const each = static_cast<double>(weight(i));
        inside += each;
        found = each > 0 ? i : found;
        if (before + inside > goal)
        {
            break;
        }
    }
    return id(found);
}

double Candidates::log_probabilities(
    Span<float const> logits, int32_t id, size_t count, int32_t* top_ids, double* top_logprobs)
{
    begin(logits, 0, 1);
    sum_blocks();
    double const log_sum = static_cast<double>(largest_) + std::log(weight_of_whole());
    count = std::min(count, logits.size());
    if (count != 0)
    {
        take_largest(logits, count);
        std::partial_sort(
            few().begin(), few().begin() + count, few().end(), [](Candidate const& a, Candidate const& b) {
                return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
            });
        for (size_t i = 0; i < count; ++i)
        {
            top_ids[i] = few_[i].id;
            top_logprobs[i] = static_cast<double>(few_[i].logit) - log_sum;
        }
    }
    return static_cast<double>(logits[static_cast<size_t>(id)]) - log_sum;
}

int32_t Sampler::choose(Span<float const> logits, Span<float> changed, Candidates& candidates)
{
    bool const is_changed = !changes_.is_off();
    if (!is_changed && settings_->is_greedy())
    {
        return argmax(logits, candidates.passes());
    }
    if (is_changed)
    {
        std::copy(logits.begin(), logits.end(), changed.begin());
        changes_.apply(changed);
        logits = {changed.data(), changed.size()};
    }
    int32_t id;
    if (settings_->is_greedy())
    {
        id = argmax(logits, candidates.passes());
    }
    else
    {
        candidates.begin(logits, settings_->top_k, static_cast<float>(settings_->temperature));
        candidates.keep_top_p(settings_->top_p);
        candidates.keep_min_p(static_cast<float>(settings_->min_p));
        id = candidates.draw(random_.next());
    }
    changes_.count(id);
    return id;
}

} // namespace qwen_aot
