// Best masks for runs of tiles; compiled without contraction, in whole numbers from the first step on, so that every instruction
// set finds the same.
#include "tile_flow.hpp"
#include "tile_numbers.hpp"
#include "tile_pairs.hpp"
#include "tile_prices.hpp"
#include "transposable.hpp"

namespace rarefy::RAREFY_LEVEL {
namespace {

constexpr int fast_bits = 22, exact_bits = 50, forbidding_bits = 40;

// One tile's scores, line by line; what lies beyond m stays as it is.
template <class X, class N, int L> RAREFY_INLINE void gather(const X* x, const TileRun& run, std::size_t m, N (&lines)[L][L]) {
    if (m == L && run.column == 1) {
        for (std::size_t i = 0; i < L; ++i)
            for (std::size_t j = 0; j < L; ++j) lines[i][j] = static_cast<N>(x[i * run.row + j]);
        return;
    }
    for (std::size_t i = 0; i < m; ++i)
        for (std::size_t j = 0; j < m; ++j) lines[i][j] = static_cast<N>(x[i * run.row + j * run.column]);
}

// Block by block, so that the compiler turns each in registers.
template <class T, int L> RAREFY_INLINE void turn(const T (&from)[L][L], T (&to)[L][L]) {
    constexpr int side = L < 16 ? L : 16;
    for (int a = 0; a < L; a += side)
        for (int b = 0; b < L; b += side)
            for (int i = 0; i < side; ++i)
                for (int j = 0; j < side; ++j) to[b + j][a + i] = from[a + i][b + j];
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

// Runs of tiles solved in whole numbers of type T, from scores held as type N.
template <class T, class N, int L> class Solver {
public:
    Solver(std::size_t n, std::size_t m) : n_(static_cast<int>(n)), m_(static_cast<int>(m)) {}

    template <class X> bool run(const X* x, std::uint8_t* mask, const TileRun& run) {
        for (std::size_t t = 0; t < run.tiles; t += G) {
            const std::size_t here = run.tiles - t < G ? run.tiles - t : G;
            bool fits[G];
            for (std::size_t g = 0; g < here; ++g) fits[g] = read(g, x + (t + g) * run.tile, run);
            prices_.find(n_, m_, sweeps);
            for (std::size_t g = 0; g < here; ++g) {
                if (!fits[g]) {
                    if (!instead(x + (t + g) * run.tile, mask + (t + g) * run.tile, run)) return false;
                    continue;
                }
                alignas(64) T price[L];
                for (std::size_t j = 0; j < L; ++j)
                    price[j] = static_cast<T>(static_cast<T>(prices_.column_prices[g * L + j]) * (T{1} << shift_[g]));
                flow_[g].solve(n_, m_, price);
                scatter(flow_[g], run, static_cast<std::size_t>(m_), mask + (t + g) * run.tile);
            }
        }
        return true;
    }

private:
    static constexpr bool narrow = sizeof(T) == 4;
    static constexpr std::size_t G = TilePrices<L>::G;
    static constexpr int sweeps = L == 8 ? 3 : 4;

    // False where T has no room for what the tile holds.
    template <class X> bool read(std::size_t g, const X* x, const TileRun& run) {
        TileFlow<T, L>& flow = flow_[g];
        gather(x, run, static_cast<std::size_t>(m_), lines_);
        auto top = largest(&lines_[0][0], L * L);
        const bool finite = top < infinity<N>;
        bool forbidden[L][L];
        if (!finite) {
            if (narrow || !forbid(forbidden)) return false;
            top = largest(&lines_[0][0], L * L);
        }
        const int bits = narrow ? fast_bits : finite ? exact_bits : forbidding_bits;
        shift_[g] = bits - TilePrices<L>::bits;
        round_to(&lines_[0][0], L * L, Scale<N>(top, bits), &flow.by_row[0][0]);
        for (std::size_t i = 0; i < L; ++i)
            for (std::size_t j = 0; j < L; ++j)
                prices_.by_row[i][g * L + j] = static_cast<std::int16_t>(flow.by_row[i][j] >> shift_[g]);
        if (!finite)
            for (std::size_t i = 0; i < L; ++i)
                for (std::size_t j = 0; j < L; ++j)
                    if (forbidden[i][j]) {
                        flow.by_row[i][j] = -(T{1} << (forbidding_bits + 12) % (8 * sizeof(T)));
                        prices_.by_row[i][g * L + j] = -(2 << TilePrices<L>::bits);
                    }
        turn(flow.by_row, flow.by_column);
        for (std::size_t i = 0; i < L; ++i)
            for (std::size_t j = 0; j < L; ++j) prices_.by_column[i][g * L + j] = prices_.by_row[j][g * L + i];
        return true;
    }

    // Zero for minus infinity, and where it was; false where something is NaN or plus infinity.
    bool forbid(bool (&forbidden)[L][L]) {
        for (std::size_t i = 0; i < L; ++i)
            for (std::size_t j = 0; j < L; ++j) {
                forbidden[i][j] = lines_[i][j] == -from_bits<N>(infinity<N>);
                if (forbidden[i][j]) lines_[i][j] = 0;
                if (!(lines_[i][j] < from_bits<N>(infinity<N>))) return false;
            }
        return true;
    }

    // One tile in 64 bits, where what is minus infinity can cost more than the rest of a tile can win: 2 n m <= 2^11 times the largest.
    template <class X> bool instead(const X* x, std::uint8_t* mask, const TileRun& run) {
        if constexpr (narrow) {
            Solver<std::int64_t, double, L> wide(static_cast<std::size_t>(n_), static_cast<std::size_t>(m_));
            return wide.run(x, mask, TileRun{1, run.tile, run.row, run.column});
        } else {
            return false;
        }
    }

    int n_, m_, shift_[G];
    alignas(64) N lines_[L][L] = {};
    TileFlow<T, L> flow_[G];
    TilePrices<L> prices_{};
};

template <class T, class N, class X>
bool solve(const X* x, std::uint8_t* mask, TileRun run, std::size_t n, std::size_t m) {
    if (m <= 8) return Solver<T, N, 8>(n, m).run(x, mask, run);
    return m <= 16 ? Solver<T, N, 16>(n, m).run(x, mask, run) : Solver<T, N, 32>(n, m).run(x, mask, run);
}

// 2:4: 16 tiles at a time, a lane for each.
template <class T, class N, class X> bool solve_pairs(const X* x, std::uint8_t* mask, const TileRun& run) {
    constexpr std::size_t lanes = Pairs<T>::lanes;
    constexpr int bits = sizeof(T) == 4 ? fast_bits : exact_bits;
    alignas(64) N scores[16][lanes] = {};
    Pairs<T> pairs;
    for (std::size_t t = 0; t < run.tiles; t += lanes) {
        const std::size_t here = run.tiles - t < lanes ? run.tiles - t : lanes;
        for (std::size_t at = 0; at < 16; ++at) {
            const X* from = x + t * run.tile + at / 4 * run.row + at % 4 * run.column;
            for (std::size_t g = 0; g < here; ++g) scores[at][g] = static_cast<N>(from[g * run.tile]);
        }
        typename FloatBits<N>::type top[lanes] = {};
        for (std::size_t at = 0; at < 16; ++at)
            for (std::size_t g = 0; g < lanes; ++g) {
                const auto size = magnitude(scores[at][g]);
                top[g] = size > top[g] ? size : top[g];
            }
        N first[lanes], second[lanes];
        for (std::size_t g = 0; g < lanes; ++g) {
            const Scale<N> scale(top[g] < infinity<N> ? top[g] : 0, bits);
            first[g] = scale.first;
            second[g] = scale.second;
        }
        for (std::size_t at = 0; at < 16; ++at)
            for (std::size_t g = 0; g < lanes; ++g)
                pairs.q[at / 4][at % 4][g] = top[g] < infinity<N> ? rounded<T>(scores[at][g] * first[g] * second[g]) : T{0};
        pairs.solve();
        for (std::size_t g = 0; g < here; ++g) {
            const std::size_t start = (t + g) * run.tile;
            if (top[g] >= infinity<N>) {
                Solver<std::int64_t, double, 8> wide(2, 4);
                if (!wide.run(x + start, mask + start, TileRun{1, run.tile, run.row, run.column})) return false;
                continue;
            }
            const auto best = static_cast<std::uint32_t>(pairs.best[g]);
            for (std::size_t i = 0; i < 4; ++i) {
                std::uint8_t* to = mask + start + i * run.row;
                for (std::size_t j = 0; j < 4; ++j) to[j * run.column] = (best >> (4 * i + j)) & 1;
            }
        }
    }
    return true;
}

template <class X> bool fast(const X* x, std::uint8_t* mask, TileRun run, std::size_t n, std::size_t m) {
    return n == 2 && m == 4 ? solve_pairs<std::int32_t, X>(x, mask, run) : solve<std::int32_t, X>(x, mask, run, n, m);
}

template <class X> bool exact(const X* x, std::uint8_t* mask, TileRun run, std::size_t n, std::size_t m) {
    return n == 2 && m == 4 ? solve_pairs<std::int64_t, double>(x, mask, run) : solve<std::int64_t, double>(x, mask, run, n, m);
}

}  // namespace

extern const TransposableKernels transposable{{fast<float>, exact<float>}, {fast<double>, exact<double>}};

}  // namespace rarefy::RAREFY_LEVEL
