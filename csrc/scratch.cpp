#include "scratch.hpp"

#include <memory>
#include <new>
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace rarefy {
namespace {

constexpr std::align_val_t line{64};

struct Buffer {
    float* data = nullptr;
    std::size_t floats = 0;
    ~Buffer() { ::operator delete(data, line); }
};

thread_local Buffer buffers[4];

}  // namespace

float* scratch(std::size_t which, std::size_t floats) {
    Buffer& buffer = buffers[which];
#ifdef RAREFY_SANITIZE
    const bool fits = buffer.floats == floats;  // so that a step beyond what was asked for is seen
#else
    const bool fits = buffer.floats >= floats;
#endif
    if (!fits) {
        ::operator delete(buffer.data, line);
        buffer.data = nullptr;
        buffer.floats = 0;
        buffer.data = static_cast<float*>(::operator new(floats * sizeof(float), line));
        buffer.floats = floats;
    }
    return buffer.data;
}

std::size_t l1_bytes() {
    static const std::size_t bytes = [] {
#ifdef _SC_LEVEL1_DCACHE_SIZE
        const long found = sysconf(_SC_LEVEL1_DCACHE_SIZE);
        if (found >= 16 * 1024) return static_cast<std::size_t>(found);
#endif
        return std::size_t{32} * 1024;
    }();
    return bytes;
}

}  // namespace rarefy
