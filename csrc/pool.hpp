// Threads to share work among: those of an OpenMP runtime that the process has already, or a small pool that rarefy owns, asleep
// when idle (soon after a call), sized per call, and born anew in a forked child.
#pragma once
#include <cstddef>
#include <functional>

namespace rarefy {

// Calls task(i) once for every i in [0, tasks), on the caller and up to threads - 1 others; returns when all are done.
// Runs on the caller alone when threads <= 1 or while another caller uses the pool. `task` must not throw.
void parallel(std::size_t tasks, std::size_t threads, const std::function<void(std::size_t)>& task);

// How an OpenMP runtime runs a function on a team of threads, the caller among them (`GOMP_parallel` of GCC's and Intel's).
using Team = void (*)(void (*work)(void*), void* job, unsigned threads, unsigned flags);

// From now on work is shared out on that runtime's threads (null: on our own). Its threads wait for work by spinning for a while:
// a second pool beside it would run against them for the same cores.
void share_threads(Team with);
bool shares_threads();

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
