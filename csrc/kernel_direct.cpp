// Dense convolution of a few input channels, as the first layer of most networks: the tiles of kernel_planes.cpp, one for each input
// channel, and several vectors of four output channels in registers.
#include "plane_tile.hpp"
#include "pointwise.hpp"

namespace rarefy::RAREFY_LEVEL {
namespace {

constexpr std::size_t VECTORS = REGISTERS >= 32 ? 4 : 2;

struct Sums {
    const float *w, *bias, *residual;  // of these output channels
    float* y;
    std::size_t channels, plane;       // how many are real; from one to the next
};

template <std::size_t V>
ALWAYS_INLINE void columns(const Direct& d, const Layout& t, const std::size_t* taps, const float* tile, std::size_t channel, const Sums& s,
                           const Clamp& clamp, std::size_t at, std::size_t width) {
    vf sum[DIRECT_OUT][V];
    for (std::size_t o = 0; o < DIRECT_OUT; ++o)
        for (std::size_t v = 0; v < V; ++v) sum[o][v] = s.bias == nullptr || o >= s.channels ? zero() : set1(s.bias[o]);
    const float* w = s.w;
    for (std::size_t c = 0; c < d.in; ++c, tile += channel) {
        const float* row = tile;
        for (std::size_t ky = 0; ky < d.window.kernel_h; ++ky, row += d.window.dilation_h * t.pitch)
            for (std::size_t kx = 0; kx < d.window.kernel_w; ++kx, w += DIRECT_OUT) {
                vf x[V];
                for (std::size_t v = 0; v < V; ++v) x[v] = load(row + taps[kx] + v * LANES);
                for (std::size_t o = 0; o < DIRECT_OUT; ++o) {
                    const vf weight = set1(w[o]);
                    for (std::size_t v = 0; v < V; ++v) sum[o][v] = fma(x[v], weight, sum[o][v]);
                }
            }
    }
    for (std::size_t o = 0; o < s.channels; ++o)
        for (std::size_t v = 0; v < V; ++v) {
            const std::size_t to = o * s.plane + at + v * LANES, left = width - at - v * LANES, n = left < LANES ? left : LANES;
            if (s.residual != nullptr) sum[o][v] = add(sum[o][v], load_some(s.residual + to, n));
            store_some(s.y + to, clamp(sum[o][v]), n);
        }
}

Layout layout(const Window& w) {
    Layout t(w);
    t.rows = w.out_h < DIRECT_ROWS ? w.out_h : DIRECT_ROWS;
    return t;
}

}  // namespace

std::size_t direct_floats(const Direct& d) {
    const Layout t = layout(d.window);
    return d.in * t.height(d.window) * t.pitch;
}

void direct(const Direct& d, std::size_t image, std::size_t row, float* tile) {
    const Window& w = d.window;
    const Layout t = layout(w);
    const std::size_t channel = t.height(w) * t.pitch, rows = w.out_h - row < t.rows ? w.out_h - row : t.rows;
    const std::size_t plane = w.out_h * w.out_w, taps_all = d.in * w.kernel_h * w.kernel_w;
    std::size_t taps[DIRECT_WIDEST];
    for (std::size_t kx = 0; kx < w.kernel_w; ++kx) taps[kx] = t.tap(w, kx);
    fill(tile, d.in * channel, zero());
    for (std::size_t c = 0; c < d.in; ++c) pack(d.x + (image * d.in + c) * w.in_h * w.in_w, w, t, row, rows, zero(), tile + c * channel);
    const Clamp clamp(d.act);
    for (std::size_t o = 0; o < d.out; o += DIRECT_OUT)
        for (std::size_t r = 0; r < rows; ++r) {
            const std::size_t to = (image * d.out + o) * plane + (row + r) * w.out_w;
            const Sums s{d.w + o * taps_all,
                         d.bias == nullptr ? nullptr : d.bias + o,
                         d.residual == nullptr ? nullptr : d.residual + to,
                         d.y + to,
                         d.out - o < DIRECT_OUT ? d.out - o : DIRECT_OUT,
                         plane};
            const float* base = tile + r * w.stride_h * t.pitch;
            for (std::size_t at = 0; at < w.out_w;) {
                const std::size_t left = (w.out_w - at + LANES - 1) / LANES;
                if (VECTORS == 4 && left >= 4) {
                    columns<VECTORS>(d, t, taps, base + at, channel, s, clamp, at, w.out_w);
                    at += VECTORS * LANES;
                } else if (VECTORS == 4 && left == 3) {
                    columns<VECTORS - 1>(d, t, taps, base + at, channel, s, clamp, at, w.out_w);
                    at += (VECTORS - 1) * LANES;
                } else if (left >= 2) {
                    columns<2>(d, t, taps, base + at, channel, s, clamp, at, w.out_w);
                    at += 2 * LANES;
                } else {
                    columns<1>(d, t, taps, base + at, channel, s, clamp, at, w.out_w);
                    at += LANES;
                }
            }
            if (clamp.curved)
                for (std::size_t i = 0; i < s.channels; ++i) pointwise(s.y + i * plane, s.y + i * plane, w.out_w, d.act);
        }
}

}  // namespace rarefy::RAREFY_LEVEL
