/* Streams an answer: stream BUNDLE "What is the capital of France?" */

#include <qwen_aot.h>
#include <stdio.h>

static int32_t show(void* user, qwen_aot_event const* event)
{
    (void)user;
    fputs(qwen_aot_event_text(event, NULL), stdout);
    fflush(stdout);
    return 0; /* anything else cancels */
}

int main(int argc, char** argv)
{
    qwen_aot_error* error = NULL;
    qwen_aot_model* model = NULL;
    qwen_aot_generator* generator = NULL;
    qwen_aot_chat* chat = NULL;
    if (argc == 3 && qwen_aot_model_open(argv[1], QWEN_AOT_TO_NUL, NULL, &model, &error) == QWEN_AOT_OK
        && qwen_aot_generator_create(model, &generator, &error) == QWEN_AOT_OK
        && qwen_aot_chat_create(generator, NULL, NULL, 0, &chat, &error) == QWEN_AOT_OK
        && qwen_aot_chat_send(chat, argv[2], QWEN_AOT_TO_NUL, show, NULL, NULL, &error) == QWEN_AOT_OK)
    {
        puts("");
    }
    else
    {
        fprintf(
            stderr, "error: %s\n", argc == 3 ? qwen_aot_error_message(error, NULL) : "give a bundle and a question");
    }
    int const failed = chat == NULL || error != NULL;
    qwen_aot_chat_free(chat); /* NULL is fine, and so is any order */
    qwen_aot_generator_free(generator);
    qwen_aot_model_free(model);
    qwen_aot_error_free(error);
    return failed;
}
