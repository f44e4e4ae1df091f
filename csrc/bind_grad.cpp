#include <nanobind/stl/array.h>

#include <array>

#include "bind_sparse.hpp"
#include "grad.hpp"

namespace {

using Index = Flat<const std::int64_t>;
using Columns = Flat<const std::int32_t>;
using Pair = std::array<std::size_t, 2>;

rarefy::LinearTraining* make_linear(const Index& crow, const Columns& col, std::size_t cols, std::size_t n, std::size_t threads) {
    check_csr(crow, col, col.size(), cols);
    const nb::gil_scoped_release unlocked;
    return new rarefy::LinearTraining({crow.data(), col.data(), nullptr, crow.size() - 1, cols}, n, threads);
}

template <class T> using Contiguous = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void forward(rarefy::LinearTraining& t, const Floats& values, const Contiguous<const float>& x, const Maybe& bias,
             const Contiguous<float>& y, std::size_t threads) {
    need(values.size() == t.nnz(), "as many values as kept weights");
    need(x.shape(1) == t.cols() && y.shape(0) == x.shape(0) && y.shape(1) == t.rows(), "x must be [n, cols] and y [n, rows]");
    const float* b = bias_of(bias, t.rows());
    const nb::gil_scoped_release unlocked;
    t.forward(values.data(), x.data(), x.shape(0), b, y.data(), threads);
}

void input_gradient(rarefy::LinearTraining& t, const Floats& values, const Contiguous<const float>& dy, const Contiguous<float>& dx,
                    std::size_t threads) {
    need(values.size() == t.nnz(), "as many values as kept weights");
    need(dy.shape(1) == t.rows() && dx.shape(0) == dy.shape(0) && dx.shape(1) == t.cols(), "dy must be [n, rows] and dx [n, cols]");
    const nb::gil_scoped_release unlocked;
    t.input_gradient(values.data(), dy.data(), dy.shape(0), dx.data(), threads);
}

void values_gradient(const rarefy::LinearTraining& t, const Contiguous<const float>& x, const Contiguous<const float>& dy,
                     const Flat<float>& out, std::size_t threads) {
    need(out.size() == t.nnz(), "as many gradients as kept weights");
    need(x.shape(1) == t.cols() && dy.shape(0) == x.shape(0) && dy.shape(1) == t.rows(), "x must be [n, cols] and dy [n, rows]");
    const nb::gil_scoped_release unlocked;
    t.values_gradient(x.data(), dy.data(), x.shape(0), out.data(), threads);
}

rarefy::ConvTraining* make_conv(const Index& crow, const Columns& col, const std::array<std::size_t, 4>& weight, const Pair& size,
                                const Pair& stride, const Pair& padding, const Pair& dilation, std::size_t groups, std::size_t batch,
                                std::size_t threads) {
    const rarefy::ConvShape shape = conv_shape(weight, size, stride, padding, dilation, groups);
    need(crow.size() == weight[0] + 1, "crow must have one entry per output channel, and one");
    check_csr(crow, col, col.size(), shape.fan_in());
    const nb::gil_scoped_release unlocked;
    return new rarefy::ConvTraining({crow.data(), col.data(), nullptr, weight[0], shape.fan_in()}, shape, batch, threads);
}

template <class X, class Y> void check_images(const rarefy::ConvShape& s, const X& x, const Y& y) {
    need(x.shape(1) == s.in_channels && x.shape(2) == s.height && x.shape(3) == s.width,
         "x must be [batch, in_channels, height, width]");
    need(y.shape(0) == x.shape(0) && y.shape(1) == s.out_channels && y.shape(2) == s.out_height() && y.shape(3) == s.out_width(),
         "y must be [batch, out_channels, out_height, out_width]");
}

void conv_forward(rarefy::ConvTraining& t, const Floats& values, const Images<const float>& x, const Maybe& bias,
                  const Images<float>& y, std::size_t threads) {
    need(values.size() == t.nnz(), "as many values as kept weights");
    check_images(t.shape(), x, y);
    const float* b = bias_of(bias, t.shape().out_channels);
    const nb::gil_scoped_release unlocked;
    t.forward(values.data(), x.data(), x.shape(0), b, y.data(), threads);
}

void conv_input_gradient(rarefy::ConvTraining& t, const Floats& values, const Images<const float>& dy, const Images<float>& dx,
                         std::size_t threads) {
    need(values.size() == t.nnz(), "as many values as kept weights");
    check_images(t.shape(), dx, dy);
    const nb::gil_scoped_release unlocked;
    t.input_gradient(values.data(), dy.data(), dy.shape(0), dx.data(), threads);
}

void conv_values_gradient(const rarefy::ConvTraining& t, const Images<const float>& x, const Images<const float>& dy,
                          const Flat<float>& out, std::size_t threads) {
    need(out.size() == t.nnz(), "as many gradients as kept weights");
    check_images(t.shape(), x, dy);
    const nb::gil_scoped_release unlocked;
    t.values_gradient(x.data(), dy.data(), x.shape(0), out.data(), threads);
}

}  // namespace

void bind_grad(nb::module_& m) {
    nb::class_<rarefy::LinearTraining>(m, "LinearTraining", "The index structures of one sparse linear layer in training.")
        .def("forward", &forward, nb::arg("values"), nb::arg("x"), nb::arg("bias").none(), nb::arg("y").noconvert(), nb::arg("threads"))
        .def("input_gradient", &input_gradient, nb::arg("values"), nb::arg("dy"), nb::arg("dx").noconvert(), nb::arg("threads"))
        .def("values_gradient", &values_gradient, nb::arg("x"), nb::arg("dy"), nb::arg("out").noconvert(), nb::arg("threads"));
    m.def("linear_training", &make_linear, nb::arg("crow").noconvert(), nb::arg("col").noconvert(), nb::arg("cols"), nb::arg("n"),
          nb::arg("threads"), nb::rv_policy::take_ownership);
    nb::class_<rarefy::ConvTraining>(m, "ConvTraining", "The index structures of one sparse convolution in training.")
        .def("forward", &conv_forward, nb::arg("values"), nb::arg("x"), nb::arg("bias").none(), nb::arg("y").noconvert(),
             nb::arg("threads"))
        .def("input_gradient", &conv_input_gradient, nb::arg("values"), nb::arg("dy"), nb::arg("dx").noconvert(), nb::arg("threads"))
        .def("values_gradient", &conv_values_gradient, nb::arg("x"), nb::arg("dy"), nb::arg("out").noconvert(), nb::arg("threads"));
    m.def("conv_training", &make_conv, nb::arg("crow").noconvert(), nb::arg("col").noconvert(), nb::arg("weight"), nb::arg("size"),
          nb::arg("stride"), nb::arg("padding"), nb::arg("dilation"), nb::arg("groups"), nb::arg("batch"), nb::arg("threads"),
          nb::rv_policy::take_ownership);
}
