// Tiles: some rows of a plane with padding around them, their columns sorted by place modulo the stride. See kernel_planes.cpp.
#pragma once
#include "planes.hpp"
#include "simd.hpp"

namespace rarefy::RAREFY_LEVEL {

#define ALWAYS_INLINE inline __attribute__((always_inline))

inline constexpr std::size_t tile_room = 6144;  // floats: half of a small first cache

inline constexpr std::size_t up(std::size_t n) { return (n + LANES - 1) / LANES * LANES; }

// One row of a tile: per phase a zone of padding, the columns of that phase, and padding again.
struct Layout {
    std::size_t zone, phase, pitch, rows, together;  // floats; output rows of a tile; planes packed at a time

    explicit Layout(const Window& w) {
        zone = up((w.left + w.stride_w - 1) / w.stride_w);
        const std::size_t written = zone + up((w.in_w + w.stride_w - 1) / w.stride_w);
        const std::size_t read = up(w.out_w) + zone + (w.kernel_w - 1) * w.dilation_w / w.stride_w + 1;
        phase = up(written > read ? written : read);
        pitch = phase * w.stride_w;
        const std::size_t halo = (w.kernel_h - 1) * w.dilation_h + 1, room = tile_room / pitch;
        rows = room <= halo ? 4 : (room - halo) / w.stride_h + 1;
        if (rows > 4) rows -= rows % 4;
        if (rows > w.out_h) rows = w.out_h;
        together = rows < w.out_h ? 1 : tile_room / (height(w) * pitch);
        if (together == 0) together = 1;
    }
    std::size_t height(const Window& w) const { return (rows - 1) * w.stride_h + (w.kernel_h - 1) * w.dilation_h + 1; }
    // Where the tap at column offset kx begins in a row.
    std::size_t tap(const Window& w, std::size_t kx) const {
        const std::size_t at = zone * w.stride_w + kx * w.dilation_w - w.left;
        return at % w.stride_w * phase + at / w.stride_w;
    }
};

inline void fill(float* tile, std::size_t floats, vf rest) {
    for (std::size_t i = 0; i < floats; i += LANES) store(tile + i, rest);
}

// The columns of some rows; the padding around them is there already.
ALWAYS_INLINE void pack_rows(const float* x, std::size_t n, std::size_t stride, std::size_t count, const Layout& t, vf rest, float* row) {
    const std::size_t pitch = t.pitch, phase = t.phase, per_step = stride * LANES, whole = n / per_step * per_step, tail = n - whole;
    row += t.zone;
    if (stride == 1) {
        for (; count != 0; --count, x += n, row += pitch) {
            for (std::size_t i = 0; i < whole; i += LANES) store(row + i, load(x + i));
            if (tail != 0) store(row + whole, load_first(x + whole, tail, rest));
        }
    } else if (stride == 2) {
        const std::size_t last = tail < LANES ? 0 : tail - LANES;
        for (; count != 0; --count, x += n, row += pitch) {
            vf even, odd;
            for (std::size_t i = 0; i < whole; i += 2 * LANES) {
                deinterleave(load(x + i), load(x + i + LANES), even, odd);
                store(row + i / 2, even);
                store(row + phase + i / 2, odd);
            }
            if (tail == 0) continue;
            const vf a = tail >= LANES ? load(x + whole) : load_first(x + whole, tail, rest);
            deinterleave(a, last != 0 ? load_first(x + whole + LANES, last, rest) : rest, even, odd);
            store(row + whole / 2, even);
            store(row + phase + whole / 2, odd);
        }
    } else {
        for (; count != 0; --count, x += n, row += pitch)
            for (std::size_t i = 0; i < n; ++i) row[i % stride * phase + i / stride] = x[i];
    }
}

// The input rows under output rows [from, from + rows).
ALWAYS_INLINE void pack(const float* x, const Window& w, const Layout& t, std::size_t from, std::size_t rows, vf rest, float* tile) {
    const std::size_t count = (rows - 1) * w.stride_h + (w.kernel_h - 1) * w.dilation_h + 1, at = from * w.stride_h;
    std::size_t above = w.top > at ? w.top - at : 0, below = at + count > w.in_h + w.top ? at + count - w.in_h - w.top : 0;
    if (above > count) above = count;
    if (below > count - above) below = count - above;
    if (t.rows < w.out_h) {  // else these rows never held anything but padding
        fill(tile, above * t.pitch, rest);
        fill(tile + (count - below) * t.pitch, below * t.pitch, rest);
    }
    if (above + below < count)
        pack_rows(x + (at + above - w.top) * w.in_w, w.in_w, w.stride_w, count - above - below, t, rest, tile + above * t.pitch);
}

ALWAYS_INLINE vf load_some(const float* p, std::size_t n) { return n == LANES ? load(p) : load_first(p, n); }
ALWAYS_INLINE void store_some(float* p, vf v, std::size_t n) {
    if (n == LANES)
        store(p, v);
    else
        store_first(p, v, n);
}

}  // namespace rarefy::RAREFY_LEVEL
