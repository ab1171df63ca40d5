#include "bundle/manifest.h"

#include "bundle/file_name.h"
#include "bundle/schema.h"
#include "bundle/sha256.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>

namespace qwen_aot
{

namespace
{

constexpr int64_t kMaxCount = INT32_MAX; // graphs keep lengths and sizes in int32
constexpr int64_t kCapacityStep = 256;   // tokens; a cache that grows has a multiple of this

struct DTypeFacts
{
    char const* name;
    size_t bytes;
    bool is_of_cache;
};
constexpr DTypeFacts kDTypes[] = { // in the order of DType
    {"int64", 8, false}, {"int32", 4, false}, {"float32", 4, true}, {"float16", 2, true}, {"bfloat16", 2, true},
    {"int8", 1, true}};

DTypeFacts const& facts_of(DType type)
{
    return kDTypes[static_cast<size_t>(type)];
}

/* -- Which texts are accepted ------------------------------------------------------------------------------------- */

bool is_dtype(std::string_view text)
{
    DType type;
    return find_dtype(text, type);
}

bool is_dimension(std::string_view text)
{
    return text.size() == 1 && std::string_view("BSCWTI").find(text[0]) != std::string_view::npos;
}

bool is_cache_dtype(std::string_view text)
{
    DType type;
    return find_dtype(text, type) && facts_of(type).is_of_cache;
}

bool is_product_dtype(std::string_view text)
{
    constexpr std::string_view kNames[] = {
        "float32", "tfloat32", "float16", "bfloat16", "float8_e4m3", "float4_e2m1", "int32", "int8", "int4"};
    return std::find(std::begin(kNames), std::end(kNames), text) != std::end(kNames);
}

bool is_sha256(std::string_view text)
{
    uint8_t digest[Sha256::kBytes];
    return parse_sha256(text, digest);
}

/** Digits that don't begin with 0, a dot, one digit: "8.9". */
bool is_compute_capability(std::string_view text)
{
    auto const is_digit = [](char character) { return character >= '0' && character <= '9'; };
    size_t const dot = text.find('.');
    return dot != std::string_view::npos && dot > 0 && dot + 2 == text.size() && text[0] != '0'
        && std::all_of(text.begin(), text.begin() + dot, is_digit) && is_digit(text[dot + 1]);
}

/* -- The schema (docs/bundle.md), from the inside out ------------------------------------------------------------- */

constexpr char kDTypeWords[] = "int64, int32, float32, float16, bfloat16, int8";
constexpr char kCacheDTypeWords[] = "float32, float16, bfloat16, int8";
constexpr char kSha256Words[] = "64 lower-case hex digits";

constexpr SchemaType text_of(bool (*accepts)(std::string_view), char const* accepted)
{
    SchemaType type{Shape::text};
    type.accepts = accepts;
    type.accepted = accepted;
    return type;
}

constexpr SchemaType integer_of(int64_t least, int64_t most)
{
    SchemaType type{Shape::integer};
    type.least = least;
    type.most = most;
    return type;
}

constexpr SchemaType list_of(SchemaType const& inner)
{
    SchemaType type{Shape::list};
    type.inner = &inner;
    return type;
}

constexpr SchemaType map_of(SchemaType const& inner)
{
    SchemaType type{Shape::map};
    type.inner = &inner;
    return type;
}

constexpr SchemaType files_of(SchemaType const& inner)
{
    SchemaType type = map_of(inner);
    type.accepts = is_file_name;
    type.accepted = kFileNameWords;
    return type;
}

constexpr SchemaType or_null(SchemaType type)
{
    type.is_nullable = true;
    return type;
}

template <size_t N>
constexpr SchemaType record_of(SchemaField const (&fields)[N])
{
    SchemaType type{Shape::record};
    type.fields = fields;
    type.num_fields = N;
    return type;
}

constexpr SchemaType kText{Shape::text};
constexpr SchemaType kTextOrNull = or_null(kText);
constexpr SchemaType kBoolean{Shape::boolean};
constexpr SchemaType kAnyInteger{Shape::integer};
constexpr SchemaType kIdOrNull = or_null(kAnyInteger); // below the vocabulary's size: check_ids
constexpr SchemaType kCount = integer_of(1, kMaxCount);
constexpr SchemaType kCountOrNull = or_null(kCount);
constexpr SchemaType kCountOrNone = integer_of(0, kMaxCount);
constexpr SchemaType kLargeCount = integer_of(1, INT64_MAX);
constexpr SchemaType kByteCount = integer_of(0, INT64_MAX);
constexpr SchemaType kByteCountOrNull = or_null(kByteCount);
constexpr SchemaType kSha256 = text_of(is_sha256, kSha256Words);
constexpr SchemaType kTexts = list_of(kText);
constexpr SchemaType kIntegers = list_of(kAnyInteger);
constexpr SchemaType kTextMap = map_of(kText);
constexpr SchemaType kCountMap = map_of(kCount);
constexpr SchemaType kScalar{Shape::scalar};
constexpr SchemaType kScalarMap = map_of(kScalar);

constexpr SchemaField kFileEntryFields[] = {{"bytes", &kByteCount}, {"sha256", &kSha256}};
constexpr SchemaType kFileEntry = record_of(kFileEntryFields);
constexpr SchemaType kFiles = files_of(kFileEntry);

constexpr SchemaType kDType = text_of(is_dtype, kDTypeWords);
constexpr SchemaType dimension()
{
    SchemaType type{Shape::integer_or_text};
    type.least = 1;
    type.most = kMaxCount;
    type.accepts = is_dimension;
    type.accepted = "one of B, S, C, W, T, I";
    return type;
}
constexpr SchemaType kDimension = dimension();
constexpr SchemaType kDimensions = list_of(kDimension);
constexpr SchemaField kIoTensorFields[] = {{"name", &kText}, {"dtype", &kDType}, {"shape", &kDimensions}};
constexpr SchemaType kIoTensor = record_of(kIoTensorFields);
constexpr SchemaType kIoTensors = list_of(kIoTensor);

constexpr SchemaField kProfileFields[] = {{"name", &kText}, {"min_tokens", &kCount}, {"max_tokens", &kCount}};
constexpr SchemaType kProfile = record_of(kProfileFields);
constexpr SchemaType kProfiles = list_of(kProfile);

constexpr SchemaField kWeightEncodingsFields[] = {{"kept", &kCountMap}, {"requantized", &kCountMap}};
constexpr SchemaType kWeightEncodings = record_of(kWeightEncodingsFields);
constexpr SchemaType kWeightHashes = or_null(map_of(kSha256));

constexpr SchemaField kPluginsFields[] = {
    {"file", &kText}, {"sha256", &kText}, {"in_engine", &kBoolean}, {"ops", &kTexts}};
constexpr SchemaType kPlugins = or_null(record_of(kPluginsFields));
constexpr SchemaType kCapability = text_of(is_compute_capability, "numbers like 8.9");
constexpr SchemaType kCapabilities = list_of(kCapability);
constexpr SchemaField kTensorRtFields[] = {{"version", &kText}, {"compute_capabilities", &kCapabilities},
    {"hardware_compatible", &kBoolean}, {"version_compatible", &kBoolean}, {"has_weights", &kBoolean},
    {"layers", &kCountMap}, {"weight_bytes", &kByteCount}, {"cache_bytes", &kByteCount},
    {"activation_bytes_estimated", &kByteCount}, {"builder_activation_bytes", &kByteCountOrNull}, {"onnx", &kFiles},
    {"plugins", &kPlugins}};
constexpr SchemaType kTensorRt = or_null(record_of(kTensorRtFields));

constexpr SchemaType kProductDType =
    text_of(is_product_dtype, "float32, tfloat32, float16, bfloat16, float8_e4m3, float4_e2m1, int32, int8, int4");
constexpr SchemaField kProductFields[] = {{"name", &kText}, {"left", &kProductDType}, {"right", &kProductDType},
    {"output", &kProductDType}, {"count", &kCount}};
constexpr SchemaType kProduct = record_of(kProductFields);
constexpr SchemaType kProducts = list_of(kProduct);
constexpr SchemaField kPlanTensorFields[] = {
    {"name", &kText}, {"op", &kText}, {"bytes", &kByteCountOrNull}, {"count", &kCount}};
constexpr SchemaType kPlanTensor = record_of(kPlanTensorFields);
constexpr SchemaType kPlanTensors = list_of(kPlanTensor);
constexpr SchemaType kLayerKernels = list_of(kCountOrNone);
constexpr SchemaField kStepFields[] = {{"kernels", &kCountOrNone}, {"layer_kernels", &kLayerKernels},
    {"matrix_products", &kProducts}, {"copies", &kPlanTensors}, {"weight_scratch", &kPlanTensors}};
constexpr SchemaType kStep = record_of(kStepFields);
constexpr SchemaType kPlan = or_null(map_of(kStep));

constexpr SchemaType kCacheDType = text_of(is_cache_dtype, kCacheDTypeWords);
constexpr SchemaField kKernelsFields[] = {{"file", &kText}, {"version", &kCount}, {"cache_dtype", &kCacheDType}};
constexpr SchemaType kKernels = or_null(record_of(kKernelsFields));

// What every engine has.
#define ENGINE_FIELDS                                                                                                  \
    {"file", &kText}, {"precision", &kText}, {"quantization", &kScalarMap}, {"weight_encodings", &kWeightEncodings},   \
        {"weight_hashes", &kWeightHashes}, {"inputs", &kIoTensors}, {"outputs", &kIoTensors},                          \
        {"tensorrt", &kTensorRt},                                                                                      \
    {                                                                                                                  \
        "plan", &kPlan                                                                                                 \
    }
constexpr SchemaField kTextEngineFields[] = {ENGINE_FIELDS, {"profiles", &kProfiles}, {"cache_dtype", &kText},
    {"logits_rows", &kCountOrNull}, {"kernels", &kKernels, true}};
constexpr SchemaType kTextEngine = record_of(kTextEngineFields);
constexpr SchemaField kVisionEngineFields[] = {ENGINE_FIELDS, {"max_batch", &kCount}};
#undef ENGINE_FIELDS
constexpr SchemaType kVisionEngine = or_null(record_of(kVisionEngineFields));
constexpr SchemaField kEnginesFields[] = {{"text", &kTextEngine}, {"vision", &kVisionEngine}};
constexpr SchemaType kEngines = record_of(kEnginesFields);

constexpr SchemaField kModelFields[] = {{"name", &kText}, {"model_type", &kText}, {"num_parameters", &kLargeCount},
    {"vocab_size", &kCount}, {"num_hidden_layers", &kCount}, {"num_attention_heads", &kCount},
    {"num_key_value_heads", &kCount}, {"head_dim", &kCount}, {"max_position_embeddings", &kCount},
    {"bos_token_id", &kIdOrNull}, {"eos_token_ids", &kIntegers}, {"pad_token_id", &kIdOrNull}, {"source", &kTextMap}};
constexpr SchemaType kModel = record_of(kModelFields);

constexpr SchemaField kTextFilesFields[] = {
    {"tokenizer", &kTextOrNull}, {"compiled_tokenizer", &kTextOrNull}, {"compiled_chat_template", &kTextOrNull}};
constexpr SchemaType kTextFiles = record_of(kTextFilesFields);

constexpr SchemaField kManifestFields[] = {{"format_version", &kAnyInteger}, {"model", &kModel}, {"target", &kText},
    {"engines", &kEngines}, {"max_context", &kCount}, {"max_batch", &kCount}, {"prefill_chunk", &kCount},
    {"text", &kTextFiles}, {"default_max_new_tokens", &kCountOrNull}, {"tool_versions", &kTextMap}, {"files", &kFiles}};
constexpr SchemaType kManifest = record_of(kManifestFields);

// Version 1 had one engine, the text engine, and its facts beside those of the bundle (runtime/bundle/version_1.py).
constexpr SchemaField kManifest1Fields[] = {{"format_version", &kAnyInteger}, {"model", &kModel}, {"target", &kText},
    {"max_context", &kCount}, {"max_batch", &kCount}, {"prefill_chunk", &kCount}, {"tool_versions", &kTextMap},
    {"files", &kFiles}, {"engine", &kText}, {"precision", &kText}, {"quantization", &kScalarMap},
    {"inputs", &kIoTensors}, {"outputs", &kIoTensors}, {"tensorrt", &kTensorRt}, {"profiles", &kProfiles},
    {"cache_dtype", &kText}};
constexpr SchemaType kManifest1 = record_of(kManifest1Fields);

/* -- From the document, whose types are checked, to the manifest, and the rules between keys ---------------------- */

constexpr char kNoMemory[] = "the manifest";

bool is_listed_twice(Array<std::string_view>& names, std::string_view& name)
{
    std::sort(names.begin(), names.end());
    std::string_view const* const twice = std::adjacent_find(names.begin(), names.end());
    if (twice == names.end())
    {
        return false;
    }
    name = *twice;
    return true;
}

/** "[B, 8, C]" */
class ShownShape
{
public:
    explicit ShownShape(Span<int64_t const> shape)
    {
        size_t length = 0;
        length += static_cast<size_t>(std::snprintf(text_, sizeof text_, "["));
        for (size_t i = 0; i < shape.size() && length + 32 < sizeof text_; ++i)
        {
            char const* const comma = i == 0 ? "" : ", ";
            length += static_cast<size_t>(shape[i] < 0
                    ? std::snprintf(text_ + length, 32, "%s%c", comma, static_cast<char>(-shape[i]))
                    : std::snprintf(text_ + length, 32, "%s%" PRId64, comma, shape[i]));
        }
        std::snprintf(text_ + length, sizeof text_ - length, "]");
    }
    char const* c_str() const { return text_; }

private:
    char text_[160];
};

class Reader
{
public:
    Reader(JsonValue document, Manifest& manifest, Error& error)
        : document_(document)
        , manifest_(manifest)
        , error_(error)
        , where_(kManifestName)
    {
    }

