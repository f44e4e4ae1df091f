// The kernels of one instruction set: plain functions over ranges, single-threaded, no allocation.
//
// kernel_*.cpp are compiled once per instruction set with RAREFY_LEVEL naming the namespace. They may use nothing inline from
// the standard library (no vector, no algorithm): the linker keeps one copy of an inline function, and if that were the AVX-512
// one, the baseline would crash on an older CPU.
#pragma once
#include <cstddef>
#include <cstdint>

namespace rarefy {

// Counts made by `window`: keys above `hi`, equal to it, strictly between, equal to `lo`; `nan` is set when a NaN was met.
struct WindowCounts {
    std::size_t above = 0, at_hi = 0, inside = 0, at_lo = 0;
    bool nan = false;
};

// The order-preserving integer key of a float or double: sign and magnitude as two's complement, so -0.0 and 0.0 are equal.
template <class T> struct KeyOf;
template <> struct KeyOf<float> { using type = std::int32_t; };
template <> struct KeyOf<double> { using type = std::int64_t; };
template <class T> using Key = typename KeyOf<T>::type;

// Selection over scores of type T.
template <class T> struct SelectKernels {
    // Keys of x[0..n) into `out`; true when a NaN was met.
    bool (*keys)(const T* x, std::size_t n, Key<T>* out);
    // How many keys are >= t.
    std::size_t (*count_keys)(const Key<T>* keys, std::size_t n, Key<T> t);
    // The same straight from the scores.
    std::size_t (*count)(const T* x, std::size_t n, Key<T> t);
    // mask = key >= hi; the keys strictly inside (lo, hi) go to `out_keys` with their positions to `out_at`, at most `room` of them
    // (counts.inside goes on counting beyond that).
    WindowCounts (*window)(const T* x, std::size_t n, Key<T> lo, Key<T> hi, std::uint8_t* mask, Key<T>* out_keys,
                           std::uint32_t* out_at, std::size_t room);
    // mask = key > t, and the first `ties` of those equal to t.
    void (*finish)(const T* x, std::size_t n, Key<T> t, std::size_t ties, std::uint8_t* mask);
    // Rows of `width` <= 16 scores, each with its own k (k[0] for all when k_step is 0); true when a NaN was met.
    bool (*short_rows)(const T* x, std::size_t rows, std::size_t width, const std::int64_t* k, std::size_t k_step,
                       std::uint8_t* mask);
};

struct Kernels {
    void (*pack)(const std::uint8_t* bools, std::size_t n, std::uint8_t* bits);    // n a multiple of 8, or the end of the mask
    void (*unpack)(const std::uint8_t* bits, std::size_t n, std::uint8_t* bools);
    void (*zero16)(std::uint16_t* x, const std::uint8_t* keep, std::size_t n);
    void (*zero32)(std::uint32_t* x, const std::uint8_t* keep, std::size_t n);
    void (*zero64)(std::uint64_t* x, const std::uint8_t* keep, std::size_t n);
    SelectKernels<float> select32;
    SelectKernels<double> select64;
};

#define RAREFY_DECLARE(level)                                                          \
    namespace level {                                                                  \
    void pack(const std::uint8_t* bools, std::size_t n, std::uint8_t* bits);           \
    void unpack(const std::uint8_t* bits, std::size_t n, std::uint8_t* bools);         \
    void zero16(std::uint16_t* x, const std::uint8_t* keep, std::size_t n);            \
    void zero32(std::uint32_t* x, const std::uint8_t* keep, std::size_t n);            \
    void zero64(std::uint64_t* x, const std::uint8_t* keep, std::size_t n);            \
    SelectKernels<float> select32();                                                   \
    SelectKernels<double> select64();                                                  \
    }
RAREFY_DECLARE(baseline)
RAREFY_DECLARE(avx2)
RAREFY_DECLARE(avx512)
#undef RAREFY_DECLARE

}  // namespace rarefy
