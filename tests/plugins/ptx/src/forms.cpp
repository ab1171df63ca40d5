// The instructions that are known, in one table: a row for each form, by its whole name.
//
// Source of what each does: PTX ISA 8.8, the section of its name. What it leaves open:
// - `div.full` and `div.approx` (at most 2 units in the last place off), `ex2.approx` (at most 2^-22 of the value off),
//   `sqrt.approx` (at most 2^-23 of it): here the nearest fp32 to the exact result;
// - the order in which `mma` adds: here along k, each sum rounded to fp32;
// - division by zero of integers: here an error.

#include "block.h"
#include "numbers.h"

#include <algorithm>
#include <unordered_map>

namespace ptx
{
namespace
{

// Between the 64 bits of a lane and a type.
template <typename T>
T unpack(uint64_t lane)
{
    if constexpr (std::is_same_v<T, bool>)
        return lane != 0;
    else if constexpr (std::is_same_v<T, float>)
        return bit_cast<float>(static_cast<uint32_t>(lane));
    else if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, BFloat>)
        return {static_cast<uint16_t>(lane)};
    else
        return static_cast<T>(lane);
}

template <typename T>
uint64_t pack(T value)
{
    if constexpr (std::is_same_v<T, bool>)
        return value ? 1 : 0;
    else if constexpr (std::is_same_v<T, float>)
        return bit_cast<uint32_t>(value);
    else if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, BFloat>)
        return value.bits;
    else
        return static_cast<std::make_unsigned_t<T>>(value);
}

template <typename Do>
void for_each(uint32_t mask, Do const& what)
{
    for (uint32_t lane = 0; lane < kLanes; ++lane)
    {
        if ((mask >> lane & 1) != 0)
            what(lane);
    }
}

// A function of one lane's sources, for each lane that executes.
template <auto function, typename Result, typename... Sources, size_t... index>
void map_lanes(Warp& warp, Instruction const& at, Result (*)(Sources...), std::index_sequence<index...>)
{
    uint64_t* const result = warp.lanes(at.destinations[0]);
    std::array<uint64_t const*, sizeof...(Sources)> const sources = {warp.lanes(at.sources[index])...};
    auto const one = [&](uint32_t lane) {
        result[lane] = pack<Result>(function(unpack<Sources>(sources[index][lane])...));
    };
    if (warp.mask() == kAllLanes)
    {
        for (uint32_t lane = 0; lane < kLanes; ++lane)
            one(lane);
    }
    else
        for_each(warp.mask(), one);
}

template <auto function, typename Result, typename... Sources>
void map_lanes(Warp& warp, Instruction const& at, Result (*signature)(Sources...))
{
    map_lanes<function>(warp, at, signature, std::index_sequence_for<Sources...>{});
}

template <auto function>
void run_lanes(Warp& warp, Instruction const& at)
{
    map_lanes<function>(warp, at, function);
}

template <typename Result, typename... Sources>
constexpr uint32_t count_sources(Result (*)(Sources...))
{
    return sizeof...(Sources);
}

// The row of a form that computes each lane by itself.
template <auto function>
constexpr Form lanes(char const* name)
{
    return {name, 1, count_sources(function), run_lanes<function>};
}

// Arithmetic. Integers wrap around.

template <typename T>
using Unsigned = std::make_unsigned_t<T>;

template <typename T>
T add(T a, T b)
{
    if constexpr (std::is_same_v<T, float>)
        return canonical(a + b);
    else
        return static_cast<T>(static_cast<Unsigned<T>>(a) + static_cast<Unsigned<T>>(b));
}

template <typename T>
T subtract(T a, T b)
{
    if constexpr (std::is_same_v<T, float>)
        return canonical(a - b);
    else
        return static_cast<T>(static_cast<Unsigned<T>>(a) - static_cast<Unsigned<T>>(b));
}

template <typename T>
T multiply(T a, T b) // of integers, the low half
{
    if constexpr (std::is_same_v<T, float>)
        return canonical(a * b);
    else
        return static_cast<T>(static_cast<Unsigned<T>>(a) * static_cast<Unsigned<T>>(b));
}

template <typename Wide, typename T>
Wide multiply_wide(T a, T b)
{
    return static_cast<Wide>(a) * static_cast<Wide>(b);
}

template <typename T>
T multiply_add(T a, T b, T c)
{
    return add(multiply(a, b), c);
}

template <typename Wide, typename T>
Wide multiply_add_wide(T a, T b, Wide c)
{
    return add(multiply_wide<Wide, T>(a, b), c);
}

