#include "grad.hpp"
#include "simd.hpp"

namespace rarefy::RAREFY_LEVEL {
namespace {

#if defined(__AVX512F__)
// to[0..4) += the sums of four vectors.
inline void add_sums(const vf (&a)[4], float* to) {
    const vf ab = add(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    const vf cd = add(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    const vf all = add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), sums));
}
#else
inline void add_sums(const vf (&a)[4], float* to) {
    for (int i = 0; i < 4; ++i) to[i] += sum(a[i]);
}
#endif

template <std::size_t V>
void dots(const std::uint32_t* begin, const std::uint32_t* end, std::size_t rows, const std::int32_t* col, std::int32_t first,
          const float* x, const float* dy, float* out) {
    constexpr std::size_t width = V * LANES;
    for (std::size_t m = 0; m < rows; ++m, dy += width) {
        std::uint32_t i = begin[m];
        const std::uint32_t stop = end[m];
        if (i == stop) continue;
        vf d[V];
        for (std::size_t v = 0; v < V; ++v) d[v] = load(dy + v * LANES);
        for (; i + 4 <= stop; i += 4) {
            vf a[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                const float* at = x + static_cast<std::size_t>(col[i + static_cast<std::uint32_t>(j)] - first) * width;
                a[j] = mul(d[0], load(at));
                for (std::size_t v = 1; v < V; ++v) a[j] = fma(d[v], load(at + v * LANES), a[j]);
            }
            add_sums(a, out + i);
        }
        for (; i < stop; ++i) {
            const float* at = x + static_cast<std::size_t>(col[i] - first) * width;
            vf a = mul(d[0], load(at));
            for (std::size_t v = 1; v < V; ++v) a = fma(d[v], load(at + v * LANES), a);
            out[i] += sum(a);
        }
    }
}

}  // namespace

const SampledKernels sampled{{nullptr, &dots<1>, &dots<2>, &dots<3>, &dots<4>, &dots<5>, &dots<6>, &dots<7>, &dots<8>}};

}  // namespace rarefy::RAREFY_LEVEL
