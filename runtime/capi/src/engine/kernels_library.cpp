#include "engine/kernels_library.h"

#include "system/system.h"

#include <cinttypes>

namespace qwen_aot
{

namespace
{

constexpr char kPathVariable[] = "QWEN_AOT_CPU_KERNELS";
constexpr char kInstructionsVariable[] = "QWEN_AOT_CPU_INSTRUCTIONS"; // the library reads it
constexpr char kFileName[] = "libqwen_aot_cpu.so";

/** Whether ONNX Runtime's kernels are faster than own ones by these instructions, or nobody knows which are: as
 *  runtime/backends/cpu/kernels.py has it. */
bool are_slow(std::string_view instructions)
{
    return instructions == "portable" || instructions == "neon";
}

/** Where the library of own kernels is. */
struct Place
{
    Text path;     // "": there is none
    bool is_named; // by the option or the environment
};

/** ENGINE_MISMATCH: the path that is named is no file's. */
Status find_library(EngineOptions const& options, Place& place, Error& error)
{
    char const* const named =
        options.cpu_kernels_path.empty() ? system::environment(kPathVariable) : options.cpu_kernels_path.c_str();
    place.is_named = *named != '\0';
    if (place.is_named)
    {
        // The file that was looked at: of a name without '/' the loader would search the system's folders.
        bool const has_folder = std::string_view(named).find('/') != std::string_view::npos;
        QWEN_AOT_NEED(place.path.assign(has_folder ? "" : "./") && place.path.append(named), error, "a path");
        if (!system::file_facts(named).is_regular)
        {
            return error.fail(Status::engine_mismatch,
                "there is no library of own CPU kernels at %s; accepted: the full path of a %s", Quoted(named).c_str(),
                kFileName);
        }
        return Status::ok;
    }
    QWEN_AOT_TRY(system::own_folder(place.path, error));
    if (place.path.empty())
    {
        return Status::ok;
    }
    QWEN_AOT_NEED(place.path.append("/") && place.path.append(kFileName), error, "a path");
    if (!system::file_facts(place.path.c_str()).is_regular)
    {
        place.path.clear();
    }
    return Status::ok;
}

/** An open library of own kernels. */
class KernelsLibrary
{
public:
    /** ENGINE_MISMATCH: it can't be loaded, isn't such a library, or has ops of another version. */
    static Status open(Text const& path, int64_t version, KernelsLibrary& library, Error& error)
    {
        QWEN_AOT_TRY(system::Library::open(path.c_str(), library.library_, error));
        library.find(library.version_, "qwen_aot_cpu_version");
        library.find(library.instructions_, "qwen_aot_cpu_instructions");
        library.find(library.register_ops_, "RegisterCustomOps");
        if (library.version_ == nullptr || library.instructions_ == nullptr || library.register_ops_ == nullptr)
        {
            return error.fail(Status::engine_mismatch,
                "%s isn't the library of own CPU kernels, or is an older one; accepted: a %s of this version",
                Quoted(path.view()).c_str(), kFileName);
        }
        int32_t const found = library.version_();
        if (found != version)
        {
            return error.fail(Status::engine_mismatch,
                "the library of own CPU kernels %s has version %" PRId32
                " of the ops, the bundle's graph wants %" PRId64
                ": install the library of the qwen-aot that built the bundle, or build the bundle anew",
                Quoted(path.view()).c_str(), found, version);
        }
        return Status::ok;
    }

    /** ENGINE_MISMATCH: the environment asks for instructions that this CPU lacks.
     *  text [size]: their name. */
    Status instructions(char* text, size_t size, Error& error) const
    {
        return instructions_(text, size) == 0
            ? Status::ok
            : error.fail(Status::engine_mismatch, "own CPU kernels can't run: %.400s", text);
    }

    /** ENGINE_MISMATCH: ONNX Runtime or the library refuses. */
    Status add_ops(ort::Api const& api, ort::SessionOptions* session_options, Error& error)
    {
        QWEN_AOT_TRY(api.check(register_ops_(session_options, api.base()), Status::engine_mismatch,
            "own CPU kernels can't be used", "ONNX Runtime's can", error));
        library_.keep();
        return Status::ok;
    }

private:
    template <class Function>
    void find(Function& function, char const* name)
    {
        function = reinterpret_cast<Function>(library_.find(name));
    }

    system::Library library_;
    int32_t (*version_)() = nullptr;
    int32_t (*instructions_)(char* text, size_t size) = nullptr;
    // What ONNX Runtime's own RegisterCustomOpsLibrary looks up and calls; here it is called in the library that was checked.
    ort::Failure* (*register_ops_)(ort::SessionOptions*, ort::ApiBase const*) = nullptr;
};

} // namespace

Status choose_kernels(Bundle& bundle, EngineOptions const& options, ort::Api const& api,
    ort::SessionOptions* session_options, bool& is_own, Error& error)
{
    TextEngine const& engine = bundle.manifest().text_engine;
    is_own = false;
    if (!engine.has_kernels || options.kernels == Kernels::onnxruntime)
    {
        return Status::ok;
    }
    Place place;
    KernelsLibrary library;
    QWEN_AOT_TRY(find_library(options, place, error));
    Error refused;
    Status status = Status::ok;
    if (place.path.empty())
    {
        status = refused.fail(Status::engine_mismatch,
            "this machine has no library of own CPU kernels: `qwen-aot capi` installs %s beside libqwen_aot.so; or "
            "name "
            "one in the option or in %s",
            kFileName, kPathVariable);
    }
    else
    {
        status = KernelsLibrary::open(place.path, engine.kernels.version, library, refused);
    }
    char instructions[200] = "";
    if (status == Status::ok)
    {
        QWEN_AOT_TRY(library.instructions(instructions, sizeof instructions, error));
        if (options.kernels == Kernels::automatic && are_slow(instructions)
            && *system::environment(kInstructionsVariable) == '\0')
        {
            options.log.write(QWEN_AOT_LOG_INFO,
                "ONNX Runtime's kernels are used: own ones would use %s here, which isn't known to be faster",
                instructions);
            return Status::ok;
        }
        status = library.add_ops(api, session_options, refused);
    }
    if (status == Status::ok)
    {
        is_own = true;
        bundle.use_kernels();
        options.log.write(QWEN_AOT_LOG_INFO, "own kernels of %.400s are used (%s)", place.path.c_str(), instructions);
        return Status::ok;
    }
    if (options.kernels == Kernels::own || place.is_named || status == Status::out_of_memory)
    {
        error = refused;
        return status;
    }
    options.log.write(QWEN_AOT_LOG_INFO, "ONNX Runtime's kernels are used: %.*s",
        static_cast<int>(refused.message().size()), refused.message().data());
    return Status::ok;
}

} // namespace qwen_aot
