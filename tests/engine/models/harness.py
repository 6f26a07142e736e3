"""Random two-layer models of every family, and a driver that runs sequences through the runner as a scheduler would."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.configuration_utils import PretrainedConfig

from engine.batch import Batch, SampleRow, Samples, StepOutput
from engine.forward import Backend, CpuBackend, Forward, ReferenceBackend
from engine.kv.cache import PagedKVCache
from engine.models.decoder import Decoder
from engine.models.loader import load_parameters
from engine.runner import LOGPROB_ROWS, Runner
from engine.sampler import Drawn, Sampler
from engine.sampling_params import SamplingParams
from tests.compiled import compiled_library

VOCAB = 97
PAGE_TOKENS = 16
NAN_BYTE = 0xFF
"""Every floating type of these bytes is NaN."""
GREEDY = SamplingParams(temperature=0.0)

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_MIXTURE: dict[str, Any] = {"num_experts": 8, "moe_intermediate_size": 24}
_NEOX: dict[str, Any] = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_GPT2: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_OPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def _rope(**parameters: Any) -> LlamaConfig:
    return LlamaConfig(**_LLAMA, rope_parameters={"rope_theta": 10000.0, **parameters})


CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_LLAMA),
    "llama-mha-biased-tied": LlamaConfig(
        **{**_LLAMA, "num_key_value_heads": 4}, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama-mqa-wide-heads": LlamaConfig(**{**_LLAMA, "num_key_value_heads": 1}, head_dim=16),
    "llama-linear": _rope(rope_type="linear", factor=3.0),
    "llama-dynamic": _rope(rope_type="dynamic", factor=2.0),
    "llama-llama3": _rope(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    "llama-yarn": _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
    "llama-longrope": _rope(
        rope_type="longrope",
        short_factor=[1.0, 1.1, 1.2, 1.3],
        long_factor=[1.0, 2.0, 3.0, 4.0],
        factor=4.0,
        original_max_position_embeddings=64,
    ),
    "mistral": MistralConfig(**_LLAMA, sliding_window=7),
    "mistral-full": MistralConfig(**_LLAMA, sliding_window=None),
    "qwen2": Qwen2Config(**_LLAMA, tie_word_embeddings=True),
    "qwen2-window": Qwen2Config(**_LLAMA, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": Qwen3Config(**_LLAMA, head_dim=24),
    "mixtral": MixtralConfig(**_LLAMA, num_local_experts=6, num_experts_per_tok=2),
    "mixtral-window": MixtralConfig(**_LLAMA, num_local_experts=3, num_experts_per_tok=1, sliding_window=7),
    "mixtral-every-expert": MixtralConfig(**_LLAMA, num_local_experts=3, num_experts_per_tok=3),
    "qwen2-moe": Qwen2MoeConfig(**_LLAMA, **_MIXTURE, num_experts_per_tok=3, shared_expert_intermediate_size=40),
    "qwen2-moe-normed-tied": Qwen2MoeConfig(
        **_LLAMA,
        **_MIXTURE,
        num_experts_per_tok=5,
        shared_expert_intermediate_size=16,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=2,
    ),
    "qwen3-moe": Qwen3MoeConfig(**_LLAMA, **_MIXTURE, num_experts_per_tok=4, norm_topk_prob=True, head_dim=24),
    "qwen3-moe-unnormed": Qwen3MoeConfig(**_LLAMA, **_MIXTURE, num_experts_per_tok=2, attention_bias=True),
    "gpt2": GPT2Config(**_GPT2),
    "gpt2-untied": GPT2Config(**_GPT2, n_inner=56, tie_word_embeddings=False, scale_attn_weights=False),
    "opt": OPTConfig(**_OPT),
    "opt-350m": OPTConfig(**_OPT, do_layer_norm_before=False, word_embed_proj_dim=16),
    "opt-unbiased": OPTConfig(**_OPT, enable_bias=False, activation_function="gelu"),
    "neox": GPTNeoXConfig(**_NEOX),
    "neox-sequential": GPTNeoXConfig(**_NEOX, use_parallel_residual=False, attention_bias=False),
    "neox-rotary-tied": GPTNeoXConfig(
        **_NEOX,
        tie_word_embeddings=True,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5},
    ),
}

CHOOSING = frozenset(name for name in CONFIGS if "mixtral" in name or "moe" in name) - {"mixtral-every-expert"}
"""Mixtures whose tokens run some of the experts: a rounding that swaps two of them changes much, so that logits cannot
be compared in half precision."""


@dataclass
class Pair:
    """The same weights in Hugging Face's implementation and on disk."""

    path: Path
    """The checkpoint."""
    theirs: Any

    def expected(self, tokens: Sequence[int]) -> Tensor:
        """[len(tokens), vocab] logits of one forward over the whole prompt."""
        with torch.inference_mode():
            return self.theirs(torch.tensor([list(tokens)])).logits[0].float()

    def generated(self, tokens: Sequence[int], count: int) -> list[int]:
        prompt = torch.tensor([list(tokens)])
        out = self.theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, eos_token_id=None
        )
        return out[0, len(tokens) :].tolist()


