// Prices of rows and columns by turns: a row's lies between the last score less column prices that it would keep and the first that
// it would not, and so does a column's. Each turn but the first goes a quarter further than that, which brings them together
// sooner. In 16 bits: prices need not be exact, for the flow is optimal at any.
#pragma once
#include <cstdint>

#include "tile_sort.hpp"
#include "tile_vector.hpp"

namespace rarefy::RAREFY_LEVEL {

// Of G tiles of side m <= L at once: tile g has the lanes from g * L on.
template <int L> class TilePrices {
    using S = std::int16_t;
    static constexpr S least = -30000;

public:
    static constexpr int G = L == 8 ? static_cast<int>(VECTOR / 16) : 1, Z = L * G;
    static constexpr int bits = 12;  // of a score's magnitude; prices and differences then stay within 16

    alignas(64) S by_row[L][Z];
    alignas(64) S by_column[L][Z];
    alignas(64) S column_prices[Z];

    void find(int n, int m, int sweeps) {
        alignas(64) S u[Z] = {};
        for (int p = 0; p < P; ++p) at(column_prices, p) = V{};
        for (int sweep = 0; sweep < sweeps; ++sweep) {
            turn(by_column, column_prices, n, m, sweep == 0, u);
            turn(by_row, u, n, m, sweep == 0, column_prices);
        }
    }

private:
    static constexpr int W = static_cast<int>(VECTOR / 2) < Z ? static_cast<int>(VECTOR / 2) : Z, P = Z / W;
    using V = typename Vector<S, W>::type;

    static void turn(const S (&lines)[L][Z], const S* given, int n, int m, bool first, S* price) {
        for (int p = 0; p < P; ++p) {
            V s[L], last, next;
            for (int k = 0; k < L; ++k) s[k] = k < m ? at(lines[k], p) - spread(given, p, k) : V{} + least;
            ranks<L>(s, n, last, next);
            const V middle = (last & next) + ((last ^ next) >> 1), step = middle - at(price, p);
            at(price, p) = first ? middle : middle + (step >> 2);
        }
    }

    // The k-th price of each tile, in all of its lanes.
    static RAREFY_INLINE V spread(const S* price, int p, int k) {
        if constexpr (G == 1) return V{} + price[k];
        V places{};
        for (int i = 0; i < W; ++i) places[i] = static_cast<S>(i / L * L + k);
        return __builtin_shuffle(at(price, p), places);
    }

    static V& at(S* line, int p) { return reinterpret_cast<V*>(line)[p]; }
    static const V& at(const S* line, int p) { return reinterpret_cast<const V*>(line)[p]; }
};

}  // namespace rarefy::RAREFY_LEVEL
