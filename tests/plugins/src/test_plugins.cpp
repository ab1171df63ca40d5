/** The library through its interface, with doubles in TensorRT's place: test_plugins LIBRARY TEST. */
#include "harness.h"

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::TensorFormat;

namespace
{

// ---- The library ----

Finder finder;
nvinfer1::IPluginCreatorInterface* const* creators = nullptr;
int32_t num_creators = 0;

void load(char const* path)
{
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
    {
        std::printf("%s\n", dlerror());
        std::exit(2);
    }
    auto const set_finder = reinterpret_cast<void (*)(nvinfer1::ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    auto const get_creators =
        reinterpret_cast<nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    set_finder(&finder);
    creators = get_creators(num_creators);
}

nvinfer1::IPluginCreatorV3One& creator(std::string const& name)
{
    for (int32_t i = 0; i < num_creators; ++i)
    {
        auto* const found = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
        if (name == found->getPluginName())
        {
            return *found;
        }
    }
    std::printf("there is no creator %s\n", name.c_str());
    std::exit(2);
}

/** The last error that was logged, or nothing. */
std::string last_error()
{
    return finder.logger.errors.empty() ? "" : finder.logger.errors.back();
}

bool has(std::string const& words, std::string const& part)
{
    if (words.find(part) == std::string::npos)
    {
        std::printf("  \"%s\" isn't in \"%s\"\n", part.c_str(), words.c_str());
        return false;
    }
    return true;
}

// ---- Plugins from attributes ----

using Attributes = std::vector<std::pair<std::string, double>>;

/** The others are integers. */
bool is_float(std::string const& field)
{
    return field == "scale" || field == "norm_epsilon";
}

std::unique_ptr<nvinfer1::IPluginV3> create(std::string const& name, Attributes const& attributes,
    nvinfer1::TensorRTPhase phase = nvinfer1::TensorRTPhase::kBUILD)
{
    std::deque<int32_t> integers;
    std::deque<float> floats;
    std::vector<PluginField> fields;
    for (auto const& [field, value] : attributes)
    {
        if (is_float(field))
        {
            floats.push_back(static_cast<float>(value));
            fields.emplace_back(field.c_str(), &floats.back(), PluginFieldType::kFLOAT32, 1);
        }
        else
        {
            integers.push_back(static_cast<int32_t>(value));
            fields.emplace_back(field.c_str(), &integers.back(), PluginFieldType::kINT32, 1);
        }
    }
    nvinfer1::PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    finder.logger.errors.clear();
    return std::unique_ptr<nvinfer1::IPluginV3>(creator(name).createPlugin("node", &collection, phase));
}

template <class Capability>
Capability& capability(nvinfer1::IPluginV3& plugin, nvinfer1::PluginCapabilityType type)
{
    return *static_cast<Capability*>(plugin.getCapabilityInterface(type));
}

nvinfer1::IPluginV3OneBuild& build_of(nvinfer1::IPluginV3& plugin)
{
    return capability<nvinfer1::IPluginV3OneBuild>(plugin, nvinfer1::PluginCapabilityType::kBUILD);
}

nvinfer1::IPluginV3OneRuntime& runtime_of(nvinfer1::IPluginV3& plugin)
{
    return capability<nvinfer1::IPluginV3OneRuntime>(plugin, nvinfer1::PluginCapabilityType::kRUNTIME);
}

Attributes gqa_attributes(int cache_bits = 16, double norm_epsilon = 0)
{
    return {{"num_heads", 40}, {"num_kv_heads", 8}, {"head_dim", 128}, {"cache_bits", double(cache_bits)},
        {"norm_epsilon", norm_epsilon}, {"scale", 0.08838834764831845}};
}

Attributes moe_attributes(int weight_bits = 16, int has_zeros = 0)
{
    return {{"num_experts", 60}, {"experts_per_token", 4}, {"weight_bits", double(weight_bits)},
        {"has_zeros", double(has_zeros)}};
}

Attributes linear_attributes(int weight_bits = 4, int group_size = 128, int has_zeros = 0, int has_bias = 0)
{
    return {{"weight_bits", double(weight_bits)}, {"group_size", double(group_size)}, {"has_zeros", double(has_zeros)},
        {"has_bias", double(has_bias)}};
}

Attributes with(Attributes attributes, std::string const& name, double value)
{
    for (auto& [field, old] : attributes)
    {
        if (field == name)
        {
            old = value;
        }
    }
    return attributes;
}

// ---- Tensors ----

/** A tensor of a step or a profile: its largest shape, and the smallest where it is another. */
struct Tensor
{
    DataType type;
    std::vector<int64_t> largest;
    std::vector<int64_t> smallest{};
};

constexpr DataType kHalf = DataType::kHALF;
constexpr DataType kFloat = DataType::kFLOAT;
constexpr DataType kInt8 = DataType::kINT8;
constexpr DataType kInt32 = DataType::kINT32;
constexpr DataType kInt64 = DataType::kINT64;

nvinfer1::Dims dims(std::vector<int64_t> const& shape)
{
    nvinfer1::Dims result{};
    result.nbDims = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), result.d);
    return result;
}

DynamicPluginTensorDesc describe(Tensor const& tensor)
{
    DynamicPluginTensorDesc result{};
    result.desc = {dims(tensor.largest), tensor.type, TensorFormat::kLINEAR, 1.0F};
    result.min = dims(tensor.smallest.empty() ? tensor.largest : tensor.smallest);
    result.max = result.opt = dims(tensor.largest);
    return result;
}