    Status read()
    {
        QWEN_AOT_TRY(read_version());
        bool const is_version_1 = manifest_.format_version == 1;
        QWEN_AOT_TRY(check_schema(document_, is_version_1 ? kManifest1 : kManifest,
            is_version_1 ? "manifest.json (format version 1)" : kManifestName, error_));
        QWEN_AOT_TRY(read_model(member(document_, "model")));
        QWEN_AOT_TRY(copy(member(document_, "target"), manifest_.target));
        manifest_.max_context = member(document_, "max_context").integer();
        manifest_.max_batch = member(document_, "max_batch").integer();
        manifest_.prefill_chunk = member(document_, "prefill_chunk").integer();
        QWEN_AOT_TRY(read_files(member(document_, "files")));
        if (is_version_1)
        {
            return read_version_1();
        }
        manifest_.default_max_new_tokens = or_none(member(document_, "default_max_new_tokens"));
        QWEN_AOT_TRY(read_text_files(member(document_, "text")));
        JsonValue const engines = member(document_, "engines");
        where_ = "manifest.json: engines: text";
        QWEN_AOT_TRY(read_text_engine(member(engines, "text"), member(member(engines, "text"), "file")));
        QWEN_AOT_TRY(read_text_only(member(engines, "text")));
        where_ = "manifest.json: engines: vision";
        return check_vision(member(engines, "vision"));
    }

private:
    static int64_t or_none(JsonValue value) { return value.is_null() ? -1 : value.integer(); }

