// The loops over packed weights, for any arithmetic on words of 32 bits: a float, two bfloat16, or four bytes.
//
// `Arithmetic::mac(sum, w, x)` adds w times x to the sums; sums, weights and activations travel as vectors of floats, whatever
// their bits mean. Included by kernel_*.cpp only.
#pragma once
#include "simd_math.hpp"
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

template <class Arithmetic, std::size_t V, unsigned PATTERN>
ALWAYS_INLINE void run_pattern(std::size_t n, const std::uint16_t*& offset, const float*& value, const char* x, std::size_t stride,
                               vf (&a)[GROUP][V]) {
    for (; n != 0; --n) {
        const float* at = reinterpret_cast<const float*>(x + *offset++ * stride);
        if constexpr ((PATTERN & (PATTERN - 1)) == 0) {
            constexpr int row = __builtin_ctz(PATTERN);
            const vf w = set1(*value++);
            for (std::size_t v = 0; v < V; ++v) a[row][v] = Arithmetic::mac(a[row][v], w, load(at + v * LANES));
        } else {
            vf columns[V];
            for (std::size_t v = 0; v < V; ++v) columns[v] = load(at + v * LANES);
#pragma GCC unroll 4
            for (unsigned row = 0; row < GROUP; ++row)
                if (PATTERN >> row & 1) {
                    const vf w = set1(*value++);
                    for (std::size_t v = 0; v < V; ++v) a[row][v] = Arithmetic::mac(a[row][v], w, columns[v]);
                }
        }
    }
}

template <class Arithmetic, std::size_t V> void groups(const GroupRun& run, const char* x, std::size_t stride, const StripTarget& t) {
    const std::uint16_t* offset = run.offsets;
    const float* value = run.values;
    for (std::size_t g = 0; g < run.groups; ++g) {
        const std::uint32_t* rows = run.rows + g * GROUP;
        const std::uint16_t* n = run.counts + g * 15;
        vf a[GROUP][V];
#pragma GCC unroll 4
        for (std::size_t r = 0; r < GROUP; ++r) begin(a[r], t, rows[r]);
        run_pattern<Arithmetic, V, 1>(n[0], offset, value, x, stride, a);
        run_pattern<Arithmetic, V, 2>(n[1], offset, value, x, stride, a);
        run_pattern<Arithmetic, V, 3>(n[2], offset, value, x, stride, a);
        run_pattern<Arithmetic, V, 4>(n[3], offset, value, x, stride, a);
        run_pattern<Arithmetic, V, 5>(n[4], offset, value, x, stride, a);
        run_pattern<Arithmetic, V, 6>(n[5], offset, value, x, stride, a);
        run_pattern<Arithmetic, V, 7>(n[6], offset, value, x, stride, a);
        run_pattern<Arithmetic, V, 8>(n[7], offset, value, x, stride, a);
        run_pattern<Arithmetic, V, 9>(n[8], offset, value, x, stride, a);
        run_pattern<Arithmetic, V, 10>(n[9], offset, value, x, stride, a);
        run_pattern<Arithmetic, V, 11>(n[10], offset, value, x, stride, a);
        run_pattern<Arithmetic, V, 12>(n[11], offset, value, x, stride, a);
        run_pattern<Arithmetic, V, 13>(n[12], offset, value, x, stride, a);
        run_pattern<Arithmetic, V, 14>(n[13], offset, value, x, stride, a);
        run_pattern<Arithmetic, V, 15>(n[14], offset, value, x, stride, a);
#pragma GCC unroll 4
        for (std::size_t r = 0; r < GROUP; ++r) finish(a[r], t, rows[r]);
    }
}

template <class Arithmetic, std::size_t V> ALWAYS_INLINE void one_row(vf (&a)[V], vf w, const char* x) {
    const float* at = reinterpret_cast<const float*>(x);
    for (std::size_t v = 0; v < V; ++v) a[v] = Arithmetic::mac(a[v], w, load(at + v * LANES));
}

template <class Arithmetic, std::size_t R, std::size_t V>
void slices(const SliceRun& run, const char* x, std::size_t stride, const StripTarget& t) {
    const std::uint16_t* offset = run.offsets;
    const float* value = run.values;
    for (std::size_t s = 0; s < run.slices; ++s) {
        const std::uint32_t* rows = run.rows + s * R;
        vf a[R][V];
#pragma GCC unroll 8
        for (std::size_t r = 0; r < R; ++r) begin(a[r], t, rows[r]);
        for (std::size_t n = run.steps[s]; n != 0; --n, offset += R, value += R) {
#pragma GCC unroll 2
            for (std::size_t r = 0; r < R; r += 4) {
                const vf four = load_four(value + r);
                one_row<Arithmetic>(a[r], spread<0>(four), x + offset[r] * stride);
                one_row<Arithmetic>(a[r + 1], spread<1>(four), x + offset[r + 1] * stride);
                one_row<Arithmetic>(a[r + 2], spread<2>(four), x + offset[r + 2] * stride);
                one_row<Arithmetic>(a[r + 3], spread<3>(four), x + offset[r + 3] * stride);
            }
        }
#pragma GCC unroll 8
        for (std::size_t r = 0; r < R; ++r) finish(a[r], t, rows[r]);
    }
}

// A tile of 4 rows x V vectors, V vectors of activations (none for rows in step) and one weight must fit the registers.
constexpr std::size_t WIDEST = REGISTERS >= 32 ? MOST_VECTORS : 2, WIDEST_QUAD = REGISTERS >= 32 ? MOST_VECTORS : 3;

template <class Arithmetic, std::size_t V> constexpr auto group_loop() {
    if constexpr (V <= WIDEST) return &groups<Arithmetic, V>;
    else return static_cast<decltype(&groups<Arithmetic, 1>)>(nullptr);
}

template <class Arithmetic, std::size_t V> constexpr auto quad_loop() {
    if constexpr (V <= WIDEST_QUAD) return &slices<Arithmetic, QUAD, V>;
    else return static_cast<decltype(&slices<Arithmetic, QUAD, 1>)>(nullptr);
}

template <class A> constexpr StripLoops loops() {
    return {{nullptr, group_loop<A, 1>(), group_loop<A, 2>(), group_loop<A, 3>(), group_loop<A, 4>()},
            {nullptr, quad_loop<A, 1>(), quad_loop<A, 2>(), quad_loop<A, 3>(), quad_loop<A, 4>()},
            {nullptr, &slices<A, SLICE, 1>, &slices<A, SLICE, 2>}};
}

}  // namespace
}  // namespace rarefy::RAREFY_LEVEL
