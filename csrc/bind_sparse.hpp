// What the bindings of the sparse products share.
#pragma once
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <array>
#include <optional>
#include <string>

#include "bind.hpp"
#include "conv.hpp"

using Floats = Flat<const float>;
using Maybe = std::optional<Floats>;
template <class T> using Planes = nb::ndarray<T, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
template <class T> using Images = nb::ndarray<T, nb::ndim<4>, nb::c_contig, nb::device::cpu>;

inline const float* bias_of(const Maybe& bias, std::size_t rows) {
    if (!bias) return nullptr;
    need(bias->size() == rows, "the bias must have one entry per row of the weight");
    return bias->data();
}

inline void check_csr(const Flat<const std::int64_t>& crow, const Flat<const std::int32_t>& col, std::size_t values, std::size_t cols) {
    need(crow.size() >= 1 && crow.data()[0] == 0, "crow must begin with 0");
    const std::size_t rows = crow.size() - 1;
    for (std::size_t m = 0; m < rows; ++m) need(crow.data()[m] <= crow.data()[m + 1], "crow must not fall");
    need(static_cast<std::size_t>(crow.data()[rows]) == col.size() && col.size() == values, "crow, col and values do not fit");
    need(col.size() < UINT32_MAX && cols <= INT32_MAX, "too large");
    for (std::size_t m = 0; m < rows; ++m) {
        std::int64_t before = -1;
        for (std::int64_t i = crow.data()[m]; i < crow.data()[m + 1]; ++i) {
            need(col.data()[i] > before && static_cast<std::size_t>(col.data()[i]) < cols,
                 "the columns of a row must ascend and lie in the matrix");
            before = col.data()[i];
        }
    }
}

inline rarefy::ConvShape conv_shape(const std::array<std::size_t, 4>& weight, const std::array<std::size_t, 2>& size,
                                    const std::array<std::size_t, 2>& stride, const std::array<std::size_t, 2>& padding,
                                    const std::array<std::size_t, 2>& dilation, std::size_t groups) {
    const auto [out, in, kh, kw] = weight;
    need(groups >= 1 && out % groups == 0, "the output channels must be a multiple of the groups");
    need(kh >= 1 && kw >= 1 && stride[0] >= 1 && stride[1] >= 1 && dilation[0] >= 1 && dilation[1] >= 1,
         "kernel, stride and dilation must be positive");
    need(size[0] + 2 * padding[0] > dilation[0] * (kh - 1) && size[1] + 2 * padding[1] > dilation[1] * (kw - 1),
         "the kernel must fit the padded image");
    return {in * groups, size[0], size[1], out, kh, kw, stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1], groups};
}
