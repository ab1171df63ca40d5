#include "bundle/onnx_file.h"

#include <cinttypes>

namespace qwen_aot
{

namespace
{

// Sources: https://protobuf.dev/programming-guides/encoding and onnx.proto.
enum class Message : uint8_t
{
    model,
    training,
    graph,
    function,
    node,
    attribute,
    sparse_tensor,
    tensor,
    data,    // an entry of a tensor's external data
    property // of the model; looked at for its shape alone
};

/** Every way from a model to its tensors. */
struct Way
{
    Message from;
    uint32_t number;
    Message to;
};
constexpr Way kWays[] = {
    {Message::model, 7, Message::graph},
    {Message::model, 14, Message::property},
    {Message::model, 20, Message::training},
    {Message::model, 25, Message::function},
    {Message::training, 1, Message::graph},
    {Message::training, 2, Message::graph},
    {Message::graph, 1, Message::node},
    {Message::graph, 5, Message::tensor},
    {Message::graph, 15, Message::sparse_tensor},
    {Message::function, 7, Message::node},
    {Message::function, 11, Message::attribute},
    {Message::node, 5, Message::attribute},
    {Message::attribute, 5, Message::tensor},
    {Message::attribute, 6, Message::graph},
    {Message::attribute, 10, Message::tensor},
    {Message::attribute, 11, Message::graph},
    {Message::attribute, 22, Message::sparse_tensor},
    {Message::attribute, 23, Message::sparse_tensor},
    {Message::sparse_tensor, 1, Message::tensor},
    {Message::sparse_tensor, 2, Message::tensor},
    {Message::tensor, 13, Message::data},
};

constexpr uint32_t kKey = 1;
constexpr uint32_t kValue = 2;

/** A message that is being read: from `at` on it is still to come. */
struct Open
{
    size_t at;
    size_t end;
    Message message;
};

/** A field; of those without a length only that it was passed. */
struct Field
{
    uint64_t number;
    bool has_length;
    size_t start;
    size_t end;
};

class Walker
{
public:
    Walker(Span<uint8_t const> content, char const* where, Array<std::string_view>& locations, Error& error)
        : content_(content)
        , where_(where)
        , locations_(locations)
        , error_(error)
    {
    }

    /** What is open is on a stack of its own: a file may nest as deep as it is long. */
    Status walk()
    {
        QWEN_AOT_NEED(open_.push({0, content_.size(), Message::model}), error_, where_);
        while (!open_.empty())
        {
            Open& open = open_.back();
            if (open.at == open.end)
            {
                open_.pop();
                continue;
            }
            Field field{};
            QWEN_AOT_TRY(read_field(open.at, open.end, field));
            if (!field.has_length)
            {
                continue;
            }
            Message const from = open.message; // `open` may move
            for (Way const& way : kWays)
            {
                if (way.from != from || way.number != field.number)
                {
                    continue;
                }
                if (way.to == Message::data)
                {
                    QWEN_AOT_TRY(read_data(field.start, field.end));
                }
                else
                {
                    QWEN_AOT_NEED(open_.push({field.start, field.end, way.to}), error_, where_);
                }
            }
        }
        return Status::ok;
    }

private:
    /** A key and its value. One that stands twice: readers take the last, and all of them are told here. */
    Status read_data(size_t at, size_t end)
    {
        bool is_location = false;
        size_t const first = locations_.size();
        while (at < end)
        {
            Field field{};
            QWEN_AOT_TRY(read_field(at, end, field));
            if (!field.has_length)
            {
                continue;
            }
            std::string_view const text(
                reinterpret_cast<char const*>(content_.data()) + field.start, field.end - field.start);
            is_location = is_location || (field.number == kKey && text == "location");
            QWEN_AOT_NEED(field.number != kValue || locations_.push(text), error_, where_);
        }
        if (!is_location)
        {
            locations_.shrink(first);
        }
        else if (locations_.size() == first)
        {
            // What isn't there is empty, to readers of protobuf.
            QWEN_AOT_NEED(locations_.push(""), error_, where_);
        }
        return Status::ok;
    }

    /** The field at `at`, which is behind it then. */
    Status read_field(size_t& at, size_t end, Field& field)
    {
        uint64_t tag = 0;
        uint64_t size = 0;
        size_t const start = at;
        QWEN_AOT_TRY(read_number(at, end, tag));
        if (tag >> 32 != 0)
        {
            // Protobuf's readers take the low 32 bits for the tag, and would see a field where this one sees none.
            return damaged("a field's number and type of more than 32 bits, at byte", start);
        }
        field.number = tag >> 3;
        switch (tag & 7) // the wire type
        {
        case 0: return read_number(at, end, size);
        case 1: size = 8; break;
        case 5: size = 4; break;
        case 2:
            field.has_length = true;
            QWEN_AOT_TRY(read_number(at, end, size));
            break;
        default: return damaged("a field of a type that there isn't, at byte", at);
        }
        if (size > end - at)
        {
            return damaged("a field is longer than what holds it, at byte", at);
        }
        field.start = at;
        at += static_cast<size_t>(size);
        field.end = at;
        return Status::ok;
    }

    /** A number of 7 bits a byte, lowest first; `at` is behind it then. One beyond 64 bits becomes as large as it can be:
     *  no field has such a number or length. */
    Status read_number(size_t& at, size_t end, uint64_t& value)
    {
        value = 0;
        for (unsigned shift = 0; shift < 70; shift += 7)
        {
            if (at >= end)
            {
                return damaged("it ends within a number, at byte", at);
            }
            uint8_t const byte = content_[at++];
            uint64_t const bits = byte & 0x7F;
            value = shift == 63 && bits > 1 ? value | ~uint64_t{7} : value | bits << shift;
            if (byte < 0x80)
            {
                return Status::ok;
            }
        }
        return damaged("a number of more than 10 bytes, at byte", at);
    }

    Status damaged(char const* what, size_t at)
    {
        return error_.fail(Status::bundle,
            "%s isn't an ONNX model, or is damaged (%s %zu): copy it again, or write it anew", where_, what, at);
    }

    Span<uint8_t const> const content_;
    char const* const where_;
    Array<std::string_view>& locations_;
    Error& error_;
    Array<Open> open_;
};

} // namespace

Status find_data_files(Span<uint8_t const> content, char const* where, Array<std::string_view>& locations, Error& error)
{
    locations.clear();
    return Walker(content, where, locations, error).walk();
}

} // namespace qwen_aot
