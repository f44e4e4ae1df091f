#include <atomic>
#include <thread>

#include "check.hpp"
#include "pool.hpp"

TEST(every_task_is_done_once) {
    for (int round = 0; round < 2000; ++round) {
        const std::size_t tasks = check::pick(0, 20), threads = check::pick(1, 4);
        std::vector<std::atomic<int>> done(tasks);
        rarefy::parallel(tasks, threads, [&](std::size_t i) { done[i].fetch_add(1); });
        for (const auto& d : done) CHECK(d.load() == 1);
    }
}

TEST(several_callers_and_calls_from_tasks) {
    std::atomic<int> total{0};
    std::vector<std::thread> callers;
    for (int c = 0; c < 4; ++c)
        callers.emplace_back([&] {
            const rarefy::Run busy(3);
            for (int round = 0; round < 200; ++round)
                rarefy::parallel(5, 3, [&](std::size_t) { rarefy::parallel(3, 2, [&](std::size_t) { total.fetch_add(1); }); });
        });
    for (auto& c : callers) c.join();
    CHECK(total.load() == 4 * 200 * 15);
}

TEST(cuts_cover_the_range) {
    for (int round = 0; round < 500; ++round) {
        const std::size_t n = check::pick(0, 1000), grain = check::pick(1, 64), parts = check::pick(1, 9);
        const rarefy::Cuts cut{n, grain, parts};
        CHECK(cut(0) == 0 && cut(parts) == n);
        for (std::size_t i = 0; i < parts; ++i) CHECK(cut(i) <= cut(i + 1));
    }
}
