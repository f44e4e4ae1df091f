#include "pool.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace rarefy {
namespace {

using Clock = std::chrono::steady_clock;

// How long a thread looks out before it sleeps. A worker that just worked is soon needed again, all the more inside a network.
constexpr std::chrono::microseconds after_a_job{30}, inside_a_run{200}, for_the_others{200};

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A place to wait for a change of atomics: looking out first, asleep then.
class Bell {
public:
    template <class Ready> void wait(std::chrono::microseconds look_out, const Ready& ready) {
        if (ready()) return;
        if (look_out.count() > 0) {
            const auto end = Clock::now() + look_out;
            do {
                for (int i = 0; i < 16; ++i) {
                    pause();
                    if (ready()) return;
                }
            } while (Clock::now() < end);
        }
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        std::atomic_thread_fence(std::memory_order_seq_cst);  // a ringer sees this sleeper, or the sleeper sees the change
        bell_.wait(lock, ready);
        sleepers_.fetch_sub(1);
    }
    // To be called after the change.
    void ring() {
        std::atomic_thread_fence(std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_relaxed) == 0) return;
        { const std::lock_guard<std::mutex> lock(mutex_); }  // whoever counts as a sleeper now sleeps
        bell_.notify_all();
    }

private:
    std::mutex mutex_;
    std::condition_variable bell_;
    std::atomic<std::size_t> sleepers_{0};
};

// One job at a time. `gate_` says which, whether it may still be joined, and how many seats are left: a worker takes a seat by
// changing exactly the gate that it saw, so the job cannot end or be replaced between its look and its step.
class Pool {
public:
    void run(std::size_t tasks, std::size_t threads, const std::function<void(std::size_t)>& task) {
        if (taken_.exchange(true, std::memory_order_acquire)) {  // another caller's turn, or a task that calls back
            for (std::size_t i = 0; i < tasks; ++i) task(i);
            return;
        }
        while (workers_ < threads - 1 && start_worker()) ++workers_;
        const std::uint64_t seats = threads - 1 < workers_ ? threads - 1 : workers_;
        task_ = &task;
        tasks_ = tasks;
        next_.store(0, std::memory_order_relaxed);
        gate_.store(++job_ << 16 | (seats < closed ? seats : closed - 1), std::memory_order_release);
        wake_.ring();
        work();
        // Nobody may sit down any more; those who did must leave.
        const std::uint64_t free = gate_.exchange(job_ << 16, std::memory_order_acq_rel) & closed;
        const std::uint64_t joined = (seats < closed ? seats : closed - 1) - free;
        done_.wait(for_the_others, [&] { return left_.load(std::memory_order_acquire) == joined; });
        left_.store(0, std::memory_order_relaxed);
        taken_.store(false, std::memory_order_release);
    }

    std::atomic<int> runs{0};

private:
    static constexpr std::uint64_t closed = 0xffff;

    // Workers are detached and the pool is never destroyed: nothing to join at exit, and a forked child can just forget them.
    bool start_worker() {
        try {
            std::thread([this] { serve(); }).detach();
            return true;
        } catch (...) {
            return false;  // the system gives no more threads: work with those there are
        }
    }

    void work() {
        const auto& task = *task_;
        const std::size_t tasks = tasks_;
        for (std::size_t i = next_.fetch_add(1, std::memory_order_relaxed); i < tasks; i = next_.fetch_add(1, std::memory_order_relaxed))
            task(i);
    }

    void serve() {
        std::uint64_t last = 0;  // a job is joined once
        std::chrono::microseconds look_out{0};
        for (;;) {
            std::uint64_t gate = 0;
            wake_.wait(look_out, [&] {
                gate = gate_.load(std::memory_order_acquire);
                return (gate & closed) != 0 && gate >> 16 != last;
            });
            look_out = runs.load(std::memory_order_relaxed) > 0 ? inside_a_run : after_a_job;
            if (!gate_.compare_exchange_strong(gate, gate - 1, std::memory_order_acq_rel)) continue;
            last = gate >> 16;
            work();
            left_.fetch_add(1, std::memory_order_release);
            done_.ring();
        }
    }

    std::atomic<bool> taken_{false};
    const std::function<void(std::size_t)>* task_ = nullptr;
    std::size_t tasks_ = 0, workers_ = 0;
    std::uint64_t job_ = 0;
    alignas(64) std::atomic<std::uint64_t> gate_{0};
    alignas(64) std::atomic<std::size_t> next_{0};
    alignas(64) std::atomic<std::uint64_t> left_{0};
    Bell wake_, done_;
};

std::atomic<Pool*> pool{nullptr};

// A job for the threads of an OpenMP runtime that somebody else in the process uses already.
struct Shared {
    const std::function<void(std::size_t)>& task;
    const std::size_t tasks;
    std::atomic<std::size_t> next{0};

    static void work(void* job) {
        auto& mine = *static_cast<Shared*>(job);
        for (std::size_t i; (i = mine.next.fetch_add(1, std::memory_order_relaxed)) < mine.tasks;) mine.task(i);
    }
};

std::atomic<Team> team{nullptr};
std::atomic<bool> team_taken{false};

Pool& the_pool() {
    Pool* here = pool.load(std::memory_order_acquire);
    if (here != nullptr) return *here;
#if defined(__unix__) || defined(__APPLE__)
    // A forked child has none of its parent's threads, and its locks may be held by them: it starts over.
    static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr, std::memory_order_release); });
    (void)registered;
#endif
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(here, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;
    return *here;
}

}  // namespace

void parallel(std::size_t tasks, std::size_t threads, const std::function<void(std::size_t)>& task) {
    if (threads > tasks) threads = tasks;
    if (threads <= 1) {
        for (std::size_t i = 0; i < tasks; ++i) task(i);
        return;
    }
    const Team shared = team.load(std::memory_order_acquire);
    if (shared == nullptr) {
        the_pool().run(tasks, threads, task);
    } else if (team_taken.exchange(true, std::memory_order_acquire)) {  // another caller's turn, or a task that calls back
        for (std::size_t i = 0; i < tasks; ++i) task(i);
    } else {
        Shared job{task, tasks};
        shared(&Shared::work, &job, static_cast<unsigned>(threads), 0);
        team_taken.store(false, std::memory_order_release);
    }
}

void share_threads(Team with) {
#if defined(__unix__) || defined(__APPLE__)
    // OpenMP's threads do not survive a fork either, and its runtime does not notice: the child has a pool of its own.
    static const int registered = pthread_atfork(nullptr, nullptr, [] {
        team.store(nullptr, std::memory_order_release);
        team_taken.store(false, std::memory_order_release);
    });
    (void)registered;
#endif
    team.store(with, std::memory_order_release);
}

bool shares_threads() { return team.load(std::memory_order_acquire) != nullptr; }

Run::Run(std::size_t threads) : pool_(threads > 1 && !shares_threads() ? &the_pool() : nullptr) {
    if (pool_ != nullptr) static_cast<Pool*>(pool_)->runs.fetch_add(1, std::memory_order_relaxed);
}

Run::~Run() {
    if (pool_ != nullptr) static_cast<Pool*>(pool_)->runs.fetch_sub(1, std::memory_order_relaxed);
}

std::size_t pieces(std::size_t n, std::size_t threads, std::size_t least) {
    if (threads <= 1 || n < 2 * least) return 1;
    const std::size_t most = n / least, wanted = threads * 8;
    return most < wanted ? most : wanted;
}

}  // namespace rarefy
