#include "conv.hpp"

#include <algorithm>

namespace rarefy {

Conv::Conv(const Csr& w, const ConvShape& shape, std::size_t batch, std::size_t threads) : shape_(shape) {
    const std::size_t rows = shape.out_channels / shape.groups, pixels = shape.out_height() * shape.out_width();
    groups_.reserve(shape.groups);
    std::vector<std::int64_t> crow(rows + 1);
    for (std::size_t g = 0; g < shape.groups; ++g) {
        const std::int64_t from = w.crow[g * rows];
        for (std::size_t m = 0; m <= rows; ++m) crow[m] = w.crow[g * rows + m] - from;
        const bool placed = w.position != nullptr;
        const std::int64_t base = placed ? 0 : from;  // values by position are not cut into groups
        const Csr part{crow.data(),
                       w.col + from,
                       w.values == nullptr ? nullptr : w.values + base,
                       rows,
                       w.cols,
                       placed ? w.position + from : nullptr};
        first_value_.push_back(static_cast<std::size_t>(base));
        groups_.emplace_back(part, batch * pixels, threads);
    }
}

void Conv::set_values(const float* values) {
    for (std::size_t g = 0; g < groups_.size(); ++g) groups_[g].set_values(values + first_value_[g]);
}

std::size_t Conv::bytes() const {
    std::size_t all = 0;
    for (const Spmm& group : groups_) all += group.bytes();
    return all;
}

std::shared_ptr<const Fetches> Conv::fetches(std::size_t images) const {
    const std::size_t lanes = strip_kernels().lanes;
    const std::lock_guard<std::mutex> lock(guard_);
    auto& known = known_[{images, lanes}];
    if (known != nullptr) return known;
    const ConvShape& s = shape_;
    const auto height = static_cast<std::int64_t>(s.height), width = static_cast<std::int64_t>(s.width);
    const std::size_t out_w = s.out_width(), pixels = s.out_height() * out_w, columns = images * pixels;
    auto made = std::make_shared<Fetches>();
    made->vectors = (columns + lanes - 1) / lanes;
    made->first.reserve(s.taps() * made->vectors + 1);
    for (std::size_t tap = 0; tap < s.taps(); ++tap)
        for (std::size_t v = 0; v < made->vectors; ++v) {
            const std::size_t begin = made->all.size();
            made->first.push_back(static_cast<std::uint32_t>(begin));
            for (std::size_t lane = 0; lane < lanes && v * lanes + lane < columns; ++lane) {
                const std::size_t column = v * lanes + lane, image = column / pixels, pixel = column % pixels;
                const auto y = static_cast<std::int64_t>(pixel / out_w * s.stride_h + tap / s.kernel_w * s.dilation_h) -
                               static_cast<std::int64_t>(s.pad_h);
                const auto x = static_cast<std::int64_t>(pixel % out_w * s.stride_w + tap % s.kernel_w * s.dilation_w) -
                               static_cast<std::int64_t>(s.pad_w);
                if (y < 0 || y >= height || x < 0 || x >= width) continue;
                const std::int64_t at = static_cast<std::int64_t>(image * s.in_channels) * height * width + y * width + x,
                                   from = at - static_cast<std::int64_t>(lane * s.stride_w);
                if (made->all.size() == begin || made->all.back().from != from) made->all.push_back({from, 0});
                made->all.back().mask |= 1u << lane;
            }
        }
    made->first.push_back(static_cast<std::uint32_t>(made->all.size()));
    known = made;
    return known;
}

Conv::Packer Conv::packer(const float* x, std::size_t batch, std::size_t group) const {
    const ConvShape& s = shape_;
    const std::size_t lanes = strip_kernels().lanes, plane = s.height * s.width;
    const ConvKernels& k = RAREFY_AT_LEVEL(conv);
    const std::size_t pixels = s.out_height() * s.out_width(), image_step = s.in_channels * plane;
    const bool by_image = pixels % lanes == 0;  // every vector lies in one image, and one image's plan serves all
    return [&k, &s, lanes, plane, pixels, image_step, by_image, plan = fetches(by_image ? 1 : batch),
            from = x + group * (s.in_channels / s.groups) * plane](std::size_t column, std::size_t, std::size_t first,
                                                                   std::size_t size, float* strip, std::size_t width) {
        for (std::size_t c = 0; c < width;) {
            const std::size_t image = by_image ? (column + c) / pixels : 0, at = column + c - image * pixels;
            const std::size_t n = by_image ? std::min(width - c, pixels - at) : width;
            const FetchPlan here{plan->first.data() + at / lanes, plan->all.data(), plan->vectors, s.taps(), s.stride_w, plane};
            k.fetch(from + image * image_step, here, first, size, n / lanes, strip + c, width);
            c += n;
        }
    };
}

void Conv::run(const float* x, std::size_t batch, float* y, const float* bias, const float* residual, Act act,
               std::size_t threads) const {
    const ConvShape& s = shape_;
    if (batch == 0) return;
    if (s.pointwise() && s.groups == 1) return groups_[0].planes(x, batch, s.height * s.width, y, bias, residual, act, threads);
    const std::size_t pixels = s.out_height() * s.out_width(), rows = s.out_channels / s.groups, plane = s.height * s.width;
    const bool joined = groups_[0].joins(batch, pixels);
    const auto plan = fetches(joined ? batch : 1);
    const std::size_t lanes = strip_kernels().lanes;
    const ConvKernels& k = RAREFY_AT_LEVEL(conv);
    for (std::size_t g = 0; g < s.groups; ++g) {
        const float* const from = x + g * (s.in_channels / s.groups) * plane;
        const Spmm::Pack pack = [&](std::size_t image, const Spmm::Task& t, std::size_t first, std::size_t size, float* strip,
                                    std::size_t width) {
            const FetchPlan here{plan->first.data() + t.column / lanes, plan->all.data(), plan->vectors, s.taps(), s.stride_w, plane};
            k.fetch(from + image * s.in_channels * plane, here, first, size, t.vectors, strip, width);
            return Spmm::Place{reinterpret_cast<const char*>(strip), width * sizeof(float)};
        };
        const std::size_t to = g * rows * pixels;
        groups_[g].product(pack,
                           {y + to, bias == nullptr ? nullptr : bias + g * rows, residual == nullptr ? nullptr : residual + to, act,
                            batch, pixels, s.out_channels * pixels, joined},
                           threads);
    }
}

}  // namespace rarefy
