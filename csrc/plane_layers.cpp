#include "plane_layers.hpp"

#include <algorithm>
#include <cstring>

#include "pool.hpp"
#include "scratch.hpp"

namespace rarefy {
namespace {

constexpr std::size_t least_work = 16384;  // floats touched: what is worth a thread's while

// Calls body(from, to) for pieces of [0, n), where one item touches about `each` floats.
template <class Body> void share(std::size_t n, std::size_t each, std::size_t threads, const Body& body) {
    const std::size_t parts = pieces(n, threads, std::max<std::size_t>(1, least_work / std::max<std::size_t>(1, each)));
    const Cuts cut{n, 1, parts};
    parallel(parts, threads, [&](std::size_t i) { body(cut(i), cut(i + 1)); });
}

std::vector<std::size_t> with_residual(std::size_t x, std::size_t y, bool residual) {
    std::vector<std::size_t> sizes{x};
    if (residual) sizes.push_back(y);
    return sizes;
}

// One over how many cells each window of a dimension holds.
Floats32 inverse_counts(std::size_t in, std::size_t out, std::size_t kernel, std::size_t stride, std::size_t dilation, std::size_t before,
                        std::size_t after, bool padding) {
    Floats32 scale(out);
    for (std::size_t o = 0; o < out; ++o) {
        std::size_t count = 0;
        for (std::size_t k = 0; k < kernel; ++k) {
            const std::size_t at = o * stride + k * dilation;
            count += padding ? at < before + in + after : at >= before && at < before + in;
        }
        scale[o] = count == 0 ? 0.0f : 1.0f / static_cast<float>(count);
    }
    return scale;
}

}  // namespace

DepthwiseLayer::DepthwiseLayer(std::size_t channels, std::size_t multiplier, const Window& window, Floats32 w, Floats32 bias,
                               bool residual, Act act)
    : Layer(with_residual(channels * window.in_h * window.in_w, channels * multiplier * window.out_h * window.out_w, residual),
            channels * multiplier * window.out_h * window.out_w),
      channels_(channels), multiplier_(multiplier), window_(window), w_(std::move(w)), bias_(std::move(bias)), act_(act) {}

void DepthwiseLayer::run(const float* const* inputs, float* output, float*, std::size_t batch, std::size_t threads) const {
    const auto& k = plane_kernels();
    const std::size_t room = k.tile_floats(window_), planes = batch * channels_ * multiplier_;
    const Depthwise d{window_, inputs[0], w_.data(), bias_.empty() ? nullptr : bias_.data(),
                      input_sizes().size() == 2 ? inputs[1] : nullptr, output, channels_ * multiplier_, multiplier_, act_};
    share(planes, 2 * window_.in_h * window_.in_w, threads, [&](std::size_t from, std::size_t to) {
        k.depthwise(d, from, to, scratch(0, room));
    });
}

DirectConv::DirectConv(std::size_t in, std::size_t out, const Window& window, const float* w, Floats32 bias, bool residual, Act act)
    : Layer(with_residual(in * window.in_h * window.in_w, out * window.out_h * window.out_w, residual), out * window.out_h * window.out_w),
      in_(in), out_(out), window_(window), bias_(std::move(bias)), act_(act) {
    const std::size_t taps = in * window.kernel_h * window.kernel_w;
    w_.assign((out + DIRECT_OUT - 1) / DIRECT_OUT * DIRECT_OUT * taps, 0.0f);
    for (std::size_t o = 0; o < out; ++o)
        for (std::size_t t = 0; t < taps; ++t) w_[(o / DIRECT_OUT * taps + t) * DIRECT_OUT + o % DIRECT_OUT] = w[o * taps + t];
}

void DirectConv::run(const float* const* inputs, float* output, float*, std::size_t batch, std::size_t threads) const {
    const auto& k = plane_kernels();
    const Direct d{window_, inputs[0], w_.data(), bias_.empty() ? nullptr : bias_.data(), input_sizes().size() == 2 ? inputs[1] : nullptr,
                   output, in_, out_, act_};
    const std::size_t room = k.direct_floats(d), tiles = (window_.out_h + DIRECT_ROWS - 1) / DIRECT_ROWS;
    share(batch * tiles, DIRECT_ROWS * window_.out_w * out_, threads, [&](std::size_t from, std::size_t to) {
        for (std::size_t i = from; i < to; ++i) k.direct(d, i / tiles, i % tiles * DIRECT_ROWS, scratch(0, room));
    });
}

PoolLayer::PoolLayer(std::size_t channels, const Window& window, std::size_t bottom, std::size_t right, Pool kind)
    : Layer({channels * window.in_h * window.in_w}, channels * window.out_h * window.out_w), channels_(channels), window_(window) {
    if (kind == Pool::maximum) return;
    const Window& w = window;
    const bool padding = kind == Pool::average_with_padding;
    scale_h_ = inverse_counts(w.in_h, w.out_h, w.kernel_h, w.stride_h, w.dilation_h, w.top, bottom, padding);
    scale_w_ = inverse_counts(w.in_w, w.out_w, w.kernel_w, w.stride_w, w.dilation_w, w.left, right, padding);
}

void PoolLayer::run(const float* const* inputs, float* output, float*, std::size_t batch, std::size_t threads) const {
    const auto& k = plane_kernels();
    const std::size_t room = k.tile_floats(window_);
    const bool average = !scale_h_.empty();
    const Pooling p{window_, inputs[0], average ? scale_h_.data() : nullptr, average ? scale_w_.data() : nullptr, output};
    share(batch * channels_, 2 * window_.in_h * window_.in_w, threads, [&](std::size_t from, std::size_t to) {
        k.pool(p, from, to, scratch(0, room));
    });
}

AdaptiveAverage::AdaptiveAverage(std::size_t channels, std::size_t in_h, std::size_t in_w, std::size_t out_h, std::size_t out_w)
    : Layer({channels * in_h * in_w}, channels * out_h * out_w), channels_(channels), in_h_(in_h), in_w_(in_w), out_h_(out_h),
      out_w_(out_w) {}

void AdaptiveAverage::run(const float* const* inputs, float* output, float*, std::size_t batch, std::size_t threads) const {
    const auto& k = plane_kernels();
    share(batch * channels_, in_h_ * in_w_, threads, [&](std::size_t from, std::size_t to) {
        for (std::size_t p = from; p < to; ++p) {
            const float* x = inputs[0] + p * in_h_ * in_w_;
            for (std::size_t i = 0; i < out_h_; ++i)
                for (std::size_t j = 0; j < out_w_; ++j) {
                    const std::size_t top = i * in_h_ / out_h_, bottom = ((i + 1) * in_h_ + out_h_ - 1) / out_h_;
                    const std::size_t left = j * in_w_ / out_w_, right = ((j + 1) * in_w_ + out_w_ - 1) / out_w_;
                    float sum = 0;
                    if (right - left == in_w_) {
                        sum = k.sum(x + top * in_w_, (bottom - top) * in_w_);
                    } else {
                        for (std::size_t y = top; y < bottom; ++y) sum += k.sum(x + y * in_w_ + left, right - left);
                    }
                    output[(p * out_h_ + i) * out_w_ + j] = sum / static_cast<float>((bottom - top) * (right - left));
                }
        }
    });
}

Elementwise::Elementwise(Op op, std::size_t size, Act act)
    : Layer(op == Op::activation ? std::vector<std::size_t>{size} : std::vector<std::size_t>{size, size}, size), op_(op), act_(act) {}

void Elementwise::run(const float* const* inputs, float* output, float*, std::size_t batch, std::size_t threads) const {
    const auto& k = plane_kernels();
    const float *a = inputs[0], *b = op_ == Op::activation ? nullptr : inputs[1];
    share(batch * output_size(), 2, threads, [&](std::size_t from, std::size_t to) {
        if (op_ == Op::activation)
            k.affine(a + from, 1.0f, 0.0f, output + from, to - from, act_);
        else
            (op_ == Op::add ? k.add : k.multiply)(a + from, b + from, output + from, to - from, act_);
    });
}

ScaleLayer::ScaleLayer(std::size_t channels, std::size_t pixels, Floats32 scale, Floats32 shift, Act act)
    : Layer(scale.empty() ? std::vector<std::size_t>{channels * pixels, channels} : std::vector<std::size_t>{channels * pixels},
            channels * pixels),
      channels_(channels), pixels_(pixels), scale_(std::move(scale)), shift_(std::move(shift)), act_(act) {}

void ScaleLayer::run(const float* const* inputs, float* output, float*, std::size_t batch, std::size_t threads) const {
    const auto& k = plane_kernels();
    share(batch * channels_, 2 * pixels_, threads, [&](std::size_t from, std::size_t to) {
        for (std::size_t p = from; p < to; ++p) {
            const float scale = scale_.empty() ? inputs[1][p] : scale_[p % channels_];
            const float shift = shift_.empty() ? 0.0f : shift_[p % channels_];
            k.affine(inputs[0] + p * pixels_, scale, shift, output + p * pixels_, pixels_, act_);
        }
    });
}

void SoftmaxLayer::run(const float* const* inputs, float* output, float*, std::size_t batch, std::size_t threads) const {
    const auto& k = plane_kernels();
    const std::size_t n = output_size();
    share(batch, 4 * n, threads, [&](std::size_t from, std::size_t to) {
        for (std::size_t s = from; s < to; ++s) k.softmax(inputs[0] + s * n, output + s * n, n);
    });
}

Concat::Concat(const std::vector<std::size_t>& sizes) : Layer(sizes, [&] {
    std::size_t total = 0;
    for (const std::size_t size : sizes) total += size;
    return total;
}()) {}

void Concat::run(const float* const* inputs, float* output, float*, std::size_t batch, std::size_t threads) const {
    const auto& sizes = input_sizes();
    share(batch, 2 * output_size(), threads, [&](std::size_t from, std::size_t to) {
        for (std::size_t s = from; s < to; ++s) {
            float* y = output + s * output_size();
            for (std::size_t i = 0; i < sizes.size(); y += sizes[i++])
                if (sizes[i] != 0) std::memcpy(y, inputs[i] + s * sizes[i], sizes[i] * sizeof(float));
        }
    });
}

Slice::Slice(std::size_t size, std::size_t from, std::size_t to) : Layer({size}, to - from), from_(from) {}

void Slice::run(const float* const* inputs, float* output, float*, std::size_t batch, std::size_t threads) const {
    const std::size_t n = output_size(), all = input_sizes()[0];
    if (n == 0) return;
    share(batch, 2 * n, threads, [&](std::size_t from, std::size_t to) {
        for (std::size_t s = from; s < to; ++s) std::memcpy(output + s * n, inputs[0] + s * all + from_, n * sizeof(float));
    });
}

Upsample::Upsample(std::size_t channels, std::size_t in_h, std::size_t in_w, std::size_t out_h, std::size_t out_w)
    : Layer({channels * in_h * in_w}, channels * out_h * out_w), channels_(channels), in_w_(in_w) {
    const auto sources = [](std::size_t in, std::size_t out) {
        const float scale = static_cast<float>(in) / static_cast<float>(out);
        std::vector<std::size_t> from(out);
        for (std::size_t i = 0; i < out; ++i) from[i] = std::min(static_cast<std::size_t>(static_cast<float>(i) * scale), in - 1);
        return from;
    };
    rows_ = sources(in_h, out_h);
    columns_ = sources(in_w, out_w);
}

void Upsample::run(const float* const* inputs, float* output, float*, std::size_t batch, std::size_t threads) const {
    const std::size_t width = columns_.size(), in_plane = input_sizes()[0] / std::max<std::size_t>(1, channels_);
    share(batch * channels_, 2 * rows_.size() * width, threads, [&](std::size_t from, std::size_t to) {
        for (std::size_t p = from; p < to; ++p) {
            float* y = output + p * rows_.size() * width;
            for (std::size_t i = 0; i < rows_.size(); ++i, y += width) {
                const float* x = inputs[0] + p * in_plane + rows_[i] * in_w_;
                if (i != 0 && rows_[i] == rows_[i - 1])
                    std::memcpy(y, y - width, width * sizeof(float));
                else
                    for (std::size_t j = 0; j < width; ++j) y[j] = x[columns_[j]];
            }
        }
    });
}

DenseLayer::DenseLayer(std::size_t rows, std::size_t cols, const float* w, Floats32 bias, Act act)
    : Layer({cols}, rows), rows_(rows), cols_(cols), kernels_(plane_kernels()), bias_(std::move(bias)), act_(act) {
    const std::size_t block = DENSE_VECTORS * kernels_.lanes;
    packed_.resize((rows + block - 1) / block * block * cols);
    kernels_.pack_dense(w, rows, cols, packed_.data());
}

void DenseLayer::run(const float* const* inputs, float* output, float*, std::size_t batch, std::size_t threads) const {
    const std::size_t block = DENSE_VECTORS * kernels_.lanes;
    share((rows_ + block - 1) / block, block * cols_, threads, [&](std::size_t from, std::size_t to) {
        kernels_.dense(packed_.data(), bias_.empty() ? nullptr : bias_.data(), inputs[0], output, rows_, cols_, batch, from, to, act_);
    });
}

}  // namespace rarefy
