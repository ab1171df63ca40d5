/** Parses manifests, given as hex, and writes what this library keeps of them. */
#include "bundle/manifest.h"
#include "answers.h"
#include "bundle/file_name.h"
#include "bundle/sha256.h"
#include "hex.h"

namespace
{

using namespace qwen_aot;

std::string shown(Array<IoTensor> const& tensors)
{
    std::string result;
    for (IoTensor const& tensor : tensors)
    {
        result += (result.empty() ? "[" : ", [") + answers::quoted(tensor.name.view()) + ", "
            + answers::quoted(dtype_name(tensor.dtype)) + ", " + answers::listed(tensor.shape) + "]";
    }
    return "[" + result + "]";
}

std::string shown(TensorRtFacts const& facts)
{
    std::string capabilities;
    for (Text const& capability : facts.compute_capabilities)
    {
        capabilities += (capabilities.empty() ? "" : ", ") + answers::quoted(capability.view());
    }
    return "{\"version\": " + answers::quoted(facts.version.view()) + ", \"compute_capabilities\": [" + capabilities
        + "], \"version_compatible\": " + std::to_string(facts.is_version_compatible)
        + ", \"cache_bytes\": " + std::to_string(facts.cache_bytes) + ", \"plugins\": "
        + (facts.has_plugins
                ? "[" + answers::quoted(facts.plugin_file.view()) + ", " + answers::quoted(facts.plugin_sha256.view())
                    + ", " + std::to_string(facts.has_plugins_in_engine) + "]"
                : "null")
        + "}";
}

std::string types(Array<IoTensor> const& tensors)
{
    std::string result;
    for (IoTensor const& tensor : tensors)
    {
        result += (result.empty() ? "" : ", ") + answers::quoted(dtype_name(tensor.dtype));
    }
    return "[" + result + "]";
}

/** Of the graph for own kernels, which becomes the engine. */
std::string shown_kernels(TextEngine& engine)
{
    if (!engine.has_kernels)
    {
        return "null";
    }
    std::string const version = std::to_string(engine.kernels.version);
    engine.use_kernels();
    return "[" + version + ", " + answers::quoted(engine.file.view()) + ", "
        + answers::quoted(dtype_name(engine.cache_dtype)) + ", " + types(engine.inputs) + ", " + types(engine.outputs)
        + "]";
}

std::string shown(Manifest& manifest)
{
    TextEngine& engine = manifest.text_engine;
    std::string profiles;
    for (Profile const& profile : engine.profiles)
    {
        profiles += (profiles.empty() ? "[" : ", [") + answers::quoted(profile.name.view()) + ", "
            + std::to_string(profile.min_tokens) + ", " + std::to_string(profile.max_tokens) + "]";
    }
    std::string files;
    for (FileEntry const& file : manifest.files)
    {
        files += (files.empty() ? "[" : ", [") + answers::quoted(file.name.view()) + ", " + std::to_string(file.bytes)
            + ", " + answers::quoted(Sha256Text(file.sha256).c_str()) + "]";
    }
    auto const number = [](int64_t value) { return std::to_string(value); };
    std::string shown_manifest = "{\"format_version\": " + number(manifest.format_version) + ", \"model_name\": "
        + answers::quoted(manifest.model_name.view()) + ", \"num_parameters\": " + number(manifest.num_parameters)
        + ", \"vocab_size\": " + number(manifest.vocab_size) + ", \"num_hidden_layers\": "
        + number(manifest.num_hidden_layers) + ", \"bos_token_id\": " + number(manifest.bos_token_id)
        + ", \"pad_token_id\": " + number(manifest.pad_token_id) + ", \"eos_token_ids\": "
        + answers::listed(manifest.eos_token_ids) + ", \"target\": " + answers::quoted(manifest.target.view())
        + ", \"file\": " + answers::quoted(engine.file.view()) + ", \"precision\": "
        + answers::quoted(engine.precision.view()) + ", \"has_fast_prefill\": " + number(engine.has_fast_prefill)
        + ", \"inputs\": " + shown(engine.inputs) + ", \"outputs\": " + shown(engine.outputs) + ", \"profiles\": ["
        + profiles + "], \"logits_rows\": " + number(engine.logits_rows)
        + ", \"cache_dtype\": " + answers::quoted(dtype_name(engine.cache_dtype))
        + ", \"tensorrt\": " + (engine.has_tensorrt ? shown(engine.tensorrt) : "null")
        + ", \"has_vision\": " + number(manifest.has_vision) + ", \"max_context\": " + number(manifest.max_context)
        + ", \"max_batch\": " + number(manifest.max_batch) + ", \"prefill_chunk\": " + number(manifest.prefill_chunk)
        + ", \"max_capacity\": " + number(manifest.max_capacity())
        + ", \"compiled_tokenizer\": " + answers::quoted(manifest.compiled_tokenizer.view())
        + ", \"compiled_chat_template\": " + answers::quoted(manifest.compiled_chat_template.view())
        + ", \"default_max_new_tokens\": " + number(manifest.default_max_new_tokens) + ", \"files\": [" + files + "]";
    return shown_manifest + ", \"kernels\": " + shown_kernels(engine) + "}";
}

} // namespace

int main()
{
    return answers::serve([](JsonValue request) -> std::string {
        JsonValue value;
        if (request.find("file_name", value))
        {
            std::string const suffix(suffix_of(value.string()));
            return std::string("[") + (is_file_name(value.string()) ? "true" : "false") + ", " + answers::quoted(suffix)
                + "]";
        }
        request.find("hex", value);
        std::string const text = answers::bytes_of_hex(value.string());
        Manifest manifest{};
        Error error;
        Status const status = Manifest::parse(text, manifest, error);
        return status == Status::ok ? shown(manifest) : answers::failed(error);
    });
}
