#include "n_m.hpp"
#include "simd_math.hpp"

namespace rarefy::RAREFY_LEVEL {
namespace {

constexpr std::size_t T = NM_TILE;

// Where a step finds its inputs (inverse: its outputs), lane by lane.
inline unsigned place(const std::int32_t* index, std::size_t step, std::size_t lane, bool inverse) {
    const auto word = static_cast<std::uint32_t>(index[step / NM_LINE * T + lane]);
    return word >> (step % NM_LINE * 4 + (inverse ? 16 : 0)) & 15u;
}

#if defined(__AVX512F__)

#define ALWAYS_INLINE inline __attribute__((always_inline))

inline vf permute(vf x, __m512i which) { return _mm512_permutexvar_ps(which, x); }  // by the low four bits of each lane
inline __m512i load_line(const std::int32_t* p) { return _mm512_loadu_si512(p); }
inline vf load_part(const float* p, std::size_t n) { return n == T ? load(p) : load_first(p, n); }

// One tile of inputs: x times the tile's weights into the sums of one tile of outputs.
template <std::size_t S>
ALWAYS_INLINE void steps(const vf (&x)[S], const float* w, const std::int32_t* index, std::size_t n, vf (&sums)[S]) {
    for (; n >= NM_LINE; n -= NM_LINE, index += T, w += NM_LINE * T) {
        __m512i line = load_line(index);
#pragma GCC unroll 4
        for (std::size_t step = 0; step < NM_LINE; ++step) {
            const vf weights = load(w + step * T);
#pragma GCC unroll 8
            for (std::size_t s = 0; s < S; ++s) sums[s] = fma(weights, permute(x[s], line), sums[s]);
            line = _mm512_srli_epi32(line, 4);
        }
    }
    if (n == 0) return;
    for (__m512i line = load_line(index); n != 0; --n, w += T) {
        const vf weights = load(w);
#pragma GCC unroll 8
        for (std::size_t s = 0; s < S; ++s) sums[s] = fma(weights, permute(x[s], line), sums[s]);
        line = _mm512_srli_epi32(line, 4);
    }
}

template <std::size_t R, std::size_t S>
void tile(const NMRun& run, const float* x, std::size_t x_ld, float* y, std::size_t y_ld) {
    vf sums[R][S];
#pragma GCC unroll 2
    for (std::size_t r = 0; r < R; ++r) {
        const vf start = run.bias == nullptr ? zero() : load_part(run.bias + r * T, r + 1 == R ? run.tail : T);
#pragma GCC unroll 8
        for (std::size_t s = 0; s < S; ++s) sums[r][s] = start;
    }
    const float* w = run.values;
    const std::int32_t* index = run.index;
    const std::size_t w_step = run.steps * T, index_step = (run.steps + NM_LINE - 1) / NM_LINE * T;
    vf now[S];
    for (std::size_t k = 1; k < run.tiles; ++k, x += T, w += w_step, index += index_step) {
#pragma GCC unroll 8
        for (std::size_t s = 0; s < S; ++s) now[s] = load(x + s * x_ld);
#pragma GCC unroll 2
        for (std::size_t r = 0; r < R; ++r) steps<S>(now, w + r * run.value_step, index + r * run.index_step, run.steps, sums[r]);
    }
#pragma GCC unroll 8
    for (std::size_t s = 0; s < S; ++s) now[s] = load_part(x + s * x_ld, run.last);
#pragma GCC unroll 2
    for (std::size_t r = 0; r < R; ++r) steps<S>(now, w + r * run.value_step, index + r * run.index_step, run.steps, sums[r]);
#pragma GCC unroll 2
    for (std::size_t r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (std::size_t s = 0; s < S; ++s) {
            const vf v = run.act == Act::none ? sums[r][s] : activate(sums[r][s], run.act);
            float* to = y + s * y_ld + r * T;
            if (r + 1 < R || run.tail == T) store(to, v);
            else store_first(to, v, run.tail);
        }
}

using Tile = void (*)(const NMRun&, const float*, std::size_t, float*, std::size_t);
constexpr Tile tile_loops[NM_OUTPUTS][NM_SAMPLES] = {
    {&tile<1, 1>, &tile<1, 2>, &tile<1, 3>, &tile<1, 4>, &tile<1, 5>, &tile<1, 6>, &tile<1, 7>, &tile<1, 8>},
    {&tile<2, 1>, &tile<2, 2>, &tile<2, 3>, &tile<2, 4>, &tile<2, 5>, &tile<2, 6>, &tile<2, 7>, &tile<2, 8>}};

void product(const NMRun& run, std::size_t outputs, std::size_t samples, const float* x, std::size_t x_ld, float* y, std::size_t y_ld) {
    tile_loops[outputs - 1][samples - 1](run, x, x_ld, y, y_ld);
}

// `n` steps of each of C neighbouring tiles, all in registers while the samples pass by.
template <std::size_t C, std::size_t N> void some_dots(const NMDots& d, std::size_t tile, std::size_t step) {
    vf sums[C][N];
    __m512i which[C][N];
    const std::size_t index_step = (d.steps + NM_LINE - 1) / NM_LINE * T;
    float* const out = d.out + (tile * d.steps + step) * T;
#pragma GCC unroll 12
    for (std::size_t c = 0; c < C; ++c)
#pragma GCC unroll 12
        for (std::size_t n = 0; n < N; ++n) {
            const std::size_t at = step + n;
            which[c][n] = _mm512_srl_epi32(load_line(d.index + (tile + c) * index_step + at / NM_LINE * T),
                                           _mm_cvtsi32_si128(static_cast<int>(at % NM_LINE * 4)));
            sums[c][n] = d.add ? load(out + (c * d.steps + n) * T) : zero();
        }
    const float *x = d.x + tile * d.x_step, *dy = d.dy;
    for (std::size_t s = 0; s < d.samples; ++s, x += T, dy += T) {
        const vf g = load(dy);
#pragma GCC unroll 12
        for (std::size_t c = 0; c < C; ++c) {
            const vf now = load(x + c * d.x_step);
#pragma GCC unroll 12
            for (std::size_t n = 0; n < N; ++n) sums[c][n] = fma(g, permute(now, which[c][n]), sums[c][n]);
        }
    }
#pragma GCC unroll 12
    for (std::size_t c = 0; c < C; ++c)
#pragma GCC unroll 12
        for (std::size_t n = 0; n < N; ++n) store(out + (c * d.steps + n) * T, sums[c][n]);
}

template <std::size_t C, std::size_t N> void tiles_of(const NMDots& d) {
    std::size_t tile = 0;
    for (; tile + C <= d.tiles; tile += C) some_dots<C, N>(d, tile, 0);
    for (; tile < d.tiles; ++tile) some_dots<1, N>(d, tile, 0);
}

void dots(const NMDots& d) {
    switch (d.steps) {
        case 1: return tiles_of<6, 1>(d);
        case 2: return tiles_of<6, 2>(d);
        case 3: return tiles_of<4, 3>(d);
        case 4: return tiles_of<3, 4>(d);
        case 5: return tiles_of<2, 5>(d);
        case 6: return tiles_of<2, 6>(d);
        case 8: return tiles_of<1, 8>(d);
        case 12: return tiles_of<1, 12>(d);
        default: break;
    }
    for (std::size_t tile = 0; tile < d.tiles; ++tile) {
        std::size_t step = 0;
        for (; step + 4 <= d.steps; step += 4) some_dots<1, 4>(d, tile, step);
        for (; step < d.steps; ++step) some_dots<1, 1>(d, tile, step);
    }
}

void turn(const float* values, const std::int32_t* index, std::size_t steps, float* to_values, std::int32_t* to_index) {
    for (std::size_t step = 0; step < steps; ++step) {
        __m512i line = load_line(index + step / NM_LINE * T);
        if (step % NM_LINE == 0) _mm512_storeu_si512(to_index + step / NM_LINE * T, _mm512_rol_epi32(line, 16));
        line = _mm512_srl_epi32(line, _mm_cvtsi32_si128(static_cast<int>(16 + step % NM_LINE * 4)));
        store(to_values + step * T, permute(load(values + step * T), line));
    }
}

void strips(const float* values, const std::int32_t* index, std::size_t steps, bool inverse, std::size_t first, float* to_values,
            std::uint16_t* to_offsets, std::size_t quad_step) {
    const __m512i base = _mm512_set1_epi32(static_cast<int>(first)), low = _mm512_set1_epi32(15);
    for (std::size_t step = 0; step < steps; ++step, to_values += QUAD, to_offsets += QUAD) {
        const int shift = static_cast<int>(step % NM_LINE * 4 + (inverse ? 16 : 0));
        const __m512i line = _mm512_srl_epi32(load_line(index + step / NM_LINE * T), _mm_cvtsi32_si128(shift));
        const vf given = load(values + step * T), w = inverse ? permute(given, line) : given;
        const __m256i at = _mm512_cvtepi32_epi16(_mm512_add_epi32(_mm512_and_si512(line, low), base));
        const __m128i halves[2] = {_mm256_castsi256_si128(at), _mm256_extracti128_si256(at, 1)};
        _mm_storeu_ps(to_values, _mm512_castps512_ps128(w));
        _mm_storeu_ps(to_values + quad_step, _mm512_extractf32x4_ps(w, 1));
        _mm_storeu_ps(to_values + 2 * quad_step, _mm512_extractf32x4_ps(w, 2));
        _mm_storeu_ps(to_values + 3 * quad_step, _mm512_extractf32x4_ps(w, 3));
        for (std::size_t h = 0; h < 2; ++h) {
            _mm_storel_epi64(reinterpret_cast<__m128i*>(to_offsets + 2 * h * quad_step), halves[h]);
            _mm_storel_epi64(reinterpret_cast<__m128i*>(to_offsets + (2 * h + 1) * quad_step), _mm_unpackhi_epi64(halves[h], halves[h]));
        }
    }
}

// Where a step's weights stand in the dense matrix, from the tile's corner, and which of them stand in it.
struct Places {
    __m512i at;
    __mmask16 real;
    Places(const std::int32_t* index, std::size_t step, std::uint16_t used, std::size_t ld, std::size_t rows, std::size_t cols) {
        const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(step % NM_LINE * 4));
        const __m512i line = _mm512_srl_epi32(load_line(index + step / NM_LINE * T), shift);
        const __m512i col = _mm512_and_epi32(line, _mm512_set1_epi32(15));
        const __m512i row = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        at = _mm512_add_epi32(_mm512_mullo_epi32(row, _mm512_set1_epi32(static_cast<int>(ld))), col);
        const __mmask16 in_rows = _mm512_mask_cmplt_epi32_mask(used, row, _mm512_set1_epi32(static_cast<int>(rows)));
        real = _mm512_mask_cmplt_epi32_mask(in_rows, col, _mm512_set1_epi32(static_cast<int>(cols)));
    }
};

constexpr std::size_t AHEAD = 8 * T;  // a tile is a line of each of 16 rows: no prefetcher sees them coming

void gather(const float* weight, std::size_t ld, std::size_t rows, std::size_t cols, const std::int32_t* index, const std::uint16_t* used,
            std::size_t steps, float* values) {
    for (std::size_t r = 0; r < T; ++r) __builtin_prefetch(weight + r * ld + AHEAD);
    for (std::size_t step = 0; step < steps; ++step) {
        const Places places(index, step, used[step], ld, rows, cols);
        store(values + step * T, _mm512_mask_i32gather_ps(zero(), places.real, places.at, weight, 4));
    }
}

void scatter(const float* values, const std::int32_t* index, const std::uint16_t* used, std::size_t steps, float* weight, std::size_t ld,
             std::size_t rows, std::size_t cols) {
    for (std::size_t step = 0; step < steps; ++step) {
        const Places places(index, step, used[step], ld, rows, cols);
        _mm512_mask_i32scatter_ps(weight, places.real, places.at, load(values + step * T), 4);
    }
}

#else

constexpr std::size_t HALVES = T / LANES;

// A step's 16 inputs out of a tile's, in vectors.
#if defined(__AVX2__)
struct Step {
    __m256i which[2];
    Step(const std::int32_t* index, std::size_t step) {
        const __m128i by = _mm_cvtsi32_si128(static_cast<int>(step % NM_LINE * 4));
        for (std::size_t h = 0; h < 2; ++h)
            which[h] = _mm256_srl_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(index + step / NM_LINE * T + h * LANES)), by);
    }
    void pick(const float* x, vf (&to)[HALVES]) const {
        const vf low = load(x), high = load(x + LANES);
        for (std::size_t h = 0; h < 2; ++h)
            to[h] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, which[h]), _mm256_permutevar8x32_ps(high, which[h]),
                                     _mm256_castsi256_ps(_mm256_slli_epi32(which[h], 28)));
    }
};
#else
struct Step {
    unsigned which[T];
    Step(const std::int32_t* index, std::size_t step) {
        for (std::size_t i = 0; i < T; ++i) which[i] = place(index, step, i, false);
    }
    void pick(const float* x, vf (&to)[HALVES]) const {
        float some[T];
        for (std::size_t i = 0; i < T; ++i) some[i] = x[which[i]];
        for (std::size_t h = 0; h < HALVES; ++h) to[h] = load(some + h * LANES);
    }
};
#endif

