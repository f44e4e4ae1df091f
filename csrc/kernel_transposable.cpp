// Best masks for runs of tiles; compiled without contraction, in whole numbers from the first step on, so that every instruction
// set finds the same.
#include "tile_flow.hpp"
#include "tile_numbers.hpp"
#include "transposable.hpp"

namespace rarefy::RAREFY_LEVEL {
namespace {

constexpr int fast_bits = 22, exact_bits = 50, forbidding_bits = 40, sweeps = 2;

// One tile's scores, line by line, padded with zeros.
template <class X, int L> RAREFY_INLINE void gather(const X* x, const TileRun& run, std::size_t m, X (&lines)[L][L]) {
    if (m == L && run.column == 1) {
        for (std::size_t i = 0; i < L; ++i) std::memcpy(lines[i], x + i * run.row, L * sizeof(X));
        return;
    }
    for (std::size_t i = 0; i < m; ++i)
        for (std::size_t j = 0; j < m; ++j) lines[i][j] = x[i * run.row + j * run.column];
}

template <class T, int L> RAREFY_INLINE void turn(const T (&from)[L][L], T (&to)[L][L]) {
    for (int i = 0; i < L; ++i)
        for (int j = 0; j < L; ++j) to[j][i] = from[i][j];
}

template <class T, int L>
RAREFY_INLINE void scatter(const TileFlow<T, L>& flow, const TileRun& run, std::size_t m, std::uint8_t* mask) {
    if (m == L && run.column == 1) {
        for (std::size_t i = 0; i < L; ++i) {
            std::uint8_t bytes[L];
            for (int j = 0; j < L; ++j) bytes[j] = flow.kept(static_cast<int>(i), j) ? 1 : 0;
            std::memcpy(mask + i * run.row, bytes, L);
        }
        return;
    }
    for (std::size_t i = 0; i < m; ++i)
        for (std::size_t j = 0; j < m; ++j)
            mask[i * run.row + j * run.column] = flow.kept(static_cast<int>(i), static_cast<int>(j)) ? 1 : 0;
}

// Any scores, in 64 bits; what is minus infinity costs more than the whole rest of a tile can win: 2 n m <= 2^11 times the largest.
template <class X, int L>
bool exact_tile(const X* x, std::uint8_t* mask, const TileRun& run, std::size_t n, std::size_t m) {
    double lines[L][L] = {};
    bool forbidden[L][L] = {}, any = false;
    for (std::size_t i = 0; i < m; ++i)
        for (std::size_t j = 0; j < m; ++j) {
            const double score = static_cast<double>(x[i * run.row + j * run.column]);
            if (!(score < from_bits<double>(infinity<double>))) return false;
            forbidden[i][j] = score == -from_bits<double>(infinity<double>);
            any = any || forbidden[i][j];
            lines[i][j] = forbidden[i][j] ? 0.0 : score;
        }
    TileFlow<std::int64_t, L> flow;
    const Scale<double> scale(largest(&lines[0][0], L * L), any ? forbidding_bits : exact_bits);
    round_to(&lines[0][0], L * L, scale, &flow.by_row[0][0]);
    if (any)
        for (int i = 0; i < L; ++i)
            for (int j = 0; j < L; ++j)
                if (forbidden[i][j]) flow.by_row[i][j] = -(std::int64_t{1} << (forbidding_bits + 12));
    turn(flow.by_row, flow.by_column);
    flow.solve(static_cast<int>(n), static_cast<int>(m), sweeps);
    scatter(flow, run, m, mask);
    return true;
}

template <class X, int L>
bool exact_side(const X* x, std::uint8_t* mask, TileRun run, std::size_t n, std::size_t m) {
    for (std::size_t t = 0; t < run.tiles; ++t)
        if (!exact_tile<X, L>(x + t * run.tile, mask + t * run.tile, run, n, m)) return false;
    return true;
}

template <class X, int L> bool fast_side(const X* x, std::uint8_t* mask, TileRun run, std::size_t n, std::size_t m) {
    alignas(64) X lines[L][L] = {};
    TileFlow<std::int32_t, L> flow;
    for (std::size_t t = 0; t < run.tiles; ++t) {
        gather(x + t * run.tile, run, m, lines);
        const auto top = largest(&lines[0][0], L * L);
        if (top >= infinity<X>) {
            if (!exact_tile<X, L>(x + t * run.tile, mask + t * run.tile, run, n, m)) return false;
            continue;
        }
        round_to(&lines[0][0], L * L, Scale<X>(top, fast_bits), &flow.by_row[0][0]);
        turn(flow.by_row, flow.by_column);
        flow.solve(static_cast<int>(n), static_cast<int>(m), sweeps);
        scatter(flow, run, m, mask + t * run.tile);
    }
    return true;
}

template <class X> bool fast(const X* x, std::uint8_t* mask, TileRun run, std::size_t n, std::size_t m) {
    if (m <= 8) return fast_side<X, 8>(x, mask, run, n, m);
    return m <= 16 ? fast_side<X, 16>(x, mask, run, n, m) : fast_side<X, 32>(x, mask, run, n, m);
}

template <class X> bool exact(const X* x, std::uint8_t* mask, TileRun run, std::size_t n, std::size_t m) {
    if (m <= 8) return exact_side<X, 8>(x, mask, run, n, m);
    return m <= 16 ? exact_side<X, 16>(x, mask, run, n, m) : exact_side<X, 32>(x, mask, run, n, m);
}

}  // namespace

extern const TransposableKernels transposable{{fast<float>, exact<float>}, {fast<double>, exact<double>}};

}  // namespace rarefy::RAREFY_LEVEL
