// top_k_pages: the pages of the highest scores (top_k_pages.py), in logical order.

#include "vectors.h"

#include <functional>

// The logical pages of every row that top_k_pages.py chooses, as physical ids. T is float or int32_t.
namespace {

template <class T>
void top_k_pages(const T* scores, const int32_t* table, int64_t table_stride, const int32_t* num_pages, const int32_t* k,
                 int64_t sink_pages, int64_t recent_pages, int64_t batch, int64_t heads, int64_t most_pages, int64_t capacity,
                 int32_t* pages, int32_t* counts, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < batch * heads; ++row) {
        static thread_local std::vector<T> sorted;
        const int64_t b = row / heads, n = num_pages[b], kept = k[b] < n ? k[b] : n;
        // Forced pages: all of a row that keeps everything; else the newest first, then the sinks, as far as k goes.
        const int64_t recent = kept == n ? n : (kept < recent_pages ? kept : recent_pages);
        const int64_t sinks = kept - recent < sink_pages ? kept - recent : sink_pages;
        const int64_t chosen = kept - recent - sinks;
        const int32_t* ids = table + b * table_stride;
        int32_t* to = pages + row * capacity;
        counts[row] = int32_t(kept);
        for (int64_t i = 0; i < sinks; ++i) *to++ = ids[i];
        if (chosen > 0) {
            const T* own = scores + row * most_pages;
            const int64_t end = n - recent;
            const auto value = [&](int64_t p) -> T { return own[p] == own[p] ? own[p] : std::numeric_limits<T>::infinity(); };
            sorted.clear();
            for (int64_t p = sinks; p < end; ++p) sorted.push_back(value(p));
            std::nth_element(sorted.begin(), sorted.begin() + (chosen - 1), sorted.end(), std::greater<T>());
            const T threshold = sorted[chosen - 1];
            int64_t room = chosen;
            for (int64_t p = sinks; p < end; ++p) room -= value(p) > threshold;
            for (int64_t p = sinks; p < end; ++p)
                if (value(p) > threshold || (value(p) == threshold && room-- > 0)) *to++ = ids[p];
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
