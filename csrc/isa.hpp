// Which instruction set the kernels use: the best that this CPU and its operating system support, or the one asked for.
#pragma once
#include <string>
#include <vector>

#include "kernels.hpp"

namespace rarefy {

std::vector<std::string> available_isas();  // low to high
std::string isa();                          // the one in use; on first call RAREFY_ISA decides, else the highest
void set_isa(const std::string& name);      // throws std::invalid_argument for an unknown name or one this CPU lacks
const Kernels& kernels();

}  // namespace rarefy
