#include "tensors.h"

#include "log.h"

namespace qwen_aot
{
namespace
{

constexpr char const* kLetterNames[kNumLetters] = {
    "B", "S", "C", "P", "Hkv", "D", "(H+2Hkv)D", "HD", "M", "F", "E", "k", "N", "K", "blocks"};

std::string axis_words(Axis const& axis)
{
    std::string words = axis.multiplier == 1 ? "" : text(axis.multiplier);
    words += kLetterNames[static_cast<size_t>(axis.letter)];
    return axis.divisor == 1 ? words : text(words, '/', axis.divisor);
}

void check_rank(Tensor const& tensor, int32_t rank)
{
    if (rank == static_cast<int32_t>(tensor.axes.size()))
    {
        return;
    }
    std::string shape;
    for (Axis const& axis : tensor.axes)
    {
        shape += text(shape.empty() ? "" : ", ", axis_words(axis));
    }
    throw Error(text(tensor.name, " has ", rank, " dimensions; it must be [", shape, ']'));
}

/** One dimension's part in `bind`: what it says of its letter must not contradict what is known. */
void bind_axis(Tensor const& tensor, size_t index, int64_t dimension, Extents& extents)
{
    Axis const& axis = tensor.axes[index];
    if (dimension == kUnknown)
    {
        return;
    }
    int64_t const known = extents.get(axis.letter);
    if (known == kUnknown && dimension * axis.divisor % axis.multiplier == 0)
    {
        extents.set(axis.letter, dimension * axis.divisor / axis.multiplier);
        return;
    }
    if (known == kUnknown || dimension * axis.divisor != known * axis.multiplier)
    {
        std::string const wanted = known == kUnknown ? text("a multiple of ", axis.multiplier)
                                                     : text("with ", kLetterNames[static_cast<size_t>(axis.letter)],
                                                           ' ', known, " it must be ", axis_words(axis));
        throw Error(text("dimension ", index, " of ", tensor.name, " is ", dimension, "; ", wanted));
    }
}

/** The first input's dimension that is just this letter. */
nvinfer1::IDimensionExpr const* find_expression(
    TensorTable const& table, nvinfer1::DimsExprs const* inputs, Letter letter)
{
    for (size_t input = 0; input < table.inputs.size(); ++input)
    {
        std::vector<Axis> const& axes = table.inputs[input].axes;
        for (size_t i = 0; i < axes.size(); ++i)
        {
            if (axes[i].letter == letter && axes[i].multiplier == 1 && axes[i].divisor == 1)
            {
                return inputs[input].d[i];
            }
        }
    }
    throw Error(text("no input has dimension ", kLetterNames[static_cast<size_t>(letter)]));
}

} // namespace

nvinfer1::Dims const& dims_of(nvinfer1::PluginTensorDesc const& tensor, Bound)
{
    return tensor.dims;
}

nvinfer1::Dims const& dims_of(nvinfer1::DynamicPluginTensorDesc const& tensor, Bound bound)
{
    return bound == Bound::smallest ? tensor.min : tensor.max;
}

template <class Description>
Extents bind(TensorTable const& table, Description const* inputs, int32_t num_inputs, Bound bound)
{
    check_count("inputs", num_inputs, table.inputs);
    Extents extents = table.known;
    for (size_t input = 0; input < table.inputs.size(); ++input)
    {
        Tensor const& tensor = table.inputs[input];
        nvinfer1::Dims const& dims = dims_of(inputs[input], bound);
        check_rank(tensor, dims.nbDims);
        for (size_t i = 0; i < tensor.axes.size(); ++i)
        {
            bind_axis(tensor, i, dims.d[i], extents);
        }
    }
    return extents;
}

template Extents bind(TensorTable const&, nvinfer1::PluginTensorDesc const*, int32_t, Bound);
template Extents bind(TensorTable const&, nvinfer1::DynamicPluginTensorDesc const*, int32_t, Bound);

void check_known(TensorTable const& table, Extents const& extents)
{
    for (Tensor const& tensor : table.inputs)
    {
        for (Axis const& axis : tensor.axes)
        {
            if (extents.get(axis.letter) == kUnknown)
            {
                throw Error(text("dimension ", axis_words(axis), " of ", tensor.name, " isn't known"));
            }
        }
    }
}

bool is_compute(nvinfer1::DataType type)
{
    return type == nvinfer1::DataType::kHALF || type == nvinfer1::DataType::kBF16;
}

nvinfer1::DataType data_type(Type type, nvinfer1::DataType compute)
{
    switch (type)
    {
    case Type::compute: return compute;
    case Type::float16: return nvinfer1::DataType::kHALF;
    case Type::float32: return nvinfer1::DataType::kFLOAT;
    case Type::int8: return nvinfer1::DataType::kINT8;
    case Type::int32: return nvinfer1::DataType::kINT32;
    case Type::int64: return nvinfer1::DataType::kINT64;
    }
    throw Error("a tensor of the table has no type");
}

void output_shapes(TensorTable const& table, nvinfer1::DimsExprs const* inputs, int32_t num_inputs,
    nvinfer1::DimsExprs* outputs, int32_t num_outputs, nvinfer1::IExprBuilder& builder)
{
    check_count("inputs", num_inputs, table.inputs);
    check_count("outputs", num_outputs, table.outputs);
    Extents extents = table.known;
    for (size_t input = 0; input < table.inputs.size(); ++input)
    {
        Tensor const& tensor = table.inputs[input];
        check_rank(tensor, inputs[input].nbDims);
        for (size_t i = 0; i < tensor.axes.size(); ++i)
        {
            nvinfer1::IDimensionExpr const& dimension = *inputs[input].d[i];
            bind_axis(tensor, i, dimension.isConstant() ? dimension.getConstantValue() : kUnknown, extents);
        }
    }
    for (size_t output = 0; output < table.outputs.size(); ++output)
    {
        std::vector<Axis> const& axes = table.outputs[output].axes;
        outputs[output].nbDims = static_cast<int32_t>(axes.size());
        for (size_t i = 0; i < axes.size(); ++i)
        {
            int64_t const known = table.known.get(axes[i].letter);
            outputs[output].d[i] = known == kUnknown ? find_expression(table, inputs, axes[i].letter)
                                                     : builder.constant(known * axes[i].multiplier / axes[i].divisor);
        }
    }
}

void check_count(char const* what, int32_t count, std::vector<Tensor> const& table)
{
    if (count == static_cast<int32_t>(table.size()))
    {
        return;
    }
    std::string names;
    for (Tensor const& tensor : table)
    {
        names += text(names.empty() ? "" : ", ", tensor.name);
    }
    throw Error(
        text("there are ", count, ' ', what, "; with these attributes there must be ", table.size(), ": ", names));
}

} // namespace qwen_aot
