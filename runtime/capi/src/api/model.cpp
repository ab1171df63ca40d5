/** Options and models. */

#include "api/handles.h"
#include "base/utf8.h"

#include <cstring>

using namespace qwen_aot;

namespace
{

constexpr int32_t kMaxThreads = 1024;

Status set_library(qwen_aot_options& options, qwen_aot_library library, std::string_view path, Error& error)
{
    Text* target = nullptr;
    switch (library)
    {
    case QWEN_AOT_LIBRARY_ONNXRUNTIME: target = &options.engine.onnxruntime_path; break;
    case QWEN_AOT_LIBRARY_TENSORRT: target = &options.engine.tensorrt_path; break;
    case QWEN_AOT_LIBRARY_CUDA_DRIVER: target = &options.engine.cuda_driver_path; break;
    case QWEN_AOT_LIBRARY_PLUGINS: target = &options.engine.plugins_path; break;
    case QWEN_AOT_LIBRARY_CPU_KERNELS: target = &options.engine.cpu_kernels_path; break;
    default:
        return error.fail(
            Status::invalid_argument, "library is %d; accepted: one of QWEN_AOT_LIBRARY_*", static_cast<int>(library));
    }
    if (std::memchr(path.data(), '\0', path.size()) != nullptr)
    {
        return error.fail(Status::invalid_argument, "the library's path holds a NUL; accepted: a path");
    }
    QWEN_AOT_NEED(target->assign(path), error, "a path");
    return Status::ok;
}

/** Opens what turns text into ids and back, where the bundle has it. */
Status open_text(qwen_aot_model& model, Error& error)
{
    Manifest const& manifest = model.bundle.manifest();
    if (!manifest.compiled_tokenizer.empty())
    {
        std::string_view const name = manifest.compiled_tokenizer.view();
        QWEN_AOT_TRY(model.bundle.map(name, model.tokenizer_file, error));
        Status const status =
            Tokenizer::open(model.tokenizer_file.bytes(), manifest.vocab_size, model.tokenizer, error);
        if (status != Status::ok)
        {
            return error.inside(name);
        }
        model.tokenizer_file.drop_pages(); // all were read for the checksum, and a text needs few
        model.has_tokenizer = true;
    }
    if (!manifest.compiled_chat_template.empty() && model.has_tokenizer)
    {
        std::string_view const name = manifest.compiled_chat_template.view();
        QWEN_AOT_TRY(model.bundle.map(name, model.template_file, error));
        Status const status = ChatTemplate::open(model.template_file.bytes(), model.chat_template, error);
        if (status != Status::ok)
        {
            return error.inside(name);
        }
        model.has_template = true;
    }
    return Status::ok;
}

Status open_model(std::string_view path, qwen_aot_options const& options, qwen_aot_model** result, Error& error)
{
    Box<qwen_aot_model> model = make<qwen_aot_model>();
    QWEN_AOT_NEED(model != nullptr, error, "a model");
    model->process = system::process_id();
    model->log = options.engine.log;
    QWEN_AOT_TRY(Bundle::open(path, options.hash_limit, model->bundle, error));
    QWEN_AOT_TRY(open_text(*model, error));
    QWEN_AOT_TRY(GenerationDefaults::from_bundle(model->bundle, model->log, model->defaults, error));
    QWEN_AOT_TRY(open_backend(model->bundle, options.engine, model->backend, error));
    model->hold();
    *result = model.release();
    return Status::ok;
}

} // namespace

qwen_aot_model::~qwen_aot_model()
{
    if (system::process_id() != process)
    {
        // The threads that its end would wait for are in the parent.
        static_cast<void>(backend.release());
    }
}

extern "C" qwen_aot_status qwen_aot_options_create(qwen_aot_options** options, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(options, "options", failure));
        *options = make<qwen_aot_options>().release();
        QWEN_AOT_NEED(*options != nullptr, failure, "options");
        return Status::ok;
    });
}

extern "C" void qwen_aot_options_free(qwen_aot_options* options)
{
    Box<qwen_aot_options> const held(options);
}

extern "C" qwen_aot_status qwen_aot_options_set_threads(
    qwen_aot_options* options, int32_t threads, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(options, "options", failure));
        if (threads < 0 || threads > kMaxThreads)
        {
            return failure.fail(Status::invalid_argument, "threads is %d; accepted: 1 to %d, or 0 for one on each core",
                static_cast<int>(threads), kMaxThreads);
        }
        options->engine.threads = threads;
        return Status::ok;
    });
}

extern "C" qwen_aot_status qwen_aot_options_set_library(
    qwen_aot_options* options, qwen_aot_library library, char const* path, size_t length, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        std::string_view text;
        QWEN_AOT_TRY(api::given(options, "options", failure));
        QWEN_AOT_TRY(api::text_of(path, length, "path", text, failure));
        QWEN_AOT_TRY(set_library(*options, library, text, failure));
        return Status::ok;
    });
}

extern "C" qwen_aot_status qwen_aot_options_set_kernels(
    qwen_aot_options* options, qwen_aot_kernels kernels, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(options, "options", failure));
        if (kernels < QWEN_AOT_KERNELS_AUTO || kernels > QWEN_AOT_KERNELS_ONNXRUNTIME)
        {
            return failure.fail(Status::invalid_argument, "kernels is %d; accepted: one of QWEN_AOT_KERNELS_*",
                static_cast<int>(kernels));
        }
        options->engine.kernels = static_cast<Kernels>(kernels);
        return Status::ok;
    });
}

