/** Fails with messages of any length, and says what of each is kept. */
#include "base/status.h"
#include "answers.h"

int main()
{
    return answers::serve([](qwen_aot::JsonValue request) -> std::string {
        qwen_aot::JsonValue text;
        request.find("text", text);
        qwen_aot::Error error;
        std::string const whole(text.string());
        (void)error.fail(qwen_aot::Status::io, "%s", whole.c_str());
        return answers::failed(error);
    });
}