std::vector<DynamicPluginTensorDesc> describe(std::vector<Tensor> const& tensors)
{
    std::vector<DynamicPluginTensorDesc> result;
    for (Tensor const& tensor : tensors)
    {
        result.push_back(describe(tensor));
    }
    return result;
}

struct Node
{
    std::vector<Tensor> inputs;
    std::vector<Tensor> outputs;
};

/** B = 3 rows, S = 5 tokens, C = 1024 slots of the heads in gqa_attributes; 40 + 2 · 8 heads of 128 are 7168. */
Node gqa_node(DataType compute = kHalf, bool is_int8 = false, bool has_norms = false)
{
    DataType const cache = is_int8 ? kInt8 : compute;
    Node node;
    node.inputs = {{compute, {3, 5, 7168}}, {cache, {3, 8, 1024, 128}}, {cache, {3, 8, 1024, 128}},
        {kFloat, {4096, 64}}, {kFloat, {4096, 64}}, {kInt64, {3, 5}}, {kInt64, {3}}, {kInt64, {3}}};
    node.outputs = {{compute, {3, 5, 5120}}, {cache, {3, 8, 1024, 128}}, {cache, {3, 8, 1024, 128}}};
    if (is_int8)
    {
        node.inputs.insert(node.inputs.end(), 2, {kHalf, {3, 8, 1024}});
        node.outputs.insert(node.outputs.end(), 2, {kHalf, {3, 8, 1024}});
    }
    if (has_norms)
    {
        node.inputs.insert(node.inputs.end(), 2, {kFloat, {128}});
    }
    return node;
}

/** Qwen1.5-MoE-A2.7B's layer: M = 2048, F = 1408, 60 experts, 4 a token. */
Node moe_node(DataType compute = kHalf, int weight_bits = 16, bool has_zeros = false)
{
    DataType const weight = weight_bits == 16 ? compute : kInt8;
    Node node;
    node.inputs = {{compute, {3, 5, 2048}}, {kInt32, {3, 5, 4}}, {kFloat, {3, 5, 4}}};
    if (weight_bits == 4)
    {
        node.inputs.insert(node.inputs.end(),
            {{weight, {60, 2816, 1024}}, {weight, {60, 2048, 704}}, {compute, {60, 2816, 16}},
                {compute, {60, 2048, 11}}});
    }
    else
    {
        node.inputs.insert(node.inputs.end(), {{weight, {60, 2816, 2048}}, {weight, {60, 2048, 1408}}});
    }
    if (weight_bits == 8)
    {
        node.inputs.insert(node.inputs.end(), {{compute, {60, 2816}}, {compute, {60, 2048}}});
    }
    if (has_zeros)
    {
        node.inputs.insert(node.inputs.end(), {{kInt8, {60, 2816, 16}}, {kInt8, {60, 2048, 11}}});
    }
    node.outputs = {{compute, {3, 5, 2048}}};
    return node;
}

/** The output projection of attention in Qwen1.5-1.8B, N = K = 2048. */
Node linear_node(
    DataType compute = kHalf, int weight_bits = 4, int group_size = 128, bool has_zeros = false, bool has_bias = false)
{
    int64_t const blocks = group_size < 0 ? 1 : 2048 / group_size;
    Node node;
    node.inputs = {{compute, {3, 5, 2048}}, {kInt8, {weight_bits == 4 ? 1024 : 2048, 2048}}, {compute, {blocks, 2048}}};
    if (has_zeros)
    {
        node.inputs.push_back({kInt8, {blocks, 2048}});
    }
    if (has_bias)
    {
        node.inputs.push_back({compute, {2048}});
    }
    node.outputs = {{compute, {3, 5, 2048}}};
    return node;
}

struct Case
{
    std::string name;
    Attributes attributes;
    Node node;
};

std::vector<Case> all_cases()
{
    std::vector<Case> cases;
    for (DataType const compute : {DataType::kHALF, DataType::kBF16})
    {
        cases.push_back({"QwenGQA", gqa_attributes(16), gqa_node(compute, false)});
        cases.push_back({"QwenGQA", gqa_attributes(8), gqa_node(compute, true)});
        cases.push_back({"QwenGQA", gqa_attributes(16, 1e-6), gqa_node(compute, false, true)});
        cases.push_back({"QwenGQA", gqa_attributes(8, 1e-6), gqa_node(compute, true, true)});
        cases.push_back({"QwenMoE", moe_attributes(16), moe_node(compute, 16)});
        cases.push_back({"QwenMoE", moe_attributes(8), moe_node(compute, 8)});
        cases.push_back({"QwenMoE", moe_attributes(4), moe_node(compute, 4)});
        cases.push_back({"QwenMoE", moe_attributes(4, 1), moe_node(compute, 4, true)});
        cases.push_back({"QwenLinear", linear_attributes(8, -1), linear_node(compute, 8, -1)});
        cases.push_back({"QwenLinear", linear_attributes(8, 128, 0, 1), linear_node(compute, 8, 128, false, true)});
        cases.push_back({"QwenLinear", linear_attributes(4, -1), linear_node(compute, 4, -1)});
        cases.push_back({"QwenLinear", linear_attributes(4, 128), linear_node(compute, 4, 128)});
        cases.push_back({"QwenLinear", linear_attributes(4, 64, 1), linear_node(compute, 4, 64, true)});
        cases.push_back({"QwenLinear", linear_attributes(4, 32, 1, 1), linear_node(compute, 4, 32, true, true)});
    }
    return cases;
}

int32_t configure(nvinfer1::IPluginV3& plugin, Node const& node)
{
    auto const inputs = describe(node.inputs);
    auto const outputs = describe(node.outputs);
    finder.logger.errors.clear();
    return build_of(plugin).configurePlugin(
        inputs.data(), static_cast<int32_t>(inputs.size()), outputs.data(), static_cast<int32_t>(outputs.size()));
}

