/** What a strict JSON document must look like: a table of keys, types and ranges, and the check of a document by it. */
#pragma once

#include "base/status.h"
#include "bundle/json.h"

#include <cstdint>
#include <string_view>

namespace qwen_aot
{

enum class Shape : uint8_t
{
    text,
    boolean,
    integer,
    integer_or_text,
    scalar, // an integer, a text or a boolean
    list,
    map,   // an object of any keys
    record // an object of exactly these keys, optional ones left out or not
};

struct SchemaField;

/** One type of value. All that it points to must outlive it: constants. */
struct SchemaType
{
    Shape shape;
    bool is_nullable = false;
    /** Of an integer. */
    int64_t least = INT64_MIN;
    int64_t most = INT64_MAX;
    /** Which texts, or keys of a map, there may be, and the same in words; null: any. */
    bool (*accepts)(std::string_view text) = nullptr;
    char const* accepted = nullptr;
    /** Of a list's elements and a map's values. */
    SchemaType const* inner = nullptr;
    /** Of a record. */
    SchemaField const* fields = nullptr;
    size_t num_fields = 0;
};

struct SchemaField
{
    char const* name;
    SchemaType const* type;
    bool is_optional = false;
};

/** A document has this type. Records, lists and maps of a type may nest at most 12 deep, which the type decides and no
 *  document.
 *  where: the document's name in messages.
 *  BUNDLE: the message names the key, what was found and what is accepted. */
Status check_schema(JsonValue document, SchemaType const& type, char const* where, Error& error);

/** A value of a key that is there, as it is after the check. */
JsonValue member(JsonValue object, std::string_view key);

} // namespace qwen_aot
