/** What onnxruntime-genai's C API takes, as one line of JSON: 
 *  `genai MODEL LIBRARY THREADS PROMPT_TOKENS NEW_TOKENS VOCAB_SIZE TEXT_FILE`.
 *
 *  LIBRARY: libonnxruntime-genai.so of the Python package, which brings no header: the functions are declared here as its
 *  ort_genai_c.h (0.18) has them. TEXT_FILE: encoded by the model's tokenizer; "" for none. */
#define _GNU_SOURCE
#include "measured.h"

#include <dlfcn.h>
#include <stdbool.h>

typedef void* result; /* NULL: well */

#define FUNCTIONS(F)                                                                                                   \
    F(result, OgaCreateConfig, (char const*, void**))                                                                  \
    F(result, OgaConfigOverlay, (void*, char const*))                                                                  \
    F(result, OgaCreateModelFromConfig, (void const*, void**))                                                         \
    F(result, OgaCreateTokenizer, (void const*, void**))                                                               \
    F(result, OgaCreateSequences, (void**))                                                                            \
    F(result, OgaTokenizerEncode, (void const*, char const*, void*))                                                   \
    F(size_t, OgaSequencesGetSequenceCount, (void const*, size_t))                                                     \
    F(void, OgaDestroySequences, (void*))                                                                              \
    F(result, OgaCreateGeneratorParams, (void const*, void**))                                                         \
    F(result, OgaGeneratorParamsSetSearchNumber, (void*, char const*, double))                                         \
    F(result, OgaGeneratorParamsSetSearchBool, (void*, char const*, bool))                                             \
    F(result, OgaCreateGenerator, (void const*, void const*, void**))                                                  \
    F(result, OgaGenerator_AppendTokens, (void*, int32_t const*, size_t))                                              \
    F(result, OgaGenerator_GenerateNextToken, (void*))                                                                 \
    F(result, OgaGenerator_GetNextTokens, (void const*, int32_t const**, size_t*))                                     \
    F(void, OgaDestroyGenerator, (void*))                                                                              \
    F(void, OgaDestroyGeneratorParams, (void*))                                                                        \
    F(char const*, OgaResultGetError, (result))

#define DECLARE(type, name, arguments) static type(*name) arguments;
FUNCTIONS(DECLARE)

static void need(result failed)
{
    if (failed != NULL)
    {
        fprintf(stderr, "%s\n", OgaResultGetError(failed));
        exit(1);
    }
}

static void encode(void const* model, char const* path)
{
    size_t length;
    char* const text = read_text(path, &length);
    void* tokenizer;
    double started = now(CLOCK_PROCESS_CPUTIME_ID);
    need(OgaCreateTokenizer(model, &tokenizer));
    printf("\"tokenizer_open_ms\": %.1f, ", (now(CLOCK_PROCESS_CPUTIME_ID) - started) * 1e-3);
    double best = 1e12;
    size_t count = 0;
    for (int round = 0; round < ENCODE_ROUNDS; ++round)
    {
        void* sequences;
        need(OgaCreateSequences(&sequences));
        started = now(CLOCK_THREAD_CPUTIME_ID);
        need(OgaTokenizerEncode(tokenizer, text, sequences));
        double const taken = now(CLOCK_THREAD_CPUTIME_ID) - started;
        best = taken < best ? taken : best;
        count = OgaSequencesGetSequenceCount(sequences, 0);
        OgaDestroySequences(sequences);
    }
    printf("\"encode_mb_s\": %.2f, \"encoded\": %zu, ", (double)length / best, count);
    free(text);
}

int main(int count, char** given)
{
    if (count != 8)
    {
        return 2;
    }
    int32_t const prompt_tokens = atoi(given[4]);
    int32_t const new_tokens = atoi(given[5]);
    void* const library = dlopen(given[2], RTLD_NOW | RTLD_LOCAL);
    if (library == NULL)
    {
        fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
#define FIND(type, name, arguments) name = (type(*) arguments)dlsym(library, #name);
    FUNCTIONS(FIND)
    long const before = memory("VmRSS");
    double const opening = now(CLOCK_PROCESS_CPUTIME_ID);
    void* config;
    void* model;
    char overlay[128];
    snprintf(overlay, sizeof overlay,
        "{\"model\": {\"decoder\": {\"session_options\": {\"intra_op_num_threads\": %d}}}}", atoi(given[3]));
    need(OgaCreateConfig(given[1], &config));
    need(OgaConfigOverlay(config, overlay));
    need(OgaCreateModelFromConfig(config, &model));
    printf("{\"open_ms\": %.1f, ", (now(CLOCK_PROCESS_CPUTIME_ID) - opening) * 1e-3);

    int32_t* const ids = prompt_ids(prompt_tokens, atoi(given[6]));
    double prefill = 0;
    double decode = 0;
    for (int round = 0; round < ROUNDS; ++round)
    {
        void* parameters;
        void* generator;
        need(OgaCreateGeneratorParams(model, &parameters));
        need(OgaGeneratorParamsSetSearchNumber(parameters, "max_length", prompt_tokens + new_tokens + 1));
        need(OgaGeneratorParamsSetSearchNumber(parameters, "min_length", prompt_tokens + new_tokens + 1));
        need(OgaGeneratorParamsSetSearchBool(parameters, "do_sample", false));
        need(OgaCreateGenerator(model, parameters, &generator));
        double started = now(CLOCK_MONOTONIC);
        need(OgaGenerator_AppendTokens(generator, ids, (size_t)prompt_tokens));
        need(OgaGenerator_GenerateNextToken(generator));
        double const first = prompt_tokens / (now(CLOCK_MONOTONIC) - started) * 1e6;
        started = now(CLOCK_MONOTONIC);
        for (int32_t i = 1; i < new_tokens; ++i)
        {
            int32_t const* tokens;
            size_t found;
            need(OgaGenerator_GenerateNextToken(generator));
            need(OgaGenerator_GetNextTokens(generator, &tokens, &found));
        }
        double const rest = (new_tokens - 1) / (now(CLOCK_MONOTONIC) - started) * 1e6;
        prefill = first > prefill ? first : prefill;
        decode = rest > decode ? rest : decode;
        OgaDestroyGenerator(generator);
        OgaDestroyGeneratorParams(parameters);
    }
    printf("\"prefill\": %.1f, \"decode\": %.1f, \"engine_kb\": %ld, \"peak_kb\": %ld, ", prefill, decode, before,
        memory("VmHWM"));
    if (given[7][0] != '\0')
    {
        encode(model, given[7]);
    }
    printf("\"name\": \"onnxruntime-genai\"}\n");
    fflush(stdout);
    free(ids);
    _Exit(0); /* what its end takes, and whether it goes well, is no matter here */
}
