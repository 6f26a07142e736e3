"""Puts one replica together from its configuration, and resolves every "auto" on the way, once, with a log line.

The composition root: the only place that knows both the deciding and the computing side.
"""

import logging
import time

import torch

from engine.config import EngineConfig, KVConfig
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.kv.cache import PagedKVCache
from engine.kv.pages import PagePool
from engine.kv.sizing import KVPlan, plan_kv
from engine.limits import Limits
from engine.machine import available_bytes, available_cores
from engine.models.decoder import Decoder
from engine.models.directory import load_eos_token_ids
from engine.models.loader import load_model
from engine.models.source import resolve_model
from engine.runner import Runner
from engine.sampler import Sampler
from engine.scheduler import Scheduler

log = logging.getLogger(__name__)


def build_engine(config: EngineConfig) -> Engine:
    """Loads the model and returns an engine that is ready for its first request.

    Raises ModelError if the model cannot be loaded and ValueError if the KV memory cannot hold what was asked for.
    """
    began = time.monotonic()
    threads = available_cores() if config.threads == "auto" else config.threads
    torch.set_num_threads(threads)
    path = resolve_model(config.model, config.revision)
    decoder = load_model(path, config.dtype)
    kv = _plan_kv(config, decoder)
    cache = PagedKVCache(decoder.spec, kv.num_pages, config.kv.page_tokens, decoder.dtype)
    scheduler = Scheduler(config.scheduler, PagePool(kv.num_pages), config.kv.page_tokens)
    log.info(
        "%s from %s: %s, %d threads, weights %s, KV %s in %d pages of %d tokens, up to %d tokens a sequence; %.1f s",
        config.model,
        path,
        str(decoder.dtype).removeprefix("torch."),
        threads,
        _mebibytes(decoder.num_bytes),
        _mebibytes(kv.num_bytes),
        kv.num_pages,
        config.kv.page_tokens,
        kv.max_model_len,
        time.monotonic() - began,
    )
    return Engine(
        scheduler,
        LocalExecutor(Runner(decoder, cache, Sampler())),
        Limits(kv.max_model_len, decoder.spec.vocab_size),
        eos_token_ids=load_eos_token_ids(path),
        model_path=path,
    )


def _plan_kv(config: EngineConfig, decoder: Decoder) -> KVPlan:
    bytes_per_token = decoder.spec.kv_bytes_per_token(decoder.dtype.itemsize)
    return plan_kv(
        budget_bytes=_kv_budget(config.kv),
        bytes_per_token=bytes_per_token,
        page_tokens=config.kv.page_tokens,
        max_sequences=config.scheduler.max_sequences,
        model_max_len=decoder.spec.max_position,
        max_model_len=config.max_model_len,
    )


def _kv_budget(config: KVConfig) -> int:
    return int(available_bytes() * config.memory_share) if config.memory == "auto" else config.memory


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
