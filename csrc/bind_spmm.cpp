#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>

#include "bind.hpp"
#include "spmm.hpp"

namespace {

using Floats = Flat<const float>;
using Maybe = std::optional<Floats>;

rarefy::Act act_of(const std::string& name) {
    static const char* const names[] = {"none", "relu", "relu6", "hardswish", "silu"};
    for (int i = 0; i < 5; ++i)
        if (name == names[i]) return static_cast<rarefy::Act>(i);
    throw std::invalid_argument("no such activation: " + name);
}

const float* bias_of(const Maybe& bias, std::size_t rows) {
    if (!bias) return nullptr;
    need(bias->size() == rows, "the bias must have one entry per row of the weight");
    return bias->data();
}

void check(const Flat<const std::int64_t>& crow, const Flat<const std::int32_t>& col, std::size_t values, std::size_t cols) {
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

struct Bound {
    rarefy::Spmm spmm;
    std::size_t nnz;
};

Bound* make(const Flat<const std::int64_t>& crow, const Flat<const std::int32_t>& col, const Floats& values,
                            std::size_t cols, std::size_t columns, std::size_t threads) {
    check(crow, col, values.size(), cols);
    const nb::gil_scoped_release unlocked;
    const rarefy::Csr w{crow.data(), col.data(), values.data(), crow.size() - 1, cols};
    return new Bound{rarefy::Spmm(w, columns, threads), values.size()};
}

void planes(const Bound& b, const nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>& x,
            const nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>& y, const Maybe& bias,
            const std::optional<nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>>& residual,
            const std::string& act, std::size_t threads) {
    const std::size_t batch = x.shape(0), pixels = x.shape(2);
    need(x.shape(1) == b.spmm.cols(), "x must be [batch, cols, pixels]");
    need(y.shape(0) == batch && y.shape(1) == b.spmm.rows() && y.shape(2) == pixels, "y must be [batch, rows, pixels]");
    need(!residual || residual->size() == y.size(), "the residual must have the shape of y");
    const float* bias_data = bias_of(bias, b.spmm.rows());
    const rarefy::Act a = act_of(act);
    const nb::gil_scoped_release unlocked;
    b.spmm.planes(x.data(), batch, pixels, y.data(), bias_data, residual ? residual->data() : nullptr, a, threads);
}

template <class T> using Matrix = nb::ndarray<T, nb::ndim<2>, nb::device::cpu>;

void linear(const Bound& b, const Matrix<const float>& x, const Matrix<float>& y, const Maybe& bias, const std::string& act,
            std::size_t threads) {
    const std::size_t n = x.shape(0);
    need(x.shape(1) == b.spmm.cols(), "x must be [n, cols]");
    need(y.shape(0) == n && y.shape(1) == b.spmm.rows(), "y must be [n, rows]");
    need((x.stride(1) == 1 || x.shape(1) <= 1) && (y.stride(1) == 1 || y.shape(1) <= 1), "the features of a sample must be contiguous");
    need(x.stride(0) >= 0 && y.stride(0) >= 0, "negative strides");
    const float* bias_data = bias_of(bias, b.spmm.rows());
    const rarefy::Act a = act_of(act);
    const nb::gil_scoped_release unlocked;
    b.spmm.linear(x.data(), static_cast<std::size_t>(x.stride(0)), n, y.data(), static_cast<std::size_t>(y.stride(0)), bias_data, a,
                  threads);
}

}  // namespace

void bind_spmm(nb::module_& m) {
    nb::class_<Bound>(m, "Spmm", "A packed sparse weight [rows, cols], float32.")
        .def("planes", &planes, nb::arg("x").noconvert(), nb::arg("y").noconvert(), nb::arg("bias").none(),
             nb::arg("residual").none(), nb::arg("act"), nb::arg("threads"))
        .def("linear", &linear, nb::arg("x").noconvert(), nb::arg("y").noconvert(), nb::arg("bias").none(), nb::arg("act"),
             nb::arg("threads"))
        .def("set_values",
             [](Bound& b, const Floats& values) {
                 need(values.size() == b.nnz, "as many values as the weight has nonzeros");
                 b.spmm.set_values(values.data());
             })
        .def_prop_ro("bytes", [](const Bound& b) { return b.spmm.bytes(); });
    m.def("spmm", &make, nb::arg("crow").noconvert(), nb::arg("col").noconvert(), nb::arg("values").noconvert(), nb::arg("cols"),
          nb::arg("columns"), nb::arg("threads"), nb::rv_policy::take_ownership);
}
