// Memory that a thread keeps between calls for its own temporary use, aligned to a cache line.
#pragma once
#include <cstddef>

namespace rarefy {

// `which` of a few independent buffers; the content is undefined, and lost when the same buffer is asked for again.
float* scratch(std::size_t which, std::size_t floats);

// Bytes of the first-level data cache of this machine.
std::size_t l1_bytes();

}  // namespace rarefy
