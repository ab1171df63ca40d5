/* Lets each allocation of the library fail once, one after the other: no_memory open|generate BUNDLE. What is asked for comes
 * to OUT_OF_MEMORY or works, everything can be freed, and afterwards it works. Linked with --wrap for malloc, calloc and
 * realloc, which an engine's own library doesn't go through. */

#include <qwen_aot.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void* __real_malloc(size_t bytes);
void* __real_calloc(size_t count, size_t bytes);
void* __real_realloc(void* memory, size_t bytes);
void* __wrap_malloc(size_t bytes);
void* __wrap_calloc(size_t count, size_t bytes);
void* __wrap_realloc(void* memory, size_t bytes);

static long left = -1; /* allocations until one fails; below 0: none does */
static long failures;

static int fails(void)
{
    if (left < 0 || left-- > 0)
    {
        return 0;
    }
    ++failures;
    return 1;
}

void* __wrap_malloc(size_t bytes)
{
    return fails() ? NULL : __real_malloc(bytes);
}

void* __wrap_calloc(size_t count, size_t bytes)
{
    return fails() ? NULL : __real_calloc(count, bytes);
}

void* __wrap_realloc(void* memory, size_t bytes)
{
    return fails() ? NULL : __real_realloc(memory, bytes);
}

static char const* bundle;
static int completions;
static int failed_ends; /* of choices, since the last call began */

static int32_t count(void* user, qwen_aot_event const* event)
{
    (void)user;
    completions += qwen_aot_event_get_type(event) == QWEN_AOT_EVENT_COMPLETION;
    failed_ends += qwen_aot_event_finish_reason(event) == QWEN_AOT_FINISH_ERROR;
    return 0;
}

/** Everything that a short generation asks for; the first failure's status. */
static qwen_aot_status generate(qwen_aot_model* model)
{
    int32_t const ids[] = {1, 2, 3, 4};
    qwen_aot_generator* generator = NULL;
    qwen_aot_config* config = NULL;
    qwen_aot_request* request = NULL;
    qwen_aot_conversation* conversation = NULL;
    qwen_aot_chat* chat = NULL;
    qwen_aot_error* error = NULL;
    qwen_aot_status status = QWEN_AOT_OK;
    failed_ends = 0;
#define TRY(call)                                                                                                      \
    if (status == QWEN_AOT_OK)                                                                                         \
    {                                                                                                                  \
        qwen_aot_error_free(error);                                                                                    \
        error = NULL;                                                                                                  \
        status = (call);                                                                                               \
    }
    TRY(qwen_aot_generator_create(model, &generator, &error))
    TRY(qwen_aot_config_create(&config, &error))
    TRY(qwen_aot_config_set_max_new_tokens(config, 3, &error))
    TRY(qwen_aot_config_set_temperature(config, 0.8, &error))
    TRY(qwen_aot_config_set_top_p(config, 0.9, &error))
    TRY(qwen_aot_config_set_repetition_penalty(config, 1.1, &error))
    TRY(qwen_aot_config_set_frequency_penalty(config, 0.1, &error))
    TRY(qwen_aot_config_set_logit_bias(config, 3, 1.0, &error))
    TRY(qwen_aot_config_add_stop(config, "nowhere in it", QWEN_AOT_TO_NUL, &error))
    TRY(qwen_aot_config_set_ignore_eos(config, 1, &error))
    TRY(qwen_aot_config_set_logprobs(config, 2, &error))
    TRY(qwen_aot_config_set_seed(config, 1, &error))
    TRY(qwen_aot_config_set_n(config, 2, &error))
    TRY(qwen_aot_request_create(&request, &error))
    TRY(qwen_aot_request_set_ids(request, ids, 4, &error))
    TRY(qwen_aot_request_set_config(request, config, &error))
    TRY(qwen_aot_generate(generator, request, count, NULL, NULL, &error))
    TRY(qwen_aot_conversation_create(&conversation, &error))
    TRY(qwen_aot_conversation_add(conversation, "user", 4, "Hello there", 11, &error))
    TRY(qwen_aot_request_set_conversation(request, conversation, &error))
    TRY(qwen_aot_config_set_n(config, 1, &error))
    TRY(qwen_aot_request_set_config(request, config, &error))
    TRY(qwen_aot_generate(generator, request, count, NULL, NULL, &error))
    TRY(qwen_aot_chat_create(generator, config, "Be brief", 8, &chat, &error))
    TRY(qwen_aot_chat_send(chat, "Hello", 5, count, NULL, NULL, &error))
    if (error != NULL && qwen_aot_error_status(error) != status)
    {
        status = -1;
    }
    if (status == QWEN_AOT_OK && failed_ends != 0)
    {
        status = -2; /* a choice failed, and nobody was told */
    }
    qwen_aot_error_free(error);
    qwen_aot_chat_free(chat);
    qwen_aot_conversation_free(conversation);
    qwen_aot_request_free(request);
    qwen_aot_config_free(config);
    qwen_aot_generator_free(generator);
    return status;
}

int main(int argc, char** argv)
{
    if (argc != 3)
    {
        return 2;
    }
    int const opens = strcmp(argv[1], "open") == 0;
    bundle = argv[2];
    qwen_aot_options* options = NULL;
    qwen_aot_model* model = NULL;
    if (!opens && qwen_aot_model_open(bundle, QWEN_AOT_TO_NUL, NULL, &model, NULL) != QWEN_AOT_OK)
    {
        return 1;
    }
    long number = 0;
    for (;; ++number)
    {
        long const before = failures;
        qwen_aot_status status = QWEN_AOT_OK;
        left = number;
        if (opens)
        {
            status = qwen_aot_options_create(&options, NULL);
            if (status == QWEN_AOT_OK)
            {
                status = qwen_aot_model_open(bundle, QWEN_AOT_TO_NUL, options, &model, NULL);
            }
        }
        else
        {
            status = generate(model);
        }
        left = -1;
        if (opens)
        {
            qwen_aot_options_free(options);
            qwen_aot_model_free(model);
            options = NULL;
            model = NULL;
        }
        if (status != QWEN_AOT_OK && status != QWEN_AOT_OUT_OF_MEMORY)
        {
            fprintf(stderr, "allocation %ld failed and the call came to %s\n", number, qwen_aot_status_name(status));
            return 1;
        }
        if (failures == before)
        {
            if (status != QWEN_AOT_OK)
            {
                fprintf(stderr, "nothing failed and the call came to %s\n", qwen_aot_status_name(status));
                return 1;
            }
            break;
        }
    }
    if (!opens && generate(model) != QWEN_AOT_OK)
    {
        fprintf(stderr, "it doesn't work any more\n");
        return 1;
    }
    qwen_aot_model_free(model);
    printf("%ld allocations, %d completions\n", number, completions);
    return 0;
}
