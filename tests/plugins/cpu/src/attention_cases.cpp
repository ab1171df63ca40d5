/** Computes steps of attention that it reads from standard input.
 *
 *  A case: int64 B, S, H, Hkv, D, C, P, the bytes of a cached number, and the scale as a double; then query, key, value, the
 *  caches of keys and values, cos, sin, cache_length and new_tokens as `AttentionStep` has them, and where numbers have one
 *  byte the scales of keys and of values. The answer: attention and both caches. The instructions are those of
 *  QWEN_AOT_CPU_INSTRUCTIONS. */
#include "attention.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

qwen_aot::cpu::ort::Api qwen_aot::cpu::ort::api; // a pool of this thread alone calls nothing of it

namespace
{

using namespace qwen_aot::cpu;

template <class T>
std::vector<T> read_numbers(int64_t count)
{
    std::vector<T> numbers(static_cast<size_t>(count));
    if (std::fread(numbers.data(), sizeof(T), numbers.size(), stdin) != numbers.size())
    {
        std::fprintf(stderr, "attention_cases: a case ends early\n");
        std::exit(1);
    }
    return numbers;
}

template <class T>
void write_numbers(std::vector<T> const& numbers)
{
    std::fwrite(numbers.data(), sizeof(T), numbers.size(), stdout);
}

struct Case
{
    int64_t B, S, H, Hkv, D, C, P, of_number;
    double scale;
};

template <class T>
void answer(Case const& asked)
{
    auto const query = read_numbers<float>(asked.B * asked.S * asked.H * asked.D);
    auto const key = read_numbers<float>(asked.B * asked.S * asked.Hkv * asked.D);
    auto const value = read_numbers<float>(asked.B * asked.S * asked.Hkv * asked.D);
    auto key_cache = read_numbers<T>(asked.B * asked.Hkv * asked.C * asked.D);
    auto value_cache = read_numbers<T>(asked.B * asked.Hkv * asked.C * asked.D);
    auto const cos = read_numbers<float>(asked.P * asked.D / 2);
    auto const sin = read_numbers<float>(asked.P * asked.D / 2);
    auto const cache_length = read_numbers<int64_t>(asked.B);
    auto const new_tokens = read_numbers<int64_t>(asked.B);
    std::vector<float> attention(query.size());
    AttentionStep<T> step;
    std::vector<float> scales[2], reciprocals[2];
    for (int i = 0; i < 2 && kHasCodes<T>; ++i)
    {
        scales[i] = read_numbers<float>(asked.Hkv * asked.D);
        for (float const scale : scales[i])
        {
            reciprocals[i].push_back(1 / scale);
        }
        Scales& given = i == 0 ? step.key_scales : step.value_scales;
        given.scales = scales[i].data(), given.reciprocals = reciprocals[i].data();
    }
    step.B = asked.B, step.S = asked.S, step.H = asked.H, step.Hkv = asked.Hkv;
    step.D = asked.D, step.C = asked.C, step.P = asked.P;
    step.scale = static_cast<float>(asked.scale);
    step.query = query.data(), step.key = key.data(), step.value = value.data();
    step.query_stride = asked.H * asked.D, step.key_stride = asked.Hkv * asked.D;
    step.key_cache = key_cache.data(), step.value_cache = value_cache.data();
    step.cos = cos.data(), step.sin = sin.data();
    step.cache_length = cache_length.data(), step.new_tokens = new_tokens.data();
    step.attention = attention.data();
    attend(step, Pool(nullptr));
    write_numbers(attention);
    write_numbers(key_cache);
    write_numbers(value_cache);
}

} // namespace

int main()
{
    Case asked;
    while (std::fread(&asked, sizeof asked, 1, stdin) == 1)
    {
        switch (asked.of_number)
        {
        case 1: answer<int8_t>(asked); break;
        case 2: answer<Half>(asked); break;
        default: answer<float>(asked);
        }
    }
    return 0;
}
