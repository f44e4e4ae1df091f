// Sparse convolution: y = act(W * x + bias + residual), NCHW, any stride, padding, dilation and groups.
//
// It is the sparse product with another packer: a tile of output pixels and a block of inputs (channel, tap) need one strip, which
// is fetched from the planes as it is wanted: one masked load for each vector where the output is as wide as the input, a few where
// it is not. Copies never leave the first cache, there is no im2col matrix.
#pragma once
#include <map>
#include <memory>
#include <mutex>

#include "spmm.hpp"

namespace rarefy {

struct ConvShape {
    std::size_t in_channels, height, width;
    std::size_t out_channels, kernel_h, kernel_w;
    std::size_t stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1, groups = 1;

    std::size_t out_height() const { return (height + 2 * pad_h - dilation_h * (kernel_h - 1) - 1) / stride_h + 1; }
    std::size_t out_width() const { return (width + 2 * pad_w - dilation_w * (kernel_w - 1) - 1) / stride_w + 1; }
    std::size_t taps() const { return kernel_h * kernel_w; }
    std::size_t fan_in() const { return in_channels / groups * taps(); }
    bool pointwise() const { return taps() == 1 && stride_h == 1 && stride_w == 1 && pad_h == 0 && pad_w == 0; }
};

// Lanes of one vector of a strip's row: lane j is x[from + j * stride_w] where the mask has bit j, else as before. `from` counts
// from the channel's plane in the first image, and may lie before it where lane 0 is masked off.
struct Fetch {
    std::int64_t from;
    std::uint32_t mask;
};

// What to fetch for vector v of tap t: all[first[t * vectors + v]] and those before all[first[t * vectors + v + 1]].
struct Fetches {
    std::size_t vectors;
    std::vector<std::uint32_t> first;
    std::vector<Fetch> all;
};

struct FetchPlan {
    const std::uint32_t* first;  // at the task's first vector
    const Fetch* all;
    std::size_t vectors_in_all, taps, stride, plane;
};

struct ConvKernels {
    // Rows k .. k + size (channel, tap) of a strip: `vectors` vectors of each; the rows are `width` floats apart.
    void (*fetch)(const float* x, const FetchPlan& plan, std::size_t k, std::size_t size, std::size_t vectors, float* strip,
                  std::size_t width);
};
RAREFY_EVERY_LEVEL(extern const ConvKernels conv)

class Conv {
public:
    // `w` is the flattened weight [out_channels, fan_in].
    Conv(const Csr& w, const ConvShape& shape, std::size_t batch, std::size_t threads);

    void set_values(const float* values);

    // x [batch][in_channels][height][width] -> y [batch][out_channels][out_height][out_width]
    void run(const float* x, std::size_t batch, float* y, const float* bias, const float* residual, Act act,
             std::size_t threads) const;

    // Fills rows first .. first + size (channel, tap) of a group's strip for columns counted through all images; `column` is a
    // multiple of the lanes.
    using Packer = std::function<void(std::size_t column, std::size_t columns, std::size_t first, std::size_t size, float* strip,
                                      std::size_t width)>;
    Packer packer(const float* x, std::size_t batch, std::size_t group) const;

    const ConvShape& shape() const { return shape_; }
    std::size_t bytes() const;

private:
    std::shared_ptr<const Fetches> fetches(std::size_t images) const;

    ConvShape shape_;
    std::vector<Spmm> groups_;
    std::vector<std::size_t> first_value_;  // of each group
    mutable std::mutex guard_;
    mutable std::map<std::pair<std::size_t, std::size_t>, std::shared_ptr<const Fetches>> known_;  // by images and lanes
};

}  // namespace rarefy
