#include "sparse.hpp"
#include "spmv.hpp"

TEST(sparse_times_one_vector) {
    for (int round = 0; round < 80; ++round) {
        const std::size_t m = check::pick({1, 15, 16, 17, 100}), k = check::pick({1, 31, 32, 33, 64, 500});
        const auto w = check::sparse(m, k, static_cast<double>(check::pick(0, 10)) / 10);
        const check::Floats x = check::randoms(k), bias = check::randoms(m);
        std::vector<double> expected(bias.data(), bias.data() + m);
        check::entries(w, [&](std::size_t row, std::size_t col, std::size_t at) { expected[row] += double{w.values[at]} * x[col]; });
        rarefy::Spmv spmv(w.csr());
        spmv.set_values(w.values.data());
        for (std::size_t threads = 1; threads <= 2; ++threads) {
            check::Floats y(m, NAN);
            spmv.run(x.data(), y.data(), bias.data(), rarefy::Act::none, threads);
            check::near(y, expected);
        }
    }
}
