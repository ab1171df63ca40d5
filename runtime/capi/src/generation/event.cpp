#include "generation/event.h"

namespace qwen_aot
{

bool Logprobs::begin(size_t width, bool is_first_empty)
{
    release();
    width_ = width;
    is_first_empty_ = is_first_empty;
    return !is_first_empty || (tokens_.resize(1) && top_ids_.resize(width) && top_values_.resize(width));
}

bool Logprobs::reserve_one()
{
    return tokens_.reserve_more(1) && top_ids_.reserve_more(width_) && top_values_.reserve_more(width_);
}

void Logprobs::add(double token, int32_t const* top_ids, double const* top_values)
{
    // There is room: see `reserve_one`.
    (void)tokens_.push(token);
    (void)top_ids_.append(top_ids, width_);
    (void)top_values_.append(top_values, width_);
}

void Logprobs::release()
{
    Array<double>().swap(tokens_);
    Array<int32_t>().swap(top_ids_);
    Array<double>().swap(top_values_);
}

} // namespace qwen_aot
