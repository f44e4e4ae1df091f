// N:M products with samples in the lanes, on the loops of the unstructured kernel. All rows have as many weights in a block of inputs,
// so four rows go in step without any that ends before the others.
#include <algorithm>

#include "n_m.hpp"
#include "pool.hpp"
#include "scratch.hpp"

namespace rarefy {
namespace {

constexpr std::size_t T = NM_TILE, QUADS = T / QUAD;
constexpr std::size_t SUM_BYTES = std::size_t{768} << 10;  // partial sums of a tile of samples stay in the second cache
constexpr std::size_t VECTORS = 3;

std::size_t up(std::size_t n, std::size_t by) { return (n + by - 1) / by; }

// The weight spread out: for each block of inputs the quads of all outputs, one after the other.
struct Spread {
    std::size_t out_tiles, in_tiles, block, steps;  // tiles of inputs a block (the last may have fewer), steps a tile
    float* values;
    std::uint16_t* offsets;

    std::size_t blocks() const { return up(in_tiles, block); }
    std::size_t tiles_in(std::size_t b) const { return std::min(block, in_tiles - b * block); }
    std::size_t quad_step(std::size_t b) const { return tiles_in(b) * steps * QUAD; }
    std::size_t at(std::size_t b, std::size_t out_tile) const {
        return out_tiles * b * block * steps * T + out_tile * QUADS * quad_step(b);
    }
};

void spread(const NMWeight& w, bool inverse, const Spread& to, std::size_t threads) {
    const NMKernels& k = RAREFY_AT_LEVEL(n_m);
    const std::size_t cols = w.shape.col_tiles(), value_tile = w.shape.steps * T, index_tile = w.shape.lines() * T;
    parallel(to.out_tiles, threads, [&](std::size_t o) {
        for (std::size_t b = 0; b < to.blocks(); ++b)
            for (std::size_t i = 0; i < to.tiles_in(b); ++i) {
                const std::size_t in = b * to.block + i, tile = inverse ? in * cols + o : o * cols + in;
                const std::size_t at = to.at(b, o) + i * to.steps * QUAD;
                k.strips(w.values + tile * value_tile, w.index + tile * index_tile, to.steps, inverse, i * T, to.values + at,
                         to.offsets + at, to.quad_step(b));
            }
    });
}

}  // namespace

void n_m_by_strips(const NMWeight& w, bool inverse, const float* x, std::size_t n, const float* bias, Act act, float* y,
                   std::size_t threads) {
    const NMShape& s = w.shape;
    const std::size_t inputs = inverse ? s.rows : s.cols, outputs = inverse ? s.cols : s.rows;
    if (n == 0) return;
    const StripKernels& k = strip_kernels();
    const std::size_t lanes = k.lanes, most = std::min(VECTORS, k.vectors[static_cast<int>(Packing::quads)]);
    const std::size_t vectors = up(n, lanes), count = up(vectors, most);
    // A block's strip fits the first cache, blocks are nearly equal.
    const std::size_t in_tiles = up(inputs, T), out_tiles = up(outputs, T);
    const std::size_t fits = std::max<std::size_t>(1, l1_bytes() * 9 / 8 / (std::min(vectors, most) * lanes * sizeof(float) * T));
    const std::size_t blocks = std::max<std::size_t>(1, (in_tiles + fits / 2) / fits);
    Spread all{out_tiles, in_tiles, up(in_tiles, blocks), s.steps, nullptr, nullptr};
    const std::size_t places = out_tiles * in_tiles * s.steps * T;
    all.values = scratch(2, places + places / 2 + out_tiles * T);  // of this thread, read by all
    all.offsets = reinterpret_cast<std::uint16_t*>(all.values + places);
    auto* const rows = reinterpret_cast<std::uint32_t*>(all.values + places + places / 2);
    spread(w, inverse, all, threads);
    // So many parts of the outputs that each one's partial sums fit the second cache, and that all threads have work.
    const std::size_t sums_bytes = out_tiles * T * std::min(vectors, most) * lanes * sizeof(float);
    const std::size_t parts = std::min(out_tiles, std::max(up(sums_bytes, SUM_BYTES), count >= 3 * threads ? 1 : threads));
    const Cuts cut{out_tiles, 1, parts};
    for (std::size_t p = 0; p < parts; ++p)  // rows count from their part's first
        for (std::size_t i = cut(p) * T; i < cut(p + 1) * T; ++i)
            rows[i] = i < outputs ? static_cast<std::uint32_t>(i - cut(p) * T) : NO_ROW;
    parallel(count * parts, threads, [&](std::size_t task) {
        const std::size_t tile = task / parts, part = task % parts;
        const std::size_t from = vectors * tile / count, to = vectors * (tile + 1) / count, width = (to - from) * lanes;
        const std::size_t sample = from * lanes, samples = std::min(n, to * lanes) - sample;
        const std::size_t first = cut(part), tiles = cut(part + 1) - first;
        float* const strip = scratch(0, all.block * T * width);
        float* const sums = scratch(1, tiles * T * width + tiles * QUADS / 2);
        auto* const steps = reinterpret_cast<std::uint16_t*>(sums + tiles * T * width);  // of every four rows
        for (std::size_t b = 0; b < all.blocks(); ++b) {
            const std::size_t input = b * all.block * T, here = std::min(inputs - input, all.tiles_in(b) * T);
            k.pack_transposed(x + sample * inputs + input, inputs, here, samples, strip, width);
            std::fill(strip + here * width, strip + all.tiles_in(b) * T * width, 0.0f);
            std::fill(steps, steps + tiles * QUADS, static_cast<std::uint16_t>(all.tiles_in(b) * s.steps));
            const std::size_t at = all.at(b, first);
            strip_loops(Words::float32).quads[to - from]({steps, rows + first * T, tiles * QUADS, all.offsets + at, all.values + at},
                                                         reinterpret_cast<const char*>(strip), width * sizeof(float),
                                                         {b == 0 ? nullptr : sums, width, sums, width, lanes, nullptr});
        }
        const std::size_t out = first * T, real = std::min(outputs - out, tiles * T);
        k.unpack_transposed(sums, width, real, samples, y + sample * outputs + out, outputs, bias == nullptr ? nullptr : bias + out, act);
    });
}

}  // namespace rarefy
