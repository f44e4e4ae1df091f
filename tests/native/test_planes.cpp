#include <algorithm>

#include "check.hpp"
#include "plane_layers.hpp"

using check::Floats;
using check::pick;
using check::randoms;
using namespace rarefy;

namespace {

std::vector<float> vector_of(const Floats& x) { return {x.data(), x.data() + x.size()}; }

double act(double x, Act a) {
    const double sigmoid = 1 / (1 + std::exp(-x)), hard = std::min(6.0, std::max(0.0, x + 3)) / 6;
    switch (a) {
        case Act::none: return x;
        case Act::relu: return std::max(0.0, x);
        case Act::relu6: return std::min(6.0, std::max(0.0, x));
        case Act::hardswish: return x * hard;
        case Act::silu: return x * sigmoid;
        case Act::sigmoid: return sigmoid;
        case Act::hardsigmoid: return hard;
    }
    return x;
}

Act some_act() { return static_cast<Act>(pick(0, 6)); }

Window some_window() {
    Window w{};
    w.kernel_h = pick(1, 5), w.kernel_w = pick({1, 3, 5, 7, w.kernel_h, w.kernel_h});
    w.stride_h = pick(1, 3), w.stride_w = pick({1, 2, 3, w.stride_h, w.stride_h});
    w.dilation_h = pick({1, 1, 1, 2}), w.dilation_w = pick({1, 1, 1, 3});
    w.top = pick(0, w.kernel_h), w.left = pick(0, w.kernel_w);
    w.in_h = pick(1, 20), w.in_w = pick({1, 3, 7, 14, 16, 17, 33, 70});
    const std::size_t reach_h = (w.kernel_h - 1) * w.dilation_h + 1, reach_w = (w.kernel_w - 1) * w.dilation_w + 1;
    w.in_h += w.in_h + 2 * w.top < reach_h ? reach_h : 0;
    w.in_w += w.in_w + 2 * w.left < reach_w ? reach_w : 0;
    w.out_h = (w.in_h + 2 * w.top - reach_h) / w.stride_h + 1;
    w.out_w = (w.in_w + 2 * w.left - reach_w) / w.stride_w + 1;
    return w;
}

// Calls tap(x's index, ky, kx) for the taps of output (i, j) that lie inside.
template <class Tap> void taps(const Window& w, std::size_t i, std::size_t j, const Tap& tap) {
    for (std::size_t ky = 0; ky < w.kernel_h; ++ky)
        for (std::size_t kx = 0; kx < w.kernel_w; ++kx) {
            const std::size_t y = i * w.stride_h + ky * w.dilation_h - w.top, x = j * w.stride_w + kx * w.dilation_w - w.left;
            if (y < w.in_h && x < w.in_w) tap(y * w.in_w + x, ky, kx);
        }
}

void run(const Layer& layer, const std::vector<const float*>& inputs, std::size_t batch, const std::vector<double>& expected) {
    for (std::size_t threads = 1; threads <= 2; ++threads) {
        Floats y(batch * layer.output_size(), NAN);
        layer.run(inputs.data(), y.data(), nullptr, batch, threads);
        check::near(y, expected);
    }
}

}  // namespace

TEST(depthwise_layers) {
    for (int round = 0; round < 60; ++round) {
        const Window w = some_window();
        const std::size_t c = pick(1, 5), m = pick({1, 1, 2}), batch = pick(1, 2), n = w.in_h * w.in_w, o = w.out_h * w.out_w;
        const bool residual = pick(0, 1) == 1, biased = pick(0, 1) == 1;
        const Act a = some_act();
        const Floats x = randoms(batch * c * n), k = randoms(c * m * w.kernel_h * w.kernel_w), b = randoms(c * m), r = randoms(batch * c * m * o);
        std::vector<double> expected;
        for (std::size_t p = 0; p < batch * c * m; ++p)
            for (std::size_t i = 0; i < o; ++i) {
                const std::size_t channel = p % (c * m);
                double sum = (biased ? b[channel] : 0.0) + (residual ? r[p * o + i] : 0.0);
                taps(w, i / w.out_w, i % w.out_w, [&](std::size_t at, std::size_t ky, std::size_t kx) {
                    sum += double{x[p / m * n + at]} * k[(channel * w.kernel_h + ky) * w.kernel_w + kx];
                });
                expected.push_back(act(sum, a));
            }
        const DepthwiseLayer layer(c, m, w, vector_of(k), biased ? vector_of(b) : std::vector<float>{}, residual, a);
        run(layer, residual ? std::vector<const float*>{x.data(), r.data()} : std::vector<const float*>{x.data()}, batch, expected);
    }
}

TEST(dense_convolutions) {
    for (int round = 0; round < 40; ++round) {
        const Window w = some_window();
        const std::size_t c = pick(1, 4), out = pick(1, 9), batch = pick(1, 2), n = w.in_h * w.in_w, o = w.out_h * w.out_w;
        const Floats x = randoms(batch * c * n), k = randoms(out * c * w.kernel_h * w.kernel_w), b = randoms(out), r = randoms(batch * out * o);
        const Act a = some_act();
        std::vector<double> expected;
        for (std::size_t p = 0; p < batch * out; ++p)
            for (std::size_t i = 0; i < o; ++i) {
                double sum = double{b[p % out]} + r[p * o + i];
                for (std::size_t q = 0; q < c; ++q)
                    taps(w, i / w.out_w, i % w.out_w, [&](std::size_t at, std::size_t ky, std::size_t kx) {
                        sum += double{x[(p / out * c + q) * n + at]} * k[((p % out * c + q) * w.kernel_h + ky) * w.kernel_w + kx];
                    });
                expected.push_back(act(sum, a));
            }
        run(DirectConv(c, out, w, k.data(), vector_of(b), true, a), {x.data(), r.data()}, batch, expected);
    }
}

