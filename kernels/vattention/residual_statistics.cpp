// residual_statistics: statistics of a row's residual from its pilot (residual_statistics.py). Reads K and V in their pages.
//
// With w_i = e^(s_i - highest), y = mean(w v), a_i = w_i - mean(w) and z = y - mean(w) c:
//     r_i - mean(r) = w_i v_i - a_i c - y = w_i (v_i - c) - z.
// "Mean" is over the whole pilot, for the Gram rows too. Exponentials are relative to the pilot's largest logit until the end:
// relative to M, fourth powers would underflow where the chosen part dominates.

#include "vectors.h"

namespace {

constexpr int CHUNK = 128;  // tokens of a pilot per chunk; the first chunk holds the rows of the Gram matrix (GRAM_ROWS)
constexpr int AHEAD = 32;   // tokens prefetched ahead
constexpr int ROWS = 8;     // of the Gram matrix computed at a time, with 16 columns
constexpr int MOMENTS = 4, FIELDS = 7;

// Logits of 4 tokens for HEADS query heads. Prefetches the tokens' values (v, or null) and the keys of later tokens (or null).
template <class T, int HEADS>
void logits_of(const float* queries, const T* k, const T* v, const int64_t at[4], const int64_t* later, int64_t dim,
               float* out) {
    Vec sums[HEADS][4] = {};
    for (int64_t i = 0; i < dim; i += W) {
        Vec keys[4];
        for (int j = 0; j < 4; ++j) keys[j] = load(k + at[j] + i);
        for (int g = 0; g < HEADS; ++g) {
            const Vec query = load(queries + g * dim + i);
            for (int j = 0; j < 4; ++j) sums[g][j] += query * keys[j];
        }
        if (v) prefetch(v, at, i);
        if (later) prefetch(k, later, i);
    }
    store_sums<HEADS, CHUNK>(sums, out);
}

// |w (v - c) - z|^2 of 4 tokens for HEADS query heads; two tokens at a time, which is what the registers hold.
template <int HEADS>
void norms_of(const float* weights, const float* c, const float* z, const float* values, int64_t dim, float* out) {
    Vec sums[HEADS][4];
    for (int t = 0; t < 4; t += 2) {
        Vec of_two[HEADS][2] = {};
        for (int64_t i = 0; i < dim; i += W) {
            const Vec two[2] = {load(values + t * dim + i), load(values + (t + 1) * dim + i)};
            for (int g = 0; g < HEADS; ++g) {
                const Vec centre = load(c + g * dim + i), mean = load(z + g * dim + i);
                for (int j = 0; j < 2; ++j) {
                    const Vec off = weights[g * CHUNK + t + j] * (two[j] - centre) - mean;
                    of_two[g][j] += off * off;
                }
            }
        }
        for (int g = 0; g < HEADS; ++g)
            for (int j = 0; j < 2; ++j) sums[g][t + j] = of_two[g][j];
    }
    store_sums<HEADS, CHUNK>(sums, out);
}

// sums += weights . v of up to 16 tokens, for HEADS query heads and VECTORS * 16 channels. Copies v to `copy` unless null.
template <class T, int HEADS, int VECTORS>
void add_values(const float* weights, const T* v, const int64_t* at, int count, int64_t dim, float* to, float* copy) {
    Vec sums[HEADS][VECTORS];
    for (int g = 0; g < HEADS; ++g)
        for (int j = 0; j < VECTORS; ++j) sums[g][j] = load(to + g * dim + j * W);
    for (int t = 0; t < count; ++t) {
        Vec value[VECTORS];
        for (int j = 0; j < VECTORS; ++j) value[j] = load(v + at[t] + j * W);
        if (copy)
            for (int j = 0; j < VECTORS; ++j) store(copy + t * dim + j * W, value[j]);
        for (int g = 0; g < HEADS; ++g)
            for (int j = 0; j < VECTORS; ++j) sums[g][j] += weights[g * CHUNK + t] * value[j];
    }
    for (int g = 0; g < HEADS; ++g)
        for (int j = 0; j < VECTORS; ++j) store(to + g * dim + j * W, sums[g][j]);
}

struct Chunk {
    int64_t row;
    int32_t first, count;  // range of the row's pilot tokens
};

// Work list and intermediate results of one call: per (chunk, query head), and per query head over all of its chunks.
struct Work {
    std::vector<Chunk> chunks;
    std::vector<int64_t> firsts;            // [rows + 1] where a row's chunks begin
    Floats logits;                          // [chunks, group, CHUNK]
    Floats values;                          // [chunks, CHUNK, dim]; unused when each row is computed by one thread
    Floats highest, totals, sums;           // [chunks, group], [.., dim]: with e^(s - highest), the sums of w and of w v
    Floats moments;                         // [chunks, group, MOMENTS] sums of a^2, a^4, |r - mean|^2, |r - mean|^4
    Floats row_highest, mean_weight, gram;  // [rows, group]
    Floats c, y, z;                         // [rows, group, dim]
};

template <class T>
struct Statistics {
    const float* q;  // [rows, group, dim], multiplied by the scale
    const T *k, *v;  // [num_pages_total, heads, page_size, dim] with these strides; a page of one head is contiguous
    int64_t page_stride, head_stride;
    const int32_t* tokens;  // [batch, heads, ...]
    int64_t tokens_strides[2];
    const int32_t *num_tokens, *num_residual;  // [rows]
    const float *out, *lse;                    // [rows, group, dim] and [rows, group]: attention over the chosen part
    int64_t heads, group, dim, page_size;
    bool is_centred;

