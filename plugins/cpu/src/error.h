/** What a kernel throws, and how it becomes ONNX Runtime's status at the library's border. */
#pragma once

#include "onnxruntime.h"

#include <cstdio>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

namespace qwen_aot::cpu
{

/** The message says what was found and what is accepted. */
class Error : public std::runtime_error
{
public:
    using std::runtime_error::runtime_error;
};

/** A failure of ONNX Runtime itself, to be handed back as it is. */
struct Failed
{
    ort::Failure* failure;
};

inline void check(ort::Failure* failure)
{
    if (failure != nullptr)
    {
        throw Failed{failure};
    }
}

/** Runs a body whose exceptions become a status: none may cross into ONNX Runtime. */
template <class Body>
ort::Failure* guarded(Body const& body) noexcept
{
    try
    {
        body();
        return nullptr;
    }
    catch (Failed const& failed)
    {
        return failed.failure;
    }
    catch (Error const& error)
    {
        return ort::api.create_status(ort::kInvalidArgument, error.what());
    }
    catch (std::bad_alloc const&)
    {
        return ort::api.create_status(ort::kFail, "no memory for a kernel's workspace");
    }
    catch (std::exception const& error)
    {
        return ort::api.create_status(ort::kFail, error.what());
    }
}

} // namespace qwen_aot::cpu
