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

// The rows of one tap: `channels` of them, one every `step` floats of the strip and `plane` floats of the image. Masks stay in
// registers from channel to channel.
struct Rows {
    const float* x;
    std::size_t plane, channels;
    float* strip;
    std::size_t step, stride;
};

// N vectors side by side, each made of one fetch.
template <std::size_t STRIDE, std::size_t N> void side_by_side(const Rows& r, const Fetch (&from)[N]) {
    const float* x = r.x;
    float* to = r.strip;
    for (std::size_t c = r.channels; c != 0; --c, x += r.plane, to += r.step)
#pragma GCC unroll 4
        for (std::size_t v = 0; v < N; ++v) store(to + v * LANES, fetch_lanes<STRIDE>(zero(), x + from[v].from, from[v].mask, r.stride));
}

// One vector made of N fetches; 0: of `n`.
template <std::size_t STRIDE, std::size_t N> void merged(const Rows& r, const Fetch* all, std::size_t n) {
    Fetch from[N == 0 ? 1 : N];
    for (std::size_t f = 0; f < N; ++f) from[f] = all[f];
    const float* x = r.x;
    float* to = r.strip;
    for (std::size_t c = r.channels; c != 0; --c, x += r.plane, to += r.step) {
        vf row = zero();
        if constexpr (N == 0) {
            for (std::size_t f = 0; f < n; ++f) row = fetch_lanes<STRIDE>(row, x + all[f].from, all[f].mask, r.stride);
        } else {
#pragma GCC unroll 3
            for (std::size_t f = 0; f < N; ++f) row = fetch_lanes<STRIDE>(row, x + from[f].from, from[f].mask, r.stride);
        }
        store(to, row);
    }
}

template <std::size_t STRIDE> void fetch_tap(Rows r, const std::uint32_t* first, const Fetch* all, std::size_t vectors) {
    constexpr std::size_t MANY = 4;
    for (std::size_t v = 0; v < vectors;) {
        if (v + MANY <= vectors && first[v + 1] - first[v] == 1 && first[v + 2] - first[v + 1] == 1 &&
            first[v + 3] - first[v + 2] == 1 && first[v + 4] - first[v + 3] == 1) {
            const Fetch* f = all + first[v];
            side_by_side<STRIDE>(r, {f[0], f[1], f[2], f[3]});
            r.strip += MANY * LANES;
            v += MANY;
            continue;
        }
        const Fetch* const f = all + first[v];
        const std::size_t n = first[v + 1] - first[v];
        if (n == 1)
            side_by_side<STRIDE>(r, {f[0]});
        else if (n == 2)
            merged<STRIDE, 2>(r, f, n);
        else if (n == 3)
            merged<STRIDE, 3>(r, f, n);
        else
            merged<STRIDE, 0>(r, f, n);
        r.strip += LANES;
        ++v;
    }
}

template <std::size_t STRIDE>
void fetch_rows(const float* x, const FetchPlan& p, std::size_t k, std::size_t size, std::size_t vectors, float* strip,
                std::size_t width) {
    for (std::size_t i = 0; i < p.taps && i < size; ++i) {  // the block's first rows, one of each tap
        const std::size_t tap = (k + i) % p.taps, channels = (size - i + p.taps - 1) / p.taps;
        const Rows rows{x + (k + i) / p.taps * p.plane, p.plane, channels, strip + i * width, p.taps * width, p.stride};
        fetch_tap<STRIDE>(rows, p.first + tap * p.vectors_in_all, p.all, vectors);
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
