// Random sparse matrices and their dense products.
#pragma once
#include "check.hpp"
#include "strip.hpp"

namespace check {

struct Sparse {
    Exact<std::int64_t> crow;
    Exact<std::int32_t> col;
    Floats values;
    std::size_t rows, cols;
    rarefy::Csr csr() const { return {crow.data(), col.data(), values.data(), rows, cols}; }
};

inline Sparse sparse(std::size_t rows, std::size_t cols, double density) {
    std::vector<std::int32_t> col;
    Exact<std::int64_t> crow(rows + 1);
    for (std::size_t m = 0; m < rows; ++m) {
        const bool empty = pick(0, 7) == 0;
        for (std::size_t k = 0; k < cols && !empty; ++k)
            if (std::uniform_real_distribution<>()(rng()) < density) col.push_back(static_cast<std::int32_t>(k));
        crow[m + 1] = static_cast<std::int64_t>(col.size());
    }
    Exact<std::int32_t> exact(col.size());
    for (std::size_t i = 0; i < col.size(); ++i) exact[i] = col[i];
    return {std::move(crow), std::move(exact), randoms(col.size()), rows, cols};
}

// Calls each(row, column, value).
template <class Each> void entries(const Sparse& w, const Each& each) {
    for (std::size_t m = 0; m < w.rows; ++m)
        for (auto i = static_cast<std::size_t>(w.crow[m]); i < static_cast<std::size_t>(w.crow[m + 1]); ++i)
            each(m, static_cast<std::size_t>(w.col[i]), i);
}

}  // namespace check
