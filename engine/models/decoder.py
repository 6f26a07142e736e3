"""The one forward pass of all decoder families, built from a spec and its parameters.

Knows no Hugging Face name, no file and no scheduling: a flat axis of T tokens goes in, hidden states come out. Which
variant of norm, position, MLP or block a model has is read from its `ModelSpec`; all arithmetic is its operators'. Of a
model that several ranks share it has the part of one: what it adds to a residual is then summed over the ranks first.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.kernels.operators import (
    AttentionLayout,
    Embedding,
    Linear,
    Operators,
    QKNorm,
    Routing,
    StepAttention,
    Wanted,
)
from engine.kv.cache import PagedKVCache
from engine.models.mlp import MLP, DenseMLP, MixtureMLP
from engine.models.spec import Activation, ExpertsSpec, LearnedPositions
from engine.parallel.part import Part
from engine.quant.weights import Weight


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
    qk_norm: QKNorm | None
    out: Linear
    mlp_norm: Norm
    mlp: MLP


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What all layers of one forward pass share."""

    attention: StepAttention
    cos_sin: Tensor | None
    cache: PagedKVCache


class Decoder:
    """A decoder-only transformer (Vaswani et al., 2017; pre-norm, post-norm or parallel blocks).

    `forward` calls nothing but operators and views, so that it can run on tensors or be recorded as a program.
    """

    def __init__(
        self,
        part: Part,
        parameters: MutableMapping[str, Weight],
        operators: Operators,
        dtype: torch.dtype,
    ) -> None:
        """Takes every name of `part.parameters()` out of `parameters` as it prepares it.

        `dtype` is that of the activations, and of every parameter that is not quantized.
        """
        self.part = part
        self.spec = spec = part.spec
        self.dtype = dtype
        self._operators = operators
        self._parameters = parameters
        self._head, self._embed = self._prepare_ends()
        self._position = self._prepare_positions()
        self._project_in = self._optional_linear("project_in")
        self._project_out = self._optional_linear("project_out")
        self._layers = [self._layer(f"layers.{index}.") for index in range(spec.layers)]
        self._final_norm = self._norm("final_norm") if "final_norm.weight" in parameters else None
        assert not parameters, f"not used: {sorted(parameters)}"

    def forward(
        self,
        inputs: Tensor,
        layout: AttentionLayout,
        cos_sin: Tensor | None,
        cache: PagedKVCache,
        wanted: Wanted | None = None,
    ) -> Tensor:
        """[T] int64 token ids to [R, hidden] after the final norm; keys and values go to the layout's slots.

        Of a later stage the inputs are the [T, hidden] that the stage before it returned; of one that is not the last,
        the result is what the next one takes, all T of it.

        R are the `wanted` tokens, None being all T; the last layer makes keys and values of the others and no more.
        `cos_sin` is `Rope.cos_sin` of the layout, or None for a model without rotary positions. With projected
        embeddings the result is [R, embedding_dim], which is what `logits` takes.
        """
        hidden, residual = self._begin(inputs, layout), None
        step = Step(self._operators.attention(layout), cos_sin, cache)
        for index in range(self.spec.layers):
            q, residual = self._write(index, hidden, residual, step)
            if wanted is not None and index == self.spec.layers - 1:
                if not len(wanted.rows):
                    return hidden.new_empty(0, self.spec.embedding_dim or self.spec.hidden)
                q, residual = (self._operators.take_rows(values, wanted.rows) for values in (q, residual))
                step = replace(step, attention=self._operators.attention(wanted.layout))
            hidden, residual = self._finish(index, q, residual, step)
        return self._end(hidden, residual)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] rows of `forward` of the last stage to [R, vocab] float32, of the ids of `part.vocabulary` alone
        and then of those that pad it."""
        assert self._head is not None, "a stage that is not the last makes no logits"
        return self._head(hidden)

    def _begin(self, inputs: Tensor, layout: AttentionLayout) -> Tensor:
        """What the first of these layers takes."""
        if self._embed is None:
            return inputs
        # Rows of other ranks are zeros here: the sum finds the one that each token has.
        hidden = self._operators.sum_over_ranks(self._embed(inputs))
        if self._project_in is not None:
            hidden = self._project_in(hidden)
        return hidden if self._position is None else self._operators.add(hidden, self._position(layout.positions))

    def _end(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """What comes of the last of these layers."""
        if self._final_norm is not None:
            hidden, _ = self._final_norm(hidden, residual)
        elif residual is not None:
            hidden = self._operators.add(hidden, residual)
        return hidden if self._project_out is None else self._project_out(hidden)

    def _write(self, index: int, hidden: Tensor, residual: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        """A layer up to its keys and values, which it writes; returns the queries and the residual.

        Each addition to the residual is left to the next norm, which can fuse it; None is nothing to add.
        """
        layer = self._layers[index]
        if self.spec.block == "post":
            normed, residual = hidden, hidden
        else:
            normed, residual = layer.attention_norm(hidden, residual)
        k, v = step.cache.layer(index)
        return step.attention.write(layer.qkv(normed), step.cos_sin, k, v, layer.qk_norm), residual

    def _finish(self, index: int, q: Tensor, residual: Tensor, step: Step) -> tuple[Tensor, Tensor | None]:
        """The layer from its queries on; returns what it adds to the residual, and the residual."""
        layer, spec = self._layers[index], self.spec
        k, v = step.cache.layer(index)
        attended = step.attention.attend(q, k, v, scale=spec.scale, window=spec.window(index))
        attended, whole = layer.out(attended.view(len(q), -1)), self._operators.sum_over_ranks
        if spec.block == "post":
            hidden, _ = layer.attention_norm(whole(attended), residual)
            return layer.mlp_norm(whole(layer.mlp(hidden)), hidden)[0], None
        if spec.block == "parallel":
            normed, _ = layer.mlp_norm(residual)
            return whole(self._operators.add(attended, layer.mlp(normed))), residual
        normed, residual = layer.mlp_norm(whole(attended), residual)
        return whole(layer.mlp(normed)), residual

    # -- preparation, once ---------------------------------------------------------------------------------------------

    def _prepare_ends(self) -> tuple[Linear | None, Embedding | None]:
        """The head of a last stage, the embeddings of a first one."""
        prepare, here, place = self._operators, self.part.vocabulary, self.part.place
        held = None if len(here) == self.spec.vocab_size else here
        if self.spec.tied_embeddings and (place.is_first or place.is_last):
            table = prepare.linear(self._take("embed.weight"), out_dtype=torch.float32)
            embed = prepare.tied_embedding(table, self.dtype, held) if place.is_first else None
            return table if place.is_last else None, embed
        embed = prepare.embedding(self._take_dense("embed.weight"), held) if place.is_first else None
        head = prepare.linear(self._take("head.weight"), out_dtype=torch.float32) if place.is_last else None
        return head, embed

    def _prepare_positions(self) -> Embedding | None:
        positions = self.spec.positions
        if not isinstance(positions, LearnedPositions) or not self.part.place.is_first:
            return None
        return self._operators.embedding(self._take_dense("position.weight")[positions.offset :])

    def _layer(self, prefix: str) -> Layer:
        spec = self.spec
        return Layer(
            attention_norm=self._norm(prefix + "attention_norm"),
            qkv=self._linear(prefix + "qkv"),
            qk_norm=self._qk_norm(prefix) if spec.qk_norm else None,
            out=self._linear(prefix + "out"),
            mlp_norm=self._norm(prefix + "mlp_norm"),
            mlp=self._dense_mlp(prefix + "mlp") if spec.experts is None else self._mixture(prefix, spec.experts),
        )

    def _dense_mlp(self, name: str) -> DenseMLP:
        activation, gated = self.spec.activation, self.spec.gated_mlp
        return DenseMLP(
            self._operators,
            inner=self._linear(f"{name}_in", gate=activation if gated else None),
            activation=None if gated else activation,
            outer=self._linear(f"{name}_out"),
        )

    def _mixture(self, prefix: str, experts: ExpertsSpec) -> MixtureMLP:
        prepare, held = self._operators.expert_linear, self.part.experts
        inner = prepare(self._take(f"{prefix}experts_in.weight"), len(held), gate=self.spec.activation)
        outer = prepare(self._take(f"{prefix}experts_out.weight"), len(held), out_dtype=torch.float32)
        routing = Routing(experts.count, experts.per_token, experts.renormalised, held)
        return MixtureMLP(
            self._operators,
            router=self._scores(f"{prefix}router"),
            experts=self._operators.experts(routing, inner, outer),
            shared=self._dense_mlp(f"{prefix}shared") if experts.shared_intermediate else None,
            shared_gate=self._scores(f"{prefix}shared_gate") if experts.shared_gate else None,
        )

    def _scores(self, name: str) -> Linear:
        """A linear layer whose results decide how much others count: they keep their digits."""
        return self._operators.linear(self._take(f"{name}.weight"), out_dtype=torch.float32)

    def _norm(self, name: str) -> Norm:
        weight = self._take_dense(f"{name}.weight")
        return Norm(self._operators, weight, self._take_bias(name), self.spec.norm_eps)

    def _qk_norm(self, prefix: str) -> QKNorm:
        q_weight, k_weight = (self._take_dense(f"{prefix}{name}.weight") for name in ("q_norm", "k_norm"))
        return QKNorm(q_weight, k_weight, self.spec.norm_eps)

    def _linear(self, name: str, gate: Activation | None = None) -> Linear:
        return self._operators.linear(self._take(f"{name}.weight"), self._take_bias(name), gate=gate)

    def _optional_linear(self, name: str) -> Linear | None:
        return self._linear(name) if f"{name}.weight" in self._parameters else None

    def _take(self, name: str) -> Weight:
        return self._parameters.pop(name)

    def _take_dense(self, name: str) -> Tensor:
        weight = self._take(name)
        assert isinstance(weight, Tensor), f"{name} cannot be quantized"
        return weight

    def _take_bias(self, name: str) -> Tensor | None:
        return self._take_dense(f"{name}.bias") if f"{name}.bias" in self._parameters else None
