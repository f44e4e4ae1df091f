// What this machine can do at most: multiply-adds in registers, and reading from each level of memory.
#pragma once
#include <cstddef>

#include "isa.hpp"

namespace rarefy {

struct ProbeKernels {
    std::size_t lanes, sums;                                       // multiply-adds of one round: lanes * sums
    float (*fmas)(std::size_t rounds);
    float (*read)(const float* x, std::size_t n, std::size_t times);  // n a multiple of 256
};
RAREFY_EVERY_LEVEL(extern const ProbeKernels probe)

}  // namespace rarefy
