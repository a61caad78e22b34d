/* AMX: tiles of up to 16 rows of 64 bytes that the processor multiplies as a whole.
 *
 * A product is sums [rows][16] of float32 += left [rows][32] times right [16][16][2], both bfloat16: two neighbours of
 * `left` with two of `right`. Numbers of tiles are literals. EMULATE_AMX, for tests on CPUs without it and for
 * sanitizers, which don't see what tiles read: the same in C, but for the rounding of sums.
 */
#ifndef BATON_AMX_H
#define BATON_AMX_H

#include "vector.h"

#if defined(__AMX_BF16__) || defined(EMULATE_AMX)
#define AMX 1
#else
#define AMX 0
#endif

#define AMX_ROWS 16
#define AMX_DEPTH 32 /* bfloat16 numbers of a tile's row */
#define AMX_TILES 8

/* How many rows each tile has; all have 64 bytes in a row. */
struct amx_shape {
    uint8_t rows[AMX_TILES];
};

#if AMX && !defined(EMULATE_AMX)

INLINE void amx_begin(struct amx_shape shape) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int tile = 0; tile < AMX_TILES; tile++) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = shape.rows[tile];
    }
    __asm__ volatile("" : : "r"(&config) : "memory"); /* GCC takes it that only the first 8 bytes are read */
    _tile_loadconfig(&config);
}

/* Tiles that are in use make every switch of threads dearer. */
INLINE void amx_end(void) { _tile_release(); }

/* The compiler does not know that a load reads memory. */
#define AMX_LOAD(tile, from, stride) ({ __asm__ volatile("" ::: "memory"); _tile_loadd(tile, from, stride); })
#define AMX_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define AMX_ZERO(tile) _tile_zero(tile)
#define AMX_MULTIPLY(sums, left, right) _tile_dpbf16ps(sums, left, right)

#elif AMX

static __thread struct {
    struct amx_shape shape;
    uint32_t words[AMX_TILES][AMX_ROWS][16];
} emulated_amx;

INLINE void amx_begin(struct amx_shape shape) { emulated_amx.shape = shape; }

INLINE void amx_end(void) {}

INLINE void amx_copy(int tile, char *memory, const char *from, size_t stride) {
    for (int row = 0; row < emulated_amx.shape.rows[tile]; row++) {
        if (from) memcpy(emulated_amx.words[tile][row], from + (size_t)row * stride, 64);
        if (memory) memcpy(memory + (size_t)row * stride, emulated_amx.words[tile][row], 64);
    }
}

static inline void amx_multiply(int sums, int left, int right) {
    for (int row = 0; row < emulated_amx.shape.rows[sums]; row++) {
        for (int column = 0; column < 16; column++) {
            float sum = bits_to_float(emulated_amx.words[sums][row][column]);
            for (int k = 0; k < emulated_amx.shape.rows[right]; k++) {
                uint32_t x = emulated_amx.words[left][row][k], y = emulated_amx.words[right][k][column];
                sum += bits_to_float(x << 16) * bits_to_float(y << 16) +
                       bits_to_float(x & 0xffff0000u) * bits_to_float(y & 0xffff0000u);
            }
            emulated_amx.words[sums][row][column] = float_to_bits(sum);
        }
    }
}

#define AMX_LOAD(tile, from, stride) amx_copy(tile, NULL, (const char *)(from), stride)
#define AMX_STORE(tile, to, stride) amx_copy(tile, (char *)(to), NULL, stride)
#define AMX_ZERO(tile) memset(emulated_amx.words[tile], 0, sizeof emulated_amx.words[tile])
#define AMX_MULTIPLY(sums, left, right) amx_multiply(sums, left, right)

#endif
#endif