// n floats in vectors; the rest is zero, and is neither read nor written.
inline void load_part(const float* p, std::size_t n, vf (&to)[HALVES]) {
    for (std::size_t h = 0; h < HALVES; ++h) {
        const std::size_t at = h * LANES;
        to[h] = n >= at + LANES ? load(p + at) : n > at ? load_first(p + at, n - at) : zero();
    }
}
inline void store_part(float* p, const vf (&from)[HALVES], std::size_t n) {
    for (std::size_t h = 0; h < HALVES; ++h) {
        const std::size_t at = h * LANES;
        if (n >= at + LANES) store(p + at, from[h]);
        else if (n > at) store_first(p + at, from[h], n - at);
    }
}

void product(const NMRun& run, std::size_t outputs, std::size_t samples, const float* x, std::size_t x_ld, float* y, std::size_t y_ld) {
    const std::size_t lines = (run.steps + NM_LINE - 1) / NM_LINE;
    for (std::size_t r = 0; r < outputs; ++r) {
        const std::size_t here = r + 1 == outputs ? run.tail : T;
        vf sums[NM_SAMPLES][HALVES], start[HALVES];
        if (run.bias == nullptr)
            for (auto& v : start) v = zero();
        else
            load_part(run.bias + r * T, here, start);
        for (std::size_t s = 0; s < samples; ++s)
            for (std::size_t h = 0; h < HALVES; ++h) sums[s][h] = start[h];
        const float* w = run.values + r * run.value_step;
        const std::int32_t* index = run.index + r * run.index_step;
        for (std::size_t k = 0; k < run.tiles; ++k, index += lines * T) {
            const bool part = k + 1 == run.tiles && run.last < T;
            float padded[NM_SAMPLES][T];
            if (part)
                for (std::size_t s = 0; s < samples; ++s) {
                    vf tile[HALVES];
                    load_part(x + s * x_ld + k * T, run.last, tile);
                    store_part(padded[s], tile, T);
                }
            for (std::size_t step = 0; step < run.steps; ++step, w += T) {
                const Step which(index, step);
                for (std::size_t s = 0; s < samples; ++s) {
                    vf picked[HALVES];
                    which.pick(part ? padded[s] : x + s * x_ld + k * T, picked);
                    for (std::size_t h = 0; h < HALVES; ++h) sums[s][h] = fma(load(w + h * LANES), picked[h], sums[s][h]);
                }
            }
        }
        for (std::size_t s = 0; s < samples; ++s) {
            for (auto& v : sums[s]) v = activate(v, run.act);
            store_part(y + s * y_ld + r * T, sums[s], here);
        }
    }
}

