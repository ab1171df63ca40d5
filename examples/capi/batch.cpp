/* Several prompts at once through the C++ wrapper: batch BUNDLE PROMPT ... */

#include <qwen_aot.hpp>

#include <cstdio>
#include <map>
#include <string>

int main(int argc, char** argv)
try
{
    qwen_aot::Model const model(argc > 1 ? argv[1] : "");
    qwen_aot::Generator generator(model);
    qwen_aot::Config config;
    config.max_new_tokens(32).temperature(0);

    std::map<uint64_t, std::string> prompts;
    for (int i = 2; i < argc; ++i)
    {
        prompts[generator.submit(qwen_aot::Request(argv[i]).config(config))] = argv[i];
    }
    while (!generator.is_idle())
    {
        for (qwen_aot::Event const& event : generator.step())
        {
            if (event.is_completion())
            {
                std::string const answer(event.full_text());
                std::printf("%s -> %s\n", prompts[event.request()].c_str(), answer.c_str());
            }
        }
    }
    return 0;
}
catch (qwen_aot::Failure const& failure)
{
    std::fprintf(stderr, "error: %s\n", failure.what());
    return 1;
}
