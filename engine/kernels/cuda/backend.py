"""What a replica on a CUDA device is made of, and what is said when it cannot be. Owns the look at the device.

The only module of this package that decisions at start need; importing it needs no CUDA.
"""

import logging
from collections.abc import Callable
from importlib.util import find_spec

import torch

from engine.kernels.cuda.attention import FLASH_DTYPES, PAGE_MULTIPLE
from engine.kernels.cuda.forward import CudaForward
from engine.kernels.cuda.fused import Fused, TorchFused
from engine.kernels.cuda.graphs import CudaRecorder
from engine.kernels.cuda.linear import fp8_obstacle
from engine.kernels.cuda.operators import CudaOperators
from engine.kernels.operators import RanksSum
from engine.kv.cache import KVLayout, PagedKVCache
from engine.models.decoder import Decoder

log = logging.getLogger(__name__)

PAGE_TOKENS = PAGE_MULTIPLE
"""Tokens of a page unless the operator asks for more: the fewest that flash attention reads."""
SPARE_PAGES = 1
"""Pages that a cache needs beyond those of its pool: padding rows of a decode write to the last one."""


class CudaBackend:
    """`engine.forward.Backend` for bfloat16 and float16 on one GPU."""

    kv_layout = KVLayout.ROWS

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        max_sequences: int,
        page_tokens: int = PAGE_TOKENS,
        fp8: bool = False,
        graphs: bool = True,
        ranks: RanksSum | None = None,
    ) -> None:
        """Parameters and cache must be on the current CUDA device: a process has one.

        `ranks` adds up over those that share the model; `max_sequences` and `page_tokens` are those of the scheduler
        and of the cache. Raises ValueError, naming the setting to change, if this cannot run.
        """
        if not torch.cuda.is_available():
            raise ValueError('device "cuda" needs a CUDA device and a CUDA build of torch; use "cpu" or "auto" here')
        capability = torch.cuda.get_device_capability()
        check(dtype, page_tokens, capability, fp8=fp8)
        fused = load_fused()
        self.name = f"CUDA ({torch.cuda.get_device_name()}, {fused.name})"
        self.operators = CudaOperators(dtype, fused, capability, fp8=fp8, ranks=ranks)
        self._capability = capability
        self._max_sequences = max_sequences
        self._graphs = graphs

    def forward(self, decoder: Decoder, cache: PagedKVCache) -> CudaForward:
        """Makes the decoder ready to run; records its decodes, which takes seconds."""
        return CudaForward(
            decoder,
            cache,
            self._capability,
            max_sequences=self._max_sequences,
            record=CudaRecorder() if self._graphs else None,
        )


def check(dtype: torch.dtype, page_tokens: int, capability: tuple[int, int], *, fp8: bool) -> None:
    """Raises ValueError, naming the setting to change, for what an operator chose and the device cannot do."""
    if dtype not in FLASH_DTYPES:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f'dtype {name} has no CUDA kernels; choose "bfloat16" or "float16", or device "cpu"')
    if page_tokens % PAGE_MULTIPLE:
        raise ValueError(
            f"kv.page_tokens ({page_tokens}) must be a multiple of {PAGE_MULTIPLE} on a CUDA device: flash attention "
            f"reads no smaller pages; {PAGE_TOKENS} is the default there"
        )
    if fp8 and (obstacle := fp8_obstacle(capability)) is not None:
        raise ValueError(f'quantization "fp8": {obstacle}; "w8a8" runs on every device')


def free_bytes() -> int:
    """Bytes of the device's memory that nobody has taken yet: what a cache may have once the weights are loaded."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def load_fused() -> Fused:
    """Triton's operators where it is installed, as it is with every CUDA build of torch for Linux; else torch's."""
    return TorchFused() if find_spec("triton") is None else tried(_make_triton, torch.device("cuda"))


def tried(make: Callable[[], Fused], device: torch.device) -> Fused:
    """What `make` makes, once it has run on the device; torch's operators, with one warning, where it cannot.

    That Triton is installed says little: it compiles a part of itself with the C compiler of the machine at its first
    launch, which would else be that of the first request.
    """
    try:
        fused = make()
        row = torch.ones(1, 16, dtype=torch.bfloat16, device=device)
        fused.rms_norm(row, row[0], 1e-5, None)[0].cpu()
    except Exception as error:  # Whatever Triton, a compiler or the driver raises.
        log.warning(
            "Triton's kernels cannot run here, so plain torch does their work and takes longer: %s: %s; Triton needs a "
            "C compiler and Python's headers (gcc and python3-dev)",
            type(error).__name__,
            str(error).strip().partition("\n")[0],
        )
        return TorchFused()
    return fused


def _make_triton() -> Fused:
    from engine.kernels.cuda.triton_fused import TritonFused

    return TritonFused()