extern "C" qwen_aot_status qwen_aot_options_set_hash_limit(
    qwen_aot_options* options, uint64_t bytes, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(options, "options", failure));
        options->hash_limit = bytes;
        return Status::ok;
    });
}

extern "C" qwen_aot_status qwen_aot_options_set_allow_bundle_code(
    qwen_aot_options* options, int32_t is_allowed, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(options, "options", failure));
        QWEN_AOT_TRY(api::check_flag(is_allowed, "is_allowed", failure));
        options->engine.allow_bundle_code = is_allowed != 0;
        return Status::ok;
    });
}

extern "C" qwen_aot_status qwen_aot_options_set_log(
    qwen_aot_options* options, qwen_aot_log_callback callback, void* user, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(options, "options", failure));
        options->engine.log = Log(callback, user);
        return Status::ok;
    });
}

extern "C" qwen_aot_status qwen_aot_model_open(
    char const* path, size_t length, qwen_aot_options const* options, qwen_aot_model** model, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        std::string_view text;
        QWEN_AOT_TRY(api::given(model, "model", failure));
        *model = nullptr;
        QWEN_AOT_TRY(api::given(path, "path", failure));
        QWEN_AOT_TRY(api::text_of(path, length, "path", text, failure));
        if (text.empty() || std::memchr(text.data(), '\0', text.size()) != nullptr)
        {
            return failure.fail(Status::invalid_argument, "path is %s; accepted: the folder of a bundle",
                text.empty() ? "empty" : "a text with a NUL in it");
        }
        qwen_aot_options const defaults;
        QWEN_AOT_TRY(open_model(text, options == nullptr ? defaults : *options, model, failure));
        return Status::ok;
    });
}

extern "C" void qwen_aot_model_free(qwen_aot_model* model)
{
    if (model != nullptr && model->drop())
    {
        Unmake()(model);
    }
}

extern "C" qwen_aot_status qwen_aot_model_fact(
    qwen_aot_model const* model, qwen_aot_fact fact, int64_t* value, qwen_aot_error** error)
{
    return api::run(error, [&](Error& failure) {
        QWEN_AOT_TRY(api::given(value, "value", failure));
        *value = 0;
        QWEN_AOT_TRY(api::given(model, "model", failure));
        Manifest const& manifest = model->bundle.manifest();
        switch (fact)
        {
        case QWEN_AOT_FACT_FORMAT_VERSION: *value = manifest.format_version; break;
        case QWEN_AOT_FACT_VOCAB_SIZE: *value = manifest.vocab_size; break;
        case QWEN_AOT_FACT_MAX_CONTEXT: *value = manifest.max_context; break;
        case QWEN_AOT_FACT_MAX_BATCH: *value = manifest.max_batch; break;
        case QWEN_AOT_FACT_PREFILL_CHUNK: *value = manifest.prefill_chunk; break;
        case QWEN_AOT_FACT_NUM_LAYERS: *value = manifest.num_hidden_layers; break;
        case QWEN_AOT_FACT_NUM_PARAMETERS: *value = manifest.num_parameters; break;
        case QWEN_AOT_FACT_BOS_TOKEN_ID: *value = manifest.bos_token_id; break;
        case QWEN_AOT_FACT_PAD_TOKEN_ID: *value = manifest.pad_token_id; break;
        case QWEN_AOT_FACT_DEFAULT_MAX_NEW_TOKENS: *value = model->defaults.max_new_tokens.otherwise(-1); break;
        case QWEN_AOT_FACT_HAS_TOKENIZER: *value = model->has_tokenizer ? 1 : 0; break;
        case QWEN_AOT_FACT_HAS_CHAT_TEMPLATE: *value = model->has_template ? 1 : 0; break;
        case QWEN_AOT_FACT_HAS_VISION: *value = manifest.has_vision ? 1 : 0; break;
        case QWEN_AOT_FACT_HAS_OWN_KERNELS: *value = model->backend->has_own_kernels() ? 1 : 0; break;
        default:
            return failure.fail(
                Status::unsupported, "fact is %d; accepted: one of QWEN_AOT_FACT_*", static_cast<int>(fact));
        }
        return Status::ok;
    });
}

extern "C" char const* qwen_aot_model_name(qwen_aot_model const* model, size_t* length)
{
    return api::give(model == nullptr ? std::string_view("") : model->bundle.manifest().model_name.view(), length);
}

extern "C" char const* qwen_aot_model_target(qwen_aot_model const* model, size_t* length)
{
    return api::give(model == nullptr ? std::string_view("") : model->bundle.manifest().target.view(), length);
}

extern "C" char const* qwen_aot_model_precision(qwen_aot_model const* model, size_t* length)
{
    return api::give(
        model == nullptr ? std::string_view("") : model->bundle.manifest().text_engine.precision.view(), length);
}

extern "C" int32_t const* qwen_aot_model_eos_token_ids(qwen_aot_model const* model, size_t* count)
{
    Span<int32_t const> const ids = model == nullptr ? Span<int32_t const>() : model->defaults.eos_token_ids.view();
    if (count != nullptr)
    {
        *count = ids.size();
    }
    return ids.data();
}
