/** What llama.cpp's C API takes, as one line of JSON: `llama_cpp MODEL.gguf THREADS PROMPT_TOKENS NEW_TOKENS TEXT_FILE`.
 *
 *  TEXT_FILE: encoded by the model's tokenizer; "" for none. */
#define _GNU_SOURCE
#include "measured.h"

#include <llama.h>

static void silent(enum ggml_log_level level, char const* text, void* user)
{
    (void)level;
    (void)text;
    (void)user;
}

static void encode(struct llama_vocab const* vocab, char const* path)
{
    size_t length;
    char* const text = read_text(path, &length);
    llama_token* const ids = malloc(length * sizeof *ids);
    double best = 1e12;
    int32_t count = 0;
    for (int round = 0; round < ENCODE_ROUNDS; ++round)
    {
        double const started = now(CLOCK_THREAD_CPUTIME_ID);
        count = llama_tokenize(vocab, text, (int32_t)length, ids, (int32_t)length, false, false);
        double const taken = now(CLOCK_THREAD_CPUTIME_ID) - started;
        best = taken < best ? taken : best;
    }
    printf("\"encode_mb_s\": %.2f, \"encoded\": %d, ", (double)length / best, count);
    free(text);
    free(ids);
}

/** Greedy: the place of the largest logit behind the last of these ids. */
static llama_token next(struct llama_context* context, llama_token* ids, int32_t count, int32_t vocab_size)
{
    if (llama_decode(context, llama_batch_get_one(ids, count)) != 0)
    {
        fprintf(stderr, "llama_decode failed\n");
        exit(1);
    }
    float const* const logits = llama_get_logits_ith(context, -1);
    llama_token best = 0;
    for (llama_token i = 1; i < vocab_size; ++i)
    {
        best = logits[i] > logits[best] ? i : best;
    }
    return best;
}

int main(int count, char** given)
{
    if (count != 6)
    {
        return 2;
    }
    int32_t const prompt_tokens = atoi(given[3]);
    int32_t const new_tokens = atoi(given[4]);
    llama_log_set(silent, NULL);
    long const before = memory("VmRSS");
    double const opening = now(CLOCK_PROCESS_CPUTIME_ID);
    llama_backend_init();
    struct llama_model* const model = llama_model_load_from_file(given[1], llama_model_default_params());
    if (model == NULL)
    {
        fprintf(stderr, "llama.cpp can't load %s\n", given[1]);
        return 1;
    }
    struct llama_context_params options = llama_context_default_params();
    options.n_ctx = (uint32_t)(prompt_tokens + new_tokens);
    options.n_batch = options.n_ubatch = 512;
    options.n_threads = options.n_threads_batch = atoi(given[2]);
    struct llama_context* const context = llama_init_from_model(model, options);
    if (context == NULL)
    {
        fprintf(stderr, "llama.cpp makes no context\n");
        return 1;
    }
    printf("{\"open_ms\": %.1f, ", (now(CLOCK_PROCESS_CPUTIME_ID) - opening) * 1e-3);

    struct llama_vocab const* const vocab = llama_model_get_vocab(model);
    int32_t const vocab_size = llama_vocab_n_tokens(vocab);
    llama_token* const ids = prompt_ids(prompt_tokens, vocab_size);
    double prefill = 0;
    double decode = 0;
    for (int round = 0; round < ROUNDS; ++round)
    {
        llama_memory_clear(llama_get_memory(context), true);
        double started = now(CLOCK_MONOTONIC);
        llama_token token = 0;
        for (int32_t i = 0; i < prompt_tokens; i += 512)
        {
            int32_t const left = prompt_tokens - i;
            token = next(context, ids + i, left < 512 ? left : 512, vocab_size);
        }
        double const first = prompt_tokens / (now(CLOCK_MONOTONIC) - started) * 1e6;
        started = now(CLOCK_MONOTONIC);
        for (int32_t i = 1; i < new_tokens; ++i)
        {
            token = next(context, &token, 1, vocab_size);
        }
        double const rest = (new_tokens - 1) / (now(CLOCK_MONOTONIC) - started) * 1e6;
        prefill = first > prefill ? first : prefill;
        decode = rest > decode ? rest : decode;
    }
    printf("\"prefill\": %.1f, \"decode\": %.1f, \"engine_kb\": %ld, \"peak_kb\": %ld, ", prefill, decode, before,
        memory("VmHWM"));
    if (given[5][0] != '\0')
    {
        encode(vocab, given[5]);
    }
    printf("\"name\": \"llama.cpp\"}\n");
    free(ids);
    llama_free(context);
    llama_model_free(model);
    return 0;
}
