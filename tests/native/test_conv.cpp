#include "conv.hpp"
#include "grad.hpp"
#include "sparse.hpp"

using check::Floats;
using check::pick;
using check::randoms;
using namespace rarefy;

namespace {

ConvShape some_shape() {
    ConvShape s{};
    s.groups = pick({1, 1, 1, 2});
    s.in_channels = s.groups * pick(1, 5), s.out_channels = s.groups * pick(1, 9);
    s.kernel_h = pick(1, 4), s.kernel_w = pick({1, 3, s.kernel_h, s.kernel_h});
    s.stride_h = pick(1, 3), s.stride_w = pick({1, 2, s.stride_h});
    s.dilation_h = pick({1, 1, 2}), s.dilation_w = pick({1, 1, 3});
    s.pad_h = pick(0, 3), s.pad_w = pick(0, 3);
    s.height = s.dilation_h * (s.kernel_h - 1) + pick(1, 9), s.width = s.dilation_w * (s.kernel_w - 1) + pick({1, 4, 7, 16, 30});
    return s;
}

// Calls each(weight position, x index, y index) for every product in the convolution.
template <class Each> void products(const check::Sparse& w, const ConvShape& s, std::size_t batch, const Each& each) {
    const std::size_t oh = s.out_height(), ow = s.out_width(), in = s.in_channels / s.groups;
    check::entries(w, [&](std::size_t row, std::size_t col, std::size_t at) {
        const std::size_t c = row / (s.out_channels / s.groups) * in + col / s.taps(), ky = col % s.taps() / s.kernel_w, kx = col % s.kernel_w;
        for (std::size_t b = 0; b < batch; ++b)
            for (std::size_t i = 0; i < oh; ++i)
                for (std::size_t j = 0; j < ow; ++j) {
                    const std::size_t y = i * s.stride_h + ky * s.dilation_h - s.pad_h, x = j * s.stride_w + kx * s.dilation_w - s.pad_w;
                    if (y < s.height && x < s.width)
                        each(at, ((b * s.in_channels + c) * s.height + y) * s.width + x, ((b * s.out_channels + row) * oh + i) * ow + j);
                }
    });
}

}  // namespace

TEST(convolutions_and_their_gradients) {
    for (int round = 0; round < 60; ++round) {
        const ConvShape s = some_shape();
        const std::size_t batch = pick(1, 3), out = s.out_channels * s.out_height() * s.out_width();
        const auto w = check::sparse(s.out_channels, s.fan_in(), static_cast<double>(pick(0, 10)) / 10);
        const Floats x = randoms(batch * s.in_channels * s.height * s.width), dy = randoms(batch * out), bias = randoms(s.out_channels);
        std::vector<double> y(batch * out), dx(x.size()), dw(w.values.size());
        for (std::size_t i = 0; i < y.size(); ++i) y[i] = bias[i / (s.out_height() * s.out_width()) % s.out_channels];
        products(w, s, batch, [&](std::size_t at, std::size_t xi, std::size_t yi) {
            y[yi] += double{w.values[at]} * x[xi];
            dx[xi] += double{w.values[at]} * dy[yi];
            dw[at] += double{x[xi]} * dy[yi];
        });
        const Conv conv(w.csr(), s, batch, 2);
        ConvTraining training(w.csr(), s, batch, 2);
        for (std::size_t threads = 1; threads <= 2; ++threads) {
            Floats got(batch * out, NAN), got_dx(x.size(), NAN), got_dw(dw.size(), NAN);
            conv.run(x.data(), batch, got.data(), bias.data(), nullptr, Act::none, threads);
            check::near(got, y);
            training.forward(w.values.data(), x.data(), batch, bias.data(), got.data(), threads);
            check::near(got, y);
            training.input_gradient(w.values.data(), dy.data(), batch, got_dx.data(), threads);
            check::near(got_dx, dx);
            training.values_gradient(x.data(), dy.data(), batch, got_dw.data(), threads);
            check::near(got_dw, dw);
        }
    }
}

TEST(linear_gradients) {
    for (int round = 0; round < 40; ++round) {
        const std::size_t m = pick(1, 60), k = pick({1, 17, 64, 200}), n = pick({1, 3, 16, 50});
        const auto w = check::sparse(m, k, static_cast<double>(pick(0, 10)) / 10);
        const Floats x = randoms(n * k), dy = randoms(n * m);
        std::vector<double> y(n * m), dx(n * k), dw(w.values.size());
        check::entries(w, [&](std::size_t row, std::size_t col, std::size_t at) {
            for (std::size_t i = 0; i < n; ++i) {
                y[i * m + row] += double{w.values[at]} * x[i * k + col];
                dx[i * k + col] += double{w.values[at]} * dy[i * m + row];
                dw[at] += double{x[i * k + col]} * dy[i * m + row];
            }
        });
        LinearTraining training(w.csr(), n, 2);
        for (std::size_t threads = 1; threads <= 2; ++threads) {
            Floats got(n * m, NAN), got_dx(n * k, NAN), got_dw(dw.size(), NAN);
            training.forward(w.values.data(), x.data(), n, nullptr, got.data(), threads);
            check::near(got, y);
            training.input_gradient(w.values.data(), dy.data(), n, got_dx.data(), threads);
            check::near(got_dx, dx);
            training.values_gradient(x.data(), dy.data(), n, got_dw.data(), threads);
            check::near(got_dw, dw);
        }
    }
}
