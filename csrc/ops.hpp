// The multi-threaded operators that Python calls, written on top of the kernels of the chosen instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

namespace rarefy {

void pack_mask(const std::uint8_t* bools, std::size_t n, std::uint8_t* bits, std::size_t threads);
void unpack_mask(const std::uint8_t* bits, std::size_t n, std::uint8_t* bools, std::size_t threads);

// Sets x to zero where keep is zero. T is the unsigned integer as wide as the floating type.
template <class T> void zero_out(T* x, const std::uint8_t* keep, std::size_t n, std::size_t threads);

// mask = the k largest of each of `rows` rows of n scores; ties go to the lower index. k[row * k_step] must lie in [0, n].
// Returns true, with the mask left unfinished, when the scores hold a NaN.
template <class T>
bool select_k(const T* x, std::size_t rows, std::size_t n, const std::int64_t* k, std::size_t k_step, std::uint8_t* mask,
              std::size_t threads);

}  // namespace rarefy
