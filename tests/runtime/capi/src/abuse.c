/* What a program may do wrong, or at an unusual time: abuse CASE BUNDLE. Prints "ok", or says what was not as the header
 * says and exits with 1. */

#define _GNU_SOURCE
#include <qwen_aot.h>

#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define EXPECT(condition)                                                                                              \
    do                                                                                                                 \
    {                                                                                                                  \
        if (!(condition))                                                                                              \
        {                                                                                                              \
            fprintf(stderr, "line %d: not so: %s (%s)\n", __LINE__, #condition, said());                               \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static qwen_aot_error* last; /* of the last call */

static char const* said(void)
{
    return qwen_aot_error_message(last, NULL);
}

/** The place for a call's error; frees the one before. */
static qwen_aot_error** error(void)
{
    qwen_aot_error_free(last);
    last = NULL;
    return &last;
}

static char const* bundle;
static qwen_aot_model* model;
static qwen_aot_generator* generator;
static qwen_aot_request* request;

static void pause_ms(long ms)
{
    struct timespec const time = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&time, NULL);
}

static void set_up(void)
{
    EXPECT(qwen_aot_model_open(bundle, QWEN_AOT_TO_NUL, NULL, &model, error()) == QWEN_AOT_OK);
    EXPECT(qwen_aot_generator_create(model, &generator, error()) == QWEN_AOT_OK);
    int32_t const ids[] = {1, 2, 3};
    EXPECT(qwen_aot_request_create(&request, error()) == QWEN_AOT_OK);
    EXPECT(qwen_aot_request_set_ids(request, ids, 3, error()) == QWEN_AOT_OK);
    qwen_aot_config* config = NULL;
    EXPECT(qwen_aot_config_create(&config, error()) == QWEN_AOT_OK);
    EXPECT(qwen_aot_config_set_max_new_tokens(config, 8, error()) == QWEN_AOT_OK);
    EXPECT(qwen_aot_config_set_ignore_eos(config, 1, error()) == QWEN_AOT_OK);
    EXPECT(qwen_aot_request_set_config(request, config, error()) == QWEN_AOT_OK);
    qwen_aot_config_free(config);
}

static void tear_down(void)
{
    qwen_aot_request_free(request);
    qwen_aot_generator_free(generator);
    qwen_aot_model_free(model);
    error();
}

static int32_t count(void* user, qwen_aot_event const* event)
{
    if (qwen_aot_event_get_type(event) == QWEN_AOT_EVENT_TOKEN)
    {
        ++*(int*)user;
    }
    return 0;
}

/** Eight tokens come, whatever was done before. */
static void expect_works(void)
{
    int tokens = 0;
    qwen_aot_event const* completion = NULL;
    EXPECT(qwen_aot_generate(generator, request, count, &tokens, &completion, error()) == QWEN_AOT_OK);
    EXPECT(tokens == 8);
    EXPECT(qwen_aot_event_finish_reason(completion) == QWEN_AOT_FINISH_LENGTH);
}

/* -- cases ---------------------------------------------------------------------------------------------------------- */

static void free_null(void)
{
    qwen_aot_error_free(NULL);
    qwen_aot_options_free(NULL);
    qwen_aot_model_free(NULL);
    qwen_aot_detokenizer_free(NULL);
    qwen_aot_conversation_free(NULL);
    qwen_aot_config_free(NULL);
    qwen_aot_request_free(NULL);
    qwen_aot_generator_free(NULL);
    qwen_aot_chat_free(NULL);
    qwen_aot_rows_free(NULL);
    qwen_aot_conversation_clear(NULL);
    qwen_aot_generator_cancel(NULL, 1);
    qwen_aot_chat_cancel(NULL);
    qwen_aot_rows_cancel(NULL);
}

/** Model, generator, chat, rows and detokenizer in every order. */
static void free_in_any_order(void)
{
    int order[5];
    for (int number = 0; number < 120; ++number)
    {
        int rest = number;
        int left[5] = {0, 1, 2, 3, 4};
        for (int i = 0; i < 5; ++i)
        {
            int const place = rest % (5 - i);
            rest /= 5 - i;
            order[i] = left[place];
            memmove(left + place, left + place + 1, sizeof(int) * (size_t)(4 - place));
        }
        set_up();
        qwen_aot_chat* chat = NULL;
        qwen_aot_rows* rows = NULL;
        qwen_aot_detokenizer* detokenizer = NULL;
        EXPECT(qwen_aot_chat_create(generator, NULL, "Be brief.", QWEN_AOT_TO_NUL, &chat, error()) == QWEN_AOT_OK);
        EXPECT(qwen_aot_rows_create(model, &rows, error()) == QWEN_AOT_OK);
        EXPECT(qwen_aot_detokenizer_create(model, &detokenizer, error()) == QWEN_AOT_OK);
        for (int i = 0; i < 5; ++i)
        {
            switch (order[i])
            {
            case 0: qwen_aot_model_free(model); break;
            case 1: qwen_aot_generator_free(generator); break;
            case 2: qwen_aot_chat_free(chat); break;
            case 3: qwen_aot_rows_free(rows); break;
            default: qwen_aot_detokenizer_free(detokenizer); break;
            }
        }
        qwen_aot_request_free(request);
        error();
    }
}

static void model_freed_first(void)
{
    set_up();
    qwen_aot_model_free(model);
    expect_works();
    qwen_aot_chat* chat = NULL;
    EXPECT(qwen_aot_chat_create(generator, NULL, NULL, 0, &chat, error()) == QWEN_AOT_OK);
    qwen_aot_generator_free(generator); /* the chat still has it */
    EXPECT(qwen_aot_chat_send(chat, "hello", QWEN_AOT_TO_NUL, NULL, NULL, NULL, error()) == QWEN_AOT_OK);
    qwen_aot_chat_free(chat);
    qwen_aot_request_free(request);
    error();
}

static void cancel_what_ended(void)
{
    set_up();
    expect_works();
    for (uint64_t id = 0; id < 70; ++id)
    {
        qwen_aot_generator_cancel(generator, id);
        qwen_aot_generator_cancel(generator, id << 16 | 5);
    }
    qwen_aot_generator_cancel(generator, UINT64_MAX);
    uint64_t id = 0;
    EXPECT(qwen_aot_generator_submit(generator, request, &id, error()) == QWEN_AOT_OK);
    qwen_aot_generator_cancel(generator, id);
    size_t events = 0;
    EXPECT(qwen_aot_generator_step(generator, &events, error()) == QWEN_AOT_OK);
    EXPECT(events == 1);
    EXPECT(qwen_aot_event_finish_reason(qwen_aot_generator_event(generator, 0)) == QWEN_AOT_FINISH_CANCELLED);
    EXPECT(qwen_aot_generator_event(generator, 1) == NULL);
    qwen_aot_generator_cancel(generator, id);
    expect_works();
    tear_down();
}

static int32_t call_back(void* user, qwen_aot_event const* event)
{
    (void)event;
    size_t events = 0;
    uint64_t id = 0;
    EXPECT(qwen_aot_generate(generator, request, NULL, NULL, NULL, NULL) == QWEN_AOT_BUSY);
    EXPECT(qwen_aot_generator_step(generator, &events, NULL) == QWEN_AOT_BUSY);
    EXPECT(qwen_aot_generator_submit(generator, request, &id, NULL) == QWEN_AOT_BUSY);
    ++*(int*)user;
    return 0;
}

static void callback_calls_back(void)
{
    set_up();
    int calls = 0;
    EXPECT(qwen_aot_generate(generator, request, call_back, &calls, NULL, error()) == QWEN_AOT_OK);
    EXPECT(calls == 9);
    expect_works();
    tear_down();
}

static int32_t free_all(void* user, qwen_aot_event const* event)
{
    (void)event;
    if (!*(int*)user)
    {
        *(int*)user = 1;
        qwen_aot_model_free(model);
        qwen_aot_generator_free(generator);
        qwen_aot_request_free(request);
    }
    return 0;
}

static void callback_frees(void)
{
    set_up();
    int is_freed = 0;
    EXPECT(qwen_aot_generate(generator, request, free_all, &is_freed, NULL, error()) == QWEN_AOT_OK);
    error();
}

static qwen_aot_chat* chat;

static void make_chat(qwen_aot_chat** made)
{
    qwen_aot_config* config = NULL;
    EXPECT(qwen_aot_config_create(&config, error()) == QWEN_AOT_OK);
    EXPECT(qwen_aot_config_set_max_new_tokens(config, 6, error()) == QWEN_AOT_OK);
    EXPECT(qwen_aot_config_set_ignore_eos(config, 1, error()) == QWEN_AOT_OK);
    EXPECT(qwen_aot_chat_create(generator, config, "Be brief.", QWEN_AOT_TO_NUL, made, error()) == QWEN_AOT_OK);
    qwen_aot_config_free(config);
}

static int32_t change_the_chat(void* user, qwen_aot_event const* event)
{
    (void)event;
    EXPECT(qwen_aot_chat_reset(chat, NULL) == QWEN_AOT_BUSY);
    EXPECT(qwen_aot_chat_set_thinking(chat, -1, NULL) == QWEN_AOT_BUSY);
    EXPECT(qwen_aot_chat_set_flags(chat, 0, NULL) == QWEN_AOT_BUSY);
    EXPECT(qwen_aot_chat_send(chat, "x", 1, NULL, NULL, NULL, NULL) == QWEN_AOT_BUSY);
    ++*(int*)user;
    return 0;
}

static int32_t cancel_the_answer(void* user, qwen_aot_event const* event)
{
    (void)event;
    if (*(int*)user == 0)
    {
        qwen_aot_generator_cancel(generator, 0);
    }
    else
    {
        qwen_aot_chat_cancel(chat);
    }
    return 0;
}

static int32_t free_the_chat(void* user, qwen_aot_event const* event)
{
    (void)event;
    if ((*(int*)user)++ == 0)
    {
        qwen_aot_chat_free(chat);
        qwen_aot_generator_free(generator);
        qwen_aot_model_free(model);
    }
    return 0;
}

/** The callback of a chat's turn may change nothing of the chat, and may free it. */
static void chat_in_its_callback(void)
{
    set_up();
    make_chat(&chat);
    int calls = 0;
    EXPECT(qwen_aot_chat_send(chat, "hello", 5, change_the_chat, &calls, NULL, error()) == QWEN_AOT_OK);
    EXPECT(calls == 7);
    for (calls = 0; calls < 2; ++calls) /* of the answer that comes now, whatever its number */
    {
        EXPECT(qwen_aot_chat_send(chat, "a", 1, cancel_the_answer, &calls, NULL, error()) == QWEN_AOT_CANCELLED);
        qwen_aot_chat_cancel(chat); /* between turns: nothing */
        EXPECT(qwen_aot_generate(generator, request, cancel_the_answer, &calls, NULL, error()) == QWEN_AOT_CANCELLED);
    }
    expect_works();
    calls = 0;
    EXPECT(qwen_aot_chat_send(chat, "again", 5, free_the_chat, &calls, NULL, error()) == QWEN_AOT_OK);
    EXPECT(calls == 7);
    qwen_aot_request_free(request);
    error();
}

static int64_t tokens_of(qwen_aot_chat* of, char const* text)
{
    qwen_aot_event const* completion = NULL;
    EXPECT(qwen_aot_chat_send(of, text, QWEN_AOT_TO_NUL, NULL, NULL, &completion, error()) == QWEN_AOT_OK);
    return qwen_aot_event_prompt_tokens(completion);
}

/** Two chats on one generator; a turn that fails leaves its conversation as it was. */
static void two_chats(void)
{
    set_up();
    qwen_aot_chat* other = NULL;
    make_chat(&chat);
    make_chat(&other);
    int64_t const first = tokens_of(chat, "hello");
    EXPECT(tokens_of(other, "hello") == first);
    char* const text = malloc(100000);
    memset(text, 'x', 100000);
    qwen_aot_event const* completion = NULL;
    EXPECT(qwen_aot_chat_send(chat, text, 100000, NULL, NULL, &completion, error()) == QWEN_AOT_CONTEXT_FULL);
    EXPECT(completion == NULL);
    EXPECT(qwen_aot_chat_send(chat, "\xff", 1, NULL, NULL, &completion, error()) == QWEN_AOT_INVALID_ARGUMENT);
    free(text);
    uint64_t id = 0;
    EXPECT(qwen_aot_generator_submit(generator, request, &id, error()) == QWEN_AOT_OK);
    EXPECT(qwen_aot_chat_send(chat, "now", 3, NULL, NULL, NULL, error()) == QWEN_AOT_BUSY);
    for (size_t events = 0; !qwen_aot_generator_is_idle(generator);)
    {
        EXPECT(qwen_aot_generator_step(generator, &events, error()) == QWEN_AOT_OK);
    }
    int64_t const second = tokens_of(chat, "and then?");
    EXPECT(second > first && tokens_of(other, "and then?") == second); /* nothing was left of what failed */
    EXPECT(qwen_aot_chat_reset(chat, error()) == QWEN_AOT_OK);
    EXPECT(tokens_of(chat, "hello") == first);
    qwen_aot_chat_free(other);
    qwen_aot_chat_free(chat);
    tear_down();
}

/** Numbers that no memory has, and outputs of calls that fail. */
static void lengths_that_lie(void)
{
    set_up();
    int32_t id = 1;
    size_t size = 7;
    size_t const huge = SIZE_MAX - 1;
    char text[8];
    EXPECT(qwen_aot_tokenize(model, "a", huge, 0, &id, 1, &size, error()) == QWEN_AOT_INVALID_ARGUMENT);
    EXPECT(strstr(said(), "no text has") != NULL && size == 0);
    EXPECT(qwen_aot_tokenize(model, "a", 1, 0, &id, SIZE_MAX, &size, error()) == QWEN_AOT_OK && size == 1);
    EXPECT(qwen_aot_detokenize(model, &id, 1, text, 0, &size, error()) == QWEN_AOT_BUFFER_TOO_SMALL && size > 0);
    EXPECT(qwen_aot_detokenize(model, &id, huge, text, 8, &size, error()) == QWEN_AOT_INVALID_ARGUMENT);
    EXPECT(strstr(said(), "no memory has") != NULL && size == 0);
    EXPECT(qwen_aot_request_set_ids(request, &id, huge, error()) == QWEN_AOT_INVALID_ARGUMENT);
    EXPECT(qwen_aot_request_set_ids(request, NULL, 3, error()) == QWEN_AOT_INVALID_ARGUMENT);
    EXPECT(qwen_aot_request_set_keep_cache(request, 2, error()) == QWEN_AOT_INVALID_ARGUMENT);
    qwen_aot_config* config = NULL;
    EXPECT(qwen_aot_config_create(&config, error()) == QWEN_AOT_OK);
    EXPECT(qwen_aot_config_set_suppress_tokens(config, &id, huge, error()) == QWEN_AOT_INVALID_ARGUMENT);
    EXPECT(qwen_aot_config_add_stop(config, "a", huge, error()) == QWEN_AOT_INVALID_ARGUMENT);
    qwen_aot_config_free(config);
    qwen_aot_options* options = NULL;
    EXPECT(qwen_aot_options_create(&options, error()) == QWEN_AOT_OK);
    EXPECT(qwen_aot_options_set_allow_bundle_code(options, 2, error()) == QWEN_AOT_INVALID_ARGUMENT);
    EXPECT(strstr(said(), "accepted: 0 or 1") != NULL);
    qwen_aot_options_free(options);
    int64_t value = 7;
    EXPECT(qwen_aot_model_fact(NULL, 1, &value, error()) == QWEN_AOT_INVALID_ARGUMENT && value == 0);
    value = 7;
    EXPECT(qwen_aot_model_fact(model, 99, &value, error()) == QWEN_AOT_UNSUPPORTED && value == 0);
    qwen_aot_rows* rows = NULL;
    float const* logits = NULL;
    EXPECT(qwen_aot_rows_create(model, &rows, error()) == QWEN_AOT_OK);
    EXPECT(qwen_aot_rows_prefill(rows, 0, &id, 1, &logits, error()) == QWEN_AOT_OK && logits != NULL);
    EXPECT(qwen_aot_rows_prefill(rows, 99, &id, 1, &logits, error()) == QWEN_AOT_INVALID_ARGUMENT && logits == NULL);
    logits = (float const*)text;
    EXPECT(qwen_aot_rows_prefill(rows, 0, &id, huge, &logits, error()) == QWEN_AOT_INVALID_ARGUMENT && logits == NULL);
    logits = (float const*)text;
    EXPECT(qwen_aot_rows_decode(NULL, 0, &id, 1, &logits, error()) == QWEN_AOT_INVALID_ARGUMENT && logits == NULL);
    value = 7;
    EXPECT(qwen_aot_rows_length(rows, -1, &value, error()) == QWEN_AOT_INVALID_ARGUMENT && value == 0);
    EXPECT(qwen_aot_rows_length(rows, 0, &value, error()) == QWEN_AOT_OK && value == 1);
    qwen_aot_rows_free(rows);
    expect_works();
    tear_down();
}

static int32_t free_the_request(void* user, qwen_aot_event const* event)
{
    (void)event;
    if ((*(int*)user)++ == 0)
    {
        qwen_aot_request_free(request);
    }
    return 0;
}

static int32_t stop_at_once(void* user, qwen_aot_event const* event)
{
    (void)event;
    ++*(int*)user;
    return 1;
}

/** Several outputs: all of their ends come, though the request is freed or cancelled meanwhile. */
static void several_choices(void)
{
    set_up();
    qwen_aot_config* config = NULL;
    EXPECT(qwen_aot_config_create(&config, error()) == QWEN_AOT_OK);
    EXPECT(qwen_aot_config_set_n(config, 9, error()) == QWEN_AOT_OK);
    EXPECT(qwen_aot_config_set_max_new_tokens(config, 8, error()) == QWEN_AOT_OK);
    EXPECT(qwen_aot_config_set_ignore_eos(config, 1, error()) == QWEN_AOT_OK);
    EXPECT(qwen_aot_request_set_config(request, config, error()) == QWEN_AOT_OK);
    qwen_aot_config_free(config);
    int calls = 0;
    qwen_aot_event const* completion = NULL;
    EXPECT(qwen_aot_generate(generator, request, stop_at_once, &calls, &completion, error()) == QWEN_AOT_CANCELLED);
    EXPECT(calls >= 10 && qwen_aot_event_finish_reason(completion) == QWEN_AOT_FINISH_CANCELLED);
    size_t kept = 0;
    EXPECT(qwen_aot_event_full_text(completion, &kept) != NULL); /* valid until the next call */
    calls = 0;
    EXPECT(qwen_aot_generate(generator, request, free_the_request, &calls, &completion, error()) == QWEN_AOT_OK);
    EXPECT(calls == 9 * 9);
    request = NULL;
    tear_down();
}

static int32_t stop_at_third(void* user, qwen_aot_event const* event)
{
    count(user, event);
    return *(int*)user == 3;
}

static void callback_cancels(void)
{
    set_up();
    int tokens = 0;
    qwen_aot_event const* completion = NULL;
    EXPECT(qwen_aot_generate(generator, request, stop_at_third, &tokens, &completion, error()) == QWEN_AOT_CANCELLED);
    EXPECT(tokens == 3);
    EXPECT(qwen_aot_event_finish_reason(completion) == QWEN_AOT_FINISH_CANCELLED);
    size_t kept = 0;
    qwen_aot_event_tokens(completion, &kept);
    EXPECT(kept == 3);
    expect_works();
    tear_down();
}

static void* step_until_idle(void* user)
{
    long* const counts = user; /* OK, BUSY */
    while (!qwen_aot_generator_is_idle(generator) && counts[0] + counts[1] < 1000000)
    {
        size_t events = 0;
        qwen_aot_status const status = qwen_aot_generator_step(generator, &events, NULL);
        if (status != QWEN_AOT_OK && status != QWEN_AOT_BUSY)
        {
            exit(1);
        }
        ++counts[status == QWEN_AOT_BUSY];
    }
    return NULL;
}

static int32_t linger(void* user, qwen_aot_event const* event)
{
    (void)event;
    ++*(int*)user;
    pause_ms(20);
    return 0;
}

static void* generate_slowly(void* user)
{
    EXPECT(qwen_aot_generate(generator, request, linger, user, NULL, NULL) == QWEN_AOT_OK);
    return NULL;
}

static void two_threads(void)
{
    set_up();
    int calls = 0;
    pthread_t thread;
    pthread_create(&thread, NULL, generate_slowly, &calls);
    pause_ms(60);
    uint64_t id = 0;
    EXPECT(qwen_aot_generator_submit(generator, request, &id, error()) == QWEN_AOT_BUSY);
    EXPECT(strstr(said(), "another call") != NULL);
    pthread_join(thread, NULL);
    EXPECT(calls == 9);
    /* Two that step as fast as they can: each step is one thread's alone. */
    for (int i = 0; i < 6; ++i)
    {
        EXPECT(qwen_aot_generator_submit(generator, request, &id, error()) == QWEN_AOT_OK);
    }
    long first[2] = {0, 0};
    long second[2] = {0, 0};
    pthread_create(&thread, NULL, step_until_idle, first);
    step_until_idle(second);
    pthread_join(thread, NULL);
    EXPECT(qwen_aot_generator_is_idle(generator));
    expect_works();
    tear_down();
}

static void* cancel_soon(void* user)
{
    (void)user;
    pause_ms(5);
    qwen_aot_generator_cancel(generator, 0);
    return NULL;
}

/** Freeing while another thread is in a call: the call ends as it would, and takes the generator with it. */
static void freed_under_a_step(void)
{
    set_up();
    int calls = 0;
    pthread_t thread;
    pthread_create(&thread, NULL, generate_slowly, &calls);
    pause_ms(60);
    qwen_aot_generator_free(generator);
    qwen_aot_model_free(model);
    pthread_join(thread, NULL);
    EXPECT(calls == 9);
    qwen_aot_request_free(request);
    error();
}

/** Cancelling from another thread at any time, a hundred times: it ends cancelled or whole, and the next one works. */
static void cancelled_at_any_time(void)
{
    set_up();
    for (int i = 0; i < 100; ++i)
    {
        pthread_t thread;
        pthread_create(&thread, NULL, cancel_soon, NULL);
        if (i % 3 == 0)
        {
            pause_ms(4);
        }
        int tokens = 0;
        qwen_aot_status const status = qwen_aot_generate(generator, request, count, &tokens, NULL, error());
        EXPECT(status == QWEN_AOT_CANCELLED || (status == QWEN_AOT_OK && tokens == 8));
        pthread_join(thread, NULL);
    }
    expect_works();
    tear_down();
}

static void* own_generator(void* user)
{
    qwen_aot_generator* own = NULL;
    qwen_aot_event const* completion = NULL;
    EXPECT(qwen_aot_generator_create(model, &own, NULL) == QWEN_AOT_OK);
    int32_t* const tokens = user;
    for (int i = 0; i < 20; ++i)
    {
        EXPECT(qwen_aot_generate(own, request, NULL, NULL, &completion, NULL) == QWEN_AOT_OK);
        size_t kept = 0;
        int32_t const* const ids = qwen_aot_event_tokens(completion, &kept);
        EXPECT(kept == 8);
        if (i == 0)
        {
            memcpy(tokens, ids, 8 * sizeof *ids);
        }
        EXPECT(memcmp(tokens, ids, 8 * sizeof *ids) == 0);
    }
    qwen_aot_generator_free(own);
    return NULL;
}

/** One model, a generator in each of four threads. */
static void generators_in_threads(void)
{
    set_up();
    pthread_t threads[4];
    int32_t tokens[4][8];
    for (int i = 0; i < 4; ++i)
    {
        pthread_create(&threads[i], NULL, own_generator, tokens[i]);
    }
    for (int i = 0; i < 4; ++i)
    {
        pthread_join(threads[i], NULL);
        EXPECT(memcmp(tokens[0], tokens[i], sizeof tokens[0]) == 0);
    }
    tear_down();
}

/** Forks while another thread is in a step: the child is told so, not that it is to wait. */
static void forked_at_work(void)
{
    set_up();
    make_chat(&chat);
    int calls = 0;
    pthread_t thread;
    pthread_create(&thread, NULL, generate_slowly, &calls);
    pause_ms(60);
    pid_t const child = fork();
    if (child == 0)
    {
        size_t events = 0;
        int32_t ids[16];
        EXPECT(qwen_aot_generator_step(generator, &events, NULL) == QWEN_AOT_WRONG_PROCESS);
        EXPECT(qwen_aot_chat_send(chat, "x", 1, NULL, NULL, NULL, NULL) == QWEN_AOT_WRONG_PROCESS);
        EXPECT(qwen_aot_chat_reset(chat, NULL) == QWEN_AOT_WRONG_PROCESS);
        EXPECT(qwen_aot_tokenize(model, "text", 4, 0, ids, 16, &events, NULL) == QWEN_AOT_OK); /* no engine */
        qwen_aot_generator_cancel(generator, 0);
        qwen_aot_chat_free(chat);
        tear_down();
        _exit(7);
    }
    int status = 0;
    EXPECT(waitpid(child, &status, 0) == child);
    EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 7);
    pthread_join(thread, NULL);
    EXPECT(calls == 9);
    qwen_aot_chat_free(chat);
    tear_down();
}

static void forked(void)
{
    set_up();
    expect_works();
    qwen_aot_rows* rows = NULL;
    EXPECT(qwen_aot_rows_create(model, &rows, error()) == QWEN_AOT_OK);
    pid_t const child = fork();
    if (child == 0)
    {
        size_t events = 0;
        int64_t length = 0;
        qwen_aot_generator* another = NULL;
        EXPECT(qwen_aot_generate(generator, request, NULL, NULL, NULL, error()) == QWEN_AOT_WRONG_PROCESS);
        EXPECT(strstr(said(), "fork") != NULL);
        EXPECT(qwen_aot_generator_step(generator, &events, error()) == QWEN_AOT_WRONG_PROCESS);
        EXPECT(qwen_aot_rows_length(rows, 0, &length, error()) == QWEN_AOT_WRONG_PROCESS);
        EXPECT(qwen_aot_generator_create(model, &another, error()) == QWEN_AOT_WRONG_PROCESS);
        qwen_aot_rows_free(rows);
        tear_down();
        _exit(7);
    }
    int status = 0;
    EXPECT(waitpid(child, &status, 0) == child);
    EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 7);
    expect_works();
    qwen_aot_rows_free(rows);
    tear_down();
}

