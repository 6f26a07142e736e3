"""Which engines are compared, at which bits, and where each finds its interpreter and its form of a model.

Converted models are kept beside the environments, under `converted/`, and made once.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.install import peers_directory, python_of

WORKERS = Path(__file__).parent
"""On the path of every worker, which is then a module of the package `workers` and imports nothing around it."""
TREE = WORKERS.parents[1]

OURS = "manta"


@dataclass(frozen=True, slots=True)
class Engine:
    """A contender. Its name is that of its environment and of its module in `workers`."""

    name: str
    title: str
    formats: dict[int, str]
    """Bits of the weights -> what the engine calls that format; bits that are missing are not compared."""


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(OURS, "Manta", {16: "bf16", 8: "w8a8", 4: "w4a8"}),
        Engine("vllm", "vLLM", {16: "bf16"}),
        Engine("openvino", "OpenVINO GenAI", {16: "fp16", 8: "int8", 4: "int4"}),
        Engine("llamacpp", "llama.cpp", {16: "bf16", 8: "q8_0", 4: "q4_0"}),
        Engine("transformers", "transformers", {16: "bf16"}),
    )
}
PEERS = tuple(name for name in ENGINES if name != OURS)


class ConversionError(Exception):
    """A peer's converter failed; says on which model and with what message."""


def interpreter(name: str) -> Path | None:
    """The Python that runs an engine: this one for our own; None if a peer is not installed."""
    return Path(sys.executable) if name == OURS else python_of(name)


def environment(name: str) -> dict[str, str]:
    """Environment variables of an engine's workers and converter. Ours is that of this tree, whichever is installed."""
    caches = {"VLLM_CACHE_ROOT": str(peers_directory() / "vllm-cache"), "HF_HUB_OFFLINE": "1"}
    path = [WORKERS, TREE] if name == OURS else [WORKERS]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **caches}


def converted(name: str, model: Path, number_format: str) -> Path:
    """A model in the form that an engine reads, made first if it is not there. Raises ConversionError."""
    command = _command(name, model, number_format)
    if command is None:
        return model
    target = peers_directory() / "converted" / f"{name}-{model.name}-{_digest(model)}-{number_format}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: an interrupted conversion leaves nothing under the final name.
        partial = target.with_name(f".{target.name}-{os.getpid()}")
        try:
            done = subprocess.run(
                [argument if argument != "{}" else str(partial) for argument in command],
                env=environment(name),
                capture_output=True,
                text=True,
            )
            if done.returncode != 0:
                said = (done.stdout + done.stderr)[-2000:]
                raise ConversionError(f"{name}: {model} to {number_format} failed:\n{said}")
            partial.rename(target)
        finally:
            _remove(partial)
    return target


def _command(name: str, model: Path, number_format: str) -> list[str] | None:
    """What converts a model into the file or directory `{}`; None for an engine that reads the model itself."""
    home = peers_directory() / name / "bin"
    if name == "llamacpp":
        return [str(home / "python"), "-m", "workers.to_gguf", str(model), "{}", number_format]
    if name == "openvino":
        export = [str(home / "optimum-cli"), "export", "openvino", "--task", "text-generation-with-past"]
        # Groups of 64 divide the widths of the models of `benchmarks.models`; symmetric ones are the faster here.
        groups = ["--group-size", "64", "--ratio", "1.0", "--sym"] if number_format == "int4" else []
        return [*export, "--model", str(model), "--weight-format", number_format, *groups, "{}"]
    return None


def _digest(model: Path) -> str:
    """Changes whenever the model was written anew."""
    files = sorted(model.glob("*.safetensors"))
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((facts, (model / "config.json").read_bytes())).encode()).hexdigest()[:8]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
