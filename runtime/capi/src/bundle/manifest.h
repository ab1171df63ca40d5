/** What a bundle's manifest.json says, of what this library needs; the rest of it is checked too (docs/bundle.md). A
 *  manifest of format version 1 becomes what it says in version 2. */
#pragma once

#include "base/memory.h"
#include "base/status.h"
#include "base/text.h"

#include <cstdint>
#include <string_view>

namespace qwen_aot
{

/** Element types of inputs and outputs, as the manifest names them. */
enum class DType : uint8_t
{
    int64,
    int32,
    float32,
    float16,
    bfloat16,
    int8
};
size_t dtype_bytes(DType type);
char const* dtype_name(DType type);
/** The type of a name; false where there is none. */
bool find_dtype(std::string_view name, DType& type);

constexpr char kManifestName[] = "manifest.json";
constexpr char kCachePrefix[] = "past_key_values.";     // of the cache inputs' names
constexpr char kPresentPrefix[] = "present.";           // of the outputs that share their memory
constexpr char kLastLogits[] = "last_logits";           // the output that `logits_rows` bounds
constexpr char kLogitsPositions[] = "logits_positions"; // the input that says of how many tokens it is
constexpr char kRotaryOffset[] = "rotary_offset.";      // of the name of an input; a number of tokens follows
constexpr char kVerify[] = "verify";                    // the profile of the steps that want it

/** One input or output: a dimension is a size, or the negative of a letter (-'B'). */
struct IoTensor
{
    Text name;
    DType dtype;
    Array<int64_t> shape;
};

/** Tokens a step may have in a row. */
struct Profile
{
    Text name;
    int64_t min_tokens;
    int64_t max_tokens;
};

/** Native code of a bundle's TensorRT engine, and what the GPU must be. */
struct TensorRtFacts
{
    Text version;
    Array<Text> compute_capabilities;
    bool is_hardware_compatible;
    bool is_version_compatible;
    bool has_weights;
    int64_t weight_bytes;
    int64_t cache_bytes;
    int64_t activation_bytes; // as TensorRT told when it was built, or else estimated
    bool has_plugins;
    Text plugin_file;
    Text plugin_sha256;
    bool has_plugins_in_engine;
};

/** The same decoder for this project's own CPU kernels, over the data files of the other graph. Its inputs and outputs are
 *  those of the engine, but for the type of the cache. */
struct KernelGraph
{
    Text file;
    int64_t version; // of the ops' interface, which the library must have
    DType cache_dtype;
};

struct TextEngine
{
    Text file;
    Text precision;
    bool has_fast_prefill; // of `quantization`
    Array<IoTensor> inputs;
    Array<IoTensor> outputs;
    Array<Profile> profiles;
    int64_t logits_rows; // the largest T of the output `last_logits` [B, T, V]; -1: there is none
    // N of the input rotary_offset.N: the first rotary table is of first steps of up to N tokens, the next of up to 2 N, and so
    // on; -1: there is one table.
    int64_t rotary_length;
    DType cache_dtype; // without meaning where no input is of the cache
    bool has_tensorrt;
    TensorRtFacts tensorrt;
    bool has_kernels;
    KernelGraph kernels;

    /** The index of the rotary table of a row whose first step has so many tokens, 1 on. */
    int64_t rotary_table(int64_t tokens) const;

    /** Makes it what it would be if `kernels`, which there must be, were the engine. */
    void use_kernels();
};

struct FileEntry
{
    Text name;
    int64_t bytes;
    uint8_t sha256[32];
};

struct Manifest
{
    int32_t format_version; // of the file
    Text model_name;
    int64_t num_parameters;
    int64_t vocab_size;
    int64_t num_hidden_layers;
    int64_t bos_token_id; // -1: none
    int64_t pad_token_id; // -1: none
    Array<int32_t> eos_token_ids;
    Text target;
    TextEngine text_engine;
    bool has_vision;
    int64_t max_context;
    int64_t max_batch;
    int64_t prefill_chunk;
    Text compiled_tokenizer;        // "": none
    Text compiled_chat_template;    // "": none
    int64_t default_max_new_tokens; // -1: none
    Array<FileEntry> files;         // by name

    /** The most slots that a row's cache may have (`cache_capacity` in runtime/bundle/manifest.py). */
    int64_t max_capacity() const;
    FileEntry const* find_file(std::string_view name) const;

    /** BUNDLE: the message names the key, what was found and what is accepted. */
    static Status parse(std::string_view text, Manifest& manifest, Error& error);
};

} // namespace qwen_aot
