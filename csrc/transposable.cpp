// Tiles are shared out among threads in runs; the 2-approximation, which sorts, is solved here for every instruction set alike.
#include "transposable.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "pool.hpp"

namespace rarefy {
namespace {

using Whole = std::int64_t;
constexpr Whole far = Whole{1} << 61;

template <class X> const TransposableTable<X>& table() {
    if constexpr (std::is_same_v<X, float>)
        return RAREFY_AT_LEVEL(transposable).f32;
    else
        return RAREFY_AT_LEVEL(transposable).f64;
}

// Prune the lightest first wherever a row or column still has to lose entries (Hubara et al. 2021), then fill what is short.
class Cover {
public:
    Cover(std::size_t n, std::size_t m) : n_(n), m_(m), q_(m * m), kept_(m * m), rows_(m), columns_(m), order_(m * m), first_(m * m) {}

    template <class X> bool solve(const X* x, std::uint8_t* mask, const TileRun& run) {
        if (!read(x, run)) return false;
        for (std::size_t at = 0; at < m_ * m_; ++at) order_[at] = at;
        std::sort(order_.begin(), order_.end(),
                  [&](std::size_t a, std::size_t b) { return q_[a] != q_[b] ? q_[a] < q_[b] : a < b; });
        std::fill(rows_.begin(), rows_.end(), m_);
        std::fill(columns_.begin(), columns_.end(), m_);
        for (const std::size_t at : order_) {
            const std::size_t i = at / m_, j = at % m_;
            kept_[at] = rows_[i] > n_ || columns_[j] > n_ ? 0 : 1;
            rows_[i] -= 1u - kept_[at];
            columns_[j] -= 1u - kept_[at];
        }
        while (std::any_of(rows_.begin(), rows_.end(), [&](std::size_t r) { return r < n_; })) fill_one();
        for (std::size_t i = 0; i < m_; ++i)
            for (std::size_t j = 0; j < m_; ++j) mask[i * run.row + j * run.column] = kept_[i * m_ + j];
        return true;
    }

private:
    // To 50 bits below the largest; what is minus infinity, and then the rest to 40, below anything that the tile could win.
    template <class X> bool read(const X* x, const TileRun& run) {
        double top = 0;
        bool forbidden = false;
        const auto score = [&](std::size_t at) { return static_cast<double>(x[at / m_ * run.row + at % m_ * run.column]); };
        for (std::size_t at = 0; at < m_ * m_; ++at) {
            const double s = score(at);
            if (!(s < std::numeric_limits<double>::infinity())) return false;
            if (std::isinf(s))
                forbidden = true;
            else
                top = std::max(top, std::abs(s));
        }
        int exponent = 0;
        std::frexp(top, &exponent);
        const int bits = forbidden ? 40 : 50;
        for (std::size_t at = 0; at < m_ * m_; ++at) {
            const double s = score(at);
            q_[at] = std::isinf(s) ? -(Whole{1} << (bits + 12)) : static_cast<Whole>(std::nearbyint(std::ldexp(s, bits - exponent)));
        }
        return true;
    }

    // The best of one entry more where row and column are short, or two more around one that is given up.
    void fill_one() {
        const auto kept = [&](std::size_t i, std::size_t j) { return kept_[i * m_ + j] != 0; };
        const auto worth = [&](std::size_t i, std::size_t j) { return q_[i * m_ + j]; };
        Whole best = std::numeric_limits<Whole>::min();
        std::size_t row = 0, column = 0, through_row = m_, through_column = m_;
        for (std::size_t i = 0; i < m_; ++i) {
            if (rows_[i] >= n_) continue;
            for (std::size_t k = 0; k < m_; ++k) {  // the best that row i takes from row k
                Whole gain = -far;
                std::size_t& from = first_[k];
                from = m_;
                for (std::size_t l = 0; l < m_; ++l)
                    if (kept(k, l) && !kept(i, l) && worth(i, l) - worth(k, l) > gain) {
                        gain = worth(i, l) - worth(k, l);
                        from = l;
                    }
            }
            for (std::size_t j = 0; j < m_; ++j) {
                if (columns_[j] >= n_) continue;
                if (!kept(i, j) && worth(i, j) > best) {
                    best = worth(i, j);
                    row = i;
                    column = j;
                    through_row = m_;
                }
                for (std::size_t k = 0; k < m_; ++k) {
                    if (kept(k, j) || first_[k] == m_) continue;
                    const std::size_t l = first_[k];
                    const Whole gain = worth(i, l) - worth(k, l) + worth(k, j);
                    if (gain > best) {
                        best = gain;
                        row = i;
                        column = j;
                        through_row = k;
                        through_column = l;
                    }
                }
            }
        }
        ++rows_[row];
        ++columns_[column];
        if (through_row == m_) {
            kept_[row * m_ + column] = 1;
        } else {
            kept_[row * m_ + through_column] = kept_[through_row * m_ + column] = 1;
            kept_[through_row * m_ + through_column] = 0;
        }
    }

    std::size_t n_, m_;
    std::vector<Whole> q_;
    std::vector<std::uint8_t> kept_;
    std::vector<std::size_t> rows_, columns_, order_, first_;
};

}  // namespace

template <class X>
bool transposable(const X* x, std::size_t rows, std::size_t columns, std::size_t positions, std::size_t n, std::size_t m,
                  TileSolver solver, std::uint8_t* mask, std::size_t threads) {
    if (rows == 0 || columns == 0 || positions == 0) return true;
    std::atomic<bool> fine{true};
    const auto solve = [&](std::size_t at, const TileRun& run) {
        if (solver == TileSolver::fast) return table<X>().fast(x + at, mask + at, run, n, m);
        if (solver == TileSolver::exact) return table<X>().exact(x + at, mask + at, run, n, m);
        Cover cover(n, m);
        for (std::size_t t = 0; t < run.tiles; ++t)
            if (!cover.solve(x + at + t * run.tile, mask + at + t * run.tile, run)) return false;
        return true;
    };
    // A run is a part of a band of m rows, or all positions of one tile, or tiles that stand one below the other.
    const bool stacked = positions == 1 && columns == m;
    const std::size_t groups = stacked ? 1 : positions == 1 ? rows / m : rows / m * (columns / m);
    const std::size_t across = groups * m / rows, length = rows / m * (columns / m) * positions / groups;
    const TileRun whole{length, stacked ? m * m : positions == 1 ? m : 1, columns * positions, positions};
    const std::size_t parts = pieces(rows * columns * positions, threads, std::size_t{1} << 12);
    const std::size_t split = groups >= parts ? 1 : std::min(length, (parts + groups - 1) / groups);
    const Cuts cut{groups * split, 1, std::min(parts, groups * split)}, along{length, 16, split};
    parallel(cut.parts, threads, [&](std::size_t part) {
        for (std::size_t r = cut(part); r < cut(part + 1) && fine; ++r) {
            const std::size_t group = r / split, from = along(r % split), to = along(r % split + 1);
            TileRun run = whole;
            run.tiles = to - from;
            const std::size_t corner = stacked || positions == 1 ? group * m * columns
                                                                 : (group / across * m * columns + group % across * m) * positions;
            if (run.tiles > 0 && !solve(corner + from * run.tile, run)) fine = false;
        }
    });
    return fine;
}

template bool transposable(const float*, std::size_t, std::size_t, std::size_t, std::size_t, std::size_t, TileSolver, std::uint8_t*,
                           std::size_t);
template bool transposable(const double*, std::size_t, std::size_t, std::size_t, std::size_t, std::size_t, TileSolver, std::uint8_t*,
                           std::size_t);

}  // namespace rarefy
