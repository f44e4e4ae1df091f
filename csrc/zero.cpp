#include "isa.hpp"
#include "ops.hpp"
#include "pool.hpp"

namespace rarefy {

template <class T> void zero_out(T* x, const std::uint8_t* keep, std::size_t n, std::size_t threads) {
    const Cuts cut{n, 4096, pieces(n, threads, std::size_t{1} << 17)};
    const auto& k = kernels();
    parallel(cut.parts, threads, [&](std::size_t i) {
        const std::size_t from = cut(i), count = cut(i + 1) - from;
        if constexpr (sizeof(T) == 2) k.zero16(x + from, keep + from, count);
        if constexpr (sizeof(T) == 4) k.zero32(x + from, keep + from, count);
        if constexpr (sizeof(T) == 8) k.zero64(x + from, keep + from, count);
    });
}

template void zero_out(std::uint16_t*, const std::uint8_t*, std::size_t, std::size_t);
template void zero_out(std::uint32_t*, const std::uint8_t*, std::size_t, std::size_t);
template void zero_out(std::uint64_t*, const std::uint8_t*, std::size_t, std::size_t);

}  // namespace rarefy
