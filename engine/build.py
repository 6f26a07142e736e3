"""Puts one replica together from its configuration, and resolves every "auto" on the way, once, with a log line.

The composition root: the only place that knows both the deciding and the computing side.
"""

import logging
import time
from dataclasses import dataclass

import torch

from engine.config import EngineConfig
from engine.devices import choose_device
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.forward import Forward
from engine.kv.pages import PagePool
from engine.kv.sizing import KVPlan, plan_kv
from engine.kv.tier import TierFactory
from engine.limits import Limits
from engine.models.directory import load_eos_token_ids
from engine.models.source import resolve_model
from engine.models.spec import ModelSpec
from engine.needs import needed_features
from engine.ready import ReadyModel, load
from engine.runner import Runner
from engine.scheduler import Scheduler

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Assembly:
    """An engine, and the parts of it that measurements look into."""

    engine: Engine
    forward: Forward
    spec: ModelSpec
    kv_dtype: torch.dtype
    weight_bytes: int
    """Of all parameters, in the form that they were loaded in."""


def build_engine(config: EngineConfig, make_tier: TierFactory | None = None) -> Engine:
    """Loads the model and returns an engine that is ready for its first request.

    `make_tier` gives it a place for pages that overflow.

    Raises ModelError if the model cannot be loaded and ValueError if the KV memory cannot hold what was asked for.
    """
    return assemble(config, make_tier).engine


def assemble(config: EngineConfig, make_tier: TierFactory | None = None) -> Assembly:
    """`build_engine`, with the parts."""
    began = time.monotonic()
    path = resolve_model(config.model, config.revision)
    device = choose_device(config, needed_features(config, path))
    ready = load(config, path, device)
    spec, kv = ready.decoder.spec, _plan_kv(config, ready)
    cache = ready.cache(kv.num_pages)
    forward = ready.backend.forward(ready.decoder, cache)
    log.info(
        "%s from %s: %s, %s kernels, %d threads, weights %s, %s KV %s in %d pages of %d tokens, "
        "up to %d tokens a sequence; %.1f s",
        config.model,
        path,
        str(ready.decoder.dtype).removeprefix("torch."),
        ready.backend.name,
        torch.get_num_threads(),
        _mebibytes(ready.weight_bytes),
        str(ready.kv_dtype).removeprefix("torch."),
        _mebibytes(kv.num_bytes),
        kv.num_pages,
        device.page_tokens,
        kv.max_model_len,
        time.monotonic() - began,
    )
    tier = None if make_tier is None else make_tier(ready.namespace, ready.memory(cache))
    engine = Engine(
        Scheduler(config.scheduler, PagePool(kv.num_pages), device.page_tokens, tier=tier),
        LocalExecutor(Runner(forward, device.page_tokens, device.sampler())),
        Limits(kv.max_model_len, spec.vocab_size),
        eos_token_ids=load_eos_token_ids(path),
        model_path=path,
        prefix_caching=config.kv.prefix_caching,
        namespace=ready.namespace.hex(),
    )
    return Assembly(engine, forward, spec, ready.kv_dtype, ready.weight_bytes)


def _plan_kv(config: EngineConfig, ready: ReadyModel) -> KVPlan:
    memory, device, spec = config.kv.memory, ready.device, ready.decoder.spec
    return plan_kv(
        budget_bytes=int(device.free_bytes() * config.kv.memory_share) if memory == "auto" else memory,
        bytes_per_token=ready.page_bytes // device.page_tokens,
        page_tokens=device.page_tokens,
        max_sequences=config.scheduler.max_sequences,
        model_max_len=spec.max_position,
        max_model_len=config.max_model_len,
    )


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
