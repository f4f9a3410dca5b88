// What the kernels share: vectors of 8 numbers, e^x, and the tile of a product that stays in registers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
// Which instructions are written out. R1_PORTABLE: none, as for a processor that is not known here.
#if defined(R1_PORTABLE)
#elif defined(__AVX__)
#define R1_AVX
#include <immintrin.h>
#elif defined(__aarch64__)
#define R1_NEON
#include <arm_neon.h>
#endif

namespace {

typedef float Lanes __attribute__((vector_size(32), aligned(4)));
typedef std::int32_t Whole __attribute__((vector_size(32)));
constexpr int LANES = 8, BLOCK = 2 * LANES, PANEL = 6, DEPTH = 128, SPAN = 256;

inline Lanes load(const float *from) { return *reinterpret_cast<const Lanes *>(from); }
inline void store(float *to, Lanes what) { *reinterpret_cast<Lanes *>(to) = what; }
inline Lanes all(float value) { return Lanes{value, value, value, value, value, value, value, value}; }

#ifdef R1_NEON
inline float32x4_t half(const Lanes &v, int which) { return vld1q_f32(reinterpret_cast<const float *>(&v) + 4 * which); }
inline Lanes joined(float32x4_t low, float32x4_t high) {
    Lanes v;
    vst1q_f32(reinterpret_cast<float *>(&v), low);
    vst1q_f32(reinterpret_cast<float *>(&v) + 4, high);
    return v;
}
#endif

// a × b + c. Said by hand where it can be: left to the compiler, it fuses in one place and not in another, and a row's numbers
// would depend on its place.
inline Lanes fused(Lanes a, Lanes b, Lanes c) {
#if defined(R1_AVX) && defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(R1_NEON)
    float32x4_t low = vfmaq_f32(half(c, 0), half(a, 0), half(b, 0)), high = vfmaq_f32(half(c, 1), half(a, 1), half(b, 1));
    return joined(low, high);
#else
    return a * b + c;
#endif
}

inline float sum(Lanes v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// e^x within 2 units in the last place: 2^n times a polynomial of the rest, |rest| <= ln 2 / 2. Clamped where float32 ends.
inline Lanes exponential(Lanes x) {
    x = x < all(-87.0f) ? all(-87.0f) : x;
    x = x > all(88.0f) ? all(88.0f) : x;
    const Lanes magic = all(12582912.0f);  // 1.5 × 2^23: adding it rounds to a whole number
    const Lanes n = fused(x, all(1.44269504088896341f), magic) - magic;
    const Lanes r = fused(n, all(2.12194440e-4f), fused(n, all(-0.693359375f), x));  // less n ln 2, in two parts
    Lanes p = all(1.0f / 5040);
    for (const float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fused(p, r, all(factor));
    const Whole bits = (__builtin_convertvector(n, Whole) + 127) << 23;
    Lanes power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

// Sums of M rows of `width` weights, `stride` apart, against x[width][16], 8 × H of its columns; in parts of DEPTH, so that
// rounding does not grow with the width.
template <int M, int H>
inline void tile(const float *weight, std::int64_t stride, std::int64_t width, const float *x, Lanes (&sums)[PANEL][2]) {
    for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = Lanes{};
    for (std::int64_t start = 0; start < width; start += DEPTH) {
        const std::int64_t end = std::min<std::int64_t>(start + DEPTH, width);
        Lanes low[M] = {}, high[M] = {};
        for (std::int64_t i = start; i < end; i++) {
            const Lanes a = load(x + i * BLOCK), b = load(x + i * BLOCK + LANES);
            if (i % 16 == 0)  // the next panel lies right behind this one
                for (int m = 0; m < M; m++) __builtin_prefetch(weight + (m + PANEL) * stride + i, 0, 2);
            for (int m = 0; m < M; m++) {
                const Lanes w = all(weight[m * stride + i]);
                low[m] = fused(w, a, low[m]);
                if constexpr (H == 2) high[m] = fused(w, b, high[m]);
            }
        }
        for (int m = 0; m < M; m++) {
            sums[m][0] += low[m];
            sums[m][1] += high[m];
        }
    }
}

template <int H>
inline void tile(int rows, const float *weight, std::int64_t stride, std::int64_t width, const float *x, Lanes (&sums)[PANEL][2]) {
    switch (rows) {
    case 6: return tile<6, H>(weight, stride, width, x, sums);
    case 5: return tile<5, H>(weight, stride, width, x, sums);
    case 4: return tile<4, H>(weight, stride, width, x, sums);
    case 3: return tile<3, H>(weight, stride, width, x, sums);
    case 2: return tile<2, H>(weight, stride, width, x, sums);
    default: return tile<1, H>(weight, stride, width, x, sums);
    }
}

}  // namespace
