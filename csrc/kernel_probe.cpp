#include "probe.hpp"
#include "simd.hpp"

namespace rarefy::RAREFY_LEVEL {
namespace {

constexpr std::size_t SUMS = 12, READS = 8;

float fmas(std::size_t rounds) {
    vf sums[SUMS];
    for (std::size_t i = 0; i < SUMS; ++i) sums[i] = set1(static_cast<float>(i));
    const vf a = set1(0.999f), b = set1(0.001f);
    for (; rounds != 0; --rounds)
#pragma GCC unroll 12
        for (std::size_t i = 0; i < SUMS; ++i) sums[i] = fma(sums[i], a, b);
    for (std::size_t i = 1; i < SUMS; ++i) sums[0] = add(sums[0], sums[i]);
    return sum(sums[0]);
}

float read(const float* x, std::size_t n, std::size_t times) {
    vf sums[READS];
    for (auto& v : sums) v = zero();
    for (; times != 0; --times)
        for (std::size_t i = 0; i < n; i += READS * LANES)
#pragma GCC unroll 8
            for (std::size_t j = 0; j < READS; ++j) sums[j] = max(sums[j], load(x + i + j * LANES));
    for (std::size_t i = 1; i < READS; ++i) sums[0] = add(sums[0], sums[i]);
    return sum(sums[0]);
}

}  // namespace

const ProbeKernels probe{LANES, SUMS, fmas, read};

}  // namespace rarefy::RAREFY_LEVEL
