#include "generation/random.h"

#include <cstddef>

namespace qwen_aot
{
namespace
{

constexpr uint64_t kMultiplierHigh = 0x2360ED051FC65DA4;
constexpr uint64_t kMultiplierLow = 0x4385DF649FCCF645;

uint32_t scrambled(uint32_t value, uint32_t& constant, uint32_t factor)
{
    value ^= constant;
    constant *= factor;
    value *= constant;
    return value ^ value >> 16;
}

uint32_t mixed(uint32_t x, uint32_t y)
{
    uint32_t const result = 0xCA01F9DD * x - 0x4973F715 * y;
    return result ^ result >> 16;
}

/** SeedSequence(seed, spawn_key=(choice,)).generate_state(8), and SeedSequence(seed)'s for choice 0. */
void seed_words(uint64_t seed, uint32_t choice, uint32_t (&words)[8])
{
    constexpr uint32_t kPoolFactor = 0x931E8875;
    constexpr uint32_t kStateFactor = 0x58F38DED;
    uint32_t pool[4] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), 0, 0};
    uint32_t constant = 0x43B0D7E5;
    for (uint32_t& word : pool)
    {
        word = scrambled(word, constant, kPoolFactor);
    }
    for (size_t source = 0; source < 4; ++source)
    {
        for (size_t target = 0; target < 4; ++target)
        {
            if (source != target)
            {
                pool[target] = mixed(pool[target], scrambled(pool[source], constant, kPoolFactor));
            }
        }
    }
    if (choice != 0)
    {
        for (uint32_t& word : pool)
        {
            word = mixed(word, scrambled(choice, constant, kPoolFactor));
        }
    }
    constant = 0x8B51F9DD;
    for (size_t i = 0; i < 8; ++i)
    {
        words[i] = scrambled(pool[i % 4], constant, kStateFactor);
    }
}

} // namespace

RandomNumbers::RandomNumbers(uint64_t seed, uint32_t choice)
{
    uint32_t words[8];
    seed_words(seed, choice, words);
    auto const joined = [&](size_t i) {
        return static_cast<Word>(words[2 * i] | static_cast<uint64_t>(words[2 * i + 1]) << 32);
    };
    Word const multiplier = static_cast<Word>(kMultiplierHigh) << 64 | kMultiplierLow;
    increment_ = (joined(2) << 64 | joined(3)) << 1 | 1;
    state_ = (increment_ + (joined(0) << 64 | joined(1))) * multiplier + increment_;
}

double RandomNumbers::next()
{
    Word const multiplier = static_cast<Word>(kMultiplierHigh) << 64 | kMultiplierLow;
    state_ = state_ * multiplier + increment_;
    uint64_t const folded = static_cast<uint64_t>(state_ >> 64) ^ static_cast<uint64_t>(state_);
    auto const turn = static_cast<unsigned>(state_ >> 122);
    uint64_t const bits = folded >> turn | folded << (-turn & 63);
    return static_cast<double>(bits >> 11) * 0x1p-53;
}

} // namespace qwen_aot
