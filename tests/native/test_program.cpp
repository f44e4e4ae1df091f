#include "check.hpp"
#include "plane_layers.hpp"
#include "program.hpp"

using namespace rarefy;

// Random graphs of additions and activations, run with all that is not alive filled with NaN.
TEST(programs_read_nothing_that_is_gone) {
    for (int round = 0; round < 60; ++round) {
        const std::size_t n = check::pick({1, 17, 70, 20000}), batch = check::pick(1, 5), length = check::pick(1, 15);
        const check::Floats x = check::randoms(batch * n);
        std::vector<std::vector<double>> values{{x.data(), x.data() + x.size()}};
        std::vector<Program::Step> steps;
        for (std::size_t s = 0; s < length; ++s) {
            const std::size_t a = check::pick(0, s), b = check::pick(0, s);
            const bool sum = check::pick(0, 1) == 1;
            std::vector<double> y(batch * n);
            for (std::size_t i = 0; i < y.size(); ++i) y[i] = sum ? std::max(0.0, values[a][i] + values[b][i]) : std::max(0.0, values[a][i]);
            steps.push_back({std::make_shared<Elementwise>(sum ? Elementwise::Op::add : Elementwise::Op::activation, n, Act::relu),
                             sum ? std::vector<std::size_t>{a, b} : std::vector<std::size_t>{a}, s + 1});
            values.push_back(std::move(y));
        }
        steps[0].inputs.assign(steps[0].inputs.size(), 0);
        const std::size_t other = check::pick(0, length);
        const Program program(std::move(steps), {0}, {length, other});
        for (std::size_t threads = 1; threads <= 2; ++threads) {
            check::Floats y(batch * n), z(batch * n);
            program.run({x.data()}, {y.data(), z.data()}, batch, threads, nullptr, true);
            check::near(y, values[length]);
            check::near(z, values[other]);
        }
    }
}
