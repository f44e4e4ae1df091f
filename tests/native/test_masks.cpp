#include <algorithm>
#include <numeric>

#include "check.hpp"
#include "ops.hpp"

using check::Exact;
using check::pick;

TEST(packed_masks_come_back) {
    for (const std::size_t n : {0u, 1u, 7u, 8u, 63u, 64u, 65u, 1000u, 300001u}) {
        Exact<std::uint8_t> bools(n), bits((n + 7) / 8), back(n);
        for (std::size_t i = 0; i < n; ++i) bools[i] = static_cast<std::uint8_t>(pick(0, 1));
        rarefy::pack_mask(bools.data(), n, bits.data(), 2);
        rarefy::unpack_mask(bits.data(), n, back.data(), 2);
        for (std::size_t i = 0; i < n; ++i) CHECK(back[i] == bools[i]);
        Exact<std::uint32_t> x(n, 5);
        rarefy::zero_out(x.data(), bools.data(), n, 2);
        for (std::size_t i = 0; i < n; ++i) CHECK(x[i] == (bools[i] != 0 ? 5u : 0u));
    }
}

TEST(the_largest_are_chosen) {
    for (int round = 0; round < 60; ++round) {
        const std::size_t rows = pick({1, 1, 3}), n = pick({1, 4, 16, 17, 300, 5000, 70000});
        Exact<float> x(rows * n);
        for (std::size_t i = 0; i < x.size(); ++i) x[i] = pick(0, 1) == 1 ? check::normal() : static_cast<float>(pick(0, 3));
        const std::size_t k = pick(0, n);
        const auto wanted = static_cast<std::int64_t>(k);
        Exact<std::uint8_t> mask(rows * n, 9);
        CHECK(!rarefy::select_k(x.data(), rows, n, &wanted, 0, mask.data(), 2));
        for (std::size_t r = 0; r < rows; ++r) {
            std::vector<std::size_t> order(n);
            std::iota(order.begin(), order.end(), r * n);
            std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return x[a] > x[b]; });
            for (std::size_t i = 0; i < n; ++i) CHECK(mask[order[i]] == (i < k ? 1 : 0));
        }
    }
}
