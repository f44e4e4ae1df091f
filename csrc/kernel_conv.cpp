#include "conv.hpp"
#include "simd.hpp"

namespace rarefy::RAREFY_LEVEL {
namespace {

#if !defined(__AVX512F__)
constexpr std::uint32_t ALL = (1u << LANES) - 1u;
#endif

#if defined(__AVX512F__)
template <std::size_t STRIDE> inline vf fetch_lanes(vf v, const float* from, std::uint32_t mask, std::size_t stride) {
    if constexpr (STRIDE == 1) {
        (void)stride;
        return _mm512_mask_loadu_ps(v, static_cast<__mmask16>(mask), from);
    } else if constexpr (STRIDE == 2) {
        (void)stride;
        const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const vf low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(_pdep_u32(mask & 0xff, 0x5555)), from);
        const vf high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(_pdep_u32(mask >> 8, 0x5555)), from + LANES);
        return _mm512_mask_mov_ps(v, static_cast<__mmask16>(mask), _mm512_permutex2var_ps(low, evens, high));
    } else {
        const __m512i at = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                              _mm512_set1_epi32(static_cast<int>(stride)));
        return _mm512_mask_i32gather_ps(v, static_cast<__mmask16>(mask), at, from, 4);
    }
}
#else
template <std::size_t STRIDE> inline vf fetch_lanes(vf v, const float* from, std::uint32_t mask, std::size_t stride) {
    if (STRIDE == 1 && mask == ALL) return load(from);
    float lanes[LANES];
    store(lanes, v);
    for (std::size_t j = 0; j < LANES; ++j)
        if (mask >> j & 1) lanes[j] = from[j * stride];
    return load(lanes);
}
#endif

template <std::size_t STRIDE>
void fetch_rows(const float* x, const FetchPlan& p, std::size_t k, std::size_t size, std::size_t vectors, float* strip,
                std::size_t width) {
    std::size_t tap = k % p.taps;
    const float* plane = x + k / p.taps * p.plane;
    for (std::size_t i = 0; i < size; ++i) {
        const std::uint32_t* first = p.first + tap * p.vectors_in_all;
        for (std::size_t v = 0; v < vectors; ++v) {
            vf row = zero();
            for (std::uint32_t f = first[v]; f < first[v + 1]; ++f)
                row = fetch_lanes<STRIDE>(row, plane + p.all[f].from, p.all[f].mask, p.stride);
            store(strip + v * LANES, row);
        }
        strip += width;
        if (++tap == p.taps) {
            tap = 0;
            plane += p.plane;
        }
    }
}

void fetch(const float* x, const FetchPlan& plan, std::size_t k, std::size_t size, std::size_t vectors, float* strip,
                std::size_t width) {
    if (plan.stride == 1)
        fetch_rows<1>(x, plan, k, size, vectors, strip, width);
    else if (plan.stride == 2)
        fetch_rows<2>(x, plan, k, size, vectors, strip, width);
    else
        fetch_rows<0>(x, plan, k, size, vectors, strip, width);
}

}  // namespace

const ConvKernels conv{&fetch};

}  // namespace rarefy::RAREFY_LEVEL
