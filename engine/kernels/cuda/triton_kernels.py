# mypy: disable-error-code="no-untyped-def"
"""The fused operators as Triton kernels. Owns the arithmetic on the device; shapes and launches are `triton_fused`'s.

Arithmetic is in float32 and rounded once. Row numbers come from the grid and never as arguments: Triton would compile
a variant for a count of 1, another for multiples of 16, and a step may have any.
"""

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

ROUNDER: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and subtracting it rounds a float32 below 2^22 to an integer, half to even."""


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # tanh(z) = 2 sigmoid(2 z) - 1, so 0.5 (1 + tanh(z)) = sigmoid(2 z); 1.5957... is 2 sqrt(2 / pi).
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def _summed(x, residual, total, at, mask, HAS_RESIDUAL: tl.constexpr):
    """x, or x + residual as it is stored: the next layer must see what this one normalised."""
    value = tl.load(x + at, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        value = value.to(tl.float32) + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty)
        tl.store(total + at, value, mask=mask)
    return value.to(tl.float32)


@triton.jit
def rms_norm_kernel(
    x, residual, weight, y, total, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):
    """A program normalises a row; BLOCK is a power of two from WIDTH on."""
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + column
    value = _summed(x, residual, total, at, mask, HAS_RESIDUAL)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / WIDTH + eps)
    factor = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, (value * scale * factor).to(y.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm_kernel(
    x, residual, weight, bias, y, total, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):
    """A program normalises a row; BLOCK is a power of two from WIDTH on."""
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + column
    value = _summed(x, residual, total, at, mask, HAS_RESIDUAL)
    centered = tl.where(mask, value - tl.sum(value, axis=0) / WIDTH, 0.0)
    scale = tl.rsqrt(tl.sum(centered * centered, axis=0) / WIDTH + eps)
    factor = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, (centered * scale * factor + shift).to(y.dtype.element_ty), mask=mask)


@triton.jit
def gate_kernel(x, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    """A program does BLOCK of the WIDTH columns of a row of the result."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    gate = tl.load(x + row * 2 * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * WIDTH + WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * WIDTH + column, (_activated(gate, ACTIVATION) * up).to(y.dtype.element_ty), mask=mask)


@triton.jit
def write_kernel(
    qkv,
    cos_sin,
    q_weight,
    k_weight,
    slots,
    q,
    k_pages,
    v_pages,
    page_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    FIRST_HEAD: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    """A program does HEAD_BLOCK of the merged heads of a token, from FIRST_HEAD on.

    Queries go to `q` [T, HEADS, HEAD_DIM], keys and values to their page at `page_stride` elements from the one before.
    ROTARY_DIM 0 rotates nothing. Queries are not turned in place: a pair's halves belong to different threads, one of
    which would read what the other had already written.
    """
    token = tl.program_id(0).to(tl.int64)
    head = FIRST_HEAD + tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)[:, None]
    dim = tl.arange(0, DIM_BLOCK)[None, :]
    total_heads: tl.constexpr = HEADS + 2 * KV_HEADS
    mask = (head < total_heads) & (dim < HEAD_DIM)
    row = qkv + (token * total_heads + head) * HEAD_DIM
    raw = tl.load(row + dim, mask=mask, other=0.0)
    value = raw.to(tl.float32)
    is_query, is_value = head < HEADS, head >= HEADS + KV_HEADS
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(value * value, axis=1) / HEAD_DIM + eps)[:, None]
        value = value * scale * _head_weight(q_weight, k_weight, dim, dim < HEAD_DIM, is_query)
    if ROTARY_DIM > 0:
        half: tl.constexpr = ROTARY_DIM // 2
        is_rotated = dim < ROTARY_DIM
        partner = tl.where(dim < half, dim + half, dim - half)
        other = tl.load(row + partner, mask=mask & is_rotated, other=0.0).to(tl.float32)
        if HAS_NORM:
            other = other * scale * _head_weight(q_weight, k_weight, partner, is_rotated, is_query)
        angle = cos_sin + token * ROTARY_DIM + dim % half
        cos = tl.load(angle, mask=is_rotated, other=1.0)
        sin = tl.load(angle + half, mask=is_rotated, other=0.0)
        value = value * cos + tl.where(dim < half, -other, other) * sin
    turned = tl.where(is_value, raw, value.to(raw.dtype))
    tl.store(q + (token * HEADS + head) * HEAD_DIM + dim, turned, mask=mask & is_query)
    slot = tl.load(slots + token)
    place = (slot // PAGE_TOKENS) * page_stride + (slot % PAGE_TOKENS) * (KV_HEADS * HEAD_DIM)
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
    tl.store(k_pages + place + (head - HEADS) * HEAD_DIM + dim, turned, mask=mask & is_key)
    tl.store(v_pages + place + (head - HEADS - KV_HEADS) * HEAD_DIM + dim, turned, mask=mask & is_value)


@triton.jit
def _head_weight(q_weight, k_weight, dim, mask, is_query):
    for_query = tl.load(q_weight + dim, mask=mask, other=0.0).to(tl.float32)
    for_key = tl.load(k_weight + dim, mask=mask, other=0.0).to(tl.float32)
    return tl.where(is_query, for_query, for_key)


@triton.jit
def quantize_rows_kernel(
    x,
    values,
    scales,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    TO_INTEGERS: tl.constexpr,
):
    """A program quantizes a row, BLOCK columns at a time: once for the largest value, once for the result."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, WIDTH, BLOCK):
        at = start + column
        largest = tl.maximum(largest, tl.abs(tl.load(x + row * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)))
    scale = tl.max(largest, axis=0) / LARGEST
    inverse = tl.where(scale > 0, 1.0 / scale, 0.0)
    tl.store(scales + row, scale)
    for start in range(0, PADDED_WIDTH, BLOCK):
        at = start + column
        value = tl.load(x + row * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32) * inverse
        value = tl.minimum(tl.maximum(value, -LARGEST), LARGEST)
        if TO_INTEGERS:
            value = (value + ROUNDER) - ROUNDER
        tl.store(values + row * PADDED_WIDTH + at, value.to(values.dtype.element_ty), mask=at < PADDED_WIDTH)


@triton.jit
def scale_sums_kernel(
    sums, row_scale, column_scale, bias, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """A program does BLOCK of the WIDTH columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    value = tl.load(sums + row * WIDTH + column, mask=mask, other=0).to(tl.float32)
    value = value * tl.load(row_scale + row) * tl.load(column_scale + column, mask=mask, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * WIDTH + column, value.to(y.dtype.element_ty), mask=mask)
