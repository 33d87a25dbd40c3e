// rms_norm: RMS norm, with or without a preceding residual addition (rms_norm.py).

#include "vectors.h"

// Writes residual + x to `total` (unless residual is null) and its norm times `weight` to `out`; all [rows, dim].
extern "C" void add_rms_norm_float32(const float* x, const float* residual, const float* weight, float eps, int64_t rows,
                                     int64_t dim, float* total, float* out, int64_t) {
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
