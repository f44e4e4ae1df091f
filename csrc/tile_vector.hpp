// Vectors of whole numbers as wide as the instruction set that the including kernel_*.cpp is compiled for.
#pragma once
#include <cstddef>

#define RAREFY_INLINE inline __attribute__((always_inline))

namespace rarefy::RAREFY_LEVEL {

#if defined(__AVX512F__)
constexpr std::size_t VECTOR = 64;
#elif defined(__AVX2__)
constexpr std::size_t VECTOR = 32;
#else
constexpr std::size_t VECTOR = 16;
#endif

template <class T, int W> struct Vector {
    typedef T type __attribute__((vector_size(W * sizeof(T)), may_alias));
};

}  // namespace rarefy::RAREFY_LEVEL
