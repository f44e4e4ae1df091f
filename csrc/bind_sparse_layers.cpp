#include <nanobind/stl/array.h>

#include <array>

#include "bind_sparse.hpp"
#include "sparse_layers.hpp"

namespace {

using namespace rarefy;
using Pair = std::array<std::size_t, 2>;
using Crow = Flat<const std::int64_t>;
using Col = Flat<const std::int32_t>;

Csr csr(const Crow& crow, const Col& col, const Floats& values, std::size_t cols) {
    check_csr(crow, col, values.size(), cols);
    return {crow.data(), col.data(), values.data(), crow.size() - 1, cols};
}

std::vector<float> copied(const Maybe& bias, std::size_t rows) {
    const float* data = bias_of(bias, rows);
    return data == nullptr ? std::vector<float>{} : std::vector<float>(data, data + rows);
}

}  // namespace

void bind_sparse_layers(nb::module_& m) {
    nb::class_<SparsePlanes, Layer>(m, "SparsePlanes", "Sparse 1 x 1 convolution.")
        .def("__init__",
             [](SparsePlanes* self, const Crow& crow, const Col& col, const Floats& values, std::size_t cols, std::size_t pixels,
                const Maybe& bias, bool residual, const std::string& act, std::size_t batch, std::size_t threads) {
                 const Csr w = csr(crow, col, values, cols);
                 new (self) SparsePlanes(w, pixels, copied(bias, w.rows), residual, act_of(act), batch, threads);
             },
             nb::arg("crow").noconvert(), nb::arg("col").noconvert(), nb::arg("values").noconvert(), nb::arg("cols"), nb::arg("pixels"),
             nb::arg("bias").none(), nb::arg("residual"), nb::arg("act"), nb::arg("batch"), nb::arg("threads"))
        .def_prop_ro("bytes", &SparsePlanes::bytes);
    nb::class_<SparseLinear, Layer>(m, "SparseLinear", "Sparse linear layer.")
        .def("__init__",
             [](SparseLinear* self, const Crow& crow, const Col& col, const Floats& values, std::size_t cols, std::size_t tokens,
                const Maybe& bias, const std::string& act, std::size_t batch, std::size_t threads) {
                 const Csr w = csr(crow, col, values, cols);
                 new (self) SparseLinear(w, tokens, copied(bias, w.rows), act_of(act), batch, threads);
             },
             nb::arg("crow").noconvert(), nb::arg("col").noconvert(), nb::arg("values").noconvert(), nb::arg("cols"), nb::arg("tokens"),
             nb::arg("bias").none(), nb::arg("act"), nb::arg("batch"), nb::arg("threads"))
        .def_prop_ro("bytes", &SparseLinear::bytes);
    nb::class_<SparseConv, Layer>(m, "SparseConv", "Sparse convolution of any geometry.")
        .def("__init__",
             [](SparseConv* self, const Crow& crow, const Col& col, const Floats& values, const std::array<std::size_t, 4>& weight,
                const Pair& size, const Pair& stride, const Pair& padding, const Pair& dilation, std::size_t groups, const Maybe& bias,
                bool residual, const std::string& act, std::size_t batch, std::size_t threads) {
                 const ConvShape shape = conv_shape(weight, size, stride, padding, dilation, groups);
                 need(crow.size() == weight[0] + 1, "crow must have one entry per output channel, and one");
                 const Csr w = csr(crow, col, values, shape.fan_in());
                 new (self) SparseConv(w, shape, copied(bias, w.rows), residual, act_of(act), batch, threads);
             },
             nb::arg("crow").noconvert(), nb::arg("col").noconvert(), nb::arg("values").noconvert(), nb::arg("weight"), nb::arg("size"),
             nb::arg("stride"), nb::arg("padding"), nb::arg("dilation"), nb::arg("groups"), nb::arg("bias").none(), nb::arg("residual"),
             nb::arg("act"), nb::arg("batch"), nb::arg("threads"))
        .def_prop_ro("bytes", &SparseConv::bytes);
}