    Status copy(JsonValue value, Text& text)
    {
        QWEN_AOT_NEED(text.assign(value.string()), error_, kNoMemory);
        return Status::ok;
    }

    /** Before anything else: another version may have other keys. */
    Status read_version()
    {
        JsonValue version;
        bool const is_there = document_.find("format_version", version);
        if (is_there && version.type() == JsonType::integer && (version.integer() == 1 || version.integer() == 2))
        {
            manifest_.format_version = static_cast<int32_t>(version.integer());
            return Status::ok;
        }
        return error_.fail(Status::bundle,
            "%s has format_version %s, this library reads 1 and 2: rebuild the bundle with a qwen-aot of this "
            "library's "
            "version, or use the library that came with the one that built it",
            kManifestName, is_there ? Quoted(version.source()).c_str() : "none");
    }

    Status read_version_1()
    {
        manifest_.default_max_new_tokens = -1;
        manifest_.has_vision = false;
        manifest_.text_engine.logits_rows = -1;
        QWEN_AOT_TRY(read_text_engine(document_, member(document_, "engine")));
        return check_logits();
    }

    Status read_model(JsonValue model)
    {
        QWEN_AOT_TRY(copy(member(model, "name"), manifest_.model_name));
        manifest_.num_parameters = member(model, "num_parameters").integer();
        manifest_.vocab_size = member(model, "vocab_size").integer();
        manifest_.num_hidden_layers = member(model, "num_hidden_layers").integer();
        QWEN_AOT_TRY(read_id(member(model, "bos_token_id"), "bos_token_id", manifest_.bos_token_id));
        QWEN_AOT_TRY(read_id(member(model, "pad_token_id"), "pad_token_id", manifest_.pad_token_id));
        JsonValue const ids = member(model, "eos_token_ids");
        for (size_t i = 0; i < ids.size(); ++i)
        {
            int64_t id = -1;
            QWEN_AOT_TRY(read_id(ids.at(i), "eos_token_ids", id));
            QWEN_AOT_NEED(manifest_.eos_token_ids.push(static_cast<int32_t>(id)), error_, kNoMemory);
        }
        return Status::ok;
    }

