/** Attributes of a plugin: one table says their names and types, for getFieldNames, parsing and serialization. */
#pragma once

#include "log.h"

#include <NvInferRuntime.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <variant>

namespace qwen_aot
{

/** One attribute: a scalar member of the struct of all attributes, which is its storage. */
template <class Attributes>
struct Field
{
    char const* name;
    std::variant<int32_t Attributes::*, float Attributes::*> member;

    nvinfer1::PluginFieldType type() const
    {
        return member.index() == 0 ? nvinfer1::PluginFieldType::kINT32 : nvinfer1::PluginFieldType::kFLOAT32;
    }

    char const* type_name() const { return member.index() == 0 ? "int32" : "float32"; }

    void* data(Attributes& attributes) const
    {
        return std::visit([&](auto pointer) -> void* { return &(attributes.*pointer); }, member);
    }
};

template <class Attributes, size_t N>
using FieldTable = std::array<Field<Attributes>, N>;

/** A collection of the table's names and types, with the values of `attributes`, or none. */
template <size_t N>
class FieldList
{
public:
    template <class Attributes>
    FieldList(FieldTable<Attributes, N> const& table, Attributes* attributes)
    {
        for (size_t i = 0; i < N; ++i)
        {
            void const* const data = attributes == nullptr ? nullptr : table[i].data(*attributes);
            fields_[i] = nvinfer1::PluginField(table[i].name, data, table[i].type(), 1);
        }
    }
    FieldList(FieldList const&) = delete; // the collection points into it
    FieldList& operator=(FieldList const&) = delete;

    nvinfer1::PluginFieldCollection const* collection() const { return &collection_; }

private:
    std::array<nvinfer1::PluginField, N> fields_;
    nvinfer1::PluginFieldCollection collection_{static_cast<int32_t>(N), fields_.data()};
};

/** Attributes from fields. Throws Error, with the field's name, if one is missing, unknown, given twice, or of another
 *  type or length than the table's. */
template <class Attributes, size_t N>
Attributes parse_fields(FieldTable<Attributes, N> const& table, nvinfer1::PluginFieldCollection const* given)
{
    Attributes attributes{};
    std::array<bool, N> is_given{};
    int32_t const count = given == nullptr ? 0 : given->nbFields;
    for (int32_t i = 0; i < count; ++i)
    {
        nvinfer1::PluginField const& field = given->fields[i];
        std::string const name = field.name == nullptr ? "" : field.name;
        size_t place = 0;
        while (place < N && name != table[place].name)
        {
            ++place;
        }
        if (place == N)
        {
            std::string known;
            for (Field<Attributes> const& other : table)
            {
                known += text(known.empty() ? "" : ", ", other.name);
            }
            throw Error(text("unknown field ", name, "; there are: ", known));
        }
        if (is_given[place])
        {
            throw Error(text("field ", name, " is given twice"));
        }
        if (field.type != table[place].type() || field.length != 1 || field.data == nullptr)
        {
            throw Error(text("field ", name, " must be one ", table[place].type_name(), "; it is of type ",
                static_cast<int32_t>(field.type), " (PluginFieldType), length ", field.length));
        }
        std::memcpy(table[place].data(attributes), field.data, 4);
        is_given[place] = true;
    }
    for (size_t i = 0; i < N; ++i)
    {
        if (!is_given[i])
        {
            throw Error(text("field ", table[i].name, ", one ", table[i].type_name(), ", is missing"));
        }
    }
    return attributes;
}

/** "num_heads=4, scale=0.125". */
template <class Attributes, size_t N>
std::string field_words(FieldTable<Attributes, N> const& table, Attributes const& attributes)
{
    std::string result;
    for (Field<Attributes> const& field : table)
    {
        result += text(result.empty() ? "" : ", ", field.name, '=');
        result += std::visit([&](auto pointer) { return text(attributes.*pointer); }, field.member);
    }
    return result;
}

} // namespace qwen_aot
