// append: rotary embedding of a step's queries and keys, and where keys and values go in the cache (append.py).

#include "vectors.h"

namespace {

#if defined(__clang__)
#define EACH_PRODUCT_ROUNDED
#define ROUND_EACH_PRODUCT _Pragma("clang fp contract(off)")
#else
#define EACH_PRODUCT_ROUNDED __attribute__((optimize("fp-contract=off")))
#define ROUND_EACH_PRODUCT
#endif

// x [dim] with each channel pair (i, i + dim / 2) turned by its token's angle; no angles: as it is. -0 becomes +0. With no
// fused multiply-add, so that keys have the bits that torch gives to them where a method keeps more than this file knows.
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
                                      float* k_pages, float* v_pages, float* page_min_max, float* turned, int64_t threads) {
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
