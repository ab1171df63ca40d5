/** What TensorRT looks up in the library. */
#include "gqa.h"
#include "linear.h"
#include "moe.h"

#define QWEN_AOT_EXPORT extern "C" __attribute__((visibility("default")))

QWEN_AOT_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    qwen_aot::set_logger_finder(finder);
}

QWEN_AOT_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count)
{
    static qwen_aot::Creator<qwen_aot::GqaPlugin> gqa;
    static qwen_aot::Creator<qwen_aot::MoePlugin> moe;
    static qwen_aot::Creator<qwen_aot::LinearPlugin> linear;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&gqa, &moe, &linear};
    count = 3;
    return creators;
}
