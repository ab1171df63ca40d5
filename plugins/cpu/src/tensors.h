/** Inputs, outputs and attributes of a kernel, and the threads that it may use. */
#pragma once

#include "error.h"

#include <array>
#include <cstdint>
#include <string>

namespace qwen_aot::cpu
{

/** A tensor's memory and shape; the memory is ONNX Runtime's, for the call (a constant's: for the session). */
struct Tensor
{
    void* data = nullptr; // nullptr: an optional input that is absent
    int32_t type = 0;
    size_t rank = 0;
    std::array<int64_t, 6> sizes{};

    explicit operator bool() const { return data != nullptr; }
    template <class T>
    T* as() const
    {
        return static_cast<T*>(data);
    }
    int64_t count() const
    {
        int64_t found = 1;
        for (size_t i = 0; i < rank; ++i)
        {
            found *= sizes[i];
        }
        return found;
    }
};

inline Tensor tensor_of(ort::Value const* value)
{
    Tensor found;
    if (value == nullptr)
    {
        return found;
    }
    ort::ShapeInfo* info = nullptr;
    check(ort::api.shape_of(value, &info));
    ort::Failure* failure = ort::api.element_type(info, &found.type);
    failure = failure != nullptr ? failure : ort::api.dimension_count(info, &found.rank);
    bool const fits = found.rank <= found.sizes.size();
    if (failure == nullptr && fits)
    {
        failure = ort::api.dimensions(info, found.sizes.data(), found.rank);
    }
    ort::api.release_shape(info);
    check(failure);
    if (!fits)
    {
        throw Error("a tensor of " + std::to_string(found.rank) + " dimensions; accepted: up to 6");
    }
    check(ort::api.tensor_data(const_cast<ort::Value*>(value), &found.data));
    return found;
}

inline Tensor input(ort::Context const* context, size_t index)
{
    size_t count = 0;
    check(ort::api.input_count(context, &count));
    if (index >= count)
    {
        return {};
    }
    ort::Value const* value = nullptr;
    check(ort::api.input(context, index, &value));
    return tensor_of(value);
}

inline void* output(ort::Context* context, size_t index, int64_t const* sizes, size_t rank)
{
    ort::Value* value = nullptr;
    check(ort::api.output(context, index, sizes, rank, &value));
    void* data = nullptr;
    check(ort::api.tensor_data(value, &data));
    return data;
}

/** An initializer's own memory, which is not copied; an absent one is empty.
 *  Throws Error: the input is computed, and not a constant. */
inline Tensor constant(ort::Info const* info, size_t index, bool is_optional = false)
{
    int is_constant = 0;
    ort::Value const* value = nullptr;
    ort::Failure* const failure = ort::api.constant_input(info, index, &is_constant, &value);
    if (failure != nullptr && is_optional)
    {
        ort::api.release_status(failure);
        return {};
    }
    check(failure);
    if (is_constant == 0 || value == nullptr)
    {
        if (is_optional)
        {
            return {};
        }
        throw Error("input " + std::to_string(index) + " is computed; accepted: a constant");
    }
    return tensor_of(value);
}

inline int64_t int_attribute(ort::Info const* info, char const* name)
{
    int64_t value = 0;
    check(ort::api.int_attribute(info, name, &value));
    return value;
}

inline float float_attribute(ort::Info const* info, char const* name)
{
    float value = 0;
    check(ort::api.float_attribute(info, name, &value));
    return value;
}

/** ONNX Runtime's own threads, for the time of one call. */
class Pool
{
public:
    explicit Pool(ort::Context const* context)
        : context_(context)
    {
    }

    /** Calls body(0) to body(count - 1), each once, on any threads; returns when all are done. Bodies must not throw. */
    template <class Body>
    void each(size_t count, Body const& body) const
    {
        if (count <= 1 || context_ == nullptr)
        {
            for (size_t i = 0; i < count; ++i)
            {
                body(i);
            }
            return;
        }
        auto const run = [](void* user, size_t index) { (*static_cast<Body const*>(user))(index); };
        check(ort::api.parallel_for(context_, run, count, 0, const_cast<Body*>(&body)));
    }

private:
    ort::Context const* context_; // nullptr: this thread alone
};

} // namespace qwen_aot::cpu
