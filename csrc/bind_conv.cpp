#include <array>

#include <nanobind/stl/array.h>

#include "bind_sparse.hpp"
#include "conv.hpp"

namespace {

using Pair = std::array<std::size_t, 2>;

struct BoundConv {
    rarefy::Conv conv;
    std::size_t nnz;
    BoundConv(const rarefy::Csr& w, const rarefy::ConvShape& shape, std::size_t batch, std::size_t threads, std::size_t values)
        : conv(w, shape, batch, threads), nnz(values) {}
};

BoundConv* make(const Flat<const std::int64_t>& crow, const Flat<const std::int32_t>& col, const Floats& values,
            const std::array<std::size_t, 4>& weight, const Pair& size, const Pair& stride, const Pair& padding, const Pair& dilation,
            std::size_t groups, std::size_t batch, std::size_t threads) {
    const rarefy::ConvShape shape = conv_shape(weight, size, stride, padding, dilation, groups);
    need(crow.size() == weight[0] + 1, "crow must have one entry per output channel, and one");
    check_csr(crow, col, values.size(), shape.fan_in());
    const nb::gil_scoped_release unlocked;
    return new BoundConv(rarefy::Csr{crow.data(), col.data(), values.data(), weight[0], shape.fan_in()}, shape, batch, threads, values.size());
}

void run(const BoundConv& b, const Images<const float>& x, const Images<float>& y, const Maybe& bias,
         const std::optional<Images<const float>>& residual, const std::string& act, std::size_t threads) {
    const rarefy::ConvShape& s = b.conv.shape();
    const std::size_t batch = x.shape(0);
    need(x.shape(1) == s.in_channels && x.shape(2) == s.height && x.shape(3) == s.width, "x must be [batch, in_channels, height, width]");
    need(y.shape(0) == batch && y.shape(1) == s.out_channels && y.shape(2) == s.out_height() && y.shape(3) == s.out_width(),
         "y must be [batch, out_channels, out_height, out_width]");
    need(!residual || residual->size() == y.size(), "the residual must have the shape of y");
    const float* bias_data = bias_of(bias, s.out_channels);
    const rarefy::Act a = act_of(act);
    const nb::gil_scoped_release unlocked;
    b.conv.run(x.data(), batch, y.data(), bias_data, residual ? residual->data() : nullptr, a, threads);
}

}  // namespace

void bind_conv(nb::module_& m) {
    nb::class_<BoundConv>(m, "Conv", "A packed sparse convolution weight [out, in / groups, kh, kw], float32.")
        .def("run", &run, nb::arg("x").noconvert(), nb::arg("y").noconvert(), nb::arg("bias").none(), nb::arg("residual").none(),
             nb::arg("act"), nb::arg("threads"))
        .def("set_values",
             [](BoundConv& b, const Floats& values) {
                 need(values.size() == b.nnz, "as many values as the weight has nonzeros");
                 b.conv.set_values(values.data());
             })
        .def_prop_ro("bytes", [](const BoundConv& b) { return b.conv.bytes(); });
    m.def("conv", &make, nb::arg("crow").noconvert(), nb::arg("col").noconvert(), nb::arg("values").noconvert(), nb::arg("weight"),
          nb::arg("size"), nb::arg("stride"), nb::arg("padding"), nb::arg("dilation"), nb::arg("groups"), nb::arg("batch"),
          nb::arg("threads"), nb::rv_policy::take_ownership);
}
