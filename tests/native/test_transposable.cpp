#include "check.hpp"
#include "transposable.hpp"

#include <limits>

using check::Exact;
using check::pick;

namespace {

// The optimum's certificate: no cycle of exchanges between rows gains anything (Bellman-Ford over rows, on whole numbers).
bool optimal(const std::vector<std::int64_t>& q, const std::vector<std::uint8_t>& kept, std::size_t m) {
    constexpr std::int64_t none = std::numeric_limits<std::int64_t>::min() / 4;
    std::vector<std::int64_t> gain(m * m, none), reach(m, 0);
    for (std::size_t i = 0; i < m; ++i)
        for (std::size_t k = 0; k < m; ++k)
            for (std::size_t j = 0; j < m; ++j)
                if (kept[i * m + j] != 0 && kept[k * m + j] == 0)
                    gain[i * m + k] = std::max(gain[i * m + k], q[k * m + j] - q[i * m + j]);
    for (std::size_t round = 0; round <= m; ++round) {
        bool better = false;
        for (std::size_t i = 0; i < m; ++i)
            for (std::size_t k = 0; k < m; ++k)
                if (gain[i * m + k] > none && reach[i] + gain[i * m + k] > reach[k]) {
                    reach[k] = reach[i] + gain[i * m + k];
                    better = true;
                }
        if (!better) return true;
    }
    return false;
}

template <class X> void compare() {
    for (int round = 0; round < 60; ++round) {
        const std::size_t m = pick({2, 3, 4, 4, 7, 8, 8, 11, 16, 20, 32}), n = pick({m / 2, pick(1, m - 1)});
        const std::size_t down = pick(1, 2), across = pick({1, 3, 17}), positions = pick({1, 1, 3}), kind = pick(0, 3);
        const std::size_t rows = down * m, columns = across * m;
        Exact<X> x(rows * columns * positions);
        for (std::size_t i = 0; i < x.size(); ++i)  // few bits, so that sums are exact
            x[i] = kind == 0 ? X{0} : static_cast<X>(pick(0, kind == 1 ? 3 : 100000)) - static_cast<X>(kind == 3 ? 50000 : 0);
        for (const auto solver : {rarefy::TileSolver::fast, rarefy::TileSolver::exact, rarefy::TileSolver::cover}) {
            Exact<std::uint8_t> mask(x.size(), 7), again(x.size(), 7);
            CHECK(rarefy::transposable(x.data(), rows, columns, positions, n, m, solver, mask.data(), 1));
            CHECK(rarefy::transposable(x.data(), rows, columns, positions, n, m, solver, again.data(), 3));
            for (std::size_t i = 0; i < x.size(); ++i) CHECK(mask[i] == again[i] && mask[i] <= 1);
            for (std::size_t tile = 0; tile < down * across * positions; ++tile) {
                const std::size_t p = tile % positions, a = tile / positions % across, d = tile / positions / across;
                std::vector<std::int64_t> q(m * m);
                std::vector<std::uint8_t> kept(m * m);
                std::vector<std::size_t> in_row(m), in_column(m);
                for (std::size_t i = 0; i < m; ++i)
                    for (std::size_t j = 0; j < m; ++j) {
                        const std::size_t at = ((d * m + i) * columns + a * m + j) * positions + p;
                        q[i * m + j] = static_cast<std::int64_t>(x[at]);
                        kept[i * m + j] = mask[at];
                        in_row[i] += mask[at];
                        in_column[j] += mask[at];
                    }
                for (std::size_t i = 0; i < m; ++i) CHECK(in_row[i] == n && in_column[i] == n);
                if (solver != rarefy::TileSolver::cover) CHECK(optimal(q, kept, m));
            }
        }
        x[pick(0, x.size() - 1)] = pick(0, 1) == 0 ? std::numeric_limits<X>::quiet_NaN() : std::numeric_limits<X>::infinity();
        Exact<std::uint8_t> mask(x.size());
        for (const auto solver : {rarefy::TileSolver::fast, rarefy::TileSolver::exact, rarefy::TileSolver::cover})
            CHECK(!rarefy::transposable(x.data(), rows, columns, positions, n, m, solver, mask.data(), 2));
    }
}

TEST(transposable_masks_fill_every_line_and_are_optimal) {
    compare<float>();
    compare<double>();
}

TEST(transposable_masks_avoid_minus_infinity) {
    for (const std::size_t m : {4, 8, 16}) {
        Exact<float> x(m * m);
        for (std::size_t i = 0; i < m; ++i)  // what lies beyond the band of m / 2 + 1 may not be kept
            for (std::size_t j = 0; j < m; ++j)
                x[i * m + j] = (j + m - i) % m <= m / 2 ? check::normal() : -std::numeric_limits<float>::infinity();
        for (const auto solver : {rarefy::TileSolver::fast, rarefy::TileSolver::exact}) {
            Exact<std::uint8_t> mask(x.size());
            CHECK(rarefy::transposable(x.data(), m, m, 1, m / 2, m, solver, mask.data(), 1));
            for (std::size_t i = 0; i < m * m; ++i) CHECK(mask[i] == 0 || std::isfinite(x[i]));
        }
    }
}

}  // namespace