    Status read_id(JsonValue value, char const* key, int64_t& id)
    {
        id = or_none(value);
        if (!value.is_null() && (id < 0 || id >= manifest_.vocab_size))
        {
            return error_.fail(Status::bundle, "%s: model: %s is or holds %" PRId64 "; accepted: 0 to %" PRId64, where_,
                key, id, manifest_.vocab_size - 1);
        }
        return Status::ok;
    }

    Status read_files(JsonValue files)
    {
        for (size_t i = 0; i < files.size(); ++i)
        {
            FileEntry entry{};
            QWEN_AOT_NEED(entry.name.assign(files.key(i)), error_, kNoMemory);
            entry.bytes = member(files.at(i), "bytes").integer();
            static_cast<void>(parse_sha256(member(files.at(i), "sha256").string(), entry.sha256));
            QWEN_AOT_NEED(manifest_.files.push(std::move(entry)), error_, kNoMemory);
        }
        std::sort(manifest_.files.begin(), manifest_.files.end(),
            [](FileEntry const& left, FileEntry const& right) { return left.name.view() < right.name.view(); });
        return Status::ok;
    }

    Status require_file(char const* what, std::string_view name)
    {
        if (manifest_.find_file(name) != nullptr)
        {
            return Status::ok;
        }
        return error_.fail(Status::bundle,
            "%s: the %s %s is not among the bundle's %zu files; accepted: one that `files` lists", where_, what,
            Quoted(name).c_str(), manifest_.files.size());
    }

