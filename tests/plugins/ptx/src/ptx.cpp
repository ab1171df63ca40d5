#include "ptx.h"

#include "block.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>

struct ptx_module
{
    ptx::Module module;
    std::map<std::string, std::vector<ptx::Tally>> tallies; // by kernel
    std::string text;
};

namespace
{

std::string error_text;

ptx::Kernel const* find(ptx_module const& module, std::string const& name)
{
    auto const& kernels = module.module.kernels;
    auto const found =
        std::find_if(kernels.begin(), kernels.end(), [&](ptx::Kernel const& kernel) { return kernel.name == name; });
    return found == kernels.end() ? nullptr : &*found;
}

std::vector<uint8_t> pack(ptx::Kernel const& kernel, void* const* parameters)
{
    std::vector<uint8_t> block;
    for (size_t index = 0; index < kernel.parameters.size(); ++index)
    {
        ptx::Parameter const& parameter = kernel.parameters[index];
        block.resize(parameter.offset + parameter.bytes);
        std::memcpy(block.data() + parameter.offset, parameters[index], parameter.bytes);
    }
    return block;
}

void run(ptx::Launch& launch)
{
    ptx::GlobalMemory global(*launch.kernel, launch.regions);
    ptx::Block block(launch, global);
    auto const [columns, rows, layers] = launch.grid;
    for (uint32_t z = 0; z < layers; ++z)
    {
        for (uint32_t y = 0; y < rows; ++y)
        {
            for (uint32_t x = 0; x < columns; ++x)
            {
                try
                {
                    block.run(x, y, z);
                }
                catch (ptx::Error const& error)
                {
                    throw ptx::Error(launch.kernel->name + ", block (" + std::to_string(x) + ", " + std::to_string(y)
                        + ", " + std::to_string(z) + "): " + error.what());
                }
            }
        }
    }
}

} // namespace

extern "C"
{

char const* ptx_forms()
{
    static std::string const text = [] {
        std::string lines;
        for (ptx::Form const* form : ptx::all_forms())
            lines += std::string(form->name) + " " + std::to_string(form->destinations + form->sources) + "\n";
        return lines;
    }();
    return text.c_str();
}

ptx_module* ptx_load(char const* text)
try
{
    auto loaded = std::make_unique<ptx_module>();
    loaded->module = ptx::parse(text);
    return loaded.release();
}
catch (std::exception const& error)
{
    error_text = error.what();
    return nullptr;
}

void ptx_unload(ptx_module* module)
{
    delete module;
}

char const* ptx_error()
{
    return error_text.c_str();
}

char const* ptx_target(ptx_module const* module)
{
    return module->module.target.c_str();
}

char const* ptx_unknown(ptx_module* module)
{
    std::map<std::string, std::pair<uint32_t, uint32_t>> found; // name to first line and count
    for (ptx::Kernel const& kernel : module->module.kernels)
    {
        for (ptx::Instruction const& instruction : kernel.code)
        {
            if (instruction.form == nullptr)
                ++found.try_emplace(instruction.name, instruction.line, 0).first->second.second;
        }
    }
    module->text.clear();
    for (auto const& [name, where] : found)
    {
        module->text += name + " at line " + std::to_string(where.first) + ", " + std::to_string(where.second)
            + (where.second == 1 ? " time\n" : " times\n");
    }
    return module->text.c_str();
}

int32_t ptx_kernel(ptx_module const* module, char const* kernel, uint32_t* threads, uint32_t* sizes, int32_t count)
{
    ptx::Kernel const* const found = find(*module, kernel);
    if (found == nullptr)
        return -1;
    *threads = found->threads;
    auto const number = static_cast<int32_t>(found->parameters.size());
    for (int32_t index = 0; index < std::min(number, count); ++index)
        sizes[index] = found->parameters[static_cast<size_t>(index)].bytes;
    return number;
}

int32_t ptx_launch(ptx_module* module, char const* kernel, uint32_t const* grid, uint32_t threads,
    uint32_t shared_bytes, void* const* parameters, ptx_region* regions, int32_t num_regions)
try
{
    ptx::Kernel const* const found = find(*module, kernel);
    if (found == nullptr)
        throw ptx::Error(std::string("the module has no kernel ") + kernel);
    if (std::string const unknown = ptx_unknown(module); !unknown.empty())
        throw ptx::Error("instructions that the interpreter doesn't know: " + unknown);
    if (threads == 0 || threads > 1024 || (found->threads != 0 && found->threads != threads))
    {
        throw ptx::Error(found->name + " is launched with " + std::to_string(threads) + " threads a block, not "
            + std::to_string(found->threads));
    }
    ptx::Launch launch{found, {grid[0], grid[1], grid[2]}, threads, module->module.static_shared_bytes + shared_bytes,
        pack(*found, parameters), {}, std::move(module->tallies[found->name])};
    launch.tallies.resize(found->code.size());
    for (ptx_region const* region = regions; region != regions + num_regions; ++region)
    {
        launch.regions.push_back({region->address, region->bytes, {region->read, region->read_sectors},
            {region->written, region->written_sectors}});
    }
    auto const keep = [&] {
        module->tallies[found->name] = std::move(launch.tallies);
        for (size_t index = 0; index < launch.regions.size(); ++index)
        {
            ptx::Region const& region = launch.regions[index];
            regions[index] = {region.address, region.bytes, region.read.bytes, region.read.sectors,
                region.written.bytes, region.written.sectors};
        }
    };
    try
    {
        run(launch);
    }
    catch (...)
    {
        keep();
        throw;
    }
    keep();
    return 0;
}
catch (std::exception const& error)
{
    error_text = error.what();
    return -1;
}

int32_t ptx_take_tallies(ptx_module* module, char const* kernel, ptx_tally* tallies, int32_t count)
{
    ptx::Kernel const* const found = find(*module, kernel);
    if (found == nullptr)
        return 0;
    std::vector<ptx::Tally>& kept = module->tallies[kernel];
    kept.resize(found->code.size());
    auto const number = static_cast<int32_t>(kept.size());
    for (int32_t index = 0; index < std::min(number, count); ++index)
    {
        ptx::Instruction const& instruction = found->code[static_cast<size_t>(index)];
        ptx::Tally const& tally = kept[static_cast<size_t>(index)];
        tallies[index] = {instruction.name.c_str(), tally.warps, tally.bytes};
    }
    if (count >= number)
        kept.clear();
    return number;
}

} // extern "C"
