/* A library in the place of own kernels, without ops: compiled with DOUBLE_VERSION, the version that it tells, and perhaps
 * DOUBLE_REFUSAL, what it says as ONNX Runtime registers its ops, DOUBLE_INSTRUCTIONS, what it says of the CPU that it
 * refuses, or DOUBLE_USES, the instructions that it has in place of "none". */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

typedef struct
{
    void* (*const* (*get_api)(uint32_t version))(int32_t code, char const* message);
    char const* (*version)(void);
} api_base;

int32_t qwen_aot_cpu_version(void)
{
    return DOUBLE_VERSION;
}

int32_t qwen_aot_cpu_instructions(char* text, size_t size)
{
#ifndef DOUBLE_USES
#define DOUBLE_USES "none"
#endif
#ifdef DOUBLE_INSTRUCTIONS
    snprintf(text, size, "%s", DOUBLE_INSTRUCTIONS);
    return 1;
#else
    snprintf(text, size, "%s", DOUBLE_USES);
    return 0;
#endif
}

void* RegisterCustomOps(void* options, api_base const* base)
{
    (void)options;
#ifdef DOUBLE_REFUSAL
    return base->get_api(24)[0](1, DOUBLE_REFUSAL); /* CreateStatus */
#else
    (void)base;
    return NULL;
#endif
}
