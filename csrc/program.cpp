#include "program.hpp"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <stdexcept>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

#include "pool.hpp"

namespace rarefy {
namespace {

constexpr std::size_t nowhere = std::numeric_limits<std::size_t>::max(), line = 16;  // floats in a cache line
constexpr std::size_t large_page = std::size_t{2} << 20;

void need(bool fits, const std::string& what) {
    if (!fits) throw std::invalid_argument("Program: " + what);
}

std::size_t rounded(std::size_t floats) { return (floats + line - 1) / line * line; }

}  // namespace

std::vector<std::size_t> place(const std::vector<Interval>& intervals) {
    std::vector<std::size_t> order(intervals.size()), at(intervals.size() + 1, 0), placed;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return intervals[a].floats > intervals[b].floats; });
    for (const std::size_t i : order) {
        const Interval& mine = intervals[i];
        if (mine.floats == 0) continue;
        std::size_t best = 0;  // `placed` ascends by offset: step over each neighbour in time that is in the way
        for (const std::size_t j : placed) {
            const Interval& other = intervals[j];
            if (other.last < mine.first || mine.last < other.first) continue;
            if (at[j] >= best + rounded(mine.floats)) break;
            best = std::max(best, at[j] + rounded(other.floats));
        }
        at[i] = best;
        at.back() = std::max(at.back(), best + rounded(mine.floats));
        placed.insert(std::upper_bound(placed.begin(), placed.end(), i, [&](auto a, auto b) { return at[a] < at[b]; }), i);
    }
    return at;
}

Program::Program(std::vector<Step> steps, std::vector<std::size_t> inputs, std::vector<std::size_t> outputs)
    : steps_(std::move(steps)), inputs_(std::move(inputs)), outputs_(std::move(outputs)) {
    std::size_t count = 0;
    for (const std::size_t id : inputs_) count = std::max(count, id + 1);
    for (const auto& step : steps_) count = std::max(count, step.output + 1);
    need(count <= inputs_.size() + steps_.size(), "buffers must be numbered without gaps");

    std::vector<std::size_t> sizes(count, nowhere), last(count, 0);
    std::vector<bool> written(count, false), outside(count, false);
    for (const std::size_t id : inputs_) {
        need(!written[id], "an input is named twice");
        written[id] = outside[id] = true;
    }
    for (std::size_t s = 0; s < steps_.size(); ++s) {
        const Step& step = steps_[s];
        const std::string where = "step " + std::to_string(s) + ": ";
        need(step.layer != nullptr, where + "no layer");
        need(step.inputs.size() == step.layer->input_sizes().size(), where + "the layer has another number of inputs");
        for (std::size_t i = 0; i < step.inputs.size(); ++i) {
            const std::size_t id = step.inputs[i], size = step.layer->input_sizes()[i];
            need(id < count && written[id], where + "reads a buffer before it is written");
            if (sizes[id] == nowhere) sizes[id] = size;  // an input of the program: its first reader says how large it is
            need(sizes[id] == size, where + "input " + std::to_string(i) + " has " + std::to_string(sizes[id]) +
                                        " floats a sample, the layer takes " + std::to_string(size));
            last[id] = s;
        }
        need(!written[step.output], where + "writes a buffer that is already written");
        written[step.output] = true;
        sizes[step.output] = step.layer->output_size();
        last[step.output] = s;
    }
    for (const std::size_t id : inputs_) {
        need(sizes[id] != nowhere, "an input is never read");
        input_sizes_.push_back(sizes[id]);
    }
    for (const std::size_t id : outputs_) {
        need(id < count && written[id], "an output is never written");
        output_sizes_.push_back(sizes[id]);
        outside[id] = true;
    }

    // A layer that works in place takes over the memory of an input that nobody reads later.
    storage_.resize(count);
    std::iota(storage_.begin(), storage_.end(), 0);
    lives_.assign(count, {0, 0, 0});
    inside_.assign(count, false);
    for (std::size_t s = 0; s < steps_.size(); ++s) {
        const Step& step = steps_[s];
        const std::size_t out = step.output;
        if (outside[out]) continue;
        for (std::size_t i = 0; i < step.inputs.size() && storage_[out] == out; ++i) {
            const std::size_t id = step.inputs[i];
            const bool once = std::count(step.inputs.begin(), step.inputs.end(), id) == 1;
            if (once && step.layer->in_place(i) && !outside[id] && last[id] == s && sizes[id] == sizes[out]) storage_[out] = storage_[id];
        }
        const std::size_t home = storage_[out];
        if (home == out) lives_[home] = {sizes[out], s, s};
        inside_[home] = true;
        lives_[home].last = std::max(lives_[home].last, last[out]);
    }
}

