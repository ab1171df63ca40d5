/** Errors inside the library, and how they leave it: through TensorRT's logger and a method's error value. */
#pragma once

#include <NvInferRuntime.h>

#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>

namespace qwen_aot
{

/** Why a plugin's method fails; `guarded` turns it into a message and the method's error value. */
class Error : public std::runtime_error
{
public:
    using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string text(Parts const&... parts)
{
    std::ostringstream stream;
    (stream << ... << parts);
    return stream.str();
}

/** TensorRT gives it after loading the library. The finder must outlive the library. */
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

/** Logs "qwen_aot WHERE: MESSAGE" to TensorRT's logger. Without one, errors go to stderr and the rest nowhere. */
void log(nvinfer1::ILogger::Severity severity, char const* where, char const* message) noexcept;

/** body(), or, if it throws, `failed` and a logged error. */
template <class Result, class Body>
Result guarded(char const* where, Result failed, Body&& body) noexcept
{
    try
    {
        return body();
    }
    catch (std::exception const& error)
    {
        log(nvinfer1::ILogger::Severity::kERROR, where, error.what());
    }
    catch (...)
    {
        log(nvinfer1::ILogger::Severity::kERROR, where, "unknown exception");
    }
    return failed;
}

} // namespace qwen_aot
