/**
 * qwen_aot.h: opens bundles that qwen-aot compiled, and generates text with them. C99; usable from C++.
 *
 * Strings. Every string that goes in is UTF-8 with its length in bytes; QWEN_AOT_TO_NUL for the length means that a NUL
 * ends it. Every string that comes out has a length too, and a NUL behind it that the length doesn't count.
 *
 * Ownership. Handles are opaque. What a function of the name *_create or *_open gives belongs to the caller, who gives
 * it to the *_free of the same name; free(NULL) does nothing. A handle that was made from another keeps that one alive:
 * they may be freed in any order. A pointer to const that comes out belongs to the handle that gave it, and is valid as
 * long as the function says.
 *
 * Errors. A function that can fail returns a status. Where it takes `qwen_aot_error** error` and that isn't NULL,
 * *error is set to a new object with the message, to be freed by the caller, or to NULL if nothing failed (or if there
 * wasn't memory for the object); what it pointed to before isn't freed. On failure, outputs other than *error are 0 or NULL unless the function says
 * otherwise, and every handle is as it was before.
 *
 * Threads. There is nothing to initialize and nothing to shut down. A model is immutable: any number of threads may
 * use one at once. Every other handle is used by one thread at a time; a generator, a chat and raw rows answer
 * QWEN_AOT_BUSY to a second thread, and to a callback that calls back into them, rather than break. What any thread may
 * call at any time says so. A handle may be freed in a callback, or while another thread is in a call on it: that call
 * ends as it would, and takes the handle with it. (None may begin then, cancelling neither.)
 *
 * Processes. After fork() a child may free its parent's handles and use what of them runs no engine: facts, tokens,
 * detokenizers, conversations, configs. Generators, chats and raw rows answer QWEN_AOT_WRONG_PROCESS there, since the
 * engine's threads are in the parent; what the engine's library holds is left to the child's end. A model may be opened
 * anew in the child if no thread of the parent was opening one. exit() needs nothing to be freed.
 *
 * Versions. Within one major number of QWEN_AOT_API_VERSION nothing that stands here changes or goes; functions,
 * status codes and enumerators may come. The library's SONAME has the major number.
 */
#ifndef QWEN_AOT_H
#define QWEN_AOT_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define QWEN_AOT_API __attribute__((visibility("default")))
#define QWEN_AOT_CHECK __attribute__((warn_unused_result))
#else
#define QWEN_AOT_API
#define QWEN_AOT_CHECK
#endif

