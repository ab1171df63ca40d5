/** Finds the data files that ONNX files, given as hex, name; they come as hex too, for they may be no UTF-8. */
#include "bundle/onnx_file.h"
#include "answers.h"
#include "hex.h"

int main()
{
    return answers::serve([](qwen_aot::JsonValue request) -> std::string {
        qwen_aot::JsonValue value;
        request.find("hex", value);
        std::string const content = answers::bytes_of_hex(value.string());
        qwen_aot::Array<std::string_view> locations;
        qwen_aot::Error error;
        auto const status = qwen_aot::find_data_files(
            {reinterpret_cast<uint8_t const*>(content.data()), content.size()}, "m.onnx", locations, error);
        if (status != qwen_aot::Status::ok)
        {
            return answers::failed(error);
        }
        std::string result;
        for (std::string_view const location : locations)
        {
            result += (result.empty() ? "" : ", ") + answers::quoted(answers::hex_of_bytes(location));
        }
        return "[" + result + "]";
    });
}
