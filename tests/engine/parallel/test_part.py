"""What ranks read of a checkpoint: all of it together, each its own share and not more, in every form of weights."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.errors import ModelError
from engine.models.loader import LoadedModel, load_parameters
from engine.parallel.part import Part
from engine.parallel.place import Place
from engine.parallel.slices import TensorRank
from engine.quant.plan import is_layer_linear
from engine.quant.quantize import quantize_int8
from engine.quant.weights import Int4Weight, Int8Weight, Weight
from tests.engine.models.harness import CONFIGS
from tests.engine.parallel.pool import Cut
from tests.engine.quant import checkpoints
from tests.engine.quant.checkpoints import PER_TOKEN, WEIGHTS_4, WEIGHTS_8, Recipe, awq, compressed, gptq, packed

CUTS = [Cut(1), Cut(2), Cut(4), Cut(1, 2), Cut(2, 2)]


def parts_of(path: Path, cut: Cut, layers: int = 2, **form: object) -> Iterator[tuple[Place, LoadedModel]]:
    for place in cut.places(layers):
        yield place, load_parameters(path, place=place, **form)


def dense(weight: Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.dequantize()


def cut_out(whole: Tensor, part: Part, own: str) -> Tensor:
    """The slice of the rank, of a parameter as one rank has it."""
    held = dict(part.parameters())[own].slice
    rows = torch.cat([torch.arange(run.start, run.end) for run in held.rows] or [torch.arange(0)])
    found = whole[rows]
    if held.columns is not None:
        found = torch.cat([found[:, run.start : run.end] for run in held.columns], dim=1)
    padding = found.new_zeros(held.padding, *found.shape[1:])
    return torch.cat([found, padding])


@pytest.mark.parametrize("cut", [*CUTS, Cut(2, 1, 2), Cut(4, 2, 2)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_hold_their_slices_and_together_everything(name: str, cut: Cut, model_of: Callable[[str], Path]) -> None:
    if cut.expert > 1 and CONFIGS[name].to_dict().get("num_local_experts", 8) % 2:
        pytest.skip("an odd number of experts")
    if cut.expert > 1 and "mixtral" not in name and "moe" not in name:
        pytest.skip("no experts")
    whole = dict(load_parameters(model_of(name)).parameters)
    seen = {key: torch.zeros_like(value) for key, value in whole.items()}
    for _, loaded in parts_of(model_of(name), cut):
        for own, held in loaded.part.parameters():
            found = loaded.parameters[own]
            assert torch.equal(found, cut_out(whole[held.name], loaded.part, own)), (own, held)
            rows = [row for run in held.slice.rows for row in range(run.start, run.end)]
            columns = slice(None)
            if held.slice.columns is not None:
                (run,) = held.slice.columns
                columns = slice(run.start, run.end)
            target = seen[held.name]
            if target.dim() == 1:
                target[rows] += 1
            else:
                target[rows, columns] += 1
        assert sorted(loaded.parameters) == sorted(own for own, _ in loaded.part.parameters())
    for key, count in seen.items():
        assert (count >= 1).all(), key
        if key.endswith(("out.bias", "mlp_out.bias")):
            assert (count == 1).all(), f"{key} would be added {int(count.max())} times"


class Counter:
    """Bytes of tensors that have been read from files."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def during(self, work: Callable[[], object]) -> int:
        before = self.num_bytes
        work()
        return self.num_bytes - before


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter:
    counter, preadv = Counter(), os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        counter.num_bytes += count
        return count

    monkeypatch.setattr(os, "preadv", counting)
    return counter


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "opt-350m", "neox", "mixtral", "qwen2-moe"])
@pytest.mark.parametrize("cut", [Cut(2), Cut(1, 2), Cut(2, 2)], ids=str)
def test_a_rank_reads_no_byte_of_others(name: str, cut: Cut, model_of: Callable[[str], Path], reads: Counter) -> None:
    total = 0
    for _, loaded in parts_of(model_of(name), cut):
        held = 0
        for _, (_, kept) in loaded.part.parameters():
            rows, *columns = kept.shape
            held += 4 * math.prod((rows - kept.padding, *columns))
        assert reads.during(lambda loaded=loaded: dict(loaded.parameters)) == held
        total += held
    file = sum(tensor.nbytes for tensor in load_file(model_of(name) / "model.safetensors").values())
    assert total < 1.4 * file, "norms, routers, positions and a tied table are all that is read twice"


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
@pytest.mark.parametrize("name", ["LLAMA", "NEOX", "GPT2", "MIXTRAL", "QWEN_MOE"])
def test_parts_are_quantized_as_the_whole_is(name: str, scheme: str, tmp_path: Path) -> None:
    """In 4 bits no group is cut. In 8 bits a row that is cut has a scale of its own part."""
    checkpoints.random_model(getattr(checkpoints, name)).save_pretrained(tmp_path)
    cut = Cut(2, 2, 2 if name in ("MIXTRAL", "QWEN_MOE") else 1)
    full = dict(load_parameters(tmp_path).parameters)
    whole = dict(load_parameters(tmp_path, quantization=scheme, group=32).parameters)
    kinds = set()
    for _, loaded in parts_of(tmp_path, cut, quantization=scheme, group=32):
        for own, held in loaded.part.parameters():
            found = loaded.parameters[own]
            kinds.add(type(found))
            assert type(found) is type(whole[held.name]), own
            expected = cut_out(dense(whole[held.name]), loaded.part, own)
            if isinstance(found, Int8Weight):
                expected = quantize_int8(cut_out(dense(full[held.name]), loaded.part, own)).dequantize()
            assert torch.equal(dense(found), expected), own
    assert (Int4Weight if scheme == "w4a16" else Int8Weight) in kinds


