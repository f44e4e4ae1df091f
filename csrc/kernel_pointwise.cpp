// Elementwise operators, sums, softmax, and small dense products.
#include "pointwise.hpp"
#include "simd_math.hpp"

namespace rarefy::RAREFY_LEVEL {
namespace {

#define ALWAYS_INLINE inline __attribute__((always_inline))

// y[i] = f(i, n): f(at) for whole vectors, f(at, n) for the last n < LANES floats.
template <class Whole, class Part> ALWAYS_INLINE void each(std::size_t n, float* y, const Whole& whole, const Part& part) {
    std::size_t i = 0;
    for (; i + LANES <= n; i += LANES) store(y + i, whole(i));
    if (i < n) store_first(y + i, part(i, n - i), n - i);
}

template <class F> ALWAYS_INLINE void unary(const float* a, float* y, std::size_t n, const F& f) {
    each(n, y, [&](std::size_t i) { return f(load(a + i)); },
         [&](std::size_t i, std::size_t rest) { return f(load_first(a + i, rest)); });
}

template <class F> ALWAYS_INLINE void binary(const float* a, const float* b, float* y, std::size_t n, const F& f) {
    each(n, y, [&](std::size_t i) { return f(load(a + i), load(b + i)); },
         [&](std::size_t i, std::size_t rest) { return f(load_first(a + i, rest), load_first(b + i, rest)); });
}

// Calls body with the activation known to the compiler.
template <class Body> ALWAYS_INLINE void with_act(Act act, const Body& body) {
    switch (act) {
        case Act::none: return body([](vf x) { return x; });
        case Act::relu: return body([](vf x) { return activate(x, Act::relu); });
        case Act::relu6: return body([](vf x) { return activate(x, Act::relu6); });
        case Act::hardswish: return body([](vf x) { return activate(x, Act::hardswish); });
        case Act::silu: return body([](vf x) { return activate(x, Act::silu); });
        case Act::sigmoid: return body([](vf x) { return activate(x, Act::sigmoid); });
        case Act::hardsigmoid: return body([](vf x) { return activate(x, Act::hardsigmoid); });
    }
}

// Two vectors of outputs or four, for S samples at once: the weights are read once per S samples.
template <std::size_t S>
ALWAYS_INLINE void dense_block(const float* w, const float* bias, const float* x, float* y, std::size_t rows, std::size_t ld_x,
                               std::size_t ld_y, Act act) {
    vf sum[S][DENSE_VECTORS];
    const std::size_t whole = rows / LANES, tail = rows % LANES;
    for (std::size_t v = 0; v < DENSE_VECTORS; ++v) {
        vf start = zero();
        if (bias != nullptr && v < whole) start = load(bias + v * LANES);
        if (bias != nullptr && v == whole && tail != 0) start = load_first(bias + v * LANES, tail);
        for (std::size_t s = 0; s < S; ++s) sum[s][v] = start;
    }
    for (std::size_t k = 0; k < ld_x; ++k, w += DENSE_VECTORS * LANES)
        for (std::size_t s = 0; s < S; ++s) {
            const vf a = set1(x[s * ld_x + k]);
            for (std::size_t v = 0; v < DENSE_VECTORS; ++v) sum[s][v] = fma(a, load(w + v * LANES), sum[s][v]);
        }
    for (std::size_t s = 0; s < S; ++s)
        for (std::size_t v = 0; v < DENSE_VECTORS; ++v) {
            const vf out = activate(sum[s][v], act);
            if (v < whole) store(y + s * ld_y + v * LANES, out);
            if (v == whole && tail != 0) store_first(y + s * ld_y + v * LANES, out, tail);
        }
}

}  // namespace

void pointwise(const float* x, float* y, std::size_t n, Act act) {
    with_act(act, [&](auto f) { unary(x, y, n, f); });
}

float pointwise_sum(const float* x, std::size_t n) {
    vf sums[4] = {zero(), zero(), zero(), zero()};
    std::size_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (std::size_t j = 0; j < 4; ++j) sums[j] = add(sums[j], load(x + i + j * LANES));
    for (; i + LANES <= n; i += LANES) sums[0] = add(sums[0], load(x + i));
    if (i < n) sums[1] = add(sums[1], load_first(x + i, n - i));
    return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

void pointwise_add(const float* a, const float* b, float* y, std::size_t n, Act act) {
    with_act(act, [&](auto f) { binary(a, b, y, n, [&](vf p, vf q) { return f(add(p, q)); }); });
}

void pointwise_multiply(const float* a, const float* b, float* y, std::size_t n, Act act) {
    with_act(act, [&](auto f) { binary(a, b, y, n, [&](vf p, vf q) { return f(mul(p, q)); }); });
}

void pointwise_affine(const float* a, float scale, float shift, float* y, std::size_t n, Act act) {
    const vf s = set1(scale), t = set1(shift);
    with_act(act, [&](auto f) { unary(a, y, n, [&](vf x) { return f(fma(x, s, t)); }); });
}

void softmax(const float* x, float* y, std::size_t n) {
    const vf least = set1(-__builtin_inff());
    vf largest = least;
    std::size_t i = 0;
    for (; i + LANES <= n; i += LANES) largest = max(largest, load(x + i));
    if (i < n) largest = max(largest, load_first(x + i, n - i, least));
    float lanes[LANES], top = -__builtin_inff();
    store(lanes, largest);
    for (float v : lanes) top = v > top ? v : top;
    const vf shift = set1(top);
    unary(x, y, n, [&](vf v) { return exp(sub(v, shift)); });
    pointwise_affine(y, 1.0f / pointwise_sum(y, n), 0.0f, y, n, Act::none);
}

void pack_dense(const float* w, std::size_t rows, std::size_t cols, float* packed) {
    constexpr std::size_t block = DENSE_VECTORS * LANES;
    for (std::size_t m = 0; m < rows; m += block)
        for (std::size_t k = 0; k < cols; ++k)
            for (std::size_t i = 0; i < block; ++i) *packed++ = m + i < rows ? w[(m + i) * cols + k] : 0.0f;
}

void dense(const float* packed, const float* bias, const float* x, float* y, std::size_t rows, std::size_t cols, std::size_t n,
           std::size_t from, std::size_t to, Act act) {
    constexpr std::size_t block = DENSE_VECTORS * LANES;
    for (std::size_t b = from; b < to; ++b) {
        const float *w = packed + b * block * cols, *bias_b = bias == nullptr ? nullptr : bias + b * block;
        const std::size_t here = rows - b * block < block ? rows - b * block : block;
        float* out = y + b * block;
        std::size_t s = 0;
        for (; s + 4 <= n; s += 4) dense_block<4>(w, bias_b, x + s * cols, out + s * rows, here, cols, rows, act);
        for (; s < n; ++s) dense_block<1>(w, bias_b, x + s * cols, out + s * rows, here, cols, rows, act);
    }
}

}  // namespace rarefy::RAREFY_LEVEL
