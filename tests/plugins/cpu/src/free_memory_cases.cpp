// Prints what `free_memory` finds below the folder that is its argument.
#include "free_memory.h"

#include <cinttypes>
#include <cstdio>

int main(int, char** arguments)
{
    std::printf("%" PRIu64 "\n", qwen_aot::cpu::free_memory(arguments[1]));
}
