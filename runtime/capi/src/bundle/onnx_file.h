/** The data files that an ONNX file names, found before any library opens it: protobuf's wire format is read here
 *  (runtime/bundle/onnx_file.py). */
#pragma once

#include "base/memory.h"
#include "base/status.h"

#include <cstdint>
#include <string_view>

namespace qwen_aot
{

/** Finds the files that tensors name as theirs, wherever in the model they stand, as they are written; in no order, and
 *  one that several tensors name is told several times.
 *  content: of the file; what is found points into it.
 *  where: the file's name in messages.
 *  BUNDLE: it is no ONNX file, or was cut short. */
Status find_data_files(
    Span<uint8_t const> content, char const* where, Array<std::string_view>& locations, Error& error);

} // namespace qwen_aot
