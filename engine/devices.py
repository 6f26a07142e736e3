"""Where a replica computes: what differs between a CPU and a GPU when an engine is put together. Chosen once, at start.

Imports a device's kernels only when that device is chosen.
"""

import logging
from concurrent.futures import Future
from threading import Thread
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from engine.config import EngineConfig, SchedulerConfig
from engine.forward import Backend, CpuBackend, ReferenceBackend, make_rope
from engine.kernels.cpu.compiler import load_library
from engine.kernels.cpu.features import Feature
from engine.kernels.cpu.library import Library
from engine.kernels.cpu.operators import missing_kernel
from engine.kernels.cpu.threads import bind_threads
from engine.kernels.cpu.vocabulary import CpuReductions
from engine.machine import ALONE, CoreShare, available_bytes, available_cores
from engine.models.spec import ModelSpec
from engine.parallel.group import TensorGroup
from engine.runner import LOGPROB_ROWS
from engine.sampler import Sampler

if TYPE_CHECKING:
    from engine.models.loader import LoadedModel

log = logging.getLogger(__name__)

CPU_PAGE_TOKENS = 16


LEAST_RANK_BYTES = 2**16


class HostGroup(NamedTuple):
    """The ranks that share a model's layers, and what one of them brings to the others at once, at most."""

    tensor: TensorGroup
    rank_bytes: int


class Device(Protocol):
    """One kind of device, with what the configuration leaves open resolved."""

    name: str
    """For torch."""
    page_tokens: int
    spare_pages: int
    """Pages that the cache needs beyond those of its pool."""

    def backend(self, loaded: "LoadedModel", group: TensorGroup | None = None) -> Backend:
        """The kernels that this model runs on; `group` are the ranks that share its layers, where there are any."""

    def free_bytes(self) -> int:
        """Memory that nobody has taken yet; of what several processes share, this one's part."""

    def sampler(self) -> Sampler:
        """Called by the thread that will run the steps."""


class Cpu:
    """The C kernels, compiled while the weights are read; plain torch where that fails."""

    name = "cpu"
    spare_pages = 0

    def __init__(self, config: EngineConfig, features: frozenset[Feature], share: CoreShare = ALONE) -> None:
        """Sets torch's threads and begins to compile. Threads that are left to "auto" are this process's `share`."""
        self.threads = max(1, available_cores() // share.count) if config.threads == "auto" else config.threads
        self._share = share
        self.page_tokens = CPU_PAGE_TOKENS if config.kv.page_tokens == "auto" else config.kv.page_tokens
        self._scheduler = config.scheduler
        self._deterministic = config.deterministic
        self._features = features
        torch.set_num_threads(self.threads)
        self._library: Future[Library | None] = Future()
        Thread(target=self._compile, name="compile-kernels", daemon=True).start()

    def backend(self, loaded: "LoadedModel", group: TensorGroup | None = None) -> Backend:
        backend = choose_backend(
            self._library.result(),
            loaded.dtype,
            loaded.spec.head_dim,
            self.page_tokens,
            self.threads,
            self._scheduler,
            deterministic=self._deterministic,
            group=None if group is None else HostGroup(group, self._rank_bytes(loaded)),
        )
        if self._deterministic and (reason := _chunk_dependence(backend, loaded.spec)):
            raise ValueError(f"deterministic results are not to be had here: {reason}")
        return backend

    def free_bytes(self) -> int:
        return available_bytes() // self._share.count

    def sampler(self) -> Sampler:
        library = self._library.result()
        if library is None:
            return Sampler()
        bind_threads(library, self.threads, self._share)
        return Sampler(CpuReductions(library, self.threads))

    def _rank_bytes(self, loaded: "LoadedModel") -> int:
        """What a rank brings to the others at most: the hidden states of a step, or the logits of one row."""
        part = loaded.part
        width = max(part.whole.hidden, part.whole.embedding_dim or 0)
        hidden = self._scheduler.max_batch_tokens * width * loaded.dtype.itemsize
        return max(hidden, torch.float32.itemsize * part.vocabulary_rows, LEAST_RANK_BYTES)

    def _compile(self) -> None:
        try:
            self._library.set_result(load_library(self._features))
        except BaseException as error:
            self._library.set_exception(error)


class Cuda:
    """One GPU."""

    name = "cuda"

    def __init__(self, config: EngineConfig) -> None:
        from engine.kernels.cuda.backend import PAGE_TOKENS, SPARE_PAGES

        self.page_tokens = PAGE_TOKENS if config.kv.page_tokens == "auto" else config.kv.page_tokens
        self.spare_pages = SPARE_PAGES
        self._config = config

    def backend(self, loaded: "LoadedModel", group: TensorGroup | None = None) -> Backend:
        from engine.kernels.cuda.backend import CudaBackend

        return CudaBackend(
            loaded.dtype,
            max_sequences=self._config.scheduler.max_sequences,
            page_tokens=self.page_tokens,
            fp8=self._config.quantization == "fp8",
            ranks=None if group is None else group.sum,
        )

    def free_bytes(self) -> int:
        from engine.kernels.cuda.backend import free_bytes

        return free_bytes()

    def sampler(self) -> Sampler:
        return Sampler()


def choose_device(config: EngineConfig, features: frozenset[Feature], share: CoreShare = ALONE) -> Device:
    """The device that the configuration names; "auto" is a GPU where there is one. Raises ValueError.

    `features` are what the model needs of its kernels. A CPU takes `share` of the cores; a GPU is one process's.
    """
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ValueError('device "cuda" needs a CUDA device and a CUDA build of torch; use "cpu" or "auto" here')
    if config.deterministic and has_gpu and config.device != "cpu":
        raise ValueError("deterministic results are to be had on a CPU only; choose device cpu")
    if config.activations == "int8" and has_gpu and config.device != "cpu":
        raise ValueError(
            'activations "int8" meet weights of 4 bits on a CPU only; choose device cpu, or leave them auto'
        )
    if has_gpu and config.device != "cpu":
        return Cuda(config)
    if config.quantization == "fp8":
        raise ValueError('quantization "fp8" needs a CUDA device; on a CPU use "w8a8"')
    return Cpu(config, features, share)


def choose_backend(
    library: Library | None,
    dtype: torch.dtype,
    head_dim: int,
    page_tokens: int,
    threads: int,
    scheduler: SchedulerConfig,
    *,
    deterministic: bool = False,
    group: HostGroup | None = None,
) -> CpuBackend | ReferenceBackend:
    """The C kernels where they were compiled and know the model, else plain torch."""
    reason = None if library is None else missing_kernel(dtype, head_dim, page_tokens)
    if reason is not None:
        log.warning("%s; the slower reference kernels run", reason)
    if library is None or reason is not None:
        return ReferenceBackend(None if group is None else group.tensor.sum)
    return CpuBackend(
        library,
        threads,
        max_tokens=scheduler.max_batch_tokens,
        max_rows=max(scheduler.max_sequences, LOGPROB_ROWS),
        deterministic=deterministic,
        ranks=None if group is None else group.tensor.in_program(library, threads, group.rank_bytes),
    )


def _chunk_dependence(backend: Backend, spec: ModelSpec) -> str | None:
    """Why a token's logits depend on the chunk in which it is computed; None if they do not."""
    if not isinstance(backend, CpuBackend):
        return "only the compiled kernels know how"
    rope = make_rope(spec, torch.device("cpu"))
    if rope is not None and rope.fixed_frequencies is None:
        return "this model's rotary positions follow the length of what is computed together"
    return None
