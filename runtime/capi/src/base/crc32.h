/** The checksum of the compiled text files. */
#pragma once

#include "memory.h"

#include <cstdint>

namespace qwen_aot
{

/** CRC-32 as zlib and gzip have it (polynomial 0x04C11DB7, reflected), with the CPU's instructions where it has them. */
uint32_t crc32(Span<uint8_t const> bytes);

/** The same without. */
uint32_t crc32_portable(Span<uint8_t const> bytes);

} // namespace qwen_aot