def int8_tensors(linear: checkpoints.Quantized) -> dict[str, Tensor]:
    values = torch.from_numpy(linear.codes - 8).to(torch.int8)
    return {"weight": values, "weight_scale": linear.scale[:, :1].clone()}


RECIPES = {
    "gptq": Recipe({"quant_method": "gptq", "bits": 4, "group_size": 32}, gptq, symmetric=False),
    "gptq of all channels": Recipe({"quant_method": "gptq", "bits": 4, "group_size": -1}, gptq, group=-1),
    "gptq neox": Recipe(
        {"quant_method": "gptq", "bits": 4, "group_size": 32}, gptq, symmetric=False, config=checkpoints.NEOX
    ),
    "gptq gpt2": Recipe(
        {"quant_method": "gptq", "bits": 4, "group_size": 32}, gptq, symmetric=False, config=checkpoints.GPT2
    ),
    "awq": Recipe({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq, symmetric=False),
    "packed": Recipe(compressed("pack-quantized", WEIGHTS_4), lambda linear: packed(linear, symmetric=True)),
    "int8": Recipe(compressed("int-quantized", WEIGHTS_8, PER_TOKEN), int8_tensors, group=-1),
}


@pytest.mark.parametrize("cut", [Cut(2), Cut(1, 2), Cut(2, 2)], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_checkpoints_that_are_quantized_are_cut_without_loss(
    recipe: str, cut: Cut, tmp_path: Path, reads: Counter
) -> None:
    path, _ = checkpoints.write_pair(RECIPES[recipe], tmp_path)
    whole = load_parameters(path).parameters
    num_bytes = reads.during(lambda: take_layers(whole))
    assert any(not isinstance(weight, Tensor) for weight in whole.values())
    for place, loaded in parts_of(path, cut):
        # Beside its share, a rank looks at the order of all channels.
        assert reads.during(lambda loaded=loaded: take_layers(loaded.parameters)) < 1.25 * num_bytes / place.world
        for own, held in loaded.part.parameters():
            found = loaded.parameters[own]
            assert type(found) is type(whole[held.name])
            assert torch.equal(dense(found), cut_out(dense(whole[held.name]), loaded.part, own)), own


def take_layers(parameters: Mapping[str, Weight]) -> None:
    for name in filter(is_layer_linear, parameters):
        parameters[name]


def test_channels_that_are_out_of_order_are_cut_into_stages_only(tmp_path: Path) -> None:
    recipe = Recipe({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, gptq, act_order=True)
    path, _ = checkpoints.write_pair(recipe, tmp_path)
    for _, loaded in parts_of(path, Cut(1, 2)):
        dict(loaded.parameters)
    _, loaded = next(parts_of(path, Cut(2)))
    with pytest.raises(ModelError, match="act-order") as raised:
        dict(loaded.parameters)
    assert str(path / "model.safetensors") in str(raised.value)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (Place(0, 2, range(2)), "stage 0 of 2 cannot have range"),
        (Place(1, 2, range(2)), "stage 1 of 2 cannot have range"),
        (Place(0, 1, range(3)), "the model has 2"),
        (Place(0, 1, range(2), TensorRank(0, 3)), "4 heads cannot be divided among 3 ranks"),
    ],
)
def test_places_that_the_model_has_no_part_for_are_refused(
    place: Place, said: str, model_of: Callable[[str], Path]
) -> None:
    with pytest.raises(ValueError, match=said):
        load_parameters(model_of("llama"), place=place)


def test_places_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="stage 2 of 2"):
        Place(2, 2, range(1))
    with pytest.raises(ValueError, match="expected consecutive ones"):
        Place(0, 2, range(0))


def test_ranks_are_numbered_stage_by_stage_and_one_answers() -> None:
    places = Cut(2, 3).places(6)
    assert [place.rank for place in places] == list(range(6)) == list(range(places[0].world))
    assert [place.rank for place in places if place.answers] == [4]


def test_the_own_model_of_a_rank_has_its_heads_and_windows(model_of: Callable[[str], Path]) -> None:
    whole = load_parameters(model_of("qwen2-window")).spec
    spec = Part(whole, Place(1, 2, range(1, 2), TensorRank(1, 4))).spec
    assert (spec.layers, spec.heads, spec.kv_heads, spec.windows) == (1, 1, 1, whole.windows[1:])
    assert Part.all_of(whole).spec == whole
