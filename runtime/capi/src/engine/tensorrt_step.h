/** One kind of step (prefill or decode) over a TensorRT engine. */
#pragma once

#include "engine/cuda_stream.h"
#include "engine/io_table.h"
#include "engine/rows.h"
#include "engine/tensorrt_library.h"

namespace qwen_aot::tensorrt
{

/** What the steps of an engine share. Everything of it runs on one stream, so that a step's copies and kernels follow each
 *  other without further synchronization. */
struct EngineParts
{
    Manifest const& manifest;
    Logger& logger;
    nvinfer1::ICudaEngine& engine;
    system::Mutex& making_contexts; // of all engines of the model
    cuda::StreamMemory& stream;
    KvCache& cache;
    Array<Text> const& present_names; // in the order of the cache's arrays
    cuda::Address activations;        // scratch memory of all contexts: one step runs at a time
    int64_t activation_bytes;
    cuda::Address key_positions; // int64 [C] on the device: 0, 1, 2, ...
};

/** All that two steps must share to be the same work on other content: a CUDA graph's key. */
struct StepShape
{
    int32_t first_row = -1;
    int32_t rows = 0;   // B
    int32_t tokens = 0; // S
    int64_t window = 0; // W

    bool operator==(StepShape const& other) const
    {
        return first_row == other.first_row && rows == other.rows && tokens == other.tokens && window == other.window;
    }
    bool operator!=(StepShape const& other) const { return !(*this == other); }
};

/** What one kind of step hands to the GPU and gets back: the inputs in one block, so that one copy feeds a step. */
struct StepBuffers
{
    uint8_t* block = nullptr; // page-locked
    size_t bytes = 0;
    cuda::Address device_block = 0;
    size_t offsets[kStepInputs] = {}; // in the block; key_positions lies elsewhere
    float* logits = nullptr;          // [max_rows, V], page-locked
    cuda::Address device_logits = 0;
    cuda::Address device_last_logits = 0; // an engine that has this output writes it too; nobody reads it

    int64_t* input(StepInput input) const
    {
        return reinterpret_cast<int64_t*>(block + offsets[static_cast<size_t>(input)]);
    }
};

/** An execution context and what is bound to it. */
class Context
{
public:
    explicit Context(EngineParts const& parts)
        : parts_(parts)
    {
    }

    /** Makes it for a profile, with nothing bound. ENGINE_FAILED: the library refuses. */
    Status open(int32_t profile, Error& error);
    /** Sets what differs from the last step's addresses and shapes; nothing, where the shape is the same. */
    Status bind(StepShape const& shape, StepBuffers const& buffers, Error& error);
    /** Asks for one step on the stream. */
    Status enqueue(Error& error);

private:
    Status refused(char const* call, char const* name, Error& error);
    Status set_address(char const* name, cuda::Address address, Error& error);
    Status set_shape(char const* name, Span<int64_t const> sizes, Error& error);

    EngineParts const& parts_;
    Owned<nvinfer1::IExecutionContext> context_;
    StepShape bound_;
};

/** Runs steps of up to max_rows x max_tokens.
 *
 *  A decode step whose shape comes twice in a row is captured as a CUDA graph, where the library doesn't do that itself. Each
 *  graph has a context of its own, because a context whose shapes change makes its earlier graphs invalid. Source:
 *  TensorRT's documentation, "CUDA Graphs": one context per captured graph, with shared memory. */
class TensorRtStep final : public Step
{
public:
    TensorRtStep(EngineParts const& parts, Log const& log)
        : parts_(parts)
        , log_(log)
        , context_(parts)
    {
    }
    TensorRtStep(TensorRtStep const&) = delete;
    TensorRtStep& operator=(TensorRtStep const&) = delete;
    /** The context of the GPU must be current, and nothing at work. */
    ~TensorRtStep();

    Status open(int32_t profile, int64_t max_rows, int64_t max_tokens, bool has_graphs, Error& error);

    int64_t* new_tokens() override { return buffers_.input(StepInput::new_tokens); }
    Status run(int32_t first_row, int32_t rows, int32_t tokens, int32_t const* ids, float const** logits,
        Error& error) override;

    /** W of a step whose longest row has so many tokens. */
    static int64_t window_of(int64_t tokens, int64_t capacity);

private:
    struct Captured
    {
        StepShape shape;
        Box<Context> context;
        cuda::GraphExec graph;
        uint64_t used; // the larger, the later
    };

    Status submit(StepShape const& shape, Error& error);
    Status ask_for(Context& context, StepShape const& shape, Error& error);
    Box<Context> make_room();
    void capture(StepShape const& shape, Box<Context> context);
    void turn_off(Error const& error);

    EngineParts const& parts_;
    Log log_;
    Context context_;
    StepBuffers buffers_;
    StepShape previous_;
    int32_t profile_ = 0;
    bool has_graphs_ = false;
    uint64_t uses_ = 0;
    Array<Captured> graphs_;
};

} // namespace qwen_aot::tensorrt
