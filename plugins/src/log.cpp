#include "log.h"

#include <atomic>
#include <cstdio>

namespace qwen_aot
{
namespace
{

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

} // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept
{
    logger_finder = finder;
}

void log(nvinfer1::ILogger::Severity severity, char const* where, char const* message) noexcept
{
    try
    {
        std::string const line = text("qwen_aot ", where, ": ", message);
        nvinfer1::ILoggerFinder* const finder = logger_finder;
        nvinfer1::ILogger* const logger = finder == nullptr ? nullptr : finder->findLogger();
        if (logger != nullptr)
        {
            logger->log(severity, line.c_str());
        }
        else if (severity <= nvinfer1::ILogger::Severity::kERROR)
        {
            std::fprintf(stderr, "%s\n", line.c_str());
        }
    }
    catch (...) // no memory for the line
    {
        std::fprintf(stderr, "qwen_aot %s: %s\n", where, message);
    }
}

} // namespace qwen_aot
