// meet: how the ranks of one machine wait for each other in shared memory (shard/collectives/shared_memory.py).

#include <chrono>
#include <cstdint>
#include <thread>

// Write `number` as this rank's, then wait until every rank's is as high: -1, or the first rank that has not come in time.
// It spins for some microseconds, then lets others have the core, then naps.
extern "C" int meet(int64_t* numbers, int rank, int world_size, int64_t number, int64_t nanoseconds) {
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
