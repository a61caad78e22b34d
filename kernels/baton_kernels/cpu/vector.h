/* Vectors of floats in GCC's and Clang's vector extensions: one source for every instruction set.
 *
 * A file that includes this is compiled for one level of CPU (see build.py), which sets the width.
 * Numbers in memory are float32, bfloat16, float16 or, in KV pages, float8 (e4m3); all arithmetic is in float32.
 */
#ifndef BATON_VECTOR_H
#define BATON_VECTOR_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

/* Before loops over vectors that are to stay in registers; their counts are constants. */
#define UNROLL _Pragma("GCC unroll 16")

typedef float vfloat __attribute__((vector_size(4 * LANES)));
typedef int32_t vint __attribute__((vector_size(4 * LANES)));
typedef uint32_t vuint __attribute__((vector_size(4 * LANES)));
typedef uint8_t vbyte __attribute__((vector_size(LANES)));
typedef uint16_t vhalf __attribute__((vector_size(2 * LANES)));

enum dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, FLOAT8 = 3 };

INLINE size_t bytes_of(enum dtype dtype) { return dtype == FLOAT32 ? 4 : dtype == FLOAT8 ? 1 : 2; }

INLINE vfloat splat(float value) { return value - (vfloat){0}; }

INLINE vfloat load(const float *from) {
    vfloat vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

INLINE void store(float *to, vfloat vector) { memcpy(to, &vector, sizeof vector); }

/* Elements of `yes` where `mask` is all ones, of `no` where it is zero. */
INLINE vfloat choose(vint mask, vfloat yes, vfloat no) {
    return (vfloat)((mask & (vint)yes) | (~mask & (vint)no));
}

/* The greater of each two; the right one where either is NaN. */
INLINE vfloat vmax(vfloat left, vfloat right) {
#if LANES == 16
    return (vfloat)_mm512_max_ps((__m512)left, (__m512)right);
#elif LANES == 8
    return (vfloat)_mm256_max_ps((__m256)left, (__m256)right);
#else
    return choose(left > right, left, right);
#endif
}

INLINE int any_lane(vint mask) {
#if LANES == 16
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
    int any = 0;
    for (int lane = 0; lane < LANES; lane++) any |= mask[lane];
    return any != 0;
#endif
}

INLINE float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = (uint32_t)(half & 0x7fff) << 13;
    if (rest >= 0x0f800000) return bits_to_float(sign | rest | 0x7f800000); /* infinity, NaN */
    return bits_to_float(sign | float_to_bits(bits_to_float(rest) * 0x1p112f));
}

