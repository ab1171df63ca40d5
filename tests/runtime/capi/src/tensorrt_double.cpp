/** A test double of TensorRT's library (libnvinfer.so.10): an engine is a text that test_tensorrt.py writes, and what it
 *  computes is the checksum model of tests/runtime/toys.py, on memory of the double of CUDA's driver (CUDA_DOUBLE).
 *
 *  It is stricter than TensorRT: misuse ends the program, and so do objects that are left when the library is asked
 *  (double_tensorrt_objects). tensorrt_stubs.h, which the tests make of TensorRT's own headers, has a class for each interface
 *  whose functions all end the program. */
#include "cuda_double.h"

#include "tensorrt_stubs.h"

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace
{

std::atomic<int> objects{0};

/** Counts an object of the library. */
struct Counted
{
    Counted() { ++objects; }
    Counted(Counted const&) = delete;
    ~Counted() { --objects; }
};

struct Driver
{
    decltype(&double_enqueue) enqueue;
    decltype(&double_is_device) is_device;
    decltype(&double_is_capturing) is_capturing;
};

Driver const& driver()
{
    static Driver const instance = [] {
        void* const library = dlopen(std::getenv("CUDA_DOUBLE"), RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr)
        {
            unexpected("CUDA_DOUBLE names no library");
        }
        return Driver{reinterpret_cast<decltype(&double_enqueue)>(dlsym(library, "double_enqueue")),
            reinterpret_cast<decltype(&double_is_device)>(dlsym(library, "double_is_device")),
            reinterpret_cast<decltype(&double_is_capturing)>(dlsym(library, "double_is_capturing"))};
    }();
    return instance;
}

void require(bool holds, char const* what)
{
    if (!holds)
    {
        unexpected(what);
    }
}

/** Whether a call of this name is to fail: it stands in the environment's TENSORRT_DOUBLE_FAILS, with the number of the call
 *  (from 1) behind a colon. */
bool fails(char const* call)
{
    static std::map<std::string, int> counts;
    char const* const wanted = std::getenv("TENSORRT_DOUBLE_FAILS");
    if (wanted == nullptr)
    {
        return false;
    }
    std::string const found = std::string(call) + ":" + std::to_string(++counts[call]);
    return found == wanted;
}

struct Tensor
{
    bool is_input;
    DataType type;
    std::vector<int64_t> shape;
    TensorLocation location = TensorLocation::kDEVICE;
    std::map<int, std::pair<std::vector<int64_t>, std::vector<int64_t>>> profiles; // smallest, largest
};

struct Plan
{
    std::vector<std::string> names;
    std::map<std::string, Tensor> tensors;
    int64_t activation_bytes = 0;
    int profiles = 0;
    int64_t vocab_size = 0;
    int64_t poison = -1; // an id whose logits are NaN, and what it writes
    bool has_host_code = false;
    bool needs_plugins = false;
};

size_t type_bytes(DataType type)
{
    return type == DataType::kINT64 ? 8 : type == DataType::kFLOAT || type == DataType::kINT32 ? 4 : 2;
}

std::vector<int64_t> numbers(std::istream& line)
{
    std::vector<int64_t> result;
    for (int64_t number = 0; line >> number;)
    {
        result.push_back(number);
    }
    return result;
}

bool parse(std::string const& text, Plan& plan)
{
    std::istringstream lines(text);
    std::string line;
    if (!std::getline(lines, line) || line != "plan of a double")
    {
        return false;
    }
    std::map<std::string, DataType> const types = {{"int64", DataType::kINT64}, {"float32", DataType::kFLOAT},
        {"float16", DataType::kHALF}, {"int32", DataType::kINT32}};
    while (std::getline(lines, line))
    {
        std::istringstream words(line);
        std::string kind, name, mode, type;
        words >> kind;
        if (kind == "tensor")
        {
            words >> name >> mode >> type;
            Tensor tensor{mode == "input", types.at(type), numbers(words), TensorLocation::kDEVICE, {}};
            plan.names.push_back(name);
            plan.tensors[name] = tensor;
        }
        else if (kind == "profile")
        {
            int index = 0;
            words >> index >> name;
            std::vector<int64_t> const sizes = numbers(words);
            std::vector<int64_t> const smallest(sizes.begin(), sizes.begin() + static_cast<long>(sizes.size() / 2));
            std::vector<int64_t> const largest(sizes.begin() + static_cast<long>(sizes.size() / 2), sizes.end());
            plan.tensors[name].profiles[index] = {smallest, largest};
            plan.profiles = std::max(plan.profiles, index + 1);
        }
        else if (kind == "host")
        {
            words >> name;
            plan.tensors[name].location = TensorLocation::kHOST;
        }
        else
        {
            int64_t value = 0;
            words >> value;
            plan.activation_bytes = kind == "activations" ? value : plan.activation_bytes;
            plan.vocab_size = kind == "vocab" ? value : plan.vocab_size;
            plan.poison = kind == "poison" ? value : plan.poison;
            plan.has_host_code = plan.has_host_code || kind == "host_code";
            plan.needs_plugins = plan.needs_plugins || kind == "plugins";
        }
    }
    return true;
}

Dims dims_of(std::vector<int64_t> const& shape)
{
    Dims dims{};
    dims.nbDims = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), dims.d);
    return dims;
}