float fused_multiply_add(float a, float b, float c)
{
    return canonical(std::fma(a, b, c));
}

float fused_multiply_add_flushed(float a, float b, float c)
{
    return flushed(fused_multiply_add(flushed(a), flushed(b), flushed(c)));
}

template <typename Short>
Short rounded(float value)
{
    if constexpr (std::is_same_v<Short, Half>)
        return to_half(value);
    else
        return to_bfloat(value);
}

template <typename Short>
Short add_short(Short a, Short b) // fp32 has twice the bits and two more, so that the second rounding does no harm
{
    return rounded<Short>(to_float(a) + to_float(b));
}

template <typename Short>
Short subtract_short(Short a, Short b)
{
    return rounded<Short>(to_float(a) - to_float(b));
}

template <typename Short>
Short fused_multiply_add_short(Short a, Short b, Short c)
{
    return rounded<Short>(fused_to_odd(to_float(a), to_float(b), to_float(c)));
}

// Two of fp16 or bf16 in 32 bits.
template <auto function, typename Short, typename... Pairs>
uint32_t for_both_short(Pairs... pairs)
{
    uint64_t const low = pack(function(unpack<Short>(pairs & 0xffff)...));
    return static_cast<uint32_t>(pack(function(unpack<Short>(pairs >> 16)...)) << 16 | low);
}

// Two of fp32 in 64 bits.
template <auto function, typename... Pairs>
uint64_t for_both(Pairs... pairs)
{
    uint64_t const low = pack(function(unpack<float>(pairs)...));
    return pack(function(unpack<float>(pairs >> 32)...)) << 32 | low;
}

int32_t divide_integers(int32_t a, int32_t b)
{
    if (b == 0)
        throw Trap("an integer is divided by zero");
    return b == -1 ? subtract(0, a) : a / b;
}

int32_t remainder_of_integers(int32_t a, int32_t b)
{
    if (b == 0)
        throw Trap("an integer is divided by zero");
    return b == -1 ? 0 : a % b;
}

float divide(float a, float b)
{
    return canonical(a / b);
}

float divide_approximately(float a, float b) // a large divisor is flushed to infinity
{
    float const magnitude = std::fabs(b);
    bool const is_large = magnitude > 0x1p126F && !std::isinf(magnitude);
    if (is_large)
        return std::isfinite(a) ? divide(std::copysign(0.0F, a), b) : canonical(NAN);
    return divide(a, b);
}

float exponential(float a)
{
    return canonical(static_cast<float>(std::exp2(static_cast<double>(a))));
}

float exponential_flushed(float a)
{
    return flushed(exponential(flushed(a)));
}

float square_root_flushed(float a)
{
    return canonical(std::sqrt(flushed(a))); // of a normal number it is one
}

// Of a number and NaN, the number; -0 is below +0.
float smaller(float a, float b)
{
    if (std::isnan(a) || std::isnan(b))
        return canonical(std::isnan(a) ? b : a);
    return a < b || (a == b && std::signbit(a)) ? a : b;
}

float larger(float a, float b)
{
    if (std::isnan(a) || std::isnan(b))
        return canonical(std::isnan(a) ? b : a);
    return a > b || (a == b && !std::signbit(a)) ? a : b;
}

float largest(float a, float b, float c)
{
    return larger(larger(a, b), c);
}

template <typename T>
T smaller_integer(T a, T b)
{
    return std::min(a, b);
}

template <typename T>
T larger_integer(T a, T b)
{
    return std::max(a, b);
}

template <typename T>
T negate(T a)
{
    if constexpr (std::is_same_v<T, float>)
        return bit_cast<float>(bit_cast<uint32_t>(a) ^ 0x80000000U);
    else
        return subtract(T{0}, a);
}

float magnitude(float a)
{
    return bit_cast<float>(bit_cast<uint32_t>(a) & 0x7fffffffU);
}

// Bits.

template <typename T>
T bit_and(T a, T b)
{
    return static_cast<T>(a & b);
}

template <typename T>
T bit_or(T a, T b)
{
    return static_cast<T>(a | b);
}

template <typename T>
T bit_xor(T a, T b)
{
    return static_cast<T>(a ^ b);
}

template <typename T>
T shift_left(T a, uint32_t b)
{
    return b >= 8 * sizeof(T) ? T{0} : static_cast<T>(a << b);
}

template <typename T>
T shift_right(T a, uint32_t b)
{
    return static_cast<T>(a >> std::min<uint32_t>(b, 8 * sizeof(T) - 1) >> (b >= 8 * sizeof(T) ? 1 : 0));
}

