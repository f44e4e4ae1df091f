// Which instruction set the kernels use: the best that this CPU and its operating system support, or the one asked for.
#pragma once
#include <string>
#include <vector>

#include "kernels.hpp"

namespace rarefy {

std::vector<std::string> available_isas();  // low to high
std::string isa();                          // the one in use; on first call RAREFY_ISA decides, else the highest
void set_isa(const std::string& name);      // throws std::invalid_argument for an unknown name or one this CPU lacks
const Kernels& kernels();
std::size_t level();                        // its place in the order low to high

}  // namespace rarefy

// The table `name` of the instruction set in use, where every kernel_*.cpp of a room defines `const SomeTable name` in its
// level's namespace and the room's header declares it with RAREFY_EVERY_LEVEL.
#ifdef RAREFY_X86
#define RAREFY_EVERY_LEVEL(declaration)  \
    namespace baseline { declaration; }  \
    namespace avx2 { declaration; }      \
    namespace avx512 { declaration; }
#define RAREFY_AT_LEVEL(name)                                                                                   \
    ([]() -> const auto& {                                                                                      \
        const decltype(&rarefy::baseline::name) all[] = {&rarefy::baseline::name, &rarefy::avx2::name, &rarefy::avx512::name}; \
        return *all[rarefy::level()];                                                                           \
    }())
#else
#define RAREFY_EVERY_LEVEL(declaration) namespace baseline { declaration; }
#define RAREFY_AT_LEVEL(name) (rarefy::baseline::name)
#endif

namespace rarefy {

}  // namespace rarefy
