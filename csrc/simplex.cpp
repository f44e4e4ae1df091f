// The sum of clip(mu a - c, 0, 1) never falls in mu and is linear between its breakpoints c/a, where an entry leaves 0, and
// (1 + c)/a, where it reaches 1. A sample brackets the root between two levels; ONE pass over memory settles every entry without a
// breakpoint between them and collects the few others, whose breakpoints are then halved about their median again and again until
// none is left inside: on the last segment mu is a quotient of two sums. The result never depends on the sample: should it have
// misled, a second pass takes everything on the right side of it. Sums run over blocks of a fixed length, whatever the threads.
#include "simplex.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "pool.hpp"

namespace rarefy {
namespace {

constexpr std::size_t block = 4096, shortest_sampled = std::size_t{1} << 14, largest_sample = std::size_t{1} << 16;
constexpr double beyond = std::numeric_limits<double>::max();

template <class T> const SimplexTable<T>& table() {
    if constexpr (std::is_same_v<T, float>)
        return RAREFY_AT_LEVEL(simplex).f32;
    else
        return RAREFY_AT_LEVEL(simplex).f64;
}

struct Entry {
    double a, c;
    double enters() const { return c / a; }
    double fills() const { return (1.0 + c) / a; }
};

// What is known of the root: it lies in [low, high], and what every settled entry adds to the sum there.
struct Bracket {
    double low = 0, high = beyond, full = 0, slope = 0, offset = 0;
};

std::uint64_t next_random(std::uint64_t& state) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return state >> 33;
}

// A breakpoint strictly inside the bracket: about the median of all that the open entries have there.
double pivot(const std::vector<Entry>& open, const Bracket& at, std::uint64_t& state) {
    double found[64];
    std::size_t n = 0;
    for (int i = 0; i < 32; ++i) {
        const Entry& e = open[next_random(state) % open.size()];
        for (const double p : {e.enters(), e.fills()})
            if (p > at.low && p < at.high) found[n++] = p;
    }
    std::nth_element(found, found + n / 2, found + n);
    return found[n / 2];
}

// The root, given that the sum is at most k at the bracket's low end and at least k at its high one.
double settle(std::vector<Entry>& open, Bracket at, double k) {
    std::uint64_t state = 0x9e3779b97f4a7c15ULL;
    for (;;) {
        std::size_t left = 0;
        for (const Entry& e : open) {
            const double enters = e.enters(), fills = e.fills();
            if (fills <= at.low) {
                at.full += 1.0;
            } else if (enters <= at.low && fills >= at.high) {
                at.slope += e.a;
                at.offset += e.c;
            } else if (enters < at.high) {
                open[left++] = e;
            }
        }
        open.resize(left);
        if (left == 0) break;
        const double p = pivot(open, at, state);
        double sum = at.full + p * at.slope - at.offset;
        for (const Entry& e : open) sum += std::clamp(p * e.a - e.c, 0.0, 1.0);
        (sum <= k ? at.low : at.high) = p;
    }
    return at.slope > 0.0 ? std::clamp((k - at.full + at.offset) / at.slope, at.low, at.high) : at.low;
}

template <class T> class Row {
public:
    Row(const T* costs, const T* offsets, std::size_t offset_step, std::size_t count, std::size_t n_threads)
        : a(costs), c(offsets), c_step(offset_step), n(count), threads(n_threads) {}

    bool fill(std::size_t k, T* u) {
        double mu = beyond;
        Bracket at = bracket(static_cast<double>(k));
        SimplexTally all = scan(at.low, at.high);
        if (all.bad) return true;
        if (all.positive <= k) {
            for (std::size_t i = 0; i < n; ++i) u[i] = a[i] > T{0} ? T{1} : T{0};
            return false;
        }
        const double wanted = static_cast<double>(k);
        if (all.at_p > wanted) {
            at.high = at.low;
            at.low = 0;
            all = scan(at.low, at.high);
        } else if (all.at_q < wanted) {
            at.low = at.high;
            at.high = beyond;
            all = scan(at.low, at.high);
        }
        at.full = all.full;
        at.slope = all.slope;
        at.offset = all.offset;
        std::vector<Entry> open = collect(all.open);
        mu = settle(open, at, wanted);
        const Cuts cut{n, block, pieces(n, threads, std::size_t{1} << 15)};
        parallel(cut.parts, threads, [&](std::size_t i) {
            table<T>().fill(a + cut(i), c + cut(i) * c_step, c_step, cut(i + 1) - cut(i), mu, u + cut(i));
        });
        return false;
    }

private:
    // Two levels between which the root lies almost surely: the sample's roots for sums five deviations apart.
    Bracket bracket(double k) const {
        Bracket at;
        if (n < shortest_sampled) return at;
        const std::size_t size = std::min(n / 16, largest_sample);
        std::vector<Entry> sample;
        sample.reserve(size);
        double positive = 0;
        std::uint64_t state = 0x9e3779b97f4a7c15ULL;
        for (std::size_t i = 0; i < size; ++i) {  // one from each of `size` equal strata
            const std::size_t from = n / size * i + n % size * i / size, to = n / size * (i + 1) + n % size * (i + 1) / size;
            const std::size_t j = from + static_cast<std::size_t>(next_random(state)) % (to - from);
            const Entry e{static_cast<double>(a[j]), static_cast<double>(c[j * c_step])};
            if (!(e.a > 0.0 && e.a < beyond && e.c >= 0.0 && e.c < beyond)) continue;
            sample.push_back(e);
            positive += 1.0;
        }
        const double share = std::min(k / static_cast<double>(n), 1.0), s = static_cast<double>(size);
        const double slack = 5.0 * std::sqrt(s * share * (1.0 - share)) + 8.0;
        if (share * s > slack && share * s - slack < positive) {
            std::vector<Entry> open = sample;
            at.low = settle(open, Bracket{}, share * s - slack);
        }
        if (share * s + slack < positive) at.high = settle(sample, Bracket{}, share * s + slack);
        return at;
    }

    SimplexTally scan(double p, double q) {
        const std::size_t blocks = (n + block - 1) / block;
        std::vector<SimplexTally> each(blocks);
        flags.resize(n);
        const Cuts cut{blocks, 1, pieces(n, threads, std::size_t{1} << 15)};
        parallel(cut.parts, threads, [&](std::size_t i) {
            for (std::size_t b = cut(i); b < cut(i + 1); ++b) {
                const std::size_t from = b * block, length = std::min(block, n - from);
                each[b] = table<T>().scan(a + from, c + from * c_step, c_step, length, p, q, flags.data() + from);
            }
        });
        SimplexTally all;
        for (const SimplexTally& t : each) {
            all.at_p += t.at_p;
            all.at_q += t.at_q;
            all.full += t.full;
            all.slope += t.slope;
            all.offset += t.offset;
            all.open += t.open;
            all.positive += t.positive;
            all.bad |= t.bad;
        }
        return all;
    }

    std::vector<Entry> collect(std::size_t open) const {
        std::vector<Entry> found;
        found.reserve(open);
        for (std::size_t i = 0; found.size() < open; ++i)
            if (flags[i] != 0) found.push_back({static_cast<double>(a[i]), static_cast<double>(c[i * c_step])});
        return found;
    }

    const T* a;
    const T* c;
    std::size_t c_step, n, threads;
    std::vector<std::uint8_t> flags;
};

}  // namespace

