/** A manifest's table of inputs and outputs, as far as this library can feed it. */
#pragma once

#include "base/status.h"
#include "bundle/manifest.h"

#include <string_view>

namespace qwen_aot
{

/** What a step feeds besides the cache: int64, all but the rows of images. */
enum class StepInput
{
    input_ids,        // [B, S]
    position_ids,     // [B, S]
    cache_length,     // [B]
    new_tokens,       // [B]
    key_positions,    // [W]
    logits_positions, // [T]; this library asks for each row's last token only: T is 1
    rotary_offset,    // [B]; the first row of the rotary table of each row
    image_positions,  // [B, S]; this library takes no images: -1, no token stands for one
    image_embeddings, // [I, M] float32; one row, which nothing reads
};
constexpr size_t kStepInputs = 9;

/** The name of a step's input in the graph; null: the graph hasn't that input. */
char const* find_step_input(TextEngine const& engine, StepInput input);

/** Whether an input is a part of the cache: past_key_values.*, [B, Hkv, C, D], or [B, Hkv, C] of scales. */
bool is_cache_input(IoTensor const& tensor);

/** The output that shares a cache input's memory: present.*. */
Status present_name(std::string_view past, Text& name, Error& error);

/** M of the rows that a step takes from images, or 0: it takes none. */
int64_t image_width(TextEngine const& engine);

/** C of the cache inputs, or 0 where a letter stands for it. */
int64_t fixed_capacity(TextEngine const& engine);

/** Refuses inputs and outputs that no step can feed or take. ENGINE_MISMATCH: names them. */
Status check_table(Manifest const& manifest, Error& error);

} // namespace qwen_aot