    void plan(int64_t rows, Work& work) const {
        work.chunks.clear();
        work.firsts.clear();
        for (int64_t row = 0; row < rows; ++row) {
            work.firsts.push_back(work.chunks.size());
            for (int32_t first = 0; num_tokens[row] > 1 && first < num_tokens[row]; first += CHUNK)
                work.chunks.push_back({row, first, std::min(num_tokens[row] - first, CHUNK)});
        }
        const int64_t num_chunks = work.chunks.size();
        work.firsts.push_back(num_chunks);
        work.logits.resize(num_chunks * group * CHUNK);
        for (auto* each : {&work.highest, &work.totals}) each->resize(num_chunks * group);
        work.sums.resize(num_chunks * group * dim);
        work.moments.resize(num_chunks * group * MOMENTS);
        for (auto* each : {&work.row_highest, &work.mean_weight, &work.gram}) each->resize(rows * group);
        for (auto* each : {&work.c, &work.y, &work.z}) each->resize(rows * group * dim);
    }

    // Computes a chunk's logits, and the sums of w and of w v relative to the chunk's highest logit. Copies its values into
    // `values` [CHUNK, dim]: at their strides in the KV cache they map to few cache sets and evict each other.
    void attend(int64_t i, float* values, Work& work) const {
        const Chunk& chunk = work.chunks[i];
        const int64_t b = chunk.row / heads, h = chunk.row % heads;
        const int32_t* own = tokens + b * tokens_strides[0] + h * tokens_strides[1] + chunk.first;
        const int32_t size = int32_t(page_size);
        const int count = chunk.count, padded = (count + 3) / 4 * 4;
        int64_t at[CHUNK];
        for (int t = 0; t < count; ++t) at[t] = own[t] / size * page_stride + h * head_stride + own[t] % size * dim;
        std::fill(at + count, at + padded, at[0]);
        const float* queries = q + chunk.row * group * dim;
        float* logits = &work.logits[i * group * CHUNK];
        for (int t = 0; t < std::min(AHEAD, padded); t += 4)
            for (int64_t j = 0; j < dim; j += W) prefetch(k, at + t, j);
        for (int t = 0; t < padded; t += 4) {
            const int64_t* later = t + AHEAD < padded ? at + t + AHEAD : nullptr;
            for_heads(group, [&](auto number, int64_t g) {
                logits_of<T, decltype(number)::value>(queries + g * dim, k, g == 0 ? v : nullptr, at + t,
                                                      g == 0 ? later : nullptr, dim, logits + g * CHUNK + t);
            });
        }
        static thread_local Floats weights;
        weights.resize(group * CHUNK);
        for (int64_t g = 0; g < group; ++g) {
            const float* found = logits + g * CHUNK;
            const float highest = *std::max_element(found, found + count);
            work.highest[i * group + g] = highest;
            work.totals[i * group + g] = weights_of<CHUNK>(found, highest, count, &weights[g * CHUNK]);
        }
        float* sums = &work.sums[i * group * dim];
        std::fill(sums, sums + group * dim, 0.0f);
        for (int t = 0; t < count; t += W) {
            const int some = std::min(count - t, W);
            for_heads(group, [&](auto number, int64_t g) {
                constexpr int HEADS = decltype(number)::value;
                const float* from = &weights[g * CHUNK + t];
                float *to = sums + g * dim, *copy = g == 0 ? values + t * dim : nullptr;
                int64_t j = 0;
                for (; j + 2 * W <= dim; j += 2 * W)
                    add_values<T, HEADS, 2>(from, v + j, at + t, some, dim, to + j, copy ? copy + j : nullptr);
                if (j < dim) add_values<T, HEADS, 1>(from, v + j, at + t, some, dim, to + j, copy ? copy + j : nullptr);
            });
        }
    }

