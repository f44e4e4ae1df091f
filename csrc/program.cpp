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
constexpr std::size_t large_traffic = 32768;        // floats that a step reads and writes for a sample: more makes it worth a chunk
constexpr std::size_t chunk_room = 262144;           // floats between the layers that the second cache holds
constexpr std::size_t worth_a_thread = 1 << 18;      // floats read and written in all
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

    sizes_ = std::move(sizes);
    for (std::size_t s = 0; s < steps_.size(); ++s) {
        std::size_t traffic = steps_[s].layer->output_size();
        for (const std::size_t size : steps_[s].layer->input_sizes()) traffic += size;
        traffic_ += traffic;
        if (traffic > large_traffic) head_ = s + 1;
    }
    head_floats_ = plan(0, head_, 1, 1).floats;
}

bool Program::lies_in(std::size_t storage, std::size_t from, std::size_t to) const {
    return inside_[storage] && lives_[storage].last >= from && lives_[storage].last < to;
}

Program::Plan Program::plan(std::size_t from, std::size_t to, std::size_t batch, std::size_t threads) const {
    std::vector<Interval> intervals(lives_.size(), {0, 0, 0});
    for (std::size_t id = 0; id < lives_.size(); ++id)
        if (lies_in(id, from, to)) intervals[id] = {lives_[id].floats * batch, std::max(lives_[id].first, from), lives_[id].last};
    for (std::size_t s = from; s < to; ++s) intervals.push_back({steps_[s].layer->scratch_floats(batch, threads), s, s});
    const auto at = place(intervals);
    const auto middle = at.begin() + static_cast<std::ptrdiff_t>(lives_.size());
    return {from, to, batch, threads, at.back(), {at.begin(), middle}, {middle, at.end() - 1}};
}

Program::Split Program::split(std::size_t batch, std::size_t threads) const {
    if (batch <= 1 || head_ == 0) return {batch, 0};
    std::size_t chunk = std::clamp<std::size_t>(chunk_room / std::max<std::size_t>(head_floats_, 1), 1, batch);
    const bool abreast = threads > 1 && batch * traffic_ >= worth_a_thread;
    if (abreast) chunk = std::min(chunk, (batch + threads - 1) / threads);
    const std::size_t chunks = batch / chunk;
    return {chunk, abreast ? chunks - chunks % threads : 0};
}

std::size_t Program::arena_floats(std::size_t batch, std::size_t threads) const {
    const Split how = split(batch, threads);
    const std::size_t head = how.chunk == batch ? steps_.size() : head_;
    const std::size_t rest = head == steps_.size() ? 0 : plan(head, steps_.size(), batch, threads).floats;
    if (how.abreast == 0) return plan(0, head, how.chunk, threads).floats + rest;
    return std::min(threads, how.abreast) * plan(0, head, how.chunk, 1).floats + rest;
}

std::unique_ptr<Program::Arena> Program::take(std::size_t from, std::size_t to, std::size_t batch, std::size_t threads) const {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (auto& arena : idle_) {
            const Plan& p = arena->plan;
            if (p.from != from || p.to != to || p.batch != batch || p.threads != threads) continue;
            std::swap(arena, idle_.back());
            auto found = std::move(idle_.back());
            idle_.pop_back();
            return found;
        }
    }
    auto arena = std::make_unique<Arena>();
    arena->plan = plan(from, to, batch, threads);
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

void Program::give(std::unique_ptr<Arena> arena) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.size() >= 8) idle_.erase(idle_.begin());
    idle_.push_back(std::move(arena));
}

