#include "simd_transpose.hpp"
#include "strip_loops.hpp"

namespace rarefy::RAREFY_LEVEL {
namespace {

struct Float {
    static vf mac(vf sum, vf w, vf x) { return fma(w, x, sum); }
};

void pack(const float* x, std::size_t ld, std::size_t k, std::size_t n, float* to, std::size_t width) {
    for (std::size_t i = 0; i < k; ++i, x += ld, to += width) {
        std::size_t at = 0;
        for (; at + LANES <= n; at += LANES) store(to + at, load(x + at));
        if (at < n) {
            store(to + at, load_first(x + at, n - at));
            at += LANES;
        }
        for (; at < width; at += LANES) store(to + at, zero());
    }
}

// Rows a power of two apart share the few lines of a cache set: what is fetched by itself is evicted before its use.
constexpr std::size_t AHEAD = 32;

void pack_transposed(const float* x, std::size_t ld, std::size_t k, std::size_t n, float* to, std::size_t width) {
    for (std::size_t i = 0; i < width; i += LANES) {
        const std::size_t rows = i >= n ? 0 : (n - i < LANES ? n - i : LANES);
        for (std::size_t j = 0; j < k; j += LANES) {
            const std::size_t columns = k - j < LANES ? k - j : LANES;
            vf tile[LANES];
            for (std::size_t r = 0; r < LANES; ++r) {
                const float* at = x + (i + r) * ld + j;
                __builtin_prefetch(at + AHEAD);
                tile[r] = r >= rows ? zero() : columns == LANES ? load(at) : load_first(at, columns);
            }
            transpose(tile);
            for (std::size_t c = 0; c < columns; ++c) store(to + (j + c) * width + i, tile[c]);
        }
    }
}

void unpack_transposed(const float* c, std::size_t width, std::size_t rows, std::size_t n, float* y, std::size_t ld,
                       const float* bias, Act act) {
    for (std::size_t i = 0; i < n; i += LANES) {
        const std::size_t columns = n - i < LANES ? n - i : LANES;
        for (std::size_t m = 0; m < rows; m += LANES) {
            const std::size_t here = rows - m < LANES ? rows - m : LANES;
            const vf b = bias == nullptr ? zero() : here == LANES ? load(bias + m) : load_first(bias + m, here);
            vf tile[LANES];
            for (std::size_t r = 0; r < LANES; ++r) tile[r] = r < here ? load(c + (m + r) * width + i) : zero();
            transpose(tile);
            for (std::size_t r = 0; r < columns; ++r) {
                const vf v = activate(add(tile[r], b), act);
                float* to = y + (i + r) * ld + m;
                __builtin_prefetch(to + AHEAD, 1);
                if (here == LANES)
                    store(to, v);
                else
                    store_first(to, v, here);
            }
        }
    }
}

void unpack(const float* c, std::size_t width, std::size_t rows, std::size_t n, float* y, std::size_t ld, const Epilogue& e) {
    for (std::size_t m = 0; m < rows; ++m) {
        const vf bias = set1(e.bias == nullptr ? 0.0f : e.bias[m]);
        for (std::size_t i = 0; i < n; i += LANES) {
            const std::size_t here = n - i < LANES ? n - i : LANES;
            vf v = add(load(c + m * width + i), bias);
            if (e.residual != nullptr) {
                const float* r = e.residual + m * e.residual_ld + i;
                v = add(v, here == LANES ? load(r) : load_first(r, here));
            }
            v = activate(v, e.act);
            if (here == LANES)
                store(y + m * ld + i, v);
            else
                store_first(y + m * ld + i, v, here);
        }
    }
}

std::size_t most_alike(const std::uint64_t* bits, const std::uint64_t* rows, std::size_t words, const std::uint32_t* which,
                       std::size_t n) {
    std::size_t best = 0;
    int most = -1;
    for (std::size_t i = 0; i < n; ++i) {
        const std::uint64_t* row = rows + which[i] * words;
        int common = 0;
        for (std::size_t w = 0; w < words; ++w) common += __builtin_popcountll(row[w] & bits[w]);
        if (common > most) {
            most = common;
            best = i;
        }
    }
    return best;
}

}  // namespace

const StripKernels strip{LANES,
                         {WIDEST, WIDEST_QUAD, MOST_SLICE_VECTORS},
                         loops<Float>(),
                         &pack,
                         &pack_transposed,
                         &unpack_transposed,
                         &unpack,
                         &most_alike};

}  // namespace rarefy::RAREFY_LEVEL