static void exit_without_freeing(void)
{
    set_up();
    expect_works();
    uint64_t id = 0;
    size_t events = 0;
    EXPECT(qwen_aot_generator_submit(generator, request, &id, error()) == QWEN_AOT_OK);
    EXPECT(qwen_aot_generator_step(generator, &events, error()) == QWEN_AOT_OK);
    error();
}

/** The caller deletes the bundle once this prints "open". */
static void vanished(void)
{
    set_up();
    puts("open");
    fflush(stdout);
    EXPECT(getchar() == 'x');
    expect_works();
    qwen_aot_model* another = NULL;
    EXPECT(qwen_aot_model_open(bundle, QWEN_AOT_TO_NUL, NULL, &another, error()) != QWEN_AOT_OK);
    EXPECT(another == NULL && strstr(said(), bundle) != NULL);
    tear_down();
}

static void* volatile leaked; /* the last of many */

/** Resident memory in KiB. */
static long resident(void)
{
    FILE* const file = fopen("/proc/self/statm", "r");
    long pages = 0;
    EXPECT(file != NULL && fscanf(file, "%*d %ld", &pages) == 1);
    fclose(file);
    return pages * (sysconf(_SC_PAGESIZE) / 1024);
}

/** As many generations as the environment's N says (1,000), in ten parts: what leaks grows in each of the last nine, and
 *  what a thread or the allocator takes once does in one. LEAK: bytes that each generation leaves, to see it found. */
