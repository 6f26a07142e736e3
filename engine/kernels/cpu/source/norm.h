/* RMSNorm and LayerNorm of a sum, and the sum itself. */
#ifndef MANTA_NORM_H
#define MANTA_NORM_H

#include "step.h"

/* total = x + residual, rounded to the dtype; y = total / sqrt(mean(total^2) + eps) * weight. */
struct rms_norm {
    const void *x;                  /* [tokens, width] */
    const void *residual;           /* [tokens, width], or NULL: total = x and is not written */
    const void *weight;             /* [width] */
    double eps;
    void *y;                        /* [tokens, width] */
    void *total;                    /* [tokens, width], or NULL; may be x or residual */
    int64_t width;
    int64_t dtype;                  /* of all of them */
};
OPERATION(rms_norm);

/* y = (total - mean) / sqrt(variance + eps) * weight + bias. */
struct layer_norm {
    const void *x;
    const void *residual;
    const void *weight;
    const void *bias;
    double eps;
    void *y;
    void *total;
    int64_t width;
    int64_t dtype;
};
OPERATION(layer_norm);

#endif
