// Exact selection of the k largest, ties to the lower index.
//
// Short rows: every pair is compared. Medium rows: bisection on the integer keys of a row that sits in the cache. Long rows: a
// sample brackets the threshold between two keys; ONE pass over memory writes the mask for everything outside the bracket and
// collects the few keys inside, among which the threshold is then found. The result never depends on the sample: should it have
// misled (or the bracket hold too much), counting passes find the threshold.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "isa.hpp"
#include "ops.hpp"
#include "pool.hpp"

namespace rarefy {
namespace {

constexpr std::size_t longest_short_row = 16, shortest_long_row = std::size_t{1} << 16;

template <class T> const SelectKernels<T>& table() {
    if constexpr (std::is_same_v<T, float>)
        return kernels().select32;
    else
        return kernels().select64;
}

// Keep the keys > t, and the first `ties` that equal t.
template <class K> struct Threshold {
    K t;
    std::size_t ties;
};

// Bisects for the k-th largest key, 0 < k <= n: count(t) says how many keys are >= t. Known: count(lo) >= k > count(hi) = at_hi.
template <class K, class Count> Threshold<K> bisect(std::size_t k, K lo, K hi, std::size_t at_hi, const Count& count) {
    using U = std::make_unsigned_t<K>;
    while (static_cast<U>(hi) - static_cast<U>(lo) > 1) {
        const K mid = static_cast<K>(static_cast<U>(lo) + (static_cast<U>(hi) - static_cast<U>(lo)) / 2);
        const std::size_t here = count(mid);
        if (here == k) return {static_cast<K>(mid - 1), 0};
        if (here > k) {
            lo = mid;
        } else {
            hi = mid;
            at_hi = here;
        }
    }
    return {lo, k - at_hi};
}

template <class T> Threshold<Key<T>> bisect_keys(const Key<T>* keys, std::size_t n, std::size_t k) {
    const auto [low, high] = std::minmax_element(keys, keys + n);
    return bisect<Key<T>>(k, *low, static_cast<Key<T>>(*high + 1), 0,
                          [&](Key<T> t) { return table<T>().count_keys(keys, n, t); });
}

template <class T> bool medium_row(const T* x, std::size_t n, std::size_t k, std::uint8_t* mask) {
    thread_local std::vector<Key<T>> keys;
    keys.resize(n);
    if (table<T>().keys(x, n, keys.data())) return true;
    if (k == 0 || k == n) {
        std::memset(mask, k == 0 ? 0 : 1, n);
        return false;
    }
    const auto found = bisect_keys<T>(keys.data(), n, k);
    table<T>().finish(x, n, found.t, found.ties, mask);
    return false;
}

// A score from each of `size` equal strata, at a place that a fixed generator picks: the same at every call.
template <class T> std::vector<Key<T>> sample(const T* x, std::size_t n, std::size_t size) {
    std::vector<T> taken(size);
    std::uint64_t state = 0x9e3779b97f4a7c15ULL;
    for (std::size_t i = 0; i < size; ++i) {
        state = state * 6364136223846793005ULL + 1442695040888963407ULL;
        const std::size_t from = n / size * i + n % size * i / size, to = n / size * (i + 1) + n % size * (i + 1) / size;
        taken[i] = x[from + static_cast<std::size_t>((state >> 32) * (to - from) >> 32)];
    }
    std::vector<Key<T>> keys(size);
    table<T>().keys(taken.data(), size, keys.data());
    return keys;
}

template <class T> class LongRow {
public:
    using K = Key<T>;
    LongRow(const T* scores, std::size_t count, std::size_t wanted, std::uint8_t* out, std::size_t n_threads)
        : x(scores), n(count), k(wanted), mask(out), threads(n_threads), cut{n, 4096, whole_pieces(n, n_threads)} {}

    bool select() {
        bracket();
        std::vector<WindowCounts> counts(cut.parts);
        const std::size_t room = std::min(n, expected * 2 + 1024);
        // Default-initialised on purpose: what no piece writes to is never touched, and never becomes memory.
        const std::unique_ptr<K[]> keys(new K[room * cut.parts]);
        const std::unique_ptr<std::uint32_t[]> at(new std::uint32_t[room * cut.parts]);
        parallel(cut.parts, threads, [&](std::size_t i) {
            counts[i] = table<T>().window(x + cut(i), cut(i + 1) - cut(i), lo, hi, mask + cut(i), keys.get() + room * i,
                                          at.get() + room * i, room);
        });
        WindowCounts all;
        bool overflow = false;
        for (const auto& c : counts) {
            all.nan |= c.nan;
            all.above += c.above;
            all.at_hi += c.at_hi;
            all.inside += c.inside;
            all.at_lo += c.at_lo;
            overflow |= c.inside > room;
        }
        if (all.nan) return true;
        const std::size_t from_hi = all.above + all.at_hi, over_lo = from_hi + all.inside;
        if (k > from_hi && k <= over_lo && !overflow) {
            settle(counts, keys.get(), at.get(), room, k - from_hi, all.inside);
        } else if (k > all.above && k <= from_hi) {
            finish(hi, k - all.above, [&](std::size_t i) { return counts[i].at_hi; });
        } else if (k > over_lo && k <= over_lo + all.at_lo) {
            finish(lo, k - over_lo, [&](std::size_t i) { return counts[i].at_lo; });
        } else {
            search();
        }
        return false;
    }

private:
    static std::size_t whole_pieces(std::size_t n, std::size_t threads) {
        // A piece's positions are 32-bit.
        const std::size_t needed = n / (std::size_t{1} << 31) + 1;
        return std::max(needed, pieces(n, threads, std::size_t{1} << 15));
    }

    // lo and hi such that the k-th largest lies between them almost surely, from the sample's ranks five deviations apart.
    void bracket() {
        const std::size_t size = std::min<std::size_t>(n / 16, std::size_t{1} << 16);
        const std::vector<K> keys = sample(x, n, size);
        const double share = static_cast<double>(k) / static_cast<double>(n), s = static_cast<double>(size);
        const double slack = 5.0 * std::sqrt(s * share * (1.0 - share)) + 8.0;
        const double upper = share * s - slack, lower = share * s + slack;
        if (upper >= 1.0) hi = bisect_key(keys, static_cast<std::size_t>(upper));
        if (lower <= s) lo = bisect_key(keys, static_cast<std::size_t>(lower));
        expected = static_cast<std::size_t>(2.0 * slack / s * static_cast<double>(n));
    }

    static K bisect_key(const std::vector<K>& keys, std::size_t rank) {
        return bisect_keys<T>(keys.data(), keys.size(), rank).t;
    }

    // The threshold is among the collected keys; everything from hi up is already marked.
    void settle(const std::vector<WindowCounts>& counts, const K* keys, const std::uint32_t* at, std::size_t room,
                std::size_t wanted, std::size_t inside) {
        std::vector<K> together(inside);
        std::size_t filled = 0;
        for (std::size_t i = 0; i < cut.parts; ++i) {
            std::memcpy(together.data() + filled, keys + room * i, counts[i].inside * sizeof(K));
            filled += counts[i].inside;
        }
        Threshold<K> found = bisect_keys<T>(together.data(), inside, wanted);
        for (std::size_t i = 0; i < cut.parts; ++i)
            for (std::size_t j = 0; j < counts[i].inside; ++j) {
                const K key = keys[room * i + j];
                const bool tie = key == found.t && found.ties > 0;
                found.ties -= tie;
                if (key > found.t || tie) mask[cut(i) + at[room * i + j]] = 1;
            }
    }

    // A second pass: keys > t, and `ties` of those equal to t, handed out piece by piece in order.
    template <class Equal> void finish(K t, std::size_t ties, const Equal& equal) {
        std::vector<std::size_t> quota(cut.parts);
        for (std::size_t i = 0; i < cut.parts; ++i) {
            quota[i] = std::min(ties, equal(i));
            ties -= quota[i];
        }
        parallel(cut.parts, threads, [&](std::size_t i) {
            table<T>().finish(x + cut(i), cut(i + 1) - cut(i), t, quota[i], mask + cut(i));
        });
    }

    // Counting passes, up to one per bit: exact whatever the sample said.
    void search() {
        std::vector<std::size_t> part(cut.parts);
        const auto count_parts = [&](K t) {
            parallel(cut.parts, threads,
                     [&](std::size_t i) { part[i] = table<T>().count(x + cut(i), cut(i + 1) - cut(i), t); });
        };
        const Threshold<K> found = bisect<K>(k, std::numeric_limits<K>::min(), std::numeric_limits<K>::max(), 0, [&](K t) {
            count_parts(t);
            std::size_t all = 0;
            for (const std::size_t c : part) all += c;
            return all;
        });
        count_parts(found.t);
        std::vector<std::size_t> equal = part;
        count_parts(static_cast<K>(found.t + 1));
        for (std::size_t i = 0; i < cut.parts; ++i) equal[i] -= part[i];
        finish(found.t, found.ties, [&](std::size_t i) { return equal[i]; });
    }

    const T* x;
    std::size_t n, k;
    std::uint8_t* mask;
    std::size_t threads;
    Cuts cut;
    K lo = std::numeric_limits<K>::min(), hi = std::numeric_limits<K>::max();  // below and above every float's key
    std::size_t expected = 0;
};

}  // namespace

template <class T>
bool select_k(const T* x, std::size_t rows, std::size_t n, const std::int64_t* k, std::size_t k_step, std::uint8_t* mask,
              std::size_t threads) {
    if (rows == 0 || n == 0) return false;
    const std::size_t all = rows * n;
    std::atomic<bool> nan{false};
    if (n <= longest_short_row) {
        const Cuts cut{rows, 32, pieces(rows, threads, std::max<std::size_t>((std::size_t{1} << 16) / n, 1))};
        parallel(cut.parts, threads, [&](std::size_t i) {
            const std::size_t from = cut(i);
            if (table<T>().short_rows(x + from * n, cut(i + 1) - from, n, k + from * k_step, k_step, mask + from * n)) nan = true;
        });
        return nan;
    }
    const auto row = [&](std::size_t r, std::size_t row_threads) {
        const std::size_t wanted = static_cast<std::size_t>(k[r * k_step]);
        const bool met = n < shortest_long_row ? medium_row(x + r * n, n, wanted, mask + r * n)
                                               : LongRow<T>(x + r * n, n, wanted, mask + r * n, row_threads).select();
        if (met) nan = true;
    };
    if (n >= shortest_long_row && rows < 2 * threads) {
        for (std::size_t r = 0; r < rows && !nan; ++r) row(r, threads);
        return nan;
    }
    const std::size_t wanted_pieces = all < shortest_long_row ? 1 : std::min(rows, threads * 8);
    const Cuts cut{rows, 1, wanted_pieces};
    parallel(cut.parts, threads, [&](std::size_t i) {
        for (std::size_t r = cut(i); r < cut(i + 1) && !nan; ++r) row(r, 1);
    });
    return nan;
}

template bool select_k(const float*, std::size_t, std::size_t, const std::int64_t*, std::size_t, std::uint8_t*, std::size_t);
template bool select_k(const double*, std::size_t, std::size_t, const std::int64_t*, std::size_t, std::uint8_t*, std::size_t);

}  // namespace rarefy
