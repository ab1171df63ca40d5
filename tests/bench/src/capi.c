/** What the C library takes, as one line of JSON: `capi BUNDLE ENGINE THREADS PROMPT_TOKENS NEW_TOKENS SETTING TEXT_FILE`.
 *
 *  ENGINE: the library of timed_onnxruntime.c. SETTING: greedy, top_k, top_p, min_p or temperature. TEXT_FILE: encoded if the
 *  bundle has a tokenizer; "" for none. */
#define _GNU_SOURCE
#include "measured.h"

#include <qwen_aot.h>

#include <dlfcn.h>

static void need(qwen_aot_status status, qwen_aot_error* error)
{
    if (status != QWEN_AOT_OK)
    {
        fprintf(stderr, "%s: %s\n", qwen_aot_status_name(status), qwen_aot_error_message(error, NULL));
        exit(1);
    }
}

static int by_value(void const* a, void const* b)
{
    double const x = *(double const*)a;
    double const y = *(double const*)b;
    return (x > y) - (x < y);
}

static void encode(qwen_aot_model* model, char const* path)
{
    qwen_aot_error* error = NULL;
    size_t length;
    char* const text = read_text(path, &length);
    int32_t* const ids = malloc(length * sizeof *ids);
    double best = 1e12;
    size_t count = 0;
    for (int round = 0; round < ENCODE_ROUNDS; ++round)
    {
        double const started = now(CLOCK_THREAD_CPUTIME_ID);
        need(qwen_aot_tokenize(model, text, length, 0, ids, length, &count, &error), error);
        double const taken = now(CLOCK_THREAD_CPUTIME_ID) - started;
        best = taken < best ? taken : best;
    }
    printf("\"encode_mb_s\": %.2f, \"encoded\": %zu, ", (double)length / best, count);
    free(text);
    free(ids);
}