/** What a step reads and writes. */
struct StepWork
{
    Plan const* plan;
    std::map<std::string, void*> addresses;
    std::map<std::string, std::vector<int64_t>> shapes;
    std::vector<std::vector<int64_t>> caches; // shapes of the arrays
    std::vector<float*> cache_places;

    int64_t const* integers(char const* name) const { return static_cast<int64_t const*>(addresses.at(name)); }

    void run() const
    {
        std::vector<int64_t> const& fed = shapes.at("input_ids");
        int64_t const rows = fed[0];
        int64_t const tokens = fed[1];
        int64_t const heads = caches[0][1];
        int64_t const capacity = caches[0][2];
        int64_t const head_size = caches[0][3];
        int64_t const window = shapes.count("key_positions") != 0 ? shapes.at("key_positions")[0] : capacity;
        auto* const logits = static_cast<float*>(addresses.at("logits"));
        int64_t told = 1;
        if (addresses.count("logits_positions") != 0)
        {
            told = shapes.at("logits_positions")[0];
            for (int64_t i = 0; i < told; ++i)
            {
                require(integers("logits_positions")[i] == i, "logits_positions that aren't 0, 1, 2, ...");
            }
            require(told == 1, "more logits than this library reads");
        }
        for (int64_t row = 0; row < rows; ++row)
        {
            int64_t const length = integers("cache_length")[row];
            int64_t const valid = integers("new_tokens")[row];
            require(length >= 0 && valid >= 0 && valid <= tokens && length + valid >= 1 && length + tokens <= capacity,
                "a row that is empty, or passes the capacity");
            require(length + tokens <= window, "a row that passes the window");
            int64_t rotary_offset = 0;
            for (auto const& [name, address] : addresses)
            {
                if (name.compare(0, 14, "rotary_offset.") == 0)
                {
                    rotary_offset = static_cast<int64_t const*>(address)[row];
                }
            }
            for (int64_t i = 0; i < tokens; ++i)
            {
                int64_t const id = integers("input_ids")[row * tokens + i];
                int64_t const position =
                    addresses.count("position_ids") != 0 ? integers("position_ids")[row * tokens + i] : length + i;
                require(position == length + i, "positions that aren't those of the tokens");
                for (int64_t head = 0; head < heads; ++head)
                {
                    for (int64_t k = 0; k < head_size; ++k)
                    {
                        int64_t const place = ((row * heads + head) * capacity + length + i) * head_size + k;
                        cache_places[0][place] = id == plan->poison ? NAN : static_cast<float>(id);
                        cache_places[1][place] = static_cast<float>(position + 1 + rotary_offset);
                    }
                }
            }
            double sum = 0;
            for (int64_t i = 0; i < window; ++i)
            {
                int64_t const position = addresses.count("key_positions") != 0 ? integers("key_positions")[i] : i;
                require(position == i, "key_positions that aren't 0, 1, 2, ...");
                int64_t const place = ((row * heads + heads - 1) * capacity + i) * head_size;
                double const weight = i < length + valid ? 1 : 0; // 0 x NaN is NaN, as in graphs that mask so
                sum +=
                    weight * static_cast<double>(cache_places[0][place]) * static_cast<double>(cache_places[1][place]);
            }
            double const peak = std::fmod(sum, static_cast<double>(plan->vocab_size));
            for (int64_t i = 0; i < plan->vocab_size; ++i)
            {
                logits[row * plan->vocab_size + i] = static_cast<float>(-std::fabs(static_cast<double>(i) - peak));
            }
        }
        if (addresses.count("last_logits") != 0)
        {
            std::memcpy(addresses.at("last_logits"), logits,
                static_cast<size_t>(rows * told * plan->vocab_size) * sizeof(float));
        }
    }
};

