// One small pool of threads that rarefy owns: asleep when idle (soon after a call), sized per call, and born anew in a forked child.
#pragma once
#include <cstddef>
#include <functional>

namespace rarefy {

// Calls task(i) once for every i in [0, tasks), on the caller and up to threads - 1 others; returns when all are done.
// Runs on the caller alone when threads <= 1 or while another caller uses the pool. `task` must not throw.
void parallel(std::size_t tasks, std::size_t threads, const std::function<void(std::size_t)>& task);

// While one lives, many short calls of `parallel` are to come: workers look out for the next for longer before they sleep.
class Run {
public:
    explicit Run(std::size_t threads);
    ~Run();
    Run(const Run&) = delete;
    Run& operator=(const Run&) = delete;

private:
    void* pool_;
};

// The range [0, n) cut into `parts` pieces of whole `grain`s; piece i is [cut(i), cut(i + 1)).
struct Cuts {
    std::size_t n, grain, parts;
    std::size_t operator()(std::size_t i) const {
        const std::size_t grains = (n + grain - 1) / grain;
        const std::size_t at = (grains / parts * i + grains % parts * i / parts) * grain;
        return at < n ? at : n;
    }
};

// How many pieces suit n items on `threads` threads when a piece should hold at least `least` items: several per thread,
// so that one slow core does not hold up the rest. 1 means: not worth waking anybody.
std::size_t pieces(std::size_t n, std::size_t threads, std::size_t least);

}  // namespace rarefy
