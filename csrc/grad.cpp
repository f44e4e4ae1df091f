#include "grad.hpp"

#include <algorithm>
#include <cstring>

#include "pool.hpp"
#include "scratch.hpp"

namespace rarefy {
namespace {

// Sorts nonzeros by `row_of`; those of a row keep the order in which `walk` visits them.
template <class Walk> Transposed sort_by_row(std::size_t rows, std::size_t nnz, const Walk& walk) {
    Transposed t{std::vector<std::int64_t>(rows + 1), std::vector<std::int32_t>(nnz), std::vector<std::uint32_t>(nnz)};
    walk([&](std::size_t row, std::size_t, std::size_t) { ++t.crow[row + 1]; });
    for (std::size_t r = 0; r < rows; ++r) t.crow[r + 1] += t.crow[r];
    std::vector<std::int64_t> next(t.crow.begin(), t.crow.end() - 1);
    walk([&](std::size_t row, std::size_t col, std::size_t position) {
        const auto at = static_cast<std::size_t>(next[row]++);
        t.col[at] = static_cast<std::int32_t>(col);
        t.position[at] = static_cast<std::uint32_t>(position);
    });
    return t;
}

Transposed transposed(const Csr& w) {
    return sort_by_row(w.cols, static_cast<std::size_t>(w.crow[w.rows]), [&](const auto& visit) {
        for (std::size_t m = 0; m < w.rows; ++m)
            for (auto i = static_cast<std::size_t>(w.crow[m]); i < static_cast<std::size_t>(w.crow[m + 1]); ++i)
                visit(static_cast<std::size_t>(w.col[i]), m, i);
    });
}

// [in_channels, out_channels / groups * taps], the taps in reverse.
Transposed flipped(const Csr& w, const ConvShape& s) {
    const std::size_t taps = s.taps(), out = s.out_channels / s.groups, in = s.in_channels / s.groups;
    return sort_by_row(s.in_channels, static_cast<std::size_t>(w.crow[w.rows]), [&](const auto& visit) {
        for (std::size_t m = 0; m < w.rows; ++m)
            for (auto i = static_cast<std::size_t>(w.crow[m + 1]); i-- > static_cast<std::size_t>(w.crow[m]);) {
                const auto k = static_cast<std::size_t>(w.col[i]);
                visit(m / out * in + k / taps, m % out * taps + (taps - 1 - k % taps), i);
            }
    });
}

// The convolution that gives the input's gradient, on a dy that was spread out to (height, width) of this shape.
ConvShape gradient_shape(const ConvShape& s) {
    ConvShape g;
    g.in_channels = s.out_channels;
    g.out_channels = s.in_channels;
    g.groups = s.groups;
    g.kernel_h = s.kernel_h;
    g.kernel_w = s.kernel_w;
    g.dilation_h = s.dilation_h;
    g.dilation_w = s.dilation_w;
    const std::size_t reach_h = s.dilation_h * (s.kernel_h - 1), reach_w = s.dilation_w * (s.kernel_w - 1);
    // Padding beyond the kernel's reach adds rows of dy that see no input: they are cut off when dy is spread out.
    g.pad_h = reach_h > s.pad_h ? reach_h - s.pad_h : 0;
    g.pad_w = reach_w > s.pad_w ? reach_w - s.pad_w : 0;
    g.height = s.height + reach_h - 2 * g.pad_h;
    g.width = s.width + reach_w - 2 * g.pad_w;
    return g;
}

}  // namespace

Sampled::Sampled(const Csr& w)
    : rows_(w.rows), cols_(w.cols), col_(w.col, w.col + w.crow[w.rows]) {
    const std::size_t fits = l1_bytes() * 15 / 16 / (SAMPLED_VECTORS * strip_kernels().lanes * sizeof(float));
    const std::size_t all = std::max<std::size_t>(rows_ * cols_, 1), nnz = std::max<std::size_t>(col_.size(), 1);
    const std::size_t size = std::clamp<std::size_t>(std::max(fits, 6 * all / nnz), 16, 32768);
    const std::size_t blocks = std::max<std::size_t>(1, (cols_ + size - 1) / size);
    for (std::size_t b = 1; b <= blocks; ++b) ends_.push_back(cols_ * b / blocks);
    at_.resize((blocks + 1) * rows_);
    for (std::size_t m = 0; m < rows_; ++m) {
        auto at = static_cast<std::size_t>(w.crow[m]);
        at_[m] = static_cast<std::uint32_t>(at);
        for (std::size_t b = 0; b < blocks; ++b) {
            while (at < static_cast<std::size_t>(w.crow[m + 1]) && static_cast<std::size_t>(w.col[at]) < ends_[b]) ++at;
            at_[(b + 1) * rows_ + m] = static_cast<std::uint32_t>(at);
        }
    }
}

void Sampled::range(std::size_t column, std::size_t columns, std::size_t vectors, std::size_t row, std::size_t rows,
                    const Pack& pack_x, const Pack& pack_dy, float* out) const {
    const std::size_t lanes = strip_kernels().lanes;
    const SampledKernels& k = RAREFY_AT_LEVEL(sampled);
    for (std::size_t c = 0; c < columns; c += vectors * lanes) {
        const std::size_t here = std::min(columns - c, vectors * lanes), v = (here + lanes - 1) / lanes, width = v * lanes;
        float* const dy = scratch(1, rows * width);
        pack_dy(column + c, here, row, rows, dy, width);
        for (std::size_t b = 0; b < ends_.size(); ++b) {
            const std::size_t first = b == 0 ? 0 : ends_[b - 1], size = ends_[b] - first;
            float* const strip = scratch(0, size * width);
            pack_x(column + c, here, first, size, strip, width);
            k.dots[v](at_.data() + b * rows_ + row, at_.data() + (b + 1) * rows_ + row, rows, col_.data(),
                      static_cast<std::int32_t>(first), strip, dy, out);
        }
    }
}

void Sampled::run(std::size_t columns, const Pack& pack_x, const Pack& pack_dy, float* out, std::size_t threads) const {
    std::fill(out, out + col_.size(), 0.0f);
    if (columns == 0 || rows_ == 0 || col_.empty()) return;
    const std::size_t lanes = strip_kernels().lanes;
    const std::size_t vectors = columns >= threads * SAMPLED_VECTORS * lanes ? SAMPLED_VECTORS : SAMPLED_VECTORS / 2;
    const std::size_t tiles = (columns + vectors * lanes - 1) / (vectors * lanes);
    if (threads <= 1) return range(0, columns, vectors, 0, rows_, pack_x, pack_dy, out);
    if (tiles >= threads) {  // each thread sums its own columns, then the sums are added
        std::vector<std::vector<float>> own(threads - 1, std::vector<float>(col_.size()));
        const Cuts cut{columns, vectors * lanes, threads};
        parallel(threads, threads, [&](std::size_t t) {
            range(cut(t), cut(t + 1) - cut(t), vectors, 0, rows_, pack_x, pack_dy, t == 0 ? out : own[t - 1].data());
        });
        for (const auto& part : own)
            for (std::size_t i = 0; i < part.size(); ++i) out[i] += part[i];
        return;
    }
    std::vector<std::size_t> first{0};  // rows of about equal work
    for (std::size_t t = 1; t < threads; ++t) {
        const auto target = static_cast<std::uint32_t>(col_.size() / threads * t);
        first.push_back(static_cast<std::size_t>(std::lower_bound(at_.begin(), at_.begin() + static_cast<std::ptrdiff_t>(rows_), target) -
                                                 at_.begin()));
    }
    first.push_back(rows_);
    parallel(threads, threads, [&](std::size_t t) {
        if (first[t] < first[t + 1]) range(0, columns, vectors, first[t], first[t + 1] - first[t], pack_x, pack_dy, out);
    });
}

namespace {

Spmm backward_product(const Csr& w, std::size_t n, std::size_t threads) {
    const Transposed t = transposed(w);
    return Spmm({t.crow.data(), t.col.data(), nullptr, w.cols, w.rows, t.position.data()}, n, threads);
}

Conv backward_convolution(const Csr& w, const ConvShape& s, std::size_t batch, std::size_t threads) {
    const Transposed t = flipped(w, s);
    return Conv({t.crow.data(), t.col.data(), nullptr, s.in_channels, s.out_channels / s.groups * s.taps(), t.position.data()},
                gradient_shape(s), batch, threads);
}

}  // namespace

LinearTraining::LinearTraining(const Csr& w, std::size_t n, std::size_t threads)
    : rows_(w.rows), cols_(w.cols), forward_(w, n, threads), backward_(backward_product(w, n, threads)), sampled_(w) {}

void LinearTraining::forward(const float* values, const float* x, std::size_t n, const float* bias, float* y,
                             std::size_t threads) {
    const std::lock_guard<std::mutex> lock(turn_);
    forward_.set_values(values);
    forward_.linear(x, cols_, n, y, rows_, bias, Act::none, threads);
}

void LinearTraining::input_gradient(const float* values, const float* dy, std::size_t n, float* dx, std::size_t threads) {
    const std::lock_guard<std::mutex> lock(turn_);
    backward_.set_values(values);
    backward_.linear(dy, rows_, n, dx, cols_, nullptr, Act::none, threads);
}

void LinearTraining::values_gradient(const float* x, const float* dy, std::size_t n, float* out, std::size_t threads) const {
    const StripKernels& k = strip_kernels();
    const auto features = [&k](const float* from, std::size_t ld) {
        return [&k, from, ld](std::size_t column, std::size_t columns, std::size_t first, std::size_t size, float* strip,
                              std::size_t width) { k.pack_transposed(from + column * ld + first, ld, size, columns, strip, width); };
    };
    sampled_.run(n, features(x, cols_), features(dy, rows_), out, threads);
}

ConvTraining::ConvTraining(const Csr& w, const ConvShape& s, std::size_t batch, std::size_t threads)
    : nnz_(static_cast<std::size_t>(w.crow[w.rows])), forward_(w, s, batch, threads),
      backward_(backward_convolution(w, s, batch, threads)) {
    const std::size_t rows = s.out_channels / s.groups;
    std::vector<std::int64_t> crow(rows + 1);
    for (std::size_t g = 0; g < s.groups; ++g) {
        const std::int64_t from = w.crow[g * rows];
        for (std::size_t m = 0; m <= rows; ++m) crow[m] = w.crow[g * rows + m] - from;
        sampled_.emplace_back(Csr{crow.data(), w.col + from, nullptr, rows, w.cols});
        first_value_.push_back(static_cast<std::size_t>(from));
    }
}

void ConvTraining::forward(const float* values, const float* x, std::size_t batch, const float* bias, float* y,
                           std::size_t threads) {
    const std::lock_guard<std::mutex> lock(turn_);
    forward_.set_values(values);
    forward_.run(x, batch, y, bias, nullptr, Act::none, threads);
}

void ConvTraining::input_gradient(const float* values, const float* dy, std::size_t batch, float* dx, std::size_t threads) {
    const std::lock_guard<std::mutex> lock(turn_);
    backward_.set_values(values);
    const ConvShape &s = shape(), &g = backward_.shape();
    const std::size_t out_h = s.out_height(), out_w = s.out_width();
    const std::size_t cut_h = s.pad_h + g.pad_h - s.dilation_h * (s.kernel_h - 1);
    const std::size_t cut_w = s.pad_w + g.pad_w - s.dilation_w * (s.kernel_w - 1);
    if (s.stride_h == 1 && s.stride_w == 1 && cut_h == 0 && cut_w == 0)
        return backward_.run(dy, batch, dx, nullptr, nullptr, Act::none, threads);
    // Spread dy out by the stride, and cut what the padding added beyond the kernel's reach; some images at a time, whose zeros
    // between the pixels are written once.
    const std::size_t image = s.out_channels * g.height * g.width, some = std::max<std::size_t>(1, SPREAD_FLOATS / image);
    std::vector<float> spread(std::min(some, batch) * image);
    for (std::size_t first = 0; first < batch; first += some) {
        const std::size_t images = std::min(some, batch - first);
        parallel(images, threads, [&](std::size_t i) {
            for (std::size_t p = i * s.out_channels; p < (i + 1) * s.out_channels; ++p) {
                const float* from = dy + (first * s.out_channels + p) * out_h * out_w;
                float* to = spread.data() + p * g.height * g.width;
                for (std::size_t y = 0; y < out_h; ++y) {
                    const std::size_t row = y * s.stride_h;
                    if (row < cut_h || row - cut_h >= g.height) continue;
                    for (std::size_t x = 0; x < out_w; ++x) {
                        const std::size_t column = x * s.stride_w;
                        if (column < cut_w || column - cut_w >= g.width) continue;
                        to[(row - cut_h) * g.width + column - cut_w] = from[y * out_w + x];
                    }
                }
            }
        });
        backward_.run(spread.data(), images, dx + first * s.in_channels * s.height * s.width, nullptr, nullptr, Act::none, threads);
    }
}

void ConvTraining::values_gradient(const float* x, const float* dy, std::size_t batch, float* out, std::size_t threads) const {
    const ConvShape& s = shape();
    const std::size_t pixels = s.out_height() * s.out_width(), rows = s.out_channels / s.groups;
    for (std::size_t g = 0; g < s.groups; ++g) {
        const auto planes = [&, g](std::size_t column, std::size_t columns, std::size_t first, std::size_t size, float* tile,
                                   std::size_t width) {
            for (std::size_t m = 0; m < size; ++m) {
                float* to = tile + m * width;
                for (std::size_t c = 0; c < columns;) {
                    const std::size_t at = column + c, image = at / pixels, pixel = at % pixels,
                                      n = std::min(columns - c, pixels - pixel);
                    std::memcpy(to + c, dy + ((image * s.groups + g) * rows + first + m) * pixels + pixel, n * sizeof(float));
                    c += n;
                }
                std::fill(to + columns, to + width, 0.0f);
            }
        };
        sampled_[g].run(batch * pixels, forward_.packer(x, batch, g), planes, out + first_value_[g], threads);
    }
}

}  // namespace rarefy
