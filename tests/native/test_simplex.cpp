#include "check.hpp"
#include "simplex.hpp"

using check::Exact;
using check::pick;

namespace {

double unit(double low, double high) { return std::uniform_real_distribution<double>(low, high)(check::rng()); }

// The root by bisection in long double.
template <class T> long double root(const Exact<T>& a, const Exact<T>& c, std::size_t from, std::size_t n, std::size_t k) {
    long double low = 0, high = 1;
    const auto sum = [&](long double mu) {
        long double all = 0;
        for (std::size_t i = from; i < from + n; ++i)
            all += std::clamp<long double>(mu * a[i] - c[c.size() == 1 ? 0 : i], 0, 1);
        return all;
    };
    while (sum(high) < static_cast<long double>(k)) high *= 2;
    for (int i = 0; i < 200; ++i) {
        const long double mid = (low + high) / 2;
        (sum(mid) < static_cast<long double>(k) ? low : high) = mid;
    }
    return high;
}

template <class T> void compare(double tolerance) {
    for (int round = 0; round < 60; ++round) {
        const std::size_t rows = pick({1, 1, 3}), n = pick({1, 2, 7, 8, 9, 300, 4097, 40000}), kind = pick(0, 3);
        Exact<T> a(rows * n), c(pick(0, 1) == 1 ? 1 : rows * n), u(rows * n, T{7}), again(rows * n);
        for (std::size_t i = 0; i < a.size(); ++i)
            a[i] = static_cast<T>(kind == 0 ? unit(0, 1) : kind == 1 ? static_cast<double>(pick(0, 2)) : std::exp(unit(-9, 9)));
        for (std::size_t i = 0; i < c.size(); ++i) c[i] = static_cast<T>(kind == 2 ? 0.0 : unit(0, 3));
        const std::size_t k = pick(0, n);
        const auto wanted = static_cast<std::int64_t>(k);
        const std::size_t step = c.size() == 1 ? 0 : 1;
        CHECK(!rarefy::capped_simplex(a.data(), c.data(), step, rows, n, &wanted, 0, u.data(), 2));
        CHECK(!rarefy::capped_simplex(a.data(), c.data(), step, rows, n, &wanted, 0, again.data(), 1));
        for (std::size_t r = 0; r < rows; ++r) {
            std::size_t positive = 0;
            for (std::size_t i = r * n; i < (r + 1) * n; ++i) positive += a[i] > T{0};
            const long double mu = positive <= k ? 0 : root(a, c, r * n, n, k);
            for (std::size_t i = r * n; i < (r + 1) * n; ++i) {
                long double expected = std::clamp<long double>(mu * a[i] - c[step == 0 ? 0 : i], 0, 1);
                if (positive <= k) expected = a[i] > T{0} ? 1 : 0;
                CHECK(std::fabs(static_cast<double>(expected - static_cast<long double>(u[i]))) <= tolerance);
                CHECK(u[i] == again[i]);
            }
        }
    }
}

}  // namespace

TEST(a_capped_simplex_is_filled) {
    compare<double>(1e-9);
    compare<float>(1e-6);
}

TEST(a_capped_simplex_of_adversaries) {
    const std::int64_t k = 1000;
    const float c = 0.5f;
    Exact<float> a(50000, 2.0f), u(50000);  // all the same
    CHECK(!rarefy::capped_simplex(a.data(), &c, 0, 1, a.size(), &k, 0, u.data(), 2));
    for (std::size_t i = 0; i < u.size(); ++i) CHECK(std::fabs(u[i] - 0.02f) < 1e-7f);
    for (std::size_t i = 0; i < 900; ++i) a[i * 7] = 1e30f;  // a few beside which all others are nothing, where a sample may miss them
    CHECK(!rarefy::capped_simplex(a.data(), &c, 0, 1, a.size(), &k, 0, u.data(), 2));
    for (std::size_t i = 0; i < 900; ++i) CHECK(u[i * 7] == 1.0f);
    double sum = 0;
    for (std::size_t i = 0; i < u.size(); ++i) sum += static_cast<double>(u[i]);
    CHECK(std::fabs(sum - 1000.0) < 1e-2);
    for (const float wrong : {std::nanf(""), -1.0f, INFINITY}) {
        a[49999] = wrong;
        CHECK(rarefy::capped_simplex(a.data(), &c, 0, 1, a.size(), &k, 0, u.data(), 2));
    }
}
