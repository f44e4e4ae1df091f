// What the Python bindings share. Each room binds its own operators in bind_<room>.cpp.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>

#include "epilogue.hpp"

namespace nb = nanobind;

template <class T> using Flat = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T> using Rows = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes = Flat<std::uint8_t>;

inline void need(bool fits, const char* what) {
    if (!fits) throw std::invalid_argument(what);
}

inline rarefy::Act act_of(const std::string& name) {
    static const char* const names[] = {"none", "relu", "relu6", "hardswish", "silu", "sigmoid", "hardsigmoid"};
    int i = 0;
    for (const char* known : names) {
        if (name == known) return static_cast<rarefy::Act>(i);
        ++i;
    }
    throw std::invalid_argument("no such activation: " + name);
}

void bind_layer(nb::module_& m);
void bind_planes(nb::module_& m);
void bind_sparse_layers(nb::module_& m);
void bind_spmm(nb::module_& m);
void bind_spmv(nb::module_& m);
void bind_conv(nb::module_& m);
void bind_program(nb::module_& m);
void bind_grad(nb::module_& m);
void bind_block(nb::module_& m);
void bind_lowp(nb::module_& m);
void bind_probe(nb::module_& m);
void bind_simplex(nb::module_& m);
void bind_transposable(nb::module_& m);
void bind_n_m(nb::module_& m);
