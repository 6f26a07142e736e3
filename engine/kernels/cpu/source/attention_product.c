/* Register-blocked kernels for any number of rows and columns. */
#include "attention_product.h"

/* Accumulators of a kernel: as many as the registers hold beside a line of b and an element of a. */
#if defined(VECTOR_AVX512)
enum { MOST_ROWS = 6, MOST_VECTORS = 4 };
#elif defined(VECTOR_AVX2)
enum { MOST_ROWS = 6, MOST_VECTORS = 2 };
#else
enum { MOST_ROWS = 6, MOST_VECTORS = 1 };       /* a vector is two registers */
#endif

INLINE vf multiply_add(enum factors factors, uint32_t a, vu b, vf c) {
    const vu all = a - (vu){0};
    switch (factors) {
#if HAS_PAIRS
    case PAIR_PAIR:
        return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)all, (__m512bh)b);
#endif
#if HAS_QUADS
    case SIGNED_UNSIGNED:
        return (vf)_mm512_dpbusd_epi32((__m512i)c, (__m512i)b, (__m512i)all);
    case UNSIGNED_SIGNED:
        return (vf)_mm512_dpbusd_epi32((__m512i)c, (__m512i)all, (__m512i)b);
#endif
    default:
        return vf_fma((vf)all, (vf)b, c);
    }
}

/* `rows` rows from `row` on, and `vectors` vectors of columns from `column` on; both constant. */
INLINE void kernel(
    enum factors factors, int rows, int vectors, const struct product *product, int64_t row, int64_t column) {
    const uint32_t *a = product->a + row * product->a_stride, *b = product->b + column;
    float *c = product->c + row * product->c_stride + column;
    vf sums[MOST_ROWS][MOST_VECTORS];
    for (int r = 0; r < rows; r++) {
        for (int v = 0; v < vectors; v++) {
            sums[r][v] = product->add ? vf_load(c + r * product->c_stride + v * VF) : (vf){0};
        }
    }
    for (int64_t k = 0; k < product->depth; k++) {
        vu line[MOST_VECTORS];
        for (int v = 0; v < vectors; v++) {
            memcpy(&line[v], b + k * product->b_stride + v * VF, sizeof line[v]);
        }
        for (int r = 0; r < rows; r++) {
            const uint32_t element = a[r * product->a_stride + k];
            for (int v = 0; v < vectors; v++) {
                sums[r][v] = multiply_add(factors, element, line[v], sums[r][v]);
            }
        }
    }
    for (int r = 0; r < rows; r++) {
        for (int v = 0; v < vectors; v++) {
            vf_store(c + r * product->c_stride + v * VF, sums[r][v]);
        }
    }
}

/* All rows of `vectors` vectors of columns. */
INLINE void all_rows(enum factors factors, int vectors, const struct product *product, int64_t column) {
    int64_t row = 0;
    for (; row + MOST_ROWS <= product->rows; row += MOST_ROWS) {
        kernel(factors, MOST_ROWS, vectors, product, row, column);
    }
    switch (product->rows - row) {
    case 5:
        kernel(factors, 5, vectors, product, row, column);
        break;
    case 4:
        kernel(factors, 4, vectors, product, row, column);
        break;
    case 3:
        kernel(factors, 3, vectors, product, row, column);
        break;
    case 2:
        kernel(factors, 2, vectors, product, row, column);
        break;
    case 1:
        kernel(factors, 1, vectors, product, row, column);
        break;
    default:
        break;
    }
}

INLINE void all_columns(enum factors factors, const struct product *product) {
    int64_t column = 0;
    for (; column + MOST_VECTORS * VF <= product->columns; column += MOST_VECTORS * VF) {
        all_rows(factors, MOST_VECTORS, product, column);
    }
    for (; MOST_VECTORS > 2 && column + 2 * VF <= product->columns; column += 2 * VF) {
        all_rows(factors, 2, product, column);
    }
    for (; MOST_VECTORS > 1 && column < product->columns; column += VF) {
        all_rows(factors, 1, product, column);
    }
}

void multiply(enum factors factors, const struct product *product) {
    switch (factors) {
#if HAS_PAIRS
    case PAIR_PAIR:
        all_columns(PAIR_PAIR, product);
        break;
#endif
#if HAS_QUADS
    case SIGNED_UNSIGNED:
        all_columns(SIGNED_UNSIGNED, product);
        break;
    case UNSIGNED_SIGNED:
        all_columns(UNSIGNED_SIGNED, product);
        break;
#endif
    default:
        all_columns(FLOAT_FLOAT, product);
    }
}
