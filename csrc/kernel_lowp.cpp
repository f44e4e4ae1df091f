#include "lowp.hpp"
#include "strip_loops.hpp"

namespace rarefy::RAREFY_LEVEL {
namespace {

inline vf rounded(vf x) {  // to bfloat16 in the upper half of each word, ties to even; a NaN stays one
    const vi bits = (vi)x, odd = (bits >> 16) & 1;
    const vi is_nan = (bits & 0x7fffffff) > 0x7f800000;
    const vi up = bits + 0x7fff + odd;
    return (vf)(((up & ~is_nan) | ((bits | 0x400000) & is_nan)) & static_cast<int>(0xffff0000u));
}

#if defined(__AVX512BF16__)
struct Bfloat16 {
    static vf mac(vf sum, vf w, vf x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
};
#else
struct Bfloat16 {
    static vf mac(vf sum, vf w, vf x) {
        const vi upper = (vi)set1(0.0f) | static_cast<int>(0xffff0000u), wi = (vi)w, xi = (vi)x;
        sum = fma((vf)(wi << 16), (vf)(xi << 16), sum);
        return fma((vf)(wi & upper), (vf)(xi & upper), sum);
    }
};
#endif

#if defined(__AVX512VNNI__)
struct Int8 {
    static vf mac(vf sum, vf w, vf x) {
        return _mm512_castsi512_ps(_mm512_dpbusd_epi32(_mm512_castps_si512(sum), _mm512_castps_si512(x), _mm512_castps_si512(w)));
    }
};
#else
struct Int8 {
    static vf mac(vf sum, vf w, vf x) {
        const vi wi = (vi)w, xi = (vi)x;
        return (vf)((vi)sum + (xi & 255) * (wi << 24 >> 24) + ((xi >> 8) & 255) * (wi << 16 >> 24) +
                    ((xi >> 16) & 255) * (wi << 8 >> 24) + ((xi >> 24) & 255) * (wi >> 24));
    }
};
#endif

void to_bfloat16(const float* x, std::size_t n, std::uint16_t* y) {
    std::size_t i = 0;
#if defined(__AVX512BF16__)
    for (; i + LANES <= n; i += LANES) _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i), (__m256i)_mm512_cvtneps_pbh(load(x + i)));
#endif
    for (; i < n; i += LANES) {
        const std::size_t here = n - i < LANES ? n - i : LANES;
        std::uint32_t words[LANES];
        store(reinterpret_cast<float*>(words), rounded(here == LANES ? load(x + i) : load_first(x + i, here)));
        for (std::size_t j = 0; j < here; ++j) y[i + j] = static_cast<std::uint16_t>(words[j] >> 16);
    }
}

void pack_pairs(const float* x, std::size_t ld, std::size_t units, std::size_t left, std::size_t n, float* strip, std::size_t width) {
    for (std::size_t u = 0; u < units; ++u, x += 2 * ld, strip += width)
        for (std::size_t i = 0; i < width; i += LANES) {
            const std::size_t here = i >= n ? 0 : (n - i < LANES ? n - i : LANES);
            vf first = zero(), second = zero();
            if (here == LANES) {
                first = load(x + i);
                if (2 * u + 1 < left) second = load(x + ld + i);
            } else if (here != 0) {
                first = load_first(x + i, here);
                if (2 * u + 1 < left) second = load_first(x + ld + i, here);
            }
            // The upper half moves down without its sign being drawn along.
            const vi low = ((vi)rounded(first) >> 16) & 0xffff;
            store(strip + i, (vf)(low | (vi)rounded(second)));
        }
}

void dequantise(float* sums, std::size_t rows, std::size_t width, const float* scale, const std::int32_t* shift) {
    for (std::size_t m = 0; m < rows; ++m, sums += width)
        for (std::size_t i = 0; i < width; i += LANES) {
            std::int32_t whole[LANES];
            store(reinterpret_cast<float*>(whole), load(sums + i));
            float out[LANES];
            for (std::size_t j = 0; j < LANES; ++j) out[j] = scale[m] * static_cast<float>(whole[j] - shift[m]);
            store(sums + i, load(out));
        }
}

}  // namespace

const LowpKernels lowp{loops<Bfloat16>(), loops<Int8>(), &to_bfloat16, &pack_pairs, &dequantise};

}  // namespace rarefy::RAREFY_LEVEL
