// Bools (a byte each, any non-zero byte is true) to bits and back: bit i % 8 of byte i / 8.
#include <cstring>

#include "kernels.hpp"
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace rarefy::RAREFY_LEVEL {
namespace {

constexpr std::size_t block = 64;

#if defined(__AVX512BW__)

inline void pack64(const std::uint8_t* in, std::uint8_t* out) {
    const __m512i v = _mm512_loadu_si512(in);
    const std::uint64_t bits = _mm512_test_epi8_mask(v, v);
    std::memcpy(out, &bits, 8);
}

inline void unpack64(const std::uint8_t* in, std::uint8_t* out) {
    std::uint64_t bits;
    std::memcpy(&bits, in, 8);
    _mm512_storeu_si512(out, _mm512_maskz_set1_epi8(bits, 1));
}

#elif defined(__AVX2__)

inline void pack64(const std::uint8_t* in, std::uint8_t* out) {
    const __m256i none = _mm256_setzero_si256();
    for (int half = 0; half < 2; ++half) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + 32 * half));
        const int bits = ~_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, none));
        std::memcpy(out + 4 * half, &bits, 4);
    }
}

inline void unpack64(const std::uint8_t* in, std::uint8_t* out) {
    const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i each = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ULL));
    const __m256i one = _mm256_set1_epi8(1);
    for (int half = 0; half < 2; ++half) {
        int bits;
        std::memcpy(&bits, in + 4 * half, 4);
        const __m256i v = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), spread), each);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * half), _mm256_min_epu8(v, one));
    }
}

#else

#if defined(__SSE2__)

inline void pack64(const std::uint8_t* in, std::uint8_t* out) {
    const __m128i none = _mm_setzero_si128();
    for (int quarter = 0; quarter < 4; ++quarter) {
        const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 16 * quarter));
        const auto bits = static_cast<std::uint16_t>(~_mm_movemask_epi8(_mm_cmpeq_epi8(v, none)));
        std::memcpy(out + 2 * quarter, &bits, 2);
    }
}

#elif defined(__ARM_NEON) && defined(__aarch64__)

inline void pack64(const std::uint8_t* in, std::uint8_t* out) {
    const uint8x16_t each = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201ULL));
    uint8x16_t part[4];
    for (int quarter = 0; quarter < 4; ++quarter) {
        const uint8x16_t v = vld1q_u8(in + 16 * quarter);
        part[quarter] = vandq_u8(vtstq_u8(v, v), each);
    }
    // Three rounds of adding neighbours bring each eight bytes, one bit apart, into one.
    const uint8x16_t low = vpaddq_u8(part[0], part[1]), high = vpaddq_u8(part[2], part[3]);
    const uint8x16_t four = vpaddq_u8(low, high);
    vst1_u8(out, vget_low_u8(vpaddq_u8(four, four)));
}

#else

inline void pack64(const std::uint8_t* in, std::uint8_t* out) {
    for (int i = 0; i < 8; ++i) {
        unsigned bits = 0;
        for (int j = 0; j < 8; ++j) bits |= static_cast<unsigned>(in[8 * i + j] != 0) << j;
        out[i] = static_cast<std::uint8_t>(bits);
    }
}

#endif

#if defined(__ARM_NEON) && defined(__aarch64__)

inline void unpack64(const std::uint8_t* in, std::uint8_t* out) {
    const uint8x16_t each = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201ULL));
    const uint8x16_t one = vdupq_n_u8(1);
    for (int quarter = 0; quarter < 4; ++quarter) {
        const uint8x16_t v = vcombine_u8(vdup_n_u8(in[2 * quarter]), vdup_n_u8(in[2 * quarter + 1]));
        vst1q_u8(out + 16 * quarter, vandq_u8(vtstq_u8(v, each), one));
    }
}

#elif defined(__SSE2__)

inline void unpack64(const std::uint8_t* in, std::uint8_t* out) {
    const __m128i each = _mm_set1_epi64x(static_cast<long long>(0x8040201008040201ULL)), one = _mm_set1_epi8(1);
    for (int quarter = 0; quarter < 4; ++quarter) {
        std::uint16_t bits;
        std::memcpy(&bits, in + 2 * quarter, 2);
        __m128i v = _mm_cvtsi32_si128(bits);  // two bytes, spread to eight of each by doubling three times
        v = _mm_unpacklo_epi8(v, v);
        v = _mm_shufflelo_epi16(v, 0x50);
        v = _mm_shuffle_epi32(v, 0x50);
        v = _mm_min_epu8(_mm_and_si128(v, each), one);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * quarter), v);
    }
}

#else

inline void unpack64(const std::uint8_t* in, std::uint8_t* out) {
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 8; ++j) out[8 * i + j] = static_cast<std::uint8_t>((in[i] >> j) & 1);
}

#endif
#endif

}  // namespace

void pack(const std::uint8_t* bools, std::size_t n, std::uint8_t* bits) {
    std::size_t i = 0;
    for (; i + block <= n; i += block) pack64(bools + i, bits + i / 8);
    if (i == n) return;
    std::uint8_t in[block] = {}, out[block / 8];
    std::memcpy(in, bools + i, n - i);
    pack64(in, out);
    std::memcpy(bits + i / 8, out, (n - i + 7) / 8);
}

void unpack(const std::uint8_t* bits, std::size_t n, std::uint8_t* bools) {
    std::size_t i = 0;
    for (; i + block <= n; i += block) unpack64(bits + i / 8, bools + i);
    if (i == n) return;
    std::uint8_t in[block / 8] = {}, out[block];
    std::memcpy(in, bits + i / 8, (n - i + 7) / 8);
    unpack64(in, out);
    std::memcpy(bools + i, out, n - i);
}

}  // namespace rarefy::RAREFY_LEVEL
