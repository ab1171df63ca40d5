#include "generation/sampling.h"

#include "generation/lanes.h"

#include <algorithm>
#include <cmath>

namespace qwen_aot
{
namespace
{

constexpr size_t kBlock = 64;          // logits that are looked at together
constexpr size_t kVectors = 4;         // in flight: a comparison takes several cycles
constexpr size_t kFewToSort = 32;      // candidates that are sorted and not split
constexpr float kSmallest = 0x1p-126F; // what weighs less weighs nothing

/** The largest of `count` >= 1 numbers. */
float largest_of(float const* numbers, size_t count)
{
    float best = numbers[0];
    size_t i = 0;
    if (count >= kVectors * kLanes)
    {
        FloatLanes lanes[kVectors];
        for (size_t v = 0; v < kVectors; ++v)
        {
            lanes[v] = load_lanes(numbers + v * kLanes);
        }
        for (i = kVectors * kLanes; i + kVectors * kLanes <= count; i += kVectors * kLanes)
        {
            for (size_t v = 0; v < kVectors; ++v)
            {
                lanes[v] = larger(load_lanes(numbers + i + v * kLanes), lanes[v]);
            }
        }
        best = largest(larger(larger(lanes[0], lanes[1]), larger(lanes[2], lanes[3])));
    }
    for (; i < count; ++i)
    {
        best = numbers[i] > best ? numbers[i] : best;
    }
    return best;
}

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

/** exp(logit / temperature - top) of up to kBlock logits; returns their sum, in fp64. */
double weigh_block(float const* logits, size_t count, float temperature, float top, float* weights)
{
    float padded[kBlock];
    float out[kBlock];
    bool const is_whole = count == kBlock;
    if (!is_whole)
    {
        std::fill(padded + count, padded + kBlock, -INFINITY);
        std::copy(logits, logits + count, padded);
    }
    float const* const from = is_whole ? logits : padded;
    float* const to = is_whole ? weights : out;
    DoubleLanes sums[2] = {};
    for (size_t i = 0; i < kBlock; i += kLanes)
    {
        FloatLanes x = load_lanes(from + i);
        if (temperature != 1)
        {
            x = x / temperature;
        }
        FloatLanes const weight = exp_lanes(x - top);
        store_lanes(weight, to + i);
        sums[0] += DoubleLanes{static_cast<double>(weight[0]), static_cast<double>(weight[1])};
        sums[1] += DoubleLanes{static_cast<double>(weight[2]), static_cast<double>(weight[3])};
    }
    if (!is_whole)
    {
        std::copy(out, out + count, weights);
    }
    DoubleLanes const sum = sums[0] + sums[1];
    return sum[0] + sum[1];
}

} // namespace

int32_t argmax(Span<float const> logits)
{
    // The block of the first largest one, in one pass, and then its place there.
    constexpr size_t kStride = 512;
    float best = -INFINITY;
    size_t best_start = 0;
    for (size_t start = 0; start < logits.size(); start += kStride)
    {
        float const found = largest_of(logits.data() + start, std::min(kStride, logits.size() - start));
        if (found > best)
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
    return few_.reserve(vocab_size) && order_.reserve(vocab_size) && weights_.resize(vocab_size)
        && block_sums_.resize(blocks) && block_max_.resize(blocks) && sorted_.resize(vocab_size);
}

void Candidates::begin(Span<float const> logits, int64_t k, float temperature)
{
    logits_ = logits;
    temperature_ = temperature;
    few_.clear();
    is_whole_ = k <= 0 || static_cast<uint64_t>(k) >= logits.size();
    if (is_whole_)
    {
        weigh_whole(temperature);
        return;
    }
    take_largest(logits, static_cast<size_t>(k));
    weigh_few(temperature);
}

void Candidates::take_largest(Span<float const> logits, size_t k)
{
    size_t const blocks = block_count(logits.size());
    float least = -INFINITY;
    for (size_t block = 0; block < blocks; ++block)
    {
        block_max_[block] = largest_of(logits.data() + block * kBlock, block_size(logits.size(), block));
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
                (void)few_.push({static_cast<int32_t>(i), logits[i], 0}); // there is room for all
                sorted_[count++] = logits[i];
            }
        }
    }
    float const threshold = kth_largest(sorted_.view().sub(0, count), k);
    size_t kept = 0;
    for (Candidate const& each : few_)
    {
        if (each.logit >= threshold)
        {
            few_[kept++] = each;
        }
    }
    few_.shrink(kept);
}

void Candidates::weigh_whole(float temperature)
{
    size_t const blocks = block_count(logits_.size());
    largest_ = -INFINITY;
    for (size_t block = 0; block < blocks; ++block)
    {
        block_max_[block] = largest_of(logits_.data() + block * kBlock, block_size(logits_.size(), block));
        largest_ = std::max(largest_, block_max_[block]);
    }
    float const top = largest_ / temperature;
    for (size_t block = 0; block < blocks; ++block)
    {
        size_t const first = block * kBlock;
        block_sums_[block] = weigh_block(
            logits_.data() + first, block_size(logits_.size(), block), temperature, top, weights_.data() + first);
    }
}

