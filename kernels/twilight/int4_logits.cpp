// int4_logits: logits estimated from the low-bit copy of the keys (int4_logits.py). Codes are read in place, once for all query
// heads of a group.

#include "vectors.h"

namespace {

constexpr int64_t TOKENS_PER_TURN = 512;
constexpr int TOKENS_AT_ONCE = 4;  // whose products with a query are summed together
constexpr int64_t AHEAD = 2;       // blocks of 16 tokens prefetched ahead of the one computed

// 16 words of a token's codes, 0 past its last byte (`left` bytes remain). Words of 4 bytes need no widening.
template <int WORD>
inline BitVec load_words(const uint8_t* from, int64_t left) {
    static_assert(WORD == 1 || WORD == 2 || WORD == 4);
    if constexpr (WORD == 4) {
        BitVec words;
        memcpy(&words, from, sizeof words);
        return words;
    } else if constexpr (WORD == 2) {
        return load_bits(from);
    } else {
        ByteVec bytes = {};
        if (left >= W)
            memcpy(&bytes, from, W);
        else
            memcpy(&bytes, from, left);
        return __builtin_convertvector(__builtin_convertvector(bytes, ShortVec), BitVec);  // by 2 twice: GCC 12
    }
}

struct Tensors {
    const uint8_t* codes;   // [num_pages_total, heads, page_size, width]
    const Float16* scales;  // [num_pages_total, heads, page_size, 2]: scale, minimum
    const int32_t* pages;   // [batch, heads, most_pages] with these strides
    int64_t pages_strides[2];
    int64_t heads, group, dim, page_size, most_pages;
};

// A token's codes are read as words of WORD = 1, 2 or 4 bytes: the largest that fills whole vectors, or 1.
template <int BITS, int WORD>
struct Estimate : Tensors {
    static constexpr int64_t BYTES = W * WORD;  // of codes in a vector
    const int64_t width = dim * BITS / 8;
    const int64_t padded = (width + BYTES - 1) / BYTES * BYTES * 8 / BITS;  // a query's channels in the order of the codes

    explicit Estimate(const Tensors& tensors) : Tensors(tensors) {}

    // Writes a row's scaled queries in the channel order of `estimate_block`: [vectors of codes, codes in a word, heads at
    // once, 16], 0 past a token's last byte; and the sum of each query.
    void order(const float* q, float scale, float* queries, float* sums) const {
        for (int64_t g = 0; g < group; ++g) {
            const int64_t first = g - g % HEADS_AT_ONCE, at_once = std::min<int64_t>(group - first, HEADS_AT_ONCE);
            float* to = queries + first * padded + (g - first) * W;
            const float* from = q + g * dim;
            for (int64_t i = 0; i < width; i += BYTES)
                for (int bit = 0; bit < 8 * WORD; bit += BITS, to += at_once * W)
                    for (int64_t j = 0; j < W; ++j) {
                        const int64_t byte = i + j * WORD + bit / 8, part = bit % 8 / BITS;
                        to[j] = byte < width ? from[part * width + byte] * scale : 0.0f;
                    }
            Vec total = {};
            for (int64_t i = 0; i < dim; i += W) total += load(from + i) * scale;
            sums[g] = sum(total);
        }
    }

    // Logits of the first `count` of 16 tokens from `slot` on, then -inf, for HEADS query heads. Prefetches the block at
    // `later` unless it is negative.
    template <int HEADS>
    void estimate_block(int64_t slot, int64_t count, const float* queries, const float* sums, int64_t later, float* out) const {
        const uint8_t* own = codes + slot * width;
        Vec by_tokens[W / TOKENS_AT_ONCE], products[HEADS_AT_ONCE];
        for (int t = 0; t < W; t += TOKENS_AT_ONCE) {
            Vec found[HEADS_AT_ONCE][TOKENS_AT_ONCE] = {};
            const float* query = queries;
            for (int64_t i = 0; i < width; i += BYTES) {
                BitVec words[TOKENS_AT_ONCE];
                for (int j = 0; j < TOKENS_AT_ONCE; ++j) words[j] = load_words<WORD>(own + (t + j) * width + i, width - i);
                for (int bit = 0; bit < 8 * WORD; bit += BITS) {
                    Vec values[TOKENS_AT_ONCE];
                    for (int j = 0; j < TOKENS_AT_ONCE; ++j) {
                        values[j] = __builtin_convertvector((IntVec)(words[j] & ((1 << BITS) - 1)), Vec);
                        words[j] >>= BITS;
                    }
                    for (int g = 0; g < HEADS; ++g, query += W)
                        for (int j = 0; j < TOKENS_AT_ONCE; ++j) found[g][j] += load(query) * values[j];
                }
            }
            if (later >= 0)
                for (int64_t i = t * width; i < (t + TOKENS_AT_ONCE) * width; i += 64)
                    __builtin_prefetch(codes + later * width + i, 0, 2);
            by_tokens[t / TOKENS_AT_ONCE] = sums_of(found[0]);
        }
        if (later >= 0) __builtin_prefetch(scales + later * 2, 0, 2);
        turn_fours(by_tokens, products);
        BitVec pairs;  // the scale in the lower half, the minimum in the upper
        memcpy(&pairs, scales + slot * 2, sizeof pairs);
        const Vec scale = float_of_half(pairs & 0xffff), minimum = float_of_half(pairs >> 16);
        for (int g = 0; g < HEADS; ++g) {
            Vec logit = scale * products[g] + minimum * sums[g];
            for (int64_t t = count; t < W; ++t) logit[t] = -INFINITY;
            store(out + g * most_pages * page_size, logit);
        }
    }

