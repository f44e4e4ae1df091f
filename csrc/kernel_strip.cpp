#include "simd_math.hpp"
#include "simd_transpose.hpp"
#include "strip.hpp"

namespace rarefy::RAREFY_LEVEL {
namespace {

#define ALWAYS_INLINE inline __attribute__((always_inline))

template <std::size_t V> ALWAYS_INLINE void begin(vf (&a)[V], const StripTarget& t, std::uint32_t row) {
    if (t.from == nullptr || row == NO_ROW) {
        for (auto& v : a) v = zero();
    } else {
        const float* from = t.from + row * t.from_ld;
        for (std::size_t v = 0; v < V; ++v) a[v] = load(from + v * LANES);
    }
}

template <std::size_t V> ALWAYS_INLINE void finish(vf (&a)[V], const StripTarget& t, std::uint32_t row) {
    if (row == NO_ROW) return;
    float* to = t.to + row * t.to_ld;
    if (t.epilogue != nullptr) {
        const Epilogue& e = *t.epilogue;
        if (e.bias != nullptr) {
            const vf bias = set1(e.bias[row]);
            for (auto& v : a) v = add(v, bias);
        }
        if (e.residual != nullptr) {
            const float* r = e.residual + row * e.residual_ld;
            for (std::size_t v = 0; v + 1 < V; ++v) a[v] = add(a[v], load(r + v * LANES));
            a[V - 1] = add(a[V - 1], t.tail == LANES ? load(r + (V - 1) * LANES) : load_first(r + (V - 1) * LANES, t.tail));
        }
        if (e.act != Act::none)
            for (auto& v : a) v = activate(v, e.act);
    }
    for (std::size_t v = 0; v + 1 < V; ++v) store(to + v * LANES, a[v]);
    if (t.tail == LANES)
        store(to + (V - 1) * LANES, a[V - 1]);
    else
        store_first(to + (V - 1) * LANES, a[V - 1], t.tail);
}

template <std::size_t V, unsigned PATTERN>
ALWAYS_INLINE void run_pattern(std::size_t n, const std::uint32_t*& offset, const float*& value, const char* x, std::size_t stride,
                               vf (&a)[GROUP][V]) {
    for (; n != 0; --n) {
        const float* at = reinterpret_cast<const float*>(x + *offset++ * stride);
        if constexpr ((PATTERN & (PATTERN - 1)) == 0) {
            constexpr int row = __builtin_ctz(PATTERN);
            const vf w = set1(*value++);
            for (std::size_t v = 0; v < V; ++v) a[row][v] = fma(w, load(at + v * LANES), a[row][v]);
        } else {
            vf columns[V];
            for (std::size_t v = 0; v < V; ++v) columns[v] = load(at + v * LANES);
#pragma GCC unroll 4
            for (unsigned row = 0; row < GROUP; ++row)
                if (PATTERN >> row & 1) {
                    const vf w = set1(*value++);
                    for (std::size_t v = 0; v < V; ++v) a[row][v] = fma(w, columns[v], a[row][v]);
                }
        }
    }
}

template <std::size_t V> void groups(const GroupRun& run, const char* x, std::size_t stride, const StripTarget& t) {
    const std::uint32_t* offset = run.offsets;
    const float* value = run.values;
    for (std::size_t g = 0; g < run.groups; ++g) {
        const std::uint32_t* rows = run.rows + g * GROUP;
        const std::uint16_t* n = run.counts + g * 15;
        vf a[GROUP][V];
#pragma GCC unroll 4
        for (std::size_t r = 0; r < GROUP; ++r) begin(a[r], t, rows[r]);
        run_pattern<V, 1>(n[0], offset, value, x, stride, a);
        run_pattern<V, 2>(n[1], offset, value, x, stride, a);
        run_pattern<V, 3>(n[2], offset, value, x, stride, a);
        run_pattern<V, 4>(n[3], offset, value, x, stride, a);
        run_pattern<V, 5>(n[4], offset, value, x, stride, a);
        run_pattern<V, 6>(n[5], offset, value, x, stride, a);
        run_pattern<V, 7>(n[6], offset, value, x, stride, a);
        run_pattern<V, 8>(n[7], offset, value, x, stride, a);
        run_pattern<V, 9>(n[8], offset, value, x, stride, a);
        run_pattern<V, 10>(n[9], offset, value, x, stride, a);
        run_pattern<V, 11>(n[10], offset, value, x, stride, a);
        run_pattern<V, 12>(n[11], offset, value, x, stride, a);
        run_pattern<V, 13>(n[12], offset, value, x, stride, a);
        run_pattern<V, 14>(n[13], offset, value, x, stride, a);
        run_pattern<V, 15>(n[14], offset, value, x, stride, a);
#pragma GCC unroll 4
        for (std::size_t r = 0; r < GROUP; ++r) finish(a[r], t, rows[r]);
    }
}

template <std::size_t V> void slices(const SliceRun& run, const char* x, std::size_t stride, const StripTarget& t) {
    const std::uint32_t* offset = run.offsets;
    const float* value = run.values;
    for (std::size_t s = 0; s < run.slices; ++s) {
        const std::uint32_t* rows = run.rows + s * SLICE;
        vf a[SLICE][V];
#pragma GCC unroll 8
        for (std::size_t r = 0; r < SLICE; ++r) begin(a[r], t, rows[r]);
        for (std::size_t n = run.steps[s]; n != 0; --n, offset += SLICE, value += SLICE) {
#pragma GCC unroll 8
            for (std::size_t r = 0; r < SLICE; ++r) {
                const float* at = reinterpret_cast<const float*>(x + offset[r] * stride);
                const vf w = set1(value[r]);
                for (std::size_t v = 0; v < V; ++v) a[r][v] = fma(w, load(at + v * LANES), a[r][v]);
            }
        }
#pragma GCC unroll 8
        for (std::size_t r = 0; r < SLICE; ++r) finish(a[r], t, rows[r]);
    }
}

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

// A tile of 4 rows x V vectors, V vectors of activations and one weight must fit the registers.
constexpr std::size_t WIDEST = REGISTERS >= 32 ? 6 : 2;

template <std::size_t V> constexpr auto at_most() {
    if constexpr (V <= WIDEST)
        return &groups<V>;
    else
        return static_cast<decltype(&groups<1>)>(nullptr);
}

}  // namespace

const StripKernels strip{LANES,
                         WIDEST,
                         {nullptr, at_most<1>(), at_most<2>(), at_most<3>(), at_most<4>(), at_most<5>(), at_most<6>()},
                         {nullptr, &slices<1>, &slices<2>},
                         &pack,
                         &pack_transposed,
                         &unpack_transposed,
                         &unpack};

}  // namespace rarefy::RAREFY_LEVEL