    Status read_text_files(JsonValue text)
    {
        struct File
        {
            char const* key;
            char const* what;
            Text* name;
        };
        File const files[] = {{"tokenizer", "tokenizer", nullptr},
            {"compiled_tokenizer", "compiled tokenizer", &manifest_.compiled_tokenizer},
            {"compiled_chat_template", "compiled chat template", &manifest_.compiled_chat_template}};
        for (File const& file : files)
        {
            JsonValue const value = member(text, file.key);
            if (value.is_null())
            {
                continue;
            }
            QWEN_AOT_TRY(require_file(file.what, value.string()));
            if (file.name != nullptr)
            {
                QWEN_AOT_TRY(copy(value, *file.name));
            }
        }
        return Status::ok;
    }

    /** What both versions say of the text engine. */
    Status read_text_engine(JsonValue entry, JsonValue file)
    {
        TextEngine& engine = manifest_.text_engine;
        QWEN_AOT_TRY(copy(file, engine.file));
        QWEN_AOT_TRY(require_file("engine file", file.string()));
        QWEN_AOT_TRY(copy(member(entry, "precision"), engine.precision));
        JsonValue fast;
        engine.has_fast_prefill = member(entry, "quantization").find("fast_prefill", fast)
            && (fast.boolean() || fast.integer() != 0 || !fast.string().empty());
        QWEN_AOT_TRY(read_tensors(member(entry, "inputs"), "input", engine.inputs));
        QWEN_AOT_TRY(read_tensors(member(entry, "outputs"), "output", engine.outputs));
        QWEN_AOT_TRY(read_profiles(member(entry, "profiles")));
        QWEN_AOT_TRY(check_cache(member(entry, "cache_dtype").string()));
        QWEN_AOT_TRY(read_rotary_length());
        JsonValue const tensorrt = member(entry, "tensorrt");
        engine.has_tensorrt = !tensorrt.is_null();
        return engine.has_tensorrt ? read_tensorrt(tensorrt, engine.tensorrt) : Status::ok;
    }

    /** What version 2 alone says of it. */
    Status read_text_only(JsonValue entry)
    {
        manifest_.text_engine.logits_rows = or_none(member(entry, "logits_rows"));
        QWEN_AOT_TRY(check_logits());
        QWEN_AOT_TRY(read_kernels(entry));
        Array<std::string_view> steps;
        for (Profile const& profile : manifest_.text_engine.profiles)
        {
            QWEN_AOT_NEED(steps.push(profile.name.view()), error_, kNoMemory);
        }
        std::sort(steps.begin(), steps.end());
        return check_plan(member(entry, "plan"), {steps.data(), steps.size()}, manifest_.num_hidden_layers);
    }

    Status read_kernels(JsonValue entry)
    {
        TextEngine& engine = manifest_.text_engine;
        JsonValue value;
        engine.has_kernels = entry.find("kernels", value) && !value.is_null();
        if (!engine.has_kernels)
        {
            return Status::ok;
        }
        if (manifest_.target.view() != "cpu")
        {
            return error_.fail(Status::bundle,
                "%s: the bundle's target is %s, and there are kernels, a graph for own CPU kernels; accepted: with "
                "target "
                "'cpu' alone",
                where_, Quoted(manifest_.target.view()).c_str());
        }
        QWEN_AOT_TRY(require_file("graph for own kernels", member(value, "file").string()));
        QWEN_AOT_TRY(copy(member(value, "file"), engine.kernels.file));
        engine.kernels.version = member(value, "version").integer();
        static_cast<void>(find_dtype(member(value, "cache_dtype").string(), engine.kernels.cache_dtype));
        return Status::ok;
    }

    Status read_tensors(JsonValue list, char const* kind, Array<IoTensor>& tensors)
    {
        Array<std::string_view> names;
        for (size_t i = 0; i < list.size(); ++i)
        {
            IoTensor tensor{};
            QWEN_AOT_TRY(copy(member(list.at(i), "name"), tensor.name));
            static_cast<void>(find_dtype(member(list.at(i), "dtype").string(), tensor.dtype));
            JsonValue const shape = member(list.at(i), "shape");
            for (size_t j = 0; j < shape.size(); ++j)
            {
                JsonValue const size = shape.at(j);
                int64_t const value = size.type() == JsonType::string ? -int64_t{size.string()[0]} : size.integer();
                QWEN_AOT_NEED(tensor.shape.push(value), error_, kNoMemory);
            }
            QWEN_AOT_NEED(tensors.push(std::move(tensor)), error_, kNoMemory);
            QWEN_AOT_NEED(names.push(member(list.at(i), "name").string()), error_, kNoMemory);
        }
        return require_once(names, kind);
    }

