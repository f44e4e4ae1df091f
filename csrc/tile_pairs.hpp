// 2:4 in both directions: the best of the 90 masks, found for 16 tiles at once. The two upper rows keep a pair of columns each, and
// what they leave over decides the sums of the two lower ones: the same pair twice (6 ways; below, the other two columns twice), two
// pairs that share a column (12 ways, in either order; below, the same around the column that they left out), or two pairs that
// share none (6 ways, above and below by themselves): 6 + 12 * 2 * 2 + 6 * 6 = 90.
#pragma once
#include <cstdint>
#include <cstring>

#include "tile_numbers.hpp"
#include "tile_vector.hpp"

namespace rarefy::RAREFY_LEVEL {

template <class T> class Pairs {
public:
    static constexpr std::size_t lanes = 16;

    alignas(64) T q[4][4][lanes];  // scores of entry (i, j) of every tile
    alignas(64) T best[lanes];     // bit 4 i + j: entry (i, j) is kept

    void solve() {
        for (int p = 0; p < parts; ++p) solve(p);
    }

private:
    static constexpr int W = VECTOR / sizeof(T) < lanes ? static_cast<int>(VECTOR / sizeof(T)) : static_cast<int>(lanes),
                         parts = static_cast<int>(lanes) / W;
    using V = typename Vector<T, W>::type;

    struct Choice {
        V worth, mask;
        RAREFY_INLINE void offer(V other, V its_mask) {
            const auto better = other > worth;
            worth = better ? other : worth;
            mask = better ? its_mask : mask;
        }
    };

    static constexpr int pair(int a, int b) { return a < b ? a * (5 - a) / 2 + b - 1 : pair(b, a); }  // 01 02 03 12 13 23
    static constexpr int bits(int a, int b) { return 1 << a | 1 << b; }

    RAREFY_INLINE void solve(int p) {
        V rows[4][6];
        for (int i = 0; i < 4; ++i)
            for (int a = 0; a < 4; ++a)
                for (int b = a + 1; b < 4; ++b) rows[i][pair(a, b)] = at(i, a, p) + at(i, b, p);
        // Rows i and i + 1 keep two different pairs, in the better order.
        const auto either = [&](int i, int a, int b, int c, int d) {
            const int first = bits(a, b), second = bits(c, d), up = 4 * i;
            Choice found{rows[i][pair(a, b)] + rows[i + 1][pair(c, d)], V{} + static_cast<T>(first << up | second << (up + 4))};
            found.offer(rows[i][pair(c, d)] + rows[i + 1][pair(a, b)], V{} + static_cast<T>(second << up | first << (up + 4)));
            return found;
        };
        const auto apart = [&](int i) {
            Choice found = either(i, 0, 1, 2, 3);
            const Choice crossed = either(i, 0, 2, 1, 3), outer = either(i, 0, 3, 1, 2);
            found.offer(crossed.worth, crossed.mask);
            found.offer(outer.worth, outer.mask);
            return found;
        };
        const Choice above = apart(0), below = apart(2);
        Choice found{above.worth + below.worth, above.mask | below.mask};
#pragma GCC unroll 4
        for (int x = 0; x < 4; ++x)
#pragma GCC unroll 4
            for (int y = 0; y < 4; ++y) {
                if (x == y) continue;
                const int z = x == 0 || y == 0 ? (x == 1 || y == 1 ? 2 : 1) : 0, w = 6 - x - y - z;
                if (x < y) {
                    const int twice = bits(x, y) * 0x11, others = bits(z, w) * 0x1100;
                    found.offer(rows[0][pair(x, y)] + rows[1][pair(x, y)] + rows[2][pair(z, w)] + rows[3][pair(z, w)],
                                V{} + static_cast<T>(twice | others));
                }
                const Choice share = either(0, x, z, x, w), rest = either(2, y, z, y, w);
                found.offer(share.worth + rest.worth, share.mask | rest.mask);
            }
        reinterpret_cast<V*>(best)[p] = found.mask;
    }

    const V& at(int i, int j, int p) const { return reinterpret_cast<const V*>(q[i][j])[p]; }
};

}  // namespace rarefy::RAREFY_LEVEL
