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
inline vf load_first(const float* p, std::size_t n) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p); }
inline void store_first(float* p, vf v, std::size_t n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), v); }
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
#else
#error "no vector instructions are known for this architecture"
#endif
inline vf load_first(const float* p, std::size_t n) {
    float some[LANES] = {};
    for (std::size_t i = 0; i < n; ++i) some[i] = p[i];
    return load(some);
}
inline void store_first(float* p, vf v, std::size_t n) {
    float some[LANES];
    store(some, v);
    for (std::size_t i = 0; i < n; ++i) p[i] = some[i];
}
inline float sum(vf a) {
    float some[LANES], total = 0;
    store(some, a);
    for (std::size_t i = 0; i < LANES; ++i) total += some[i];
    return total;
}
#endif

}  // namespace rarefy::RAREFY_LEVEL
