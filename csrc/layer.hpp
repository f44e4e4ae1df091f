// One step of a network that runs natively: float32 activations, dense, with the batch as the leading dimension (NCHW planes, or
// [batch, features]). Every room derives its layers from this; a Program (program.hpp) runs a whole list of them.
//
// A layer is immutable once built and may run from several threads at once. Bias, residual and activation are part of it: the
// residual, if any, is its last input.
#pragma once
#include <cstddef>
#include <utility>
#include <vector>

namespace rarefy {

class Layer {
public:
    virtual ~Layer() = default;
    Layer(const Layer&) = delete;
    Layer& operator=(const Layer&) = delete;

    // Floats per sample of each input, and of the output: a buffer holds `batch` times as many, with no gaps.
    const std::vector<std::size_t>& input_sizes() const { return inputs_; }
    std::size_t output_size() const { return output_; }

    // Floats of scratch that `run` wants, 64-byte aligned; its content is lost between runs.
    virtual std::size_t scratch_floats(std::size_t /*batch*/, std::size_t /*threads*/) const { return 0; }

    // Whether `output` may be the same memory as input i (exactly the same: partial overlap is never allowed).
    virtual bool in_place(std::size_t /*i*/) const { return false; }

    // Reads inputs[i] (batch * input_sizes()[i] floats), writes output; touches nothing beyond. Inputs may lie at any address.
    virtual void run(const float* const* inputs, float* output, float* scratch, std::size_t batch, std::size_t threads) const = 0;

protected:
    Layer(std::vector<std::size_t> inputs, std::size_t output) : inputs_(std::move(inputs)), output_(output) {}

private:
    std::vector<std::size_t> inputs_;
    std::size_t output_;
};

}  // namespace rarefy
