#include <atomic>
#include <chrono>

#include "bind.hpp"
#include "pool.hpp"
#include "probe.hpp"

namespace {

// Seconds that `threads` threads take for one part each.
template <class Part> double timed(std::size_t threads, const Part& part) {
    const nb::gil_scoped_release unlocked;
    std::atomic<float> kept{0};  // so that nothing is optimised away
    const auto start = std::chrono::steady_clock::now();
    rarefy::parallel(threads, threads, [&](std::size_t i) { kept.store(part(i), std::memory_order_relaxed); });
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double flops(std::size_t rounds, std::size_t threads) {
    const auto& k = RAREFY_AT_LEVEL(probe);
    const double seconds = timed(threads, [&](std::size_t) { return k.fmas(rounds); });
    return 2.0 * static_cast<double>(k.lanes * k.sums * rounds * threads) / seconds;
}

double bandwidth(const Flat<const float>& x, std::size_t times, std::size_t threads) {
    const auto& k = RAREFY_AT_LEVEL(probe);
    need(threads >= 1 && x.size() % (256 * threads) == 0, "probe_bandwidth: a multiple of 256 floats per thread");
    const std::size_t n = x.size() / threads;
    const double seconds = timed(threads, [&](std::size_t i) { return k.read(x.data() + i * n, n, times); });
    return 4.0 * static_cast<double>(x.size() * times) / seconds;
}

}  // namespace

void bind_probe(nb::module_& m) {
    m.def("probe_flops", &flops, nb::arg("rounds"), nb::arg("threads"), "Floating-point operations a second in registers.");
    m.def("probe_bandwidth", &bandwidth, nb::arg("x").noconvert(), nb::arg("times"), nb::arg("threads"),
          "Bytes a second, each thread reading its own part of x again and again.");
}
