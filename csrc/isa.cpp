#include "isa.hpp"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace rarefy {
namespace {

#define RAREFY_TABLE(level) \
    Kernels { level::pack, level::unpack, level::zero16, level::zero32, level::zero64, level::select32(), level::select64() }

struct Level {
    std::string name;
    bool built, present;
    Kernels table;
};

// __builtin_cpu_supports asks CPUID and, through XGETBV, whether the operating system saves the wide registers.
const std::vector<Level>& levels() {
    static const std::vector<Level> all = [] {
        std::vector<Level> found{{"baseline", true, true, RAREFY_TABLE(baseline)}};
#ifdef RAREFY_X86
        __builtin_cpu_init();
        const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                        __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
        const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        found.push_back({"avx2", true, v3, RAREFY_TABLE(avx2)});
        found.push_back({"avx512", true, v4, RAREFY_TABLE(avx512)});
#else
        found.push_back({"avx2", false, false, {}});
        found.push_back({"avx512", false, false, {}});
#endif
        return found;
    }();
    return all;
}

const Level& find(const std::string& name, const std::string& where) {
    std::string known, have;
    for (const auto& level : levels()) {
        known += (known.empty() ? "" : ", ") + level.name;
        if (level.present) have += (have.empty() ? "" : ", ") + level.name;
    }
    for (const auto& level : levels()) {
        if (level.name != name) continue;
        if (level.present) return level;
        throw std::invalid_argument(where + "'" + name + "': " +
                                    (level.built ? "this CPU lacks that instruction set" : "not built for this architecture") +
                                    "; it has " + have);
    }
    throw std::invalid_argument(where + "'" + name + "': no such instruction set; choose one of " + known);
}

const Level& choose() {
    const char* asked = std::getenv("RAREFY_ISA");
    if (asked != nullptr && *asked != '\0') return find(asked, "RAREFY_ISA=");
    const Level* best = nullptr;
    for (const auto& level : levels())
        if (level.present) best = &level;
    return *best;
}

std::atomic<const Level*> current{nullptr};

const Level& in_use() {
    const Level* level = current.load(std::memory_order_acquire);
    if (level == nullptr) {
        level = &choose();
        current.store(level, std::memory_order_release);
    }
    return *level;
}

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const auto& level : levels())
        if (level.present) names.push_back(level.name);
    return names;
}

std::string isa() { return in_use().name; }

void set_isa(const std::string& name) { current.store(&find(name, "instruction set "), std::memory_order_release); }

const Kernels& kernels() { return in_use().table; }

std::size_t level() { return static_cast<std::size_t>(&in_use() - levels().data()); }

}  // namespace rarefy