    // Merges a query head's chunks, in order, into c, y, z and the first two statistics.
    void gather(int64_t head, Work& work, float* denominator, float* numerator_norm_sq) const {
        const int64_t row = head / group, first = work.firsts[row], last = work.firsts[row + 1];
        if (first == last) return;
        const auto index = [&](int64_t i) { return i * group + head % group; };
        float highest = -INFINITY, total = 0.0f;
        for (int64_t i = first; i < last; ++i) highest = std::max(highest, work.highest[index(i)]);
        float *c = &work.c[head * dim], *y = &work.y[head * dim], *z = &work.z[head * dim];
        std::fill(y, y + dim, 0.0f);
        for (int64_t i = first; i < last; ++i) {
            const float kept = std::exp(work.highest[index(i)] - highest);
            const float* sums = &work.sums[index(i) * dim];
            total += kept * work.totals[index(i)];
            for (int64_t j = 0; j < dim; j += W) store(y + j, load(y + j) + kept * load(sums + j));
        }
        const float m = num_tokens[row], ratio = num_residual[row] / m, common = std::max(lse[head], highest);
        const float chosen = std::exp(lse[head] - common), factor = std::exp(highest - common);
        const float mean = total / m;
        *denominator = chosen + ratio * factor * total;
        Vec squares = {};
        for (int64_t j = 0; j < dim; j += W) {
            Vec numerator = ratio * factor * load(y + j);
            if (lse[head] > -INFINITY) numerator += chosen * load(out + head * dim + j);  // out of an empty part may be NaN
            squares += numerator * numerator;
            const Vec centre = is_centred ? numerator / *denominator : Vec{};
            store(c + j, centre);
            store(y + j, load(y + j) / m);
            store(z + j, load(y + j) - mean * centre);
        }
        *numerator_norm_sq = sum(squares);
        work.row_highest[head] = highest;
        work.mean_weight[head] = mean;
    }

