// Which kernels serve on this CPU.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace rmt::cpu {

// The instruction sets that are compiled in and that this CPU has, the fastest first; "portable" is always there.
std::vector<const Kernels*> available_kernels();

// By name; "auto" is the first of them. Throws std::invalid_argument for one that cannot run here.
const Kernels& choose_kernels(const std::string& name);

}  // namespace rmt::cpu
