// The Python face of the native core. Tensors come in as NumPy views of their memory (nanobind takes any DLPack buffer; NumPy's is
// the quickest to get, 1 us against 4): nothing of torch is linked or included.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind.hpp"
#include "isa.hpp"
#include "ops.hpp"
#include "pool.hpp"

#ifndef RAREFY_VERSION
#define RAREFY_VERSION "unknown"
#endif

namespace {

void pack_mask(const Bytes& bools, const Bytes& bits, std::size_t threads) {
    need(bits.size() == (bools.size() + 7) / 8, "pack_mask: bits must hold one bit per bool");
    const nb::gil_scoped_release unlocked;
    rarefy::pack_mask(bools.data(), bools.size(), bits.data(), threads);
}

void unpack_mask(const Bytes& bits, const Bytes& bools, std::size_t threads) {
    need(bits.size() == (bools.size() + 7) / 8, "unpack_mask: bits must hold one bit per bool");
    const nb::gil_scoped_release unlocked;
    rarefy::unpack_mask(bits.data(), bools.size(), bools.data(), threads);
}

template <class T> void zero_out(const Flat<T>& x, const Bytes& keep, std::size_t threads) {
    need(x.size() == keep.size(), "zero_out: the mask must have one entry per number");
    const nb::gil_scoped_release unlocked;
    rarefy::zero_out(x.data(), keep.data(), x.size(), threads);
}

template <class T>
bool select_k(const Rows<const T>& scores, const Flat<const std::int64_t>& k, const Rows<std::uint8_t>& mask, std::size_t threads) {
    const std::size_t rows = scores.shape(0), n = scores.shape(1);
    need(mask.shape(0) == rows && mask.shape(1) == n, "select_k: the mask must have the shape of the scores");
    need(k.size() == 1 || k.size() == rows, "select_k: one k, or one per row");
    for (std::size_t i = 0; i < k.size(); ++i)
        need(k.data()[i] >= 0 && static_cast<std::size_t>(k.data()[i]) <= n, "select_k: k must lie in [0, n]");
    const nb::gil_scoped_release unlocked;
    return rarefy::select_k(scores.data(), rows, n, k.data(), k.size() == 1 ? 0 : 1, mask.data(), threads);
}

const char* compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#else
    return "unknown";
#endif
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "rarefy's native core: use it through rarefy.kernels.";
    m.attr("version") = RAREFY_VERSION;
    m.attr("compiler") = compiler();
    m.def("isa", &rarefy::isa, "The instruction set in use.");
    m.def("set_isa", &rarefy::set_isa, nb::arg("name"), "Use another instruction set from now on.");
    m.def("available_isas", &rarefy::available_isas, "The instruction sets that this build and this CPU have, low to high.");
    m.def("share_threads", [](std::uintptr_t team) { rarefy::share_threads(reinterpret_cast<rarefy::Team>(team)); }, nb::arg("team"),
          "Share work on the threads of the OpenMP runtime whose GOMP_parallel stands at this address; 0: on our own.");
    m.def("shares_threads", &rarefy::shares_threads, "Whether work is shared on an OpenMP runtime's threads.");
    m.def("pack_mask", &pack_mask, nb::arg("bools").noconvert(), nb::arg("bits").noconvert(), nb::arg("threads"));
    m.def("unpack_mask", &unpack_mask, nb::arg("bits").noconvert(), nb::arg("bools").noconvert(), nb::arg("threads"));
    m.def("zero_out", &zero_out<std::uint16_t>, nb::arg("x").noconvert(), nb::arg("keep").noconvert(), nb::arg("threads"));
    m.def("zero_out", &zero_out<std::uint32_t>, nb::arg("x").noconvert(), nb::arg("keep").noconvert(), nb::arg("threads"));
    m.def("zero_out", &zero_out<std::uint64_t>, nb::arg("x").noconvert(), nb::arg("keep").noconvert(), nb::arg("threads"));
    m.def("select_k", &select_k<float>, nb::arg("scores").noconvert(), nb::arg("k").noconvert(), nb::arg("mask").noconvert(),
          nb::arg("threads"));
    m.def("select_k", &select_k<double>, nb::arg("scores").noconvert(), nb::arg("k").noconvert(), nb::arg("mask").noconvert(),
          nb::arg("threads"));
    bind_layer(m);  // first: the others derive from it
    bind_planes(m);
    bind_sparse_layers(m);
    bind_spmm(m);
    bind_spmv(m);
    bind_conv(m);
    bind_program(m);
    bind_grad(m);
    bind_block(m);
    bind_lowp(m);
    bind_probe(m);
    bind_simplex(m);
    bind_transposable(m);
    bind_n_m(m);
}
