// Activations and the exponential on one vector.
#pragma once
#include "epilogue.hpp"
#include "simd.hpp"

namespace rarefy::RAREFY_LEVEL {

typedef int vi __attribute__((vector_size(sizeof(vf))));

inline vf sub(vf a, vf b) { return fma(b, set1(-1.0f), a); }

// e^x to 2 ulp for x in [-87, 88]; beyond, the value at that end. Cody-Waite reduction and a polynomial of degree 6 (Cephes expf).
inline vf exp(vf x) {
    // In this order a NaN passes through: max and min return their second operand when one is not a number.
    x = min(set1(88.0f), max(set1(-87.0f), x));
    const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
    const vf shifted = fma(x, set1(1.44269504088896341f), magic);
    const vf n = sub(shifted, magic);
    vf r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    vf p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, mul(r, r), add(r, set1(1.0f)));
    return (vf)((vi)p + ((vi)shifted << 23));
}

inline vf div(vf a, vf b) { return a / b; }

inline vf sigmoid(vf x) { return div(set1(1.0f), add(set1(1.0f), exp(mul(x, set1(-1.0f))))); }

inline vf hardsigmoid(vf x) { return mul(min(set1(6.0f), max(zero(), add(x, set1(3.0f)))), set1(1.0f / 6.0f)); }

inline vf activate(vf x, Act act) {
    switch (act) {
        case Act::none: return x;
        case Act::relu: return max(zero(), x);  // the order lets NaN pass
        case Act::relu6: return min(set1(6.0f), max(zero(), x));
        case Act::hardswish: return mul(x, hardsigmoid(x));
        case Act::silu: return mul(max(set1(-88.0f), x), sigmoid(x));  // below, the sigmoid falls no more
        case Act::sigmoid: return sigmoid(x);
        case Act::hardsigmoid: return hardsigmoid(x);
    }
    return x;
}

}  // namespace rarefy::RAREFY_LEVEL
