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

enum class Numbers { fine, some_forbidden, none };

// Largest magnitude of n scores, as bits.
template <class X> inline typename FloatBits<X>::type largest(const X* x, std::size_t n) {
    using B = typename FloatBits<X>::type;
    constexpr B magnitude = static_cast<B>(~(B{1} << (8 * sizeof(B) - 1)));
    B top = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const B bits = to_bits(x[i]) & magnitude;
        top = bits > top ? bits : top;
    }
    return top;
}

// The power of two, as two factors, that brings scores of this largest magnitude to 2^bits at most.
template <class X> struct Scale {
    X first, second;
    Scale(typename FloatBits<X>::type top, int bits) {
        using F = FloatBits<X>;
        const int exponent = static_cast<int>(top >> F::mantissa), shift = bits + F::bias - 1 - (exponent > 0 ? exponent : 1);
        const int half = shift / 2;
        first = from_bits<X>(static_cast<typename F::type>(F::bias + half) << F::mantissa);
        second = from_bits<X>(static_cast<typename F::type>(F::bias + shift - half) << F::mantissa);
    }
};

// n scores to the nearest whole numbers of type T, |q| <= 2^bits with bits at most one less than X's mantissa has.
template <class T, class X> inline void round_to(const X* x, std::size_t n, const Scale<X>& scale, T* q) {
    constexpr X magic = static_cast<X>(std::int64_t{3} << (FloatBits<X>::mantissa - 1));
    for (std::size_t i = 0; i < n; ++i)
        q[i] = static_cast<T>(to_bits(x[i] * scale.first * scale.second + magic) - to_bits(magic));
}

}  // namespace rarefy::RAREFY_LEVEL