class EngineDouble;

class ContextWork final : public VExecutionContextStub
{
public:
    ContextWork(Plan const& plan, ILogger& logger)
        : plan_(plan)
        , logger_(logger)
    {
    }

    void setDeviceMemoryV2(void* memory, int64_t size) noexcept override
    {
        require(size == plan_.activation_bytes
                && driver().is_device(reinterpret_cast<uintptr_t>(memory), static_cast<size_t>(size)) != 0,
            "scratch memory of another size, or not on the device");
        has_memory_ = true;
    }

    bool setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) noexcept override
    {
        require(stream != nullptr && profile >= 0 && profile < plan_.profiles, "no such profile");
        profile_ = profile;
        return !said("setOptimizationProfileAsync");
    }

    bool setTensorAddress(char const* name, void* data) noexcept override
    {
        require(plan_.tensors.count(name) != 0, "the address of a tensor that there is not");
        require(reinterpret_cast<uintptr_t>(data) % 256 == 0, "an address that isn't a multiple of 256");
        require(!is_captured_, "an address was set after a capture, which makes the graph invalid");
        addresses_[name] = data;
        return !said("setTensorAddress");
    }

    bool setInputShape(char const* name, Dims const& dims) noexcept override
    {
        require(plan_.tensors.count(name) != 0 && plan_.tensors.at(name).is_input, "the shape of no input");
        require(!is_captured_, "a shape was set after a capture, which makes the graph invalid");
        auto const& [smallest, largest] = plan_.tensors.at(name).profiles.at(profile_);
        if (dims.nbDims != static_cast<int32_t>(smallest.size()))
        {
            return false;
        }
        for (size_t i = 0; i < smallest.size(); ++i)
        {
            if (dims.d[i] < smallest[i] || dims.d[i] > largest[i])
            {
                logger_.log(ILogger::Severity::kERROR, "a size is outside of the profile");
                return false;
            }
        }
        shapes_[name] = {dims.d, dims.d + dims.nbDims};
        return !said("setInputShape");
    }

    bool enqueueV3(cudaStream_t stream) noexcept override
    {
        if (said("enqueueV3"))
        {
            return false;
        }
        require(profile_ >= 0 && has_memory_, "a context without a profile or memory");
        bool const is_capturing = driver().is_capturing(stream) != 0;
        require(!is_capturing || has_run_, "a capture before a run");
        auto work = std::make_unique<StepWork>();
        work->plan = &plan_;
        work->addresses = addresses_;
        work->shapes = shapes_;
        for (std::string const& name : plan_.names)
        {
            Tensor const& tensor = plan_.tensors.at(name);
            require(addresses_.count(name) != 0, "a tensor without an address");
            require(!tensor.is_input || shapes_.count(name) != 0, "an input without a shape");
            size_t bytes = type_bytes(tensor.type);
            std::vector<int64_t> shape = tensor.is_input ? shapes_.at(name) : tensor.shape;
            if (!tensor.is_input)
            {
                shape[0] = shapes_.at("input_ids")[0];
                shape[1] = shape[1] < 0 ? shapes_.at("logits_positions")[0] : shape[1];
            }
            for (int64_t const size : shape)
            {
                bytes *= static_cast<size_t>(size);
            }
            require(driver().is_device(reinterpret_cast<uintptr_t>(addresses_.at(name)), bytes) != 0,
                "a tensor that passes its memory");
            bool const has_rows = name != "key_positions" && name != "logits_positions";
            require(shape[0] == shapes_.at("input_ids")[0] || !has_rows, "inputs of unequal rows");
            if (name.compare(0, 15, "past_key_values") == 0)
            {
                require(addresses_.at("present" + name.substr(15)) == addresses_.at(name),
                    "past and present in two places");
                work->caches.push_back(shape);
                work->cache_places.push_back(static_cast<float*>(addresses_.at(name)));
            }
        }
        driver().enqueue(
            stream, [](void* step) { static_cast<StepWork*>(step)->run(); }, work.release(),
            [](void* step) { delete static_cast<StepWork*>(step); });
        has_run_ = true;
        is_captured_ = is_capturing;
        return true;
    }

