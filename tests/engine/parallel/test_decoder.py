"""Where a decoder sums over ranks: as rarely as its blocks allow, and never where a rank is alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.forward import CpuBackend, EagerForward
from engine.kernels.cpu.program import Target
from engine.kernels.reference import ReferenceOperators
from engine.kv.cache import PagedKVCache
from engine.models.decoder import Decoder
from engine.models.loader import load_parameters
from engine.parallel.place import Place
from engine.parallel.slices import TensorRank
from engine.runner import layout_of
from tests.compiled import compiled_library
from tests.engine.models.harness import CONFIGS, PAGE_TOKENS, Driver, make_model, random_tokens


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def get(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        make_model(CONFIGS[name]).save_pretrained(folder)
        return folder

    return get


@pytest.mark.parametrize(
    ("name", "place", "sums"),
    [
        ("llama", Place(0, 1, range(2), TensorRank(0, 2)), 1 + 2 * 2),
        ("llama", Place(1, 2, range(1, 2), TensorRank(0, 2)), 2),
        ("opt-350m", Place(0, 1, range(2), TensorRank(1, 2)), 1 + 2 * 2),
        ("neox", Place(0, 1, range(2), TensorRank(0, 2)), 1 + 2),
        ("neox-sequential", Place(0, 1, range(2), TensorRank(1, 4)), 1 + 2 * 2),
        ("qwen2-moe", Place(0, 1, range(2), TensorRank(0, 2, 2)), 1 + 2 * 2),
    ],
)
def test_a_layer_is_summed_after_attention_and_after_the_mlp_or_once_for_both(
    name: str, place: Place, sums: int, model_of: Callable[[str], Path]
) -> None:
    """And token embeddings once: shapes and numbers of sums are the same on every rank."""
    path, summed = model_of(name), []

    def count(x: Tensor) -> Tensor:
        summed.append(x.shape)
        return x

    loaded = load_parameters(path, place=place)
    decoder = Decoder(loaded.part, loaded.parameters, ReferenceOperators(count), loaded.dtype)
    forward = EagerForward(decoder, PagedKVCache(loaded.spec, 8, PAGE_TOKENS, loaded.dtype))
    driver = Driver(path, "torch", num_pages=8)
    batch = driver.batch([(driver.start(random_tokens(9), max_len=32), 9)])
    inputs = torch.from_numpy(batch.token_ids) if place.is_first else torch.randn(9, loaded.spec.hidden)
    forward.hidden(inputs, layout_of(batch, PAGE_TOKENS, torch.device("cpu")))
    assert len(summed) == sums
    assert all(shape[0] == 9 for shape in summed)


def test_a_program_of_one_rank_holds_no_sum(model_of: Callable[[str], Path]) -> None:
    class Never:
        def sum(self, target: Target, x: Tensor) -> Tensor:
            raise AssertionError("there is nobody to sum with")

    loaded = load_parameters(model_of("llama"))
    backend = CpuBackend(compiled_library(), 1, max_tokens=16, max_rows=4)
    decoder = Decoder(loaded.part, loaded.parameters, backend.operators, loaded.dtype)
    forward = backend.forward(decoder, PagedKVCache(loaded.spec, 8, 16, loaded.dtype, layout=backend.kv_layout))
    assert [note.name for note in forward.program.notes if "ranks" in note.name] == []
    with_ranks = CpuBackend(compiled_library(), 1, max_tokens=16, max_rows=4, ranks=Never())
    loaded = load_parameters(model_of("llama"))
    decoder = Decoder(loaded.part, loaded.parameters, with_ranks.operators, loaded.dtype)
    with pytest.raises(AssertionError, match="nobody"):
        with_ranks.forward(decoder, PagedKVCache(loaded.spec, 8, 16, loaded.dtype, layout=with_ranks.kv_layout))
