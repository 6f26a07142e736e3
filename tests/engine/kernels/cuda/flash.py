"""What torch's paged flash attention does on a GPU, in plain torch on any device, and what it refuses.

It reads the tensors it is given and nothing else, as a recorded launch does: lengths and pages come from `seqused_k`
and `block_table`, never from the host's numbers, which are only checked.
"""

import torch
from torch import Tensor


def flash_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
    num_splits: int | None,
) -> Tensor:
    heads, kv_heads, head_dim = query.shape[1], key.shape[2], query.shape[2]
    page_tokens = key.shape[1]
    assert page_tokens % 256 == 0 and head_dim % 8 == 0 and head_dim <= 256
    assert {query.dtype, key.dtype, value.dtype} <= {torch.bfloat16} or {query.dtype} <= {torch.float16}
    assert {cu_seq_q.dtype, seqused_k.dtype, block_table.dtype} == {torch.int32}
    assert cu_seq_k is not None and len(cu_seq_k) == len(cu_seq_q), "both offsets or neither"
    assert key.stride(-1) == 1 and block_table.stride(-1) == 1 and seqused_k.is_contiguous()
    assert enable_gqa or heads == kv_heads
    splits_are_right = max_q == 1 and heads > kv_heads and window_size == (-1, -1)
    assert num_splits == 1 or splits_are_right, "rows of the result would stay unwritten"
    left, right = window_size
    assert right == 0 or (right == -1 and max_q == 1), "not causal"
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for row, length in enumerate(seqused_k.tolist()):
        begin, end = cu_seq_q[row : row + 2].tolist()
        assert end - begin <= max_q and length <= max_k
        pages = block_table[row, : -(-length // page_tokens)].long()
        keys, values = (half[pages].flatten(0, 1)[:length].float() for half in (key, value))
        positions = torch.arange(length - (end - begin), length)[:, None]
        seen = torch.arange(length) <= positions
        if left >= 0:
            seen &= torch.arange(length) >= positions - left
        for head in range(heads):
            scores = query[begin:end, head].float() @ keys[:, head * kv_heads // heads].T * scale
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            out[begin:end, head] = (weights @ values[:, head * kv_heads // heads]).to(out.dtype)
    return out