static void many_generations(void)
{
    set_up();
    char const* const wanted = getenv("N");
    char const* const leak = getenv("LEAK");
    long const part = (wanted == NULL ? 1000 : atol(wanted)) / 10;
    long least = LONG_MAX;
    long before = 0;
    for (int i = 0; i < 10; ++i)
    {
        for (long k = 0; k < part; ++k)
        {
            expect_works();
            if (leak != NULL)
            {
                leaked = calloc(1, (size_t)atol(leak));
            }
        }
        long const now = resident();
        if (i > 0 && now - before < least)
        {
            least = now - before;
        }
        before = now;
    }
    fprintf(stderr, "%ld KiB more after each %ld generations\n", least, part);
    EXPECT(least < 16);
    tear_down();
}

/** Requests that wait, others that run, and ends without a step. */
static void freed_at_work(void)
{
    set_up();
    for (int i = 0; i < 40; ++i)
    {
        uint64_t id = 0;
        EXPECT(qwen_aot_generator_submit(generator, request, &id, error()) == QWEN_AOT_OK);
    }
    size_t events = 0;
    for (int i = 0; i < 5; ++i)
    {
        EXPECT(qwen_aot_generator_step(generator, &events, error()) == QWEN_AOT_OK);
    }
    EXPECT(qwen_aot_generate(generator, request, NULL, NULL, NULL, error()) == QWEN_AOT_BUSY);
    EXPECT(strstr(said(), "submitted") != NULL);
    tear_down();
}

