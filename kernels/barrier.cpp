// barrier: ranks of one machine wait for each other in shared memory (shard/collectives/shared_memory.py).

#include <chrono>
#include <cstdint>
#include <thread>

// Publishes `number` as this rank's, then waits until every rank's number is at least as high. Returns -1, or the first rank that
// did not arrive before the timeout. Spins for some microseconds, then yields the core, then sleeps.
extern "C" int barrier(int64_t* numbers, int rank, int world_size, int64_t number, int64_t nanoseconds) {
    constexpr int LINE = 64 / sizeof(int64_t);  // each rank's number has a cache line of its own
    constexpr int SPINS = 2000, YIELDS = 200;
    __atomic_store_n(numbers + rank * LINE, number, __ATOMIC_RELEASE);
    using Clock = std::chrono::steady_clock;
    const auto deadline = Clock::now() + std::chrono::nanoseconds(nanoseconds);
    int64_t turn = 0;
    for (int other = 0; other < world_size; ++other)
        for (; __atomic_load_n(numbers + other * LINE, __ATOMIC_ACQUIRE) < number; ++turn) {
            if (turn < SPINS) continue;
            if (turn < SPINS + YIELDS)
                std::this_thread::yield();
            else
                std::this_thread::sleep_for(std::chrono::microseconds(50));
            if (Clock::now() >= deadline) return other;
        }
    return -1;
}