void Program::run_steps(const Arena& arena, const Work& work, std::size_t sample, double* seconds) const {
    using Clock = std::chrono::steady_clock;
    const Plan& plan = arena.plan;
    float* const base = arena.memory.get();
    const auto where = [&](std::size_t id) {
        return work.at[id] != nullptr ? work.at[id] + sample * sizes_[id] : base + plan.buffer[storage_[id]];
    };
    const auto poison_dead = [&](std::size_t step) {  // all but what lives in this step or was written for a later one
        std::vector<bool> alive(plan.floats, false);
        for (std::size_t id = 0; id < lives_.size(); ++id)
            if (lies_in(id, plan.from, plan.to) && lives_[id].first < step && step <= lives_[id].last)
                std::fill_n(alive.begin() + static_cast<std::ptrdiff_t>(plan.buffer[id]), lives_[id].floats * plan.batch, true);
        for (std::size_t i = 0; i < plan.floats; ++i)
            if (!alive[i]) base[i] = std::numeric_limits<float>::quiet_NaN();
    };
    std::vector<const float*> reads;
    for (std::size_t s = plan.from; s < plan.to; ++s) {
        const Step& step = steps_[s];
        if (work.poison) poison_dead(s);
        reads.clear();
        for (const std::size_t id : step.inputs) reads.push_back(where(id));
        const auto start = seconds == nullptr ? Clock::time_point{} : Clock::now();
        step.layer->run(reads.data(), where(step.output), base + plan.scratch[s - plan.from], plan.batch, plan.threads);
        if (seconds != nullptr) seconds[s] += std::chrono::duration<double>(Clock::now() - start).count();
    }
}

void Program::run(const std::vector<const float*>& inputs, const std::vector<float*>& outputs, std::size_t batch, std::size_t threads,
                  double* seconds, bool poison) const {
    const Run busy(threads);
    const std::size_t all = steps_.size();
    const Split how = split(batch, threads);
    const std::size_t head = how.chunk == batch ? all : head_;
    auto rest = head == all ? nullptr : take(head, all, batch, threads);

    Work work{std::vector<float*>(storage_.size(), nullptr), poison};
    for (std::size_t i = 0; i < inputs_.size(); ++i) work.at[inputs_[i]] = const_cast<float*>(inputs[i]);  // never written
    for (std::size_t i = 0; i < outputs_.size(); ++i)
        if (work.at[outputs_[i]] == nullptr) work.at[outputs_[i]] = outputs[i];
    for (std::size_t id = 0; id < storage_.size(); ++id)
        if (rest != nullptr && work.at[id] == nullptr && lies_in(storage_[id], head, all))
            work.at[id] = rest->memory.get() + rest->plan.buffer[storage_[id]];

    if (seconds != nullptr) std::fill_n(seconds, all, 0.0);
    if (how.abreast > 0) {
        std::vector<std::unique_ptr<Arena>> arenas;  // of those at work; taken here, since a task must not throw
        for (std::size_t t = 0; t < std::min(threads, how.abreast); ++t) arenas.push_back(take(0, head, how.chunk, 1));
        const std::size_t crew = arenas.size();
        std::vector<double> sums(seconds == nullptr ? 0 : all * crew, 0.0);
        parallel(crew, threads, [&](std::size_t t) {
            double* mine = seconds == nullptr ? nullptr : sums.data() + t * all;
            for (std::size_t c = t * how.abreast / crew; c < (t + 1) * how.abreast / crew; ++c) run_steps(*arenas[t], work, c * how.chunk, mine);
        });
        for (std::size_t i = 0; i < sums.size(); ++i) seconds[i % all] += sums[i] / static_cast<double>(crew);
        for (auto& arena : arenas) give(std::move(arena));
    }
    for (std::size_t sample = how.abreast * how.chunk; sample < batch || batch == 0;) {
        const std::size_t count = std::min(how.chunk, batch - sample);
        auto arena = take(0, head, count, threads);
        run_steps(*arena, work, sample, seconds);
        give(std::move(arena));
        sample += count;
        if (batch == 0) break;
    }
    if (rest != nullptr) {
        run_steps(*rest, work, 0, seconds);
        give(std::move(rest));
    }
    for (std::size_t i = 0; i < outputs_.size(); ++i)  // an input handed through, or an output named twice
        if (work.at[outputs_[i]] != outputs[i] && output_sizes_[i] != 0)
            std::memcpy(outputs[i], work.at[outputs_[i]], output_sizes_[i] * batch * sizeof(float));
}

}  // namespace rarefy
