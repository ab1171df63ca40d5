/** What the programs of this folder measure with, each on its own: clocks, memory, the text and the ids of a prompt. */
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define ENCODE_ROUNDS 5
#define ROUNDS 3 /* of a prompt and its answer */

/** Microseconds. */
static inline double now(clockid_t clock)
{
    struct timespec time;
    clock_gettime(clock, &time);
    return (double)time.tv_sec * 1e6 + (double)time.tv_nsec * 1e-3;
}

/** A number of /proc/self/status, in kB. */
static inline long memory(char const* name)
{
    char line[256];
    long found = -1;
    FILE* const file = fopen("/proc/self/status", "r");
    while (file != NULL && fgets(line, sizeof line, file) != NULL)
    {
        if (strncmp(line, name, strlen(name)) == 0)
        {
            found = strtol(line + strlen(name) + 1, NULL, 10);
        }
    }
    if (file != NULL)
    {
        fclose(file);
    }
    return found;
}

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#endif

/** Reads all pages of a library's file that only show it, so that none of them is counted as what comes later. */
static inline void read_pages(char const* library)
{
    char line[4400];
    FILE* const file = fopen("/proc/self/maps", "r");
    while (file != NULL && fgets(line, sizeof line, file) != NULL)
    {
        unsigned long long start, end;
        char rights[5];
        if (strstr(line, library) != NULL && sscanf(line, "%llx-%llx %4s", &start, &end, rights) == 3
            && rights[0] == 'r' && rights[1] == '-')
        {
            madvise((void*)(uintptr_t)start, (size_t)(end - start), MADV_POPULATE_READ);
        }
    }
    if (file != NULL)
    {
        fclose(file);
    }
}

/** A whole file, with a NUL behind it, to be freed. */
static inline char* read_text(char const* path, size_t* length)
{
    FILE* const file = fopen(path, "rb");
    if (file == NULL || fseek(file, 0, SEEK_END) != 0)
    {
        perror(path);
        exit(1);
    }
    *length = (size_t)ftell(file);
    char* const text = malloc(*length + 1);
    rewind(file);
    if (text == NULL || fread(text, 1, *length, file) != *length)
    {
        perror(path);
        exit(1);
    }
    text[*length] = '\0';
    fclose(file);
    return text;
}

/** The ids of every contender's prompt, to be freed. */
static inline int32_t* prompt_ids(int32_t count, int64_t vocab_size)
{
    int32_t* const ids = malloc((size_t)count * sizeof *ids);
    for (int32_t i = 0; i < count; ++i)
    {
        ids[i] = (int32_t)((i * 7919LL + 17) % (vocab_size / 2));
    }
    return ids;
}
