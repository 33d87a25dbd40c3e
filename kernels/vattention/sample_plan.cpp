// sample_plan: sizes of vAttention's samples (sample_plan.py), one row after the other.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

enum Guarantee { OUTPUT, DENOMINATOR, NUMERATOR_DENOMINATOR };  // GUARANTEES

// max(x, low); NaN propagates, as in torch.
float at_least(float x, float low) { return x < low ? low : x; }

// About the 99% upper bound of a variance estimated from m draws.
float raised(float variance, float kurtosis, float m, float z99) {
    return variance * (1.0f + z99 * std::sqrt(at_least(kurtosis - 1.0f, 0.0f) / m));
}

struct Bound {
    Guarantee guarantee;
    float epsilon, z, z_out, z99;  // z: quantile for the denominator, z_out: for the output or the numerator
};

// One query head's sample size before rounding; infinite if no size suffices. `of`: the fields of ResidualStatistics in order.
float sample_size(const Bound& bound, const float of[7], float n, float m) {
    const float denominator = of[0], norm_sq = of[1], trace = of[4], trace_of_square = of[5];
    float size = 0.0f;
    if (bound.guarantee != OUTPUT) {
        const float epsilon = bound.guarantee == DENOMINATOR ? bound.epsilon : bound.epsilon / 4;
        const float root = bound.z * n / (epsilon * denominator);
        size = root * root * raised(of[2], of[3], m, bound.z99);
    }
    if (bound.guarantee != DENOMINATOR) {
        const float factor = bound.guarantee == OUTPUT ? 1.0f / denominator : 1.0f, scaled = (factor * n) * (factor * n);
        // ||factor N||^2 without the pilot's own noise, at about its 99% lower bound; not positive: treated as unknown
        const float noise = scaled / m * (1.0f - m / n);
        const float norm = factor * factor * norm_sq - noise * trace - bound.z99 * noise * std::sqrt(2.0f * trace_of_square);
        const float spread = raised(trace, of[6], m, bound.z99) * scaled;
        float needed;
        if (bound.guarantee == OUTPUT) {
            const float ratio = trace * trace / trace_of_square, nu = ratio == ratio ? std::max(ratio, 1.0f) : 1.0f;  // 0 / 0
            const float part = 2.0f / (9.0f * nu), root = at_least(1.0f - part + bound.z_out * std::sqrt(part), 0.0f);
            needed = root * root * root * spread / (bound.epsilon * bound.epsilon * norm);
        } else {
            needed = bound.z_out * bound.z_out * spread / ((bound.epsilon / 4) * (bound.epsilon / 4) * norm);
        }
        if (!(norm > 0)) needed = INFINITE;
        if (trace == 0) needed = 0.0f;  // all r are equal: any sample is exact
        size = needed == needed ? (size < needed ? needed : size) : needed;
    }
    return size < INFINITE ? size / (1.0f + size / n) : INFINITE;  // NaN gives infinity too
}

}  // namespace

// Tensors as in sample_plan.py; contiguous [batch, heads] and [batch, heads, group]. counts [5, batch, heads].
extern "C" void plan_samples_float32(const float* statistics, const float* lse, const int32_t* chosen, const int32_t* residual,
                                     const int32_t* pilot, const int32_t* num_pages, const int32_t* context, int64_t batch,
                                     int64_t heads, int64_t group, int64_t guarantee, float epsilon, float z, float z_out,
                                     float z99, int64_t round_to, int64_t min_context, int64_t max_sample, int32_t* counts,
                                     float* log_weight, float* out_lse, int64_t) {
    const Bound bound = {Guarantee(guarantee), epsilon, z, z_out, z99};
    const int64_t rows = batch * heads;
    for (int64_t row = 0; row < rows; ++row) {
        const int32_t n = context[row / heads], n_s = residual[row], m = pilot[row];
        float needed = 0.0f;
        for (int64_t i = row * group; i < (row + 1) * group; ++i) {
            float of[7];
            for (int64_t field = 0; field < 7; ++field) of[field] = statistics[field * rows * group + i];
            needed = std::max(needed, sample_size(bound, of, float(n_s), float(m)));
        }
        needed = std::min(std::max(needed, float(m)), float(n_s));
        const int32_t budget = std::min(int32_t(std::ceil(needed / round_to) * round_to), n_s);
        const bool fits = m > 0 && 2 * (int64_t(n - n_s) + budget) <= n && n >= min_context && budget <= max_sample;
        counts[row] = budget;
        counts[rows + row] = fits ? budget : 0;
        counts[2 * rows + row] = fits ? 0 : num_pages[row / heads];
        counts[3 * rows + row] = fits ? chosen[row] : 0;
        counts[4 * rows + row] = m + (fits ? 0 : n - n_s);
        log_weight[row] = std::log(float(n_s) / float(std::max(budget, 1)));
        for (int64_t i = row * group; i < (row + 1) * group; ++i) out_lse[i] = fits ? lse[i] : -INFINITE;
    }
}
