"""Single prompts through a decoder, outside any batch: for calibration, and to measure what a number format costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from engine.config import Activations, Auto, DType
from engine.errors import ModelError
from engine.forward import Backend, CpuBackend, Forward, ReferenceBackend
from engine.kernels.cpu.compiler import load_library
from engine.kernels.operators import AttentionLayout
from engine.kv.cache import PagedKVCache
from engine.models.decoder import Decoder
from engine.models.loader import load_parameters
from engine.quant.config import Scheme

PAGE_TOKENS = 16
_LOGIT_ROWS = 128
"""Rows of logits computed at once."""


@dataclass(frozen=True, slots=True)
class NumberFormats:
    """Everything about a run that changes its numbers."""

    quantization: Scheme | Auto = "auto"
    group: int = 64
    kv: Literal["auto", "int8"] = "auto"
    dtype: DType = "auto"
    kernels: Literal["torch", "C"] = "torch"
    activations: Activations = "auto"


def load_forward(path: Path, formats: NumberFormats, max_tokens: int) -> Forward:
    """A model over a cache of one prompt of at most `max_tokens` tokens. Raises ModelError."""
    backend = _backend(formats, max_tokens)
    loaded = load_parameters(
        path,
        formats.dtype,
        quantization=formats.quantization,
        group=formats.group,
        int8_activations=formats.activations == "int8",
    )
    decoder = Decoder(loaded.part, loaded.parameters, backend.operators, loaded.dtype)
    kv_dtype = torch.int8 if formats.kv == "int8" else loaded.dtype
    cache = PagedKVCache(loaded.spec, pages_of(max_tokens), PAGE_TOKENS, kv_dtype, layout=backend.kv_layout)
    return backend.forward(decoder, cache)


def _backend(formats: NumberFormats, max_tokens: int) -> Backend:
    if formats.kernels == "torch":
        return ReferenceBackend()
    library = load_library()
    if library is None:
        raise ModelError("the C kernels need a C compiler (cc, gcc or clang), and none was found")
    return CpuBackend(library, torch.get_num_threads(), max_tokens=max_tokens, max_rows=_LOGIT_ROWS)


def pages_of(tokens: int) -> int:
    """Pages of a cache that holds one prompt of this many tokens."""
    return -(-tokens // PAGE_TOKENS)


def prompt_layout(length: int) -> AttentionLayout:
    """One sequence of `length` tokens, all new, in the first pages of a cache."""
    positions = torch.arange(length)
    return AttentionLayout(
        positions=positions,
        contexts=torch.full((length,), length),
        slots=positions,
        cu_seq_q=torch.tensor([0, length], dtype=torch.int32),
        context_lens=torch.tensor([length], dtype=torch.int32),
        page_table=torch.arange(pages_of(length), dtype=torch.int32)[None],
        page_tokens=PAGE_TOKENS,
        query_lens=(length,),
        lens=(length,),
    )


def prompt_logits(forward: Forward, token_ids: Sequence[int]) -> Tensor:
    """[len(token_ids), vocab] float32: after every token, the logits of the next."""
    with torch.inference_mode():
        hidden = forward.hidden(torch.tensor(token_ids), prompt_layout(len(token_ids)))
        rows = torch.arange(len(token_ids)).split(_LOGIT_ROWS)
        return torch.cat([forward.logits(hidden, some).clone() for some in rows])
