/** ONNX Runtime's library, between a program and the real one (ENV TIMED_ONNXRUNTIME): it notes the CPU time that is spent in the
 *  engine, so that what is left is the program's own. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum
{
    kRunWithBinding = 133,
    kFunctions = 267 /* of interface 17, as far as libqwen_aot takes them */
};

struct base
{
    void* const* (*get_api)(uint32_t version);
    char const* (*get_version)(void);
};

static struct base const* real;
static void* table[kFunctions];
static double asked_us; /* by the clock of the thread that asked for the library last */
static double run_us;   /* of the thread that calls */

static double now(clockid_t clock)
{
    struct timespec time;
    clock_gettime(clock, &time);
    return (double)time.tv_sec * 1e6 + (double)time.tv_nsec * 1e-3;
}

static void* run_with_binding(void* session, void const* options, void const* binding)
{
    static void* (*run)(void*, void const*, void const*);
    if (run == NULL)
    {
        run = (void* (*)(void*, void const*, void const*))real->get_api(17)[kRunWithBinding];
    }
    double const started = now(CLOCK_THREAD_CPUTIME_ID);
    void* const failure = run(session, options, binding);
    run_us += now(CLOCK_THREAD_CPUTIME_ID) - started;
    return failure;
}

static void* const* get_api(uint32_t version)
{
    void* const* const found = real->get_api(version);
    if (found == NULL || version != 17)
    {
        return NULL;
    }
    memcpy(table, found, sizeof table);
    table[kRunWithBinding] = (void*)run_with_binding;
    return table;
}

static char const* get_version(void)
{
    return real->get_version();
}

struct base const* OrtGetApiBase(void)
{
    static struct base const ours = {get_api, get_version};
    if (real == NULL)
    {
        void* const library = dlopen(getenv("TIMED_ONNXRUNTIME"), RTLD_NOW | RTLD_LOCAL);
        void* const found = library == NULL ? NULL : dlsym(library, "OrtGetApiBase");
        if (found == NULL)
        {
            return NULL;
        }
        real = ((struct base const* (*)(void))found)();
    }
    asked_us = now(CLOCK_THREAD_CPUTIME_ID);
    return &ours;
}

/** By the CPU clock of the calling thread, in microseconds: when the library was asked for last, and what its runs took so far. */
double timed_asked_us(void)
{
    return asked_us;
}
double timed_run_us(void)
{
    return run_us;
}
