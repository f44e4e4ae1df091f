#include "isa.hpp"
#include "ops.hpp"
#include "pool.hpp"

namespace rarefy {
namespace {
constexpr std::size_t least = std::size_t{1} << 18;  // bools a thread must get to be worth waking
}

void pack_mask(const std::uint8_t* bools, std::size_t n, std::uint8_t* bits, std::size_t threads) {
    const Cuts cut{n, 4096, pieces(n, threads, least)};  // whole bytes of bits, and whole cache lines of them
    const auto& k = kernels();
    parallel(cut.parts, threads, [&](std::size_t i) { k.pack(bools + cut(i), cut(i + 1) - cut(i), bits + cut(i) / 8); });
}

void unpack_mask(const std::uint8_t* bits, std::size_t n, std::uint8_t* bools, std::size_t threads) {
    const Cuts cut{n, 4096, pieces(n, threads, least)};
    const auto& k = kernels();
    parallel(cut.parts, threads, [&](std::size_t i) { k.unpack(bits + cut(i) / 8, cut(i + 1) - cut(i), bools + cut(i)); });
}

}  // namespace rarefy
