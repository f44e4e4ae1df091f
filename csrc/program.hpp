// A whole network in one call: layers in order over one block of memory whose buffers share room where their lives do not meet.
#pragma once
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "layer.hpp"

namespace rarefy {

// One use of memory in steps [first, last].
struct Interval {
    std::size_t floats, first, last;
};

// Offsets, in floats and multiples of 16, at which intervals that are alive in one step do not overlap; the sum of room needed is
// appended. Largest first, each in the lowest gap that holds it.
std::vector<std::size_t> place(const std::vector<Interval>& intervals);

// How a batch is run. The first steps, as far as their activations are large, take a few samples at a time, so that what one layer
// writes is still in the cache when the next reads it; where there are chunks enough, each thread takes its own. The steps behind,
// whose weights are the larger part, take the batch as a whole.
class Program {
public:
    // Reads buffers `inputs`, writes buffer `output`; every buffer is written once, by a step or as an input of the program.
    struct Step {
        std::shared_ptr<const Layer> layer;
        std::vector<std::size_t> inputs;
        std::size_t output;
    };

    // Throws std::invalid_argument where sizes or the order do not fit.
    Program(std::vector<Step> steps, std::vector<std::size_t> inputs, std::vector<std::size_t> outputs);

    const std::vector<std::size_t>& input_sizes() const { return input_sizes_; }
    const std::vector<std::size_t>& output_sizes() const { return output_sizes_; }
    std::size_t steps() const { return steps_.size(); }
    // All memory between the layers.
    std::size_t arena_floats(std::size_t batch, std::size_t threads) const;

    // Several callers may run at once; each has its own arenas. `seconds` [steps], if not null, takes how long each step lasted.
    // `poison` fills memory with NaN as soon as nothing living is in it, to find reads of what is gone.
    void run(const std::vector<const float*>& inputs, const std::vector<float*>& outputs, std::size_t batch, std::size_t threads,
             double* seconds = nullptr, bool poison = false) const;

private:
    // Memory for steps [from, to) and a number of samples. What later steps read of earlier ones' results lies in the later arena.
    struct Plan {
        std::size_t from = 0, to = 0, batch = 0, threads = 0, floats = 0;
        std::vector<std::size_t> buffer, scratch;  // offsets: by storage (unused for those elsewhere), by step
    };
    struct Arena {
        Plan plan;
        std::unique_ptr<float, void (*)(void*)> memory{nullptr, nullptr};
    };
    struct Split {
        std::size_t chunk;     // samples at a time in the first steps
        std::size_t abreast;   // so many chunks are run by threads of their own, those left over by all threads together
    };
    // One run of steps: where each buffer's first sample lies, or null for what lies in the steps' own arena.
    struct Work {
        std::vector<float*> at;
        bool poison;
    };

    bool lies_in(std::size_t storage, std::size_t from, std::size_t to) const;
    Plan plan(std::size_t from, std::size_t to, std::size_t batch, std::size_t threads) const;
    Split split(std::size_t batch, std::size_t threads) const;
    std::unique_ptr<Arena> take(std::size_t from, std::size_t to, std::size_t batch, std::size_t threads) const;
    void give(std::unique_ptr<Arena> arena) const;
    void run_steps(const Arena& arena, const Work& work, std::size_t sample, double* seconds) const;

    std::vector<Step> steps_;
    std::vector<std::size_t> inputs_, outputs_, input_sizes_, output_sizes_, sizes_;
    std::vector<std::size_t> storage_;  // of each buffer: the first buffer that lives in the same memory
    std::vector<Interval> lives_;       // of each storage, in floats per sample; none for what lies in the caller's arrays
    std::vector<bool> inside_;          // whether a storage lies in an arena
    std::size_t head_ = 0;              // steps that take a few samples at a time
    std::size_t head_floats_ = 0, traffic_ = 0;  // a sample's memory there; what all steps read and write for a sample
    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<Arena>> idle_;
};

}  // namespace rarefy
