// The dense operators of planes.hpp as layers of a network. Sizes are per sample; planes are channels x height x width.
#pragma once
#include <cstdint>

#include "layer.hpp"
#include "planes.hpp"

namespace rarefy {

using Floats32 = std::vector<float>;

// `channels` input planes, `multiplier` outputs of each; w [channels * multiplier][kernel_h][kernel_w]. Inputs: x, and the residual.
class DepthwiseLayer : public Layer {
public:
    DepthwiseLayer(std::size_t channels, std::size_t multiplier, const Window& window, Floats32 w, Floats32 bias, bool residual, Act act);
    bool in_place(std::size_t i) const override { return i == 1; }
    void run(const float* const* inputs, float* output, float* scratch, std::size_t batch, std::size_t threads) const override;

private:
    std::size_t channels_, multiplier_;
    Window window_;
    Floats32 w_, bias_;
    Act act_;
};

// Dense convolution, made for few input channels: w [out][in][kernel_h][kernel_w]. Inputs: x, and the residual.
class DirectConv : public Layer {
public:
    DirectConv(std::size_t in, std::size_t out, const Window& window, const float* w, Floats32 bias, bool residual, Act act);
    bool in_place(std::size_t i) const override { return i == 1; }
    void run(const float* const* inputs, float* output, float* scratch, std::size_t batch, std::size_t threads) const override;

private:
    std::size_t in_, out_;
    Window window_;
    Floats32 w_, bias_;
    Act act_;
};

enum class Pool { maximum, average, average_with_padding };  // the last counts the padding of `bottom` and `right` cells too

class PoolLayer : public Layer {
public:
    PoolLayer(std::size_t channels, const Window& window, std::size_t bottom, std::size_t right, Pool kind);
    void run(const float* const* inputs, float* output, float* scratch, std::size_t batch, std::size_t threads) const override;

private:
    std::size_t channels_;
    Window window_;
    Floats32 scale_h_, scale_w_;
};

// The mean of the cells under each output cell, as torch's adaptive_avg_pool2d divides them; 1 x 1 is the global mean.
class AdaptiveAverage : public Layer {
public:
    AdaptiveAverage(std::size_t channels, std::size_t in_h, std::size_t in_w, std::size_t out_h, std::size_t out_w);
    void run(const float* const* inputs, float* output, float* scratch, std::size_t batch, std::size_t threads) const override;

private:
    std::size_t channels_, in_h_, in_w_, out_h_, out_w_;
};

// act(a), act(a + b), act(a * b).
class Elementwise : public Layer {
public:
    enum class Op { activation, add, multiply };
    Elementwise(Op op, std::size_t size, Act act);
    bool in_place(std::size_t) const override { return true; }
    void run(const float* const* inputs, float* output, float* scratch, std::size_t batch, std::size_t threads) const override;

private:
    Op op_;
    Act act_;
};

// act(x * scale[channel] + shift[channel]). Without given scales they are the second input [channels] and there is no shift.
class ScaleLayer : public Layer {
public:
    ScaleLayer(std::size_t channels, std::size_t pixels, Floats32 scale, Floats32 shift, Act act);
    bool in_place(std::size_t i) const override { return i == 0; }
    void run(const float* const* inputs, float* output, float* scratch, std::size_t batch, std::size_t threads) const override;

private:
    std::size_t channels_, pixels_;
    Floats32 scale_, shift_;
    Act act_;
};

class SoftmaxLayer : public Layer {
public:
    explicit SoftmaxLayer(std::size_t size) : Layer({size}, size) {}
    bool in_place(std::size_t) const override { return true; }
    void run(const float* const* inputs, float* output, float* scratch, std::size_t batch, std::size_t threads) const override;
};

// The inputs one after the other, each whole.
class Concat : public Layer {
public:
    explicit Concat(const std::vector<std::size_t>& sizes);
    void run(const float* const* inputs, float* output, float* scratch, std::size_t batch, std::size_t threads) const override;
};

// Floats [from, to) of every sample.
class Slice : public Layer {
public:
    Slice(std::size_t size, std::size_t from, std::size_t to);
    void run(const float* const* inputs, float* output, float* scratch, std::size_t batch, std::size_t threads) const override;

private:
    std::size_t from_;
};

// Nearest neighbour, with torch's rounding.
class Upsample : public Layer {
public:
    Upsample(std::size_t channels, std::size_t in_h, std::size_t in_w, std::size_t out_h, std::size_t out_w);
    void run(const float* const* inputs, float* output, float* scratch, std::size_t batch, std::size_t threads) const override;

private:
    std::size_t channels_, in_w_;
    std::vector<std::size_t> rows_, columns_;  // the source of each
};

// act(W x + bias) for a dense W [rows][cols]; made for few samples. Keeps the instruction set that it was packed for.
class DenseLayer : public Layer {
public:
    DenseLayer(std::size_t rows, std::size_t cols, const float* w, Floats32 bias, Act act);
    void run(const float* const* inputs, float* output, float* scratch, std::size_t batch, std::size_t threads) const override;

private:
    std::size_t rows_, cols_;
    const PlaneKernels& kernels_;
    Floats32 packed_, bias_;
    Act act_;
};

}  // namespace rarefy
