#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <optional>

#include "bind.hpp"
#include "plane_layers.hpp"

namespace {

using namespace rarefy;
using Maybe = std::optional<Flat<const float>>;
using Pair = std::array<std::size_t, 2>;

Floats32 copied(const Flat<const float>& x) { return {x.data(), x.data() + x.size()}; }

Floats32 copied(const Maybe& x, std::size_t size, const char* what) {
    if (!x) return {};
    need(x->size() == size, what);
    return copied(*x);
}

Pair pair(const std::vector<std::size_t>& x) {
    need(x.size() == 2, "two numbers are needed: height and width");
    return {x[0], x[1]};
}

using Sizes = std::vector<std::size_t>;
constexpr std::size_t most = std::size_t{1} << 24;

// `padding` is top, left, bottom, right.
Window window(const Sizes& size, const Sizes& kernel, const Sizes& stride, const Sizes& padding, const Sizes& dilation) {
    const Pair n = pair(size), k = pair(kernel), s = pair(stride), d = pair(dilation);
    need(padding.size() == 4, "four paddings are needed: top, left, bottom, right");
    Pair out{};
    for (std::size_t i = 0; i < 2; ++i) {
        need(n[i] >= 1 && k[i] >= 1 && s[i] >= 1 && d[i] >= 1, "sizes, kernel, stride and dilation begin at 1");
        need(n[i] <= most && k[i] <= most && s[i] <= most && d[i] <= most && padding[i] <= most && padding[i + 2] <= most, "too large");
        const std::size_t whole = n[i] + padding[i] + padding[i + 2], reach = (k[i] - 1) * d[i] + 1;
        need(reach <= whole, "the kernel is larger than the padded input");
        out[i] = (whole - reach) / s[i] + 1;
    }
    return {n[0], n[1], out[0], out[1], k[0], k[1], s[0], s[1], padding[0], padding[1], d[0], d[1]};
}

template <class L> auto layer(nb::module_& m, const char* name, const char* doc) { return nb::class_<L, Layer>(m, name, doc); }

}  // namespace