/* To the nearest, ties to even. */
INLINE uint16_t float_to_half(float value) {
    uint32_t bits = float_to_bits(value), rest = bits & 0x7fffffff;
    uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
    if (rest > 0x7f800000) return sign | 0x7e00;
    if (rest >= 0x477ff000) return sign | 0x7c00;
    if (rest < 0x38800000) { /* subnormal: adding 0.5 leaves its bits at the bottom of the mantissa */
        return sign | (uint16_t)(float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000);
    }
    return sign | (uint16_t)((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13);
}

INLINE uint16_t float_to_bfloat(float value) {
    uint32_t bits = float_to_bits(value);
    if (value != value) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* As half precision with the exponent in the wrong place, which 2^8 puts right. */
INLINE float float8_to_float(uint8_t byte) {
    if ((byte & 0x7f) == 0x7f) return __builtin_nanf("");
    return half_to_float((uint16_t)((byte & 0x80) << 8 | (byte & 0x7f) << 7)) * 256.0f;
}

/* To the nearest, ties to even; what is too large becomes the greatest, 448. */
INLINE uint8_t float_to_float8(float value) {
    uint32_t bits = float_to_bits(value), rest = bits & 0x7fffffff;
    uint8_t sign = (uint8_t)((bits >> 24) & 0x80);
    if (rest > 0x7f800000) return sign | 0x7f;
    if (rest >= 0x43e00000) return sign | 0x7e;
    if (rest < 0x3c800000) { /* below 2^-6: adding 2^14 leaves multiples of 2^-9 at the bottom of the mantissa */
        return sign | (uint8_t)(float_to_bits(bits_to_float(rest) + 16384.0f) - 0x46800000);
    }
    return sign | (uint8_t)((rest - 0x3c000000 + 0x7ffff + ((rest >> 20) & 1)) >> 20);
}

INLINE float load_one(const void *from, size_t index, enum dtype dtype) {
    if (dtype == FLOAT32) return ((const float *)from)[index];
    if (dtype == FLOAT8) return float8_to_float(((const uint8_t *)from)[index]);
    uint16_t half = ((const uint16_t *)from)[index];
    return dtype == BFLOAT16 ? bits_to_float((uint32_t)half << 16) : half_to_float(half);
}

INLINE void store_one(void *to, size_t index, float value, enum dtype dtype) {
    if (dtype == FLOAT32) {
        ((float *)to)[index] = value;
    } else if (dtype == FLOAT8) {
        ((uint8_t *)to)[index] = float_to_float8(value);
    } else {
        ((uint16_t *)to)[index] = dtype == BFLOAT16 ? float_to_bfloat(value) : float_to_half(value);
    }
}

/* See float8_to_float; through halves because arithmetic on subnormal floats is slow. */
INLINE vfloat load_float8(const uint8_t *from) {
    vbyte bytes;
    memcpy(&bytes, from, sizeof bytes);
#if LANES >= 8
    vhalf wide = __builtin_convertvector(bytes, vhalf), rest = wide & 0x7f;
    vhalf halves = (wide & 0x80) << 8 | rest << 7 | ((vhalf)(rest == 0x7f) & 0x7c00); /* NaN stays NaN */
#if LANES == 16
    return (vfloat)_mm512_cvtph_ps((__m256i)halves) * 256.0f;
#else
    return (vfloat)_mm256_cvtph_ps((__m128i)halves) * 256.0f;
#endif
#else
    vfloat vector;
    for (int lane = 0; lane < LANES; lane++) vector[lane] = float8_to_float(bytes[lane]);
    return vector;
#endif
}

/* See float_to_float8. */
INLINE void store_float8(uint8_t *to, vfloat vector) {
    vuint bits = (vuint)vector, rest = bits & 0x7fffffff;
    vuint small = (vuint)((vfloat)rest + 16384.0f) - 0x46800000;
    vuint large = (rest - 0x3c000000 + 0x7ffff + ((rest >> 20) & 1)) >> 20;
    vuint is_small = (vuint)(rest < 0x3c800000), is_over = (vuint)(rest >= 0x43e00000);
    vuint is_nan = (vuint)(rest > 0x7f800000);
    vuint code = (is_small & small) | (~is_small & large);
    code = (is_over & 0x7e) | (~is_over & code) | (is_nan & 1);
    vbyte bytes = __builtin_convertvector(code | ((bits >> 24) & 0x80), vbyte);
    memcpy(to, &bytes, sizeof bytes);
}

/* LANES numbers from index on; `dtype` is a constant where this is inlined. */
INLINE vfloat load_as(const void *from, size_t index, enum dtype dtype) {
    if (dtype == FLOAT32) return load((const float *)from + index);
    if (dtype == FLOAT8) return load_float8((const uint8_t *)from + index);
    vhalf halves;
    memcpy(&halves, (const uint16_t *)from + index, sizeof halves);
#if LANES == 16
    if (dtype == BFLOAT16) return (vfloat)((vuint)_mm512_cvtepu16_epi32((__m256i)halves) << 16);
    return (vfloat)_mm512_cvtph_ps((__m256i)halves);
#elif LANES == 8
    if (dtype == BFLOAT16) return (vfloat)((vuint)_mm256_cvtepu16_epi32((__m128i)halves) << 16);
    return (vfloat)_mm256_cvtph_ps((__m128i)halves);
#else
    if (dtype == BFLOAT16) return (vfloat)(__builtin_convertvector(halves, vuint) << 16);
    vfloat vector;
    for (int lane = 0; lane < LANES; lane++) vector[lane] = half_to_float(halves[lane]);
    return vector;
#endif
}

INLINE void store_as(void *to, size_t index, vfloat vector, enum dtype dtype) {
    if (dtype == FLOAT32) {
        store((float *)to + index, vector);
        return;
    }
    if (dtype == FLOAT8) {
        store_float8((uint8_t *)to + index, vector);
        return;
    }
    vhalf halves;
    if (dtype == BFLOAT16) {
#if defined(__AVX512BF16__)
        __m256bh words = _mm512_cvtneps_pbh((__m512)vector); /* subnormal numbers become 0 */
        memcpy((uint16_t *)to + index, &words, sizeof words);
        return;
#endif
        vuint bits = (vuint)vector, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        vuint is_nan = (vuint)(vector != vector);
        halves = __builtin_convertvector((is_nan & ((bits >> 16) | 0x40)) | (~is_nan & rounded), vhalf);
    } else {
#if LANES == 16
        halves = (vhalf)_mm512_cvtps_ph((__m512)vector, _MM_FROUND_TO_NEAREST_INT);
#elif LANES == 8
        halves = (vhalf)_mm256_cvtps_ph((__m256)vector, _MM_FROUND_TO_NEAREST_INT);
#else
        for (int lane = 0; lane < LANES; lane++) halves[lane] = float_to_half(vector[lane]);
#endif
    }
    memcpy((uint16_t *)to + index, &halves, sizeof halves);
}

/* Level avx512-bf16 multiplies pairs of bfloat16. EMULATE_BFLOAT16_PRODUCTS, for tests on CPUs that don't: the same
 * layouts and rounding (but for subnormal numbers) in other instructions. */
#if defined(__AVX512BF16__) || defined(EMULATE_BFLOAT16_PRODUCTS)
#define BFLOAT16_PRODUCTS 1
#else
#define BFLOAT16_PRODUCTS 0
#endif

/* sum + left * right, of the odd and then the even bfloat16 of each 32-bit word. */
INLINE vfloat add_pair_products(vfloat sum, vuint left, vuint right) {
#if defined(__AVX512BF16__)
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
#else
    sum += (vfloat)(left & 0xffff0000u) * (vfloat)(right & 0xffff0000u);
    return sum + (vfloat)(left << 16) * (vfloat)(right << 16);
#endif
}

/* 2 * LANES numbers from index on, in two vectors: in order, but of bfloat16 those at even places come first, as
 * one instruction makes a vector of either. */
INLINE void load_pair(vfloat pair[2], const void *from, size_t index, enum dtype dtype) {
    if (dtype == BFLOAT16) {
        vuint words;
        memcpy(&words, (const uint16_t *)from + index, sizeof words);
        pair[0] = (vfloat)(words << 16);
        pair[1] = (vfloat)(words & 0xffff0000u);
    } else {
        pair[0] = load_as(from, index, dtype);
        pair[1] = load_as(from, index + LANES, dtype);
    }
}

/* Asks for the cache lines that load_pair will read. */
INLINE void prefetch_pair(const void *from, size_t index, enum dtype dtype) {
    const char *at = (const char *)from + index * bytes_of(dtype);
    UNROLL for (size_t byte = 0; byte < 2 * LANES * bytes_of(dtype); byte += 64) __builtin_prefetch(at + byte);
}

/* e to each element, none above 0, within 2 units in the last place; 0 below -87.7; NaN stays NaN.
 * Cephes' polynomial. */
INLINE vfloat vexp_negative(vfloat x) {
    x = vmax(splat(-88.0f), x);
    vfloat shifted = x * 1.44269504f + 12582912.0f; /* adding 1.5 * 2^23 rounds to a whole number */
    vfloat whole = shifted - 12582912.0f;
    vfloat rest = x - whole * 0.693359375f - whole * -2.12194440e-4f;
    vfloat power = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    power = power * rest + 8.3334519073e-3f;
    power = power * rest + 4.1665795894e-2f;
    power = power * rest + 1.6666665459e-1f;
    power = power * rest + 5.0000001201e-1f;
    power = power * rest * rest + rest + 1.0f;
    return power * (vfloat)(((vuint)shifted << 23) + 0x3f800000u);
}

/* The same for any elements; those above 88 count as 88. */
INLINE vfloat vexp(vfloat x) { return vexp_negative(choose(x > splat(88.0f), splat(88.0f), x)); }

#if defined(__clang__)
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (vint){__VA_ARGS__})
#endif
/* A vector with lanes i and i ^ distance changed for each other. */
#define SWAP4(d, o) (0 + (o)) ^ (d), (1 + (o)) ^ (d), (2 + (o)) ^ (d), (3 + (o)) ^ (d)
#if LANES == 16
#define SWAPPED(x, d) SHUFFLE(x, x, SWAP4(d, 0), SWAP4(d, 4), SWAP4(d, 8), SWAP4(d, 12))
#elif LANES == 8
#define SWAPPED(x, d) SHUFFLE(x, x, SWAP4(d, 0), SWAP4(d, 4))
#else
#define SWAPPED(x, d) SHUFFLE(x, x, SWAP4(d, 0))
#endif

/* In every lane, the sum of all lanes. */
INLINE vfloat sum_lanes(vfloat vector) {
#if LANES == 16
    vector += SWAPPED(vector, 8);
#endif
#if LANES >= 8
    vector += SWAPPED(vector, 4);
#endif
    vector += SWAPPED(vector, 2);
    return vector + SWAPPED(vector, 1);
}

/* In every lane, the greatest of all lanes. */
INLINE vfloat max_lanes(vfloat vector) {
#if LANES == 16
    vector = vmax(vector, SWAPPED(vector, 8));
#endif
#if LANES >= 8
    vector = vmax(vector, SWAPPED(vector, 4));
#endif
    vector = vmax(vector, SWAPPED(vector, 2));
    return vmax(vector, SWAPPED(vector, 1));
}

/* Lane j of the pick: source j / (LANES / 2), of its groups of 2 * width lanes the first or second `width`. */
#define LANE(j, width, second)                                                                                \
    (((j) / (LANES / 2)) * LANES + ((j) % (LANES / 2)) / (width) * 2 * (width) + (j) % (width) + (second) * (width))
#if LANES == 16
#define PICK(w, s)                                                                                            \
    LANE(0, w, s), LANE(1, w, s), LANE(2, w, s), LANE(3, w, s), LANE(4, w, s), LANE(5, w, s), LANE(6, w, s),   \
        LANE(7, w, s), LANE(8, w, s), LANE(9, w, s), LANE(10, w, s), LANE(11, w, s), LANE(12, w, s),           \
        LANE(13, w, s), LANE(14, w, s), LANE(15, w, s)
#elif LANES == 8
#define PICK(w, s)                                                                                            \
    LANE(0, w, s), LANE(1, w, s), LANE(2, w, s), LANE(3, w, s), LANE(4, w, s), LANE(5, w, s), LANE(6, w, s),   \
        LANE(7, w, s)
#else
#define PICK(w, s) LANE(0, w, s), LANE(1, w, s), LANE(2, w, s), LANE(3, w, s)
#endif
#define FOLD(w)                                                                                               \
    UNROLL for (int i = 0; i < (w); i++) {                                                                    \
        vfloat x = parts[2 * i], y = parts[2 * i + 1];                                                        \
        parts[i] = SHUFFLE(x, y, PICK(w, 0)) + SHUFFLE(x, y, PICK(w, 1));                                     \
    }

/* Lane j of the result is the sum of the lanes of parts[j]; parts is overwritten. */
INLINE vfloat sums_of(vfloat parts[LANES]) {
#if LANES == 16
    FOLD(8)
#endif
#if LANES >= 8
    FOLD(4)
#endif
    FOLD(2)
    FOLD(1)
    return parts[0];
}

#endif
