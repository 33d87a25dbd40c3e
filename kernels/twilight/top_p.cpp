// top_p: the smallest set of tokens that holds a share of the softmax mass (top_p.py). A histogram of the mass finds the bin of
// a head's threshold, a search in that bin the threshold. Sums are doubles, in an order that depends on the row alone.

#include "vectors.h"

namespace {

constexpr int D = 8;  // doubles in a vector
typedef double Doubles __attribute__((vector_size(D * 8)));
typedef uint64_t Longs __attribute__((vector_size(D * 8)));
typedef int32_t Ints __attribute__((vector_size(D * 4)));

constexpr int BINS = 1024;
// Bins cover this range below a row's maximum, or down to its minimum if that is nearer. Lower logits go to the last bin:
// their mass, n e^-64, is lost in the rounding of a sum of doubles over any n that fits into memory.
constexpr double RANGE = 64.0;
constexpr float LARGEST = std::numeric_limits<float>::max();

// e^x for x <= 0, and e^-700 below -700. Cody-Waite reduction, then the series to x^11: within 1e-14.
inline Doubles exp_of_negative(Doubles x) {
    x = x < -700.0 ? Doubles{} - 700.0 : x;
    const Doubles shifted = x * 1.4426950408889634 + 0x1.8p52;  // rounds to an integer, held in the lowest bits
    const Doubles whole = shifted - 0x1.8p52;
    const Doubles r = (x - whole * 0x1.62e42fefa3800p-1) - whole * 0x1.ef35793c76730p-45;
    Doubles y = Doubles{} + 1.0 / 39916800;
    y = y * r + 1.0 / 3628800;
    y = y * r + 1.0 / 362880;
    y = y * r + 1.0 / 40320;
    y = y * r + 1.0 / 5040;
    y = y * r + 1.0 / 720;
    y = y * r + 1.0 / 120;
    y = y * r + 1.0 / 24;
    y = y * r + 1.0 / 6;
    y = y * r + 0.5;
    y = (y * r + 1.0) * r + 1.0;
    return (Doubles)((Longs)y + ((Longs)shifted << 52));
}

// 16 logits from `i` on, of a row padded to whole vectors; logits past its end repeat the first. NaN becomes the lowest logit
// and affects only its own row; infinities become finite, so that differences are never NaN.
inline Vec load_finite(const float* logits, int64_t i, int64_t n) {
    Vec x = load(logits + i);
    for (int64_t t = n - i; t < W; ++t) x[t] = x[0];
    x = x > -LARGEST ? x : Vec{} - LARGEST;
    return x < LARGEST ? x : Vec{} + LARGEST;
}

// Whether any lane of a comparison is true; x is a vector of 32 or 64 bytes.
template <class Comparisons>
bool any(Comparisons x) {
    uint64_t parts[sizeof x / 8], found = 0;
    memcpy(parts, &x, sizeof x);
    for (uint64_t part : parts) found |= part;
    return found;
}

struct Candidate {
    float logit;
    double weight;
};

// The largest t with softmax mass of {logit >= t} at least p, of the first n > 0 logits.
float threshold_of(const float* logits, int64_t n, double p) {
    Vec highest = Vec{} - LARGEST, lowest = Vec{} + LARGEST;
    for (int64_t i = 0; i < n; i += W) {
        const Vec x = load_finite(logits, i, n);
        highest = x > highest ? x : highest;
        lowest = x < lowest ? x : lowest;
    }
    double top = -LARGEST, least = LARGEST;
    for (int j = 0; j < W; ++j) top = std::max<double>(top, highest[j]), least = std::min<double>(least, lowest[j]);

    static thread_local std::vector<uint16_t> kept_bins;
    static thread_local std::vector<Candidate> kept_candidates;
    kept_bins.resize((n + W - 1) / W * W);
    uint16_t* bins = kept_bins.data();  // looked up once: thread-local access is slow
    const double per_unit = BINS / std::max(std::min(top - least, RANGE), 1e-50);
    const auto weight_of = [top](Vec8 x) { return exp_of_negative(__builtin_convertvector(x, Doubles) - top); };
    double mass[BINS] = {};
    for (int64_t i = 0; i < n; i += W) {
        const Vec x = load_finite(logits, i, n);
        Vec8 eights[W / D];
        memcpy(eights, &x, sizeof x);
        for (int64_t e = 0; e < W / D; ++e) {
            const int64_t first = i + e * D, count = std::min<int64_t>(n - first, D);
            const Doubles weights = weight_of(eights[e]);
            // Monotonic: a lower logit never gets a lower bin, rounding included.
            Doubles places = (top - __builtin_convertvector(eights[e], Doubles)) * per_unit;
            places = places < BINS - 1.0 ? places : Doubles{} + (BINS - 1.0);
            const Ints own = __builtin_convertvector(places, Ints);
            for (int64_t j = 0; j < count; ++j) {
                mass[own[j]] += weights[j];
                bins[first + j] = own[j];
            }
        }
    }
    double total = 0.0;
    for (int i = 0; i < BINS; ++i) total += mass[i];
    const double target = total * p;
    int crossing = 0;  // the first bin at which the mass reaches p
    double above = 0.0;
    while (crossing < BINS - 1 && above + mass[crossing] < target) above += mass[crossing++];

    std::vector<Candidate>& candidates = kept_candidates;
    candidates.clear();
    for (int64_t i = 0; i < n; i += W) {
        ShortVec own;
        memcpy(&own, bins + i, sizeof own);
        if (!any(own == uint16_t(crossing))) continue;
        const Vec x = load_finite(logits, i, n);
        for (int64_t t = 0; t < std::min<int64_t>(n - i, W); ++t)
            if (own[t] == crossing) candidates.push_back({x[t], weight_of(Vec8{} + x[t])[0]});
    }
    auto first = candidates.begin(), last = candidates.end();
    while (last - first > 1) {  // down to one: summed in another order, the mass may miss the target by a rounding error
        const auto middle = first + (last - first) / 2;
        std::nth_element(first, middle, last, [](const Candidate& a, const Candidate& b) { return a.logit > b.logit; });
        double of_half = 0.0;
        for (auto i = first; i < middle; ++i) of_half += i->weight;
        if (above + of_half >= target) {
            last = middle;
        } else {
            above += of_half;
            first = middle;
        }
    }
    return first->logit;
}

// Lists, in order, the slots of tokens that any query head keeps, of the first `sinks` tokens and of those from `newest` on.
int32_t list_kept(const float* logits, int64_t width, const float* thresholds, int64_t group, const int32_t* pages,
                  int64_t page_size, int64_t n, int64_t sinks, int64_t newest, int32_t* tokens) {
    int32_t count = 0;
    for (int64_t i = 0; i < n; i += W) {  // a block never crosses a page
        IntVec kept = {};
        if (i < sinks || i >= newest) {
            kept = ~kept;
        } else {
            for (int64_t g = 0; g < group; ++g) kept |= load_finite(logits + g * width, i, n) >= thresholds[g];
        }
        if (!any(kept)) continue;
        const int32_t slot = pages[i / page_size] * page_size + i % page_size;
        for (int64_t t = 0; t < std::min<int64_t>(n - i, W); ++t) {
            tokens[count] = slot + t;
            count -= kept[t];
        }
    }
    return count;
}

}  // namespace

