#include "bind_sparse.hpp"
#include "layer.hpp"
#include "lowp.hpp"

namespace {

using namespace rarefy;
using Crow = Flat<const std::int64_t>;
using Col = Flat<const std::int32_t>;

Csr checked(const Crow& crow, const Col& col, const Floats& values, std::size_t cols) {
    check_csr(crow, col, values.size(), cols);
    return {crow.data(), col.data(), values.data(), crow.size() - 1, cols};
}

std::vector<float> copied(const Maybe& bias, std::size_t rows) {
    const float* data = bias_of(bias, rows);
    return data == nullptr ? std::vector<float>{} : std::vector<float>(data, data + rows);
}

class Bfloat16Linear : public Layer {
public:
    Bfloat16Linear(const Csr& w, std::size_t tokens, std::vector<float> bias, Act act, std::size_t batch, std::size_t threads)
        : Layer({w.cols * tokens}, w.rows * tokens), product_(w, batch * tokens, threads), tokens_(tokens), bias_(std::move(bias)),
          act_(act) {}
    void run(const float* const* inputs, float* output, float*, std::size_t batch, std::size_t threads) const override {
        product_.linear(inputs[0], batch * tokens_, output, bias_.empty() ? nullptr : bias_.data(), act_, threads);
    }
    std::size_t bytes() const { return product_.bytes(); }

private:
    Bfloat16Product product_;
    std::size_t tokens_;
    std::vector<float> bias_;
    Act act_;
};

class Bfloat16Planes : public Layer {
public:
    Bfloat16Planes(const Csr& w, std::size_t pixels, std::vector<float> bias, bool residual, Act act, std::size_t batch,
                   std::size_t threads)
        : Layer(residual ? std::vector<std::size_t>{w.cols * pixels, w.rows * pixels} : std::vector<std::size_t>{w.cols * pixels},
                w.rows * pixels),
          product_(w, batch * pixels, threads), pixels_(pixels), bias_(std::move(bias)), act_(act) {}
    bool in_place(std::size_t i) const override { return i == 1; }
    void run(const float* const* inputs, float* output, float*, std::size_t batch, std::size_t threads) const override {
        product_.planes(inputs[0], batch, pixels_, output, bias_.empty() ? nullptr : bias_.data(),
                        input_sizes().size() == 2 ? inputs[1] : nullptr, act_, threads);
    }
    std::size_t bytes() const { return product_.bytes(); }

private:
    Bfloat16Product product_;
    std::size_t pixels_;
    std::vector<float> bias_;
    Act act_;
};

void run_int8(const Int8Product& p, const Rows<const std::uint8_t>& x, float x_scale, std::int32_t x_zero, const Rows<float>& y,
              const Maybe& bias, const std::string& act, std::size_t threads) {
    need(x.shape(1) == p.cols(), "x must be [n, cols]");
    need(y.shape(0) == x.shape(0) && y.shape(1) == p.rows(), "y must be [n, rows]");
    const float* b = bias_of(bias, p.rows());
    const Act a = act_of(act);
    const nb::gil_scoped_release unlocked;
    p.linear(x.data(), x_scale, x_zero, x.shape(0), y.data(), b, a, threads);
}

}  // namespace

void bind_lowp(nb::module_& m) {
    m.def("has_dot_products", &has_dot_products, "Whether this CPU multiplies bfloat16 pairs and int8 quads in one instruction.");
    nb::class_<Bfloat16Linear, Layer>(m, "Bfloat16Linear", "Sparse linear layer, multiplied in bfloat16.")
        .def("__init__",
             [](Bfloat16Linear* self, const Crow& crow, const Col& col, const Floats& values, std::size_t cols, std::size_t tokens,
                const Maybe& bias, const std::string& act, std::size_t batch, std::size_t threads) {
                 const Csr w = checked(crow, col, values, cols);
                 new (self) Bfloat16Linear(w, tokens, copied(bias, w.rows), act_of(act), batch, threads);
             },
             nb::arg("crow").noconvert(), nb::arg("col").noconvert(), nb::arg("values").noconvert(), nb::arg("cols"), nb::arg("tokens"),
             nb::arg("bias").none(), nb::arg("act"), nb::arg("batch"), nb::arg("threads"))
        .def_prop_ro("bytes", &Bfloat16Linear::bytes);
    nb::class_<Bfloat16Planes, Layer>(m, "Bfloat16Planes", "Sparse 1 x 1 convolution, multiplied in bfloat16.")
        .def("__init__",
             [](Bfloat16Planes* self, const Crow& crow, const Col& col, const Floats& values, std::size_t cols, std::size_t pixels,
                const Maybe& bias, bool residual, const std::string& act, std::size_t batch, std::size_t threads) {
                 const Csr w = checked(crow, col, values, cols);
                 new (self) Bfloat16Planes(w, pixels, copied(bias, w.rows), residual, act_of(act), batch, threads);
             },
             nb::arg("crow").noconvert(), nb::arg("col").noconvert(), nb::arg("values").noconvert(), nb::arg("cols"), nb::arg("pixels"),
             nb::arg("bias").none(), nb::arg("residual"), nb::arg("act"), nb::arg("batch"), nb::arg("threads"))
        .def_prop_ro("bytes", &Bfloat16Planes::bytes);
    nb::class_<Int8Product>(m, "Int8Product", "Sparse int8 weight for uint8 activations.")
        .def("__init__",
             [](Int8Product* self, const Crow& crow, const Col& col, const Floats& values, std::size_t cols, const Floats& scale,
                std::size_t n, std::size_t threads) {
                 const Csr w = checked(crow, col, values, cols);
                 need(scale.size() == w.rows, "the scale must have one entry per row of the weight");
                 for (std::size_t i = 0; i < values.size(); ++i)
                     need(values.data()[i] >= -128 && values.data()[i] <= 127, "int8 values lie in [-128, 127]");
                 new (self) Int8Product(w, scale.data(), n, threads);
             },
             nb::arg("crow").noconvert(), nb::arg("col").noconvert(), nb::arg("values").noconvert(), nb::arg("cols"),
             nb::arg("scale").noconvert(), nb::arg("n"), nb::arg("threads"))
        .def("linear", &run_int8, nb::arg("x").noconvert(), nb::arg("x_scale"), nb::arg("x_zero"), nb::arg("y").noconvert(),
             nb::arg("bias").none(), nb::arg("act"), nb::arg("threads"))
        .def_prop_ro("bytes", &Int8Product::bytes);
}
