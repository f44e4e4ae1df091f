#include "sparse_layers.hpp"

namespace rarefy {
namespace {

std::vector<std::size_t> with_residual(std::size_t x, std::size_t y, bool residual) {
    std::vector<std::size_t> sizes{x};
    if (residual) sizes.push_back(y);
    return sizes;
}

const float* or_null(const std::vector<float>& x) { return x.empty() ? nullptr : x.data(); }

}  // namespace

SparsePlanes::SparsePlanes(const Csr& w, std::size_t pixels, std::vector<float> bias, bool residual, Act act, std::size_t batch,
                           std::size_t threads)
    : Layer(with_residual(w.cols * pixels, w.rows * pixels, residual), w.rows * pixels), spmm_(w, batch * pixels, threads),
      pixels_(pixels), bias_(std::move(bias)), act_(act) {}

void SparsePlanes::run(const float* const* inputs, float* output, float*, std::size_t batch, std::size_t threads) const {
    spmm_.planes(inputs[0], batch, pixels_, output, or_null(bias_), input_sizes().size() == 2 ? inputs[1] : nullptr, act_, threads);
}

SparseLinear::SparseLinear(const Csr& w, std::size_t tokens, std::vector<float> bias, Act act, std::size_t batch, std::size_t threads)
    : Layer({w.cols * tokens}, w.rows * tokens), spmm_(w, batch * tokens, threads, Spmm::For::linear_only), tokens_(tokens),
      bias_(std::move(bias)), act_(act) {}

void SparseLinear::run(const float* const* inputs, float* output, float*, std::size_t batch, std::size_t threads) const {
    spmm_.linear(inputs[0], spmm_.cols(), batch * tokens_, output, spmm_.rows(), or_null(bias_), act_, threads);
}

SparseConv::SparseConv(const Csr& w, const ConvShape& s, std::vector<float> bias, bool residual, Act act, std::size_t batch,
                       std::size_t threads)
    : Layer(with_residual(s.in_channels * s.height * s.width, s.out_channels * s.out_height() * s.out_width(), residual),
            s.out_channels * s.out_height() * s.out_width()),
      conv_(w, s, batch, threads), bias_(std::move(bias)), act_(act) {}

void SparseConv::run(const float* const* inputs, float* output, float*, std::size_t batch, std::size_t threads) const {
    conv_.run(inputs[0], batch, output, or_null(bias_), input_sizes().size() == 2 ? inputs[1] : nullptr, act_, threads);
}

}  // namespace rarefy