    Status require_once(Array<std::string_view>& names, char const* kind)
    {
        std::string_view name;
        if (!is_listed_twice(names, name))
        {
            return Status::ok;
        }
        return error_.fail(Status::bundle, "%s: the %s %s is listed twice; accepted: each name once", where_, kind,
            Quoted(name).c_str());
    }

    Status read_profiles(JsonValue list)
    {
        Array<std::string_view> names;
        for (size_t i = 0; i < list.size(); ++i)
        {
            Profile profile{};
            QWEN_AOT_TRY(copy(member(list.at(i), "name"), profile.name));
            profile.min_tokens = member(list.at(i), "min_tokens").integer();
            profile.max_tokens = member(list.at(i), "max_tokens").integer();
            if (profile.min_tokens > profile.max_tokens)
            {
                return error_.fail(Status::bundle,
                    "%s: the profile %s allows %" PRId64 " to %" PRId64
                    " tokens; accepted: min_tokens at most max_tokens",
                    where_, Quoted(profile.name.view()).c_str(), profile.min_tokens, profile.max_tokens);
            }
            QWEN_AOT_NEED(manifest_.text_engine.profiles.push(std::move(profile)), error_, kNoMemory);
            QWEN_AOT_NEED(names.push(member(list.at(i), "name").string()), error_, kNoMemory);
        }
        return require_once(names, "profile");
    }

    Status read_tensorrt(JsonValue value, TensorRtFacts& facts)
    {
        QWEN_AOT_TRY(copy(member(value, "version"), facts.version));
        JsonValue const capabilities = member(value, "compute_capabilities");
        for (size_t i = 0; i < capabilities.size(); ++i)
        {
            Text capability;
            QWEN_AOT_TRY(copy(capabilities.at(i), capability));
            QWEN_AOT_NEED(facts.compute_capabilities.push(std::move(capability)), error_, kNoMemory);
        }
        facts.is_version_compatible = member(value, "version_compatible").boolean();
        facts.is_hardware_compatible = member(value, "hardware_compatible").boolean();
        facts.has_weights = member(value, "has_weights").boolean();
        facts.weight_bytes = member(value, "weight_bytes").integer();
        facts.cache_bytes = member(value, "cache_bytes").integer();
        JsonValue const told = member(value, "builder_activation_bytes");
        facts.activation_bytes = (told.is_null() ? member(value, "activation_bytes_estimated") : told).integer();
        JsonValue const plugins = member(value, "plugins");
        facts.has_plugins = !plugins.is_null();
        if (!facts.has_plugins)
        {
            return Status::ok;
        }
        QWEN_AOT_TRY(copy(member(plugins, "file"), facts.plugin_file));
        QWEN_AOT_TRY(copy(member(plugins, "sha256"), facts.plugin_sha256));
        facts.has_plugins_in_engine = member(plugins, "in_engine").boolean();
        FileEntry const* const entry = manifest_.find_file(facts.plugin_file.view());
        if (entry == nullptr || facts.plugin_sha256.view() != Sha256Text(entry->sha256).c_str())
        {
            return error_.fail(Status::bundle,
                "%s: the plugin library %s with SHA-256 %s is not among the bundle's files; accepted: one that `files` "
                "lists so",
                where_, Quoted(facts.plugin_file.view()).c_str(), Quoted(facts.plugin_sha256.view()).c_str());
        }
        return Status::ok;
    }

    /** The name of an input rotary_offset.N has a number of tokens, of at most nine digits. */
    Status read_rotary_length()
    {
        TextEngine& engine = manifest_.text_engine;
        engine.rotary_length = -1;
        for (IoTensor const& tensor : engine.inputs)
        {
            std::string_view const name = tensor.name.view();
            if (!starts_with(name, kRotaryOffset))
            {
                continue;
            }
            int64_t length = 0;
            size_t const first = sizeof kRotaryOffset - 1;
            bool is_number = name.size() > first && name.size() <= first + 9 && name[first] != '0';
            for (size_t i = first; is_number && i < name.size(); ++i)
            {
                is_number = name[i] >= '0' && name[i] <= '9';
                length = 10 * length + (name[i] - '0');
            }
            if (!is_number)
            {
                return error_.fail(Status::bundle,
                    "%s: the input %s names no number of tokens; accepted: rotary_offset.N, N from 1 to 999999999",
                    where_, Quoted(name).c_str());
            }
            engine.rotary_length = length;
            return Status::ok;
        }
        return Status::ok;
    }