uint32_t count_bits(uint32_t a)
{
    return static_cast<uint32_t>(__builtin_popcount(a));
}

// `length` bits of a from `position` on; above, and where a has none, the sign of those that are there.
template <typename T>
T extract_bits(T a, uint32_t position, uint32_t length)
{
    position &= 0xff;
    length &= 0xff;
    auto const bit = [&](uint32_t at) { return static_cast<uint32_t>(a) >> at & 1; };
    uint32_t const sign = std::is_signed_v<T> && length != 0 ? bit(std::min(position + length - 1, 31U)) : 0;
    uint32_t result = 0;
    for (uint32_t at = 0; at < 32; ++at)
        result |= (at < length && position + at < 32 ? bit(position + at) : sign) << at;
    return static_cast<T>(result);
}

// Bytes of b, a by the digits of c; a digit of 8 and more gives its byte's sign.
uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t c)
{
    uint64_t const bytes = uint64_t{b} << 32 | a;
    uint32_t result = 0;
    for (uint32_t at = 0; at < 4; ++at)
    {
        uint32_t const digit = c >> 4 * at & 0xf;
        uint32_t const byte = bytes >> 8 * (digit & 7) & 0xff;
        result |= ((digit & 8) == 0 ? byte : byte >> 7 != 0 ? 0xffU : 0U) << 8 * at;
    }
    return result;
}

// Choices.

template <typename T>
T identity(T a)
{
    return a;
}

template <typename T>
T select(T a, T b, bool is_first)
{
    return is_first ? a : b;
}

template <typename T>
bool is_equal(T a, T b)
{
    return a == b;
}

template <typename T>
bool is_unequal(T a, T b)
{
    return a != b;
}

template <typename T>
bool is_less(T a, T b)
{
    return a < b;
}

template <typename T>
bool is_at_most(T a, T b)
{
    return a <= b;
}

template <typename T>
bool is_greater(T a, T b)
{
    return a > b;
}

template <typename T>
bool is_at_least(T a, T b)
{
    return a >= b;
}

// Conversions.

template <typename To, typename From>
To convert_integer(From a)
{
    return static_cast<To>(a);
}

template <typename From>
float widen(From a)
{
    return to_float(a);
}

// A short value and fp32, which are added as fp32.
template <typename From>
float add_mixed(From a, float b)
{
    return add<float>(to_float(a), b);
}

Half convert_to_half(int16_t a)
{
    return to_half(static_cast<float>(a));
}

BFloat convert_to_bfloat(int16_t a)
{
    return to_bfloat(static_cast<float>(a));
}

template <typename From>
float convert_to_float(From a)
{
    return static_cast<float>(a);
}

uint32_t pack_halves(float upper, float lower)
{
    return static_cast<uint32_t>(to_half(upper).bits) << 16 | to_half(lower).bits;
}

uint32_t pack_bfloats(float upper, float lower)
{
    return static_cast<uint32_t>(to_bfloat(upper).bits) << 16 | to_bfloat(lower).bits;
}

// Towards zero; what doesn't fit becomes the nearest that does, NaN 0.
template <typename To>
To truncate(float a)
{
    if (std::isnan(a))
        return 0;
    float const low = static_cast<float>(std::numeric_limits<To>::min());
    float const high = static_cast<float>(std::numeric_limits<To>::max());
    return static_cast<To>(std::trunc(std::min(std::max(a, low), high)));
}

// Vectors of two, of which a whole register is made.

template <typename Half, typename Whole>
void split(Warp& warp, Instruction const& at)
{
    for_each(warp.mask(), [&](uint32_t lane) {
        uint64_t const whole = warp.lanes(at.sources[0])[lane];
        warp.lanes(at.destinations[0])[lane] = static_cast<Half>(whole);
        warp.lanes(at.destinations[1])[lane] = static_cast<Half>(whole >> 8 * sizeof(Half));
    });
    static_assert(sizeof(Whole) == 2 * sizeof(Half));
}

template <typename Half, typename Whole>
Whole join(Half low, Half high)
{
    return static_cast<Whole>(static_cast<Whole>(high) << 8 * sizeof(Half) | low);
}

// Memory. Sources of a load are its address, of a store its address and values.

enum class Space : uint8_t
{
    parameter,
    global,
    shared,
};

