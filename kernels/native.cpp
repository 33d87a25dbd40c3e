// attend and page_scores for a CPU: pages are read where they lie, once, at the speed of memory. And how its ranks meet.
//
// No header of torch or of any library: `native.py` compiles this file on its first use and calls it with plain pointers.
// Vectors are GCC's (also Clang's): 16 floats, which the compiler maps on what the machine has.
// Work is cut by a row's own length alone, and partial results are merged in order: a row has the same bits at any number
// of threads and in any batch.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <thread>
#include <vector>

namespace {

constexpr int W = 16;  // floats in a vector, and tokens in a block: no page is smaller
typedef float Vec __attribute__((vector_size(W * 4)));
typedef int32_t IntVec __attribute__((vector_size(W * 4)));
typedef uint32_t BitVec __attribute__((vector_size(W * 4)));
typedef uint16_t ShortVec __attribute__((vector_size(W * 2)));
typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec4 __attribute__((vector_size(16)));

struct Bfloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

inline Vec load(const float* from) {
    Vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

inline BitVec load_bits(const void* from) {
    ShortVec bits;
    memcpy(&bits, from, sizeof bits);
    return __builtin_convertvector(bits, BitVec);
}

inline Vec load(const Bfloat16* from) { return (Vec)(load_bits(from) << 16); }

inline Vec load(const Float16* from) {
    const BitVec half = load_bits(from), rest = half & 0x7fff;
    const Vec scaled = (Vec)(rest << 13) * 0x1p112f;  // the exponents differ by 112; right for subnormals too
    const BitVec infinite = (BitVec)(rest >= 0x7c00) & 0x7f800000;
    return (Vec)((BitVec)scaled | infinite | (half & 0x8000) << 16);
}

inline void store(float* to, Vec x) { memcpy(to, &x, sizeof x); }

inline float sum(Vec x) {
    Vec8 eights[2];
    memcpy(eights, &x, sizeof x);
    const Vec8 eight = eights[0] + eights[1];
    Vec4 fours[2];
    memcpy(fours, &eight, sizeof eight);
    const Vec4 four = fours[0] + fours[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (IntVec){__VA_ARGS__})
#endif

// The sums of 16 vectors, in order: halves of two become one, four times. A third of the work of 16 times `sum`.
inline Vec sums_of(const Vec x[W]) {
    Vec eights[8], fours[4], twos[2];
    for (int i = 0; i < 8; ++i)
        eights[i] = SHUFFLE(x[i], x[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                    SHUFFLE(x[i], x[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; ++i)
        fours[i] = SHUFFLE(eights[i], eights[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
                   SHUFFLE(eights[i], eights[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 2; ++i)
        twos[i] = SHUFFLE(fours[i], fours[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                  SHUFFLE(fours[i], fours[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return SHUFFLE(twos[0], twos[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           SHUFFLE(twos[0], twos[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

// e^x for x <= 0; 0 below -87. Cody and Waite's reduction, then the series to x^7: within 2 ulp.
inline Vec exp_of_negative(Vec x) {
    const Vec kept = x < -87.0f ? Vec{} - 87.0f : x;
    const IntVec n = __builtin_convertvector(kept * 1.44269504f - 0.5f, IntVec);
    const Vec whole = __builtin_convertvector(n, Vec);
    const Vec r = (kept - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Vec y = Vec{} + 1.0f / 5040;
    y = y * r + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = (y * r + 1.0f) * r + 1.0f;
    const Vec power = (Vec)((n + 127) << 23);
    return x < -87.0f ? Vec{} : y * power;
}

// ---- attend

constexpr int CHUNK_TOKENS = 512;  // of attend.py
constexpr int HEADS_AT_ONCE = 4;   // query heads whose sums stay in registers
constexpr int AHEAD = 2;           // blocks of 16 tokens on their way from memory while one is computed

// What one chunk gives to one query head: the highest logit, the sum of e^(logit - highest), and that of values times it.
struct State {
    float highest, total;
};

struct Chunk {
    int64_t sequence, head, num_heads;  // heads with one list of pages are read together: they lie side by side
    int32_t index;                      // in their list
    int32_t tokens;                     // 1..CHUNK_TOKENS
    bool of_pages;
    int64_t place;  // of the first head's result among all of them
};

// Where in k and v 16 tokens of a chunk lie, for one head. Only `count` of them are in the list; the others repeat the first.
struct Block {
    int64_t at[W];
    int count;
};

template <class T>
struct Attend {
    const float* q;  // [rows, group, dim], multiplied by the scale
    const T *k, *v;  // [num_pages_total, heads, page_size, dim] with these strides; a page of one head is contiguous
    int64_t page_stride, head_stride;
    const int32_t* pages;  // [batch, heads, ...]
    int64_t pages_strides[2];
    const int32_t* tokens;
    int64_t tokens_strides[2];
    int64_t heads, group, dim, page_size;

    // The block from token `start` of a chunk on, for its first head.
    void find(const Chunk& chunk, int start, Block* block) const {
        const int64_t b = chunk.sequence, h = chunk.head;
        const int64_t place = int64_t(chunk.index) * CHUNK_TOKENS + start;
        block->count = std::min(chunk.tokens - start, W);
        if (chunk.of_pages) {  // a block never crosses a page
            const int64_t page = pages[b * pages_strides[0] + h * pages_strides[1] + place / page_size];
            const int64_t first = page * page_stride + h * head_stride + place % page_size * dim;
            for (int t = 0; t < block->count; ++t) block->at[t] = first + t * dim;
        } else {
            const int32_t* own = tokens + b * tokens_strides[0] + h * tokens_strides[1] + place;
            for (int t = 0; t < block->count; ++t)
                block->at[t] = own[t] / page_size * page_stride + h * head_stride + own[t] % page_size * dim;
        }
        for (int t = block->count; t < W; ++t) block->at[t] = block->at[0];
    }

    // Logits of 16 tokens for some query heads. The keys of a later block come into the cache meanwhile.
    template <int HEADS>
    void logits(const float* queries, const int64_t at[W], const int64_t* later, Vec out[HEADS]) const {
        for (int t = 0; t < W; t += 4) {
            Vec sums[HEADS][4] = {};
            for (int64_t i = 0; i < dim; i += W) {
                Vec keys[4];
                for (int j = 0; j < 4; ++j) keys[j] = load(k + at[t + j] + i);
                for (int g = 0; g < HEADS; ++g) {
                    const Vec query = load(queries + g * dim + i);
                    for (int j = 0; j < 4; ++j) sums[g][j] += query * keys[j];
                }
                if (later) prefetch(k, later + t, i);
            }
            if constexpr (HEADS * 4 == W) {
                const Vec found = sums_of(sums[0]);
                for (int g = 0; g < HEADS; ++g)
                    memcpy((float*)&out[g] + t, (const float*)&found + g * 4, 4 * sizeof(float));
            } else {
                for (int g = 0; g < HEADS; ++g)
                    for (int j = 0; j < 4; ++j) out[g][t + j] = sum(sums[g][j]);
            }
        }
    }

    // values += weights . v of 16 tokens; for some query heads, and VECTORS times 16 of the dimensions.
    template <int HEADS, int VECTORS>
    void add_values(float* values, const float weights[HEADS][W], const Block& block, const int64_t* later,
                    int64_t from) const {
        Vec sums[HEADS][VECTORS];
        for (int g = 0; g < HEADS; ++g)
            for (int j = 0; j < VECTORS; ++j) sums[g][j] = load(values + g * dim + from + j * W);
        for (int t = 0; t < block.count; ++t) {
            Vec value[VECTORS];
            for (int j = 0; j < VECTORS; ++j) value[j] = load(v + block.at[t] + from + j * W);
            for (int g = 0; g < HEADS; ++g)
                for (int j = 0; j < VECTORS; ++j) sums[g][j] += weights[g][t] * value[j];
        }
        for (int g = 0; g < HEADS; ++g)
            for (int j = 0; j < VECTORS; ++j) store(values + g * dim + from + j * W, sums[g][j]);
        if (later)
            for (int t = 0; t < W; t += 4)
                for (int j = 0; j < VECTORS; ++j) prefetch(v, later + t, from + j * W);
    }

    static void prefetch(const T* from, const int64_t at[4], int64_t i) {
        if (i * sizeof(T) % 64 == 0)
            for (int j = 0; j < 4; ++j) __builtin_prefetch(from + at[j] + i, 0, 2);
    }

    // A block for the query heads from `head` of the chunk's on.
    template <int HEADS>
    void attend_block(const Block& block, const int64_t* later, int64_t head, const float* queries, State* states,
                      float* values) const {
        const int count = block.count;
        states += head;
        values += head * dim;
        Vec found[HEADS];
        logits<HEADS>(queries + head * dim, block.at, later, found);
        float weights[HEADS][W];
        for (int g = 0; g < HEADS; ++g) {
            float highest = states[g].highest;
            for (int t = 0; t < count; ++t) highest = found[g][t] > highest ? found[g][t] : highest;
            if (highest > states[g].highest) {
                const float kept = std::exp(states[g].highest - highest);  // 0 at first
                for (int64_t i = 0; i < dim; i += W) store(values + g * dim + i, load(values + g * dim + i) * kept);
                states[g].total *= kept;
                states[g].highest = highest;
            }
            Vec weight = exp_of_negative(found[g] - highest);
            for (int t = count; t < W; ++t) weight[t] = 0.0f;
            states[g].total += sum(weight);
            store(weights[g], weight);
        }
        int64_t i = 0;
        for (; i + 2 * W <= dim; i += 2 * W) add_values<HEADS, 2>(values, weights, block, later, i);
        if (i < dim) add_values<HEADS, 1>(values, weights, block, later, i);
    }

    // One chunk: states [num_heads, group], values [num_heads, group, dim]. Its blocks: of all heads, then the next 16 tokens.
    void run(const Chunk& chunk, State* states, float* values) const {
        for (int64_t i = 0; i < chunk.num_heads * group; ++i) states[i] = {-INFINITY, 0.0f};
        memset(values, 0, chunk.num_heads * group * dim * sizeof(float));
        const float* queries = q + (chunk.sequence * heads + chunk.head) * group * dim;
        const int64_t num_blocks = (chunk.tokens + W - 1) / W * chunk.num_heads;
        Block blocks[AHEAD + 1];
        const auto found = [&](int64_t i) {
            Block& block = blocks[i % (AHEAD + 1)];
            if (i % chunk.num_heads == 0) {
                find(chunk, i / chunk.num_heads * W, &block);
            } else {
                block = blocks[(i - 1) % (AHEAD + 1)];
                for (int t = 0; t < W; ++t) block.at[t] += head_stride;
            }
            return block.at;
        };
        for (int64_t i = 0; i < AHEAD && i < num_blocks; ++i) {
            const int64_t* at = found(i);
            for (int64_t j = 0; j < dim; j += W)
                for (int t = 0; t < W; t += 4) prefetch(k, at + t, j), prefetch(v, at + t, j);
        }
        for (int64_t i = 0; i < num_blocks; ++i) {
            const Block& block = blocks[i % (AHEAD + 1)];
            const int64_t* later = i + AHEAD < num_blocks ? found(i + AHEAD) : nullptr;
            for (int64_t g = 0; g < group; g += HEADS_AT_ONCE) {
                const int64_t head = i % chunk.num_heads * group + g;
                const int64_t* fetched = g == 0 ? later : nullptr;
                switch (group - g) {
                    case 1: attend_block<1>(block, fetched, head, queries, states, values); break;
                    case 2: attend_block<2>(block, fetched, head, queries, states, values); break;
                    case 3: attend_block<3>(block, fetched, head, queries, states, values); break;
                    default: attend_block<4>(block, fetched, head, queries, states, values);
                }
            }
        }
    }
};

// One query head's results become one: e^(log-sum-exp - highest) weighs each; in order, an already attended part last.
void merge(const State* states, const float* values, const int64_t* places, int64_t num_places, int64_t group, int64_t dim,
           const float* log_weights, const float* part, float part_lse, float* out, float* lse) {
    const auto level_of = [&](int64_t i) { return states[places[i] * group].highest + log_weights[i]; };
    float highest = part_lse;
    for (int64_t i = 0; i < num_places; ++i) highest = level_of(i) > highest ? level_of(i) : highest;
    memset(out, 0, dim * sizeof(float));
    if (highest == -INFINITY) {
        *lse = -INFINITY;
        return;
    }
    float total = 0.0f;
    for (int64_t i = 0; i <= num_places; ++i) {
        const bool is_part = i == num_places;
        const float* from = is_part ? part : values + places[i] * group * dim;
        const float level = is_part ? part_lse : level_of(i);
        if (level == -INFINITY) continue;
        const float weight = std::exp(level - highest);
        total += weight * (is_part ? 1.0f : states[places[i] * group].total);
        for (int64_t j = 0; j < dim; j += W) store(out + j, load(out + j) + weight * load(from + j));
    }
    for (int64_t j = 0; j < dim; j += W) store(out + j, load(out + j) / total);
    *lse = highest + std::log(total);
}

// What one call plans and fills.
struct Work {
    std::vector<Chunk> chunks;
    std::vector<int64_t> firsts;     // [rows + 1] where a row's entries begin in the next two
    std::vector<int64_t> places;     // of its chunks' results, in order: pages, then tokens
    std::vector<float> log_weights;  // of each
    std::vector<State> states;       // [places, group]
    std::vector<float> values;       // [places, group, dim]

    void clear() {
        chunks.clear();
        firsts.clear();
        places.clear();
        log_weights.clear();
    }
};

template <class T>
void attend(Attend<T> own, const int32_t* num_pages, const int64_t* num_pages_strides, const int32_t* last_page_len,
            const int32_t* num_tokens, const int64_t* num_tokens_strides, const float* log_weight, const float* part,
            const float* part_lse, int64_t batch, float* out, float* lse, int threads) {
    // Kept from call to call: memory that is mapped anew costs a fault per page. Named here, as a worker's would be its own.
    static thread_local Work kept;
    Work& work = kept;
    work.clear();
    const int64_t rows = batch * own.heads, group = own.group, dim = own.dim;
    // One list for all heads is read for all of them at once, where that leaves enough chunks for every thread. No bit changes.
    int64_t num_places = 0, num_shared = 0;
    for (int64_t b = 0; b < batch; ++b)
        num_shared += (num_pages[b * num_pages_strides[0]] * own.page_size + CHUNK_TOKENS - 1) / CHUNK_TOKENS;
    const bool is_shared = !own.pages_strides[1] && !num_pages_strides[1] && num_shared >= 4 * threads;
    const auto cut = [&](int64_t row, int64_t length, bool of_pages, bool shared, float weight) {
        const int64_t b = row / own.heads, h = row % own.heads, num_heads = shared ? own.heads : 1;
        for (int64_t i = 0; i * CHUNK_TOKENS < length; ++i) {
            if (shared && h > 0) {  // the first head has cut for all
                work.places.push_back(work.places[work.firsts[row - h] + i] + h);
            } else {
                const int64_t left = length - i * CHUNK_TOKENS;
                const int32_t tokens = left < CHUNK_TOKENS ? left : CHUNK_TOKENS;
                work.chunks.push_back({b, h, num_heads, int32_t(i), tokens, of_pages, num_places});
                work.places.push_back(num_places);
                num_places += num_heads;
            }
            work.log_weights.push_back(weight);
        }
    };
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t b = row / own.heads, h = row % own.heads;
        work.firsts.push_back(work.places.size());
        const int64_t listed = num_pages[b * num_pages_strides[0] + h * num_pages_strides[1]];
        if (listed) cut(row, (listed - 1) * own.page_size + last_page_len[b], true, is_shared, 0.0f);
        if (num_tokens) {
            const int64_t length = num_tokens[b * num_tokens_strides[0] + h * num_tokens_strides[1]];
            cut(row, length, false, false, log_weight ? log_weight[row] : 0.0f);
        }
    }
    work.firsts.push_back(work.places.size());
    work.states.resize(num_places * group);
    work.values.resize(num_places * group * dim);

    const int64_t num_chunks = work.chunks.size();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < num_chunks; ++i) {
            const int64_t first = work.chunks[i].place * group;
            own.run(work.chunks[i], &work.states[first], &work.values[first * dim]);
        }
#pragma omp for schedule(static)
        for (int64_t head = 0; head < rows * group; ++head) {
            const int64_t first = work.firsts[head / group], g = head % group;
            merge(work.states.data() + g, work.values.data() + g * dim, work.places.data() + first,
                  work.firsts[head / group + 1] - first, group, dim, work.log_weights.data() + first,
                  part ? part + head * dim : nullptr, part ? part_lse[head] : -INFINITY, out + head * dim, lse + head);
        }
    }
}

// ---- page_scores

constexpr int PAGES_PER_TURN = 64;
constexpr int PAGES_AT_ONCE = 4;  // whose products with a query are summed at a time

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

// The scores of some pages for the query heads of one KV head, reduced over them.
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

// split [batch, heads, group, width]: width is 2 dim. The heads of a page lie side by side, and are read so.
template <class T>
void page_scores(const float* split, const T* metadata, int64_t page_stride, int64_t head_stride, const int32_t* table,
                 int64_t table_stride, const int32_t* num_pages, bool is_sum, int64_t batch, int64_t heads, int64_t group,
                 int64_t width, int64_t most_pages, float* out, int threads) {
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

// ---- linear

constexpr int WEIGHT_ROWS = 4;  // rows of weights, and of x, whose products are summed at a time
constexpr int64_t ROWS_PER_TURN = 32;

template <int ROWS>
void products(const float* x, const float* weight, int64_t inner, int64_t weight_rows, float* out, int64_t out_stride) {
    const float* from[WEIGHT_ROWS];
    for (int j = 0; j < WEIGHT_ROWS; ++j) from[j] = weight + (j < weight_rows ? j : 0) * inner;
    Vec sums[ROWS][WEIGHT_ROWS] = {};
    for (int64_t i = 0; i < inner; i += W) {
        Vec weights[WEIGHT_ROWS];
        for (int j = 0; j < WEIGHT_ROWS; ++j) {
            weights[j] = load(from[j] + i);
            __builtin_prefetch(from[j] + i + 16 * W, 0, 2);
        }
        for (int r = 0; r < ROWS; ++r) {
            const Vec values = load(x + r * inner + i);
            for (int j = 0; j < WEIGHT_ROWS; ++j) sums[r][j] += values * weights[j];
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < weight_rows; ++j) out[r * out_stride + j] = sum(sums[r][j]);
}

// ---- rotary embedding, append

#if defined(__clang__)
#define EACH_PRODUCT_ROUNDED
#define ROUND_EACH_PRODUCT _Pragma("clang fp contract(off)")
#else
#define EACH_PRODUCT_ROUNDED __attribute__((optimize("fp-contract=off")))
#define ROUND_EACH_PRODUCT
#endif

// x [dim] with each channel pair (i, i + dim / 2) turned by its token's angle; no angles: as it is. -0 becomes +0. With no fused
// multiply-add, so that keys have the bits that torch gives to them where a method keeps more than this file knows.
EACH_PRODUCT_ROUNDED void turn(const float* x, const float* cos, const float* sin, int64_t dim, float* out) {
    ROUND_EACH_PRODUCT
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float first = x[i], second = x[i + half];
        out[i] = (cos ? first * cos[i] - second * sin[i] : first) + 0.0f;
        out[i + half] = (cos ? second * cos[i] + first * sin[i] : second) + 0.0f;
    }
}

}  // namespace

// Rotates and appends, as append.py tells. Rows of q, k and v lie `stride` elements apart, their heads side by side.
// Null: q (nothing to rotate), cos and sin (keys are rotated already), page_min_max.
extern "C" void rotary_append_float32(const float* q, int64_t q_stride, const float* k, int64_t k_stride, const float* v,
                                      int64_t v_stride, const float* cos, const float* sin, const int32_t* pages,
                                      const int32_t* starts, const int32_t* offsets, const int32_t* counts, int64_t runs,
                                      int64_t num_tokens, int64_t q_heads, int64_t heads, int64_t dim, int64_t page_size,
                                      float* k_pages, float* v_pages, float* page_min_max, float* turned, int threads) {
    constexpr int64_t FEW = 64;  // tokens that are not worth waking threads up for
#pragma omp parallel num_threads(threads) if (threads > 1 && num_tokens > FEW)
    {
#pragma omp for nowait
        for (int64_t n = 0; n < (q ? num_tokens : 0); ++n)
            for (int64_t h = 0; h < q_heads; ++h)
                turn(q + n * q_stride + h * dim, cos + n * dim / 2, sin + n * dim / 2, dim, turned + (n * q_heads + h) * dim);
#pragma omp for
        for (int64_t r = 0; r < runs; ++r)
            for (int64_t h = 0; h < heads; ++h) {
                const int64_t row = pages[r] * heads + h;
                float* extrema[2] = {page_min_max + row * 2 * dim, page_min_max + row * 2 * dim + dim};
                for (int64_t j = 0; j < counts[r]; ++j) {
                    const int64_t n = starts[r] + j, slot = row * page_size + offsets[r] + j;
                    const float* angles[2] = {cos ? cos + n * dim / 2 : nullptr, cos ? sin + n * dim / 2 : nullptr};
                    float* key = k_pages + slot * dim;
                    turn(k + n * k_stride + h * dim, angles[0], angles[1], dim, key);
                    memcpy(v_pages + slot * dim, v + n * v_stride + h * dim, dim * sizeof(float));
                    if (!page_min_max) continue;
                    const bool anew = offsets[r] + j == 0;
                    for (int64_t i = 0; i < dim; ++i) {
                        extrema[0][i] = anew || key[i] < extrema[0][i] ? key[i] : extrema[0][i];
                        extrema[1][i] = anew || key[i] > extrema[1][i] ? key[i] : extrema[1][i];
                    }
                }
            }
    }
}

// ---- norm

// residual + x into `sum` (where there is a residual), and its norm times `weight` into `out`; all [rows, dim].
extern "C" void add_rms_norm_float32(const float* x, const float* residual, const float* weight, float eps, int64_t rows,
                                     int64_t dim, float* total, float* out) {
    for (int64_t r = 0; r < rows; ++r) {
        const float* from = x + r * dim;
        if (residual) {
            for (int64_t i = 0; i < dim; i += W) store(total + r * dim + i, load(residual + r * dim + i) + load(from + i));
            from = total + r * dim;
        }
        Vec squares[4] = {};
        for (int64_t i = 0; i < dim; i += W) squares[i / W % 4] += load(from + i) * load(from + i);
        const float scale = 1.0f / std::sqrt(sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / dim + eps);
        for (int64_t i = 0; i < dim; i += W) store(out + r * dim + i, load(from + i) * scale * load(weight + i));
    }
}

// ---- top_k_pages

// The logical pages of every row that top_k_pages.py chooses, as physical ids. T is float or int32_t.
namespace {

template <class T>
void top_k_pages(const T* scores, const int32_t* table, int64_t table_stride, const int32_t* num_pages, const int32_t* k,
                 int64_t sink_pages, int64_t recent_pages, int64_t batch, int64_t heads, int64_t most_pages, int64_t capacity,
                 int32_t* pages, int32_t* counts, int threads) {
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
                                       int threads) {                                                                          \
        top_k_pages<T>(scores, table, table_stride, num_pages, k, sink_pages, recent_pages, batch, heads, most_pages,          \
                       capacity, pages, counts, threads);                                                                      \
    }

TOP_K(float32, float)
TOP_K(int32, int32_t)

// out [rows, size] = x [rows, inner] . weight [size, inner]^T: the weights are read once.
extern "C" void linear_float32(const float* x, const float* weight, int64_t rows, int64_t size, int64_t inner, float* out,
                               int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t turn = 0; turn < (size + ROWS_PER_TURN - 1) / ROWS_PER_TURN; ++turn) {
        const int64_t end = (turn + 1) * ROWS_PER_TURN < size ? (turn + 1) * ROWS_PER_TURN : size;
        for (int64_t o = turn * ROWS_PER_TURN; o < end; o += WEIGHT_ROWS) {
            const int64_t some = end - o < WEIGHT_ROWS ? end - o : WEIGHT_ROWS;
            for (int64_t r = 0; r < rows; r += 4) {
                const float* values = x + r * inner;
                float* to = out + r * size + o;
                switch (rows - r) {
                    case 1: products<1>(values, weight + o * inner, inner, some, to, size); break;
                    case 2: products<2>(values, weight + o * inner, inner, some, to, size); break;
                    case 3: products<3>(values, weight + o * inner, inner, some, to, size); break;
                    default: products<4>(values, weight + o * inner, inner, some, to, size);
                }
            }
        }
    }
}

// ---- ranks that meet in shared memory

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

// One entry per dtype of the cache. Tensors as in attend.py and page_scores.py; strides in elements.
#define ENTRIES(NAME, T)                                                                                                       \
    extern "C" void attend_##NAME(const float* q, const T* k, const T* v, int64_t page_stride, int64_t head_stride,            \
                                  const int32_t* pages, int64_t pages_stride, int64_t pages_head_stride,                       \
                                  const int32_t* num_pages, int64_t num_pages_stride, int64_t num_pages_head_stride,           \
                                  const int32_t* last_page_len, const int32_t* tokens, int64_t tokens_stride,                  \
                                  int64_t tokens_head_stride, const int32_t* num_tokens, int64_t num_tokens_stride,            \
                                  int64_t num_tokens_head_stride, const float* log_weight, const float* part,                  \
                                  const float* part_lse, int64_t batch, int64_t heads, int64_t group, int64_t dim,             \
                                  int64_t page_size, float* out, float* lse, int threads) {                                    \
        const int64_t of_num_pages[2] = {num_pages_stride, num_pages_head_stride};                                             \
        const int64_t of_num_tokens[2] = {num_tokens_stride, num_tokens_head_stride};                                          \
        attend<T>({q, k, v, page_stride, head_stride, pages, {pages_stride, pages_head_stride}, tokens,                        \
                   {tokens_stride, tokens_head_stride}, heads, group, dim, page_size},                                         \
                  num_pages, of_num_pages, last_page_len, num_tokens, of_num_tokens, log_weight, part, part_lse, batch, out,   \
                  lse, threads);                                                                                               \
    }                                                                                                                          \
    extern "C" void page_scores_##NAME(const float* split, const T* metadata, int64_t page_stride, int64_t head_stride,        \
                                       const int32_t* table, int64_t table_stride, const int32_t* num_pages, int is_sum,       \
                                       int64_t batch, int64_t heads, int64_t group, int64_t width, int64_t most_pages,         \
                                       float* out, int threads) {                                                              \
        page_scores<T>(split, metadata, page_stride, head_stride, table, table_stride, num_pages, is_sum, batch, heads, group, \
                       width, most_pages, out, threads);                                                                       \
    }

ENTRIES(float32, float)
ENTRIES(bfloat16, Bfloat16)
ENTRIES(float16, Float16)