private:
    bool said(char const* call)
    {
        if (!fails(call))
        {
            return false;
        }
        logger_.log(ILogger::Severity::kERROR, (std::string(call) + " was made to fail").c_str());
        return true;
    }

    Plan const& plan_;
    ILogger& logger_;
    std::map<std::string, void*> addresses_;
    std::map<std::string, std::vector<int64_t>> shapes_;
    int profile_ = -1;
    bool has_memory_ = false;
    bool has_run_ = false;
    bool is_captured_ = false;
};

class ContextDouble final : public IExecutionContext
{
public:
    ContextDouble(Plan const& plan, ILogger& logger, std::atomic<int>& siblings)
        : work_(plan, logger)
        , siblings_(siblings)
    {
        mImpl = &work_;
        ++siblings_;
    }
    ~ContextDouble() override { --siblings_; }

private:
    Counted counted_;
    ContextWork work_;
    std::atomic<int>& siblings_;
};

class EngineWork final : public VCudaEngineStub
{
public:
    EngineWork(Plan plan, ILogger& logger)
        : plan_(std::move(plan))
        , logger_(logger)
    {
    }
    ~EngineWork() override { require(contexts_ == 0, "an engine ended before its contexts"); }

    int32_t getNbIOTensors() const noexcept override { return static_cast<int32_t>(plan_.names.size()); }
    char const* getIOTensorName(int32_t index) const noexcept override
    {
        return plan_.names.at(static_cast<size_t>(index)).c_str();
    }
    Dims getTensorShape(char const* name) const noexcept override { return dims_of(tensor(name).shape); }
    DataType getTensorDataType(char const* name) const noexcept override { return tensor(name).type; }
    TensorLocation getTensorLocation(char const* name) const noexcept override { return tensor(name).location; }
    TensorIOMode getTensorIOMode(char const* name) const noexcept override
    {
        return tensor(name).is_input ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
    }
    int32_t getNbOptimizationProfiles() const noexcept override { return plan_.profiles; }
    Dims getProfileShape(char const* name, int32_t profile, OptProfileSelector select) const noexcept override
    {
        auto const& [smallest, largest] = tensor(name).profiles.at(profile);
        return dims_of(select == OptProfileSelector::kMIN ? smallest : largest);
    }
    int64_t getDeviceMemorySizeV2() const noexcept override { return plan_.activation_bytes; }
    IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept override
    {
        require(strategy == ExecutionContextAllocationStrategy::kUSER_MANAGED, "a context with memory of its own");
        if (fails("createExecutionContext"))
        {
            logger_.log(ILogger::Severity::kERROR, "createExecutionContext was made to fail");
            return nullptr;
        }
        return new ContextDouble(plan_, logger_, contexts_);
    }

private:
    Tensor const& tensor(char const* name) const
    {
        require(plan_.tensors.count(name) != 0, "a tensor that there is not");
        return plan_.tensors.at(name);
    }

