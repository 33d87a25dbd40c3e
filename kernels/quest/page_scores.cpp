// page_scores: Quest's upper bound of every page (page_scores.py). Reads the pages' metadata in place.

#include "vectors.h"

namespace {

constexpr int PAGES_PER_TURN = 64;
constexpr int PAGES_AT_ONCE = 4;  // whose products with a query are summed together

template <class T, int HEADS>
void scores_of_heads(const float* split, const T* const pages[PAGES_AT_ONCE], int64_t width, float out[HEADS][PAGES_AT_ONCE]) {
    Vec sums[HEADS][PAGES_AT_ONCE] = {};
    for (int64_t i = 0; i < width; i += W) {
        Vec bounds[PAGES_AT_ONCE];
        for (int j = 0; j < PAGES_AT_ONCE; ++j) bounds[j] = load(pages[j] + i);
        for (int g = 0; g < HEADS; ++g) {
            const Vec query = load(split + g * width + i);
            for (int j = 0; j < PAGES_AT_ONCE; ++j) sums[g][j] += query * bounds[j];
        }
    }
    if constexpr (HEADS * PAGES_AT_ONCE == W) {
        store(out[0], sums_of(sums[0]));
    } else {
        for (int g = 0; g < HEADS; ++g)
            for (int j = 0; j < PAGES_AT_ONCE; ++j) out[g][j] = sum(sums[g][j]);
    }
}

// Scores of PAGES_AT_ONCE pages for one KV head, reduced over its query heads.
template <class T>
void scores_of_group(const float* split, const T* const pages[PAGES_AT_ONCE], int64_t width, int64_t group, bool is_sum,
                     float best[PAGES_AT_ONCE]) {
    for (int j = 0; j < PAGES_AT_ONCE; ++j) best[j] = is_sum ? 0.0f : -INFINITY;
    for (int64_t g = 0; g < group; g += HEADS_AT_ONCE) {
        float found[HEADS_AT_ONCE][PAGES_AT_ONCE];
        const int64_t some = group - g < HEADS_AT_ONCE ? group - g : HEADS_AT_ONCE;
        switch (some) {
            case 1: scores_of_heads<T, 1>(split + g * width, pages, width, found); break;
            case 2: scores_of_heads<T, 2>(split + g * width, pages, width, found); break;
            case 3: scores_of_heads<T, 3>(split + g * width, pages, width, found); break;
            default: scores_of_heads<T, 4>(split + g * width, pages, width, found);
        }
        for (int64_t i = 0; i < some; ++i)
            for (int j = 0; j < PAGES_AT_ONCE; ++j)
                best[j] = is_sum ? best[j] + found[i][j] : (found[i][j] > best[j] ? found[i][j] : best[j]);
    }
}

// split: [batch, heads, group, width], width = 2 dim. All KV heads of a page are read in turn, as they are contiguous.
template <class T>
void page_scores(const float* split, const T* metadata, int64_t page_stride, int64_t head_stride, const int32_t* table,
                 int64_t table_stride, const int32_t* num_pages, bool is_sum, int64_t batch, int64_t heads, int64_t group,
                 int64_t width, int64_t most_pages, float* out, int64_t threads) {
    const int64_t turns = (most_pages + PAGES_PER_TURN - 1) / PAGES_PER_TURN;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t turn = 0; turn < turns; ++turn) {
            const int64_t start = turn * PAGES_PER_TURN, end = std::min(start + PAGES_PER_TURN, most_pages);
            const int64_t used = std::min<int64_t>(end, num_pages[b]);
            const auto page_at = [&](int64_t p) { return metadata + table[b * table_stride + p] * page_stride; };
            for (int64_t p = start; p < used; p += PAGES_AT_ONCE) {
                const int64_t some = std::min<int64_t>(PAGES_AT_ONCE, used - p);
                const T *first[PAGES_AT_ONCE], *pages[PAGES_AT_ONCE], *next[PAGES_AT_ONCE];
                for (int j = 0; j < PAGES_AT_ONCE; ++j) first[j] = page_at(j < some ? p + j : p);
                const int64_t later = std::max<int64_t>(0, std::min<int64_t>(PAGES_AT_ONCE, num_pages[b] - p - PAGES_AT_ONCE));
                for (int j = 0; j < later; ++j) next[j] = page_at(p + PAGES_AT_ONCE + j);
                for (int64_t h = 0; h < heads; ++h) {
                    for (int j = 0; j < later; ++j)
                        for (int64_t i = 0; i < width; i += 64 / int64_t(sizeof(T)))
                            __builtin_prefetch(next[j] + h * head_stride + i, 0, 2);
                    for (int j = 0; j < PAGES_AT_ONCE; ++j) pages[j] = first[j] + h * head_stride;
                    float found[PAGES_AT_ONCE];
                    scores_of_group(split + (b * heads + h) * group * width, pages, width, group, is_sum, found);
                    memcpy(out + (b * heads + h) * most_pages + p, found, some * sizeof(float));
                }
            }
            for (int64_t h = 0; h < heads; ++h) {
                float* row = out + (b * heads + h) * most_pages;
                std::fill(row + std::max(start, used), row + end, -INFINITY);
            }
        }
}

}  // namespace

// One function per dtype of the cache. Tensors as in page_scores.py; strides in elements.
#define PAGE_SCORES(NAME, T)                                                                                                   \
    extern "C" void page_scores_##NAME(const float* split, const T* metadata, int64_t page_stride, int64_t head_stride,        \
                                       const int32_t* table, int64_t table_stride, const int32_t* num_pages, int64_t is_sum,   \
                                       int64_t batch, int64_t heads, int64_t group, int64_t width, int64_t most_pages,         \
                                       float* out, int64_t threads) {                                                          \
        page_scores<T>(split, metadata, page_stride, head_stride, table, table_stride, num_pages, is_sum, batch, heads, group, \
                       width, most_pages, out, threads);                                                                       \
    }

PAGE_SCORES(float32, float)
PAGE_SCORES(bfloat16, Bfloat16)
PAGE_SCORES(float16, Float16)
