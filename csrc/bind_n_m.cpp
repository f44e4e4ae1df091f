#include "bind_sparse.hpp"
#include "n_m.hpp"

namespace {

using namespace rarefy;
template <class T> using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Index = Flat<const std::int32_t>;
using Used = Flat<const std::int16_t>;

NMShape shape_of(std::size_t rows, std::size_t cols, std::size_t steps) {
    need(steps >= 1 && steps <= NM_TILE, "a tile has 1 to 16 steps");
    need(rows >= 1 && cols >= 1 && cols <= INT32_MAX / NM_TILE, "the weight must have rows and columns, and fewer than 2^27 of these");
    return {rows, cols, steps};
}

NMWeight weight_of(const NMShape& shape, const Floats& values, const Index& index, const std::uint16_t* used) {
    need(values.size() == shape.values() && index.size() == shape.index(), "values and index do not have the size of this weight");
    return {shape, values.data(), index.data(), used};
}

const std::uint16_t* used_of(const Used& used, const NMShape& shape) {
    need(used.size() == shape.tiles() * shape.steps, "used does not have the size of this weight");
    return reinterpret_cast<const std::uint16_t*>(used.data());
}

bool make_index(const Matrix<const std::uint8_t>& mask, std::size_t steps, bool both, const Flat<std::int32_t>& index,
                const Flat<std::int16_t>& used, std::size_t threads) {
    const NMShape shape = shape_of(mask.shape(0), mask.shape(1), steps);
    need(index.size() == shape.index() && used.size() == shape.tiles() * steps, "index and used do not have the size of this weight");
    const nb::gil_scoped_release unlocked;
    return n_m_index(mask.data(), shape, both, index.data(), reinterpret_cast<std::uint16_t*>(used.data()), threads);
}

void gather(const Matrix<const float>& weight, const Index& index, const Used& used, std::size_t steps, const Flat<float>& values,
            std::size_t threads) {
    const NMShape shape = shape_of(weight.shape(0), weight.shape(1), steps);
    need(values.size() == shape.values() && index.size() == shape.index(), "values and index do not have the size of this weight");
    const NMWeight w{shape, nullptr, index.data(), used_of(used, shape)};
    const nb::gil_scoped_release unlocked;
    n_m_gather(w, weight.data(), values.data(), threads);
}

void scatter(const Floats& values, const Index& index, const Used& used, std::size_t steps, const Matrix<float>& weight,
             std::size_t threads) {
    const NMShape shape = shape_of(weight.shape(0), weight.shape(1), steps);
    const NMWeight w = weight_of(shape, values, index, used_of(used, shape));
    const nb::gil_scoped_release unlocked;
    n_m_scatter(w, weight.data(), threads);
}

void forward(const Floats& values, const Index& index, std::size_t steps, const Matrix<const float>& x, const Maybe& bias,
             const Matrix<float>& y, std::size_t threads) {
    need(x.shape(0) == y.shape(0), "x and y must have as many samples");
    const NMShape shape = shape_of(y.shape(1), x.shape(1), steps);
    const NMWeight w = weight_of(shape, values, index, nullptr);
    const float* b = bias_of(bias, shape.rows);
    const nb::gil_scoped_release unlocked;
    n_m_forward(w, x.data(), x.shape(0), b, Act::none, y.data(), threads);
}

void input_gradient(const Floats& values, const Index& index, std::size_t steps, const Matrix<const float>& dy, const Matrix<float>& dx,
                    std::size_t threads) {
    need(dy.shape(0) == dx.shape(0), "dy and dx must have as many samples");
    const NMWeight w = weight_of(shape_of(dy.shape(1), dx.shape(1), steps), values, index, nullptr);
    const nb::gil_scoped_release unlocked;
    n_m_input_gradient(w, dy.data(), dy.shape(0), dx.data(), threads);
}

void values_gradient(const Index& index, const Used& used, std::size_t steps, const Matrix<const float>& x, const Matrix<const float>& dy,
                     const Flat<float>& out, std::size_t threads) {
    need(x.shape(0) == dy.shape(0), "x and dy must have as many samples");
    const NMShape shape = shape_of(dy.shape(1), x.shape(1), steps);
    need(out.size() == shape.values() && index.size() == shape.index(), "index and out do not have the size of this weight");
    const NMWeight w{shape, nullptr, index.data(), used_of(used, shape)};
    const nb::gil_scoped_release unlocked;
    n_m_values_gradient(w, x.data(), dy.data(), x.shape(0), out.data(), threads);
}

}  // namespace

void bind_n_m(nb::module_& m) {
    m.def("n_m_index", &make_index, nb::arg("mask").noconvert(), nb::arg("steps"), nb::arg("both"), nb::arg("index").noconvert(),
          nb::arg("used").noconvert(), nb::arg("threads"));
    m.def("n_m_gather", &gather, nb::arg("weight").noconvert(), nb::arg("index").noconvert(), nb::arg("used").noconvert(),
          nb::arg("steps"), nb::arg("values").noconvert(), nb::arg("threads"));
    m.def("n_m_scatter", &scatter, nb::arg("values").noconvert(), nb::arg("index").noconvert(), nb::arg("used").noconvert(), nb::arg("steps"),
          nb::arg("weight").noconvert(), nb::arg("threads"));
    m.def("n_m_forward", &forward, nb::arg("values").noconvert(), nb::arg("index").noconvert(), nb::arg("steps"), nb::arg("x").noconvert(),
          nb::arg("bias").none(), nb::arg("y").noconvert(), nb::arg("threads"));
    m.def("n_m_input_gradient", &input_gradient, nb::arg("values").noconvert(), nb::arg("index").noconvert(), nb::arg("steps"),
          nb::arg("dy").noconvert(), nb::arg("dx").noconvert(), nb::arg("threads"));
    m.def("n_m_values_gradient", &values_gradient, nb::arg("index").noconvert(), nb::arg("used").noconvert(), nb::arg("steps"),
          nb::arg("x").noconvert(), nb::arg("dy").noconvert(), nb::arg("out").noconvert(), nb::arg("threads"));
    nb::class_<NMLinear, Layer>(m, "NMLinear", "N:M sparse linear layer.")
        .def("__init__",
             [](NMLinear* self, std::size_t rows, std::size_t cols, std::size_t steps, const Floats& values, const Index& index,
                std::size_t tokens, const Maybe& bias, const std::string& act) {
                 const NMShape shape = shape_of(rows, cols, steps);
                 const NMWeight w = weight_of(shape, values, index, nullptr);
                 const float* b = bias_of(bias, rows);
                 new (self) NMLinear(shape, {w.values, w.values + shape.values()}, {w.index, w.index + shape.index()}, tokens,
                                     b == nullptr ? std::vector<float>{} : std::vector<float>(b, b + rows), act_of(act));
             },
             nb::arg("rows"), nb::arg("cols"), nb::arg("steps"), nb::arg("values").noconvert(), nb::arg("index").noconvert(),
             nb::arg("tokens"), nb::arg("bias").none(), nb::arg("act"))
        .def_prop_ro("bytes", &NMLinear::bytes);
}