template <Space space, typename T, uint32_t count>
void load(Warp& warp, Instruction const& at)
{
    constexpr uint32_t kBytes = sizeof(T) * count;
    uint64_t const* const addresses = warp.lanes(at.sources[0]);
    for_each(warp.mask(), [&](uint32_t lane) {
        std::array<T, count> values;
        uint64_t const address = addresses[lane] + static_cast<uint64_t>(at.offsets[0]);
        if constexpr (space == Space::parameter)
            warp.read_parameter(address, kBytes, values.data());
        else if constexpr (space == Space::global)
            warp.read_global(lane, address, kBytes, kBytes, values.data());
        else
            warp.read_shared(lane, static_cast<uint32_t>(address), kBytes, kBytes, values.data());
        for (uint32_t index = 0; index < count; ++index)
        {
            // A signed value is widened to its register.
            auto const value = static_cast<uint64_t>(values[index]);
            warp.lanes(at.destinations[index])[lane] = value & at.destination_mask;
        }
    });
}

template <Space space, typename T, uint32_t count>
void store(Warp& warp, Instruction const& at)
{
    constexpr uint32_t kBytes = sizeof(T) * count;
    uint64_t const* const addresses = warp.lanes(at.sources[0]);
    for_each(warp.mask(), [&](uint32_t lane) {
        std::array<T, count> values;
        for (uint32_t index = 0; index < count; ++index)
            values[index] = static_cast<T>(warp.lanes(at.sources[1 + index])[lane]);
        uint64_t const address = addresses[lane] + static_cast<uint64_t>(at.offsets[0]);
        if constexpr (space == Space::global)
            warp.write_global(lane, address, kBytes, kBytes, values.data());
        else
            warp.write_shared(lane, static_cast<uint32_t>(address), kBytes, kBytes, values.data());
    });
}

template <Space space, typename T, uint32_t count>
constexpr Form load_form(char const* name)
{
    return {name, count, 1, load<space, T, count>};
}

template <Space space, typename T, uint32_t count>
constexpr Form store_form(char const* name)
{
    return {name, 0, 1 + count, store<space, T, count>};
}

// Sources: destination and source address, bytes there, bytes here; what is missing becomes zeros.
void copy_async(Warp& warp, Instruction const& at)
{
    for_each(warp.mask(), [&](uint32_t lane) {
        auto const value = [&](uint32_t index) { return warp.lanes(at.sources[index])[lane]; };
        uint64_t const to = value(0) + static_cast<uint64_t>(at.offsets[0]);
        uint64_t const from = value(1) + static_cast<uint64_t>(at.offsets[1]);
        auto const bytes = static_cast<uint32_t>(value(2));
        if (bytes != 4 && bytes != 8 && bytes != 16)
            throw Trap("an asynchronous copy is of 4, 8 or 16 bytes");
        warp.copy_async(lane, static_cast<uint32_t>(to), from, bytes, static_cast<uint32_t>(value(3)));
    });
}

void commit_copies(Warp& warp, Instruction const&)
{
    warp.require_all();
    warp.commit_copies();
}

void wait_for_copies(Warp& warp, Instruction const& at)
{
    warp.require_all();
    warp.wait_for_copies(warp.uniform(at.sources[0]));
}

// Rows of `count` matrices of 8 x 8 two-byte elements: those of matrix i lie where lanes 8 i ... 8 i + 7 point.
template <uint32_t count, bool is_transposed>
void load_matrices(Warp& warp, Instruction const& at)
{
    if (warp.mask() != kAllLanes)
        warp.fail("only some of a warp's threads get here");
    for (uint32_t matrix = 0; matrix < count; ++matrix)
    {
        std::array<std::array<uint16_t, 8>, 8> element;
        for (uint32_t row = 0; row < 8; ++row)
        {
            uint32_t const lane = 8 * matrix + row;
            uint64_t const address = warp.lanes(at.sources[0])[lane] + static_cast<uint64_t>(at.offsets[0]);
            warp.read_shared(lane, static_cast<uint32_t>(address), 16, 16, element[row].data());
        }
        uint64_t* const result = warp.lanes(at.destinations[matrix]);
        for (uint32_t lane = 0; lane < kLanes; ++lane)
        {
            uint32_t const row = lane / 4, column = 2 * (lane % 4);
            uint16_t const low = is_transposed ? element[column][row] : element[row][column];
            uint16_t const high = is_transposed ? element[column + 1][row] : element[row][column + 1];
            result[lane] = static_cast<uint32_t>(high) << 16 | low;
        }
    }
}

