#include "check.hpp"
#include "n_m.hpp"

using check::Exact;
using check::Floats;
using check::pick;
using check::randoms;
using rarefy::NMShape;

namespace {

struct Weight {
    NMShape shape;
    Exact<std::uint8_t> mask;
    Exact<std::int32_t> index;
    Exact<std::uint16_t> used;
    Floats dense, values;
    rarefy::NMWeight get() const { return {shape, values.data(), index.data(), used.data()}; }
};

// Keeps at most `steps` in every row and, with both, every column of a tile; sometimes exactly that.
Weight weight(std::size_t rows, std::size_t cols, std::size_t steps, bool both) {
    const NMShape shape{rows, cols, steps};
    Exact<std::uint8_t> mask(rows * cols);
    const std::size_t tries = pick({1, 3, 40}) * 16 * steps;
    for (std::size_t r = 0; r < rows; r += 16)
        for (std::size_t c = 0; c < cols; c += 16) {
            std::size_t in_row[16] = {}, in_col[16] = {};
            for (std::size_t i = 0; i < tries; ++i) {
                const std::size_t a = pick(0, std::min<std::size_t>(15, rows - r - 1));
                const std::size_t b = pick(0, std::min<std::size_t>(15, cols - c - 1));
                std::uint8_t& kept = mask[(r + a) * cols + c + b];
                if (kept != 0 || in_row[a] == steps || (both && in_col[b] == steps)) continue;
                kept = 1;
                ++in_row[a];
                ++in_col[b];
            }
        }
    Exact<std::int32_t> index(shape.index(), -1);
    Exact<std::uint16_t> used(shape.tiles() * steps, 0xffff);
    CHECK(rarefy::n_m_index(mask.data(), shape, both, index.data(), used.data(), pick(1, 2)));
    Floats dense = randoms(rows * cols), values(shape.values(), NAN);
    rarefy::n_m_gather({shape, nullptr, index.data(), used.data()}, dense.data(), values.data(), pick(1, 2));
    for (std::size_t i = 0; i < dense.size(); ++i)
        if (mask[i] == 0) dense[i] = 0;
    return {shape, std::move(mask), std::move(index), std::move(used), std::move(dense), std::move(values)};
}

template <class Test> void rounds(const Test& test) {
    for (int round = 0; round < 60; ++round) {
        const bool both = pick(0, 1) == 1;
        test(weight(pick({1, 15, 16, 17, 40, 64}), pick({1, 15, 16, 17, 48, 70}), pick({1, 2, 3, 4, 5, 8, 12, 13, 16}), both), both,
             pick({1, 2, 7, 8, 9, 17, 70}));
    }
}

}  // namespace

TEST(n_m_weights_go_in_and_out) {
    rounds([](const Weight& w, bool, std::size_t) {
        Floats dense(w.dense.size(), NAN);
        rarefy::n_m_scatter(w.get(), dense.data(), pick(1, 2));
        for (std::size_t i = 0; i < dense.size(); ++i) CHECK(dense[i] == w.dense[i]);
    });
}

TEST(n_m_index_refuses_what_does_not_fit) {
    const NMShape shape{16, 16, 2};
    Exact<std::int32_t> index(shape.index());
    Exact<std::uint16_t> used(2);
    Exact<std::uint8_t> mask(256);
    for (const std::size_t at : {0u, 5u, 9u}) mask[at] = 1;
    CHECK(!rarefy::n_m_index(mask.data(), shape, false, index.data(), used.data(), 1));
    mask[9] = 0;
    CHECK(rarefy::n_m_index(mask.data(), shape, true, index.data(), used.data(), 1));
    mask[16] = mask[32] = 1;  // three in the first column
    CHECK(rarefy::n_m_index(mask.data(), shape, false, index.data(), used.data(), 1));
    CHECK(!rarefy::n_m_index(mask.data(), shape, true, index.data(), used.data(), 1));
}

TEST(n_m_forward) {
    rounds([](const Weight& w, bool, std::size_t n) {
        const std::size_t rows = w.shape.rows, cols = w.shape.cols;
        const Floats x = randoms(n * cols), bias = randoms(rows);
        std::vector<double> expected(n * rows);
        for (std::size_t i = 0; i < n; ++i)
            for (std::size_t r = 0; r < rows; ++r) {
                double sum = bias[r];
                for (std::size_t c = 0; c < cols; ++c) sum += double{w.dense[r * cols + c]} * x[i * cols + c];
                expected[i * rows + r] = std::max(0.0, sum);
            }
        for (std::size_t threads = 1; threads <= 2; ++threads) {
            for (const auto way : {&rarefy::n_m_by_tiles, &rarefy::n_m_by_strips}) {
                Floats y(n * rows, NAN);
                way(w.get(), false, x.data(), n, bias.data(), rarefy::Act::relu, y.data(), threads);
                check::near(y, expected);
            }
        }
    });
}

