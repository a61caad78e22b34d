/* 16 x 16 words of 32 bits, turned over their diagonal. */
#ifndef BATON_TRANSPOSE_H
#define BATON_TRANSPOSE_H

#include "vector.h"

#define WORDS 16

#if LANES == 16

/* Lanes of 128 bits of four vectors that have the same four of each other's. */
INLINE void transpose_lanes(__m512i out[4], __m512i a, __m512i b, __m512i c, __m512i d) {
    __m512i ab_even = _mm512_shuffle_i32x4(a, b, 0x88), ab_odd = _mm512_shuffle_i32x4(a, b, 0xdd);
    __m512i cd_even = _mm512_shuffle_i32x4(c, d, 0x88), cd_odd = _mm512_shuffle_i32x4(c, d, 0xdd);
    out[0] = _mm512_shuffle_i32x4(ab_even, cd_even, 0x88);
    out[1] = _mm512_shuffle_i32x4(ab_odd, cd_odd, 0x88);
    out[2] = _mm512_shuffle_i32x4(ab_even, cd_even, 0xdd);
    out[3] = _mm512_shuffle_i32x4(ab_odd, cd_odd, 0xdd);
}

/* Row i of `to` is column i of `from`; strides in bytes, the memory is not the same. */
static inline void transpose_words(void *to, size_t to_stride, const void *from, size_t from_stride) {
    __m512i rows[WORDS], quads[WORDS];
    UNROLL for (size_t i = 0; i < WORDS; i++) rows[i] = _mm512_loadu_si512((const char *)from + i * from_stride);
    UNROLL for (int i = 0; i < WORDS; i += 4) { /* within each 128 bits, 4 x 4 words */
        __m512i a = _mm512_unpacklo_epi32(rows[i], rows[i + 1]), b = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        __m512i c = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]);
        __m512i d = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
        quads[i] = _mm512_unpacklo_epi64(a, c);
        quads[i + 1] = _mm512_unpackhi_epi64(a, c);
        quads[i + 2] = _mm512_unpacklo_epi64(b, d);
        quads[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        __m512i out[4];
        transpose_lanes(out, quads[i], quads[i + 4], quads[i + 8], quads[i + 12]);
        UNROLL for (int lane = 0; lane < 4; lane++) {
            _mm512_storeu_si512((char *)to + (size_t)(4 * lane + i) * to_stride, out[lane]);
        }
    }
}

#else

static inline void transpose_words(void *to, size_t to_stride, const void *from, size_t from_stride) {
    for (size_t i = 0; i < WORDS; i++) {
        for (size_t j = 0; j < WORDS; j++) {
            memcpy((char *)to + i * to_stride + 4 * j, (const char *)from + j * from_stride + 4 * i, 4);
        }
    }
}

#endif
#endif