// The other way round.
template <uint32_t count, bool is_transposed>
void store_matrices(Warp& warp, Instruction const& at)
{
    if (warp.mask() != kAllLanes)
        warp.fail("only some of a warp's threads get here");
    for (uint32_t matrix = 0; matrix < count; ++matrix)
    {
        std::array<std::array<uint16_t, 8>, 8> element;
        for (uint32_t lane = 0; lane < kLanes; ++lane)
        {
            uint32_t const row = lane / 4, column = 2 * (lane % 4);
            uint64_t const pair = warp.lanes(at.sources[1 + matrix])[lane];
            (is_transposed ? element[column][row] : element[row][column]) = static_cast<uint16_t>(pair);
            (is_transposed ? element[column + 1][row] : element[row][column + 1]) = static_cast<uint16_t>(pair >> 16);
        }
        for (uint32_t row = 0; row < 8; ++row)
        {
            uint32_t const lane = 8 * matrix + row;
            uint64_t const address = warp.lanes(at.sources[0])[lane] + static_cast<uint64_t>(at.offsets[0]);
            warp.write_shared(lane, static_cast<uint32_t>(address), 16, 16, element[row].data());
        }
    }
}

// D = A B + C, A 16 x 16, B 16 x 8. Source of who holds which element: "Matrix Fragments for mma.m16n8k16".
template <typename T>
void multiply_matrices(Warp& warp, Instruction const& at)
{
    if (warp.mask() != kAllLanes)
        warp.fail("only some of a warp's threads get here");
    float a[16][16], b[16][8], c[16][8];
    auto const value = [&](uint32_t source, uint32_t lane) { return warp.lanes(at.sources[source])[lane]; };
    for (uint32_t lane = 0; lane < kLanes; ++lane)
    {
        uint32_t const group = lane / 4, member = lane % 4;
        for (uint32_t index = 0; index < 8; ++index)
        {
            uint32_t const row = group + (index / 2 % 2 == 0 ? 0 : 8);
            uint32_t const column = 2 * member + index % 2 + (index < 4 ? 0 : 8);
            a[row][column] = to_float(unpack<T>(value(index / 2, lane) >> 16 * (index % 2)));
        }
        for (uint32_t index = 0; index < 4; ++index)
        {
            uint32_t const row = 2 * member + index % 2 + (index < 2 ? 0 : 8);
            b[row][group] = to_float(unpack<T>(value(4 + index / 2, lane) >> 16 * (index % 2)));
            c[group + (index < 2 ? 0 : 8)][2 * member + index % 2] = unpack<float>(value(6 + index, lane));
        }
    }
    for (uint32_t row = 0; row < 16; ++row)
    {
        for (uint32_t k = 0; k < 16; ++k)
        {
            for (uint32_t column = 0; column < 8; ++column)
                c[row][column] += a[row][k] * b[k][column]; // the product is exact
        }
    }
    for (uint32_t lane = 0; lane < kLanes; ++lane)
    {
        for (uint32_t index = 0; index < 4; ++index)
        {
            float const result = c[lane / 4 + (index < 2 ? 0 : 8)][2 * (lane % 4) + index % 2];
            warp.lanes(at.destinations[index])[lane] = pack(canonical(result));
        }
    }
}

// Between the threads of a warp. Sources: value, lane, clamp and segment, members.

enum class Shuffle : uint8_t
{
    up,
    butterfly,
    index,
};

template <Shuffle mode>
void shuffle(Warp& warp, Instruction const& at)
{
    if (static_cast<uint32_t>(warp.uniform(at.sources[3])) != warp.mask())
        warp.fail("the threads that get here aren't the members");
    std::array<uint64_t, kLanes> values;
    std::copy_n(warp.lanes(at.sources[0]), kLanes, values.begin());
    for_each(warp.mask(), [&](uint32_t lane) {
        auto const b = static_cast<uint32_t>(warp.lanes(at.sources[1])[lane]) & 0x1f;
        auto const c = static_cast<uint32_t>(warp.lanes(at.sources[2])[lane]);
        uint32_t const segment = c >> 8 & 0x1f, clamp = c & 0x1f;
        uint32_t const highest = (lane & segment) | (clamp & ~segment), lowest = lane & segment;
        uint32_t from = 0;
        bool is_inside = false;
        if constexpr (mode == Shuffle::up)
        {
            from = lane - b;
            is_inside = static_cast<int32_t>(from) >= static_cast<int32_t>(highest);
        }
        else
        {
            from = mode == Shuffle::butterfly ? lane ^ b : lowest | (b & ~segment);
            is_inside = from <= highest;
        }
        uint32_t const source = is_inside ? from : lane;
        if ((warp.mask() >> source & 1) == 0)
            warp.fail("a value is taken from a thread that isn't here");
        warp.lanes(at.destinations[0])[lane] = static_cast<uint32_t>(values[source]);
    });
}

