// What training needs beyond the forward product: the gradient of the input, and that of the kept values only.
//
// The input's gradient is the sparse product with the transposed weight, whose index structure is kept beside the forward one. The
// values' gradient is a sampled product: for each kept (row m, input k) the dot product of dy[m] and x[k] over all columns. A row's dy
// stays in registers while the kept inputs' strip rows pass by. Nothing as large as the dense weight is ever made.
#pragma once
#include <mutex>
#include <vector>

#include "conv.hpp"

namespace rarefy {

constexpr std::size_t SAMPLED_VECTORS = 8;
constexpr std::size_t SPREAD_FLOATS = std::size_t{1} << 19;  // gradients that are spread out by a stride at once: 2 MB

struct SampledKernels {
    // out[i] += dot(dy[m], x[col[i] - first]) for rows m and begin[m] <= i < end[m]; dy and x have rows of V vectors.
    void (*dots[SAMPLED_VECTORS + 1])(const std::uint32_t* begin, const std::uint32_t* end, std::size_t rows,
                                      const std::int32_t* col, std::int32_t first, const float* x, const float* dy, float* out);
};
RAREFY_EVERY_LEVEL(extern const SampledKernels sampled)

// The transposed matrix's rows; `position` says where in the matrix each nonzero came from.
struct Transposed {
    std::vector<std::int64_t> crow;
    std::vector<std::int32_t> col;
    std::vector<std::uint32_t> position;
};

// Where the kept weights of a matrix lie, cut into blocks of inputs.
class Sampled {
public:
    Sampled(const Csr& w);

    // pack_x(first column, columns, first input, inputs, strip, width), pack_dy(first column, columns, first row, rows, tile, width):
    // zero behind the columns.
    using Pack = std::function<void(std::size_t, std::size_t, std::size_t, std::size_t, float*, std::size_t)>;
    void run(std::size_t columns, const Pack& pack_x, const Pack& pack_dy, float* out, std::size_t threads) const;

    std::size_t nnz() const { return col_.size(); }

private:
    void range(std::size_t column, std::size_t columns, std::size_t vectors, std::size_t row, std::size_t rows, const Pack& pack_x,
               const Pack& pack_dy, float* out) const;

    std::size_t rows_, cols_;
    std::vector<std::int32_t> col_;
    std::vector<std::uint32_t> at_;  // [blocks + 1][rows]: row m of block b is col_[at_[b][m] .. at_[b + 1][m])
    std::vector<std::size_t> ends_;
};

// One linear layer's weight [rows, cols] in training. Values come with every call; calls from several threads take turns.
class LinearTraining {
public:
    LinearTraining(const Csr& w, std::size_t n, std::size_t threads);

    // x [n][cols] -> y [n][rows]
    void forward(const float* values, const float* x, std::size_t n, const float* bias, float* y, std::size_t threads);
    // dy [n][rows] -> dx [n][cols]
    void input_gradient(const float* values, const float* dy, std::size_t n, float* dx, std::size_t threads);
    // x, dy -> one number per kept value
    void values_gradient(const float* x, const float* dy, std::size_t n, float* out, std::size_t threads) const;

    std::size_t rows() const { return rows_; }
    std::size_t cols() const { return cols_; }
    std::size_t nnz() const { return sampled_.nnz(); }

private:
    std::size_t rows_, cols_;
    std::mutex turn_;
    Spmm forward_;
    Spmm backward_;
    Sampled sampled_;
};

// The same for a convolution. The input's gradient is the convolution of dy, spread out by the stride, with the flipped weight.
class ConvTraining {
public:
    ConvTraining(const Csr& w, const ConvShape& shape, std::size_t batch, std::size_t threads);

    void forward(const float* values, const float* x, std::size_t batch, const float* bias, float* y, std::size_t threads);
    void input_gradient(const float* values, const float* dy, std::size_t batch, float* dx, std::size_t threads);
    void values_gradient(const float* x, const float* dy, std::size_t batch, float* out, std::size_t threads) const;

    const ConvShape& shape() const { return forward_.shape(); }
    std::size_t nnz() const { return nnz_; }

private:
    std::size_t nnz_;
    std::mutex turn_;
    Conv forward_;
    Conv backward_;
    std::vector<Sampled> sampled_;  // one per group
    std::vector<std::size_t> first_value_;
};

}  // namespace rarefy
