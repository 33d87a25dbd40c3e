// append: rotary embedding of a step's queries and keys, writes of K and V into their pages, min and max per page, and the
// keys' low-bit copy (append.py).

#include "vectors.h"

namespace {

#if defined(__clang__)
#define EACH_PRODUCT_ROUNDED
#define ROUND_EACH_PRODUCT _Pragma("clang fp contract(off)")
#else
#define EACH_PRODUCT_ROUNDED __attribute__((optimize("fp-contract=off")))
#define ROUND_EACH_PRODUCT
#endif

// Rotates each channel pair (i, i + dim / 2) of x [dim] by its token's angle; copies if cos is null. -0 becomes +0. Without
// fused multiply-add, for the same bits as torch.
EACH_PRODUCT_ROUNDED void turn(const float* x, const float* cos, const float* sin, int64_t dim, float* out) {
    ROUND_EACH_PRODUCT
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float first = x[i], second = x[i + half];
        out[i] = (cos ? first * cos[i] - second * sin[i] : first) + 0.0f;
        out[i + half] = (cos ? second * cos[i] + first * sin[i] : second) + 0.0f;
    }
}

// The low-bit copy of a key [dim] minus `offset` (or null): codes [dim * bits / 8], scales [2]. Uses only differences and
// quotients, which are never fused, for the same bits as torch.
void quantise(const float* key, const float* offset, int64_t dim, int64_t bits, uint8_t* codes, Float16* scales) {
    static thread_local std::vector<uint8_t> parts;
    parts.resize(dim);
    const auto shifted = [&](int64_t i) { return offset ? load(key + i) - load(offset + i) : load(key + i); };
    Vec lowest = shifted(0), highest = lowest;
    for (int64_t i = W; i < dim; i += W) {
        const Vec x = shifted(i);
        lowest = x < lowest ? x : lowest;
        highest = x > highest ? x : highest;
    }
    float low = lowest[0], high = highest[0];
    for (int j = 1; j < W; ++j) low = std::min(low, lowest[j]), high = std::max(high, highest[j]);
    const float levels = (1 << bits) - 1;
    scales[0] = half_of_float((high - low) / levels);
    scales[1] = half_of_float(low);
    const float scale = float_of_half(scales[0]), minimum = float_of_half(scales[1]);  // readers decode with the rounded values
    for (int64_t i = 0; i < dim; i += W) {
        Vec code = (shifted(i) - minimum) / scale + 0.5f;
        code = code > 0.0f ? code : Vec{};  // NaN becomes 0 too
        code = code < levels ? code : Vec{} + levels;
        const IntVec whole = __builtin_convertvector(scale == 0.0f ? Vec{} : code, IntVec);
        const ShortVec shorts = __builtin_convertvector(whole, ShortVec);  // in two steps: GCC 12 narrows well by 2, not by 4
        const ByteVec bytes = __builtin_convertvector(shorts, ByteVec);
        memcpy(&parts[i], &bytes, sizeof bytes);
    }
    const int64_t width = dim * bits / 8;
    memcpy(codes, parts.data(), width);
    for (int64_t part = 1; part < 8 / bits; ++part)
        for (int64_t i = 0; i < width; ++i) codes[i] |= parts[part * width + i] << (part * bits);
}

}  // namespace

// See append.py. Tokens of q, k and v are `stride` elements apart, a token's heads contiguous. May be null: q (no queries), cos
// and sin (keys are already rotated), page_min_max, key_codes and key_scales, key_offset, turned_keys (not requested).
extern "C" void rotary_append_float32(const float* q, int64_t q_stride, const float* k, int64_t k_stride, const float* v,
                                      int64_t v_stride, const float* cos, const float* sin, const int32_t* pages,
                                      const int32_t* starts, const int32_t* offsets, const int32_t* counts, int64_t runs,
                                      int64_t num_tokens, int64_t q_heads, int64_t heads, int64_t dim, int64_t page_size,
                                      float* k_pages, float* v_pages, float* page_min_max, int64_t bits, uint8_t* key_codes,
                                      Float16* key_scales, const float* key_offset, float* turned, float* turned_keys,
                                      int64_t threads) {
    constexpr int64_t FEW = 64;  // up to this many tokens, waking threads costs more than it saves
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
                    if (turned_keys) memcpy(turned_keys + (n * heads + h) * dim, key, dim * sizeof(float));
                    if (key_codes)
                        quantise(key, key_offset ? key_offset + h * dim : nullptr, dim, bits, key_codes + slot * dim * bits / 8,
                                 key_scales + slot * 2);
                    if (!page_min_max) continue;
                    const bool is_first = offsets[r] + j == 0;
                    for (int64_t i = 0; i < dim; ++i) {
                        extrema[0][i] = is_first || key[i] < extrema[0][i] ? key[i] : extrema[0][i];
                        extrema[1][i] = is_first || key[i] > extrema[1][i] ? key[i] : extrema[1][i];
                    }
                }
            }
    }
}
