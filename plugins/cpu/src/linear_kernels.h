/** What one set of instructions provides for a projection. */
#pragma once

#include "instructions.h"
#include "linear.h"

namespace qwen_aot::cpu
{

/** Up to so many rows of x, the weight is read row by row; from there on in panels of several rows. */
constexpr int64_t kFewRows = 4;

/** How the weight is read, which decides how x is laid out, and the order of sums. */
enum class Reading
{
    by_row,  // few_rows
    by_panel // many_rows, packed_rows
};

/** M rows of x, rounded to 8 bits block by block: x[m, k] is about codes[m, k] * scales[m, k / block].
 *
 *  A block whose largest magnitude is `a` has the scale a / 127 and codes of -127 … 127, to the nearest, ties to even; below
 *  2^-120 all are 0. Where a block holds an infinity or NaN, its scale is NaN and its codes are 0.
 *
 *  Order of codes: as in x, but for weights of 4 bits. There each eight stand as 0 2 4 6 1 3 5 7, so that four bytes of the
 *  weight meet the four of its lower halves, then those of its upper halves; read by row, each vector's bytes of the
 *  weight meet a vector of the lower halves', then one of the upper halves'.
 *
 *  corrections: what is subtracted for the zero points, as numbers to be added to sums of products. With zero points in the
 *  weight: -sum of codes, else -sum of codes * middle. Read by row, such a sum is of the codes that meet the same four
 *  bytes of a weight's row, else of a block. */
struct RoundedRows
{
    Reading reading = Reading::by_row;
    int64_t M = 0;
    int8_t* codes = nullptr; // [M, code_stride], 0 behind K
    int64_t code_stride = 0;
    float* scales = nullptr; // [M, scale_stride], 0 behind K / block
    int64_t scale_stride = 0;
    int32_t* corrections = nullptr; // [M, correction_stride]
    int64_t correction_stride = 0;

    /** `count` of these rows, from row `first` on. */
    RoundedRows part(int64_t first, int64_t count) const
    {
        RoundedRows rows = *this;
        rows.M = count;
        rows.codes += first * code_stride;
        rows.scales += first * scale_stride;
        rows.corrections += first * correction_stride;
        return rows;
    }
};

/** Functions without state: any threads. All read nothing outside of the matrix's arrays. */
struct LinearKernels
{
    int64_t bytes; // of a vector

    /** Rounds x [K] to row m of `rows`, whose memory may hold anything. */
    void (*round_row)(Linear const& linear, float const* x, int64_t m, RoundedRows const& rows);

    /** For 1 to kFewRows rows: columns begin to end of y [M, width]. */
    void (*few_rows)(Linear const& linear, RoundedRows const& rows, int64_t begin, int64_t end, float* y);

    /** For any number of rows: columns of y from begin * panel_columns(linear) on, before end * panel_columns(linear). */
    void (*many_rows)(Linear const& linear, RoundedRows const& rows, int64_t begin, int64_t end, float* y);

    /** The same of a packed matrix, which it reads as it lies in memory. */
    void (*packed_rows)(Linear const& linear, RoundedRows const& rows, int64_t begin, int64_t end, float* y);

    /** Columns of y that come of one pair of panels. */
    int64_t panel_columns(Linear const& linear) const { return linear.has_swiglu ? bytes / 4 : bytes / 2; }
};

/** Those of the instructions that this process uses; see `instructions`. */
LinearKernels const& linear_kernels();

extern LinearKernels const kLinearPortable;
#if defined(__x86_64__)
extern LinearKernels const kLinearAvx2;
#if QWEN_AOT_HAS_AVX_VNNI
extern LinearKernels const kLinearAvxVnni;
#endif
extern LinearKernels const kLinearAvx512;
extern LinearKernels const kLinearAvx512Vnni;
#elif defined(__aarch64__)
extern LinearKernels const kLinearNeon;
extern LinearKernels const kLinearNeonDot;
#endif

} // namespace qwen_aot::cpu