int main(int count, char** given)
{
    if (count != 8)
    {
        return 2;
    }
    int32_t const prompt_tokens = atoi(given[4]);
    int32_t const new_tokens = atoi(given[5]);
    char const* const setting = given[6];
    qwen_aot_error* error = NULL;

    /* The engine's library is there before anything is counted, as it is in the Python process. */
    void* const engine = dlopen(given[2], RTLD_NOW | RTLD_LOCAL);
    if (engine == NULL)
    {
        fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    double (*asked_us)(void) = (double (*)(void))dlsym(engine, "timed_asked_us");
    double (*run_us)(void) = (double (*)(void))dlsym(engine, "timed_run_us");
    ((void* (*)(void))dlsym(engine, "OrtGetApiBase"))();
    read_pages("libonnxruntime.so");
    long const before = memory("VmRSS");

    qwen_aot_options* options;
    qwen_aot_model* model;
    qwen_aot_generator* generator;
    need(qwen_aot_options_create(&options, &error), error);
    need(qwen_aot_options_set_library(options, QWEN_AOT_LIBRARY_ONNXRUNTIME, given[2], QWEN_AOT_TO_NUL, &error), error);
    need(qwen_aot_options_set_threads(options, atoi(given[3]), &error), error);
    need(qwen_aot_options_set_hash_limit(options, 0, &error), error);
    /* The engine is opened last: what comes before is the library's own. (Its threads spin: this thread's clock.) */
    double started = now(CLOCK_THREAD_CPUTIME_ID);
    double const all_started = now(CLOCK_PROCESS_CPUTIME_ID);
    need(qwen_aot_model_open(given[1], QWEN_AOT_TO_NUL, options, &model, &error), error);
    double own_open_us = asked_us() - started;
    double const engine_open_us = now(CLOCK_PROCESS_CPUTIME_ID) - all_started - own_open_us;
    started = now(CLOCK_THREAD_CPUTIME_ID);
    need(qwen_aot_generator_create(model, &generator, &error), error);
    own_open_us += now(CLOCK_THREAD_CPUTIME_ID) - started;
    qwen_aot_options_free(options);
    printf("{\"own_open_ms\": %.2f, \"engine_open_ms\": %.1f, ", own_open_us * 1e-3, engine_open_us * 1e-3);

    qwen_aot_config* config;
    qwen_aot_request* request;
    need(qwen_aot_config_create(&config, &error), error);
    need(qwen_aot_config_set_max_new_tokens(config, new_tokens, &error), error);
    need(qwen_aot_config_set_ignore_eos(config, 1, &error), error);
    need(qwen_aot_config_set_seed(config, 1, &error), error);
    need(qwen_aot_config_set_top_k(config, 0, &error), error);
    need(qwen_aot_config_set_temperature(config, strcmp(setting, "greedy") == 0 ? 0 : 0.7, &error), error);
    if (strcmp(setting, "top_k") == 0)
    {
        need(qwen_aot_config_set_top_k(config, 20, &error), error);
        need(qwen_aot_config_set_top_p(config, 0.8, &error), error);
    }
    else if (strcmp(setting, "top_p") == 0)
    {
        need(qwen_aot_config_set_top_p(config, 0.95, &error), error);
    }
    else if (strcmp(setting, "min_p") == 0)
    {
        need(qwen_aot_config_set_min_p(config, 0.1, &error), error);
    }
    int64_t vocab_size;
    need(qwen_aot_model_fact(model, QWEN_AOT_FACT_VOCAB_SIZE, &vocab_size, &error), error);
    int32_t* const ids = prompt_ids(prompt_tokens, vocab_size); /* as the Python side makes them */
    need(qwen_aot_request_create(&request, &error), error);
    need(qwen_aot_request_set_ids(request, ids, (size_t)prompt_tokens, &error), error);
    need(qwen_aot_request_set_config(request, config, &error), error);

    double* const own = malloc(ROUNDS * (size_t)new_tokens * sizeof *own);
    size_t steps = 0;
    double prefill = 0;
    double decode = 0;
    for (int round = 0; round < ROUNDS; ++round)
    {
        uint64_t id;
        need(qwen_aot_generator_submit(generator, request, &id, &error), error);
        int32_t tokens = 0;
        while (!qwen_aot_generator_is_idle(generator))
        {
            size_t events;
            double const run = run_us();
            started = now(CLOCK_THREAD_CPUTIME_ID);
            need(qwen_aot_generator_step(generator, &events, &error), error);
            double const taken = now(CLOCK_THREAD_CPUTIME_ID) - started - (run_us() - run);
            for (size_t i = 0; i < events; ++i)
            {
                qwen_aot_event const* const event = qwen_aot_generator_event(generator, i);
                if (qwen_aot_event_get_type(event) == QWEN_AOT_EVENT_TOKEN && ++tokens > 2 && tokens < new_tokens)
                {
                    own[steps++] = taken;
                }
                if (qwen_aot_event_get_type(event) == QWEN_AOT_EVENT_COMPLETION)
                {
                    double const first = prompt_tokens / qwen_aot_event_prefill_seconds(event);
                    double const rest = (new_tokens - 1) / qwen_aot_event_decode_seconds(event);
                    prefill = first > prefill ? first : prefill;
                    decode = rest > decode ? rest : decode;
                }
            }
        }
    }
    qsort(own, steps, sizeof *own, by_value);
    printf("\"prefill\": %.1f, \"decode\": %.1f, \"own_us\": %.1f, \"own_us_lowest\": %.1f, ", prefill, decode,
        own[steps / 2], own[0]);
    printf("\"engine_kb\": %ld, \"peak_kb\": %ld, ", before, memory("VmHWM"));
    if (given[7][0] != '\0')
    {
        encode(model, given[7]);
    }
    printf("\"setting\": \"%s\"}\n", setting);
    free(own);
    free(ids);
    qwen_aot_request_free(request);
    qwen_aot_config_free(config);
    qwen_aot_generator_free(generator);
    qwen_aot_model_free(model);
    return 0;
}
