// Scores of a tile as whole numbers, scaled by a power of two so that the largest takes all the bits there are.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace rarefy::RAREFY_LEVEL {

template <class X> struct FloatBits;
template <> struct FloatBits<float> {
    using type = std::int32_t;
    static constexpr int mantissa = 23, bias = 127;
};
template <> struct FloatBits<double> {
    using type = std::int64_t;
    static constexpr int mantissa = 52, bias = 1023;
};

template <class X> inline X from_bits(typename FloatBits<X>::type bits) {
    X x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
template <class X> inline typename FloatBits<X>::type to_bits(X x) {
    typename FloatBits<X>::type bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
template <class X> constexpr typename FloatBits<X>::type infinity = typename FloatBits<X>::type{2 * FloatBits<X>::bias + 1}
                                                                   << FloatBits<X>::mantissa;

// A score's magnitude as bits: the larger, the larger.
template <class X> inline typename FloatBits<X>::type magnitude(X x) {
    using B = typename FloatBits<X>::type;
    return to_bits(x) & static_cast<B>(~(B{1} << (8 * sizeof(B) - 1)));
}

// The largest of n.
template <class X> inline typename FloatBits<X>::type largest(const X* x, std::size_t n) {
    typename FloatBits<X>::type top = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const auto here = magnitude(x[i]);
        top = here > top ? here : top;
    }
    return top;
}

// The power of two, as two factors, that brings scores of this largest magnitude to 2^bits at most.
template <class X> struct Scale {
    X first, second;
    Scale(typename FloatBits<X>::type top, int bits) {
        using F = FloatBits<X>;
        int exponent = static_cast<int>(top >> F::mantissa);
        if (exponent == 0 && top != 0) exponent = 64 - __builtin_clzll(static_cast<unsigned long long>(top)) - F::mantissa;  // denormal
        const int shift = bits + F::bias - 1 - exponent;
        const int half = shift / 2;
        first = from_bits<X>(static_cast<typename F::type>(F::bias + half) << F::mantissa);
        second = from_bits<X>(static_cast<typename F::type>(F::bias + shift - half) << F::mantissa);
    }
};

// A scaled score to the nearest whole number; its magnitude has fewer bits than X's mantissa.
template <class T, class X> inline T rounded(X x) {
    constexpr X magic = static_cast<X>(std::int64_t{3} << (FloatBits<X>::mantissa - 1));
    return static_cast<T>(to_bits(x + magic) - to_bits(magic));
}

template <class T, class X> inline void round_to(const X* x, std::size_t n, const Scale<X>& scale, T* q) {
    for (std::size_t i = 0; i < n; ++i) q[i] = rounded<T>(x[i] * scale.first * scale.second);
}

}  // namespace rarefy::RAREFY_LEVEL
