// linear: products of few rows with a layer's weights (linear.py). Reads the weights once.

#include "vectors.h"

namespace {

constexpr int64_t ROWS_PER_TURN = 32;
constexpr int64_t FETCHED = 32 * W;  // floats of a weight row prefetched ahead

// Products of ROWS rows of x with WEIGHT_ROWS rows of weights, of which `weight_rows` are stored.
template <int ROWS, int WEIGHT_ROWS>
void products(const float* x, const float* weight, int64_t inner, int64_t weight_rows, float* out, int64_t out_stride) {
    const float* from[WEIGHT_ROWS];
    for (int j = 0; j < WEIGHT_ROWS; ++j) from[j] = weight + (j < weight_rows ? j : 0) * inner;
    Vec sums[ROWS][WEIGHT_ROWS] = {};
    for (int64_t i = 0; i < inner; i += W) {
        const int64_t later = i + FETCHED + (i + FETCHED < inner ? 0 : (WEIGHT_ROWS - 1) * inner);  // then the next rows
        Vec weights[WEIGHT_ROWS];
        for (int j = 0; j < WEIGHT_ROWS; ++j) {
            weights[j] = load(from[j] + i);
            __builtin_prefetch(from[j] + later, 0, 2);
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
        for (int64_t o = turn * ROWS_PER_TURN; rows == 1 && o < end; ++o)  // in memory order
            products<1, 1>(x, weight + o * inner, inner, 1, out + o, size);
        for (int64_t o = turn * ROWS_PER_TURN; rows > 1 && o < end; o += 4) {
            const int64_t some = std::min<int64_t>(end - o, 4);
            for (int64_t r = 0; r < rows; r += 4) {
                const float* values = x + r * inner;
                float* to = out + r * size + o;
                switch (rows - r) {
                    case 1: products<1, 4>(values, weight + o * inner, inner, some, to, size); break;
                    case 2: products<2, 4>(values, weight + o * inner, inner, some, to, size); break;
                    case 3: products<3, 4>(values, weight + o * inner, inner, some, to, size); break;
                    default: products<4, 4>(values, weight + o * inner, inner, some, to, size);
                }
            }
        }
    }
}
