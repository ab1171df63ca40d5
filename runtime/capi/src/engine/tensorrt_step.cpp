// Only where TensorRT's headers are (QWEN_AOT_TENSORRT_INCLUDE_DIR).
#if defined(QWEN_AOT_TENSORRT)

#include "engine/tensorrt_step.h"

namespace qwen_aot::tensorrt
{

namespace
{

// The attention window W is rounded up: each W is a shape of its own, with kernels to choose and a graph to capture. Half of
// it is read in vain on average; for the 0.5B model that is 12 MiB a step beside 900 MiB of weights.
constexpr int64_t kWindowStep = 256;

constexpr size_t kAlignment = 256; // bytes, between the inputs in their block

// A context of 4096 tokens has 16 attention windows; a graph and its context take a few MiB of device memory.
constexpr size_t kMaxGraphs = 16;

constexpr int kCaptureThreadLocal = 1; // CU_STREAM_CAPTURE_MODE_THREAD_LOCAL

} // namespace

Status Context::open(int32_t profile, Error& error)
{
    Logger::Errors errors;
    parts_.logger.take_errors(errors);
    {
        system::Lock const lock(parts_.making_contexts);
#if defined(QWEN_AOT_TENSORRT_RTX)
        Owned<nvinfer1::IRuntimeConfig> const config(parts_.engine.createRuntimeConfig());
        if (config != nullptr)
        {
            config->setExecutionContextAllocationStrategy(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
            if (config->setCudaGraphStrategy(nvinfer1::CudaGraphStrategy::kWHOLE_GRAPH_CAPTURE))
            {
                context_.reset(parts_.engine.createExecutionContext(config.get()));
            }
        }
#else
        context_.reset(
            parts_.engine.createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
#endif
    }
    if (context_ == nullptr)
    {
        return error.fail(Status::engine_failed,
            "%s can't make an execution context: %s. If the GPU's memory ran out, end other programs that use it, or "
            "rebuild "
            "the bundle with a smaller --max-context",
            kFlavour.title, parts_.logger.take_errors(errors));
    }
    context_->setDeviceMemoryV2(
        reinterpret_cast<void*>(static_cast<uintptr_t>(parts_.activations)), parts_.activation_bytes);
    if (!context_->setOptimizationProfileAsync(profile, parts_.stream.handle()))
    {
        return error.fail(Status::engine_failed, "%s can't use the engine's profile %d: %s. Rebuild the bundle",
            kFlavour.title, profile, parts_.logger.take_errors(errors));
    }
    return Status::ok;
}

Status Context::bind(StepShape const& shape, StepBuffers const& buffers, Error& error)
{
    StepShape const bound = bound_;
    bound_ = StepShape(); // as long as it is half done
    if (bound == shape)
    {
        bound_ = shape;
        return Status::ok;
    }
    TextEngine const& engine = parts_.manifest.text_engine;
    if (bound.rows == 0)
    {
        for (size_t i = 0; i < kStepInputs; ++i)
        {
            auto const input = static_cast<StepInput>(i);
            if (char const* const name = find_step_input(engine, input); name != nullptr)
            {
                cuda::Address const address = input == StepInput::key_positions
                    ? parts_.key_positions
                    : buffers.device_block + buffers.offsets[i];
                QWEN_AOT_TRY(set_address(name, address, error));
            }
        }
        QWEN_AOT_TRY(set_address("logits", buffers.device_logits, error));
        if (engine.logits_rows > 0)
        {
            QWEN_AOT_TRY(set_address(kLastLogits, buffers.device_last_logits, error));
        }
    }
    if (bound.first_row != shape.first_row || bound.rows != shape.rows)
    {
        for (size_t i = 0; i < parts_.cache.size(); ++i)
        {
            IoTensor const& tensor = parts_.cache.tensor(i);
            cuda::Address const address = parts_.cache.row_address(i, shape.first_row);
            QWEN_AOT_TRY(set_address(tensor.name.c_str(), address, error));
            QWEN_AOT_TRY(set_address(parts_.present_names[i].c_str(), address, error));
            int64_t const sizes[] = {
                shape.rows, tensor.shape[1], tensor.shape[2], tensor.shape.size() > 3 ? tensor.shape[3] : 0};
            QWEN_AOT_TRY(set_shape(tensor.name.c_str(), {sizes, tensor.shape.size()}, error));
        }
    }
    int64_t const tokens[] = {shape.rows, shape.tokens};
    int64_t const rows[] = {shape.rows};
    int64_t const window[] = {shape.window};
    int64_t const told[] = {1};
    int64_t const no_image[] = {1, image_width(engine)};
    Span<int64_t const> const sizes[kStepInputs] = {
        {tokens, 2}, {tokens, 2}, {rows, 1}, {rows, 1}, {window, 1}, {told, 1}, {rows, 1}, {tokens, 2}, {no_image, 2}};
    for (size_t i = 0; i < kStepInputs; ++i)
    {
        if (char const* const name = find_step_input(engine, static_cast<StepInput>(i)); name != nullptr)
        {
            QWEN_AOT_TRY(set_shape(name, sizes[i], error));
        }
    }
    bound_ = shape;
    return Status::ok;
}

Status Context::enqueue(Error& error)
{
    if (context_->enqueueV3(parts_.stream.handle()))
    {
        return Status::ok;
    }
    Logger::Errors errors;
    return error.fail(Status::engine_failed,
        "%s failed to start a step: %s. If it comes back, open the model again; if the GPU's memory ran out, end other "
        "programs that use it",
        kFlavour.title, parts_.logger.take_errors(errors));
}

Status Context::refused(char const* call, char const* name, Error& error)
{
    Logger::Errors errors;
    return error.fail(Status::engine_failed, "%s refuses %s of %s: %s. Rebuild the bundle", kFlavour.title, call,
        Quoted(name).c_str(), parts_.logger.take_errors(errors));
}

Status Context::set_address(char const* name, cuda::Address address, Error& error)
{
    void* const place = reinterpret_cast<void*>(static_cast<uintptr_t>(address));
    return context_->setTensorAddress(name, place) ? Status::ok : refused("the address", name, error);
}

Status Context::set_shape(char const* name, Span<int64_t const> sizes, Error& error)
{
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<int32_t>(sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i)
    {
        dims.d[i] = sizes[i];
    }
    return context_->setInputShape(name, dims) ? Status::ok : refused("the shape", name, error);
}

TensorRtStep::~TensorRtStep()
{
    for (Captured& captured : graphs_)
    {
        parts_.stream.gpu().graph_exec_destroy(captured.graph);
    }
}

Status TensorRtStep::open(int32_t profile, int64_t max_rows, int64_t max_tokens, bool has_graphs, Error& error)
{
    profile_ = profile;
    has_graphs_ = has_graphs;
    auto const rows = static_cast<size_t>(max_rows);
    size_t count = 0;
    size_t logits_bytes = 0;
    if (__builtin_mul_overflow(rows, static_cast<size_t>(max_tokens), &count) || count > static_cast<size_t>(-1) / 64
        || __builtin_mul_overflow(rows, static_cast<size_t>(parts_.manifest.vocab_size) * sizeof(float), &logits_bytes))
    {
        return error.no_memory("the inputs and logits of a step");
    }
    // Of eight bytes each, those of a row of images in pairs.
    auto const width = static_cast<size_t>(image_width(parts_.manifest.text_engine));
    size_t const positions = width > 0 ? count : 0;
    size_t const counts[kStepInputs] = {count, count, rows, rows, 0, 1, rows, positions, (width + 1) / 2};
    for (size_t i = 0; i < kStepInputs; ++i)
    {
        buffers_.offsets[i] = buffers_.bytes;
        buffers_.bytes += (counts[i] * sizeof(int64_t) + kAlignment - 1) / kAlignment * kAlignment;
    }
    cuda::StreamMemory& stream = parts_.stream;
    QWEN_AOT_TRY(stream.allocate_pinned(buffers_.bytes, &buffers_.block, error));
    buffers_.input(StepInput::logits_positions)[0] = 0;
    for (size_t i = 0; i < positions; ++i)
    {
        buffers_.input(StepInput::image_positions)[i] = -1;
    }
    for (size_t i = 0; i < (width + 1) / 2; ++i)
    {
        buffers_.input(StepInput::image_embeddings)[i] = 0; // floats of 0
    }
    QWEN_AOT_TRY(stream.allocate(buffers_.bytes, buffers_.device_block, error));
    uint8_t* logits = nullptr;
    QWEN_AOT_TRY(stream.allocate_pinned(logits_bytes, &logits, error));
    buffers_.logits = reinterpret_cast<float*>(logits);
    QWEN_AOT_TRY(stream.allocate(logits_bytes, buffers_.device_logits, error));
    if (parts_.manifest.text_engine.logits_rows > 0)
    {
        QWEN_AOT_TRY(stream.allocate(logits_bytes, buffers_.device_last_logits, error));
    }
    return context_.open(profile, error);
}

Status TensorRtStep::run(
    int32_t first_row, int32_t rows, int32_t tokens, int32_t const* ids, float const** logits, Error& error)
{
    cuda::Current const current(parts_.stream.gpu());
    QWEN_AOT_TRY(current.status(error));
    int64_t const* const lengths = parts_.cache.lengths() + first_row;
    int64_t longest = 0;
    size_t next = 0;
    for (int32_t row = 0; row < rows; ++row)
    {
        longest = lengths[row] > longest ? lengths[row] : longest;
        buffers_.input(StepInput::cache_length)[row] = lengths[row];
        buffers_.input(StepInput::rotary_offset)[row] = parts_.cache.rotary_offsets()[first_row + row];
        for (int32_t token = 0; token < tokens; ++token, ++next)
        {
            buffers_.input(StepInput::input_ids)[next] = ids[next] < 0 ? 0 : ids[next];
            buffers_.input(StepInput::position_ids)[next] = lengths[row] + token;
        }
    }
    // The same for all where the engine has none, because a plugin follows the rows' lengths.
    int64_t const capacity = parts_.cache.capacity();
    int64_t window = capacity;
    if (find_step_input(parts_.manifest.text_engine, StepInput::key_positions) != nullptr)
    {
        window = window_of(longest + tokens, capacity);
    }
    if (Status const status = submit({first_row, rows, tokens, window}, error); status != Status::ok)
    {
        parts_.stream.drain();
        return status;
    }
    *logits = buffers_.logits;
    return Status::ok;
}

int64_t TensorRtStep::window_of(int64_t tokens, int64_t capacity)
{
    int64_t const rounded = (tokens + kWindowStep - 1) / kWindowStep * kWindowStep;
    return rounded < capacity ? rounded : capacity;
}

/** Runs a step to its end: as a graph, or enqueued and, where the shape came twice in a row, then captured. */
Status TensorRtStep::submit(StepShape const& shape, Error& error)
{
    cuda::Gpu const& gpu = parts_.stream.gpu();
    for (Captured& captured : graphs_)
    {
        if (captured.shape == shape)
        {
            captured.used = ++uses_;
            QWEN_AOT_TRY(gpu.check(gpu.graph_launch(captured.graph, parts_.stream.handle()), "cuGraphLaunch", error));
            return parts_.stream.synchronize(error);
        }
    }
    bool const is_repeated = shape == previous_;
    previous_ = shape;
    Box<Context> own = has_graphs_ && is_repeated ? make_room() : nullptr;
    Context& context = own != nullptr ? *own : context_;
    Status status = ask_for(context, shape, error);
    status = status == Status::ok ? parts_.stream.synchronize(error) : status;
    if (status != Status::ok)
    {
        parts_.stream.drain(); // before the context goes
        return status;
    }
    if (own != nullptr)
    {
        capture(shape, std::move(own));
    }
    return Status::ok;
}

/** Everything that the GPU has to do for a step, in order. */
Status TensorRtStep::ask_for(Context& context, StepShape const& shape, Error& error)
{
    QWEN_AOT_TRY(context.bind(shape, buffers_, error));
    QWEN_AOT_TRY(parts_.stream.copy_to_device(buffers_.device_block, buffers_.block, buffers_.bytes, error));
    QWEN_AOT_TRY(context.enqueue(error));
    size_t const bytes =
        static_cast<size_t>(shape.rows) * static_cast<size_t>(parts_.manifest.vocab_size) * sizeof(float);
    return parts_.stream.copy_to_host(buffers_.logits, buffers_.device_logits, bytes, error);
}

/** A context for one more graph, in whose place the one that wasn't used for longest goes; none where there can't be one. */
Box<Context> TensorRtStep::make_room()
{
    while (graphs_.size() >= kMaxGraphs)
    {
        size_t oldest = 0;
        for (size_t i = 1; i < graphs_.size(); ++i)
        {
            oldest = graphs_[i].used < graphs_[oldest].used ? i : oldest;
        }
        parts_.stream.gpu().graph_exec_destroy(graphs_[oldest].graph);
        graphs_.remove(oldest);
    }
    Error error;
    Box<Context> context = make<Context>(parts_);
    Status const status = context == nullptr || !graphs_.reserve(kMaxGraphs) ? error.no_memory("a context")
                                                                             : context->open(profile_, error);
    if (status != Status::ok)
    {
        turn_off(error);
        return nullptr;
    }
    return context;
}

/** Captures the work of a step that has just run on this context: TensorRT wants a run before a capture. Steps go on without
 *  graphs where it can't be captured. */
void TensorRtStep::capture(StepShape const& shape, Box<Context> context)
{
    cuda::Gpu const& gpu = parts_.stream.gpu();
    cuda::Stream const stream = parts_.stream.handle();
    Error error;
    // Thread-local: what other threads of the process allocate meanwhile doesn't end the capture.
    Status status = gpu.check(gpu.stream_begin_capture(stream, kCaptureThreadLocal), "cuStreamBeginCapture", error);
    if (status != Status::ok)
    {
        turn_off(error);
        return;
    }
    status = ask_for(*context, shape, error);
    cuda::Graph graph = nullptr;
    // Also after work that failed in the middle, so that the stream is as before.
    Error ending;
    Status const ended = gpu.check(gpu.stream_end_capture(stream, &graph), "cuStreamEndCapture", ending);
    if (status == Status::ok && ended != Status::ok)
    {
        error = ending;
        status = ended;
    }
    cuda::GraphExec executable = nullptr;
    if (status == Status::ok)
    {
        status = gpu.check(gpu.graph_instantiate(&executable, graph, 0), "cuGraphInstantiate", error);
    }
    if (graph != nullptr)
    {
        gpu.graph_destroy(graph);
    }
    if (status != Status::ok)
    {
        turn_off(error);
        return;
    }
    if (!graphs_.push(Captured{shape, std::move(context), executable, ++uses_}))
    {
        gpu.graph_exec_destroy(executable);
    }
}

void TensorRtStep::turn_off(Error const& error)
{
    has_graphs_ = false;
    log_.write(QWEN_AOT_LOG_WARNING, "decode steps run without CUDA graphs, which is slower: %.*s",
        static_cast<int>(error.message().size()), error.message().data());
}

} // namespace qwen_aot::tensorrt

#endif // QWEN_AOT_TENSORRT