TEST(n_m_input_gradient) {
    rounds([](const Weight& w, bool both, std::size_t n) {
        if (!both) return;
        const std::size_t rows = w.shape.rows, cols = w.shape.cols;
        const Floats dy = randoms(n * rows);
        std::vector<double> expected(n * cols);
        for (std::size_t i = 0; i < n; ++i)
            for (std::size_t r = 0; r < rows; ++r)
                for (std::size_t c = 0; c < cols; ++c) expected[i * cols + c] += double{w.dense[r * cols + c]} * dy[i * rows + r];
        for (std::size_t threads = 1; threads <= 2; ++threads) {
            for (const auto way : {&rarefy::n_m_by_tiles, &rarefy::n_m_by_strips}) {
                Floats dx(n * cols, NAN);
                way(w.get(), true, dy.data(), n, nullptr, rarefy::Act::none, dx.data(), threads);
                check::near(dx, expected);
            }
            Floats dx(n * cols, NAN);
            rarefy::n_m_input_gradient(w.get(), dy.data(), n, dx.data(), threads);
            check::near(dx, expected);
        }
    });
}

TEST(n_m_values_gradient) {
    rounds([](const Weight& w, bool, std::size_t n) {
        const std::size_t rows = w.shape.rows, cols = w.shape.cols;
        const Floats x = randoms(n * cols), dy = randoms(n * rows);
        std::vector<double> expected(rows * cols);
        for (std::size_t i = 0; i < n; ++i)
            for (std::size_t at = 0; at < rows * cols; ++at)
                if (w.mask[at] != 0) expected[at] += double{dy[i * rows + at / cols]} * x[i * cols + at % cols];
        for (std::size_t threads = 1; threads <= 2; ++threads) {
            Floats found(w.values.size(), NAN), dense(rows * cols, NAN);
            rarefy::n_m_values_gradient(w.get(), x.data(), dy.data(), n, found.data(), threads);
            rarefy::n_m_scatter({w.shape, found.data(), w.index.data(), w.used.data()}, dense.data(), 1);
            check::near(dense, expected);
            for (std::size_t i = 0; i < found.size(); ++i)
                if ((w.used[i / 16] >> i % 16 & 1) == 0) CHECK(found[i] == 0);
        }
    });
}

// An index may come from a damaged file: nothing outside of the matrix is touched, whatever it says.
TEST(n_m_index_of_any_bits_stays_inside) {
    for (int round = 0; round < 60; ++round) {
        const NMShape shape{pick({1, 15, 16, 17, 40}), pick({1, 15, 16, 17, 48, 70}), pick({1, 3, 4, 5, 16})};
        const std::size_t n = pick({1, 9, 70});
        Exact<std::int32_t> index(shape.index());
        Exact<std::uint16_t> used(shape.tiles() * shape.steps);
        for (std::size_t i = 0; i < index.size(); ++i) index[i] = static_cast<std::int32_t>(pick(0, 0xffff) << 16 | pick(0, 0xffff));
        for (std::size_t i = 0; i < used.size(); ++i) used[i] = static_cast<std::uint16_t>(pick(0, 1) == 1 ? 0xffff : pick(0, 0xffff));
        const Floats dense = randoms(shape.rows * shape.cols), x = randoms(n * shape.cols), dy = randoms(n * shape.rows);
        Floats values(shape.values(), NAN), back(dense.size(), NAN), y(n * shape.rows), dx(n * shape.cols);
        const rarefy::NMWeight w{shape, values.data(), index.data(), used.data()};
        rarefy::n_m_gather(w, dense.data(), values.data(), 2);
        rarefy::n_m_scatter(w, back.data(), 2);
        for (std::size_t i = 0; i < back.size(); ++i) CHECK(back[i] == dense[i] || back[i] == 0);
        for (const auto way : {&rarefy::n_m_by_tiles, &rarefy::n_m_by_strips}) {
            way(w, false, x.data(), n, nullptr, rarefy::Act::none, y.data(), 2);
            way(w, true, dy.data(), n, nullptr, rarefy::Act::none, dx.data(), 2);
        }
        rarefy::n_m_values_gradient(w, x.data(), dy.data(), n, values.data(), 2);
    }
}
