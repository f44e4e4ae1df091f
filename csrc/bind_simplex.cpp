#include "bind.hpp"
#include "simplex.hpp"

namespace {

template <class T>
bool capped_simplex(const Rows<const T>& a, const Flat<const T>& c, const Flat<const std::int64_t>& k, const Rows<T>& u,
                    std::size_t threads) {
    const std::size_t rows = a.shape(0), n = a.shape(1);
    need(u.shape(0) == rows && u.shape(1) == n, "capped_simplex: u must have the shape of a");
    need(c.size() == 1 || c.size() == rows * n, "capped_simplex: one c, or one per entry");
    need(k.size() == 1 || k.size() == rows, "capped_simplex: one k, or one per row");
    for (std::size_t i = 0; i < k.size(); ++i) need(k.data()[i] >= 0, "capped_simplex: k must not be negative");
    const nb::gil_scoped_release unlocked;
    return rarefy::capped_simplex(a.data(), c.data(), c.size() == 1 ? 0 : 1, rows, n, k.data(), k.size() == 1 ? 0 : 1, u.data(),
                                  threads);
}

}  // namespace

void bind_simplex(nb::module_& m) {
    m.def("capped_simplex", &capped_simplex<float>, nb::arg("a").noconvert(), nb::arg("c").noconvert(), nb::arg("k").noconvert(),
          nb::arg("u").noconvert(), nb::arg("threads"));
    m.def("capped_simplex", &capped_simplex<double>, nb::arg("a").noconvert(), nb::arg("c").noconvert(), nb::arg("k").noconvert(),
          nb::arg("u").noconvert(), nb::arg("threads"));
}