    // Logits of a row's tokens start..end - 1 for all query heads of the group.
    void run(int64_t b, int64_t h, int64_t start, int64_t end, const float* queries, const float* sums, float* out) const {
        const int32_t* own = pages + b * pages_strides[0] + h * pages_strides[1];
        const auto slot = [&](int64_t i) { return (own[i / page_size] * heads + h) * page_size + i % page_size; };
        for (int64_t i = start; i < end; i += W) {
            const int64_t at = slot(i), count = end - i, later = i + AHEAD * W < end ? slot(i + AHEAD * W) : -1;
            for (int64_t g = 0; g < group; g += HEADS_AT_ONCE) {
                const int64_t fetched = g == 0 ? later : -1;
                float* to = out + g * most_pages * page_size + i;
                switch (group - g) {
                    case 1: estimate_block<1>(at, count, queries + g * padded, sums + g, fetched, to); break;
                    case 2: estimate_block<2>(at, count, queries + g * padded, sums + g, fetched, to); break;
                    case 3: estimate_block<3>(at, count, queries + g * padded, sums + g, fetched, to); break;
                    default: estimate_block<4>(at, count, queries + g * padded, sums + g, fetched, to);
                }
            }
        }
    }
};

template <int BITS, int WORD>
void int4_logits(const Estimate<BITS, WORD>& own, const float* q, const int32_t* num_pages, const int64_t* num_pages_strides,
                 const int32_t* last_page_len, float scale, int64_t batch, float* out, int64_t threads) {
    static thread_local std::vector<float> kept[2];  // named outside the parallel region: all threads share the caller's
    std::vector<float>&queries = kept[0], &sums = kept[1];
    const int64_t heads = own.heads, group = own.group, tokens = own.most_pages * own.page_size;
    queries.resize(batch * heads * group * own.padded);
    sums.resize(batch * heads * group);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for
        for (int64_t row = 0; row < batch * heads; ++row)
            own.order(q + row * group * own.dim, scale, &queries[row * group * own.padded], &sums[row * group]);
#pragma omp for collapse(3) schedule(dynamic)
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t turn = 0; turn < (tokens + TOKENS_PER_TURN - 1) / TOKENS_PER_TURN; ++turn)
                for (int64_t h = 0; h < heads; ++h) {
                    const int64_t row = b * heads + h;
                    const int64_t listed = num_pages[b * num_pages_strides[0] + h * num_pages_strides[1]];
                    const int64_t length = listed ? (listed - 1) * own.page_size + last_page_len[b] : 0;
                    const int64_t start = turn * TOKENS_PER_TURN, end = std::min(start + TOKENS_PER_TURN, tokens);
                    float* to = out + row * group * tokens;
                    own.run(b, h, start, std::min(end, length), &queries[row * group * own.padded], &sums[row * group], to);
                    const int64_t past = std::max(start, (length + W - 1) / W * W);  // blocks are written whole
                    for (int64_t g = 0; past < end && g < group; ++g)
                        std::fill(to + g * tokens + past, to + g * tokens + end, -INFINITY);
                }
    }
}

template <int BITS, class... Arguments>
void int4_logits(const Tensors& tensors, Arguments... arguments) {
    const int64_t width = tensors.dim * BITS / 8;
    if (width % (4 * W) == 0)
        int4_logits(Estimate<BITS, 4>(tensors), arguments...);
    else if (width % (2 * W) == 0)
        int4_logits(Estimate<BITS, 2>(tensors), arguments...);
    else
        int4_logits(Estimate<BITS, 1>(tensors), arguments...);
}

}  // namespace

// Tensors as in int4_logits.py; bits of a code are 2, 4 or 8. Strides in elements.
extern "C" void int4_logits_float32(const float* q, const uint8_t* codes, const Float16* scales, int64_t bits,
                                    const int32_t* pages, int64_t pages_stride, int64_t pages_head_stride,
                                    const int32_t* num_pages, int64_t num_pages_stride, int64_t num_pages_head_stride,
                                    const int32_t* last_page_len, float scale, int64_t batch, int64_t heads, int64_t group,
                                    int64_t dim, int64_t page_size, int64_t most_pages, float* out, int64_t threads) {
    const Tensors tensors{codes, scales, pages, {pages_stride, pages_head_stride}, heads, group, dim, page_size, most_pages};
    const int64_t strides[2] = {num_pages_stride, num_pages_head_stride};
    switch (bits) {
        case 2: int4_logits<2>(tensors, q, num_pages, strides, last_page_len, scale, batch, out, threads); break;
        case 4: int4_logits<4>(tensors, q, num_pages, strides, last_page_len, scale, batch, out, threads); break;
        default: int4_logits<8>(tensors, q, num_pages, strides, last_page_len, scale, batch, out, threads);
    }
}
