// sample_residual: a row's sample of the tokens that it has not chosen (sample_residual.py), 16 samples at a time.
//
// The same bijection as in `sample_residual_torch.py`, bit for bit.

#include "vectors.h"

namespace {

constexpr int ROUNDS = 8, MIN_WIDTH = 6;  // as in sample_residual.py
constexpr uint32_t USE = 1;               // SAMPLE_RESIDUAL in philox.py
constexpr int PIECE_SAMPLES = 1024;       // samples of a row drawn by one task
constexpr int PREFIX_ENTRIES = 1024;      // entries of the table of prefix counts

// Philox4x32-10 (Salmon et al., SC 2011).
void philox(uint32_t k0, uint32_t k1, const uint32_t counter[4], uint32_t out[4]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    for (int i = 0; i < 10; ++i) {
        const uint64_t first = uint64_t(c0) * 0xD2511F53, second = uint64_t(c2) * 0xCD9E8D57;
        c0 = uint32_t(second >> 32) ^ c1 ^ k0;
        c2 = uint32_t(first >> 32) ^ c3 ^ k1;
        c1 = uint32_t(second);
        c3 = uint32_t(first);
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    const uint32_t found[4] = {c0, c1, c2, c3};
    memcpy(out, found, sizeof found);
}

// The keyed bijection of [0, 2^width).
struct Bijection {
    uint32_t keys[ROUNDS];
    int low_bits;
    uint32_t high_mask, low_mask;

    Bijection(const uint32_t key[4], uint32_t use, uint32_t num_residual) {
        int width = MIN_WIDTH;
        while ((num_residual - 1) >> width) ++width;
        low_bits = width - width / 2;
        high_mask = (1u << width / 2) - 1;
        low_mask = (1u << low_bits) - 1;
        for (uint32_t i = 0; i < ROUNDS / 4; ++i) {
            const uint32_t counter[4] = {i, key[2], key[3], use};
            philox(key[0], key[1], counter, keys + 4 * i);
        }
    }

    // Feistel rounds: (L, R) -> (R, L ^ mix(R ^ key)), cut to the width of L. mix is lowbias32 (Chris Wellons).
    void permute(uint32_t x[W]) const {
        BitVec both;
        memcpy(&both, x, sizeof both);
        BitVec high = both >> low_bits, low = both & low_mask;
        for (int i = 0; i < ROUNDS; ++i) {
            BitVec mixed = low ^ keys[i];
            mixed ^= mixed >> 16;
            mixed *= 0x7FEB352D;
            mixed ^= mixed >> 15;
            mixed *= 0x846CA68B;
            mixed ^= mixed >> 16;
            const BitVec next = high ^ (mixed & (i % 2 ? low_mask : high_mask));
            high = low;
            low = next;
        }
        both = high << low_bits | low;
        memcpy(x, &both, sizeof both);
    }
};

// The bijection's values at first, first + 1, ...: one step for all, then more for those outside [0, num_residual).
void draw(const Bijection& bijection, uint32_t first, int count, uint32_t num_residual, uint32_t ranks[PIECE_SAMPLES]) {
    uint32_t walking[PIECE_SAMPLES];
    int16_t places[PIECE_SAMPLES];
    int num_walking = 0;
    for (int i = 0; i < count; i += W) {
        for (int j = 0; j < W; ++j) ranks[i + j] = first + i + j;
        bijection.permute(ranks + i);
        const int some = std::min(W, count - i);
        for (int j = 0; j < some; ++j) {  // a start at or past num_residual might never walk into range
            walking[num_walking] = ranks[i + j];
            places[num_walking] = int16_t(i + j);
            num_walking += ranks[i + j] >= num_residual;
        }
    }
    while (num_walking) {
        int still = 0;
        for (int i = 0; i < num_walking; i += W) {
            const int some = std::min(W, num_walking - i);
            std::fill(walking + i + some, walking + i + W, 0);
            bijection.permute(walking + i);
            for (int j = i; j < i + some; ++j) {
                const uint32_t value = walking[j];
                const int16_t place = places[j];
                ranks[place] = value;
                walking[still] = value;
                places[still] = place;
                still += value >= num_residual;
            }
        }
        num_walking = still;
    }
}

// Counts the chosen blocks before the rank-th block that is not chosen. chosen[j] - j unchosen blocks precede chosen block j,
// so the count is the number of j with chosen[j] - j <= rank. A table of counts at every 2^shift-th rank starts the search.
struct Prefix {
    const int32_t* chosen;
    int32_t num_chosen;
    int shift;
    int32_t counts[PREFIX_ENTRIES];

    Prefix(const int32_t* chosen, int32_t num_chosen, int32_t num_others) : chosen(chosen), num_chosen(num_chosen), shift(0) {
        while ((num_others - 1) >> shift >= PREFIX_ENTRIES) ++shift;
        const int32_t entries = ((num_others - 1) >> shift) + 1;
        int32_t filled = 0;
        for (int32_t j = 0; j < num_chosen && filled < entries; ++j) {
            const int64_t before = chosen[j] - j, end = std::min<int64_t>(((before - 1) >> shift) + 1, entries);
            while (filled < end) counts[filled++] = j;
        }
        while (filled < entries) counts[filled++] = num_chosen;
    }

    int32_t at(int32_t rank) const {
        int32_t j = counts[rank >> shift];
        while (j < num_chosen && chosen[j] - j <= rank) ++j;
        return j;
    }
};

}  // namespace

// Tensors as in sample_residual.py; strides in elements. A row's chosen blocks and page table have stride 1.
extern "C" void sample_residual(const int32_t* chosen, int64_t chosen_stride, int64_t chosen_head_stride,
                                const int32_t* num_chosen, const int32_t* table, int64_t table_stride,
                                const int32_t* context_lens, const int32_t* num_samples, const int64_t* random_key,
                                int64_t block_tokens, int64_t page_size, int64_t layer, int64_t first_kv_head, int64_t which,
                                int64_t batch, int64_t heads, int64_t capacity, int32_t* slots, int64_t threads) {
    const int block_bits = __builtin_ctzll(block_tokens), page_bits = __builtin_ctzll(page_size);
    const int64_t pieces = (capacity + PIECE_SAMPLES - 1) / PIECE_SAMPLES;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < batch * heads; ++row)
        for (int64_t piece = 0; piece < pieces; ++piece) {
            const int64_t b = row / heads, h = row % heads;
            const int32_t first = int32_t(piece * PIECE_SAMPLES), count = std::min(num_samples[row] - first, PIECE_SAMPLES);
            if (count <= 0) continue;
            const int32_t num_blocks = (context_lens[b] + int32_t(block_tokens) - 1) >> block_bits;
            const uint32_t num_residual = uint32_t(num_blocks - num_chosen[row]) << block_bits;
            const uint32_t use = USE | uint32_t(which) << 4 | uint32_t(layer) << 8 | uint32_t(first_kv_head + h) << 20;
            uint32_t key[4], ranks[PIECE_SAMPLES];
            for (int i = 0; i < 4; ++i) key[i] = uint32_t(random_key[i * batch + b]);
            draw(Bijection(key, use, num_residual), first, count, num_residual, ranks);

            const int32_t* own = chosen + b * chosen_stride + h * chosen_head_stride;
            const Prefix prefix(own, num_chosen[row], num_blocks - num_chosen[row]);
            const int32_t* pages = table + b * table_stride;
            int32_t* to = slots + row * capacity + first;
            for (int32_t i = 0; i < count; ++i) {
                const int32_t rank = int32_t(ranks[i]), block = rank >> block_bits;
                const int32_t within = rank & (int32_t(block_tokens) - 1);
                const int32_t position = (block + prefix.at(block)) << block_bits | within;
                to[i] = pages[position >> page_bits] << page_bits | (position & (int32_t(page_size) - 1));
            }
        }
}
