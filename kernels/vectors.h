// vectors: shared helpers of the C++ kernels, on vectors of 16 floats (GCC/Clang vector extensions, which the compiler maps
// to the machine's registers).
//
// No headers of torch or other libraries: `native.py` compiles these files on first use and calls them with plain pointers.
// Work is split by a row's own length only, and partial results are merged in order, so a row has the same bits at any number
// of threads and in any batch.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

constexpr int W = 16;  // floats in a vector, and tokens in a block (page_size is at least 16)
typedef float Vec __attribute__((vector_size(W * 4)));
typedef int32_t IntVec __attribute__((vector_size(W * 4)));
typedef uint32_t BitVec __attribute__((vector_size(W * 4)));
typedef uint16_t ShortVec __attribute__((vector_size(W * 2)));
typedef uint8_t ByteVec __attribute__((vector_size(W)));
typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec4 __attribute__((vector_size(16)));

constexpr int HEADS_AT_ONCE = 4;  // query heads computed together: their sums stay in registers

struct Bfloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

inline Vec load(const float* from) {
    Vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

inline BitVec load_bits(const void* from) {
    ShortVec bits;
    memcpy(&bits, from, sizeof bits);
    return __builtin_convertvector(bits, BitVec);
}

inline Vec load(const Bfloat16* from) { return (Vec)(load_bits(from) << 16); }

// 16 floats from fp16 numbers whose bits are in the lower halves of the lanes.
inline Vec float_of_half(BitVec half) {
    const BitVec rest = half & 0x7fff;
    const Vec scaled = (Vec)(rest << 13) * 0x1p112f;  // the exponent biases differ by 112; exact for subnormals too
    const BitVec infinite = (BitVec)(rest >= 0x7c00) & 0x7f800000;
    return (Vec)((BitVec)scaled | infinite | (half & 0x8000) << 16);
}

inline float float_of_half(Float16 half) { return float_of_half(BitVec{} + half.bits)[0]; }

inline Vec load(const Float16* from) { return float_of_half(load_bits(from)); }

// fp16 of x, rounded to nearest, ties to even.
inline Float16 half_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    uint32_t rest;
    if (bits >= 0x47800000) {  // 65536, infinity, NaN
        rest = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
    } else if (bits < 0x38800000) {  // subnormal: a float32 next to 1/2 has the same unit in its last place
        const float next = std::fabs(x) + 0.5f;
        memcpy(&rest, &next, sizeof rest);
        rest -= 0x3f000000;
    } else {  // the exponent biases differ by 112; rounding up may carry into the exponent
        rest = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
    }
    return {uint16_t(sign | rest)};
}

inline void store(float* to, Vec x) { memcpy(to, &x, sizeof x); }

