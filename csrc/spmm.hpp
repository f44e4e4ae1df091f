// Unstructured sparse weights times dense activations: y = act(W x + bias + residual).
#pragma once
#include <functional>
#include <optional>

#include "spmv.hpp"
#include "strip.hpp"

namespace rarefy {

class Spmm {
public:
    // `columns`: how many columns (pixels of all images, or samples) a product will mostly have; any other number works too.
    // A weight for `linear` only, and one sample at a time, is packed for that.
    enum class For { planes_and_linear, linear_only };
    Spmm(const Csr& w, std::size_t columns, std::size_t threads, For use = For::planes_and_linear,
         Words words = Words::float32);

    void set_values(const float* values) {
        if (vector_) vector_->set_values(values);
        else stream_->set_values(values);
    }

    // Planes: x [batch][cols][pixels] -> y [batch][rows][pixels]; the residual, if any, has the shape and layout of y.
    void planes(const float* x, std::size_t batch, std::size_t pixels, float* y, const float* bias, const float* residual, Act act,
                std::size_t threads) const;

    // Called on the sums of some rows [rows][width] before bias and activation.
    using Finish = std::function<void(float* sums, std::size_t row, std::size_t rows, std::size_t width)>;

    // Features: x [n][cols] with rows x_ld apart -> y [n][rows] with rows y_ld apart.
    void linear(const float* x, std::size_t x_ld, std::size_t n, float* y, std::size_t y_ld, const float* bias, Act act,
                std::size_t threads, const Finish& finish = {}) const;

    std::size_t rows() const { return rows_; }
    std::size_t cols() const { return cols_; }
    std::size_t bytes() const { return vector_ ? vector_->bytes() : stream_->bytes(); }

    struct Task {  // some parts of the rows, some columns
        std::size_t part, part_end, column, columns, vectors, row, rows;
    };
    // Where a block's activations lie for a task: `strip` once it is filled (rows `width` floats apart), or any other place.
    struct Place {
        const char* at;
        std::size_t stride;  // bytes from one input to the next
    };
    using Pack = std::function<Place(std::size_t image, const Task&, std::size_t first, std::size_t size, float* strip,
                                     std::size_t width)>;
    // Where the results go: y[image * image_step + row * pixels + pixel], and the residual likewise.
    struct Out {
        float* y;
        const float* bias;
        const float* residual;
        Act act;
        std::size_t batch, pixels, image_step;
        bool joined;  // columns are counted through all images, so that small planes share tiles
    };
    // The product with activations that `pack` fetches.
    void product(const Pack& pack, const Out& out, std::size_t threads) const;
    // Whether planes so small are better joined.
    bool joins(std::size_t batch, std::size_t pixels) const;
    // Calls piece(image, pixel, column within the task, count) for what the task's columns hold of each image.
    template <class Piece> static void pieces(const Task& t, std::size_t pixels, const Piece& piece) {
        for (std::size_t c = 0; c < t.columns;) {
            const std::size_t at = t.column + c, left = pixels - at % pixels, n = left < t.columns - c ? left : t.columns - c;
            piece(at / pixels, at % pixels, c, n);
            c += n;
        }
    }

private:
    void tiles(std::size_t columns, std::size_t threads, const std::function<void(const Task&)>& work) const;
    float* strip_scratch(std::size_t vectors) const;

    std::size_t rows_, cols_, nnz_;
    bool fits_ = true;  // one tile's partial sums of all rows fit the second cache
    std::optional<Spmv> vector_;  // this
    std::optional<Stream> stream_;  // or this
};

}  // namespace rarefy