void Candidates::weigh_few(float temperature)
{
    largest_ = -INFINITY;
    for (Candidate& each : few_)
    {
        largest_ = std::max(largest_, each.logit);
        each.logit = each.logit / temperature;
    }
    float const top = largest_ / temperature;
    float logits[kBlock];
    float weights[kBlock];
    for (size_t first = 0; first < few_.size(); first += kBlock)
    {
        size_t const count = std::min(kBlock, few_.size() - first);
        for (size_t i = 0; i < count; ++i)
        {
            logits[i] = few_[first + i].logit;
        }
        (void)weigh_block(logits, count, 1, top, weights);
        for (size_t i = 0; i < count; ++i)
        {
            few_[first + i].weight = weights[i];
        }
    }
}

/** Cuts the whole vocabulary to what weighs at least so much. */
void Candidates::collect(float least_weight)
{
    few_.clear();
    float const top = largest_ / temperature_;
    for (size_t first = 0; first < logits_.size(); first += kBlock)
    {
        // The likeliest of a block has about its largest weight: to the rounding of exp.
        float const likeliest = block_max_[first / kBlock] / temperature_ - top;
        if (exp_lanes(all_lanes(likeliest))[0] < least_weight * 0.9999F)
        {
            continue;
        }
        for (size_t i = first; i < first + block_size(logits_.size(), first / kBlock); ++i)
        {
            if (weights_[i] >= least_weight)
            {
                (void)few_.push(
                    {static_cast<int32_t>(i), logits_[i] / temperature_, weights_[i]}); // there is room for all
            }
        }
    }
    is_whole_ = false;
}

double Candidates::weight_of_few() const
{
    double sum = 0;
    for (Candidate const& each : few_)
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
    double goal;
    if (is_whole_)
    {
        double sum = 0;
        for (size_t block = 0; block < block_count(logits_.size()); ++block)
        {
            sum += block_sums_[block];
        }
        goal = p * sum;
        // Where the likely ones are few, what is above one of these holds p of the probability.
        for (float const least : {1e-2F, 1e-4F, 1e-6F, kSmallest})
        {
            collect(least);
            if (weight_of_few() >= goal)
            {
                break;
            }
        }
    }
    else
    {
        goal = p * weight_of_few();
    }

    order_.clear();
    for (size_t i = 0; i < few_.size(); ++i)
    {
        (void)order_.push(static_cast<uint32_t>(i)); // there is room for all
    }
    auto const is_before = [this](uint32_t a, uint32_t b) {
        return few_[a].logit > few_[b].logit || (few_[a].logit == few_[b].logit && a < b);
    };
    // A candidate stays if those before it haven't reached the goal yet: the place where they do is looked for in the half
    // that it lies in, again and again.
    size_t first = 0;
    size_t last = order_.size();
    double held = 0; // the weight of those before `first`
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
    size_t kept = 0;
    for (Candidate const& each : few_)
    {
        if (each.weight >= 0)
        {
            few_[kept++] = each;
        }
    }
    few_.shrink(kept);
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
    size_t kept = 0;
    for (Candidate const& each : few_)
    {
        if (each.weight >= p)
        {
            few_[kept++] = each;
        }
    }
    few_.shrink(kept);
}

int32_t Candidates::draw(double u) const
{
    // Rounding at the end never leads to one without weight: the goal lies below the whole sum, and where it is rounded up to
    // a part's sum, the last one there that weighs something is taken.
    size_t first = 0;
    size_t last = size();
    double before = 0;
    double goal;
    if (is_whole_)
    {
        size_t const blocks = block_count(last);
        double sum = 0;
        for (size_t block = 0; block < blocks; ++block)
        {
            sum += block_sums_[block];
        }
        goal = std::min(u * sum, std::nextafter(sum, 0.0));
        size_t block = 0;
        while (block + 1 < blocks && before + block_sums_[block] <= goal)
        {
            before += block_sums_[block++];
        }
        first = block * kBlock;
        last = first + block_size(last, block);
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
    double sum = 0;
    for (size_t block = 0; block < block_count(logits.size()); ++block)
    {
        sum += block_sums_[block];
    }
    double const log_sum = static_cast<double>(largest_) + std::log(sum);
    count = std::min(count, logits.size());
    if (count != 0)
    {
        few_.clear();
        take_largest(logits, count);
        std::partial_sort(few_.begin(), few_.begin() + count, few_.end(), [](Candidate const& a, Candidate const& b) {
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
        return argmax(logits);
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
        id = argmax(logits);
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
