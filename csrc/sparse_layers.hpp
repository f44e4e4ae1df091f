// The sparse products as layers of a network. The residual, if any, is the second input.
#pragma once
#include "conv.hpp"
#include "layer.hpp"

namespace rarefy {

// `batch` and `threads` are what the weight is packed for; any others work too.
class SparsePlanes : public Layer {  // 1 x 1 convolution: planes [cols][pixels] -> [rows][pixels]
public:
    SparsePlanes(const Csr& w, std::size_t pixels, std::vector<float> bias, bool residual, Act act, std::size_t batch, std::size_t threads);
    bool in_place(std::size_t i) const override { return i == 1; }
    void run(const float* const* inputs, float* output, float* scratch, std::size_t batch, std::size_t threads) const override;
    std::size_t bytes() const { return spmm_.bytes() + bias_.size() * sizeof(float); }

private:
    Spmm spmm_;
    std::size_t pixels_;
    std::vector<float> bias_;
    Act act_;
};

class SparseLinear : public Layer {  // features [tokens][cols] -> [tokens][rows]
public:
    SparseLinear(const Csr& w, std::size_t tokens, std::vector<float> bias, Act act, std::size_t batch, std::size_t threads);
    void run(const float* const* inputs, float* output, float* scratch, std::size_t batch, std::size_t threads) const override;
    std::size_t bytes() const { return spmm_.bytes() + bias_.size() * sizeof(float); }

private:
    Spmm spmm_;
    std::size_t tokens_;
    std::vector<float> bias_;
    Act act_;
};

class SparseConv : public Layer {
public:
    SparseConv(const Csr& w, const ConvShape& shape, std::vector<float> bias, bool residual, Act act, std::size_t batch,
               std::size_t threads);
    bool in_place(std::size_t i) const override { return i == 1; }
    void run(const float* const* inputs, float* output, float* scratch, std::size_t batch, std::size_t threads) const override;
    std::size_t bytes() const { return conv_.bytes() + bias_.size() * sizeof(float); }

private:
    Conv conv_;
    std::vector<float> bias_;
    Act act_;
};

}  // namespace rarefy
