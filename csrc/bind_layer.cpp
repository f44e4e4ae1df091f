// The base class of every native layer, known to Python before any room adds its own:
// nb::class_<MyLayer, rarefy::Layer>(m, "MyLayer").def(nb::init<...>()).
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <memory>
#include <new>

#include "bind.hpp"
#include "layer.hpp"

namespace {

using In = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::c_contig, nb::device::cpu>;

void run(const rarefy::Layer& layer, const std::vector<In>& inputs, const Out& output, std::size_t batch, std::size_t threads) {
    const auto& sizes = layer.input_sizes();
    need(inputs.size() == sizes.size(), "Layer.run: one array per input of the layer");
    std::vector<const float*> data;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        need(inputs[i].size() == batch * sizes[i], "Layer.run: an input must hold batch * input_sizes[i] floats");
        data.push_back(inputs[i].data());
    }
    need(output.size() == batch * layer.output_size(), "Layer.run: the output must hold batch * output_size floats");
    for (std::size_t i = 0; i < sizes.size(); ++i)
        need(data[i] != output.data() || output.size() == 0 || layer.in_place(i), "Layer.run: this layer does not work in place");
    const nb::gil_scoped_release unlocked;
    const std::size_t bytes = layer.scratch_floats(batch, threads) * sizeof(float);
    const std::unique_ptr<void, void (*)(void*)> scratch(bytes == 0 ? nullptr : std::aligned_alloc(64, (bytes + 63) / 64 * 64),
                                                         &std::free);
    if (bytes != 0 && scratch == nullptr) throw std::bad_alloc();
    layer.run(data.data(), output.data(), static_cast<float*>(scratch.get()), batch, threads);
}

}  // namespace

void bind_layer(nb::module_& m) {
    nb::class_<rarefy::Layer>(m, "Layer")
        .def_prop_ro("input_sizes", &rarefy::Layer::input_sizes, "Floats per sample of each input.")
        .def_prop_ro("output_size", &rarefy::Layer::output_size, "Floats per sample of the output.")
        .def("in_place", &rarefy::Layer::in_place, nb::arg("i"), "Whether the output may be input i's memory.")
        .def("run", &run, nb::arg("inputs").noconvert(), nb::arg("output").noconvert(), nb::arg("batch"), nb::arg("threads"));
}
