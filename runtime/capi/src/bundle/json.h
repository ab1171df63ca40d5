/** Strict JSON, refused as the Python reader (runtime/bundle/strict_json.py) refuses it. */
#pragma once

#include "base/memory.h"
#include "base/status.h"
#include "base/text.h"

#include <cstdint>
#include <string_view>

namespace qwen_aot
{

/** Who wrote a document: a checkpoint's may hold integers beyond 64 bits. */
enum class JsonOrigin
{
    ours,
    checkpoint
};

enum class JsonType : uint8_t
{
    null,
    boolean,
    integer,
    number, // with a fraction or an exponent
    string,
    array,
    object
};

class JsonDocument;

/** A value in a document, which must outlive it and stay where it is. Cheap to copy. What isn't asked of its own type has
 *  no meaning, but harms nothing. */
class JsonValue
{
public:
    JsonType type() const;
    bool is_null() const { return type() == JsonType::null; }
    bool boolean() const;
    /** Whether an integer fits 64 bits; always true of documents of our own. */
    bool fits() const;
    /** 0 where it doesn't fit. */
    int64_t integer() const;
    /** Of an integer or a number, as the nearest double; infinity beyond them. */
    double number() const;
    /** UTF-8, may hold NUL. */
    std::string_view string() const;
    /** Elements of an array, members of an object; 0 of others. */
    size_t size() const;
    /** An element of an array, or the value of an object's member, in the order of the text. */
    JsonValue at(size_t index) const;
    /** The key of a member. */
    std::string_view key(size_t index) const;
    /** Whether an object has a key, and its value. */
    bool find(std::string_view key, JsonValue& value) const;
    /** The text that it was read from, for messages. */
    std::string_view source() const;

private:
    friend class JsonDocument;
    JsonDocument const* document_ = nullptr;
    uint32_t node_ = 0;
};

/** A parsed text. At most 2^32 - 1 bytes, nested at most 200 deep, all of it UTF-8: a string that an escape makes half of
 *  a UTF-16 pair is refused. Takes time and memory in proportion to the text (a logarithm more for wide objects). */
class JsonDocument
{
public:
    /** Parses an object.
     *  text: must outlive the document.
     *  where: what to call it in messages.
     *  BUNDLE: it isn't one strict JSON object. */
    static Status parse(
        std::string_view text, char const* where, JsonOrigin origin, JsonDocument& document, Error& error);

    JsonValue root() const;

private:
    friend class JsonParser;
    friend class JsonValue;
    struct Node
    {
        JsonType type;
        bool is_unescaped; // the string's text lies in unescaped_
        uint32_t start;    // of the text, with quotes or brackets
        uint32_t length;
        uint32_t first; // of children_; of a string that is unescaped, of unescaped_
        uint32_t size;  // elements or members; bytes of a string
    };
    std::string_view string(Node const& node) const;

    std::string_view text_;
    Array<Node> nodes_; // in the order of the text; a key is a string before its value
    /** Nodes of each array's elements; of each object's keys, twice: in the order of the text, then of the keys. */
    Array<uint32_t> children_;
    Array<char> unescaped_; // strings that hold escapes
};

} // namespace qwen_aot