    // Sums a^2, a^4, |r - mean(r)|^2 and |r - mean(r)|^4 over a chunk.
    void take_moments(int64_t i, const float* values, Work& work) const {
        const Chunk& chunk = work.chunks[i];
        const int count = chunk.count, padded = (count + 3) / 4 * 4;
        static thread_local Floats weights, norms;
        weights.resize(group * CHUNK);
        norms.resize(group * CHUNK);
        for (int64_t g = 0; g < group; ++g) {
            const float* logits = &work.logits[(i * group + g) * CHUNK];
            weights_of<CHUNK>(logits, work.row_highest[chunk.row * group + g], count, &weights[g * CHUNK]);
        }
        const float *c = &work.c[chunk.row * group * dim], *z = &work.z[chunk.row * group * dim];
        for (int t = 0; t < padded; t += 4)
            for_heads(group, [&](auto number, int64_t g) {
                norms_of<decltype(number)::value>(&weights[g * CHUNK + t], c + g * dim, z + g * dim, values + t * dim, dim,
                                                  &norms[g * CHUNK + t]);
            });
        for (int64_t g = 0; g < group; ++g) {
            const float mean = work.mean_weight[chunk.row * group + g];
            Vec sums[MOMENTS] = {};
            for (int t = 0; t < count; t += W) {
                Vec a = load(&weights[g * CHUNK + t]) - mean, norm = load(&norms[g * CHUNK + t]);
                for (int j = count - t; j < W; ++j) a[j] = norm[j] = 0.0f;
                sums[0] += a * a;
                sums[1] += a * a * a * a;
                sums[2] += norm;
                sums[3] += norm * norm;
            }
            for (int j = 0; j < MOMENTS; ++j) work.moments[(i * group + g) * MOMENTS + j] = sum(sums[j]);
        }
    }

