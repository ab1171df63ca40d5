#include "free_memory.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>

namespace qwen_aot::cpu
{
namespace
{

/** The number behind a name in a file of "name number" or "name: number kB" lines. */
bool field(std::string const& path, std::string const& name, uint64_t& value)
{
    std::ifstream file(path);
    for (std::string line; std::getline(file, line);)
    {
        if (line.compare(0, name.size(), name) == 0 && line.size() > name.size() && line[name.size()] == ' ')
        {
            value = std::strtoull(line.c_str() + name.size(), nullptr, 10);
            return true;
        }
    }
    return false;
}

/** A file of one number; false where there is no such file, or "max" in it. */
bool number(std::string const& path, uint64_t& value)
{
    std::ifstream file(path);
    return static_cast<bool>(file >> value);
}

struct Files
{
    char const* limit;
    char const* used;
    char const* cached; // of memory.stat: a file's pages that can be dropped
};

constexpr Files kVersion1 = {"memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"};
constexpr Files kVersion2 = {"memory.max", "memory.current", "inactive_file"};

/** What a group and those above it leave. A container often sees the host's name of its group, and its own group as the
 *  mount's root. */
uint64_t headroom(std::string const& mount, std::string group, Files const& files)
{
    uint64_t least = UINT64_MAX;
    while (true)
    {
        std::string const folder = mount + group + "/";
        uint64_t limit = 0, used = 0, cached = 0;
        if (number(folder + files.limit, limit) && number(folder + files.used, used))
        {
            field(folder + "memory.stat", files.cached, cached);
            uint64_t const held = used - std::min(used, cached);
            least = std::min(least, limit - std::min(limit, held));
        }
        if (group.empty())
        {
            return least;
        }
        group.erase(group.rfind('/') == std::string::npos ? 0 : group.rfind('/'));
    }
}

} // namespace

uint64_t free_memory(std::string const& root)
{
    uint64_t kibibytes = 0;
    if (!field(root + "/proc/meminfo", "MemAvailable:", kibibytes))
    {
        return 0;
    }
    uint64_t found = kibibytes * 1024;
    std::ifstream groups(root + "/proc/self/cgroup");
    for (std::string line; std::getline(groups, line);) // number:controllers:path
    {
        size_t const first = line.find(':'), second = line.find(':', first + 1);
        if (first == std::string::npos || second == std::string::npos)
        {
            continue;
        }
        std::string const controllers = "," + line.substr(first + 1, second - first - 1) + ",";
        std::string group = line.substr(second + 1);
        group = group == "/" ? "" : group;
        if (controllers == ",,")
        {
            found = std::min(found, headroom(root + "/sys/fs/cgroup", group, kVersion2));
        }
        else if (controllers.find(",memory,") != std::string::npos)
        {
            found = std::min(found, headroom(root + "/sys/fs/cgroup/memory", group, kVersion1));
        }
    }
    return found;
}

} // namespace qwen_aot::cpu
