#include "pool.hpp"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace rarefy {
namespace {

struct Job {
    const std::function<void(std::size_t)>* task = nullptr;
    std::size_t tasks = 0, seats = 0;  // seats: how many workers may still join
    std::atomic<std::size_t> next{0};
    std::size_t busy = 0;              // workers inside, guarded by Pool::mutex

    void work() {
        for (std::size_t i = next.fetch_add(1, std::memory_order_relaxed); i < tasks;
             i = next.fetch_add(1, std::memory_order_relaxed))
            (*task)(i);
    }
};

class Pool {
public:
    void run(std::size_t tasks, std::size_t threads, const std::function<void(std::size_t)>& task) {
        std::unique_lock<std::mutex> turn(one_caller, std::try_to_lock);
        Job job;
        job.task = &task;
        job.tasks = tasks;
        if (!turn.owns_lock()) {
            job.work();
            return;
        }
        {
            std::lock_guard<std::mutex> lock(mutex);
            while (workers < threads - 1 && start_worker()) ++workers;
            job.seats = threads - 1;
            current = &job;
        }
        wake.notify_all();
        job.work();
        std::unique_lock<std::mutex> lock(mutex);
        current = nullptr;  // a late sleeper finds nothing to do
        done.wait(lock, [&] { return job.busy == 0; });
    }

private:
    // Workers are detached and the pool is never destroyed: nothing to join at exit, and a forked child can just forget them.
    bool start_worker() {
        try {
            std::thread([this] { serve(); }).detach();
            return true;
        } catch (...) {
            return false;  // the system gives no more threads: work with those there are
        }
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            wake.wait(lock, [&] { return current != nullptr && current->seats > 0; });
            Job* job = current;
            --job->seats;
            ++job->busy;
            lock.unlock();
            job->work();
            lock.lock();
            if (--job->busy == 0) done.notify_all();
        }
    }

    std::mutex one_caller, mutex;
    std::condition_variable wake, done;
    Job* current = nullptr;
    std::size_t workers = 0;
};

std::atomic<Pool*> pool{nullptr};

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
    the_pool().run(tasks, threads, task);
}

std::size_t pieces(std::size_t n, std::size_t threads, std::size_t least) {
    if (threads <= 1 || n < 2 * least) return 1;
    const std::size_t most = n / least, wanted = threads * 8;
    return most < wanted ? most : wanted;
}

}  // namespace rarefy
