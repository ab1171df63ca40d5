/** Random numbers that every reader of bundles draws alike. docs/generation.md has the rules. */
#pragma once

#include <cstdint>

namespace qwen_aot
{

/** One choice's own numbers: PCG64 (XSL-RR 128/64), seeded by numpy's SeedSequence.
 *
 *  Sources: O'Neill, "PCG" (2014), https://www.pcg-random.org; numpy's SeedSequence (O'Neill's seed_seq_fe with a pool of four
 *  words), where choice i has the spawn key (i,). */
class RandomNumbers
{
public:
    /** choice: 0: the seed's own numbers, as of a request of one choice; else those of its child of that number. */
    RandomNumbers(uint64_t seed, uint32_t choice);

    /** In [0, 1): the upper 53 of the next 64 bits. */
    double next();

private:
    __extension__ typedef unsigned __int128 Word;

    Word state_;
    Word increment_;
};

} // namespace qwen_aot
