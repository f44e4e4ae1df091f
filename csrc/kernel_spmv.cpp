#include "simd.hpp"
#include "spmv.hpp"

namespace rarefy::RAREFY_LEVEL {
namespace {

#if defined(__AVX512F__)

template <std::size_t STEPS>
inline void entries(std::size_t n, const std::uint32_t*& segment, const std::uint8_t*& index, const float*& value, const float* x,
                    vf (&sums)[4]) {
    for (; n != 0; --n) {
        const float* at = x + *segment++;
        const vf low = load(at), high = load(at + LANES);
#pragma GCC unroll 16
        for (std::size_t s = 0; s < STEPS; ++s) {
            const __m512i which = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index)));
            sums[s % 4] = fma(load(value), _mm512_permutex2var_ps(low, which, high), sums[s % 4]);
            index += SLICE_ROWS;
            value += SLICE_ROWS;
        }
    }
}

void slice(const VectorRun& run, const float* x, float* out) {
    vf sums[4] = {zero(), zero(), zero(), zero()};
    const std::uint32_t* n = run.classes;
    const std::uint32_t* segment = run.segments;
    const std::uint8_t* index = run.index;
    const float* value = run.values;
    entries<1>(n[1], segment, index, value, x, sums);
    entries<2>(n[2], segment, index, value, x, sums);
    entries<3>(n[3], segment, index, value, x, sums);
    entries<4>(n[4], segment, index, value, x, sums);
    entries<5>(n[5], segment, index, value, x, sums);
    entries<6>(n[6], segment, index, value, x, sums);
    entries<7>(n[7], segment, index, value, x, sums);
    entries<8>(n[8], segment, index, value, x, sums);
    entries<9>(n[9], segment, index, value, x, sums);
    entries<10>(n[10], segment, index, value, x, sums);
    entries<11>(n[11], segment, index, value, x, sums);
    entries<12>(n[12], segment, index, value, x, sums);
    entries<13>(n[13], segment, index, value, x, sums);
    entries<14>(n[14], segment, index, value, x, sums);
    entries<15>(n[15], segment, index, value, x, sums);
    entries<16>(n[16], segment, index, value, x, sums);
    store(out, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

#else

void slice(const VectorRun& run, const float* x, float* out) {
    float sums[SLICE_ROWS] = {};
    const std::uint32_t* segment = run.segments;
    const std::uint8_t* index = run.index;
    const float* value = run.values;
    for (std::size_t steps = 1; steps <= LONGEST; ++steps)
        for (std::size_t n = run.classes[steps]; n != 0; --n) {
            const float* at = x + *segment++;
            for (std::size_t s = 0; s < steps; ++s, index += SLICE_ROWS, value += SLICE_ROWS)
                for (std::size_t r = 0; r < SLICE_ROWS; ++r) sums[r] += value[r] * at[index[r]];
        }
    for (std::size_t r = 0; r < SLICE_ROWS; ++r) out[r] = sums[r];
}

#endif

}  // namespace

const VectorKernels vector_product{&slice};

}  // namespace rarefy::RAREFY_LEVEL
