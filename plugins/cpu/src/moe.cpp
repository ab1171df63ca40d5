#include "moe.h"

#include "linear_work.h"

#include <cmath>
#include <cstring>
#include <vector>

namespace qwen_aot::cpu
{
namespace
{

constexpr float kLeastWeight = 1e-8F; // QMoE's
constexpr int64_t kTokensATime = 512; // memory for their projections is that of a step of any length
constexpr int64_t kColumnsTogether =
    64; // of a projection read by row, which stay in the cache for an expert's next tokens
constexpr int64_t kColumnsApart = 16; // whole vectors' rows, see `multiply`

/** One expert of a token. */
struct Choice
{
    int64_t expert = 0;
    float weight = 0;
    int64_t place = -1; // among all choices, an expert's behind one another; -1: it takes no part
};

/** Columns of one expert's projection, in units. */
struct Piece
{
    int64_t expert;
    int64_t begin;
    int64_t end;
};

Linear nth(Linear linear, int64_t expert)
{
    int64_t const rows = expert * linear.N;
    linear.codes += rows * linear.row_bytes();
    linear.scales += rows * linear.blocks;
    linear.zero_points += linear.zero_points != nullptr ? rows * linear.zero_point_bytes() : 0;
    return linear;
}

/** Whether an expert's logit is to be chosen before that of one with a lower number. */
bool is_before(float logit, float lower_ones)
{
    return std::isnan(logit) || logit >= lower_ones;
}

/** A token's experts, the largest logit first. */
void choose(Experts const& experts, float const* logits, float const* weights, Choice* chosen)
{
    int64_t const k = experts.num_experts_per_tok;
    int64_t held = 0;
    for (int64_t e = 0; e < experts.count; ++e)
    {
        int64_t at = held;
        for (; at > 0 && is_before(logits[e], logits[chosen[at - 1].expert]); --at)
        {
            if (at < k)
            {
                chosen[at].expert = chosen[at - 1].expert;
            }
        }
        if (at < k)
        {
            chosen[at].expert = e;
            held += held < k ? 1 : 0;
        }
    }
    float sum = 0;
    for (int64_t j = 0; j < k; ++j)
    {
        chosen[j].weight = weights[chosen[j].expert];
        sum += chosen[j].weight;
    }
    for (int64_t j = 0; experts.norm_topk_prob && j < k; ++j)
    {
        chosen[j].weight = sum == 0 ? 0 : chosen[j].weight / sum;
    }
}

/** Gives each choice its place. Returns where each expert's places begin, and behind them all their number, [E + 1]. */
std::vector<int64_t> give_places(Experts const& experts, std::vector<Choice>& choices)
{
    std::vector<int64_t> first(experts.count + 1);
    auto const takes_part = [](Choice const& choice) { return !(choice.weight <= kLeastWeight); };
    for (Choice const& choice : choices)
    {
        first[choice.expert + 1] += takes_part(choice) ? 1 : 0;
    }
    for (int64_t e = 0; e < experts.count; ++e)
    {
        first[e + 1] += first[e];
    }
    std::vector<int64_t> next(first);
    for (Choice& choice : choices)
    {
        choice.place = takes_part(choice) ? next[choice.expert]++ : -1;
    }
    return first;
}

void copy_row(RoundedRows const& rows, int64_t from, int64_t to)
{
    std::memcpy(rows.codes + to * rows.code_stride, rows.codes + from * rows.code_stride, rows.code_stride);
    std::memcpy(rows.scales + to * rows.scale_stride, rows.scales + from * rows.scale_stride, rows.scale_stride * 4);
    std::memcpy(rows.corrections + to * rows.correction_stride, rows.corrections + from * rows.correction_stride,
        rows.correction_stride * 4);
}

/** Rounds each token to all of its places. */
void round_tokens(Experts const& experts, float const* x, std::vector<Choice> const& choices, int64_t T,
    RoundedRows const& rows, Pool const& pool)
{
    int64_t const k = experts.num_experts_per_tok, M = experts.gate_up.K;
    LinearKernels const& with = linear_kernels();
    each_span(pool, T, kNumbersATask / M, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
        {
            int64_t rounded = -1;
            for (int64_t j = 0; j < k; ++j)
            {
                int64_t const place = choices[t * k + j].place;
                if (place >= 0 && rounded >= 0)
                {
                    copy_row(rows, rounded, place);
                }
                else if (place >= 0)
                {
                    with.round_row(experts.gate_up, x + t * M, place, rows);
                    rounded = place;
                }
            }
        }
    });
}

/** Multiplies the rows of each expert's places with its weight, into y [places, width].
 *
 *  Work is parted by expert and columns, so that each piece is as much as the others, however many tokens chose an expert. */
void multiply_each(
    Linear const& linear, std::vector<int64_t> const& first, RoundedRows const& rows, float* y, Pool const& pool)
{
    LinearKernels const& with = linear_kernels();
    bool const is_by_row = rows.reading == Reading::by_row;
    auto const count = static_cast<int64_t>(first.size()) - 1;
    int64_t const width = linear.width(), rows_a_column = linear.N / width;
    int64_t const columns = is_by_row ? kColumnsApart : with.panel_columns(linear); // of a unit
    int64_t const units = (width + columns - 1) / columns;
    auto const cost = [&](int64_t e) { // of a unit: bytes that are read, or products
        int64_t const tokens = first[e + 1] - first[e];
        return columns * rows_a_column
            * (is_by_row ? (tokens + kFewRows - 1) / kFewRows * linear.row_bytes() : tokens * linear.K);
    };
    int64_t total = 0;
    for (int64_t e = 0; e < count; ++e)
    {
        total += units * cost(e);
    }
    int64_t const wanted = std::max(is_by_row ? kBytesATask : kProductsATask, total / kMostTasks);
    std::vector<Piece> pieces;
    for (int64_t e = 0; e < count; ++e)
    {
        int64_t const span = cost(e) == 0 ? units : std::max<int64_t>(1, (wanted + cost(e) - 1) / cost(e));
        for (int64_t begin = 0; cost(e) > 0 && begin < units; begin += span)
        {
            pieces.push_back({e, begin, std::min(begin + span, units)});
        }
    }
    pool.each(pieces.size(), [&](size_t i) {
        Piece const& piece = pieces[i];
        Linear const weight = nth(linear, piece.expert);
        int64_t const begin = first[piece.expert], end = first[piece.expert + 1];
        if (!is_by_row)
        {
            with.many_rows(weight, rows.part(begin, end - begin), piece.begin, piece.end, y + begin * width);
            return;
        }
        int64_t const last = std::min(piece.end * columns, width);
        for (int64_t n = piece.begin * columns; n < last; n += kColumnsTogether)
        {
            for (int64_t m = begin; m < end; m += kFewRows)
            {
                with.few_rows(weight, rows.part(m, std::min(kFewRows, end - m)), n,
                    std::min(n + kColumnsTogether, last), y + m * width);
            }
        }
    });
}

/** `mix_experts` for tokens whose projections are held at a time. */
void mix(Experts const& experts, Reading reading, float const* x, float const* logits, float const* weights, int64_t T,
    float* y, Pool const& pool)
{
    int64_t const E = experts.count, k = experts.num_experts_per_tok, M = experts.gate_up.K, F = experts.down.K;
    LinearKernels const& with = linear_kernels();
    std::vector<Choice> choices(T * k);
    each_span(pool, T, kNumbersATask / E, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
        {
            choose(experts, logits + t * E, weights + t * E, &choices[t * k]);
        }
    });
    std::vector<int64_t> const first = give_places(experts, choices);
    int64_t const places = first[E];
    std::unique_ptr<float[]> const gated(new float[places * F]), products(new float[places * M]);
    if (places > 0)
    {
        RoundedMemory const inputs(experts.gate_up, reading, places, with.bytes);
        round_tokens(experts, x, choices, T, inputs.rows(), pool);
        multiply_each(experts.gate_up, first, inputs.rows(), gated.get(), pool);
        RoundedMemory const between(experts.down, reading, places, with.bytes);
        each_span(pool, places, kNumbersATask / F, [&](int64_t begin, int64_t end) {
            for (int64_t place = begin; place < end; ++place)
            {
                with.round_row(experts.down, gated.get() + place * F, place, between.rows());
            }
        });
        multiply_each(experts.down, first, between.rows(), products.get(), pool);
    }
    each_span(pool, T, kNumbersATask / (k * M), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
        {
            std::memset(y + t * M, 0, M * sizeof(float));
            for (int64_t j = 0; j < k; ++j)
            {
                Choice const& choice = choices[t * k + j];
                for (int64_t m = 0; choice.place >= 0 && m < M; ++m)
                {
                    y[t * M + m] += choice.weight * products[choice.place * M + m];
                }
            }
        }
    });
}

} // namespace

void mix_experts(Experts const& experts, float const* x, float const* logits, float const* weights, int64_t T, float* y,
    Pool const& pool)
{
    int64_t const E = experts.count, M = experts.gate_up.K;
    Reading const reading = T * experts.num_experts_per_tok <= kFewRows * E ? Reading::by_row : Reading::by_panel;
    for (int64_t t = 0; t < T; t += kTokensATime)
    {
        mix(experts, reading, x + t * M, logits + t * E, weights + t * E, std::min(kTokensATime, T - t), y + t * M,
            pool);
    }
}

} // namespace qwen_aot::cpu
