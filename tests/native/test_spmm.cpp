#include "sparse.hpp"
#include "spmm.hpp"

using check::Floats;
using check::pick;
using check::randoms;

TEST(sparse_times_planes) {
    for (int round = 0; round < 60; ++round) {
        const std::size_t m = pick(1, 70), k = pick({1, 5, 64, 300}), batch = pick(1, 3), n = pick({1, 2, 15, 16, 49, 100, 200});
        const auto w = check::sparse(m, k, static_cast<double>(pick(0, 10)) / 10);
        const Floats x = randoms(batch * k * n), bias = randoms(m), r = randoms(batch * m * n);
        std::vector<double> expected(batch * m * n);
        for (std::size_t i = 0; i < expected.size(); ++i) expected[i] = double{bias[i / n % m]} + r[i];
        check::entries(w, [&](std::size_t row, std::size_t col, std::size_t at) {
            for (std::size_t b = 0; b < batch; ++b)
                for (std::size_t i = 0; i < n; ++i) expected[(b * m + row) * n + i] += double{w.values[at]} * x[(b * k + col) * n + i];
        });
        for (double& e : expected) e = std::max(0.0, e);
        const rarefy::Spmm spmm(w.csr(), pick({n, batch * n, 1, 1000}), pick(1, 2));
        for (std::size_t threads = 1; threads <= 2; ++threads) {
            Floats y(batch * m * n, NAN);
            spmm.planes(x.data(), batch, n, y.data(), bias.data(), r.data(), rarefy::Act::relu, threads);
            check::near(y, expected);
        }
    }
}

TEST(sparse_times_features) {
    for (int round = 0; round < 60; ++round) {
        const std::size_t m = pick(1, 70), k = pick({1, 5, 64, 300}), n = pick({1, 2, 15, 16, 33, 100}), x_ld = k + pick(0, 3), y_ld = m + pick(0, 3);
        const auto w = check::sparse(m, k, static_cast<double>(pick(0, 10)) / 10);
        const Floats x = randoms((n - 1) * x_ld + k), bias = randoms(m);
        std::vector<double> expected((n - 1) * y_ld + m, 7);
        for (std::size_t i = 0; i < n; ++i)
            for (std::size_t j = 0; j < m; ++j) expected[i * y_ld + j] = bias[j];
        check::entries(w, [&](std::size_t row, std::size_t col, std::size_t at) {
            for (std::size_t i = 0; i < n; ++i) expected[i * y_ld + row] += double{w.values[at]} * x[i * x_ld + col];
        });
        const rarefy::Spmm spmm(w.csr(), pick({n, 1, 1000}), pick(1, 2));
        for (std::size_t threads = 1; threads <= 2; ++threads) {
            Floats y(expected.size(), 7);
            spmm.linear(x.data(), x_ld, n, y.data(), y_ld, bias.data(), rarefy::Act::none, threads);
            check::near(y, expected);
        }
    }
}
