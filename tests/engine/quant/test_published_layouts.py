"""Layers as the published quantizers write them mean here what they mean there, down to the C kernels.

The packers below follow what AutoGPTQ, GPTQModel and AutoAWQ do to a layer, step by step from its full weight, and
share nothing with what reads them.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from engine.kernels.cpu.linear import pack_linear
from engine.kernels.cpu.program import Immediate
from engine.models.loader import load_parameters
from engine.models.weights import Checkpoint
from engine.quant.config import read_quantization
from engine.quant.formats import QuantizedLinear, read_linear
from engine.quant.weights import Int4Weight
from tests.compiled import compiled_library
from tests.engine.models import harness
from tests.engine.models.harness import Driver
from tests.engine.quant.checkpoints import LLAMA, Recipe, gptq, write_pair

OUT, IN, GROUP = 48, 128, 32
AWQ_CHANNELS = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ's order_map: the output channel, of eight, in each nibble of a word from the lowest on."""
WORDS_OF_ONES = np.uint32(0x11111111)

Words = NDArray[np.uint32]
Codes = NDArray[np.int64]
Packer = Callable[["Layer"], dict[str, Tensor]]


class Layer:
    """A full weight [out, in] that a quantizer has put on a grid, and the grid: column i belongs to group_of[i]."""

    def __init__(self, *, lowest_zero: int = 1, act_order: bool = False, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.scale = rng.uniform(0.01, 0.05, (OUT, IN // GROUP)).astype(np.float16)
        self.zero = rng.integers(lowest_zero, 16, (OUT, IN // GROUP))
        self.group_of = np.arange(IN) // GROUP
        if act_order:
            self.group_of = self.group_of[np.argsort(rng.permutation(IN))]
        codes = rng.integers(0, 16, (OUT, IN))
        centred = (codes - self.zero[:, self.group_of]).astype(np.float32)
        self.weight = centred * self.scale.astype(np.float32)[:, self.group_of]

    def codes(self) -> Codes:
        """[in, out]: what every packer computes first, from the weight, the scales and the zero points."""
        scale = self.scale.astype(np.float32)[:, self.group_of]
        shifted = self.weight + self.zero[:, self.group_of] * scale
        return np.rint(shifted / scale).astype(np.int64).T


def ored(nibbles: Codes, channels: tuple[int, ...] = tuple(range(8))) -> Words:
    """[rows, 8 n] to [rows, n]: each word gets `value << 4 * place` for each of its eight values, one after the other.

    A value below 0 sets every bit from its place up, as it does in the packers.
    """
    words = np.zeros((len(nibbles), nibbles.shape[1] // 8), np.uint32)
    for column in range(words.shape[1]):
        for place, channel in enumerate(channels):
            words[:, column] |= nibbles[:, 8 * column + channel].astype(np.uint32) << np.uint32(4 * place)
    return words


def tensor(words: Words) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int32))


def gptq_tensors(layer: Layer, zero_words: Words) -> dict[str, Tensor]:
    return {
        "qweight": tensor(ored(layer.codes().T).T),
        "qzeros": tensor(zero_words),
        "scales": torch.from_numpy(layer.scale.T.copy()),
        "g_idx": torch.from_numpy(layer.group_of.astype(np.int32)),
    }


def autogptq(layer: Layer) -> dict[str, Tensor]:
    """Zero points lose 1 before they are packed."""
    return gptq_tensors(layer, ored(layer.zero.T - 1))


def gptqmodel_v2(layer: Layer) -> dict[str, Tensor]:
    return gptq_tensors(layer, ored(layer.zero.T))


def gptqmodel_v1(layer: Layer) -> dict[str, Tensor]:
    """Zero points are packed as they are; then every word, as one number, loses 1 in each nibble, borrows and all."""
    return gptq_tensors(layer, ored(layer.zero.T) - WORDS_OF_ONES)


def autoawq(layer: Layer) -> dict[str, Tensor]:
    return {
        "qweight": tensor(ored(layer.codes(), AWQ_CHANNELS)),
        "qzeros": tensor(ored(layer.zero.T, AWQ_CHANNELS)),
        "scales": torch.from_numpy(layer.scale.T.copy()),
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False}
GPTQ_V2 = {**GPTQ, "checkpoint_format": "gptq_v2"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
WRITERS: dict[str, tuple[dict[str, Any], Packer, Layer]] = {
    "AutoGPTQ": (GPTQ, autogptq, Layer()),
    "AutoGPTQ desc_act": ({**GPTQ, "desc_act": True}, autogptq, Layer(act_order=True)),
    "GPTQModel, gptq_v2": (GPTQ_V2, gptqmodel_v2, Layer(lowest_zero=0)),
    "GPTQModel, gptq_v2, desc_act": (GPTQ_V2, gptqmodel_v2, Layer(lowest_zero=0, act_order=True)),
    "GPTQModel, gptq": (GPTQ, gptqmodel_v1, Layer()),
    "AutoAWQ": (AWQ, autoawq, Layer(lowest_zero=0)),
}


def read(declared: dict[str, Any], tensors: dict[str, Tensor], folder: Path, rows: int = OUT) -> Int4Weight:
    """The layer of a checkpoint file that holds nothing else."""
    save_file({f"layer.{name}": value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    layout = read_quantization({"quantization_config": declared})
    assert layout is not None
    weight = read_linear(layout, Checkpoint(folder), QuantizedLinear("layer", rows, IN))
    assert isinstance(weight, Int4Weight)
    return weight


@pytest.mark.parametrize("writer", WRITERS)
def test_a_layer_is_read_as_it_was_before_it_was_packed(writer: str, tmp_path: Path) -> None:
    declared, pack, layer = WRITERS[writer]
    weight = read(declared, pack(layer), tmp_path)
    assert (weight.order is not None) == ("desc_act" in writer)
    torch.testing.assert_close(weight.dequantize(), torch.from_numpy(layer.weight), rtol=1e-6, atol=1e-7)


def test_a_zero_point_of_0_borrows_from_its_neighbour(tmp_path: Path) -> None:
    layer = Layer(lowest_zero=0)
    assert (layer.zero == 0).any()
    weight = read(GPTQ, gptqmodel_v1(layer), tmp_path)
    assert weight.zero is not None
    assert weight.zero.tolist() == layer.zero.tolist()


def test_words_of_well_known_checkpoints(tmp_path: Path) -> None:
    """Symmetric GPTQ files hold 2004318071 in every word of qzeros: sevens, which mean eight."""
    counting = torch.full((IN, 1), 0x76543210, dtype=torch.int32)
    group_index = torch.arange(IN, dtype=torch.int32) // GROUP
    tensors = {
        "qweight": torch.full((IN // 8, 8), 0x76543210, dtype=torch.int32),
        "qzeros": torch.full((IN // GROUP, 1), 2004318071, dtype=torch.int32),
        "scales": torch.ones(IN // GROUP, 8, dtype=torch.float16),
    }
    found = read({**GPTQ, "sym": True}, tensors | {"g_idx": group_index}, tmp_path, rows=8)
    assert found.zero is None
    # Along the input channels in GPTQ ...
    assert found.dequantize()[3].tolist() == [column % 8 - 8 for column in range(IN)]
    # ... and along the output channels, interleaved, in AWQ.
    shuffled = torch.full((IN, 1), 0x75316420, dtype=torch.int32)
    awq = {**tensors, "qzeros": torch.zeros(IN // GROUP, 1, dtype=torch.int32)}
    assert read(AWQ, awq | {"qweight": shuffled}, tmp_path, rows=8).dequantize()[:, 5].tolist() == list(range(8))
    assert read(AWQ, awq | {"qweight": counting}, tmp_path, rows=8).dequantize()[:, 5].tolist() == [
        0, 4, 1, 5, 2, 6, 3, 7,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 19])
@pytest.mark.parametrize("writer", WRITERS)
def test_the_c_kernel_multiplies_by_the_layer(writer: str, rows: int, dtype: torch.dtype, tmp_path: Path) -> None:
    library = compiled_library()
    declared, pack, layer = WRITERS[writer]
    weight = read(declared, pack(layer), tmp_path)
    x = torch.randn(rows, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = pack_linear(Immediate(library, 2), weight, out_dtype=torch.float32)(x)
    exact = x.double() @ torch.from_numpy(layer.weight).double().T
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-4)


DESC_ACT = Recipe(
    {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": True,
        "checkpoint_format": "gptq_v2",
    },
    partial(gptq, version=2),
    symmetric=False,
    act_order=True,
    config=LLAMA,
)


@pytest.fixture
def desc_act(tmp_path: Path) -> tuple[Path, Path]:
    """A model with act-order, and the dense one that it stands for."""
    return write_pair(DESC_ACT, tmp_path)


def logits(path: Path, kernels: harness.Kernels) -> Tensor:
    """[steps, vocab] float32 logits after a prompt and after each of the tokens that follow it."""
    driver = Driver(path, kernels, dtype=torch.float32)
    stream = driver.start([5, 17, 3, 44, 8, 61, 90, 12, 7, 33, 2])
    driver.step([(stream, 11)])
    for token in (21, 4, 80):
        # What comes next is given: a tie that rounds the other way must not send the two apart.
        stream.tokens[-1] = token
        driver.step([(stream, 1)])
    return torch.stack(stream.logits)


def test_a_model_with_act_order_runs_in_c_as_its_dense_twin(desc_act: tuple[Path, Path]) -> None:
    quantized, dense = desc_act
    torch.testing.assert_close(logits(quantized, "C"), logits(dense, "torch"), rtol=1e-3, atol=2e-3)


def test_a_head_in_4_bits_beside_act_order_is_the_references(
    desc_act: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized, _ = desc_act
    asked = partial(load_parameters, quantization="w4a16")
    assert isinstance(asked(quantized).parameters["head.weight"], Int4Weight)
    monkeypatch.setattr(harness, "load_parameters", asked)
    torch.testing.assert_close(logits(quantized, "C"), logits(quantized, "torch"), rtol=2e-3, atol=2e-2)