template <class T>
bool capped_simplex(const T* a, const T* c, std::size_t c_step, std::size_t rows, std::size_t n, const std::int64_t* k,
                    std::size_t k_step, T* u, std::size_t threads) {
    if (rows == 0 || n == 0) return false;
    std::atomic<bool> bad{false};
    const auto row = [&](std::size_t r, std::size_t row_threads) {
        if (Row<T>(a + r * n, c + r * n * c_step, c_step, n, row_threads).fill(static_cast<std::size_t>(k[r * k_step]), u + r * n))
            bad = true;
    };
    if (rows < 2 * threads) {
        for (std::size_t r = 0; r < rows && !bad; ++r) row(r, threads);
        return bad;
    }
    const Cuts cut{rows, 1, pieces(rows, threads, std::max<std::size_t>((std::size_t{1} << 12) / n, 1))};
    parallel(cut.parts, threads, [&](std::size_t i) {
        for (std::size_t r = cut(i); r < cut(i + 1) && !bad; ++r) row(r, 1);
    });
    return bad;
}

template bool capped_simplex(const float*, const float*, std::size_t, std::size_t, std::size_t, const std::int64_t*, std::size_t,
                             float*, std::size_t);
template bool capped_simplex(const double*, const double*, std::size_t, std::size_t, std::size_t, const std::int64_t*, std::size_t,
                             double*, std::size_t);

}  // namespace rarefy