void dots(const NMDots& d) {
    const std::size_t lines = (d.steps + NM_LINE - 1) / NM_LINE;
    for (std::size_t tile = 0; tile < d.tiles; ++tile)
        for (std::size_t step = 0; step < d.steps; ++step) {
            const Step which(d.index + tile * lines * T, step);
            float* const out = d.out + (tile * d.steps + step) * T;
            vf sums[HALVES];
            for (std::size_t h = 0; h < HALVES; ++h) sums[h] = d.add ? load(out + h * LANES) : zero();
            for (std::size_t s = 0; s < d.samples; ++s) {
                vf picked[HALVES];
                which.pick(d.x + tile * d.x_step + s * T, picked);
                for (std::size_t h = 0; h < HALVES; ++h) sums[h] = fma(load(d.dy + s * T + h * LANES), picked[h], sums[h]);
            }
            for (std::size_t h = 0; h < HALVES; ++h) store(out + h * LANES, sums[h]);
        }
}

void turn(const float* values, const std::int32_t* index, std::size_t steps, float* to_values, std::int32_t* to_index) {
    for (std::size_t step = 0; step < steps; ++step) {
        if (step % NM_LINE == 0)
            for (std::size_t i = step / NM_LINE * T, end = i + T; i < end; ++i) {
                const auto word = static_cast<std::uint32_t>(index[i]);
                to_index[i] = static_cast<std::int32_t>(word << 16 | word >> 16);
            }
        for (std::size_t i = 0; i < T; ++i) to_values[step * T + i] = values[step * T + place(index, step, i, true)];
    }
}

