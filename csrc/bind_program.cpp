#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "bind.hpp"
#include "program.hpp"

namespace {

using rarefy::Program;
using Sizes = std::vector<std::size_t>;
using In = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using Step = std::tuple<std::shared_ptr<rarefy::Layer>, Sizes, std::size_t>;

void run(const Program& program, const std::vector<In>& inputs, const std::vector<Out>& outputs, std::size_t batch,
         std::size_t threads, double* seconds, bool poison) {
    need(inputs.size() == program.input_sizes().size(), "Program: one array per input");
    need(outputs.size() == program.output_sizes().size(), "Program: one array per output");
    std::vector<const float*> reads;
    std::vector<float*> writes;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        need(inputs[i].size() == batch * program.input_sizes()[i], "Program: an input must hold batch * input_sizes[i] floats");
        reads.push_back(inputs[i].data());
    }
    for (std::size_t i = 0; i < outputs.size(); ++i) {
        need(outputs[i].size() == batch * program.output_sizes()[i], "Program: an output must hold batch * output_sizes[i] floats");
        writes.push_back(outputs[i].data());
    }
    const nb::gil_scoped_release unlocked;
    program.run(reads, writes, batch, threads, seconds, poison);
}

}  // namespace

void bind_program(nb::module_& m) {
    nb::class_<Program>(m, "Program", "Layers in order over one block of memory.")
        .def("__init__",
             [](Program* self, const std::vector<Step>& steps, const Sizes& inputs, const Sizes& outputs) {
                 std::vector<Program::Step> list;
                 for (const auto& [layer, reads, write] : steps) list.push_back({layer, reads, write});
                 new (self) Program(std::move(list), inputs, outputs);
             },
             nb::arg("steps"), nb::arg("inputs"), nb::arg("outputs"))
        .def_prop_ro("input_sizes", &Program::input_sizes)
        .def_prop_ro("output_sizes", &Program::output_sizes)
        .def("arena_floats", &Program::arena_floats, nb::arg("batch"), nb::arg("threads"))
        .def("run",
             [](const Program& p, const std::vector<In>& inputs, const std::vector<Out>& outputs, std::size_t batch, std::size_t threads,
                bool poison) { run(p, inputs, outputs, batch, threads, nullptr, poison); },
             nb::arg("inputs").noconvert(), nb::arg("outputs").noconvert(), nb::arg("batch"), nb::arg("threads"), nb::arg("poison") = false)
        .def("profile",
             [](const Program& p, const std::vector<In>& inputs, const std::vector<Out>& outputs, std::size_t batch, std::size_t threads) {
                 std::vector<double> seconds(p.steps());
                 run(p, inputs, outputs, batch, threads, seconds.data(), false);
                 return seconds;
             },
             nb::arg("inputs").noconvert(), nb::arg("outputs").noconvert(), nb::arg("batch"), nb::arg("threads"));
    m.def("place",
          [](const std::vector<std::tuple<std::size_t, std::size_t, std::size_t>>& intervals) {
              std::vector<rarefy::Interval> list;
              for (const auto& [floats, first, last] : intervals) list.push_back({floats, first, last});
              return rarefy::place(list);
          },
          nb::arg("intervals"), "Offsets of (floats, first step, last step) that never overlap, and the room that they need.");
}
