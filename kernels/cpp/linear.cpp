// linear: products of few rows with a layer's weights (linear.py), which are read once.

#include "vectors.h"

namespace {

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

}  // namespace

// out [rows, size] = x [rows, inner] . weight [size, inner]^T: the weights are read once.
extern "C" void linear_float32(const float* x, const float* weight, int64_t rows, int64_t size, int64_t inner, float* out,
                               int64_t threads) {
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
