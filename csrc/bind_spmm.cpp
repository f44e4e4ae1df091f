#include "bind_sparse.hpp"
#include "spmm.hpp"

namespace {

struct BoundSpmm {
    rarefy::Spmm spmm;
    std::size_t nnz;
};

BoundSpmm* make(const Flat<const std::int64_t>& crow, const Flat<const std::int32_t>& col, const Floats& values,
                            std::size_t cols, std::size_t columns, std::size_t threads) {
    check_csr(crow, col, values.size(), cols);
    const nb::gil_scoped_release unlocked;
    const rarefy::Csr w{crow.data(), col.data(), values.data(), crow.size() - 1, cols};
    return new BoundSpmm{rarefy::Spmm(w, columns, threads), values.size()};
}

void planes(const BoundSpmm& b, const Planes<const float>& x,
            const Planes<float>& y, const Maybe& bias,
            const std::optional<Planes<const float>>& residual,
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

void linear(const BoundSpmm& b, const Matrix<const float>& x, const Matrix<float>& y, const Maybe& bias, const std::string& act,
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
    nb::class_<BoundSpmm>(m, "Spmm", "A packed sparse weight [rows, cols], float32.")
        .def("planes", &planes, nb::arg("x").noconvert(), nb::arg("y").noconvert(), nb::arg("bias").none(),
             nb::arg("residual").none(), nb::arg("act"), nb::arg("threads"))
        .def("linear", &linear, nb::arg("x").noconvert(), nb::arg("y").noconvert(), nb::arg("bias").none(), nb::arg("act"),
             nb::arg("threads"))
        .def("set_values",
             [](BoundSpmm& b, const Floats& values) {
                 need(values.size() == b.nnz, "as many values as the weight has nonzeros");
                 b.spmm.set_values(values.data());
             })
        .def_prop_ro("bytes", [](const BoundSpmm& b) { return b.spmm.bytes(); });
    m.def("spmm", &make, nb::arg("crow").noconvert(), nb::arg("col").noconvert(), nb::arg("values").noconvert(), nb::arg("cols"),
          nb::arg("columns"), nb::arg("threads"), nb::rv_policy::take_ownership);
}
