// Unstructured sparse weights times dense activations: y = act(W x + bias + residual).
#pragma once
#include <functional>

#include "strip.hpp"

namespace rarefy {

class Spmm {
public:
    // `columns`: how many columns (pixels of all images, or samples) a product will mostly have; any other number works too.
    Spmm(const Csr& w, std::size_t columns, std::size_t threads);

    void set_values(const float* values) { stream_.set_values(values); }

    // Planes: x [batch][cols][pixels] -> y [batch][rows][pixels]; the residual, if any, has the shape and layout of y.
    void planes(const float* x, std::size_t batch, std::size_t pixels, float* y, const float* bias, const float* residual, Act act,
                std::size_t threads) const;

    // Features: x [n][cols] with rows x_ld apart -> y [n][rows] with rows y_ld apart.
    void linear(const float* x, std::size_t x_ld, std::size_t n, float* y, std::size_t y_ld, const float* bias, Act act,
                std::size_t threads) const;

    std::size_t rows() const { return rows_; }
    std::size_t cols() const { return cols_; }
    std::size_t bytes() const { return stream_.bytes(); }

private:
    struct Task {  // some parts of the rows, some columns
        std::size_t part, part_end, column, columns, vectors, row, rows;
    };
    void tiles(std::size_t columns, std::size_t threads, const std::function<void(const Task&)>& work) const;
    std::size_t most_vectors() const;
    float* strip_scratch(std::size_t vectors) const;

    std::size_t rows_, cols_, nnz_;
    Stream stream_;
};

}  // namespace rarefy