    // The sum over i, j of ((r_i - mean) . (r_j - mean))^2 in a row's first chunk, for each query head.
    // Values, c and y are first shifted by the mean value, so that squares do not cancel.
    void square_gram(int64_t row, const float* values, Work& work) const {
        const int64_t i = work.firsts[row];
        if (i == work.firsts[row + 1]) return;
        const int count = work.chunks[i].count, columns = (count + W - 1) / W * W;
        static thread_local Floats origin, moved, vectors, own, totals;
        std::fill_n(origin.resize(dim), dim, 0.0f);
        for (int t = 0; t < count; ++t)
            for (int64_t j = 0; j < dim; j += W) store(&origin[j], load(&origin[j]) + load(values + t * dim + j));
        for (int64_t j = 0; j < dim; ++j) origin[j] /= count;

        moved.resize(columns * dim);  // in panels [dim, 16] of 16 tokens; 0 past the count
        for (int t = 0; t < columns; t += W)
            for (int64_t j = 0; j < dim; j += W) {
                Vec block[W] = {};
                for (int s = 0; s < std::min(count - t, W); ++s)
                    block[s] = load(values + (t + s) * dim + j) - load(&origin[j]);
                transpose(block);
                for (int s = 0; s < W; ++s) store(&moved[t * dim + (j + s) * W], block[s]);
            }

        // (r_i - mean) . (r_j - mean) = w_i w_j v_i . v_j + e_i + e_j + a_i h_j + h_i a_j
        enum { WEIGHT, A, E, H, FACTORS };
        own.resize(group * FACTORS * CHUNK);
        vectors.resize((2 * group + W - 1) / W * W * dim);  // c and y of each query head, in panels of 16
        for (int64_t g = 0; g < group; ++g) {
            const int64_t head = row * group + g;
            const float mean = work.mean_weight[head];
            float* to = &vectors[2 * g / W * W * dim + 2 * g % W];
            float c_c = 0.0f, c_y = 0.0f, y_y = 0.0f;
            for (int64_t j = 0; j < dim; ++j) {
                const float c = work.c[head * dim + j] - origin[j], y = work.y[head * dim + j] - mean * origin[j];
                c_c += c * c, c_y += c * y, y_y += y * y;
                to[j * W] = c, to[j * W + 1] = y;
            }
            float* factors = &own[g * FACTORS * CHUNK];
            weights_of<CHUNK>(&work.logits[(i * group + g) * CHUNK], work.row_highest[head], count, factors + WEIGHT * CHUNK);
            for (int t = 0; t < columns; t += W) {
                const Vec a = load(factors + WEIGHT * CHUNK + t) - mean;
                store(factors + A * CHUNK + t, a);
                store(factors + E * CHUNK + t, y_y / 2 + c_y * a);
                store(factors + H * CHUNK + t, c_c / 2 * a);
            }
        }
        for (int t = 0; t < columns; t += W)
            for (int64_t g = 0; g < group; g += ROWS / 2) {
                Vec products[ROWS];
                products_of<ROWS>(&vectors[2 * g / W * W * dim + 2 * g % W], &moved[t * dim], dim, products);
                for (int64_t k = g; k < std::min(group, g + ROWS / 2); ++k) {
                    float* factors = &own[k * FACTORS * CHUNK + t];
                    const Vec weight = load(factors + WEIGHT * CHUNK);
                    store(factors + E * CHUNK, load(factors + E * CHUNK) - weight * products[2 * (k - g) + 1]);
                    store(factors + H * CHUNK, load(factors + H * CHUNK) - weight * products[2 * (k - g)]);
                }
            }

        std::fill_n(totals.resize(group * W), group * W, 0.0f);
        for (int t = 0; t < columns; t += W) {
            Vec counted = {};  // 0 past the count; blocks below the diagonal count twice, for those above it
            for (int j = 0; j < std::min(count - t, W); ++j) counted[j] = 1.0f;
            for (int u = t; u < count; u += ROWS) {
                Vec products[ROWS];
                products_of<ROWS>(&moved[u / W * W * dim + u % W], &moved[t * dim], dim, products);
                const Vec times = u < t + W ? counted : 2 * counted;
                for (int64_t g = 0; g < group; ++g) {
                    const float *factors = &own[g * FACTORS * CHUNK], *of_row = factors + u;
                    const Vec weight = load(factors + WEIGHT * CHUNK + t), a = load(factors + A * CHUNK + t),
                              e = load(factors + E * CHUNK + t), h = load(factors + H * CHUNK + t);
                    Vec squares = {};
                    const auto add = [&](int r) {
                        const Vec entry = (of_row[WEIGHT * CHUNK + r] * weight * products[r] + (of_row[E * CHUNK + r] + e)) +
                                          (of_row[A * CHUNK + r] * h + of_row[H * CHUNK + r] * a);
                        squares += entry * entry;
                    };
                    if (u + ROWS <= count)
                        for (int r = 0; r < ROWS; ++r) add(r);
                    else
                        for (int r = 0; r < count - u; ++r) add(r);
                    store(&totals[g * W], load(&totals[g * W]) + times * squares);
                }
            }
        }
        for (int64_t g = 0; g < group; ++g) work.gram[row * group + g] = sum(load(&totals[g * W]));
    }

    // Writes a query head's statistics to `to`, `stride` apart.
    void conclude(int64_t head, const Work& work, float* to, int64_t stride) const {
        const int64_t row = head / group;
        if (num_tokens[row] < 2) {
            for (int j = 0; j < FIELDS; ++j) to[j * stride] = NAN;
            return;
        }
        float sums[MOMENTS] = {};
        for (int64_t i = work.firsts[row]; i < work.firsts[row + 1]; ++i)
            for (int j = 0; j < MOMENTS; ++j) sums[j] += work.moments[(i * group + head % group) * MOMENTS + j];
        const float m = num_tokens[row], n = std::min(num_tokens[row], CHUNK), trace = sums[2] / (m - 1);
        const float of_square = std::max(work.gram[head] / (n * n) - trace * trace / n, trace * trace / dim);
        const float highest = work.row_highest[head], factor = std::exp(highest - std::max(lse[head], highest));
        to[2 * stride] = factor * factor * (sums[0] / (m - 1));
        to[3 * stride] = sums[0] > 0 ? m * sums[1] / (sums[0] * sums[0]) : 1.0f;
        to[4 * stride] = factor * factor * trace;
        to[5 * stride] = factor * factor * factor * factor * of_square;
        to[6 * stride] = sums[2] > 0 ? m * sums[3] / (sums[2] * sums[2]) : 1.0f;
    }

