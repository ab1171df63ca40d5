#include "bundle/schema.h"

#include <cinttypes>
#include <cstdio>

namespace qwen_aot
{

namespace
{

constexpr size_t kMaxDepth = 12;

/** A document's text for a message, cut. */
class Shown
{
public:
    explicit Shown(JsonValue value)
        : quoted_(value.source())
    {
    }
    char const* text() const { return quoted_.c_str() + 1; } // without the quotes, which a number has none of
    int size() const { return static_cast<int>(std::strlen(quoted_.c_str())) - 2; }

private:
    Quoted quoted_;
};

char const* words_for(Shape shape)
{
    switch (shape)
    {
    case Shape::text: return "a string";
    case Shape::boolean: return "true or false";
    case Shape::integer: return "an integer";
    case Shape::integer_or_text: return "an integer or a string";
    case Shape::scalar: return "an integer, a string, true or false";
    case Shape::list: return "an array";
    case Shape::map:
    case Shape::record: return "an object";
    }
    return "";
}

bool fits_shape(JsonType type, Shape shape)
{
    bool const is_text = type == JsonType::string;
    bool const is_integer = type == JsonType::integer;
    switch (shape)
    {
    case Shape::text: return is_text;
    case Shape::boolean: return type == JsonType::boolean;
    case Shape::integer: return is_integer;
    case Shape::integer_or_text: return is_integer || is_text;
    case Shape::scalar: return is_integer || is_text || type == JsonType::boolean;
    case Shape::list: return type == JsonType::array;
    case Shape::map:
    case Shape::record: return type == JsonType::object;
    }
    return false;
}

class Checker
{
public:
    Checker(char const* where, Error& error)
        : where_(where)
        , error_(error)
    {
    }

    Status check(JsonValue document, SchemaType const& type)
    {
        QWEN_AOT_TRY(enter(document, type));
        while (depth_ > 0)
        {
            Level& level = levels_[depth_ - 1];
            if (level.next == level.value.size())
            {
                --depth_;
                continue;
            }
            size_t const index = level.next++;
            JsonValue const value = level.value.at(index);
            if (level.type->shape != Shape::record)
            {
                QWEN_AOT_TRY(enter(value, *level.type->inner));
                continue;
            }
            // The keys are known to be the fields'.
            std::string_view const key = level.value.key(index);
            SchemaField const* field = level.type->fields;
            while (key != field->name)
            {
                ++field;
            }
            QWEN_AOT_TRY(enter(value, *field->type));
        }
        return Status::ok;
    }

private:
    struct Level
    {
        JsonValue value;
        SchemaType const* type;
        size_t next; // the element or member that comes next
    };

    /** Checks a value; one that holds others is on the stack then. */
    Status enter(JsonValue value, SchemaType const& type)
    {
        if (value.is_null() && type.is_nullable)
        {
            return Status::ok;
        }
        if (!fits_shape(value.type(), type.shape))
        {
            return error_.fail(Status::bundle, "%s is %.*s; accepted: %s%s", path(), Shown(value).size(),
                Shown(value).text(), words_for(type.shape), type.is_nullable ? " or null" : "");
        }
        if (value.type() == JsonType::integer && (value.integer() < type.least || value.integer() > type.most))
        {
            return error_.fail(Status::bundle, "%s is %" PRId64 "; accepted: %" PRId64 " to %" PRId64 "%s%s", path(),
                value.integer(), type.least, type.most, type.accepted == nullptr ? "" : " or ",
                type.accepted == nullptr ? "" : type.accepted);
        }
        if (value.type() == JsonType::string && type.accepts != nullptr && !type.accepts(value.string()))
        {
            return error_.fail(
                Status::bundle, "%s is %s; accepted: %s", path(), Quoted(value.string()).c_str(), type.accepted);
        }
        if (type.shape == Shape::map && type.accepts != nullptr)
        {
            for (size_t i = 0; i < value.size(); ++i)
            {
                if (!type.accepts(value.key(i)))
                {
                    return error_.fail(Status::bundle, "%s has the key %s; accepted: %s", path(),
                        Quoted(value.key(i)).c_str(), type.accepted);
                }
            }
        }
        if (type.shape == Shape::record)
        {
            QWEN_AOT_TRY(check_keys(value, type));
        }
        if (type.shape == Shape::list || type.shape == Shape::map || type.shape == Shape::record)
        {
            levels_[depth_++] = {value, &type, 0};
        }
        return Status::ok;
    }

    /** The keys are exactly the fields', less optional ones that aren't there. */
    Status check_keys(JsonValue value, SchemaType const& type)
    {
        JsonValue found;
        for (size_t i = 0; i < value.size(); ++i)
        {
            bool is_known = false;
            for (size_t j = 0; j < type.num_fields; ++j)
            {
                is_known = is_known || value.key(i) == type.fields[j].name;
            }
            if (!is_known)
            {
                return keys_differ("an unknown key", value.key(i), type);
            }
        }
        for (size_t j = 0; j < type.num_fields; ++j)
        {
            if (!type.fields[j].is_optional && !value.find(type.fields[j].name, found))
            {
                return keys_differ("no key", type.fields[j].name, type);
            }
        }
        return Status::ok;
    }

    Status keys_differ(char const* problem, std::string_view key, SchemaType const& type)
    {
        char names[512];
        size_t length = 0;
        for (size_t j = 0; j < type.num_fields && length < sizeof names; ++j)
        {
            length += static_cast<size_t>(std::snprintf(names + length, sizeof names - length, "%s%s%s",
                j == 0 ? "" : ", ", type.fields[j].name, type.fields[j].is_optional ? " (or not)" : ""));
        }
        return error_.fail(
            Status::bundle, "%s has %s %s; accepted: exactly %s", path(), problem, Quoted(key).c_str(), names);
    }

    /** Where the check is: "manifest.json: engines: text: inputs[3]". */
    char const* path()
    {
        size_t length = 0;
        auto const add = [&](char const* format, auto... values) {
            int const wanted = std::snprintf(path_ + length, sizeof path_ - length, format, values...);
            size_t const left = sizeof path_ - 1 - length;
            length += wanted < 0 ? 0 : static_cast<size_t>(wanted) < left ? static_cast<size_t>(wanted) : left;
        };
        add("%s", where_);
        for (size_t i = 0; i < depth_ && levels_[i].next > 0; ++i)
        {
            Level const& level = levels_[i];
            if (level.type->shape == Shape::list)
            {
                add("[%zu]", level.next - 1);
                continue;
            }
            std::string_view const key = level.value.key(level.next - 1);
            if (level.type->shape == Shape::map)
            {
                add("[%s]", Quoted(key).c_str());
            }
            else
            {
                add(": %.*s", static_cast<int>(key.size()), key.data());
            }
        }
        return path_;
    }

    char const* const where_;
    Error& error_;
    Level levels_[kMaxDepth] = {};
    size_t depth_ = 0;
    char path_[1024];
};

} // namespace

Status check_schema(JsonValue document, SchemaType const& type, char const* where, Error& error)
{
    return Checker(where, error).check(document, type);
}

JsonValue member(JsonValue object, std::string_view key)
{
    JsonValue value;
    object.find(key, value);
    return value;
}

} // namespace qwen_aot