Program::Plan Program::plan(std::size_t batch, std::size_t threads) const {
    std::vector<Interval> intervals = lives_;
    for (auto& life : intervals) life.floats *= batch;
    for (std::size_t s = 0; s < steps_.size(); ++s) intervals.push_back({steps_[s].layer->scratch_floats(batch, threads), s, s});
    const auto at = place(intervals);
    const auto middle = at.begin() + static_cast<std::ptrdiff_t>(lives_.size());
    Plan made;
    made.batch = batch;
    made.threads = threads;
    made.floats = at.back();
    made.buffer.assign(at.begin(), middle);
    made.scratch.assign(middle, at.end() - 1);
    return made;
}

std::unique_ptr<Program::Arena> Program::take(std::size_t batch, std::size_t threads) const {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (auto& arena : idle_) {
            if (arena->plan.batch != batch || arena->plan.threads != threads) continue;
            std::swap(arena, idle_.back());
            auto found = std::move(idle_.back());
            idle_.pop_back();
            return found;
        }
    }
    auto arena = std::make_unique<Arena>();
    arena->plan = plan(batch, threads);
    // Large pages, where the system gives them: a network touches thousands of small ones in every run.
    const std::size_t bytes = std::max<std::size_t>(arena->plan.floats, line) * sizeof(float);
    const std::size_t page = bytes >= large_page ? large_page : 64;
    void* memory = std::aligned_alloc(page, (bytes + page - 1) / page * page);
    if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (page == large_page) madvise(memory, (bytes + page - 1) / page * page, MADV_HUGEPAGE);
#endif
    arena->memory = {static_cast<float*>(memory), &std::free};
    return arena;
}

void Program::run(const std::vector<const float*>& inputs, const std::vector<float*>& outputs, std::size_t batch, std::size_t threads,
                  double* seconds, bool poison) const {
    using Clock = std::chrono::steady_clock;
    auto arena = take(batch, threads);
    float* const base = arena->memory.get();
    const Plan& at = arena->plan;
    std::vector<float*> buffers(storage_.size(), nullptr);
    for (std::size_t i = 0; i < inputs_.size(); ++i) buffers[inputs_[i]] = const_cast<float*>(inputs[i]);  // never written
    for (std::size_t i = 0; i < outputs_.size(); ++i)
        if (buffers[outputs_[i]] == nullptr) buffers[outputs_[i]] = outputs[i];
    for (std::size_t id = 0; id < buffers.size(); ++id)
        if (buffers[id] == nullptr && inside_[storage_[id]]) buffers[id] = base + at.buffer[storage_[id]];

    const auto poison_dead = [&](std::size_t step) {  // all but what lives in this step or was written for a later one
        std::vector<bool> alive(at.floats, false);
        for (std::size_t id = 0; id < lives_.size(); ++id)
            if (inside_[id] && lives_[id].first < step && step <= lives_[id].last)
                std::fill_n(alive.begin() + static_cast<std::ptrdiff_t>(at.buffer[id]), lives_[id].floats * batch, true);
        for (std::size_t i = 0; i < at.floats; ++i)
            if (!alive[i]) base[i] = std::numeric_limits<float>::quiet_NaN();
    };

    {
        const Run busy(threads);
        std::vector<const float*> reads;
        for (std::size_t s = 0; s < steps_.size(); ++s) {
            const Step& step = steps_[s];
            if (poison) poison_dead(s);
            reads.clear();
            for (const std::size_t id : step.inputs) reads.push_back(buffers[id]);
            const auto start = seconds == nullptr ? Clock::time_point{} : Clock::now();
            step.layer->run(reads.data(), buffers[step.output], base + at.scratch[s], batch, threads);
            if (seconds != nullptr) seconds[s] = std::chrono::duration<double>(Clock::now() - start).count();
        }
    }
    for (std::size_t i = 0; i < outputs_.size(); ++i)  // an input handed through, or an output named twice
        if (buffers[outputs_[i]] != outputs[i] && output_sizes_[i] != 0)
            std::memcpy(outputs[i], buffers[outputs_[i]], output_sizes_[i] * batch * sizeof(float));

    const std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.size() >= 4) idle_.erase(idle_.begin());
    idle_.push_back(std::move(arena));
}

}  // namespace rarefy
