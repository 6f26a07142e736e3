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

/* `rows` rows from `row` on, and `vectors` vectors of columns from vector `first` on; both constant. */
INLINE void kernel(
    enum factors factors, int rows, int vectors, const struct product *product, int64_t row, int64_t first,
    struct ahead *ahead) {
    const struct panel *panel = product->b;
    float *c = product->c + row * product->c_stride + first * VF;
    vf sums[MOST_ROWS][MOST_VECTORS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            sums[r][v] = product->add ? vf_load(c + r * product->c_stride + v * VF) : (vf){0};
        }
    }
    /* A pointer for every third row: more would not leave enough general registers. */
    const int64_t stride = panel->stride, a_stride = product->a_stride * (int64_t)sizeof(uint32_t);
    const char *a[MOST_ROWS / 3];
#pragma GCC unroll 2
    for (int i = 0; i < MOST_ROWS / 3; i++) {
        a[i] = (const char *)product->a + (row + 3 * i) * a_stride;
    }
    struct run soon = ahead->run;
    for (int64_t begin = 0, run = 0; begin < product->depth; begin += panel->run_depth, run++) {
        const char *b[MOST_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            b[v] = panel->runs[run] + panel->columns[first + v];
        }
        for (int64_t left = at_most(product->depth - begin, panel->run_depth); left > 0; left--) {
            fetch_ahead(&soon, ahead);
            vu columns[MOST_VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                memcpy(&columns[v], b[v], sizeof columns[v]);
                b[v] += stride;
                OWN_REGISTER(b[v]);
            }
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                uint32_t element;
                memcpy(&element, a[r / 3] + r % 3 * a_stride, sizeof element);
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) {
                    sums[r][v] = multiply_add(factors, element, columns[v], sums[r][v]);
                }
            }
#pragma GCC unroll 2
            for (int i = 0; i < (rows + 2) / 3; i++) {
                a[i] += sizeof(uint32_t);
                OWN_REGISTER(a[i]);
            }
        }
    }
    ahead->run = soon;
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            vf_store(c + r * product->c_stride + v * VF, sums[r][v]);
        }
    }
}

/* All rows of MOST_VECTORS vectors of columns. */
INLINE void all_rows(enum factors factors, const struct product *product, int64_t first, struct ahead *ahead) {
    int64_t row = 0;
    for (; row + MOST_ROWS <= product->rows; row += MOST_ROWS) {
        kernel(factors, MOST_ROWS, MOST_VECTORS, product, row, first, ahead);
    }
    switch (product->rows - row) {
    case 5:
        kernel(factors, 5, MOST_VECTORS, product, row, first, ahead);
        break;
    case 4:
        kernel(factors, 4, MOST_VECTORS, product, row, first, ahead);
        break;
    case 3:
        kernel(factors, 3, MOST_VECTORS, product, row, first, ahead);
        break;
    case 2:
        kernel(factors, 2, MOST_VECTORS, product, row, first, ahead);
        break;
    case 1:
        kernel(factors, 1, MOST_VECTORS, product, row, first, ahead);
        break;
    default:
        break;
    }
}

INLINE void all_columns(enum factors factors, const struct product *product, struct ahead *ahead) {
    const int64_t vectors = product->columns / VF;
    int64_t first = 0;
    for (; first + MOST_VECTORS <= vectors; first += MOST_VECTORS) {
        all_rows(factors, product, first, ahead);
    }
    /* Heads of few sizes come here; each kernel more is a tenth of a second more to compile. */
    for (; MOST_VECTORS > 1 && first < vectors; first++) {
        int64_t row = 0;
        for (; row + MOST_ROWS <= product->rows; row += MOST_ROWS) {
            kernel(factors, MOST_ROWS, 1, product, row, first, ahead);
        }
        for (; row < product->rows; row++) {
            kernel(factors, 1, 1, product, row, first, ahead);
        }
    }
}

void multiply(enum factors factors, const struct product *product, struct ahead *ahead) {
    switch (factors) {
#if HAS_PAIRS
    case PAIR_PAIR:
        all_columns(PAIR_PAIR, product, ahead);
        break;
#endif
#if HAS_QUADS
    case SIGNED_UNSIGNED:
        all_columns(SIGNED_UNSIGNED, product, ahead);
        break;
    case UNSIGNED_SIGNED:
        all_columns(UNSIGNED_SIGNED, product, ahead);
        break;
#endif
    default:
        all_columns(FLOAT_FLOAT, product, ahead);
    }
}
