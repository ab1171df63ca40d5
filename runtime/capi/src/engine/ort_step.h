/** One kind of step (prefill or decode) over an ONNX Runtime session: its binding and the memory behind it. */
#pragma once

#include "engine/io_table.h"
#include "engine/kv_cache.h"
#include "engine/ort_api.h"
#include "engine/rows.h"

namespace qwen_aot::ort
{

/** What the steps of a model share. Immutable: any threads (a session's runs may overlap). */
struct SharedSession
{
    Api api;
    Owned<Env> env;
    Owned<MemoryInfo> host_memory;
    Owned<MemoryInfo> cache_memory; // where the KV cache lies
    Owned<Session> session;         // goes first
    /** Whether the provider reads inputs on its device: ONNX Runtime then copies them when they are bound, not when it runs. */
    bool is_gpu = false;
};

/** Runs steps of up to max_rows x max_tokens.
 *
 *  Everything is bound by address and bound again only when an address or a shape changes: on the CPU a decode step in the
 *  middle of a generation makes no binding call at all. */
class OrtStep final : public Step
{
public:
    /** The session and the cache must outlive this. run_options: of the engine, given to each run. */
    OrtStep(SharedSession const& shared, Manifest const& manifest, KvCache& cache, Owned<RunOptions> const& run_options)
        : shared_(shared)
        , manifest_(manifest)
        , cache_(cache)
        , run_options_(run_options)
    {
    }
    OrtStep(OrtStep const&) = delete;
    OrtStep& operator=(OrtStep const&) = delete;
    ~OrtStep();

    /** Makes the binding and its memory. OUT_OF_MEMORY, ENGINE_FAILED. */
    Status open(int64_t max_rows, int64_t max_tokens, Error& error);

    int64_t* new_tokens() override { return new_tokens_.data(); }
    Status run(int32_t first_row, int32_t rows, int32_t tokens, int32_t const* ids, float const** logits,
        Error& error) override;

    /** Spent in ONNX Runtime's run call so far. */
    double run_seconds() const { return run_seconds_; }

private:
    struct Bound // what the binding has
    {
        int32_t first_row = -1;
        int32_t rows = 0;
        int32_t tokens = 0;
        int64_t capacity = 0;
        int64_t window = 0;
    };
    struct CacheNames
    {
        char const* past;
        Text present;
        ElementType type;
    };

    Status bind_rows(int32_t first_row, int32_t rows, Error& error);
    Status bind_tokens(int32_t rows, int32_t tokens, Error& error);
    Status bind_window(int64_t window, Error& error);
    Status bind_no_image(Error& error);
    Status bind_step_input(StepInput input, int64_t* data, Span<int64_t const> shape, Error& error);
    Status bind(MemoryInfo const* memory, void* data, size_t bytes, Span<int64_t const> shape, ElementType type,
        char const* input, char const* output, Error& error);

    SharedSession const& shared_;
    Manifest const& manifest_;
    KvCache& cache_;
    Owned<RunOptions> const& run_options_;
    Owned<IoBinding> binding_;
    Array<CacheNames> cache_names_;             // in the order of the cache's arrays
    char const* input_names_[kStepInputs] = {}; // in the graph; null: it hasn't the input
    Array<int64_t> new_tokens_;
    Array<int64_t> input_ids_;
    Array<int64_t> position_ids_;
    Array<int64_t> key_positions_;   // 0, 1, 2, ...
    Array<int64_t> image_positions_; // -1, all of them; none where the graph takes no images
    Array<float> no_image_;          // [M] of 0
    int64_t logits_position_ = 0;    // of each row's last token
    void* logits_memory_ = nullptr;
    float* logits_ = nullptr; // [max_rows, V]
    Bound bound_;
    double run_seconds_ = 0;
};

/** ONNX Runtime's number of a dtype. */
ElementType element_type(DType type);

} // namespace qwen_aot::ort