    // result [7, rows, group], in the order of `ResidualStatistics`.
    void run(int64_t rows, float* result, int64_t threads) const {
        static thread_local Work kept;  // reused across calls; `work` shares the caller's with all threads
        Work& work = kept;
        plan(rows, work);
        const int64_t num_chunks = work.chunks.size(), num_heads = rows * group;
        const auto gather_head = [&](int64_t head) { gather(head, work, result + head, result + num_heads + head); };
        const auto conclude_head = [&](int64_t head) { conclude(head, work, result + head, num_heads); };
        // One row per thread keeps its values in the cache. If that leaves threads idle, split by chunks, to the same bits.
        const bool is_by_row = rows % threads == 0 || rows >= 4 * threads;
        if (!is_by_row) work.values.resize(num_chunks * CHUNK * dim);
#pragma omp parallel num_threads(threads) if (threads > 1)
        if (is_by_row) {
            static thread_local Floats values;
#pragma omp for schedule(dynamic)
            for (int64_t row = 0; row < rows; ++row) {
                const int64_t first = work.firsts[row], last = work.firsts[row + 1], head = row * group;
                float* own = values.resize((last - first) * CHUNK * dim);
                const auto of_chunk = [&](int64_t i) { return own + (i - first) * CHUNK * dim; };
                for (int64_t i = first; i < last; ++i) attend(i, of_chunk(i), work);
                for (int64_t g = 0; g < group; ++g) gather_head(head + g);
                square_gram(row, own, work);
                for (int64_t i = first; i < last; ++i) take_moments(i, of_chunk(i), work);
                for (int64_t g = 0; g < group; ++g) conclude_head(head + g);
            }
        } else {
            const auto of_chunk = [&](int64_t i) { return &work.values[i * CHUNK * dim]; };
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < num_chunks; ++i) attend(i, of_chunk(i), work);
#pragma omp for schedule(static)
            for (int64_t head = 0; head < num_heads; ++head) gather_head(head);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < rows + num_chunks; ++i)  // longest tasks first
                i < rows ? square_gram(i, of_chunk(work.firsts[i]), work) : take_moments(i - rows, of_chunk(i - rows), work);
#pragma omp for schedule(static)
            for (int64_t head = 0; head < num_heads; ++head) conclude_head(head);
        }
    }
};

}  // namespace

// One function per dtype of the cache. Tensors as in residual_statistics.py; strides in elements.
#define RESIDUAL_STATISTICS(NAME, T)                                                                                           \
    extern "C" void residual_statistics_##NAME(                                                                                \
        const float* q, const T* k, const T* v, int64_t page_stride, int64_t head_stride, const int32_t* tokens,               \
        int64_t tokens_stride, int64_t tokens_head_stride, const int32_t* num_tokens, const int32_t* num_residual,             \
        const float* out, const float* lse, int64_t is_centred, int64_t batch, int64_t heads, int64_t group, int64_t dim,      \
        int64_t page_size, float* result, int64_t threads) {                                                                   \
        const Statistics<T> statistics = {q, k, v, page_stride, head_stride, tokens, {tokens_stride, tokens_head_stride},      \
                                          num_tokens, num_residual, out, lse, heads, group, dim, page_size, is_centred != 0};  \
        statistics.run(batch * heads, result, threads);                                                                        \
    }

RESIDUAL_STATISTICS(float32, float)
RESIDUAL_STATISTICS(bfloat16, Bfloat16)
RESIDUAL_STATISTICS(float16, Float16)
