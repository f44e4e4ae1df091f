#include <cstring>

#include "lowp.hpp"
#include "sparse.hpp"

using check::Floats;
using check::pick;
using check::randoms;

namespace {

double rounded(float x) {  // to bfloat16, ties to even
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

}  // namespace

TEST(bfloat16_products) {
    for (int round = 0; round < 40; ++round) {
        const std::size_t m = pick(1, 60), k = pick({1, 2, 17, 64, 301}), n = pick({1, 3, 16, 40, 100});
        const auto w = check::sparse(m, k, static_cast<double>(pick(0, 10)) / 10);
        const Floats x = randoms(n * k), planes = randoms(n * k), bias = randoms(m);
        std::vector<double> linear(n * m), plane(n * m);
        for (std::size_t i = 0; i < n * m; ++i) linear[i] = bias[i % m], plane[i] = bias[i / n];
        check::entries(w, [&](std::size_t row, std::size_t col, std::size_t at) {
            for (std::size_t i = 0; i < n; ++i) {
                linear[i * m + row] += rounded(w.values[at]) * rounded(x[i * k + col]);
                plane[row * n + i] += rounded(w.values[at]) * rounded(planes[col * n + i]);
            }
        });
        const rarefy::Bfloat16Product product(w.csr(), n, 2);
        for (std::size_t threads = 1; threads <= 2; ++threads) {
            Floats y(n * m, NAN);
            product.linear(x.data(), n, y.data(), bias.data(), rarefy::Act::none, threads);
            check::near(y, linear);
            product.planes(planes.data(), 1, n, y.data(), bias.data(), nullptr, rarefy::Act::none, threads);
            check::near(y, plane);
        }
    }
}

TEST(int8_products) {
    for (int round = 0; round < 40; ++round) {
        const std::size_t m = pick(1, 60), k = pick({1, 3, 4, 17, 64, 301}), n = pick({1, 3, 16, 40});
        auto w = check::sparse(m, k, static_cast<double>(pick(0, 10)) / 10);
        for (std::size_t i = 0; i < w.values.size(); ++i) w.values[i] = static_cast<float>(pick(0, 255)) - 128;
        check::Exact<std::uint8_t> x(n * k);
        for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<std::uint8_t>(pick(0, 255));
        const Floats scale = randoms(m);
        const auto zero = static_cast<std::int32_t>(pick(0, 255));
        std::vector<double> expected(n * m);
        check::entries(w, [&](std::size_t row, std::size_t col, std::size_t at) {
            for (std::size_t i = 0; i < n; ++i) expected[i * m + row] += 0.01 * scale[row] * w.values[at] * (x[i * k + col] - zero);
        });
        const rarefy::Int8Product product(w.csr(), scale.data(), n, 2);
        for (std::size_t threads = 1; threads <= 2; ++threads) {
            Floats y(n * m, NAN);
            product.linear(x.data(), 0.01f, zero, n, y.data(), nullptr, rarefy::Act::none, threads);
            check::near(y, expected);
        }
    }
}
