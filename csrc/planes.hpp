// Dense operators on channel planes [batch][channels][height][width] and on features, for all that is not worth making sparse.
#pragma once
#include <cstddef>

#include "epilogue.hpp"
#include "isa.hpp"

namespace rarefy {

// A k x k window sliding over a plane. Whatever lies outside the input counts as padding: only the top and left are named.
struct Window {
    std::size_t in_h, in_w, out_h, out_w, kernel_h, kernel_w, stride_h, stride_w, top, left, dilation_h, dilation_w;
};

// y[p] = act(window sum of x[p / multiplier] * w[p % channels] + bias[p % channels] + residual[p]) for planes p.
struct Depthwise {
    Window window;
    const float *x, *w, *bias, *residual;  // bias and residual may be null
    float* y;
    std::size_t channels, multiplier;      // of the output; outputs per input plane
    Act act;
};

// The maximum of each window, or its sum times scale_h[row] * scale_w[column].
struct Pooling {
    Window window;
    const float *x, *scale_h, *scale_w;    // scales null: maximum
    float* y;
};

// Dense convolution of a few channels: y[o] = act(sum over channels of windows of x * w + bias[o] + residual[o]).
struct Direct {
    Window window;
    const float *x, *w, *bias, *residual;  // w [out / DIRECT_OUT][in][kernel_h][kernel_w][DIRECT_OUT], the last filled with zeros
    float* y;
    std::size_t in, out;
    Act act;
};
constexpr std::size_t DIRECT_OUT = 4, DIRECT_ROWS = 4, DIRECT_WIDEST = 16;  // channels, rows at a time; columns of a kernel

struct PlaneKernels {
    std::size_t lanes;
    std::size_t (*tile_floats)(const Window&);  // how much `tile` the two below want
    void (*depthwise)(const Depthwise&, std::size_t from, std::size_t to, float* tile);
    void (*pool)(const Pooling&, std::size_t from, std::size_t to, float* tile);
    float (*sum)(const float* x, std::size_t n);
    // y = act(a + b), act(a * b), act(a * scale + shift), softmax(x); y may be a or b.
    void (*add)(const float* a, const float* b, float* y, std::size_t n, Act act);
    void (*multiply)(const float* a, const float* b, float* y, std::size_t n, Act act);
    void (*affine)(const float* a, float scale, float shift, float* y, std::size_t n, Act act);
    void (*softmax)(const float* x, float* y, std::size_t n);
    // Rows of a dense weight, packed by `pack_dense` in blocks of DENSE_VECTORS vectors: y[b * ld_y + m] = act(w x[b] + bias[m])
    // for the blocks [from, to) and n samples.
    void (*pack_dense)(const float* w, std::size_t rows, std::size_t cols, float* packed);
    void (*dense)(const float* packed, const float* bias, const float* x, float* y, std::size_t rows, std::size_t cols,
                  std::size_t n, std::size_t from, std::size_t to, Act act);
    // DIRECT_ROWS output rows from `row` of one image.
    std::size_t (*direct_floats)(const Direct&);
    void (*direct)(const Direct&, std::size_t image, std::size_t row, float* tile);
};
constexpr std::size_t DENSE_VECTORS = 4;
RAREFY_EVERY_LEVEL(extern const PlaneKernels planes)

inline const PlaneKernels& plane_kernels() { return RAREFY_AT_LEVEL(planes); }

}  // namespace rarefy
