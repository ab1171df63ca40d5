#include "generation/step_texts.h"

namespace qwen_aot
{
namespace
{

constexpr size_t kLeastCapacity = 4096;

} // namespace

StepTexts::~StepTexts()
{
    while (first_ != nullptr)
    {
        Chunk* const next = first_->next;
        std::free(first_);
        first_ = next;
    }
}

void StepTexts::reset()
{
    for (Chunk* chunk = first_; chunk != nullptr; chunk = chunk->next)
    {
        chunk->size = 0;
    }
    current_ = first_;
}

bool StepTexts::copy(std::string_view text, std::string_view& copied)
{
    size_t const needed = text.size() + 1;
    while (current_ != nullptr && current_->capacity - current_->size < needed && current_->next != nullptr)
    {
        current_ = current_->next;
    }
    if (current_ == nullptr || current_->capacity - current_->size < needed)
    {
        size_t const capacity = needed < kLeastCapacity ? kLeastCapacity : needed;
        auto* const chunk = static_cast<Chunk*>(std::malloc(sizeof(Chunk) + capacity));
        if (chunk == nullptr)
        {
            return false;
        }
        *chunk = {nullptr, capacity, 0};
        (current_ == nullptr ? first_ : current_->next) = chunk;
        current_ = chunk;
    }
    char* const place = current_->bytes() + current_->size;
    if (!text.empty())
    {
        std::memcpy(place, text.data(), text.size());
    }
    place[text.size()] = '\0';
    current_->size += needed;
    copied = {place, text.size()};
    return true;
}

} // namespace qwen_aot