#ifdef __cplusplus
extern "C"
{
#endif

/** The interface described here: major << 16 | minor. */
#define QWEN_AOT_API_VERSION 0x00010000u

/** As the length of a string that goes in: a NUL ends it. */
#define QWEN_AOT_TO_NUL ((size_t)-1)

/* ---------------------------------------------------------------------------------------------------------------------
 * Versions and errors
 * ------------------------------------------------------------------------------------------------------------------ */

/** What a call came to. Codes of later minor versions may come: take what isn't known for a failure. */
typedef int32_t qwen_aot_status;
enum
{
    QWEN_AOT_OK = 0,
    QWEN_AOT_INVALID_ARGUMENT = 1, /**< NULL where something must be, a value out of range, text that isn't UTF-8 */
    QWEN_AOT_OUT_OF_MEMORY = 2,
    QWEN_AOT_IO = 3,              /**< a file is missing, can't be read, or vanished */
    QWEN_AOT_BUNDLE = 4,          /**< the bundle is damaged, of another format, or has code that may not run */
    QWEN_AOT_ENGINE_MISMATCH = 5, /**< the engine's library or device is missing, or doesn't fit the bundle */
    QWEN_AOT_ENGINE_FAILED = 6,   /**< the engine's library failed in a step; its message is in the error's */
    QWEN_AOT_CONTEXT_FULL = 7,    /**< a prompt or conversation is longer than the bundle's context */
    QWEN_AOT_UNSUPPORTED = 8,     /**< this bundle or this build lacks what was asked for */
    QWEN_AOT_BUSY = 9,            /**< another call on the same handle is at work */
    QWEN_AOT_CANCELLED = 10,
    QWEN_AOT_BUFFER_TOO_SMALL = 11, /**< nothing was written; the needed size was */
    QWEN_AOT_WRONG_PROCESS = 12,    /**< the handle was made before fork(), in the parent */
    QWEN_AOT_NOT_FINITE = 13        /**< the engine's logits have NaN or Inf */
};

/** What failed and what to do about it. Immutable: any threads may read it. */
typedef struct qwen_aot_error qwen_aot_error;

/** The interface that the library has: major << 16 | minor. A program that was compiled with a newer minor number than
 *  this may call what isn't there. Any thread. */
QWEN_AOT_API uint32_t qwen_aot_api_version(void);

/** The library's own version, such as "0.1.0"; static. Any thread. */
QWEN_AOT_API char const* qwen_aot_version(void);

/** A status as a word ("BUSY"); "unknown" for codes that this version lacks. Static. Any thread. */
QWEN_AOT_API char const* qwen_aot_status_name(qwen_aot_status status);

/** The status that came with it; QWEN_AOT_OK for NULL. */
QWEN_AOT_API qwen_aot_status qwen_aot_error_status(qwen_aot_error const* error);

/** The message, valid until the error is freed; "" for NULL. `length` may be NULL. */
QWEN_AOT_API char const* qwen_aot_error_message(qwen_aot_error const* error, size_t* length);

QWEN_AOT_API void qwen_aot_error_free(qwen_aot_error* error);

/* ---------------------------------------------------------------------------------------------------------------------
 * Options and models
 * ------------------------------------------------------------------------------------------------------------------ */

/** How a model is opened. Read by qwen_aot_model_open and not kept. */
typedef struct qwen_aot_options qwen_aot_options;

/** A bundle and its engine: weights, tokenizer, chat template. Immutable; any threads may use it at once. */
typedef struct qwen_aot_model qwen_aot_model;

/** The engine's library, for qwen_aot_options_set_library. */
typedef int32_t qwen_aot_library;
enum
{
    QWEN_AOT_LIBRARY_ONNXRUNTIME = 1, /**< libonnxruntime.so.1.*, of ONNX Runtime 1.32 or later (target cuda: 1.31) */
    QWEN_AOT_LIBRARY_TENSORRT = 2,    /**< libnvinfer.so.10 or libtensorrt_rtx.so: targets tensorrt, tensorrt-rtx */
    QWEN_AOT_LIBRARY_CUDA_DRIVER = 3, /**< libcuda.so.1 */
    QWEN_AOT_LIBRARY_PLUGINS = 4,     /**< libqwen_aot_plugins.so: the installed one, that bundles' are compared with */
    QWEN_AOT_LIBRARY_CPU_KERNELS = 5 /**< libqwen_aot_cpu.so: own kernels for the CPU, which bundles have a graph for */
};

/** Which kernels run a bundle on the CPU, for qwen_aot_options_set_kernels. */
typedef int32_t qwen_aot_kernels;
enum
{
    QWEN_AOT_KERNELS_AUTO =
        0,                    /**< own ones where bundle and machine have them, else ONNX Runtime's; the log says why */
    QWEN_AOT_KERNELS_OWN = 1, /**< own ones, or ENGINE_MISMATCH */
    QWEN_AOT_KERNELS_ONNXRUNTIME = 2 /**< ONNX Runtime's */
};

/** How important a message of the log is. */
typedef int32_t qwen_aot_log_level;
enum
{
    QWEN_AOT_LOG_DEBUG = 10,
    QWEN_AOT_LOG_INFO = 20,
    QWEN_AOT_LOG_WARNING = 30,
    QWEN_AOT_LOG_ERROR = 40
};

/** Takes a message; it may come on any thread that is in a call of this library (several at once, if several are), and
 *  must not call back into it. `message`: UTF-8, at most 1,536 bytes, valid during the call. */
typedef void (*qwen_aot_log_callback)(void* user, qwen_aot_log_level level, char const* message, size_t length);

QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_options_create(qwen_aot_options** options, qwen_aot_error** error);
QWEN_AOT_API void qwen_aot_options_free(qwen_aot_options* options);

/** Threads for one operation of a CPU engine, the caller's included: 1 to 1024; 0, the default: one for each core that
 *  this process may use. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_options_set_threads(
    qwen_aot_options* options, int32_t threads, qwen_aot_error** error);

/** The full path of a library to open, copied; "" takes it back. A "~" is a name like others. Not given: for ONNX Runtime
 *  the environment's QWEN_AOT_ONNXRUNTIME, for the plugins QWEN_AOT_PLUGIN_LIBRARY, else the system's search for the
 *  name; for the CPU's kernels QWEN_AOT_CPU_KERNELS, else the file libqwen_aot_cpu.so in the folder that this library was
 *  loaded from (of a static one: the program's), and no search. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_options_set_library(
    qwen_aot_options* options, qwen_aot_library library, char const* path, size_t length, qwen_aot_error** error);

/** Which kernels run a bundle whose manifest has a graph for own ones; the default is AUTO. With AUTO, a library of them that
 *  isn't there, is of another version, or serves another ONNX Runtime in this process already is no failure: the log tells
 *  it, and ONNX Runtime's kernels run. (One that the option or the environment names is wanted, as with OWN.)
 *  QWEN_AOT_FACT_HAS_OWN_KERNELS says what came of it. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_options_set_kernels(
    qwen_aot_options* options, qwen_aot_kernels kernels, qwen_aot_error** error);

/** Files of more bytes than this are checked by their size alone, and smaller ones by SHA-256 too: 0 checks sizes only,
 *  UINT64_MAX, the default, hashes all. (Files that lie in a model hub's cache are always hashed.) */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_options_set_hash_limit(
    qwen_aot_options* options, uint64_t bytes, qwen_aot_error** error);

/** Whether native code that the bundle brings may run (0 or 1; default 0). QWEN_AOT_ALLOW_BUNDLE_CODE=1 in the
 *  environment allows it too. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_options_set_allow_bundle_code(
    qwen_aot_options* options, int32_t is_allowed, qwen_aot_error** error);

/** Where warnings and notes of this model go, as long as it lives; NULL, the default: nowhere. Nothing is ever printed. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_options_set_log(
    qwen_aot_options* options, qwen_aot_log_callback callback, void* user, qwen_aot_error** error);

/** Opens a bundle's folder: checks its manifest and files, maps its text tables, loads the engine's library and the
 *  engine. Takes seconds for large weights: they are mapped, but for those that ONNX Runtime repacks and those that own
 *  CPU kernels copy into large pages (where memory allows it, and QWEN_AOT_CPU_WEIGHTS isn't "mapped"). While the model
 *  lives, the bundle's files may be deleted, or replaced by renaming others over them; one that is cut where it
 *  lies ends the process with SIGBUS, and one that is overwritten there was checked before and isn't again: write to none.
 *  path: of the folder; may lie in a model hub's cache, whose links into its own blobs are followed.
 *  options: NULL: all defaults.
 *  IO, BUNDLE, ENGINE_MISMATCH, OUT_OF_MEMORY: the message names the file or library, and what to do. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_model_open(
    char const* path, size_t length, qwen_aot_options const* options, qwen_aot_model** model, qwen_aot_error** error);

/** Gives the caller's hold on a model back; generators made from it keep it until they are freed. */
QWEN_AOT_API void qwen_aot_model_free(qwen_aot_model* model);

/** A fact of a model that is a whole number. */
typedef int32_t qwen_aot_fact;
enum
{
    QWEN_AOT_FACT_FORMAT_VERSION = 1, /**< of the bundle: 1 or 2 */
    QWEN_AOT_FACT_VOCAB_SIZE = 2,     /**< logits of a row; ids are 0 to this less 1 */
    QWEN_AOT_FACT_MAX_CONTEXT = 3,    /**< tokens of a sequence */
    QWEN_AOT_FACT_MAX_BATCH = 4,      /**< sequences at once: rows of a generator */
    QWEN_AOT_FACT_PREFILL_CHUNK = 5,  /**< tokens of a prefill step */
    QWEN_AOT_FACT_NUM_LAYERS = 6,
    QWEN_AOT_FACT_NUM_PARAMETERS = 7,
    QWEN_AOT_FACT_BOS_TOKEN_ID = 8,            /**< -1: none */
    QWEN_AOT_FACT_PAD_TOKEN_ID = 9,            /**< -1: none */
    QWEN_AOT_FACT_DEFAULT_MAX_NEW_TOKENS = 10, /**< of a request that doesn't say; -1: see docs/generation.md */
    QWEN_AOT_FACT_HAS_TOKENIZER = 11,          /**< 1: text is compiled; 0: this library takes and gives ids only */
    QWEN_AOT_FACT_HAS_CHAT_TEMPLATE = 12,      /**< 1: conversations without tools can be rendered */
    QWEN_AOT_FACT_HAS_VISION = 13,     /**< 1: the bundle takes images too, which this library doesn't: text alone */
    QWEN_AOT_FACT_HAS_OWN_KERNELS = 14 /**< 1: own kernels for the CPU run it, 0: the engine's library alone */
};

/** UNSUPPORTED: no such fact. Any thread. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_model_fact(
    qwen_aot_model const* model, qwen_aot_fact fact, int64_t* value, qwen_aot_error** error);

/** The model's name, target ("cpu") and precision ("int8"), valid as long as the model; `length` may be NULL.
 *  Any thread. */
QWEN_AOT_API char const* qwen_aot_model_name(qwen_aot_model const* model, size_t* length);
QWEN_AOT_API char const* qwen_aot_model_target(qwen_aot_model const* model, size_t* length);
QWEN_AOT_API char const* qwen_aot_model_precision(qwen_aot_model const* model, size_t* length);

/** The ids that end an answer, valid as long as the model. Any thread. */
QWEN_AOT_API int32_t const* qwen_aot_model_eos_token_ids(qwen_aot_model const* model, size_t* count);

/* ---------------------------------------------------------------------------------------------------------------------
 * Text. All of these answer UNSUPPORTED where the bundle has no compiled tokenizer.
 * ------------------------------------------------------------------------------------------------------------------ */

/** Flags of qwen_aot_tokenize and of conversations. */
enum
{
    /** Texts that spell a control token (<|im_end|>) become that token. */
    QWEN_AOT_ALLOW_SPECIAL_TOKENS = 1
};

/** Turns text into ids, as the tokenizer does (of a plain text control tokens only with ALLOW_SPECIAL_TOKENS).
 *  text: UTF-8 of at most 1 GiB; any characters, NUL too.
 *  ids[capacity]: the caller's. *count: how many there are, also if they don't fit (BUFFER_TOO_SMALL); ids may be NULL
 *  where capacity is 0. Any thread. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_tokenize(qwen_aot_model const* model, char const* text,
    size_t length, uint32_t flags, int32_t* ids, size_t capacity, size_t* count, qwen_aot_error** error);

/** Turns ids into text; special tokens, and ids that no token has, have none, and what isn't UTF-8 becomes U+FFFD.
 *  text[capacity]: the caller's, with room for a NUL. *length: bytes without it, also if they don't fit
 *  (BUFFER_TOO_SMALL). Any thread. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_detokenize(qwen_aot_model const* model, int32_t const* ids,
    size_t count, char* text, size_t capacity, size_t* length, qwen_aot_error** error);

/** The text of one sequence, token by token: pieces are whole characters and join to the whole. */
typedef struct qwen_aot_detokenizer qwen_aot_detokenizer;

QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_detokenizer_create(
    qwen_aot_model* model, qwen_aot_detokenizer** detokenizer, qwen_aot_error** error);
QWEN_AOT_API void qwen_aot_detokenizer_free(qwen_aot_detokenizer* detokenizer);

/** The text that a token completes, valid until the next call on this handle; "" inside a character and for special
 *  tokens. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_detokenizer_push(
    qwen_aot_detokenizer* detokenizer, int32_t id, char const** text, size_t* length, qwen_aot_error** error);

/** What is left at the end of a sequence, valid until the next call; the handle then starts anew. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_detokenizer_finish(
    qwen_aot_detokenizer* detokenizer, char const** text, size_t* length, qwen_aot_error** error);

/** The messages of a conversation, and how its template is rendered. */
typedef struct qwen_aot_conversation qwen_aot_conversation;

QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_conversation_create(
    qwen_aot_conversation** conversation, qwen_aot_error** error);
QWEN_AOT_API void qwen_aot_conversation_free(qwen_aot_conversation* conversation);

/** Adds a message; both texts are copied. role: "system", "user", "assistant"; another is refused (UNSUPPORTED) when the
 *  conversation is rendered. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_conversation_add(qwen_aot_conversation* conversation,
    char const* role, size_t role_length, char const* content, size_t content_length, qwen_aot_error** error);

/** Removes all messages. */
QWEN_AOT_API void qwen_aot_conversation_clear(qwen_aot_conversation* conversation);

/** The template's `enable_thinking`: 0 or 1; -1, the default: not given. UNSUPPORTED comes when it is rendered, from a
 *  template without such a branch. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_conversation_set_thinking(
    qwen_aot_conversation* conversation, int32_t is_enabled, qwen_aot_error** error);

/** QWEN_AOT_ALLOW_SPECIAL_TOKENS, or 0, the default: what messages spell is plain text (docs/chat.md). */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_conversation_set_flags(
    qwen_aot_conversation* conversation, uint32_t flags, qwen_aot_error** error);

/** The conversation as the template writes it, up to where the answer begins. text, capacity, length: as for
 *  qwen_aot_detokenize. UNSUPPORTED: the bundle has no compiled template, or it has none for this conversation. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_render_chat(qwen_aot_model const* model,
    qwen_aot_conversation const* conversation, char* text, size_t capacity, size_t* length, qwen_aot_error** error);

/** The same as ids; ids, capacity, count: as for qwen_aot_tokenize. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_encode_chat(qwen_aot_model const* model,
    qwen_aot_conversation const* conversation, int32_t* ids, size_t capacity, size_t* count, qwen_aot_error** error);

/* ---------------------------------------------------------------------------------------------------------------------
 * Settings of a request. docs/generation.md says what each does, and what is taken from the bundle where it isn't set.
 * A setter refuses a value out of range, NaN too (INVALID_ARGUMENT), and changes nothing. Ids are compared with the
 * model's vocabulary when a request is submitted.
 * ------------------------------------------------------------------------------------------------------------------ */

/** How tokens are chosen and when an answer ends. Copied by whatever it is given to. */
typedef struct qwen_aot_config qwen_aot_config;

QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_config_create(qwen_aot_config** config, qwen_aot_error** error);
QWEN_AOT_API void qwen_aot_config_free(qwen_aot_config* config);

/** 1 or more. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_config_set_max_new_tokens(
    qwen_aot_config* config, int64_t tokens, qwen_aot_error** error);
/** 0 to max_new_tokens (compared when a request is made of it). */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_config_set_min_new_tokens(
    qwen_aot_config* config, int64_t tokens, qwen_aot_error** error);
/** 0 (greedy), 0.001 to 1000. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_config_set_temperature(
    qwen_aot_config* config, double temperature, qwen_aot_error** error);
/** 0 (all) or more. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_config_set_top_k(
    qwen_aot_config* config, int64_t k, qwen_aot_error** error);
/** Above 0, to 1 (all). */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_config_set_top_p(
    qwen_aot_config* config, double p, qwen_aot_error** error);
/** 0 (all) to 1. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_config_set_min_p(
    qwen_aot_config* config, double p, qwen_aot_error** error);
/** 0.001 to 1000; 1 is off. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_config_set_repetition_penalty(
    qwen_aot_config* config, double penalty, qwen_aot_error** error);
/** -2 to 2; 0 is off. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_config_set_presence_penalty(
    qwen_aot_config* config, double penalty, qwen_aot_error** error);
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_config_set_frequency_penalty(
    qwen_aot_config* config, double penalty, qwen_aot_error** error);
/** Adds `bias`, -100 to 100, to the logit of a token; a second call for the same id replaces the first. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_config_set_logit_bias(
    qwen_aot_config* config, int32_t id, double bias, qwen_aot_error** error);
/** ids[count]: tokens that never come; copied; replaces earlier ones, the bundle's too. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_config_set_suppress_tokens(
    qwen_aot_config* config, int32_t const* ids, size_t count, qwen_aot_error** error);
/** Of the random numbers: choice i of a request draws the same with every reader of bundles. Not set: new ones. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_config_set_seed(
    qwen_aot_config* config, uint64_t seed, qwen_aot_error** error);
/** Outputs of one prompt: 1 to 128. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_config_set_n(
    qwen_aot_config* config, int32_t n, qwen_aot_error** error);
/** Adds a text that ends the output and isn't part of it. The first call replaces the bundle's own. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_config_add_stop(
    qwen_aot_config* config, char const* text, size_t length, qwen_aot_error** error);
/** No texts end the output, the bundle's own neither. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_config_clear_stop(qwen_aot_config* config, qwen_aot_error** error);
/** ids[count] that end the output, besides the model's; copied; replaces earlier ones. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_config_set_stop_token_ids(
    qwen_aot_config* config, int32_t const* ids, size_t count, qwen_aot_error** error);
/** In place of the model's own ids that end an answer. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_config_set_eos_token_ids(
    qwen_aot_config* config, int32_t const* ids, size_t count, qwen_aot_error** error);
/** 0 or 1: whether to go on at the model's own ids. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_config_set_ignore_eos(
    qwen_aot_config* config, int32_t is_ignored, qwen_aot_error** error);
/** Log-probabilities of each token and of the `k` likeliest in its place: 0 to 100; -1, the default: none. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_config_set_logprobs(
    qwen_aot_config* config, int32_t k, qwen_aot_error** error);
/** The same of the prompt, which is then fed token by token. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_config_set_prompt_logprobs(
    qwen_aot_config* config, int32_t k, qwen_aot_error** error);

/* ---------------------------------------------------------------------------------------------------------------------
 * Generators: requests share an engine's rows. docs/scheduling.md says in which order.
 * ------------------------------------------------------------------------------------------------------------------ */

/** Serves requests on one KV cache of FACT_MAX_BATCH rows. One thread at a time; a second is told BUSY. */
typedef struct qwen_aot_generator qwen_aot_generator;

/** One prompt and how to go on from it. Copied when it is submitted. */
typedef struct qwen_aot_request qwen_aot_request;

/** Something that happened in a step. Immutable. */
typedef struct qwen_aot_event qwen_aot_event;

QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_request_create(qwen_aot_request** request, qwen_aot_error** error);
QWEN_AOT_API void qwen_aot_request_free(qwen_aot_request* request);

/** The prompt: one of these, the last one counts; all are copied. Text is encoded as by qwen_aot_tokenize with
 *  ALLOW_SPECIAL_TOKENS; of a conversation the answer is generated, and may fill the context. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_request_set_text(
    qwen_aot_request* request, char const* text, size_t length, qwen_aot_error** error);
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_request_set_ids(
    qwen_aot_request* request, int32_t const* ids, size_t count, qwen_aot_error** error);
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_request_set_conversation(
    qwen_aot_request* request, qwen_aot_conversation const* conversation, qwen_aot_error** error);

/** Its settings; NULL, the default: the bundle's. Copied. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_request_set_config(
    qwen_aot_request* request, qwen_aot_config const* config, qwen_aot_error** error);

/** 0 or 1 (default 0): start from what the cache still has of an earlier such request, and leave this one's tokens in it
 *  until their row is needed. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_request_set_keep_cache(
    qwen_aot_request* request, int32_t is_kept, qwen_aot_error** error);

/** Any number (default 0): of requests with KEEP_CACHE, only those of the same one start from each other's tokens. Give each
 *  party that is served its own: the time that a first token takes tells what the cache held. Chats have 0. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_request_set_cache_scope(
    qwen_aot_request* request, uint64_t scope, qwen_aot_error** error);

/** Makes a generator and its cache: on the CPU addresses only, which take memory as rows fill. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_generator_create(
    qwen_aot_model* model, qwen_aot_generator** generator, qwen_aot_error** error);

/** Drops all requests without events, and frees the generator: at once, or, if a call on it is at work, when that ends
 *  (this doesn't wait for it). Chats of it keep it. */
QWEN_AOT_API void qwen_aot_generator_free(qwen_aot_generator* generator);

/** Checks a request and queues it. *id: its number, from 1 on, which its events carry; 0 on failure. Events of the last
 *  step stay valid.
 *  INVALID_ARGUMENT, CONTEXT_FULL, UNSUPPORTED, OUT_OF_MEMORY: it can't be served; nothing changed. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_generator_submit(
    qwen_aot_generator* generator, qwen_aot_request const* request, uint64_t* id, qwen_aot_error** error);

/** Does one bounded piece of work: at most a token for every running row and one chunk of one prompt. What happened is
 *  in the events, valid until the next step. With nothing to do it does nothing.
 *  A request that fails by itself ends with a completion that has the error, and the step is OK. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_generator_step(
    qwen_aot_generator* generator, size_t* num_events, qwen_aot_error** error);

/** An event of the last step, 0 to num_events - 1; NULL for others. Valid until the next step, or the generator's end. Only
 *  the thread that steps. */
QWEN_AOT_API qwen_aot_event const* qwen_aot_generator_event(qwen_aot_generator const* generator, size_t index);

/** 1 if nothing waits or runs, or for NULL. Any thread; while another steps, what it answers may be past. */
QWEN_AOT_API int32_t qwen_aot_generator_is_idle(qwen_aot_generator const* generator);

/** Asks for the end of a request: its completion comes in the step at work or the next one, a long prefill stops at
 *  once (ONNX Runtime: within an operation, some milliseconds). id 0: what qwen_aot_generate or qwen_aot_chat_send serves
 *  now; between such calls it does nothing. A request that has ended, or never was, is no error. Any thread, at any time
 *  before the generator is freed, and signal handlers. */
QWEN_AOT_API void qwen_aot_generator_cancel(qwen_aot_generator* generator, uint64_t id);

/** Serves one prompt to its end: submits, steps, and gives each event to `callback` on this thread (NULL: none). A callback
 *  that returns other than 0 cancels; the completions still come. With n > 1 the events of all choices come. An event is
 *  valid during its callback; the texts of completions until the next call on the generator.
 *  *completion: the last one that came, valid until the next call on the generator, or its end; may be NULL; given for
 *  CANCELLED, and for a failure of the request's own, too. If the callback freed the generator, it is not to be read.
 *  CANCELLED: one of its choices was, by the callback or by qwen_aot_generator_cancel(generator, 0); what had ended by then
 *  had ended, and is OK. BUSY: the generator has requests that were submitted; step until it is idle. Else the failure, as
 *  of submit, or the first of a choice's own. */
typedef int32_t (*qwen_aot_event_callback)(void* user, qwen_aot_event const* event);
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_generate(qwen_aot_generator* generator,
    qwen_aot_request const* request, qwen_aot_event_callback callback, void* user, qwen_aot_event const** completion,
    qwen_aot_error** error);

/* -- Events: valid as long as what gave them says; NULL gives 0, NULL or "". -------------------------------------- */

typedef int32_t qwen_aot_event_type;
enum
{
    QWEN_AOT_EVENT_TOKEN = 1,     /**< one new token */
    QWEN_AOT_EVENT_COMPLETION = 2 /**< the end of a choice, once each */
};

typedef int32_t qwen_aot_finish_reason;
enum
{
    QWEN_AOT_FINISH_NONE = 0,   /**< a token's event */
    QWEN_AOT_FINISH_STOP = 1,   /**< an id or a text that ends it */
    QWEN_AOT_FINISH_LENGTH = 2, /**< max_new_tokens, or the context is full */
    QWEN_AOT_FINISH_CANCELLED = 3,
    QWEN_AOT_FINISH_ERROR = 4 /**< its step failed: qwen_aot_event_status and _error say how */
};

QWEN_AOT_API qwen_aot_event_type qwen_aot_event_get_type(qwen_aot_event const* event);
QWEN_AOT_API uint64_t qwen_aot_event_request(qwen_aot_event const* event);
/** Which of the request's n outputs it belongs to, from 0. */
QWEN_AOT_API int32_t qwen_aot_event_choice(qwen_aot_event const* event);
/** The new token; -1 for a completion. */
QWEN_AOT_API int32_t qwen_aot_event_token(qwen_aot_event const* event);
/** What may be shown now: whole characters that became certain with this event; the texts of all events of a choice,
 *  in order, are its whole text. */
QWEN_AOT_API char const* qwen_aot_event_text(qwen_aot_event const* event, size_t* length);
QWEN_AOT_API qwen_aot_finish_reason qwen_aot_event_finish_reason(qwen_aot_event const* event);

/** Of a completion: all of the output's text, and its tokens (without an id that ended it). */
QWEN_AOT_API char const* qwen_aot_event_full_text(qwen_aot_event const* event, size_t* length);
QWEN_AOT_API int32_t const* qwen_aot_event_tokens(qwen_aot_event const* event, size_t* count);
/** Of a completion: tokens of the prompt, and those of them that were in the cache already; the same in each choice. */
QWEN_AOT_API int64_t qwen_aot_event_prompt_tokens(qwen_aot_event const* event);
QWEN_AOT_API int64_t qwen_aot_event_cached_tokens(qwen_aot_event const* event);
/** Of a completion, seconds of a clock that is never set back: in prefill steps; from arrival to the first token (to the end,
 *  if there was none); from there to the end. */
QWEN_AOT_API double qwen_aot_event_prefill_seconds(qwen_aot_event const* event);
QWEN_AOT_API double qwen_aot_event_first_token_seconds(qwen_aot_event const* event);
QWEN_AOT_API double qwen_aot_event_decode_seconds(qwen_aot_event const* event);
/** Of a completion with FINISH_ERROR: what failed. */
QWEN_AOT_API qwen_aot_status qwen_aot_event_status(qwen_aot_event const* event);
QWEN_AOT_API char const* qwen_aot_event_error(qwen_aot_event const* event, size_t* length);

/** Log-probabilities (natural), if they were asked for. `position`: 0 for a token's event; for a completion its tokens'
 *  numbers. Returns 0 and writes nothing where there are none. */
QWEN_AOT_API int32_t qwen_aot_event_logprob(qwen_aot_event const* event, size_t position, double* logprob);
/** The likeliest in its place, best first: ids and values, valid as the event; *count of them. */
QWEN_AOT_API int32_t qwen_aot_event_top_logprobs(
    qwen_aot_event const* event, size_t position, int32_t const** ids, double const** logprobs, size_t* count);
/** Of a completion, those of the prompt's tokens; the first one has none, and returns 0. */
QWEN_AOT_API int32_t qwen_aot_event_prompt_logprob(qwen_aot_event const* event, size_t position, double* logprob);
QWEN_AOT_API int32_t qwen_aot_event_prompt_top_logprobs(
    qwen_aot_event const* event, size_t position, int32_t const** ids, double const** logprobs, size_t* count);

/* ---------------------------------------------------------------------------------------------------------------------
 * Chats: a conversation whose cache is kept between turns.
 * ------------------------------------------------------------------------------------------------------------------ */

/** One conversation on a generator, which may serve others too. One thread at a time, as its generator. */
typedef struct qwen_aot_chat qwen_aot_chat;

/** system, NULL: the template's own, if it has one. config, NULL: the bundle's; copied; with n = 1. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_chat_create(qwen_aot_generator* generator,
    qwen_aot_config const* config, char const* system, size_t length, qwen_aot_chat** chat, qwen_aot_error** error);
QWEN_AOT_API void qwen_aot_chat_free(qwen_aot_chat* chat);

/** As for conversations; from the next turn on. BUSY: a call on the chat's generator is at work. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_chat_set_thinking(
    qwen_aot_chat* chat, int32_t is_enabled, qwen_aot_error** error);
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_chat_set_flags(
    qwen_aot_chat* chat, uint32_t flags, qwen_aot_error** error);

/** Says something and gives the answer's events to `callback`, as qwen_aot_generate. The turn is part of the conversation
 *  afterwards, with what was answered by then (which may be "") if it was cancelled; on any other failure the conversation
 *  is as before. CONTEXT_FULL: the conversation has become too long: reset it. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_chat_send(qwen_aot_chat* chat, char const* text, size_t length,
    qwen_aot_event_callback callback, void* user, qwen_aot_event const** completion, qwen_aot_error** error);

/** Asks for the end of the answer that comes now; between turns it does nothing. Any thread, at any time before the chat is
 *  freed, and signal handlers. */
QWEN_AOT_API void qwen_aot_chat_cancel(qwen_aot_chat* chat);

/** Forgets all turns; the system prompt stays. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_chat_reset(qwen_aot_chat* chat, qwen_aot_error** error);

/* ---------------------------------------------------------------------------------------------------------------------
 * Raw rows: the engine itself, for those who choose tokens by themselves.
 * ------------------------------------------------------------------------------------------------------------------ */

/** FACT_MAX_BATCH rows of a KV cache of their own. One thread at a time; a second is told BUSY. */
typedef struct qwen_aot_rows qwen_aot_rows;

QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_rows_create(
    qwen_aot_model* model, qwen_aot_rows** rows, qwen_aot_error** error);
QWEN_AOT_API void qwen_aot_rows_free(qwen_aot_rows* rows);

/** Appends ids[count], count at least 1, to a row, in chunks. *logits: float32 [FACT_VOCAB_SIZE], of the last one;
 *  the handle's, valid until the next call on it.
 *  A first-generation Qwen rotates a row by its first prompt's length: give an empty row the whole prompt at once.
 *  CONTEXT_FULL, CANCELLED, ENGINE_FAILED, NOT_FINITE: the row is as it was. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_rows_prefill(
    qwen_aot_rows* rows, int32_t row, int32_t const* ids, size_t count, float const** logits, qwen_aot_error** error);

/** Appends ids[count], one to each of the rows first_row, first_row + 1, ...; an id of -1 leaves its row as it is.
 *  *logits: float32 [count, FACT_VOCAB_SIZE]; of idle rows without meaning; valid until the next call.
 *  A failure leaves all rows as they were. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_rows_decode(qwen_aot_rows* rows, int32_t first_row,
    int32_t const* ids, size_t count, float const** logits, qwen_aot_error** error);

/** Forgets a row's tokens from `length` on; 0 empties it. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_rows_truncate(
    qwen_aot_rows* rows, int32_t row, int64_t length, qwen_aot_error** error);

/** Makes `target` hold the first `length` tokens of `source`, another row, and nothing else. ENGINE_FAILED: the device failed;
 *  `target` is empty then. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_rows_copy(
    qwen_aot_rows* rows, int32_t source, int32_t target, int64_t length, qwen_aot_error** error);

/** Tokens in a row. */
QWEN_AOT_CHECK QWEN_AOT_API qwen_aot_status qwen_aot_rows_length(
    qwen_aot_rows const* rows, int32_t row, int64_t* length, qwen_aot_error** error);

/** Ends a prefill or decode at work on another thread with CANCELLED; without one it does nothing. Any thread, at any time
 *  before the rows are freed, and signal handlers. */
QWEN_AOT_API void qwen_aot_rows_cancel(qwen_aot_rows* rows);

#ifdef __cplusplus
}
#endif

#endif
