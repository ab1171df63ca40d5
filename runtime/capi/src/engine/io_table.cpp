#include "engine/io_table.h"

#include "base/text.h"

namespace qwen_aot
{

namespace
{

// In the order of StepInput; the rotary offset's goes on with a number.
constexpr char const* kStepInputNames[kStepInputs] = {"input_ids", "position_ids", "cache_length", "new_tokens",
    "key_positions", "logits_positions", kRotaryOffset, "image_positions", "image_embeddings"};

std::string_view after(std::string_view text, size_t count)
{
    return {text.data() + count, text.size() - count};
}

IoTensor const* find(Array<IoTensor> const& tensors, std::string_view name)
{
    for (IoTensor const& tensor : tensors)
    {
        if (tensor.name.view() == name)
        {
            return &tensor;
        }
    }
    return nullptr;
}

bool is_step_input(IoTensor const& tensor, StepInput input)
{
    std::string_view const name = kStepInputNames[static_cast<size_t>(input)];
    return input == StepInput::rotary_offset ? starts_with(tensor.name.view(), name) : tensor.name.view() == name;
}

/** Whether an input is the rows of images, float32 [I, M]. */
bool is_image_rows(IoTensor const& tensor)
{
    return is_step_input(tensor, StepInput::image_embeddings) && tensor.dtype == DType::float32
        && tensor.shape.size() == 2 && tensor.shape[0] == -'I' && tensor.shape[1] > 0;
}

/** Whether a cache input is of a shape that a cache can have. */
bool is_cache_shape(IoTensor const& tensor)
{
    if (tensor.shape.size() < 3 || tensor.shape.size() > 4)
    {
        return false;
    }
    for (size_t i = 1; i < tensor.shape.size(); ++i)
    {
        if (i != 2 && tensor.shape[i] <= 0)
        {
            return false;
        }
    }
    return tensor.shape[0] == -'B' && (tensor.shape[2] > 0 || tensor.shape[2] == -'C');
}

} // namespace

char const* find_step_input(TextEngine const& engine, StepInput input)
{
    for (IoTensor const& tensor : engine.inputs)
    {
        if (is_step_input(tensor, input))
        {
            return tensor.name.c_str();
        }
    }
    return nullptr;
}

bool is_cache_input(IoTensor const& tensor)
{
    return starts_with(tensor.name.view(), kCachePrefix);
}

Status present_name(std::string_view past, Text& name, Error& error)
{
    Text made;
    QWEN_AOT_NEED(
        made.append(kPresentPrefix) && made.append(after(past, sizeof kCachePrefix - 1)), error, "an output's name");
    name = std::move(made);
    return Status::ok;
}

int64_t image_width(TextEngine const& engine)
{
    for (IoTensor const& tensor : engine.inputs)
    {
        if (is_image_rows(tensor))
        {
            return tensor.shape[1];
        }
    }
    return 0;
}

int64_t fixed_capacity(TextEngine const& engine)
{
    for (IoTensor const& tensor : engine.inputs)
    {
        if (is_cache_input(tensor))
        {
            return tensor.shape[2] > 0 ? tensor.shape[2] : 0;
        }
    }
    return 0;
}

Status check_table(Manifest const& manifest, Error& error)
{
    TextEngine const& engine = manifest.text_engine;
    size_t num_past = 0;
    int64_t const capacity = fixed_capacity(engine);
    for (IoTensor const& tensor : engine.inputs)
    {
        if (is_cache_input(tensor))
        {
            if (!is_cache_shape(tensor) || (tensor.shape[2] > 0 ? tensor.shape[2] : 0) != capacity)
            {
                return error.fail(Status::engine_mismatch,
                    "the bundle's cache input %s has a shape that no cache of this runtime has; accepted: [B, heads, "
                    "C, "
                    "size] or [B, heads, C], with one C for all. Rebuild the bundle",
                    Quoted(tensor.name.view()).c_str());
            }
            ++num_past;
            continue;
        }
        bool is_known = false;
        for (size_t i = 0; i < kStepInputs; ++i)
        {
            is_known = is_known || is_step_input(tensor, static_cast<StepInput>(i));
        }
        bool const is_images = is_step_input(tensor, StepInput::image_embeddings);
        if (!is_known || (is_images ? !is_image_rows(tensor) : tensor.dtype != DType::int64))
        {
            return error.fail(Status::engine_mismatch,
                "the bundle's graph has the input %s of dtype %s, which this runtime can't feed; accepted: "
                "past_key_values.* and cache_length, image_positions, input_ids, key_positions, logits_positions, "
                "new_tokens, position_ids, rotary_offset.N (int64), image_embeddings (float32 [I, size])",
                Quoted(tensor.name.view()).c_str(), dtype_name(tensor.dtype));
        }
    }
    IoTensor const* const logits = find(engine.outputs, "logits");
    bool is_as_expected = logits != nullptr && logits->dtype == DType::float32 && logits->shape.size() == 2
        && logits->shape[0] == -'B' && logits->shape[1] == manifest.vocab_size
        && engine.outputs.size() == num_past + (engine.logits_rows < 0 ? 1 : 2);
    for (IoTensor const& tensor : engine.inputs)
    {
        if (!is_cache_input(tensor))
        {
            continue;
        }
        Text present;
        QWEN_AOT_TRY(present_name(tensor.name.view(), present, error));
        is_as_expected = is_as_expected && find(engine.outputs, present.view()) != nullptr;
    }
    if (!is_as_expected)
    {
        return error.fail(Status::engine_mismatch,
            "the bundle's graph has %zu outputs that aren't those of its inputs; accepted: logits (float32 [B, %lld]) "
            "and a "
            "present.* for each of the %zu past_key_values.*. Rebuild the bundle",
            engine.outputs.size(), static_cast<long long>(manifest.vocab_size), num_past);
    }
    return Status::ok;
}

} // namespace qwen_aot
