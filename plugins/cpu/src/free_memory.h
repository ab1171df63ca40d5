/** How much memory this process may still take. */
#pragma once

#include <cstdint>
#include <string>

namespace qwen_aot::cpu
{

/** Bytes that Linux can give without taking them from other programs, or less where a control group (version 1 or 2) of this
 *  process has a limit; 0 where the system doesn't tell. A file's cached pages count as free.
 *
 *  root: in front of /proc and /sys, for tests.
 *  Sources: proc(5), MemAvailable; Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst. */
uint64_t free_memory(std::string const& root = "");

} // namespace qwen_aot::cpu
