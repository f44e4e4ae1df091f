// The optimum of one tile: a flow from rows, which give n units each, to columns, which take n each, over edges of capacity one.
//
// When every row takes its n best at some prices of the columns, nothing can be gained without changing the columns' sums. At good
// prices (tile_prices.hpp) few of those are wrong. What is too much is moved along shortest paths (Dijkstra on lengths that prices
// make non-negative), which keeps that true, until every column takes n: then the flow is optimal. All in whole numbers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "tile_sort.hpp"
#include "tile_vector.hpp"

namespace rarefy::RAREFY_LEVEL {

// The bits of the lanes where x == y.
template <int W, class T, class V> RAREFY_INLINE std::uint32_t equal(const V& x, T y) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4 && W == 16)
        return _mm512_cmpeq_epi32_mask(reinterpret_cast<const __m512i&>(x), _mm512_set1_epi32(static_cast<int>(y)));
    if constexpr (sizeof(T) == 8 && W == 8)
        return _mm512_cmpeq_epi64_mask(reinterpret_cast<const __m512i&>(x), _mm512_set1_epi64(static_cast<long long>(y)));
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 4 && W == 8)
        return static_cast<std::uint32_t>(_mm256_movemask_ps(
            _mm256_castsi256_ps(_mm256_cmpeq_epi32(reinterpret_cast<const __m256i&>(x), _mm256_set1_epi32(static_cast<int>(y))))));
    if constexpr (sizeof(T) == 8 && W == 4)
        return static_cast<std::uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(
            _mm256_cmpeq_epi64(reinterpret_cast<const __m256i&>(x), _mm256_set1_epi64x(static_cast<long long>(y))))));
#endif
    std::uint32_t bits = 0;
    for (int i = 0; i < W; ++i) bits |= (x[i] == y ? 1u : 0u) << i;
    return bits;
}

template <int W, class T, class V> RAREFY_INLINE T least(const V& x) {
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 4) {
        __m256i y;
#if defined(__AVX512F__)
        if constexpr (W == 16) {
            const __m512i z = reinterpret_cast<const __m512i&>(x);
            y = _mm256_min_epi32(_mm512_castsi512_si256(z), _mm512_extracti64x4_epi64(z, 1));
        } else
#endif
            y = reinterpret_cast<const __m256i&>(x);
        __m128i s = _mm_min_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
        s = _mm_min_epi32(s, _mm_shuffle_epi32(s, 0x4e));
        s = _mm_min_epi32(s, _mm_shuffle_epi32(s, 0xb1));
        return static_cast<T>(_mm_cvtsi128_si32(s));
    }
#endif
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 8 && W == 8) return static_cast<T>(_mm512_reduce_min_epi64(reinterpret_cast<const __m512i&>(x)));
#endif
    T found = x[0];
    for (int i = 1; i < W; ++i) found = x[i] < found ? static_cast<T>(x[i]) : found;
    return found;
}