int main(int argc, char** argv)
{
    struct
    {
        char const* name;
        void (*run)(void);
    } const cases[] = {
        {"free_null", free_null},
        {"free_in_any_order", free_in_any_order},
        {"model_freed_first", model_freed_first},
        {"cancel_what_ended", cancel_what_ended},
        {"callback_calls_back", callback_calls_back},
        {"callback_frees", callback_frees},
        {"callback_cancels", callback_cancels},
        {"chat_in_its_callback", chat_in_its_callback},
        {"two_chats", two_chats},
        {"lengths_that_lie", lengths_that_lie},
        {"several_choices", several_choices},
        {"two_threads", two_threads},
        {"freed_under_a_step", freed_under_a_step},
        {"cancelled_at_any_time", cancelled_at_any_time},
        {"generators_in_threads", generators_in_threads},
        {"forked", forked},
        {"forked_at_work", forked_at_work},
        {"exit_without_freeing", exit_without_freeing},
        {"vanished", vanished},
        {"many_generations", many_generations},
        {"freed_at_work", freed_at_work},
    };
    if (argc != 3)
    {
        for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i)
        {
            puts(cases[i].name);
        }
        return 0;
    }
    bundle = argv[2];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i)
    {
        if (strcmp(argv[1], cases[i].name) == 0)
        {
            cases[i].run();
            puts("ok");
            return 0;
        }
    }
    fprintf(stderr, "there is no case %s\n", argv[1]);
    return 2;
}
