// Zeroing what a mask drops. A block that already is as it should be is not written: its cache lines stay clean.
#include "kernels.hpp"

namespace rarefy::RAREFY_LEVEL {
namespace {

template <class T> void zero(T* x, const std::uint8_t* keep, std::size_t n) {
    constexpr std::size_t block = 256;
    std::size_t at = 0;
    for (; at + block <= n; at += block) {
        T dropped = 0;
        for (std::size_t i = at; i < at + block; ++i) dropped = static_cast<T>(dropped | (keep[i] != 0 ? T{0} : x[i]));
        if (dropped == 0) continue;
        for (std::size_t i = at; i < at + block; ++i) x[i] = keep[i] != 0 ? x[i] : T{0};
    }
    for (; at < n; ++at)
        if (keep[at] == 0) x[at] = 0;
}

}  // namespace

void zero16(std::uint16_t* x, const std::uint8_t* keep, std::size_t n) { zero(x, keep, n); }
void zero32(std::uint32_t* x, const std::uint8_t* keep, std::size_t n) { zero(x, keep, n); }
void zero64(std::uint64_t* x, const std::uint8_t* keep, std::size_t n) { zero(x, keep, n); }

}  // namespace rarefy::RAREFY_LEVEL
