// One vector of floats of the instruction set that the including kernel_*.cpp is compiled for.
#pragma once
#include <cstddef>
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace rarefy::RAREFY_LEVEL {

// LANES floats a vector; REGISTERS vector registers. Loads and stores need no alignment.
#if defined(__AVX512F__)
constexpr std::size_t LANES = 16, REGISTERS = 32;
using vf = __m512;
inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vf v) { _mm512_storeu_ps(p, v); }
inline vf set1(float x) { return _mm512_set1_ps(x); }
inline vf zero() { return _mm512_setzero_ps(); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
inline float sum(vf a) { return _mm512_reduce_add_ps(a); }
// The first n < LANES floats; the rest is zero, and is neither read nor written.
// Four floats in every part of four lanes, and a vector full of one of them: a shuffle, where loads are what is scarce.
inline vf load_four(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
template <int I> inline vf spread(vf four) { return _mm512_permute_ps(four, I * 0x55); }
inline vf load_first(const float* p, std::size_t n) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p); }
inline vf load_first(const float* p, std::size_t n, vf rest) {
    return _mm512_mask_loadu_ps(rest, static_cast<__mmask16>((1u << n) - 1u), p);
}
inline void store_first(float* p, vf v, std::size_t n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), v); }
// The even and the odd places of a followed by b.
inline void deinterleave(vf a, vf b, vf& even, vf& odd) {
    const __m512i at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    even = _mm512_permutex2var_ps(a, at, b);
    odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(at, _mm512_set1_epi32(1)), b);
}
#else
#if defined(__AVX2__)
constexpr std::size_t LANES = 8, REGISTERS = 16;
using vf = __m256;
inline vf load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, vf v) { _mm256_storeu_ps(p, v); }
inline vf set1(float x) { return _mm256_set1_ps(x); }
inline vf zero() { return _mm256_setzero_ps(); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf load_four(const float* p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)); }
template <int I> inline vf spread(vf four) { return _mm256_permute_ps(four, I * 0x55); }
#elif defined(__SSE2__)
constexpr std::size_t LANES = 4, REGISTERS = 16;
using vf = __m128;
inline vf load(const float* p) { return _mm_loadu_ps(p); }
inline void store(float* p, vf v) { _mm_storeu_ps(p, v); }
inline vf set1(float x) { return _mm_set1_ps(x); }
inline vf zero() { return _mm_setzero_ps(); }
inline vf fma(vf a, vf b, vf c) { return _mm_add_ps(_mm_mul_ps(a, b), c); }
inline vf add(vf a, vf b) { return _mm_add_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm_mul_ps(a, b); }
inline vf max(vf a, vf b) { return _mm_max_ps(a, b); }
inline vf min(vf a, vf b) { return _mm_min_ps(a, b); }
inline vf load_four(const float* p) { return _mm_loadu_ps(p); }
template <int I> inline vf spread(vf four) { return _mm_shuffle_ps(four, four, I * 0x55); }
#elif defined(__ARM_NEON)
constexpr std::size_t LANES = 4, REGISTERS = 32;
using vf = float32x4_t;
inline vf load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, vf v) { vst1q_f32(p, v); }
inline vf set1(float x) { return vdupq_n_f32(x); }
inline vf zero() { return vdupq_n_f32(0); }
inline vf fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
inline vf add(vf a, vf b) { return vaddq_f32(a, b); }
inline vf mul(vf a, vf b) { return vmulq_f32(a, b); }
inline vf max(vf a, vf b) { return vmaxq_f32(a, b); }
inline vf min(vf a, vf b) { return vminq_f32(a, b); }
inline vf load_four(const float* p) { return vld1q_f32(p); }
template <int I> inline vf spread(vf four) { return vdupq_laneq_f32(four, I); }
#else
#error "no vector instructions are known for this architecture"
#endif
#if defined(__AVX2__)
inline __m256i first(std::size_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline vf load_first(const float* p, std::size_t n) { return _mm256_maskload_ps(p, first(n)); }
inline vf load_first(const float* p, std::size_t n, vf rest) {
    return _mm256_blendv_ps(rest, load_first(p, n), _mm256_castsi256_ps(first(n)));
}
inline void store_first(float* p, vf v, std::size_t n) { _mm256_maskstore_ps(p, first(n), v); }
inline void deinterleave(vf a, vf b, vf& even, vf& odd) {
    const vf low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
    even = _mm256_shuffle_ps(low, high, 0x88);
    odd = _mm256_shuffle_ps(low, high, 0xdd);
}
#else
inline vf load_first(const float* p, std::size_t n, vf rest) {
    float some[LANES];
    store(some, rest);
    for (std::size_t i = 0; i < n; ++i) some[i] = p[i];
    return load(some);
}
inline vf load_first(const float* p, std::size_t n) { return load_first(p, n, zero()); }
inline void store_first(float* p, vf v, std::size_t n) {
    float some[LANES];
    store(some, v);
    for (std::size_t i = 0; i < n; ++i) p[i] = some[i];
}
inline void deinterleave(vf a, vf b, vf& even, vf& odd) {
    float all[2 * LANES], parts[2][LANES];
    store(all, a);
    store(all + LANES, b);
    for (std::size_t i = 0; i < LANES; ++i)
        for (std::size_t j = 0; j < 2; ++j) parts[j][i] = all[2 * i + j];
    even = load(parts[0]);
    odd = load(parts[1]);
}
#endif
inline float sum(vf a) {
    float some[LANES], total = 0;
    store(some, a);
    for (std::size_t i = 0; i < LANES; ++i) total += some[i];
    return total;
}
#endif

}  // namespace rarefy::RAREFY_LEVEL