def make_model(config: PretrainedConfig, seed: int = 0) -> Any:
    """A random float32 model whose every parameter matters: biases and norms are drawn too, not left at 0 and 1."""
    torch.manual_seed(seed)
    config = copy.deepcopy(config)
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    return model


def make_pair(name: str, folder: Path) -> Pair:
    model = make_model(CONFIGS[name])
    model.save_pretrained(folder)
    return Pair(folder, model)


Kernels = Literal["C", "torch"]
KERNELS: tuple[Kernels, ...] = ("C", "torch")


def make_backend(kernels: Kernels, max_tokens: int = 256) -> Backend:
    """Skips the test when there is no C compiler to make its kernels with."""
    if kernels == "torch":
        return ReferenceBackend()
    return CpuBackend(compiled_library(), 2, max_tokens=max_tokens, max_rows=LOGPROB_ROWS)


class RecordingSampler(Sampler):
    """Keeps the logits that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[Tensor] = []

    def sample(self, logits: Tensor, samples: Samples) -> Drawn:
        self.logits.append(logits.clone())
        return super().sample(logits, samples)


class CountingForward:
    """Passes everything on and remembers how many rows went through the head."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self.rows: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._forward, name)

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        self.rows.append(len(rows))
        return self._forward.logits(hidden, rows)


@dataclass
class Stream:
    """A sequence in the driver: its tokens, how many are computed, and its pages in no particular order."""

    tokens: list[int]
    pages: list[int]
    computed: int = 0
    logits: list[Tensor] = field(default_factory=list)
    """The logits that followed each of the steps."""


class Driver:
    """Composes batches by hand over a cache whose pages are handed out in shuffled order and start as NaN."""

    def __init__(
        self,
        path: Path,
        kernels: Kernels = "C",
        *,
        dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
        num_pages: int = 160,
        seed: int = 0,
    ) -> None:
        loaded = load_parameters(path, dtype or "auto")
        backend = make_backend(kernels)
        self.decoder = Decoder(loaded.part, loaded.parameters, backend.operators, loaded.dtype)
        self.cache = PagedKVCache(
            loaded.spec, num_pages, PAGE_TOKENS, kv_dtype or loaded.dtype, layout=backend.kv_layout
        )
        self.cache.pages.fill_(NAN_BYTE)
        self.sampler = RecordingSampler()
        self.forward = CountingForward(backend.forward(self.decoder, self.cache))
        self.runner = Runner(self.forward, PAGE_TOKENS, self.sampler)
        self._free = np.random.default_rng(seed).permutation(num_pages).tolist()
        self._step = 0

    def start(self, tokens: Sequence[int], max_len: int = 160) -> Stream:
        count = -(-max_len // PAGE_TOKENS)
        pages, self._free = self._free[:count], self._free[count:]
        return Stream(list(tokens), pages)

    def step(self, work: Sequence[tuple[Stream, int]]) -> StepOutput:
        """Runs the next `n` tokens of each stream and appends what was drawn where a stream is complete."""
        batch = self.batch(work)
        out = self.runner.run(batch)
        for index, ((stream, count), token) in enumerate(zip(work, out.token_ids, strict=True)):
            stream.computed += count
            stream.logits.append(self.sampler.logits[-1][index])
            if stream.computed == len(stream.tokens):
                stream.tokens.append(token)
        return out

    def batch(self, work: Sequence[tuple[Stream, int]]) -> Batch:
        """Every stream samples after its last token of the batch, so that all logits can be compared."""
        self._step += 1
        counts = [count for _, count in work]
        context = [stream.computed + count for stream, count in work]
        table = np.zeros((len(work), max(-(-length // PAGE_TOKENS) for length in context)), np.int32)
        for row, (stream, _) in enumerate(work):
            used = -(-context[row] // PAGE_TOKENS)
            table[row, :used] = stream.pages[:used]
        return Batch(
            step=self._step,
            sequence_ids=tuple(range(len(work))),
            token_ids=np.concatenate([s.tokens[s.computed : s.computed + n] for s, n in work]).astype(np.int64),
            positions=np.concatenate([np.arange(s.computed, s.computed + n) for s, n in work]).astype(np.int64),
            cu_seq_q=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
            context_lens=np.array(context, np.int32),
            page_table=table,
            samples=Samples.of(
                [SampleRow(row, GREEDY, seed=0, sample_index=0, position=length) for row, length in enumerate(context)]
            ),
        )


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()
