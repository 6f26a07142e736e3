"""The random models of the benchmarks: deterministic, loadable, and of the sizes they claim."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import models
from benchmarks.models import Shape

SHAPE = Shape(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    intermediate_size=80,
    vocab_size=400,
)


def written(directory: Path, seed: int = 0) -> Path:
    directory.mkdir()
    models.write(directory, SHAPE, seed=seed)
    return directory


def test_the_sizes_are_those_of_the_published_models() -> None:
    assert models.SHAPES["s135m"].num_parameters == 134_515_008
    assert models.SHAPES["m1b"].num_parameters == 1_235_814_400


def test_hugging_face_loads_every_tensor_and_generates(tmp_path: Path) -> None:
    path = written(tmp_path / "model")
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert model.num_parameters() == SHAPE.num_parameters
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    output = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert output.shape == (1, 7)


def test_weights_have_their_scale_and_are_fixed_by_the_seed(tmp_path: Path) -> None:
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        path = written(tmp_path / name, seed)
        digests.append(hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]
    with safe_open(tmp_path / "a" / "model.safetensors", framework="pt") as file:
        embedding = file.get_tensor("model.embed_tokens.weight")
        assert embedding.dtype == torch.bfloat16
        assert embedding.float().std().item() == pytest.approx(models.WEIGHT_STD, rel=0.05)
        assert torch.equal(file.get_tensor("model.norm.weight").float(), torch.ones(48))


def test_the_tokenizer_round_trips_text_and_knows_every_id(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(written(tmp_path / "model"))
    text = "Grüße, 你好 🙂\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text.encode())
    assert len({tokenizer.decode([token]) for token in range(259, 400)}) == 400 - 259
    assert tokenizer.eos_token_id == 1


def test_a_model_is_made_once_and_an_interrupted_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANTA_MODELS", str(tmp_path / "cache"))
    monkeypatch.setitem(models.SHAPES, "mini", SHAPE)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models, "_write_weights", interrupted)
        with pytest.raises(KeyboardInterrupt):
            models.ensure("mini")
    assert list((tmp_path / "cache").iterdir()) == []
    path = models.ensure("mini")
    stamp = (path / "model.safetensors").stat().st_mtime_ns
    assert models.ensure("mini") == path
    assert (path / "model.safetensors").stat().st_mtime_ns == stamp
    assert models.vocab_size(path) == 400
    with monkeypatch.context() as patch:
        patch.setattr(models, "MAX_POSITIONS", 99)
        assert json.loads((models.ensure("mini") / "config.json").read_text())["max_position_embeddings"] == 99
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["mini"]
    with pytest.raises(SystemExit, match="neither one of"):
        models.find(str(tmp_path / "nothing"))