    /** The cache inputs are [B, Hkv, C, D], scales [B, Hkv, C], all with one C of enough slots. */
    Status check_cache(std::string_view dtype)
    {
        TextEngine& engine = manifest_.text_engine;
        bool const is_known = find_dtype(dtype, engine.cache_dtype);
        int64_t const slots = manifest_.max_context + manifest_.prefill_chunk;
        int64_t capacity = 0; // of the cache inputs so far
        for (IoTensor const& tensor : engine.inputs)
        {
            std::string_view const name = tensor.name.view();
            if (!starts_with(name, kCachePrefix))
            {
                continue;
            }
            if (!facts_of(tensor.dtype).is_of_cache || !is_cache_shape(tensor.shape.view(), slots))
            {
                return error_.fail(Status::bundle,
                    "%s: the cache input %s is %s %s; accepted: %s of shape [B, heads, C, size] or [B, heads, C], C "
                    "the "
                    "letter or at least max_context + prefill_chunk = %" PRId64,
                    where_, Quoted(name).c_str(), dtype_name(tensor.dtype), ShownShape(tensor.shape.view()).c_str(),
                    kCacheDTypeWords, slots);
            }
            if (!ends_with(name, "_scale") && (!is_known || tensor.dtype != engine.cache_dtype))
            {
                return error_.fail(Status::bundle, "%s: cache_dtype is %s, but %s is %s; accepted: one for all", where_,
                    Quoted(dtype).c_str(), Quoted(name).c_str(), dtype_name(tensor.dtype));
            }
            if (capacity != 0 && tensor.shape[2] != capacity)
            {
                return error_.fail(Status::bundle,
                    "%s: the cache input %s has the shape %s, and others another capacity; accepted: one for all",
                    where_, Quoted(name).c_str(), ShownShape(tensor.shape.view()).c_str());
            }
            capacity = tensor.shape[2];
        }
        return Status::ok;
    }

    static bool is_cache_shape(Span<int64_t const> shape, int64_t slots)
    {
        return (shape.size() == 3 || shape.size() == 4) && shape[0] == -'B' && shape[1] > 0
            && (shape[2] == -'C' || shape[2] >= slots) && (shape.size() == 3 || shape[3] > 0);
    }

    /** The output `last_logits` and its input are there exactly if `logits_rows` is, with their shapes. */
    Status check_logits()
    {
        TextEngine const& engine = manifest_.text_engine;
        // A row of the cache has room for a prefill chunk more than its context.
        if (engine.logits_rows > 0 && (engine.logits_rows < 2 || engine.logits_rows > manifest_.prefill_chunk))
        {
            return error_.fail(Status::bundle,
                "%s: logits_rows is %" PRId64 "; accepted: 2 to prefill_chunk = %" PRId64, where_, engine.logits_rows,
                manifest_.prefill_chunk);
        }
        int64_t const last[] = {-'B', -'T', manifest_.vocab_size};
        int64_t const positions[] = {-'T'};
        QWEN_AOT_TRY(check_with_rows("output", engine.outputs, kLastLogits, DType::float32, {last, 3}));
        return check_with_rows("input", engine.inputs, kLogitsPositions, DType::int64, {positions, 1});
    }

    /** A tensor is there exactly if `logits_rows` is, and is of this type and shape. */
    Status check_with_rows(
        char const* kind, Array<IoTensor> const& tensors, char const* name, DType dtype, Span<int64_t const> shape)
    {
        int64_t const rows = manifest_.text_engine.logits_rows;
        IoTensor const* found = nullptr;
        for (IoTensor const& tensor : tensors)
        {
            found = tensor.name.view() == name ? &tensor : found;
        }
        bool fits = (found != nullptr) == (rows > 0);
        if (found != nullptr)
        {
            fits = fits && found->dtype == dtype && found->shape.size() == shape.size()
                && std::equal(shape.begin(), shape.end(), found->shape.begin());
        }
        if (fits)
        {
            return Status::ok;
        }
        return error_.fail(Status::bundle,
            "%s: logits_rows is %" PRId64
            " (-1: null), and the %s %s is %s%s; accepted: %s%s with logits_rows, or neither",
            where_, rows, kind, name, found == nullptr ? "absent" : dtype_name(found->dtype),
            found == nullptr ? "" : ShownShape(found->shape.view()).c_str(), dtype_name(dtype),
            ShownShape(shape).c_str());
    }

