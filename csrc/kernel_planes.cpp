// Windows over channel planes (depthwise convolution, pooling).
//
// Some rows of a plane are first copied into a tile with padding around them, their columns sorted by place modulo the stride
// ("phases"): then every tap of a window is a plain vector load at any stride and dilation, with no borders to look after. Four
// output rows are summed at once in registers, so that an input row serves all of them.
#include "planes.hpp"
#include "plane_tile.hpp"
#include "pointwise.hpp"
#include "simd_math.hpp"

namespace rarefy::RAREFY_LEVEL {
namespace {

// What is done with each tap, beginning with `start`.
template <std::size_t TAPS> struct Weighted {
    vf w[TAPS], start;
    ALWAYS_INLINE Weighted(const float* weights, float bias) : start(set1(bias)) {
        for (std::size_t i = 0; i < TAPS; ++i) w[i] = set1(weights[i]);
    }
    ALWAYS_INLINE vf step(vf sum, vf x, std::size_t tap) const { return fma(x, w[tap], sum); }
};
struct AnyWeighted {
    const float* w;
    vf start;
    ALWAYS_INLINE vf step(vf sum, vf x, std::size_t tap) const { return fma(x, set1(w[tap]), sum); }
};
struct Maximum {
    vf start;
    ALWAYS_INLINE vf step(vf sum, vf x, std::size_t) const { return max(sum, x); }
};
struct Sum {
    vf start;
    ALWAYS_INLINE vf step(vf sum, vf x, std::size_t) const { return add(sum, x); }
};

// R output rows of K x K windows with stride S, known to the compiler: each tap is loaded once for all rows that use it.
template <std::size_t K, std::size_t S> struct Fixed {
    std::size_t offsets[K], pitch;
    Fixed(const Window& w, const Layout& t) : pitch(t.pitch) {
        for (std::size_t i = 0; i < K; ++i) offsets[i] = t.tap(w, i);
    }
    template <std::size_t R, class Op> ALWAYS_INLINE void run(const float* tile, const Op& op, vf (&sum)[R]) const {
#pragma GCC unroll 16
        for (std::size_t j = 0; j < (R - 1) * S + K; ++j)
#pragma GCC unroll 8
            for (std::size_t kx = 0; kx < K; ++kx) {
                const vf x = load(tile + j * pitch + offsets[kx]);
#pragma GCC unroll 4
                for (std::size_t r = 0; r < R; ++r)
                    if (j >= r * S && j < r * S + K) sum[r] = op.step(sum[r], x, (j - r * S) * K + kx);
            }
    }
    std::size_t down() const { return S * pitch; }
};

struct Any {
    const Window& w;
    const Layout& t;
    template <std::size_t R, class Op> ALWAYS_INLINE void run(const float* tile, const Op& op, vf (&sum)[R]) const {
        for (std::size_t kx = 0, tap = 0; kx < w.kernel_w; ++kx) {
            const float* at = tile + t.tap(w, kx);
            tap = kx;
            for (std::size_t ky = 0; ky < w.kernel_h; ++ky, tap += w.kernel_w, at += w.dilation_h * t.pitch)
                for (std::size_t r = 0; r < R; ++r) sum[r] = op.step(sum[r], load(at + r * w.stride_h * t.pitch), tap);
        }
    }
    std::size_t down() const { return w.stride_h * t.pitch; }
};

template <std::size_t R, class Walk, class Op, class Finish>
ALWAYS_INLINE void some_rows(const Walk& walk, const Op& op, const float* tile, std::size_t row, std::size_t width,
                             const Finish& finish) {
    for (std::size_t x = 0; x < width; x += LANES) {
        vf sum[R];
        for (auto& v : sum) v = op.start;
        walk.run(tile + x, op, sum);
        const std::size_t n = width - x < LANES ? width - x : LANES;
#pragma GCC unroll 4
        for (std::size_t r = 0; r < R; ++r) finish(sum[r], row + r, x, n);
    }
}

// Output rows [row, row + rows) of one plane, whose tile is packed.
template <class Walk, class Op, class Finish>
void slide(const Walk& walk, const Op& op, const float* tile, std::size_t row, std::size_t rows, std::size_t width,
           const Finish& finish) {
    for (; rows >= 4; rows -= 4, row += 4, tile += 4 * walk.down()) some_rows<4>(walk, op, tile, row, width, finish);
    if (rows >= 2) {
        some_rows<2>(walk, op, tile, row, width, finish);
        rows -= 2, row += 2, tile += 2 * walk.down();
    }
    if (rows != 0) some_rows<1>(walk, op, tile, row, width, finish);
}

// Calls body(plane, first output row, rows, tile) with the tile packed, for all tiles of planes [from, to). Small planes are packed
// several at a time: reading right behind the writing, across what was written, would wait for the stores to reach the cache.
template <class Plane, class Body>
ALWAYS_INLINE void tiles(const Plane& plane, const Window& w, const Layout& t, vf rest, std::size_t from, std::size_t to, float* tile,
                         const Body& body) {
    const std::size_t size = t.height(w) * t.pitch;
    fill(tile, t.together * size, rest);
    for (std::size_t p = from; p < to; p += t.together) {
        const std::size_t many = to - p < t.together ? to - p : t.together;
        for (std::size_t row = 0; row < w.out_h; row += t.rows) {
            const std::size_t rows = w.out_h - row < t.rows ? w.out_h - row : t.rows;
            for (std::size_t i = 0; i < many; ++i) pack(plane(p + i), w, t, row, rows, rest, tile + i * size);
            for (std::size_t i = 0; i < many; ++i) body(p + i, row, rows, tile + i * size);
        }
    }
}

template <class Walk, class MakeOp>
void depthwise_with(const Depthwise& d, const Layout& t, const Walk& walk, const MakeOp& op_of, std::size_t from, std::size_t to,
                    float* tile) {
    const Window& w = d.window;
    const Clamp clamp(d.act);
    const auto plane = [&](std::size_t p) { return d.x + p / d.multiplier * w.in_h * w.in_w; };
    tiles(plane, w, t, zero(), from, to, tile, [&](std::size_t p, std::size_t first, std::size_t rows, const float* packed) {
        const std::size_t channel = p % d.channels;
        float* y = d.y + p * w.out_h * w.out_w;
        const float* residual = d.residual == nullptr ? nullptr : d.residual + p * w.out_h * w.out_w;
        const auto op = op_of(d.w + channel * w.kernel_h * w.kernel_w, d.bias == nullptr ? 0.0f : d.bias[channel]);
        slide(walk, op, packed, first, rows, w.out_w, [&](vf sum, std::size_t row, std::size_t column, std::size_t n) {
            const std::size_t at = row * w.out_w + column;
            if (residual != nullptr) sum = add(sum, load_some(residual + at, n));
            store_some(y + at, clamp(sum), n);
        });
        if (clamp.curved) pointwise(y + first * w.out_w, y + first * w.out_w, rows * w.out_w, d.act);
    });
}

template <std::size_t K, std::size_t S> bool is(const Window& w) {
    return w.kernel_h == K && w.kernel_w == K && w.stride_h == S && w.stride_w == S && w.dilation_h == 1 && w.dilation_w == 1;
}

#if defined(__AVX512F__)
// Narrow planes at stride 1: masked loads straight from the plane cost less than a tile.
constexpr std::size_t narrow = 2 * LANES;

// The lanes of each tap that lie inside, for the outputs from `column` on.
template <std::size_t K> void inside(const Window& w, std::size_t column, __mmask16 (&mask)[K]) {
    for (std::size_t kx = 0; kx < K; ++kx) {
        const auto at = static_cast<std::ptrdiff_t>(column + kx) - static_cast<std::ptrdiff_t>(w.left);
        const std::ptrdiff_t left = static_cast<std::ptrdiff_t>(w.in_w) - at, lanes = left < 0 ? 0 : left < 16 ? left : 16;
        const unsigned before = at >= 0 ? 0u : at < -15 ? 0xffffu : (1u << -at) - 1u;
        mask[kx] = static_cast<__mmask16>(((1u << lanes) - 1u) & ~before);
    }
}

template <std::size_t K> struct Masked {
    const Window& w;
    const Weighted<K * K>& op;
    const __mmask16 (&mask)[K];
    const float* x;  // lane 0 of tap 0 in row 0
    template <std::size_t R, class Finish> ALWAYS_INLINE void rows(std::size_t row, const Finish& finish) const {
        vf sum[R];
        for (auto& v : sum) v = op.start;
#pragma GCC unroll 12
        for (std::size_t j = 0; j < R + K - 1; ++j) {
            const std::size_t y = row + j - w.top;
            if (y >= w.in_h) continue;
#pragma GCC unroll 5
            for (std::size_t kx = 0; kx < K; ++kx) {
                const vf v = _mm512_maskz_loadu_ps(mask[kx], x + y * w.in_w + kx);
#pragma GCC unroll 8
                for (std::size_t r = 0; r < R; ++r)
                    if (j >= r && j < r + K) sum[r] = op.step(sum[r], v, (j - r) * K + kx);
            }
        }
#pragma GCC unroll 8
        for (std::size_t r = 0; r < R; ++r) finish(sum[r], row + r);
    }
};

template <std::size_t K> void depthwise_narrow(const Depthwise& d, std::size_t from, std::size_t to) {
    const Window w = d.window;
    const Clamp clamp(d.act);
    const std::size_t plane = w.out_h * w.out_w;
    __mmask16 masks[narrow / LANES][K];
    for (std::size_t c = 0; c < narrow / LANES; ++c) inside(w, c * LANES, masks[c]);
    std::size_t channel = from % d.channels;
    for (std::size_t p = from; p < to; ++p, channel = channel + 1 == d.channels ? 0 : channel + 1) {
        float* y = d.y + p * plane;
        const float* x = d.x + (d.multiplier == 1 ? p : p / d.multiplier) * w.in_h * w.in_w;
        const float* residual = d.residual == nullptr ? nullptr : d.residual + p * plane;
        const Weighted<K * K> op(d.w + channel * K * K, d.bias == nullptr ? 0.0f : d.bias[channel]);
        for (std::size_t column = 0; column < w.out_w; column += LANES) {
            const Masked<K> walk{w, op, masks[column / LANES], x + column - w.left};
            const std::size_t n = w.out_w - column < LANES ? w.out_w - column : LANES;
            const auto finish = [&](vf sum, std::size_t row) {
                const std::size_t at = row * w.out_w + column;
                if (residual != nullptr) sum = add(sum, load_first(residual + at, n));
                store_first(y + at, clamp(sum), n);
            };
            std::size_t row = 0;  // the usual planes are 7, 14, 28 or 56 high
            for (; row + 7 <= w.out_h; row += 7) walk.template rows<7>(row, finish);
            for (; row + 3 <= w.out_h; row += 3) walk.template rows<3>(row, finish);
            for (; row < w.out_h; ++row) walk.template rows<1>(row, finish);
        }
        if (clamp.curved) pointwise(y, y, plane, d.act);
    }
}
#endif

template <std::size_t K, std::size_t S>
void depthwise_fixed(const Depthwise& d, const Layout& t, std::size_t from, std::size_t to, float* tile) {
    const auto op = [](const float* w, float bias) { return Weighted<K * K>(w, bias); };
    depthwise_with(d, t, Fixed<K, S>(d.window, t), op, from, to, tile);
}

void depthwise(const Depthwise& d, std::size_t from, std::size_t to, float* tile) {
#if defined(__AVX512F__)
    if (is<3, 1>(d.window) && d.window.out_w <= narrow) return depthwise_narrow<3>(d, from, to);
    if (is<5, 1>(d.window) && d.window.out_w <= narrow) return depthwise_narrow<5>(d, from, to);
#endif
    const Layout t(d.window);
    if (is<3, 1>(d.window)) return depthwise_fixed<3, 1>(d, t, from, to, tile);
    if (is<3, 2>(d.window)) return depthwise_fixed<3, 2>(d, t, from, to, tile);
    if (is<5, 1>(d.window)) return depthwise_fixed<5, 1>(d, t, from, to, tile);
    if (is<5, 2>(d.window)) return depthwise_fixed<5, 2>(d, t, from, to, tile);
    const auto op = [](const float* w, float bias) { return AnyWeighted{w, set1(bias)}; };
    depthwise_with(d, t, Any{d.window, t}, op, from, to, tile);
}

template <class Walk>
void pool_with(const Pooling& q, const Layout& t, const Walk& walk, std::size_t from, std::size_t to, float* tile) {
    const Window& w = q.window;
    const vf least = set1(-__builtin_inff());
    const auto plane = [&](std::size_t p) { return q.x + p * w.in_h * w.in_w; };
    if (q.scale_h == nullptr)
        tiles(plane, w, t, least, from, to, tile, [&](std::size_t p, std::size_t first, std::size_t rows, const float* packed) {
            float* y = q.y + p * w.out_h * w.out_w;
            slide(walk, Maximum{least}, packed, first, rows, w.out_w,
                  [&](vf sum, std::size_t r, std::size_t c, std::size_t n) { store_some(y + r * w.out_w + c, sum, n); });
        });
    else
        tiles(plane, w, t, zero(), from, to, tile, [&](std::size_t p, std::size_t first, std::size_t rows, const float* packed) {
            float* y = q.y + p * w.out_h * w.out_w;
            slide(walk, Sum{zero()}, packed, first, rows, w.out_w, [&](vf sum, std::size_t r, std::size_t c, std::size_t n) {
                const vf scale = mul(set1(q.scale_h[r]), load_some(q.scale_w + c, n));
                store_some(y + r * w.out_w + c, mul(sum, scale), n);
            });
        });
}

void pool(const Pooling& q, std::size_t from, std::size_t to, float* tile) {
    const Layout t(q.window);
    if (is<3, 2>(q.window)) return pool_with(q, t, Fixed<3, 2>(q.window, t), from, to, tile);
    if (is<2, 2>(q.window)) return pool_with(q, t, Fixed<2, 2>(q.window, t), from, to, tile);
    pool_with(q, t, Any{q.window, t}, from, to, tile);
}

std::size_t tile_floats(const Window& w) {
    const Layout t(w);
    return t.together * t.height(w) * t.pitch;
}

}  // namespace

const PlaneKernels planes{LANES, tile_floats, depthwise, pool, pointwise_sum, pointwise_add, pointwise_multiply,
                          pointwise_affine, softmax, pack_dense, dense, direct_floats, direct};

}  // namespace rarefy::RAREFY_LEVEL
