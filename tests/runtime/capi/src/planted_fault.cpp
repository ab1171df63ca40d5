/** Negative control of the fuzzers: fails at an input that begins with "!". */
#include <cstdint>
#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(uint8_t const* data, size_t size)
{
    if (size > 0 && data[0] == '!')
    {
        std::abort();
    }
    return 0;
}
