// attend: decode attention (attend.py). Reads each listed page and token once, in place, at memory speed.

#include "vectors.h"

namespace {

constexpr int CHUNK_TOKENS = 512;  // as in attend.py
constexpr int AHEAD = 2;           // blocks of 16 tokens prefetched ahead of the one computed

// Partial result of one chunk for one query head: the highest logit and the sum of e^(logit - highest). (The weighted sum of
// values is stored apart.)
struct State {
    float highest, total;
};

struct Chunk {
    int64_t sequence, head, num_heads;  // KV heads that share one list of pages are read together: they are adjacent in memory
    int32_t index;                      // of the chunk in its list
    int32_t tokens;                     // 1..CHUNK_TOKENS
    bool of_pages;
    int64_t place;  // index of the first head's partial result
};

// Offsets in k and v of 16 tokens of a chunk, for one KV head. Only `count` are in the list; the others repeat the first.
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

    // Fills in the block that starts at token `start` of a chunk, for its first KV head.
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

    // Logits of 16 tokens for HEADS query heads. Prefetches the keys of a later block.
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

    // values += weights . v of 16 tokens, for HEADS query heads and VECTORS * 16 channels. Prefetches later values.
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

    // Attends a block for HEADS query heads of the chunk, from `head` on.
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

    // Attends a chunk into states [num_heads, group] and values [num_heads, group, dim]. Block order: 16 tokens of every
    // head, then the next 16 tokens.
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

// Merges a query head's partial results in order, weighted by e^(log-sum-exp - highest); the already attended part is last.
void merge(const State* states, const float* values, const int64_t* places, int64_t num_places, int64_t group, int64_t dim,
           const float* log_weights, const float* part, float part_lse, float* out, float* lse) {
    const auto level_of = [&](int64_t i) { return states[places[i] * group].highest + log_weights[i]; };
    float highest = part_lse;
    for (int64_t i = 0; i < num_places; ++i) highest = level_of(i) > highest ? level_of(i) : highest;
    memset(out, 0, dim * sizeof(float));
    if (num_places == 0 && part_lse == -INFINITY) {
        *lse = -INFINITY;
        return;
    }
    float total = 0.0f;
    for (int64_t i = 0; i <= num_places; ++i) {
        const bool is_part = i == num_places;
        const float* from = is_part ? part : values + places[i] * group * dim;
        const float level = is_part ? part_lse : level_of(i);
        if (is_part && level == -INFINITY) continue;  // empty part; a chunk at -INFINITY has only NaN logits
        const float weight = std::exp(level - highest);
        total += weight * (is_part ? 1.0f : states[places[i] * group].total);
        for (int64_t j = 0; j < dim; j += W) store(out + j, load(out + j) + weight * load(from + j));
    }
    for (int64_t j = 0; j < dim; j += W) store(out + j, load(out + j) / total);
    *lse = highest + std::log(total);
}

// Work list and intermediate results of one call.
struct Work {
    std::vector<Chunk> chunks;
    std::vector<int64_t> firsts;     // [rows + 1] start of a row's entries in the next two
    std::vector<int64_t> places;     // indices of its chunks' results, in order: pages, then tokens
    std::vector<float> log_weights;  // of each entry of places
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
            const float* part_lse, int64_t batch, float* out, float* lse, int64_t threads) {
    // Reused across calls: newly mapped memory costs a fault per page. `work` shares the caller's with all threads.
    static thread_local Work kept;
    Work& work = kept;
    work.clear();
    const int64_t rows = batch * own.heads, group = own.group, dim = own.dim;
    // A list shared by all KV heads is read for all of them at once if that leaves enough chunks for every thread. Same bits.
    int64_t num_places = 0, num_shared = 0;
    for (int64_t b = 0; b < batch; ++b)
        num_shared += (num_pages[b * num_pages_strides[0]] * own.page_size + CHUNK_TOKENS - 1) / CHUNK_TOKENS;
    const bool is_shared = !own.pages_strides[1] && !num_pages_strides[1] && num_shared >= 4 * threads;
    const auto cut = [&](int64_t row, int64_t length, bool of_pages, bool shared, float weight) {
        const int64_t b = row / own.heads, h = row % own.heads, num_heads = shared ? own.heads : 1;
        for (int64_t i = 0; i * CHUNK_TOKENS < length; ++i) {
            if (shared && h > 0) {  // the first head's chunks cover all heads
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

}  // namespace

// One function per dtype of the cache. Tensors as in attend.py; strides in elements.
#define ATTEND(NAME, T)                                                                                                        \
    extern "C" void attend_##NAME(const float* q, const T* k, const T* v, int64_t page_stride, int64_t head_stride,            \
                                  const int32_t* pages, int64_t pages_stride, int64_t pages_head_stride,                       \
                                  const int32_t* num_pages, int64_t num_pages_stride, int64_t num_pages_head_stride,           \
                                  const int32_t* last_page_len, const int32_t* tokens, int64_t tokens_stride,                  \
                                  int64_t tokens_head_stride, const int32_t* num_tokens, int64_t num_tokens_stride,            \
                                  int64_t num_tokens_head_stride, const float* log_weight, const float* part,                  \
                                  const float* part_lse, int64_t batch, int64_t heads, int64_t group, int64_t dim,             \
                                  int64_t page_size, float* out, float* lse, int64_t threads) {                                \
        const int64_t of_num_pages[2] = {num_pages_stride, num_pages_head_stride};                                             \
        const int64_t of_num_tokens[2] = {num_tokens_stride, num_tokens_head_stride};                                          \
        attend<T>({q, k, v, page_stride, head_stride, pages, {pages_stride, pages_head_stride}, tokens,                        \
                   {tokens_stride, tokens_head_stride}, heads, group, dim, page_size},                                         \
                  num_pages, of_num_pages, last_page_len, num_tokens, of_num_tokens, log_weight, part, part_lse, batch, out,   \
                  lse, threads);                                                                                               \
    }

ATTEND(float32, float)
ATTEND(bfloat16, Bfloat16)
ATTEND(float16, Float16)
