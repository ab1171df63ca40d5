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

/** A value in a document, which must outlive it. Cheap to copy. */
class JsonValue
{
public:
    JsonType type() const;
    bool is_null() const { return type() == JsonType::null; }
    bool boolean() const;
    /** Whether an integer fits 64 bits; always true of documents of our own. */
    bool fits() const;
    int64_t integer() const;
    /** Of an integer or a number, as the nearest double. */
    double number() const;
    /** UTF-8, may hold NUL. */
    std::string_view string() const;
    /** Elements of an array, members of an object. */
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

/** A parsed text. At most 2^32 - 1 bytes, nested at most 200 deep. */
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
    friend class JsonValue;
    struct Node
    {
        JsonType type;
        uint32_t start; // of the text, or of unescaped_ where `is_unescaped`
        uint32_t length;
        uint32_t size; // elements or members
        uint32_t end;  // of the subtree's nodes
        bool is_unescaped;
    };
    std::string_view text_;
    Array<Node> nodes_; // in the order of the text; a key is a string before its value
    Text unescaped_;    // strings that hold escapes
};

} // namespace qwen_aot
