#include "check.hpp"
#include "isa.hpp"

int main() {
    for (const auto& level : rarefy::available_isas()) {
        rarefy::set_isa(level);
        for (const auto& test : check::tests()) {
            std::fprintf(stderr, "%s %s\n", level.c_str(), test.name);
            check::rng().seed(1);
            test.run();
        }
    }
    std::puts("all well");
}
