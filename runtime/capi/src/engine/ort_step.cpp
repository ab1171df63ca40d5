#include "engine/ort_step.h"

#include <cstdio>
#include <cstdlib>

namespace qwen_aot::ort
{

namespace
{

// The attention window W is rounded up, so that its input is bound anew every 64 tokens, not at each.
constexpr int64_t kWindowStep = 64;

constexpr size_t kAlignment = 64; // bytes: a cache line and an AVX-512 register

constexpr char kRebuild[] = "Rebuild the bundle";

} // namespace

ElementType element_type(DType type)
{
    switch (type)
    {
    case DType::int64: return kInt64;
    case DType::int32: return kInt32;
    case DType::float32: return kFloat;
    case DType::float16: return kFloat16;
    case DType::bfloat16: return kBFloat16;
    case DType::int8: return kInt8;
    }
    return kFloat;
}

OrtStep::~OrtStep()
{
    binding_.reset(); // it refers to the memory below
    std::free(logits_memory_);
}

Status OrtStep::open(int64_t max_rows, int64_t max_tokens, Error& error)
{
    for (size_t i = 0; i < kStepInputs; ++i)
    {
        input_names_[i] = find_step_input(manifest_.text_engine, static_cast<StepInput>(i));
    }
    for (size_t i = 0; i < cache_.size(); ++i)
    {
        IoTensor const& tensor = cache_.tensor(i);
        CacheNames names{tensor.name.c_str(), Text(), element_type(tensor.dtype)};
        QWEN_AOT_TRY(present_name(tensor.name.view(), names.present, error));
        QWEN_AOT_NEED(cache_names_.push(std::move(names)), error, "the names of the cache");
    }
    auto const rows = static_cast<size_t>(max_rows);
    size_t count = 0;
    size_t bytes = 0;
    if (__builtin_mul_overflow(rows, static_cast<size_t>(max_tokens), &count)
        || __builtin_mul_overflow(rows, static_cast<size_t>(manifest_.vocab_size) * sizeof(float), &bytes)
        || bytes > static_cast<size_t>(-1) / 2)
    {
        return error.no_memory("the inputs and logits of a step");
    }
    // Not touched before it is written: rows that are never used take no room.
    logits_memory_ = std::calloc(bytes + kAlignment, 1);
    if (logits_memory_ == nullptr || !new_tokens_.resize(rows) || !input_ids_.resize(count)
        || !position_ids_.resize(count))
    {
        return error.fail(Status::out_of_memory,
            "there is no memory for the logits of %lld rows of %lld: rebuild the bundle with a smaller --max-batch",
            static_cast<long long>(max_rows), static_cast<long long>(manifest_.vocab_size));
    }
    int64_t const width = image_width(manifest_.text_engine);
    if (width > 0)
    {
        QWEN_AOT_NEED(image_positions_.resize(count) && no_image_.resize(static_cast<size_t>(width)), error,
            "the inputs of a step");
        for (int64_t& position : image_positions_)
        {
            position = -1;
        }
        for (float& element : no_image_)
        {
            element = 0;
        }
    }
    size_t const start = reinterpret_cast<uintptr_t>(logits_memory_) % kAlignment;
    logits_ = reinterpret_cast<float*>(static_cast<uint8_t*>(logits_memory_) + (start == 0 ? 0 : kAlignment - start));
    return shared_.api.check(
        shared_.api.create_io_binding(shared_.session.get(), binding_.fill(shared_.api.release_io_binding)),
        Status::engine_failed, "ONNX Runtime can't make a binding", kRebuild, error);
}

Status OrtStep::run(
    int32_t first_row, int32_t rows, int32_t tokens, int32_t const* ids, float const** logits, Error& error)
{
    int64_t const* const lengths = cache_.lengths() + first_row;
    int64_t longest = 0;
    size_t next = 0;
    for (int32_t row = 0; row < rows; ++row)
    {
        longest = lengths[row] > longest ? lengths[row] : longest;
        for (int32_t token = 0; token < tokens; ++token, ++next)
        {
            input_ids_[next] = ids[next] < 0 ? 0 : ids[next];
            position_ids_[next] = lengths[row] + token;
        }
    }
    Bound wanted{first_row, rows, tokens, cache_.capacity(), 0};
    if (input_names_[static_cast<size_t>(StepInput::key_positions)] != nullptr)
    {
        int64_t const rounded = (longest + tokens + kWindowStep - 1) / kWindowStep * kWindowStep;
        wanted.window = rounded < wanted.capacity ? rounded : wanted.capacity;
    }
    Bound const bound = bound_;
    bound_ = Bound(); // as long as it is half done
    bool const rows_differ =
        wanted.first_row != bound.first_row || wanted.rows != bound.rows || wanted.capacity != bound.capacity;
    if (rows_differ)
    {
        QWEN_AOT_TRY(bind_rows(first_row, rows, error));
    }
    if (rows_differ || shared_.is_gpu)
    {
        int64_t const shape[] = {rows};
        QWEN_AOT_TRY(bind_step_input(StepInput::cache_length, cache_.lengths() + first_row, {shape, 1}, error));
        QWEN_AOT_TRY(bind_step_input(StepInput::new_tokens, new_tokens_.data(), {shape, 1}, error));
        QWEN_AOT_TRY(bind_step_input(StepInput::rotary_offset, cache_.rotary_offsets() + first_row, {shape, 1}, error));
    }
    if (wanted.rows != bound.rows || wanted.tokens != bound.tokens || shared_.is_gpu)
    {
        int64_t const shape[] = {rows, tokens};
        QWEN_AOT_TRY(bind_step_input(StepInput::input_ids, input_ids_.data(), {shape, 2}, error));
        QWEN_AOT_TRY(bind_step_input(StepInput::position_ids, position_ids_.data(), {shape, 2}, error));
        int64_t const told[] = {1};
        QWEN_AOT_TRY(bind_step_input(StepInput::logits_positions, &logits_position_, {told, 1}, error));
        QWEN_AOT_TRY(bind_step_input(StepInput::image_positions, image_positions_.data(), {shape, 2}, error));
        QWEN_AOT_TRY(bind_no_image(error));
    }
    if (wanted.window != bound.window)
    {
        QWEN_AOT_TRY(bind_window(wanted.window, error));
    }
    bound_ = wanted;
    double const started = system::seconds();
    // A GPU's inputs were copied as they were bound, in a stream that its kernels don't wait for.
    Failure* failure = shared_.is_gpu ? shared_.api.synchronize_bound_inputs(binding_.get()) : nullptr;
    if (failure == nullptr)
    {
        failure = shared_.api.run_with_binding(shared_.session.get(), run_options_.get(), binding_.get());
    }
    run_seconds_ += system::seconds() - started;
    if (failure != nullptr)
    {
        char where[96];
        std::snprintf(where, sizeof where, "ONNX Runtime failed in a step of %d rows and %d tokens", rows, tokens);
        return shared_.api.check(failure, Status::engine_failed, where,
            "If memory ran out, use a shorter text, or rebuild the bundle with a smaller --prefill-chunk or "
            "--max-batch",
            error);
    }
    *logits = logits_;
    return Status::ok;
}

/** Binds what depends on the range of rows and on where the cache lies. */
Status OrtStep::bind_rows(int32_t first_row, int32_t rows, Error& error)
{
    for (size_t i = 0; i < cache_.size(); ++i)
    {
        IoTensor const& tensor = cache_.tensor(i);
        int64_t shape[4] = {rows, tensor.shape[1], cache_.capacity(), tensor.shape.size() > 3 ? tensor.shape[3] : 0};
        // The device's address: of this process on the CPU.
        void* const address = reinterpret_cast<void*>(static_cast<uintptr_t>(cache_.row_address(i, first_row)));
        QWEN_AOT_TRY(bind(shared_.cache_memory.get(), address, cache_.row_bytes(i) * static_cast<size_t>(rows),
            {shape, tensor.shape.size()}, cache_names_[i].type, cache_names_[i].past, cache_names_[i].present.c_str(),
            error));
    }
    int64_t const shape[] = {rows, manifest_.vocab_size};
    size_t const bytes = static_cast<size_t>(rows) * static_cast<size_t>(manifest_.vocab_size) * sizeof(float);
    return bind(shared_.host_memory.get(), logits_, bytes, {shape, 2}, kFloat, nullptr, "logits", error);
}

Status OrtStep::bind_window(int64_t window, Error& error)
{
    if (key_positions_.size() < static_cast<size_t>(window))
    {
        auto const capacity = static_cast<size_t>(cache_.capacity());
        QWEN_AOT_NEED(key_positions_.resize(capacity), error, "the positions of the cache");
        for (size_t i = 0; i < capacity; ++i)
        {
            key_positions_[i] = static_cast<int64_t>(i);
        }
    }
    return bind_step_input(StepInput::key_positions, key_positions_.data(), {&window, 1}, error);
}

/** Binds the one row of images that nothing reads, if the graph takes images. */
Status OrtStep::bind_no_image(Error& error)
{
    char const* const name = input_names_[static_cast<size_t>(StepInput::image_embeddings)];
    if (name == nullptr)
    {
        return Status::ok;
    }
    int64_t const shape[] = {1, static_cast<int64_t>(no_image_.size())};
    size_t const bytes = no_image_.size() * sizeof(float);
    return bind(shared_.host_memory.get(), no_image_.data(), bytes, {shape, 2}, kFloat, name, nullptr, error);
}

/** Binds an input if the graph has it. */
Status OrtStep::bind_step_input(StepInput input, int64_t* data, Span<int64_t const> shape, Error& error)
{
    char const* const name = input_names_[static_cast<size_t>(input)];
    if (name == nullptr)
    {
        return Status::ok;
    }
    size_t count = 1;
    for (int64_t const size : shape)
    {
        count *= static_cast<size_t>(size);
    }
    return bind(shared_.host_memory.get(), data, count * sizeof(int64_t), shape, kInt64, name, nullptr, error);
}

Status OrtStep::bind(MemoryInfo const* memory, void* data, size_t bytes, Span<int64_t const> shape, ElementType type,
    char const* input, char const* output, Error& error)
{
    Api const& api = shared_.api;
    Owned<Value> value;
    Failure* failure = api.create_tensor_with_data_as_ort_value(
        memory, data, bytes, shape.data(), shape.size(), type, value.fill(api.release_value));
    if (failure == nullptr && input != nullptr)
    {
        failure = api.bind_input(binding_.get(), input, value.get());
    }
    if (failure == nullptr && output != nullptr)
    {
        failure = api.bind_output(binding_.get(), output, value.get());
    }
    if (failure == nullptr)
    {
        return Status::ok;
    }
    char where[160];
    std::snprintf(
        where, sizeof where, "ONNX Runtime can't bind %.96s", Quoted(input != nullptr ? input : output).c_str());
    return api.check(failure, Status::engine_failed, where, kRebuild, error);
}

} // namespace qwen_aot::ort
