"""The one forward pass of all decoder families, built from a spec and its parameters.

Knows no Hugging Face name, no file and no scheduling: a flat axis of T tokens goes in, hidden states come out. Which
variant of norm, position, MLP or block a model has is read from its `ModelSpec`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import AttentionLayout, Operators, ReferenceOperators, StepAttention
from engine.kv.cache import PagedKVCache
from engine.models.rope import Rope
from engine.models.spec import LearnedPositions, ModelSpec


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """`x @ weight.T + bias`. Packed and quantized weights are other nouns with this call."""

    weight: Tensor
    """[out, in]."""
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """RMSNorm without a bias, LayerNorm with one."""

    operators: Operators
    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalises `x + residual`; returns the normalised values and the sum."""
        if self.bias is None:
            return self.operators.rms_norm(x, self.weight, self.eps, residual)
        return self.operators.layer_norm(x, self.weight, self.bias, self.eps, residual)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer's parameters."""

    attention_norm: Norm
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    out: Linear
    mlp_norm: Norm
    mlp_in: Linear
    mlp_out: Linear


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What all layers of one forward pass share."""

    attention: StepAttention
    cos_sin: Tensor | None
    cache: PagedKVCache


class Decoder:
    """A decoder-only transformer (Vaswani et al., 2017; pre-norm, post-norm or parallel blocks)."""

    def __init__(self, spec: ModelSpec, parameters: Mapping[str, Tensor], operators: Operators | None = None) -> None:
        """`parameters` holds every name of `spec.parameter_shapes()`, of one dtype, on one device; not copied."""
        self.spec = spec
        self.num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())
        self._operators = operators or ReferenceOperators()
        self._embed = parameters["embed.weight"]
        self._position = parameters.get("position.weight")
        self._project_in = self._optional_linear(parameters, "project_in")
        self._project_out = self._optional_linear(parameters, "project_out")
        self._layers = [self._layer(parameters, f"layers.{index}.") for index in range(spec.layers)]
        self._final_norm = self._norm(parameters, "final_norm") if spec.final_norm else None
        self._head = Linear(self._embed if spec.tied_embeddings else parameters["head.weight"])
        self._rope = None if isinstance(spec.positions, LearnedPositions) else Rope(spec.positions, self.device)

    @property
    def dtype(self) -> torch.dtype:
        return self._embed.dtype

    @property
    def device(self) -> torch.device:
        return self._embed.device

    def forward(self, token_ids: Tensor, layout: AttentionLayout, cache: PagedKVCache) -> Tensor:
        """[T] int64 token ids to [T, hidden] after the final norm; keys and values go to the layout's slots.

        With projected embeddings the result is [T, embedding_dim], which is what `logits` takes.
        """
        hidden = F.embedding(token_ids, self._embed)
        if self._project_in is not None:
            hidden = self._project_in(hidden)
        if isinstance(self.spec.positions, LearnedPositions):
            assert self._position is not None
            hidden = hidden + F.embedding(layout.positions + self.spec.positions.offset, self._position)
        cos_sin = None if self._rope is None else self._rope.cos_sin(layout.positions, layout.contexts)
        step = Step(self._operators.attention(layout), cos_sin, cache)
        hidden = self._run_post(hidden, step) if self.spec.block == "post" else self._run_pre(hidden, step)
        return hidden if self._project_out is None else self._project_out(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] rows of `forward` to [R, vocab] float32."""
        return self._head(hidden).to(torch.float32)

    def _run_pre(self, hidden: Tensor, step: Step) -> Tensor:
        """Pre-norm and parallel blocks; each addition to the residual is left to the next norm, which can fuse it."""
        residual = None
        for index, layer in enumerate(self._layers):
            normed, residual = layer.attention_norm(hidden, residual)
            attended = self._attend(index, normed, step)
            if self.spec.block == "parallel":
                normed, _ = layer.mlp_norm(residual)
                hidden = attended + self._mlp(layer, normed)
            else:
                normed, residual = layer.mlp_norm(attended, residual)
                hidden = self._mlp(layer, normed)
        if self._final_norm is not None:
            return self._final_norm(hidden, residual)[0]
        return hidden if residual is None else hidden + residual

    def _run_post(self, hidden: Tensor, step: Step) -> Tensor:
        for index, layer in enumerate(self._layers):
            hidden, _ = layer.attention_norm(self._attend(index, hidden, step), hidden)
            hidden, _ = layer.mlp_norm(self._mlp(layer, hidden), hidden)
        return hidden if self._final_norm is None else self._final_norm(hidden)[0]

    def _attend(self, index: int, x: Tensor, step: Step) -> Tensor:
        layer, spec = self._layers[index], self.spec
        k_pages, v_pages = step.cache.layer(index)
        qkv = layer.qkv(x)
        if layer.q_norm is not None and layer.k_norm is not None:
            heads = qkv.view(len(x), -1, spec.head_dim)
            queries, keys, _ = heads.split((spec.heads, spec.kv_heads, spec.kv_heads), dim=1)
            queries.copy_(layer.q_norm(queries)[0])
            keys.copy_(layer.k_norm(keys)[0])
        q = step.attention.write(qkv, step.cos_sin, k_pages, v_pages)
        attended = step.attention.attend(q, k_pages, v_pages, scale=spec.scale, window=spec.window(index))
        return layer.out(attended.view(len(x), -1))

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        act = self._operators.gate if self.spec.gated_mlp else self._operators.activate
        return layer.mlp_out(act(layer.mlp_in(x), self.spec.activation))

    def _layer(self, parameters: Mapping[str, Tensor], prefix: str) -> Layer:
        has_qk_norm = self.spec.qk_norm
        return Layer(
            attention_norm=self._norm(parameters, prefix + "attention_norm"),
            qkv=self._linear(parameters, prefix + "qkv"),
            q_norm=self._norm(parameters, prefix + "q_norm") if has_qk_norm else None,
            k_norm=self._norm(parameters, prefix + "k_norm") if has_qk_norm else None,
            out=self._linear(parameters, prefix + "out"),
            mlp_norm=self._norm(parameters, prefix + "mlp_norm"),
            mlp_in=self._linear(parameters, prefix + "mlp_in"),
            mlp_out=self._linear(parameters, prefix + "mlp_out"),
        )

    def _norm(self, parameters: Mapping[str, Tensor], name: str) -> Norm:
        return Norm(self._operators, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"), self.spec.norm_eps)

    def _linear(self, parameters: Mapping[str, Tensor], name: str) -> Linear:
        return Linear(parameters[f"{name}.weight"], parameters.get(f"{name}.bias"))

    def _optional_linear(self, parameters: Mapping[str, Tensor], name: str) -> Linear | None:
        return self._linear(parameters, name) if f"{name}.weight" in parameters else None