template <typename T, auto operation>
void reduce(Warp& warp, Instruction const& at)
{
    if (static_cast<uint32_t>(warp.uniform(at.sources[1])) != warp.mask())
        warp.fail("the threads that get here aren't the members");
    bool is_first = true;
    T result{};
    for_each(warp.mask(), [&](uint32_t lane) {
        T const value = unpack<T>(warp.lanes(at.sources[0])[lane]);
        result = is_first ? value : operation(result, value);
        is_first = false;
    });
    for_each(warp.mask(), [&](uint32_t lane) { warp.lanes(at.destinations[0])[lane] = pack(result); });
}

// clang-format off
constexpr Form kForms[] = {
    lanes<magnitude>("abs.f32"),
    lanes<for_both_short<add_short<Half>, Half, uint32_t, uint32_t>>("add.f16x2"),
    lanes<add<float>>("add.f32"),
    lanes<for_both<add<float>, uint64_t, uint64_t>>("add.f32x2"),
    lanes<add_mixed<BFloat>>("add.rn.f32.bf16"),
    lanes<add_mixed<Half>>("add.rn.f32.f16"),
    lanes<add<int32_t>>("add.s32"),
    lanes<add<int64_t>>("add.s64"),
    lanes<bit_and<uint16_t>>("and.b16"),
    lanes<bit_and<uint32_t>>("and.b32"),
    lanes<bit_and<bool>>("and.pred"),
    lanes<extract_bits<int32_t>>("bfe.s32"),
    lanes<extract_bits<uint32_t>>("bfe.u32"),
    lanes<convert_integer<int16_t, int8_t>>("cvt.s16.s8"),
    lanes<convert_integer<int64_t, int32_t>>("cvt.s64.s32"),
    lanes<convert_integer<uint16_t, uint32_t>>("cvt.u16.u32"),
    lanes<convert_integer<uint32_t, uint16_t>>("cvt.u32.u16"),
    lanes<convert_integer<uint32_t, uint64_t>>("cvt.u32.u64"),
    lanes<convert_integer<uint64_t, uint32_t>>("cvt.u64.u32"),
    lanes<convert_to_bfloat>("cvt.rn.bf16.s16"),
    lanes<convert_to_half>("cvt.rn.f16.s16"),
    lanes<convert_to_float<int16_t>>("cvt.rn.f32.s16"),
    lanes<convert_to_float<int32_t>>("cvt.rn.f32.s32"),
    lanes<pack_bfloats>("cvt.rn.bf16x2.f32"),
    lanes<pack_halves>("cvt.rn.f16x2.f32"),
    lanes<to_bfloat>("cvt.rn.bf16.f32"),
    lanes<to_half>("cvt.rn.f16.f32"),
    lanes<truncate<int16_t>>("cvt.rzi.s16.f32"),
    lanes<widen<BFloat>>("cvt.f32.bf16"),
    lanes<widen<Half>>("cvt.f32.f16"),
    lanes<divide>("div.full.f32"),
    lanes<divide_approximately>("div.approx.f32"),
    lanes<divide_integers>("div.s32"),
    lanes<remainder_of_integers>("rem.s32"),
    lanes<exponential>("ex2.approx.f32"),
    lanes<exponential_flushed>("ex2.approx.ftz.f32"),
    lanes<fused_multiply_add_short<BFloat>>("fma.rn.bf16"),
    lanes<for_both_short<fused_multiply_add_short<BFloat>, BFloat, uint32_t, uint32_t, uint32_t>>("fma.rn.bf16x2"),
    lanes<for_both_short<fused_multiply_add_short<Half>, Half, uint32_t, uint32_t, uint32_t>>("fma.rn.f16x2"),
    lanes<fused_multiply_add>("fma.rn.f32"),
    lanes<fused_multiply_add_flushed>("fma.rn.ftz.f32"),
    lanes<for_both<fused_multiply_add, uint64_t, uint64_t, uint64_t>>("fma.rn.f32x2"),
    lanes<join<uint16_t, uint32_t>>("mov.b32 d, {}"),
    lanes<join<uint32_t, uint64_t>>("mov.b64 d, {}"),
    lanes<larger>("max.f32"),
    lanes<largest>("max.f32"),
    lanes<larger_integer<int32_t>>("max.s32"),
    lanes<smaller>("min.f32"),
    lanes<smaller_integer<int32_t>>("min.s32"),
    lanes<multiply_add<int32_t>>("mad.lo.s32"),
    lanes<multiply_add<int64_t>>("mad.lo.s64"),
    lanes<multiply_add_wide<int64_t, int32_t>>("mad.wide.s32"),
    lanes<multiply_add_wide<uint64_t, uint32_t>>("mad.wide.u32"),
    lanes<multiply<float>>("mul.f32"),
    lanes<for_both<multiply<float>, uint64_t, uint64_t>>("mul.f32x2"),
    lanes<multiply<int32_t>>("mul.lo.s32"),
    lanes<multiply<int64_t>>("mul.lo.s64"),
    lanes<multiply_wide<int64_t, int32_t>>("mul.wide.s32"),
    lanes<multiply_wide<uint64_t, uint32_t>>("mul.wide.u32"),
    lanes<identity<bool>>("mov.pred"),
    lanes<identity<uint16_t>>("mov.b16"),
    lanes<identity<uint16_t>>("mov.u16"),
    lanes<identity<uint32_t>>("mov.b32"),
    lanes<identity<uint32_t>>("mov.u32"),
    lanes<identity<uint64_t>>("mov.b64"),
    lanes<identity<uint64_t>>("mov.u64"),
    lanes<negate<float>>("neg.f32"),
    lanes<negate<int32_t>>("neg.s32"),
    lanes<bit_or<uint16_t>>("or.b16"),
    lanes<bit_or<uint32_t>>("or.b32"),
    lanes<bit_or<uint64_t>>("or.b64"),
    lanes<count_bits>("popc.b32"),
    lanes<permute_bytes>("prmt.b32"),
    lanes<select<uint16_t>>("selp.b16"),
    lanes<select<uint32_t>>("selp.b32"),
    lanes<select<uint64_t>>("selp.b64"),
    lanes<select<float>>("selp.f32"),
    lanes<is_equal<float>>("setp.eq.f32"),
    lanes<is_equal<uint32_t>>("setp.eq.b32"),
    lanes<is_equal<uint64_t>>("setp.eq.b64"),
    lanes<is_unequal<uint16_t>>("setp.ne.b16"),
    lanes<is_unequal<uint32_t>>("setp.ne.b32"),
    lanes<is_unequal<uint64_t>>("setp.ne.b64"),
    lanes<is_greater<float>>("setp.gt.f32"),
    lanes<is_greater<int32_t>>("setp.gt.s32"),
    lanes<is_greater<int64_t>>("setp.gt.s64"),
    lanes<is_greater<uint32_t>>("setp.gt.u32"),
    lanes<is_at_least<int32_t>>("setp.ge.s32"),
    lanes<is_at_most<int32_t>>("setp.le.s32"),
    lanes<is_less<float>>("setp.lt.f32"),
    lanes<is_less<int32_t>>("setp.lt.s32"),
    lanes<is_less<int64_t>>("setp.lt.s64"),
    lanes<is_less<uint32_t>>("setp.lt.u32"),
    lanes<is_less<uint64_t>>("setp.lt.u64"),
    lanes<shift_left<uint16_t>>("shl.b16"),
    lanes<shift_left<uint32_t>>("shl.b32"),
    lanes<shift_left<uint64_t>>("shl.b64"),
    lanes<shift_right<int32_t>>("shr.s32"),
    lanes<shift_right<uint32_t>>("shr.u32"),
    lanes<square_root_flushed>("sqrt.approx.ftz.f32"),
    lanes<subtract_short<BFloat>>("sub.bf16"),
    lanes<subtract_short<Half>>("sub.f16"),
    lanes<subtract<float>>("sub.f32"),
    lanes<for_both<subtract<float>, uint64_t, uint64_t>>("sub.f32x2"),
    lanes<subtract<int32_t>>("sub.s32"),
    lanes<subtract<int64_t>>("sub.s64"),
    lanes<bit_xor<uint32_t>>("xor.b32"),
    {"mov.b32 {}, d", 2, 1, split<uint16_t, uint32_t>},
    {"mov.b64 {}, d", 2, 1, split<uint32_t, uint64_t>},

    load_form<Space::parameter, uint32_t, 1>("ld.param.b32"),
    load_form<Space::parameter, int32_t, 1>("ld.param.s32"),
    load_form<Space::parameter, uint64_t, 1>("ld.param.b64"),
    load_form<Space::global, uint8_t, 1>("ld.global.b8"),
    load_form<Space::global, uint16_t, 1>("ld.global.b16"),
    load_form<Space::global, uint32_t, 1>("ld.global.b32"),
    load_form<Space::global, uint64_t, 1>("ld.global.b64"),
    load_form<Space::global, uint32_t, 4>("ld.global.v4.b32"),
    load_form<Space::shared, uint8_t, 1>("ld.shared.b8"),
    load_form<Space::shared, uint16_t, 1>("ld.shared.b16"),
    load_form<Space::shared, uint32_t, 1>("ld.shared.b32"),
    load_form<Space::shared, uint64_t, 1>("ld.shared.b64"),
    load_form<Space::shared, uint16_t, 2>("ld.shared.v2.b16"),
    load_form<Space::shared, uint32_t, 2>("ld.shared.v2.b32"),
    load_form<Space::shared, uint64_t, 2>("ld.shared.v2.b64"),
    load_form<Space::shared, uint16_t, 4>("ld.shared.v4.b16"),
    load_form<Space::shared, uint32_t, 4>("ld.shared.v4.b32"),
    store_form<Space::global, uint16_t, 1>("st.global.b16"),
    store_form<Space::global, uint32_t, 1>("st.global.b32"),
    store_form<Space::global, uint64_t, 1>("st.global.b64"),
    store_form<Space::global, uint32_t, 2>("st.global.v2.b32"),
    store_form<Space::global, uint32_t, 4>("st.global.v4.b32"),
    store_form<Space::shared, uint16_t, 1>("st.shared.b16"),
    store_form<Space::shared, uint32_t, 1>("st.shared.b32"),
    store_form<Space::shared, uint32_t, 1>("st.shared::cta.b32"),
    store_form<Space::shared, uint8_t, 2>("st.shared.v2.b8"),
    store_form<Space::shared, uint32_t, 2>("st.shared.v2.b32"),
    store_form<Space::shared, uint64_t, 2>("st.shared.v2.b64"),
    store_form<Space::shared, uint32_t, 4>("st.shared.v4.b32"),

    {"cp.async.ca.shared.global", 0, 4, copy_async},
    {"cp.async.cg.shared.global", 0, 4, copy_async},
    {"cp.async.commit_group", 0, 0, commit_copies},
    {"cp.async.wait_group", 0, 1, wait_for_copies},
    {"ldmatrix.sync.aligned.m8n8.x1.shared.b16", 1, 1, load_matrices<1, false>},
    {"ldmatrix.sync.aligned.m8n8.x2.shared.b16", 2, 1, load_matrices<2, false>},
    {"ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16", 2, 1, load_matrices<2, true>},
    {"ldmatrix.sync.aligned.m8n8.x4.shared.b16", 4, 1, load_matrices<4, false>},
    {"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", 4, 1, load_matrices<4, true>},
    {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", 4, 10, multiply_matrices<BFloat>},
    {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", 4, 10, multiply_matrices<Half>},
    {"redux.sync.add.s32", 1, 2, reduce<int32_t, add<int32_t>>},
    {"redux.sync.max.f32", 1, 2, reduce<float, larger>},
    {"redux.sync.min.s32", 1, 2, reduce<int32_t, smaller_integer<int32_t>>},
    {"stmatrix.sync.aligned.m8n8.x1.shared.b16", 0, 2, store_matrices<1, false>},
    {"stmatrix.sync.aligned.m8n8.x2.shared.b16", 0, 3, store_matrices<2, false>},
    {"stmatrix.sync.aligned.m8n8.x2.trans.shared.b16", 0, 3, store_matrices<2, true>},
    {"stmatrix.sync.aligned.m8n8.x4.shared.b16", 0, 5, store_matrices<4, false>},
    {"stmatrix.sync.aligned.m8n8.x4.trans.shared.b16", 0, 5, store_matrices<4, true>},
    {"shfl.sync.bfly.b32", 1, 4, shuffle<Shuffle::butterfly>},
    {"shfl.sync.idx.b32", 1, 4, shuffle<Shuffle::index>},
    {"shfl.sync.up.b32", 1, 4, shuffle<Shuffle::up>},

    {"bar.sync", 0, 1, nullptr, Effect::barrier},
    {"bra", 0, 0, nullptr, Effect::branch},
    {"bra.uni", 0, 0, nullptr, Effect::uniform_branch},
    {"ret", 0, 0, nullptr, Effect::exit},
};
// clang-format on

} // namespace

std::vector<Form const*> find_forms(std::string_view name)
{
    static std::unordered_map<std::string_view, std::vector<Form const*>> const kByName = [] {
        std::unordered_map<std::string_view, std::vector<Form const*>> result;
        for (Form const& form : kForms)
            result[form.name].push_back(&form);
        return result;
    }();
    auto const found = kByName.find(name);
    return found == kByName.end() ? std::vector<Form const*>{} : found->second;
}

std::vector<Form const*> all_forms()
{
    std::vector<Form const*> result;
    for (Form const& form : kForms)
        result.push_back(&form);
    return result;
}

} // namespace ptx