// T: int32 or int64; L: 8, 16 or 32, at least the side m of the tile; lanes and lines from m on are void.
template <class T, int L> class TileFlow {
    static constexpr int W = static_cast<int>(VECTOR / sizeof(T)) < L ? static_cast<int>(VECTOR / sizeof(T)) : L, P = L / W;
    using V = typename Vector<T, W>::type;
    static constexpr T far = T{1} << (8 * sizeof(T) - 2);

public:
    // Scores in, by rows and by columns; each is overwritten. Sums of 2 m scores must stay below `far`.
    alignas(64) T by_row[L][L];
    alignas(64) T by_column[L][L];

    // `prices`: of the columns, any; the better they are, the less there is to move.
    void solve(int n, int m, const T* prices) {
        take(n, m, prices);
        while (over_ != 0) move_one(n);
    }

    // One byte for each lane: whether entry (i, j) is kept.
    bool kept(int i, int j) const { return by_row[i][j] == far; }

private:
    // Every row takes its n best at these prices. From then on by_column[j][i] is the length of the step from column j to row i
    // (what is lost when i no longer keeps j), and by_row[i][j] that from row i to column j (less what is won when it does);
    // `far` where there is no such step.
    void take(int n, int m, const T* v) {
        alignas(64) T u[L], last[L], counts[L] = {};
        for (int p = 0; p < P; ++p) {
            V s[L], next;
            for (int k = 0; k < L; ++k) s[k] = k < m ? at(by_column[k], p) - v[k] : V{} - far;
            ranks<L>(s, n, at(last, p), next);
            at(u, p) = (at(last, p) + next) >> 1;
        }
        V sums[P] = {}, real[P];
        for (int p = 0; p < P; ++p)
            for (int i = 0; i < W; ++i) real[p][i] = p * W + i < m ? -1 : 0;
        for (int i = 0; i < m; ++i)
            for (int p = 0; p < P; ++p) {
                const V b = at(by_row[i], p) - at(v, p), kept = (b >= V{} + last[i]) & real[p];
                sums[p] -= kept;
                at(by_row[i], p) = (kept | ~real[p]) != 0 ? V{} + far : u[i] - b;
            }
        for (int j = 0; j < m; ++j)
            for (int p = 0; p < P; ++p) {
                const V b = at(by_column[j], p) - v[j], kept = (b >= at(last, p)) & real[p];
                at(counts, p) -= kept;
                at(by_column[j], p) = kept != 0 ? b - at(u, p) : V{} + far;
            }
        for (int p = 0; p < P; ++p) at(sums_, p) = sums[p];
        for (int i = 0; i < m; ++i)
            if (counts[i] > n) settle_ties(i, n, m, static_cast<int>(counts[i]) - n, last[i] - u[i]);
        over_ = under_ = 0;
        for (int j = 0; j < m; ++j) {
            over_ |= (sums_[j] > n ? 1u : 0u) << j;
            under_ |= (sums_[j] < n ? 1u : 0u) << j;
        }
        for (int p = 0; p < P; ++p) at(u_, p) = at(v_, p) = V{};
    }

    // Row i keeps too many equal ones: it gives up the last in an order that starts n columns further on in each row, so that rows
    // of equal scores share the columns out.
    void settle_ties(int i, int n, int m, int surplus, T length) {
        for (int k = m - 1; surplus > 0; --k) {
            const int j = (n * i + k) % m;
            if (by_column[j][i] != length) continue;
            by_row[i][j] = -length;
            by_column[j][i] = far;
            --sums_[j];
            --surplus;
        }
    }

    // One unit from a column that has too many to one that has too few, along a shortest path.
    void move_one(int n) {
        V to_row[P], to_column[P], open_row[P], open_column[P], from_row[P], from_column[P];
        for (int p = 0; p < P; ++p) {
            to_row[p] = open_row[p] = to_column[p] = open_column[p] = V{} + far;
            from_row[p] = from_column[p] = V{} - 1;
        }
        const auto leave_column = [&](int j, T d) {
            for (int p = 0; p < P; ++p) {
                const V length = at(by_column[j], p) - at(u_, p) + (d - v_[j]);
                const auto nearer = length < to_row[p];
                to_row[p] = nearer ? length : to_row[p];
                open_row[p] = nearer ? length : open_row[p];
                from_column[p] = nearer ? V{} + static_cast<T>(j) : from_column[p];
            }
        };
        for (std::uint32_t left = over_; left != 0; left &= left - 1) {
            const int j = __builtin_ctz(left);
            to_column[j / W][j % W] = 0;
            leave_column(j, 0);
        }
        int end = -1;
        T d = 0;
        for (;;) {
            V nearest = open_row[0] < open_column[0] ? open_row[0] : open_column[0];
            for (int p = 1; p < P; ++p) {
                const V other = open_row[p] < open_column[p] ? open_row[p] : open_column[p];
                nearest = other < nearest ? other : nearest;
            }
            d = least<W, T>(nearest);
            if (const std::uint32_t columns = where(open_column, d); columns != 0) {
                if ((columns & under_) != 0) {
                    end = __builtin_ctz(columns & under_);
                    break;
                }
                const int j = __builtin_ctz(columns);
                open_column[j / W][j % W] = far;
                leave_column(j, d);
            } else {
                const int i = __builtin_ctz(where(open_row, d));
                open_row[i / W][i % W] = far;
                for (int p = 0; p < P; ++p) {
                    const V length = at(by_row[i], p) + at(v_, p) + (d + u_[i]);
                    const auto nearer = length < to_column[p];
                    to_column[p] = nearer ? length : to_column[p];
                    open_column[p] = nearer ? length : open_column[p];
                    from_row[p] = nearer ? V{} + static_cast<T>(i) : from_row[p];
                }
            }
        }
        for (int p = 0; p < P; ++p) {
            at(u_, p) += (to_row[p] < V{} + d ? to_row[p] : V{} + d) - d;
            at(v_, p) -= (to_column[p] < V{} + d ? to_column[p] : V{} + d) - d;
        }
        alignas(64) T row_before[L], column_before[L];
        std::memcpy(row_before, from_row, sizeof row_before);
        std::memcpy(column_before, from_column, sizeof column_before);
        if (++sums_[end] == n) under_ &= ~(1u << end);
        int j = end;
        while (row_before[j] >= 0) {
            const int i = static_cast<int>(row_before[j]);
            by_column[j][i] = -by_row[i][j];
            by_row[i][j] = far;
            j = static_cast<int>(column_before[i]);
            by_row[i][j] = -by_column[j][i];
            by_column[j][i] = far;
        }
        if (--sums_[j] == n) over_ &= ~(1u << j);
    }

    static std::uint32_t where(const V (&x)[P], T y) {
        std::uint32_t bits = 0;
        for (int p = 0; p < P; ++p) bits |= equal<W>(x[p], y) << (p * W);
        return bits;
    }

    static V& at(T* line, int p) { return reinterpret_cast<V*>(line)[p]; }
    static const V& at(const T* line, int p) { return reinterpret_cast<const V*>(line)[p]; }

    alignas(64) T u_[L];
    alignas(64) T v_[L];
    alignas(64) T sums_[L];
    std::uint32_t over_, under_;
};

}  // namespace rarefy::RAREFY_LEVEL