/** Whether the node is refused with these words. */
bool refuses(Case const& of, std::string const& words)
{
    auto const plugin = create(of.name, of.attributes);
    return plugin != nullptr && configure(*plugin, of.node) != 0 && has(last_error(), words);
}

size_t workspace_of(Case const& of)
{
    auto const plugin = create(of.name, of.attributes);
    auto const inputs = describe(of.node.inputs);
    auto const outputs = describe(of.node.outputs);
    finder.logger.errors.clear();
    return build_of(*plugin).getWorkspaceSize(
        inputs.data(), static_cast<int32_t>(inputs.size()), outputs.data(), static_cast<int32_t>(outputs.size()));
}

} // namespace

// ---- Creators and fields ----

TEST(creators_are_three_of_version_3_in_the_namespace)
{
    CHECK(num_creators == 3);
    for (char const* const name : {"QwenGQA", "QwenMoE", "QwenLinear"})
    {
        auto& of = creator(name);
        CHECK(std::strcmp(of.getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0);
        CHECK(std::strcmp(of.getPluginNamespace(), "qwen_aot") == 0);
        CHECK(std::strcmp(of.getPluginVersion(), "1") == 0);
    }
}

TEST(field_names_and_types)
{
    std::map<std::string, std::vector<std::string>> const expected{
        {"QwenGQA", {"num_heads", "num_kv_heads", "head_dim", "cache_bits", "norm_epsilon", "scale"}},
        {"QwenMoE", {"num_experts", "experts_per_token", "weight_bits", "has_zeros"}},
        {"QwenLinear", {"weight_bits", "group_size", "has_zeros", "has_bias"}}};
    for (auto const& [name, fields] : expected)
    {
        auto const* const collection = creator(name).getFieldNames();
        CHECK(collection->nbFields == static_cast<int32_t>(fields.size()));
        for (size_t i = 0; i < fields.size(); ++i)
        {
            PluginField const& field = collection->fields[i];
            CHECK(fields[i] == field.name);
            CHECK(field.type == (is_float(fields[i]) ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32));
            CHECK(field.length == 1);
            CHECK(field.data == nullptr);
        }
    }
}

TEST(a_missing_field_is_refused_by_name)
{
    for (auto const& [name, attributes] : {std::pair<std::string, Attributes>("QwenGQA", gqa_attributes()),
             std::pair<std::string, Attributes>("QwenMoE", moe_attributes()),
             std::pair<std::string, Attributes>("QwenLinear", linear_attributes())})
    {
        for (size_t i = 0; i < attributes.size(); ++i)
        {
            Attributes fewer = attributes;
            fewer.erase(fewer.begin() + static_cast<std::ptrdiff_t>(i));
            CHECK(create(name, fewer) == nullptr);
            CHECK(has(last_error(), "qwen_aot " + name + ": field " + attributes[i].first + ", one "));
            CHECK(has(last_error(), "is missing"));
        }
        CHECK(creator(name).createPlugin("node", nullptr, nvinfer1::TensorRTPhase::kBUILD) == nullptr);
    }
}

TEST(an_unknown_field_and_one_given_twice_are_refused_by_name)
{
    Attributes attributes = gqa_attributes();
    attributes.emplace_back("rope_theta", 10000);
    CHECK(create("QwenGQA", attributes) == nullptr);
    CHECK(has(last_error(), "unknown field rope_theta; there are: num_heads, num_kv_heads, head_dim"));
    attributes.back() = {"head_dim", 64};
    CHECK(create("QwenGQA", attributes) == nullptr);
    CHECK(has(last_error(), "field head_dim is given twice"));
}

TEST(a_field_of_another_type_or_length_is_refused_by_name)
{
    int64_t const wide[4] = {4, 4, 4, 4};
    auto const refuses_field = [&](PluginField const& bad, std::string const& words) {
        Attributes const rest = gqa_attributes();
        std::deque<int32_t> integers;
        float const scale = 0.125F;
        std::vector<PluginField> fields{bad};
        for (auto const& [field, value] : rest)
        {
            integers.push_back(static_cast<int32_t>(value));
            if (field != bad.name)
            {
                fields.push_back(is_float(field)
                        ? PluginField(field.c_str(), &scale, PluginFieldType::kFLOAT32, 1)
                        : PluginField(field.c_str(), &integers.back(), PluginFieldType::kINT32, 1));
            }
        }
        nvinfer1::PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
        finder.logger.errors.clear();
        auto* const plugin = creator("QwenGQA").createPlugin("node", &collection, nvinfer1::TensorRTPhase::kBUILD);
        return plugin == nullptr && has(last_error(), words);
    };
    CHECK(
        refuses_field(PluginField("num_heads", wide, PluginFieldType::kINT64, 1), "field num_heads must be one int32"));
    CHECK(refuses_field(PluginField("head_dim", wide, PluginFieldType::kINT32, 2), "field head_dim must be one int32"));
    CHECK(refuses_field(PluginField("scale", wide, PluginFieldType::kFLOAT64, 1), "field scale must be one float32"));
    CHECK(refuses_field(
        PluginField("cache_bits", nullptr, PluginFieldType::kINT32, 1), "field cache_bits must be one int32"));
}

TEST(a_bad_value_is_refused_by_name)
{
    auto const gqa = [](std::string const& field, double value, std::string const& words) {
        return create("QwenGQA", with(gqa_attributes(), field, value)) == nullptr && has(last_error(), words);
    };
    CHECK(gqa("num_kv_heads", 0, "field num_kv_heads is 0"));
    CHECK(gqa("num_heads", 41, "field num_heads is 41; it must be a multiple of num_kv_heads, 8"));
    CHECK(gqa("num_heads", -8, "field num_heads is -8"));
    CHECK(gqa("cache_bits", 4, "field cache_bits is 4"));
    CHECK(gqa("scale", 0, "field scale is 0"));
    CHECK(gqa("norm_epsilon", -1e-6, "it must be positive, or 0 where heads have no norms"));
    CHECK(gqa("norm_epsilon", INFINITY, "field norm_epsilon is inf"));
    // A head size or a group that no variant has prints the request.
    CHECK(gqa("head_dim", 80, "serves dtype=fp16, cache=same, head_dim=80, group=5; there are: gqa_decode-"));
    CHECK(gqa("num_heads", 136, "head_dim=128, group=17; there are: gqa_decode-"));
    auto const moe = [](std::string const& field, double value, std::string const& words) {
        return create("QwenMoE", with(moe_attributes(), field, value)) == nullptr && has(last_error(), words);
    };
    CHECK(moe("num_experts", 0, "field num_experts is 0"));
    CHECK(moe("experts_per_token", 0, "field experts_per_token is 0"));
    CHECK(moe("experts_per_token", 61, "field experts_per_token is 61; it must be 1 to num_experts, 60"));
    CHECK(moe("weight_bits", 5, "field weight_bits is 5; it must be 16, 8 or 4"));
    CHECK(moe("has_zeros", 1, "field has_zeros is 1; it must be 0, or 1 with weight_bits 4"));
    CHECK(create("QwenMoE", with(moe_attributes(4), "has_zeros", 2)) == nullptr);
    CHECK(has(last_error(), "field has_zeros is 2"));
    auto const linear = [](Attributes const& attributes, std::string const& words) {
        return create("QwenLinear", attributes) == nullptr && has(last_error(), words);
    };
    CHECK(linear(linear_attributes(16), "field weight_bits is 16; it must be 8 or 4"));
    CHECK(linear(linear_attributes(4, 96), "field group_size is 96; it must be 32, 64, 128, or -1 for all of K"));
    CHECK(linear(linear_attributes(4, 0), "field group_size is 0"));
    CHECK(linear(linear_attributes(8, 64), "field group_size is 64; with weight_bits 8 it must be 128, or -1"));
    CHECK(linear(linear_attributes(8, 128, 1), "field has_zeros is 1; it must be 0, or 1 with weight_bits 4"));
    CHECK(linear(linear_attributes(4, 128, 2), "field has_zeros is 2"));
    CHECK(linear(linear_attributes(4, 128, 0, 2), "field has_bias is 2; it must be 0 or 1"));
}

// ---- Tactics ----

TEST(tactics_are_offered_where_there_is_a_choice)
{
    for (Case const& of : all_cases())
    {
        auto const plugin = create(of.name, of.attributes);
        auto& build = build_of(*plugin);
        auto const value = [&](char const* field) {
            return std::find_if(of.attributes.begin(), of.attributes.end(), [&](auto const& attribute) {
                return attribute.first == field;
            })->second;
        };
        bool const has_choice = of.name != "QwenLinear"
            || (value("has_zeros") == 0 && (value("group_size") == 128 || value("group_size") == -1));
        std::vector<int32_t> tactics(static_cast<size_t>(build.getNbTactics()), -1);
        CHECK(tactics.size() == (has_choice ? 2U : 0U));
        CHECK(build.getValidTactics(tactics.data(), static_cast<int32_t>(tactics.size())) == 0);
        CHECK(tactics == (has_choice ? std::vector<int32_t>{1, 2} : std::vector<int32_t>{})); // unique, and not 0
        CHECK(build.getValidTactics(tactics.data(), 7) != 0);
        CHECK(has(last_error(), "7 tactics were asked for"));
    }
}

TEST(what_was_timed_is_known_again_by_attributes_and_kernels)
{
    std::set<std::string> found;
    for (Case const& of : all_cases())
    {
        auto const plugin = create(of.name, of.attributes);
        auto const again = create(of.name, of.attributes);
        std::unique_ptr<nvinfer1::IPluginV3> const clone(plugin->clone());
        std::string const id = build_of(*plugin).getTimingCacheID();
        CHECK(has(id, "kernels ") && id.find("kernels ") + 24 == id.size()); // 16 digits of a digest
        CHECK(id == build_of(*again).getTimingCacheID() && id == build_of(*clone).getTimingCacheID());
        found.insert(id);
    }
    CHECK(found.size() == all_cases().size() / 2); // of fp16 and bf16, which TensorRT tells apart by itself
}

TEST(a_tactic_that_the_library_does_not_know_is_refused)
{
    for (Case const& of : all_cases())
    {
        auto const plugin = create(of.name, of.attributes);
        int32_t const last = build_of(*plugin).getNbTactics();
        for (int32_t tactic = 0; tactic <= last; ++tactic)
        {
            CHECK(runtime_of(*plugin).setTactic(tactic) == 0);
        }
        for (int32_t const unknown : {-1, last + 1, 1000})
        {
            CHECK(runtime_of(*plugin).setTactic(unknown) != 0);
            CHECK(has(last_error(), "this library has no tactic " + std::to_string(unknown) + "; there are 0"));
            CHECK(has(last_error(), "build it again"));
        }
    }
}

TEST(creation_is_logged_with_all_fields)
{
    CHECK(create("QwenMoE", moe_attributes(4, 1)) != nullptr);
    CHECK(finder.logger.errors.empty());
    CHECK(finder.logger.others.back()
        == "qwen_aot QwenMoE: created with num_experts=60, experts_per_token=4, weight_bits=4, has_zeros=1");
}

// ---- Serialization and clones ----

TEST(serialized_fields_make_the_same_plugin)
{
    for (Case const& of : all_cases())
    {
        auto const plugin = create(of.name, of.attributes);
        auto const* const fields = runtime_of(*plugin).getFieldsToSerialize();
        CHECK(fields->nbFields == static_cast<int32_t>(of.attributes.size()));
        std::unique_ptr<nvinfer1::IPluginV3> const again(
            creator(of.name).createPlugin("node", fields, nvinfer1::TensorRTPhase::kRUNTIME));
        CHECK(again != nullptr);
        auto const* const second = runtime_of(*again).getFieldsToSerialize();
        for (int32_t i = 0; i < fields->nbFields; ++i)
        {
            auto const& [name, value] = of.attributes[static_cast<size_t>(i)];
            PluginField const& field = second->fields[i];
            CHECK(name == field.name);
            CHECK(field.data != fields->fields[i].data);
            if (is_float(name))
            {
                CHECK(field.type == PluginFieldType::kFLOAT32);
                CHECK(*static_cast<float const*>(field.data) == static_cast<float>(value));
            }
            else
            {
                CHECK(field.type == PluginFieldType::kINT32);
                CHECK(*static_cast<int32_t const*>(field.data) == static_cast<int32_t>(value));
            }
        }
    }
}

TEST(a_clone_outlives_its_original)
{
    for (Case const& of : all_cases())
    {
        auto plugin = create(of.name, of.attributes);
        std::unique_ptr<nvinfer1::IPluginV3> const clone(plugin->clone());
        std::unique_ptr<nvinfer1::IPluginV3> const attached(runtime_of(*plugin).attachToContext(nullptr));
        plugin.reset();
        for (auto const& copy : {clone.get(), attached.get()})
        {
            auto const& core = capability<nvinfer1::IPluginV3OneCore>(*copy, nvinfer1::PluginCapabilityType::kCORE);
            CHECK(of.name == core.getPluginName());
            CHECK(std::strcmp(core.getPluginNamespace(), "qwen_aot") == 0);
            CHECK(std::strcmp(core.getPluginVersion(), "1") == 0);
            CHECK(configure(*copy, of.node) == 0);
            auto const* const fields = runtime_of(*copy).getFieldsToSerialize();
            CHECK(
                *static_cast<int32_t const*>(fields->fields[0].data) == static_cast<int32_t>(of.attributes[0].second));
        }
    }
}

TEST(the_alias_of_past_and_present_is_not_declared)
{
    auto const plugin = create("QwenGQA", gqa_attributes());
    nvinfer1::InterfaceInfo const info = build_of(*plugin).getInterfaceInfo();
    CHECK(std::strcmp(info.kind, "PLUGIN_V3ONE_BUILD") == 0);
    CHECK(info.major == 1); // V2 has getAliasedInput
}

// ---- Outputs ----

TEST(output_count_and_types)
{
    for (Case const& of : all_cases())
    {
        auto const plugin = create(of.name, of.attributes);
        CHECK(build_of(*plugin).getNbOutputs() == static_cast<int32_t>(of.node.outputs.size()));
        std::vector<DataType> inputs;
        for (Tensor const& input : of.node.inputs)
        {
            inputs.push_back(input.type);
        }
        std::vector<DataType> outputs(of.node.outputs.size(), DataType::kBOOL);
        CHECK(build_of(*plugin).getOutputDataTypes(outputs.data(), static_cast<int32_t>(outputs.size()), inputs.data(),
                  static_cast<int32_t>(inputs.size()))
            == 0);
        for (size_t i = 0; i < outputs.size(); ++i)
        {
            CHECK(outputs[i] == of.node.outputs[i].type);
        }
    }
}

TEST(gqa_output_shapes_are_the_inputs_dimensions)
{
    for (int const cache_bits : {16, 8})
    {
        Builder builder;
        auto const* const B = builder.make("B");
        auto const* const S = builder.make("S");
        auto const* const C = builder.make("C", 1024); // a capacity may be fixed or not
        auto const* const P = builder.make("P");
        auto const constant = [&](int64_t value) { return builder.make("given", value); };
        std::vector<nvinfer1::DimsExprs> inputs{builder.shape({B, S, constant(7168)}),
            builder.shape({B, constant(8), C, constant(128)}), builder.shape({B, constant(8), C, constant(128)}),
            builder.shape({P, constant(64)}), builder.shape({P, constant(64)}), builder.shape({B, S}),
            builder.shape({B}), builder.shape({B})};
        if (cache_bits == 8)
        {
            inputs.insert(inputs.end(), 2, builder.shape({B, constant(8), C}));
        }
        std::vector<nvinfer1::DimsExprs> outputs(cache_bits == 8 ? 5 : 3);
        auto const plugin = create("QwenGQA", gqa_attributes(cache_bits));
        CHECK(build_of(*plugin).getOutputShapes(inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0,
                  outputs.data(), static_cast<int32_t>(outputs.size()), builder)
            == 0);
        CHECK(outputs[0].nbDims == 3);
        CHECK(outputs[0].d[0] == B);
        CHECK(outputs[0].d[1] == S);
        CHECK(outputs[0].d[2]->isConstant() && outputs[0].d[2]->getConstantValue() == 5120); // 40 heads of 128
        for (size_t i = 1; i < outputs.size(); ++i)
        {
            CHECK(outputs[i].nbDims == (i < 3 ? 4 : 3));
            CHECK(outputs[i].d[0] == B);
            CHECK(outputs[i].d[1]->getConstantValue() == 8);
            CHECK(outputs[i].d[2] == C);
            CHECK(i >= 3 || outputs[i].d[3]->getConstantValue() == 128);
        }
        // A constant that contradicts the attributes is refused here, where a user sees the node.
        inputs[0] = builder.shape({B, S, constant(7000)});
        finder.logger.errors.clear();
        CHECK(build_of(*plugin).getOutputShapes(inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0,
                  outputs.data(), static_cast<int32_t>(outputs.size()), builder)
            != 0);
        CHECK(has(last_error(), "dimension 2 of qkv is 7000"));
    }
}

TEST(moe_output_shape_is_that_of_hidden)
{
    Builder builder;
    auto const* const B = builder.make("B");
    auto const* const S = builder.make("S");
    auto const* const M = builder.make("M", 2048);
    auto const constant = [&](int64_t value) { return builder.make("given", value); };
    std::vector<nvinfer1::DimsExprs> const inputs{builder.shape({B, S, M}), builder.shape({B, S, constant(4)}),
        builder.shape({B, S, constant(4)}), builder.shape({constant(60), constant(2816), constant(2048)}),
        builder.shape({constant(60), constant(2048), constant(1408)})};
    nvinfer1::DimsExprs output{};
    auto const plugin = create("QwenMoE", moe_attributes());
    CHECK(build_of(*plugin).getOutputShapes(inputs.data(), 5, nullptr, 0, &output, 1, builder) == 0);
    CHECK(output.nbDims == 3);
    CHECK(output.d[0] == B && output.d[1] == S && output.d[2] == M);
}

TEST(linear_output_shape_has_the_rows_of_its_weights)
{
    for (int const group_size : {128, -1})
    {
        Builder builder;
        auto const* const B = builder.make("B");
        auto const* const S = builder.make("S");
        auto const* const N = builder.make("N", 4096);
        auto const constant = [&](int64_t value) { return builder.make("given", value); };
        std::vector<nvinfer1::DimsExprs> const inputs{builder.shape({B, S, constant(2048)}),
            builder.shape({constant(2048), constant(2048)}), builder.shape({constant(group_size < 0 ? 1 : 16), N})};
        nvinfer1::DimsExprs output{};
        auto const plugin = create("QwenLinear", linear_attributes(4, group_size));
        CHECK(build_of(*plugin).getOutputShapes(inputs.data(), 3, nullptr, 0, &output, 1, builder) == 0);
        CHECK(output.nbDims == 3);
        CHECK(output.d[0] == B && output.d[1] == S && output.d[2] == N);
    }
}

// ---- Formats ----

TEST(formats_are_the_contracts_and_no_other)
{
    std::vector<DataType> const types{DataType::kFLOAT, DataType::kHALF, DataType::kINT8, DataType::kINT32,
        DataType::kBOOL, DataType::kUINT8, DataType::kFP8, DataType::kBF16, DataType::kINT64, DataType::kINT4};
    for (Case const& of : all_cases())
    {
        auto const plugin = create(of.name, of.attributes);
        std::vector<Tensor> all = of.node.inputs;
        all.insert(all.end(), of.node.outputs.begin(), of.node.outputs.end());
        auto const descriptions = describe(all);
        auto const num_inputs = static_cast<int32_t>(of.node.inputs.size());
        auto const num_outputs = static_cast<int32_t>(of.node.outputs.size());
        for (size_t i = 0; i < all.size(); ++i)
        {
            auto const supports = [&](std::vector<DynamicPluginTensorDesc> const& asked) {
                return build_of(*plugin).supportsFormatCombination(
                    static_cast<int32_t>(i), asked.data(), num_inputs, num_outputs);
            };
            CHECK(supports(descriptions));
            auto changed = descriptions;
            for (DataType const type : types)
            {
                changed[i].desc.type = type;
                bool const is_right = i == 0 ? type == DataType::kHALF || type == DataType::kBF16 : type == all[i].type;
                CHECK(supports(changed) == is_right);
            }
            changed = descriptions;
            changed[i].desc.format = TensorFormat::kCHW32;
            CHECK(!supports(changed));
        }
    }
}

// ---- What a node must be ----

TEST(each_contract_is_accepted)
{
    for (Case const& of : all_cases())
    {
        auto const plugin = create(of.name, of.attributes);
        CHECK(configure(*plugin, of.node) == 0);
        CHECK(finder.logger.errors.empty());
    }
}

TEST(another_number_of_tensors_is_refused)
{
    CHECK(refuses({"QwenGQA", gqa_attributes(16), gqa_node(kHalf, true)},
        "there are 5 outputs; with these attributes there must be 3: attention, present_key, present_value"));
    Node node = gqa_node();
    node.inputs.pop_back();
    CHECK(refuses({"QwenGQA", gqa_attributes(), node}, "there are 7 inputs; with these attributes there must be 8"));
    CHECK(refuses({"QwenMoE", moe_attributes(4, 1), moe_node(kHalf, 4)}, "gate_up_zero, down_zero"));
}

TEST(a_shape_that_contradicts_is_refused_by_tensor_and_dimension)
{
    struct Bad
    {
        size_t input;
        std::vector<int64_t> shape;
        char const* words;
    };
    for (Bad const& bad : std::vector<Bad>{
             {0, {3, 5, 7040}, "dimension 2 of qkv is 7040; with (H+2Hkv)D 7168 it must be (H+2Hkv)D"},
             {0, {15, 7168}, "qkv has 2 dimensions; it must be [B, S, (H+2Hkv)D]"},
             {1, {3, 40, 1024, 128}, "dimension 1 of past_key is 40; with Hkv 8"},
             {2, {3, 8, 1000, 128}, "dimension 2 of past_value is 1000; with C 1024"},
             {3, {4096, 128}, "dimension 1 of cos is 128; with D 128 it must be D/2"},
             {4, {2048, 64}, "dimension 0 of sin is 2048; with P 4096"},
             {5, {3, 4}, "dimension 1 of position_ids is 4; with S 5"},
             {6, {2}, "dimension 0 of cache_length is 2; with B 3"},
         })
    {
        Node node = gqa_node();
        node.inputs[bad.input].largest = bad.shape;
        CHECK(refuses({"QwenGQA", gqa_attributes(), node}, bad.words));
    }
    for (int const cache_bits : {16, 8})
    {
        Node node = gqa_node(kHalf, cache_bits == 8, true);
        node.inputs.back().largest = {64};
        CHECK(refuses({"QwenGQA", gqa_attributes(cache_bits, 1e-6), node},
            "dimension 0 of k_norm is 64; with D 128 it must be D"));
        CHECK(refuses({"QwenGQA", gqa_attributes(cache_bits), node}, "inputs"));
    }
    for (Bad const& bad : std::vector<Bad>{
             {1, {3, 5, 2}, "dimension 2 of expert_ids is 2; with k 4"},
             {3, {64, 2816, 1024}, "dimension 0 of gate_up is 64; with E 60"},
             {3, {60, 2815, 1024}, "dimension 1 of gate_up is 2815; a multiple of 2"},
             {4, {60, 2048, 1408}, "dimension 2 of down is 1408; with F 1408 it must be F/2"},
             {5, {60, 2816, 8}, "dimension 2 of gate_up_scale is 8; with M 2048 it must be M/128"},
         })
    {
        Node node = moe_node(kHalf, 4);
        node.inputs[bad.input].largest = bad.shape;
        CHECK(refuses({"QwenMoE", moe_attributes(4), node}, bad.words));
    }
}

TEST(a_projections_shape_that_contradicts_is_refused)
{
    struct Bad
    {
        size_t input;
        std::vector<int64_t> shape;
        char const* words;
    };
    for (Bad const& bad : std::vector<Bad>{
             {0, {15, 2048}, "x has 2 dimensions; it must be [B, S, K]"},
             {1, {1024, 1024}, "dimension 1 of weight is 1024; with K 2048 it must be K"},
             {1, {2048, 2048}, "dimension 1 of scale is 2048; with N 4096 it must be N"},
             {2, {8, 2048}, "dimension 0 of scale is 8; with K 2048 it must be K/128"},
             {3, {16, 1024}, "dimension 1 of zero is 1024; with N 2048"},
             {4, {1024}, "dimension 0 of bias is 1024; with N 2048"},
         })
    {
        Node node = linear_node(kHalf, 4, 128, true, true);
        node.inputs[bad.input].largest = bad.shape;
        CHECK(refuses({"QwenLinear", linear_attributes(4, 128, 1, 1), node}, bad.words));
    }
    Node node = linear_node(kHalf, 8, -1);
    node.inputs[2].largest = {16, 2048};
    CHECK(refuses({"QwenLinear", linear_attributes(8, -1), node}, "dimension 0 of scale is 16; with blocks 1"));
}

TEST(sizes_that_kernels_cannot_take_are_refused)
{
    Node projection = linear_node(kHalf, 8, -1);
    projection.inputs[1].largest[0] = projection.inputs[2].largest[1] = 2040;
    CHECK(refuses({"QwenLinear", linear_attributes(8, -1), projection},
        "the number of outputs is 2040; it must be a multiple of 16"));
    projection = linear_node(kHalf, 8, -1);
    projection.inputs[0].largest[2] = projection.inputs[1].largest[1] = 2000;
    CHECK(refuses({"QwenLinear", linear_attributes(8, -1), projection},
        "the number of inputs is 2000; it must be a multiple of 128"));
    projection = linear_node(kHalf, 8, -1);
    projection.inputs[0].largest[0] = projection.inputs[0].largest[1] = int64_t{1} << 16;
    CHECK(refuses({"QwenLinear", linear_attributes(8, -1), projection}, "4294967296 tokens are too many"));
    Node node = moe_node();
    node.inputs[0].largest[2] = node.inputs[3].largest[2] = node.inputs[4].largest[1] = 2000;
    CHECK(refuses({"QwenMoE", moe_attributes(), node}, "the hidden size is 2000; it must be a multiple of 128"));
    node = moe_node();
    node.inputs[3].largest[1] = 2800;
    node.inputs[4].largest[2] = 1400;
    CHECK(refuses({"QwenMoE", moe_attributes(), node}, "the intermediate size is 1400; it must be a multiple of 128"));
    node = gqa_node();
    node.inputs[1].largest[2] = node.inputs[2].largest[2] = int64_t{1} << 24; // of 128 elements
    CHECK(refuses({"QwenGQA", gqa_attributes(), node}, "a cache of 16777216 slots of 128 elements is too large"));
    node.inputs[1].largest[2] = node.inputs[2].largest[2] = (int64_t{1} << 24) - 1;
    auto const plugin = create("QwenGQA", gqa_attributes());
    CHECK(configure(*plugin, node) == 0);
    // 2^30 tokens of 4 experts.
    node = moe_node();
    for (size_t const i : {0U, 1U, 2U})
    {
        node.inputs[i].largest[0] = int64_t{1} << 15;
        node.inputs[i].largest[1] = int64_t{1} << 15;
    }
    CHECK(refuses({"QwenMoE", moe_attributes(), node}, "1073741824 tokens of 4 experts are too many"));
}

TEST(a_dimension_that_is_not_known_yet_is_accepted)
{
    Node node = gqa_node();
    for (Tensor& input : node.inputs)
    {
        input.smallest = input.largest;
        input.smallest[0] = -1;
    }
    auto const plugin = create("QwenGQA", gqa_attributes());
    CHECK(configure(*plugin, node) == 0);
}

TEST(workspace_of_an_unknown_size_is_a_logged_error)
{
    Case of{"QwenMoE", moe_attributes(), moe_node()};
    of.node.inputs[0].largest[1] = of.node.inputs[1].largest[1] = of.node.inputs[2].largest[1] = -1;
    CHECK(workspace_of(of) == 0);
    CHECK(has(last_error(), "dimension S of hidden isn't known"));
}

// ---- Running without a GPU ----

TEST(without_a_driver_a_step_is_a_logged_error)
{
    for (Case const& of : all_cases())
    {
        auto const plugin = create(of.name, of.attributes);
        std::vector<nvinfer1::PluginTensorDesc> inputs;
        std::vector<nvinfer1::PluginTensorDesc> outputs;
        for (auto const& description : describe(of.node.inputs))
        {
            inputs.push_back(description.desc);
        }
        for (auto const& description : describe(of.node.outputs))
        {
            outputs.push_back(description.desc);
        }
        auto& runtime = runtime_of(*plugin);
        finder.logger.errors.clear();
        CHECK(runtime.onShapeChange(inputs.data(), static_cast<int32_t>(inputs.size()), outputs.data(),
                  static_cast<int32_t>(outputs.size()))
            != 0);
        CHECK(has(last_error(), "qwen_aot " + of.name + ": the CUDA driver can't be loaded"));
        std::vector<void const*> const from(inputs.size(), nullptr);
        std::vector<void*> const to(outputs.size(), nullptr);
        finder.logger.errors.clear();
        CHECK(runtime.enqueue(inputs.data(), outputs.data(), from.data(), to.data(), nullptr, nullptr) != 0);
        CHECK(has(last_error(), "the CUDA driver can't be loaded"));
    }
}

// ---- For comparison with plugins/launch.py: prints bytes of workspace ----

/** workspace-linear B SMIN SMAX N K, or workspace-gqa B SMIN SMAX H Hkv D BITS C, or workspace-moe B SMIN SMAX E K BITS M F (16-bit weights). */
static int print_workspace(std::string const& which, std::vector<int64_t> const& n)
{
    Case of;
    if (which == "workspace-gqa")
    {
        int64_t const B = n[0], low = n[1], high = n[2], H = n[3], Hkv = n[4], D = n[5], C = n[7];
        of.name = "QwenGQA";
        of.attributes = {{"num_heads", double(H)}, {"num_kv_heads", double(Hkv)}, {"head_dim", double(D)},
            {"cache_bits", double(n[6])}, {"norm_epsilon", 0}, {"scale", 0.125}};
        of.node = gqa_node(kHalf, n[6] == 8);
        auto& inputs = of.node.inputs;
        inputs[0] = {kHalf, {B, high, (H + 2 * Hkv) * D}, {1, low, (H + 2 * Hkv) * D}};
        inputs[1].largest = inputs[2].largest = {B, Hkv, C, D};
        inputs[1].smallest = inputs[2].smallest = {1, Hkv, C, D};
        inputs[3].largest = inputs[4].largest = {4096, D / 2};
        inputs[5] = {kInt64, {B, high}, {1, low}};
        inputs[6] = inputs[7] = {kInt64, {B}, {1}};
        if (n[6] == 8)
        {
            inputs[8] = inputs[9] = {kHalf, {B, Hkv, C}, {1, Hkv, C}};
        }
    }
    else if (which == "workspace-linear")
    {
        int64_t const B = n[0], low = n[1], high = n[2], N = n[3], K = n[4];
        of.name = "QwenLinear";
        of.attributes = linear_attributes();
        of.node.inputs = {{kHalf, {B, high, K}, {1, low, K}}, {kInt8, {N / 2, K}}, {kHalf, {K / 128, N}}};
        of.node.outputs = {{kHalf, {B, high, N}, {1, low, N}}};
    }
    else
    {
        int64_t const B = n[0], low = n[1], high = n[2], E = n[3], k = n[4], M = n[6], F = n[7];
        of.name = "QwenMoE";
        of.attributes = {{"num_experts", double(E)}, {"experts_per_token", double(k)}, {"weight_bits", double(n[5])},
            {"has_zeros", 0}};
        of.node.inputs = {{kHalf, {B, high, M}, {1, low, M}}, {kInt32, {B, high, k}, {1, low, k}},
            {kFloat, {B, high, k}, {1, low, k}}, {kHalf, {E, 2 * F, M}}, {kHalf, {E, M, F}}};
        of.node.outputs = {{kHalf, {B, high, M}, {1, low, M}}};
    }
    std::printf("%zu\n", workspace_of(of));
    for (std::string const& error : finder.logger.errors)
    {
        std::printf("%s\n", error.c_str());
    }
    return finder.logger.errors.empty() ? 0 : 1;
}

int main(int count, char** arguments)
{
    if (count < 3)
    {
        std::printf("usage: test_plugins LIBRARY TEST\n");
        return 2;
    }
    load(arguments[1]);
    std::string const name = arguments[2];
    if (name.rfind("workspace-", 0) == 0)
    {
        std::vector<int64_t> numbers;
        std::transform(arguments + 3, arguments + count, std::back_inserter(numbers),
            [](char const* digits) { return std::atoll(digits); });
        return print_workspace(name, numbers);
    }
    return run_test(name);
}
