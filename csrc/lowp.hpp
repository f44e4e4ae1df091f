// Sparse products in bfloat16 and int8: the same packed weights and loops as in float32, on words that hold two or four numbers.
//
// The natural unit of a weight is then 1 x 2 or 1 x 4: where one of them is kept, the others ride along.
#pragma once
#include "spmm.hpp"

namespace rarefy {

struct LowpKernels {
    StripLoops bfloat16, int8;
    void (*to_bfloat16)(const float* x, std::size_t n, std::uint16_t* y);  // to nearest, ties to even
    // strip[u][i] = the bfloat16 of x[2u * ld + i] and, where 2u + 1 < left, of x[(2u + 1) * ld + i]; zeros behind n.
    void (*pack_pairs)(const float* x, std::size_t ld, std::size_t units, std::size_t left, std::size_t n, float* strip,
                       std::size_t width);
    // sums[m][i] = scale[m] * (int32 in sums[m][i] - shift[m])
    void (*dequantise)(float* sums, std::size_t rows, std::size_t width, const float* scale, const std::int32_t* shift);
};
RAREFY_EVERY_LEVEL(extern const LowpKernels lowp)
#ifdef RAREFY_X86
namespace avx512_dots { extern const LowpKernels lowp; }
#endif

const LowpKernels& lowp_kernels();
bool has_dot_products();  // of bfloat16 and int8 in this CPU; else they are emulated, right and slow

// y = act(W x + bias) with W and x rounded to bfloat16 and sums in float32; x and y are float32.
class Bfloat16Product {
public:
    Bfloat16Product(const Csr& w, std::size_t columns, std::size_t threads);
    void linear(const float* x, std::size_t n, float* y, const float* bias, Act act, std::size_t threads) const;
    void planes(const float* x, std::size_t batch, std::size_t pixels, float* y, const float* bias, const float* residual, Act act,
                std::size_t threads) const;
    std::size_t rows() const { return spmm_.rows(); }
    std::size_t cols() const { return cols_; }
    std::size_t bytes() const { return spmm_.bytes(); }

private:
    std::size_t cols_;
    Spmm spmm_;
};

// y = act(scale[m] * x_scale * (W (x - zero)) + bias) with W in int8 (`w.values` are whole numbers in [-128, 127]) and x in uint8;
// exact in int32.
class Int8Product {
public:
    Int8Product(const Csr& w, const float* scale, std::size_t columns, std::size_t threads);
    // x [n][cols] -> y [n][rows]
    void linear(const std::uint8_t* x, float x_scale, std::int32_t x_zero, std::size_t n, float* y, const float* bias, Act act,
                std::size_t threads) const;
    std::size_t rows() const { return spmm_.rows(); }
    std::size_t cols() const { return cols_; }
    std::size_t bytes() const { return spmm_.bytes() + 8 * scale_.size(); }

private:
    std::size_t cols_;
    std::vector<float> scale_;
    std::vector<std::int32_t> row_sum_;
    Spmm spmm_;
};

}  // namespace rarefy
