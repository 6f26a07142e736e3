"""Result files: torn lines, fingerprints, and one writer at a time."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.result_file import ResultFile, ResultFileError


def result(name: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "fingerprint": f"f-{name}", **(fields or {"text": "été \u2028 \n"})}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().decode().split("\n") if line]


def test_a_new_file_takes_results_and_each_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ResultFile(path) as results:
        assert results.finished == {}
        results.append(result("a"))
        assert lines(path) == [result("a")]
        results.append(result("b"))
    assert lines(path) == [result("a"), result("b")]


def test_an_existing_file_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ResultFile(path) as results:
        results.append(result("a"))
    with ResultFile(path) as results:
        assert results.finished == {"a": "f-a"}
        results.append(result("b"))
    assert [line["id"] for line in lines(path)] == ["a", "b"]


@settings(max_examples=60)
@given(cut=st.integers(0, 200))
def test_a_kill_in_the_middle_of_a_write_costs_at_most_the_last_result(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "out.jsonl"
    with ResultFile(path) as results:
        for name in "abc":
            results.append(result(name))
    whole = path.read_bytes()
    rest = whole[: max(0, len(whole) - cut)]
    path.write_bytes(rest)
    num_whole = rest.count(b"\n")
    with ResultFile(path) as results:
        assert list(results.finished) == list("abc")[:num_whole]
        assert results.was_torn == (rest != b"" and not rest.endswith(b"\n"))
        results.append(result("d"))
    assert [line["id"] for line in lines(path)] == [*"abc"[:num_whole], "d"]


def test_failed_prompts_are_dropped_to_be_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ResultFile(path) as results:
        for name, fields in (("a", {}), ("b", {"error": "boom"}), ("c", {})):
            results.append(result(name, **fields))
    with ResultFile(path) as results:
        assert set(results.finished) == {"a", "c"}
        assert results.num_retried == 1
        results.append(result("b"))
    assert [line["id"] for line in lines(path)] == ["a", "c", "b"]
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(
    "content", [b"hello\n", b'{"id": "a"}\n', b'[1]\n{"id": "a", "fingerprint": "f"}\n', b"\xff\n"]
)
def test_some_other_file_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ResultFileError, match="line 1: not a result"):
        ResultFile(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("failed_before", [False, True])
def test_two_runs_cannot_write_one_file(tmp_path: Path, failed_before: bool) -> None:
    path = tmp_path / "out.jsonl"
    with ResultFile(path) as results:
        results.append(result("a", **({"error": "boom"} if failed_before else {})))
    with ResultFile(path), pytest.raises(ResultFileError, match="another run"):
        ResultFile(path)
    ResultFile(path).close()