// Tensors as in top_p.py; p points to one double. Strides in elements.
extern "C" void top_p_float32(const float* logits, const int32_t* pages, int64_t pages_stride, int64_t pages_head_stride,
                              const int32_t* num_pages, int64_t num_pages_stride, int64_t num_pages_head_stride,
                              const int32_t* last_page_len, const double* p, int64_t sink_pages, int64_t recent_pages,
                              int64_t batch, int64_t heads, int64_t group, int64_t page_size, int64_t most_pages,
                              int32_t* tokens, int32_t* num_tokens, float* thresholds, int64_t threads) {
    const int64_t width = most_pages * page_size;
    const auto listed = [&](int64_t row) {
        return num_pages[row / heads * num_pages_stride + row % heads * num_pages_head_stride];
    };
    const auto length = [&](int64_t row) {
        return listed(row) ? (listed(row) - 1) * page_size + last_page_len[row / heads] : 0;
    };
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic)
        for (int64_t head = 0; head < batch * heads * group; ++head) {
            const int64_t n = length(head / group);
            if (n == 0)
                thresholds[head] = INFINITY;
            else
                thresholds[head] = *p >= 1.0 ? -INFINITY : threshold_of(logits + head * width, n, *p);
        }
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < batch * heads; ++row)
            num_tokens[row] = list_kept(logits + row * group * width, width, thresholds + row * group, group,
                                        pages + row / heads * pages_stride + row % heads * pages_head_stride, page_size,
                                        length(row), sink_pages * page_size, (listed(row) - recent_pages) * page_size,
                                        tokens + row * width);
    }
}
