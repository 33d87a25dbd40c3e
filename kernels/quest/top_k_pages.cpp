// top_k_pages: physical ids of every row's best pages (top_k_pages.py), in logical order. Scores are float or int32_t.

#include "vectors.h"

namespace {

// Order-preserving int32 image of a score; -0 and +0 have one image, and NaN is the largest.
int32_t key_of(int32_t score) { return score; }
int32_t key_of(float score) {
    int32_t bits;
    const float zero = score + 0.0f;
    memcpy(&bits, &zero, sizeof bits);
    return score == score ? bits ^ (bits >> 31 & 0x7fffffff) : std::numeric_limits<int32_t>::max();
}

// The k-th largest key, by bisection of its value: counting vectorises, sorting does not.
int32_t kth_largest(const int32_t* keys, int64_t count, int64_t k) {
    int64_t low = std::numeric_limits<int32_t>::min(), high = int64_t(std::numeric_limits<int32_t>::max()) + 1;
    while (high - low > 1) {  // at least k keys are >= low, fewer are >= high
        const int32_t middle = int32_t(low + (high - low) / 2);
        int32_t reached = 0;
        for (int64_t i = 0; i < count; ++i) reached += keys[i] >= middle;
        (reached >= k ? low : high) = middle;
    }
    return int32_t(low);
}

template <class T>
void top_k_pages(const T* scores, const int32_t* table, int64_t table_stride, const int32_t* num_pages, const int32_t* k,
                 int64_t sink_pages, int64_t recent_pages, int64_t batch, int64_t heads, int64_t most_pages, int64_t capacity,
                 int32_t* pages, int32_t* counts, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < batch * heads; ++row) {
        static thread_local std::vector<int32_t> keys;
        const int64_t b = row / heads, n = num_pages[b], kept = k[b] < n ? k[b] : n;
        // Forced pages: all pages if the row keeps everything; else the newest first, then the sinks, up to k.
        const int64_t recent = kept == n ? n : (kept < recent_pages ? kept : recent_pages);
        const int64_t sinks = kept - recent < sink_pages ? kept - recent : sink_pages;
        const int64_t chosen = kept - recent - sinks;
        const int32_t* ids = table + b * table_stride;
        int32_t* to = pages + row * capacity;
        counts[row] = int32_t(kept);
        for (int64_t i = 0; i < sinks; ++i) *to++ = ids[i];
        if (chosen > 0) {
            const T* own = scores + row * most_pages;
            const int64_t middle = n - recent - sinks;
            keys.resize(middle);
            for (int64_t i = 0; i < middle; ++i) keys[i] = key_of(own[sinks + i]);
            const int32_t threshold = kth_largest(keys.data(), middle, chosen);
            int64_t room = chosen;
            for (int64_t i = 0; i < middle; ++i) room -= keys[i] > threshold;
            for (int64_t i = 0; i < middle; ++i)
                if (keys[i] > threshold || (keys[i] == threshold && room-- > 0)) *to++ = ids[sinks + i];
        }
        for (int64_t i = n - recent; i < n; ++i) *to++ = ids[i];
    }
}

}  // namespace

#define TOP_K(NAME, T)                                                                                                         \
    extern "C" void top_k_pages_##NAME(const T* scores, const int32_t* table, int64_t table_stride, const int32_t* num_pages,  \
                                       const int32_t* k, int64_t sink_pages, int64_t recent_pages, int64_t batch,              \
                                       int64_t heads, int64_t most_pages, int64_t capacity, int32_t* pages, int32_t* counts,   \
                                       int64_t threads) {                                                                      \
        top_k_pages<T>(scores, table, table_stride, num_pages, k, sink_pages, recent_pages, batch, heads, most_pages,          \
                       capacity, pages, counts, threads);                                                                      \
    }

TOP_K(float32, float)
TOP_K(int32, int32_t)