inline float sum(Vec x) {
    Vec8 eights[2];
    memcpy(eights, &x, sizeof x);
    const Vec8 eight = eights[0] + eights[1];
    Vec4 fours[2];
    memcpy(fours, &eight, sizeof eight);
    const Vec4 four = fours[0] + fours[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (IntVec){__VA_ARGS__})
#endif

// The sums of 16 vectors, in order, by adding halves pairwise four times: a third of the work of 16 calls of `sum`.
inline Vec sums_of(const Vec x[W]) {
    Vec eights[8], fours[4], twos[2];
    for (int i = 0; i < 8; ++i)
        eights[i] = SHUFFLE(x[i], x[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                    SHUFFLE(x[i], x[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; ++i)
        fours[i] = SHUFFLE(eights[i], eights[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
                   SHUFFLE(eights[i], eights[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 2; ++i)
        twos[i] = SHUFFLE(fours[i], fours[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                  SHUFFLE(fours[i], fours[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return SHUFFLE(twos[0], twos[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           SHUFFLE(twos[0], twos[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

// Stores the sums of HEADS x 4 vectors into rows of `out`, STRIDE floats apart.
template <int HEADS, int STRIDE>
void store_sums(const Vec sums[HEADS][4], float* out) {
    if constexpr (HEADS * 4 == W) {
        const Vec found = sums_of(sums[0]);
        for (int g = 0; g < HEADS; ++g) memcpy(out + g * STRIDE, (const float*)&found + g * 4, 4 * sizeof(float));
    } else {
        for (int g = 0; g < HEADS; ++g)
            for (int j = 0; j < 4; ++j) out[g * STRIDE + j] = sum(sums[g][j]);
    }
}

// Transposes 16 x 16 floats in place, by exchanging halves, quarters, ... of two rows.
void transpose(Vec x[W]) {
#define EXCHANGE(DISTANCE, FIRST, SECOND)                                                                                      \
    for (int i = 0; i < W; ++i)                                                                                                \
        if (!(i & DISTANCE)) {                                                                                                 \
            const Vec a = x[i], b = x[i + DISTANCE];                                                                           \
            x[i] = SHUFFLE(a, b, FIRST);                                                                                       \
            x[i + DISTANCE] = SHUFFLE(a, b, SECOND);                                                                           \
        }
#define LIST(...) __VA_ARGS__
    EXCHANGE(8, LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
             LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
    EXCHANGE(4, LIST(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
             LIST(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
    EXCHANGE(2, LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
             LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
    EXCHANGE(1, LIST(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
             LIST(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
#undef LIST
#undef EXCHANGE
}

// Products of ROWS columns of one panel [dim, W] (from `rows` on) with all 16 columns of another.
template <int ROWS>
void products_of(const float* rows, const float* panel, int64_t dim, Vec out[ROWS]) {
    Vec sums[ROWS] = {};
    for (int64_t i = 0; i < dim; ++i)
        for (int r = 0; r < ROWS; ++r) sums[r] += rows[i * W + r] * load(panel + i * W);
    for (int r = 0; r < ROWS; ++r) out[r] = sums[r];
}

// out[g] holds the g-th group of four floats of each of the four vectors. In registers: through memory, 64-byte loads would
// stall on the 16-byte stores before them.
inline void turn_fours(const Vec x[4], Vec out[4]) {
    const Vec a = SHUFFLE(x[0], x[1], 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const Vec b = SHUFFLE(x[2], x[3], 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const Vec c = SHUFFLE(x[0], x[1], 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    const Vec d = SHUFFLE(x[2], x[3], 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    out[0] = SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    out[1] = SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    out[2] = SHUFFLE(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    out[3] = SHUFFLE(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

// e^x for x <= 0; 0 below -87. Cody-Waite reduction, then the series to x^7: within 2 ulp.
inline Vec exp_of_negative(Vec x) {
    const Vec kept = x < -87.0f ? Vec{} - 87.0f : x;
    const IntVec n = __builtin_convertvector(kept * 1.44269504f - 0.5f, IntVec);
    const Vec whole = __builtin_convertvector(n, Vec);
    const Vec r = (kept - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Vec y = Vec{} + 1.0f / 5040;
    y = y * r + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = (y * r + 1.0f) * r + 1.0f;
    const Vec power = (Vec)((n + 127) << 23);
    return x < -87.0f ? Vec{} : y * power;
}

// e^(logits - highest) of `count` tokens into SIZE weights; 0 past the count. Returns the sum.
template <int SIZE>
float weights_of(const float* logits, float highest, int count, float weights[SIZE]) {
    Vec total = {};
    for (int t = 0; t < SIZE; t += W) {
        Vec weight = t < count ? exp_of_negative(load(logits + t) - highest) : Vec{};
        for (int j = std::max(count - t, 0); j < W; ++j) weight[j] = 0.0f;
        store(weights + t, weight);
        total += weight;
    }
    return sum(total);
}

// A buffer of floats aligned to a cache line (a vector across two lines costs twice). It never shrinks.
class Floats {
    std::vector<float> room;
    float* first = nullptr;

public:
    float* resize(int64_t size) {
        if (int64_t(room.size()) < size + W) {
            room.resize(size + W);
            first = room.data() + (-reinterpret_cast<uintptr_t>(room.data()) / sizeof(float)) % W;
        }
        return first;
    }
    float& operator[](int64_t i) const { return first[i]; }
};

// Calls `work(number, first)` for up to HEADS_AT_ONCE query heads at a time; `number` is a compile-time constant.
template <class Work>
void for_heads(int64_t group, Work work) {
    for (int64_t g = 0; g < group; g += HEADS_AT_ONCE) switch (group - g) {
            case 1: work(std::integral_constant<int, 1>(), g); break;
            case 2: work(std::integral_constant<int, 2>(), g); break;
            case 3: work(std::integral_constant<int, 3>(), g); break;
            default: work(std::integral_constant<int, HEADS_AT_ONCE>(), g);
        }
}

// Prefetches the cache line at channel i of 4 tokens.
template <class T>
void prefetch(const T* from, const int64_t at[4], int64_t i) {
    if (i * sizeof(T) % 64 == 0)
        for (int j = 0; j < 4; ++j) __builtin_prefetch(from + at[j] + i, 0, 2);
}

}  // namespace
