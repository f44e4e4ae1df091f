#include <nanobind/stl/string.h>

#include "bind.hpp"
#include "transposable.hpp"

namespace {

template <class T> using Planes = nb::ndarray<T, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

rarefy::TileSolver solver_of(const std::string& name) {
    if (name == "fast") return rarefy::TileSolver::fast;
    if (name == "exact") return rarefy::TileSolver::exact;
    need(name == "approx", "transposable: solver must be fast, exact or approx");
    return rarefy::TileSolver::cover;
}

template <class X>
bool transposable(const Planes<const X>& scores, std::size_t n, std::size_t m, const std::string& solver,
                  const Planes<std::uint8_t>& mask, std::size_t threads) {
    const std::size_t rows = scores.shape(0), columns = scores.shape(1), positions = scores.shape(2);
    need(mask.shape(0) == rows && mask.shape(1) == columns && mask.shape(2) == positions,
         "transposable: the mask must have the shape of the scores");
    need(0 < n && n < m && m <= 32, "transposable: 0 < n < m <= 32");
    need(rows % m == 0 && columns % m == 0, "transposable: rows and columns must be multiples of m");
    const rarefy::TileSolver how = solver_of(solver);
    const nb::gil_scoped_release unlocked;
    return rarefy::transposable(scores.data(), rows, columns, positions, n, m, how, mask.data(), threads);
}

}  // namespace

void bind_transposable(nb::module_& m) {
    m.def("transposable", &transposable<float>, nb::arg("scores").noconvert(), nb::arg("n"), nb::arg("m"), nb::arg("solver"),
          nb::arg("mask").noconvert(), nb::arg("threads"));
    m.def("transposable", &transposable<double>, nb::arg("scores").noconvert(), nb::arg("n"), nb::arg("m"), nb::arg("solver"),
          nb::arg("mask").noconvert(), nb::arg("threads"));
}
