/* Products of a few rows with two vectors of columns, the sums kept in registers. */
#ifndef BATON_TILE_H
#define BATON_TILE_H

#include "vector.h"

/* The registers hold the sums, the two vectors of columns and one number of a row. */
#if LANES == 16
#define TILE_ROWS 12
#else
#define TILE_ROWS 6
#endif
#define TILE_COLUMNS (2 * LANES)

/* sums[r] += rows[r * row_stride + k * depth_stride] * columns[k * column_stride ..]; `num_rows` is a constant. */
INLINE void multiply_tile(const int num_rows, vfloat sums[][2], const float *rows, const size_t row_stride,
                          const size_t depth_stride, const float *columns, const size_t column_stride,
                          size_t depth) {
    for (size_t k = 0; k < depth; k++) {
        vfloat first = load(columns), second = load(columns + LANES);
        UNROLL for (int r = 0; r < num_rows; r++) {
            vfloat number = splat(rows[(size_t)r * row_stride]);
            sums[r][0] += number * first;
            sums[r][1] += number * second;
        }
        rows += depth_stride;
        columns += column_stride;
    }
}

/* Calls `macro(n)` with the constant n that `num_rows` is. */
#if TILE_ROWS == 12
#define FOR_TILE_ROWS(num_rows, macro)                                                                        \
    switch (num_rows) {                                                                                       \
        case 1: macro(1); break;                                                                              \
        case 2: macro(2); break;                                                                              \
        case 3: macro(3); break;                                                                              \
        case 4: macro(4); break;                                                                              \
        case 5: macro(5); break;                                                                              \
        case 6: macro(6); break;                                                                              \
        case 7: macro(7); break;                                                                              \
        case 8: macro(8); break;                                                                              \
        case 9: macro(9); break;                                                                              \
        case 10: macro(10); break;                                                                            \
        case 11: macro(11); break;                                                                            \
        default: macro(12); break;                                                                            \
    }
#else
#define FOR_TILE_ROWS(num_rows, macro)                                                                        \
    switch (num_rows) {                                                                                       \
        case 1: macro(1); break;                                                                              \
        case 2: macro(2); break;                                                                              \
        case 3: macro(3); break;                                                                              \
        case 4: macro(4); break;                                                                              \
        case 5: macro(5); break;                                                                              \
        default: macro(6); break;                                                                             \
    }
#endif

#endif