TEST(pools) {
    for (int round = 0; round < 40; ++round) {
        const Window w = some_window();
        const std::size_t planes = pick(1, 4), n = w.in_h * w.in_w, o = w.out_h * w.out_w;
        const Floats x = randoms(planes * n);
        std::vector<double> most, mean;
        for (std::size_t p = 0; p < planes; ++p)
            for (std::size_t i = 0; i < o; ++i) {
                double top = -1e30, sum = 0, count = 0;
                taps(w, i / w.out_w, i % w.out_w, [&](std::size_t at, std::size_t, std::size_t) {
                    top = std::max(top, double{x[p * n + at]});
                    sum += x[p * n + at], ++count;
                });
                most.push_back(top);
                mean.push_back(count == 0 ? 0 : sum / count);
            }
        run(PoolLayer(planes, w, w.top, w.left, Pool::average), {x.data()}, 1, mean);
        if (w.top < w.kernel_h && w.left < w.kernel_w && w.dilation_h == 1 && w.dilation_w == 1 && *std::min_element(most.begin(), most.end()) > -1e30)
            run(PoolLayer(planes, w, w.top, w.left, Pool::maximum), {x.data()}, 1, most);
    }
}

TEST(pointwise_layers) {
    for (const std::size_t n : {0u, 1u, 15u, 16u, 33u, 1000u, 40000u}) {
        const Floats a = randoms(2 * n), b = randoms(2 * n);
        const Act f = some_act();
        std::vector<double> one, sum, product;
        for (std::size_t i = 0; i < 2 * n; ++i) {
            one.push_back(act(a[i], f));
            sum.push_back(act(double{a[i]} + b[i], f));
            product.push_back(act(double{a[i]} * b[i], f));
        }
        run(Elementwise(Elementwise::Op::activation, n, f), {a.data()}, 2, one);
        run(Elementwise(Elementwise::Op::add, n, f), {a.data(), b.data()}, 2, sum);
        run(Elementwise(Elementwise::Op::multiply, n, f), {a.data(), b.data()}, 2, product);
        std::vector<double> joined, cut, soft;
        for (std::size_t s = 0; s < 2; ++s) {
            for (std::size_t i = 0; i < n; ++i) joined.push_back(a[s * n + i]);
            for (std::size_t i = 0; i < n; ++i) joined.push_back(b[s * n + i]);
            for (std::size_t i = n / 3; i < n / 2; ++i) cut.push_back(a[s * n + i]);
            double total = 0;
            for (std::size_t i = 0; i < n; ++i) total += std::exp(a[s * n + i]);
            for (std::size_t i = 0; i < n; ++i) soft.push_back(std::exp(a[s * n + i]) / total);
        }
        run(Concat({n, n}), {a.data(), b.data()}, 2, joined);
        run(Slice(n, n / 3, n / 2), {a.data()}, 2, cut);
        run(SoftmaxLayer(n), {a.data()}, 2, soft);
    }
}

TEST(scales_means_and_upsampling) {
    for (int round = 0; round < 20; ++round) {
        const std::size_t c = pick(1, 6), h = pick(1, 9), w = pick({1, 5, 16, 40}), oh = pick(1, 12), ow = pick(1, 50);
        const Floats x = randoms(c * h * w), s = randoms(c);
        std::vector<double> scaled, means, up;
        for (std::size_t i = 0; i < x.size(); ++i) scaled.push_back(double{x[i]} * s[i / (h * w)]);
        for (std::size_t p = 0; p < c; ++p) {
            double sum = 0;
            for (std::size_t i = 0; i < h * w; ++i) sum += x[p * h * w + i];
            means.push_back(sum / static_cast<double>(h * w));
        }
        run(ScaleLayer(c, h * w, {}, {}, Act::none), {x.data(), s.data()}, 1, scaled);
        run(ScaleLayer(c, h * w, vector_of(s), {}, Act::none), {x.data()}, 1, scaled);
        run(AdaptiveAverage(c, h, w, 1, 1), {x.data()}, 1, means);
        for (std::size_t p = 0; p < c; ++p)
            for (std::size_t i = 0; i < 3 * h; ++i)
                for (std::size_t j = 0; j < 2 * w; ++j) up.push_back(x[(p * h + i / 3) * w + j / 2]);
        run(Upsample(c, h, w, 3 * h, 2 * w), {x.data()}, 1, up);
        Floats y(c * oh * ow);
        const float* in[] = {x.data()};
        AdaptiveAverage(c, h, w, oh, ow).run(in, y.data(), nullptr, 1, 2);
        Upsample(c, h, w, oh, ow).run(in, y.data(), nullptr, 1, 2);
    }
}

TEST(dense_layers) {
    for (int round = 0; round < 20; ++round) {
        const std::size_t m = pick({1, 7, 16, 64, 65, 200}), k = pick(1, 40), batch = pick(1, 6);
        const Floats w = randoms(m * k), b = randoms(m), x = randoms(batch * k);
        std::vector<double> expected;
        for (std::size_t s = 0; s < batch; ++s)
            for (std::size_t i = 0; i < m; ++i) {
                double sum = b[i];
                for (std::size_t j = 0; j < k; ++j) sum += double{w[i * k + j]} * x[s * k + j];
                expected.push_back(sum);
            }
        run(DenseLayer(m, k, w.data(), vector_of(b), Act::none), {x.data()}, batch, expected);
    }
}