    /** steps: names that there are, sorted. num_layers: how many a step must count, if it counts any; -1: any number. */
    Status check_plan(JsonValue plan, Span<std::string_view const> steps, int64_t num_layers)
    {
        for (size_t i = 0; i < plan.size(); ++i)
        {
            if (!std::binary_search(steps.begin(), steps.end(), plan.key(i)))
            {
                return error_.fail(Status::bundle, "%s: the plan has the step %s; accepted: %s", where_,
                    Quoted(plan.key(i)).c_str(), num_layers < 0 ? "encode" : "the names of profiles");
            }
            int64_t const kernels = member(plan.at(i), "kernels").integer();
            JsonValue const layers = member(plan.at(i), "layer_kernels");
            int64_t sum = 0; // each is below 2^31, and a text has less than 2^32 of them
            for (size_t j = 0; j < layers.size(); ++j)
            {
                sum += layers.at(j).integer();
            }
            if (kernels < sum)
            {
                return error_.fail(Status::bundle,
                    "%s: plan: %s: kernels is %" PRId64 ", and layer_kernels are %" PRId64
                    " together; accepted: at least as many",
                    where_, Quoted(plan.key(i)).c_str(), kernels, sum);
            }
            if (num_layers >= 0 && layers.size() != 0 && static_cast<int64_t>(layers.size()) != num_layers)
            {
                return error_.fail(Status::bundle,
                    "%s: plan: %s: layer_kernels are of %zu layers; accepted: %" PRId64 ", or none", where_,
                    Quoted(plan.key(i)).c_str(), layers.size(), num_layers);
            }
        }
        return Status::ok;
    }

    /** This library runs no vision engine, and checks what is said of it. */
    Status check_vision(JsonValue entry)
    {
        manifest_.has_vision = !entry.is_null();
        if (!manifest_.has_vision)
        {
            return Status::ok;
        }
        QWEN_AOT_TRY(require_file("engine file", member(entry, "file").string()));
        for (bool const is_input : {true, false})
        {
            Array<IoTensor> tensors;
            QWEN_AOT_TRY(
                read_tensors(member(entry, is_input ? "inputs" : "outputs"), is_input ? "input" : "output", tensors));
            for (IoTensor const& tensor : tensors)
            {
                Span<int64_t const> const shape = tensor.shape.view();
                if (shape.empty() || shape[0] != -'B'
                    || std::any_of(shape.begin() + 1, shape.end(), [](int64_t size) { return size < 0; }))
                {
                    return error_.fail(Status::bundle, "%s: %s has the shape %s; accepted: B, then sizes", where_,
                        Quoted(tensor.name.view()).c_str(), ShownShape(shape).c_str());
                }
            }
        }
        std::string_view const step = "encode";
        QWEN_AOT_TRY(check_plan(member(entry, "plan"), {&step, 1}, -1));
        TensorRtFacts facts{};
        JsonValue const tensorrt = member(entry, "tensorrt");
        return tensorrt.is_null() ? Status::ok : read_tensorrt(tensorrt, facts);
    }

    JsonValue const document_;
    Manifest& manifest_;
    Error& error_;
    char const* where_; // for the rules between keys
};

} // namespace

size_t dtype_bytes(DType type)
{
    return facts_of(type).bytes;
}

char const* dtype_name(DType type)
{
    return facts_of(type).name;
}

bool find_dtype(std::string_view name, DType& type)
{
    for (size_t i = 0; i < std::size(kDTypes); ++i)
    {
        if (name == kDTypes[i].name)
        {
            type = static_cast<DType>(i);
            return true;
        }
    }
    return false;
}

int64_t TextEngine::rotary_table(int64_t tokens) const
{
    int64_t table = 0;
    for (int64_t last = rotary_length; last > 0 && last < tokens; last *= 2)
    {
        ++table;
    }
    return table;
}

void TextEngine::use_kernels()
{
    for (Array<IoTensor>* const tensors : {&inputs, &outputs})
    {
        for (IoTensor& tensor : *tensors)
        {
            std::string_view const name = tensor.name.view();
            bool const is_cache = starts_with(name, kCachePrefix) || starts_with(name, kPresentPrefix);
            tensor.dtype = is_cache && tensor.dtype == cache_dtype ? kernels.cache_dtype : tensor.dtype;
        }
    }
    file = std::move(kernels.file);
    cache_dtype = kernels.cache_dtype;
    has_kernels = false;
}

int64_t Manifest::max_capacity() const
{
    return (max_context + prefill_chunk + kCapacityStep - 1) / kCapacityStep * kCapacityStep;
}

FileEntry const* Manifest::find_file(std::string_view name) const
{
    FileEntry const* const found = std::lower_bound(files.begin(), files.end(), name,
        [](FileEntry const& entry, std::string_view wanted) { return entry.name.view() < wanted; });
    return found != files.end() && found->name.view() == name ? found : nullptr;
}

Status Manifest::parse(std::string_view text, Manifest& manifest, Error& error)
{
    JsonDocument document;
    QWEN_AOT_TRY(JsonDocument::parse(text, kManifestName, JsonOrigin::ours, document, error));
    Manifest read{};
    QWEN_AOT_TRY(Reader(document.root(), read, error).read());
    manifest = std::move(read);
    return Status::ok;
}

} // namespace qwen_aot