    Plan plan_;
    ILogger& logger_;
    std::atomic<int> contexts_{0};
};

class EngineDouble final : public ICudaEngine
{
public:
    EngineDouble(Plan plan, ILogger& logger, std::atomic<int>& siblings)
        : work_(std::move(plan), logger)
        , siblings_(siblings)
    {
        mImpl = &work_;
        ++siblings_;
    }
    ~EngineDouble() override { --siblings_; }

private:
    Counted counted_;
    EngineWork work_;
    std::atomic<int>& siblings_;
};

class RegistryDouble final : public IPluginRegistryStub
{
public:
    ~RegistryDouble() noexcept override = default;
    void* loadLibrary(char const* path) noexcept override
    {
        FILE* const file = std::fopen(path, "rb");
        if (file == nullptr || fails("loadLibrary"))
        {
            return nullptr;
        }
        std::fclose(file);
        loaded = path;
        return this;
    }

    std::string loaded;
};

class RuntimeWork final : public VRuntimeStub
{
public:
    explicit RuntimeWork(ILogger& logger)
        : logger_(logger)
    {
    }
    ~RuntimeWork() override { require(engines_ == 0, "a runtime ended before its engines"); }

    void setEngineHostCodeAllowed(bool allowed) noexcept override { is_host_code_allowed_ = allowed; }
    IPluginRegistry& getPluginRegistry() noexcept override { return registry_; }
    ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override
    {
        Plan plan;
        char const* refused = nullptr;
        if (!parse({static_cast<char const*>(blob), size}, plan))
        {
            refused = "the magic tag does not match";
        }
        else if (plan.has_host_code && !is_host_code_allowed_)
        {
            refused = "engine host code isn't allowed";
        }
        else if (plan.needs_plugins && registry_.loaded.empty())
        {
            refused = "a plugin creator was not found";
        }
        if (refused != nullptr)
        {
            logger_.log(ILogger::Severity::kERROR, refused);
            logger_.log(ILogger::Severity::kINTERNAL_ERROR, refused);
            return nullptr;
        }
        logger_.log(ILogger::Severity::kWARNING, "an engine of a double was loaded");
        return new EngineDouble(std::move(plan), logger_, engines_);
    }

private:
    ILogger& logger_;
    RegistryDouble registry_;
    bool is_host_code_allowed_ = false;
    std::atomic<int> engines_{0};
};

class RuntimeDouble final : public IRuntime
{
public:
    explicit RuntimeDouble(ILogger& logger)
        : work_(logger)
    {
        mImpl = &work_;
    }

private:
    Counted counted_;
    RuntimeWork work_;
};

int32_t version_part(int index)
{
    char const* const text = std::getenv("TENSORRT_DOUBLE_VERSION");
    int32_t parts[4] = {10, 14, 1, 48};
    if (text != nullptr)
    {
        std::sscanf(text, "%d.%d.%d.%d", &parts[0], &parts[1], &parts[2], &parts[3]);
    }
    return parts[index];
}

} // namespace

extern "C"
{

int double_tensorrt_objects()
{
    return objects;
}

void* createInferRuntime_INTERNAL(void* logger, int32_t version) noexcept
{
    require(version == NV_TENSORRT_VERSION, "another version than the headers'");
    return fails("createInferRuntime") ? nullptr : new RuntimeDouble(*static_cast<ILogger*>(logger));
}

int32_t getInferLibMajorVersion() noexcept
{
    return version_part(0);
}

int32_t getInferLibMinorVersion() noexcept
{
    return version_part(1);
}

int32_t getInferLibPatchVersion() noexcept
{
    return version_part(2);
}

int32_t getInferLibBuildVersion() noexcept
{
    return version_part(3);
}

} // extern "C"