void strips(const float* values, const std::int32_t* index, std::size_t steps, bool inverse, std::size_t first, float* to_values,
            std::uint16_t* to_offsets, std::size_t quad_step) {
    for (std::size_t step = 0; step < steps; ++step)
        for (std::size_t i = 0; i < T; ++i) {
            const unsigned from = place(index, step, i, inverse);
            const std::size_t to = i / QUAD * quad_step + step * QUAD + i % QUAD;
            to_values[to] = values[step * T + (inverse ? from : i)];
            to_offsets[to] = static_cast<std::uint16_t>(first + from);
        }
}

void gather(const float* weight, std::size_t ld, std::size_t rows, std::size_t cols, const std::int32_t* index, const std::uint16_t* used,
            std::size_t steps, float* values) {
    for (std::size_t step = 0; step < steps; ++step)
        for (std::size_t i = 0; i < T; ++i) {
            const unsigned col = place(index, step, i, false);
            values[step * T + i] = (used[step] >> i & 1) != 0 && i < rows && col < cols ? weight[i * ld + col] : 0.0f;
        }
}

void scatter(const float* values, const std::int32_t* index, const std::uint16_t* used, std::size_t steps, float* weight, std::size_t ld,
             std::size_t rows, std::size_t cols) {
    for (std::size_t step = 0; step < steps; ++step)
        for (std::size_t i = 0; i < rows; ++i) {
            const unsigned col = place(index, step, i, false);
            if ((used[step] >> i & 1) != 0 && col < cols) weight[i * ld + col] = values[step * T + i];
        }
}

#endif

}  // namespace

const NMKernels n_m{LANES == T, &product, &dots, &turn, &strips, &gather, &scatter};

}  // namespace rarefy::RAREFY_LEVEL
