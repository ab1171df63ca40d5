/** Inputs and outputs of a plugin as a table of names, types and symbolic shapes, and what is read from it. */
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstdint>
#include <vector>

namespace qwen_aot
{

/** Dimensions, in the letters of docs/architecture.md; `qkv` is (H + 2·Hkv)·D and `HD` is H·D,
 *  `blocks` are those of K that have a scale each. */
enum class Letter : int32_t
{
    B,
    S,
    C,
    P,
    Hkv,
    D,
    qkv,
    HD,
    M,
    F,
    E,
    k,
    N,
    K,
    blocks
};
constexpr int32_t kNumLetters = 15;
constexpr int64_t kUnknown = -1;

/** The extent of each letter, or kUnknown. */
class Extents
{
public:
    Extents() { values_.fill(kUnknown); }
    int64_t get(Letter letter) const { return values_[static_cast<size_t>(letter)]; }
    Extents& set(Letter letter, int64_t value)
    {
        values_[static_cast<size_t>(letter)] = value;
        return *this;
    }
    bool operator==(Extents const& other) const { return values_ == other.values_; }

private:
    std::array<int64_t, kNumLetters> values_;
};

/** One dimension: letter · multiplier / divisor. */
struct Axis
{
    Axis(Letter of, int64_t times = 1, int64_t over = 1)
        : letter(of)
        , multiplier(times)
        , divisor(over)
    {
    }

    Letter letter;
    int64_t multiplier;
    int64_t divisor;
};

enum class Type
{
    compute, // fp16 or bf16, the same for all tensors of it
    float16,
    float32,
    int8,
    int32,
    int64
};

struct Tensor
{
    char const* name;
    Type type;
    std::vector<Axis> axes;
};

/** The compute type is that of the first input. */
struct TensorTable
{
    std::vector<Tensor> inputs;
    std::vector<Tensor> outputs;
    Extents known; // from the plugin's attributes
};

/** Which of a tensor's dimensions: those of a step, or a profile's bounds. */
enum class Bound
{
    smallest,
    largest
};

nvinfer1::Dims const& dims_of(nvinfer1::PluginTensorDesc const& tensor, Bound bound);
nvinfer1::Dims const& dims_of(nvinfer1::DynamicPluginTensorDesc const& tensor, Bound bound);

/** The extents that inputs have, where a dimension of -1 says nothing. Throws Error, with the input's name, if there
 *  are not as many inputs as the table has, or one's rank or a dimension isn't what the table and other inputs say. */
template <class Description>
Extents bind(TensorTable const& table, Description const* inputs, int32_t num_inputs, Bound bound = Bound::largest);

/** Throws Error if a dimension of an input isn't known. */
void check_known(TensorTable const& table, Extents const& extents);

bool is_compute(nvinfer1::DataType type);

/** The TensorRT type of `type` where `compute` is the compute type. */
nvinfer1::DataType data_type(Type type, nvinfer1::DataType compute);

/** Output shapes as expressions of the inputs' dimensions and of constants. Throws Error as `bind` does. */
void output_shapes(TensorTable const& table, nvinfer1::DimsExprs const* inputs, int32_t num_inputs,
    nvinfer1::DimsExprs* outputs, int32_t num_outputs, nvinfer1::IExprBuilder& builder);

/** Throws Error unless the table has as many. what: "inputs". */
void check_count(char const* what, int32_t count, std::vector<Tensor> const& table);

} // namespace qwen_aot