void bind_planes(nb::module_& m) {
    layer<DepthwiseLayer>(m, "Depthwise", "Depthwise convolution; inputs x and, if asked for, the residual.")
        .def("__init__",
             [](DepthwiseLayer* self, const nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>& w, const Maybe& bias,
                std::size_t channels, const Sizes& size, const Sizes& stride, const Sizes& padding, const Sizes& dilation, bool residual,
                const std::string& act) {
                 const std::size_t planes = w.shape(0);
                 need(channels >= 1 && planes % channels == 0, "the weight must have a whole number of filters per channel");
                 const Window win = window(size, {w.shape(1), w.shape(2)}, stride, padding, dilation);
                 new (self) DepthwiseLayer(channels, planes / channels, win, Floats32(w.data(), w.data() + w.size()),
                                           copied(bias, planes, "one bias per filter"), residual, act_of(act));
             },
             nb::arg("weight").noconvert(), nb::arg("bias").none(), nb::arg("channels"), nb::arg("size"), nb::arg("stride"),
             nb::arg("padding"), nb::arg("dilation"), nb::arg("residual"), nb::arg("act"));
    layer<DirectConv>(m, "DirectConv", "Dense convolution of few channels; inputs x and, if asked for, the residual.")
        .def("__init__",
             [](DirectConv* self, const nb::ndarray<const float, nb::ndim<4>, nb::c_contig, nb::device::cpu>& w, const Maybe& bias,
                const Sizes& size, const Sizes& stride, const Sizes& padding, const Sizes& dilation, bool residual, const std::string& act) {
                 need(w.shape(3) <= DIRECT_WIDEST, "the kernel is too wide for this layer");
                 const Window win = window(size, {w.shape(2), w.shape(3)}, stride, padding, dilation);
                 new (self) DirectConv(w.shape(1), w.shape(0), win, w.data(), copied(bias, w.shape(0), "one bias per output channel"),
                                       residual, act_of(act));
             },
             nb::arg("weight").noconvert(), nb::arg("bias").none(), nb::arg("size"), nb::arg("stride"), nb::arg("padding"),
             nb::arg("dilation"), nb::arg("residual"), nb::arg("act"));
    layer<PoolLayer>(m, "Pool", "Maximum or average over windows.")
        .def("__init__",
             [](PoolLayer* self, const std::string& kind, std::size_t channels, const Sizes& size, const Sizes& kernel, const Sizes& stride,
                const Sizes& padding, const Sizes& dilation, const Sizes& counted) {
                 need(kind == "max" || kind == "avg" || kind == "avg_with_padding", "a pool is max, avg or avg_with_padding");
                 const Window w = window(size, kernel, stride, padding, dilation);
                 const Pair end = pair(counted);
                 new (self) PoolLayer(channels, w, end[0], end[1],
                                      kind == "max"   ? Pool::maximum
                                      : kind == "avg" ? Pool::average
                                                      : Pool::average_with_padding);
             },
             nb::arg("kind"), nb::arg("channels"), nb::arg("size"), nb::arg("kernel"), nb::arg("stride"), nb::arg("padding"),
             nb::arg("dilation"), nb::arg("counted"));
    layer<AdaptiveAverage>(m, "AdaptiveAverage", "The mean under each output cell.")
        .def("__init__",
             [](AdaptiveAverage* self, std::size_t channels, const Sizes& size, const Sizes& out) {
                 const Pair n = pair(size), o = pair(out);
                 need(n[0] >= 1 && n[1] >= 1 && o[0] >= 1 && o[1] >= 1, "sizes begin at 1");
                 new (self) AdaptiveAverage(channels, n[0], n[1], o[0], o[1]);
             },
             nb::arg("channels"), nb::arg("size"), nb::arg("out"));
    layer<Elementwise>(m, "Elementwise", "act(a), act(a + b) or act(a * b).")
        .def("__init__",
             [](Elementwise* self, const std::string& op, std::size_t size, const std::string& act) {
                 need(op == "activation" || op == "add" || op == "multiply", "an elementwise layer is activation, add or multiply");
                 new (self) Elementwise(op == "add"        ? Elementwise::Op::add
                                        : op == "multiply" ? Elementwise::Op::multiply
                                                           : Elementwise::Op::activation,
                                        size, act_of(act));
             },
             nb::arg("op"), nb::arg("size"), nb::arg("act"));
    layer<ScaleLayer>(m, "Scale", "act(x * scale + shift) per channel; without a scale it is the second input.")
        .def("__init__",
             [](ScaleLayer* self, std::size_t channels, std::size_t pixels, const Maybe& scale, const Maybe& shift, const std::string& act) {
                 need(scale || !shift, "a shift needs a scale");
                 new (self) ScaleLayer(channels, pixels, copied(scale, channels, "one scale per channel"),
                                       copied(shift, channels, "one shift per channel"), act_of(act));
             },
             nb::arg("channels"), nb::arg("pixels"), nb::arg("scale").none(), nb::arg("shift").none(), nb::arg("act"));
    layer<SoftmaxLayer>(m, "Softmax", "Over all features of a sample.").def(nb::init<std::size_t>(), nb::arg("size"));
    layer<Concat>(m, "Concat", "The inputs one after the other.").def(nb::init<const Sizes&>(), nb::arg("sizes"));
    layer<Slice>(m, "Slice", "Floats [start, stop) of every sample.")
        .def("__init__",
             [](Slice* self, std::size_t size, std::size_t start, std::size_t stop) {
                 need(start <= stop && stop <= size, "a slice must lie in its input");
                 new (self) Slice(size, start, stop);
             },
             nb::arg("size"), nb::arg("start"), nb::arg("stop"));
    layer<Upsample>(m, "Upsample", "Nearest neighbour.")
        .def("__init__",
             [](Upsample* self, std::size_t channels, const Sizes& size, const Sizes& out) {
                 const Pair n = pair(size), o = pair(out);
                 need(n[0] >= 1 && n[1] >= 1 && o[0] >= 1 && o[1] >= 1 && o[0] <= most && o[1] <= most, "sizes begin at 1");
                 new (self) Upsample(channels, n[0], n[1], o[0], o[1]);
             },
             nb::arg("channels"), nb::arg("size"), nb::arg("out"));
    layer<DenseLayer>(m, "Dense", "A dense linear layer for few samples.")
        .def("__init__",
             [](DenseLayer* self, const Rows<const float>& w, const Maybe& bias, const std::string& act) {
                 new (self) DenseLayer(w.shape(0), w.shape(1), w.data(), copied(bias, w.shape(0), "one bias per row"), act_of(act));
             },
             nb::arg("weight").noconvert(), nb::arg("bias").none(), nb::arg("act"));
}
