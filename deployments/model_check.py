"""What can be told before anything is started: that there is a model of a supported family, and that it can run here in
the form that was asked for.

Refuses only what is certain to fail in the replica, in the replica's words where those name a file. Whether the weights
are complete is the replica's to find out, which has torch at hand; this imports neither torch nor transformers.
"""

import ctypes
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from deployments.cli.errors import CommandError, ExitCode
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.models.directory import check_activations, check_scheme, find_family, find_quantization, load_spec
from engine.models.families import Family
from engine.models.pieces import Piece
from engine.models.source import resolve_model
from engine.models.spec import ModelSpec
from engine.quant.plan import group_obstacle, is_layer_linear

_CUDA_DRIVERS = ("libcuda.so.1", "nvcuda.dll")
_CUDA_SUCCESS = 0


def check_model(config: EngineConfig) -> Path:
    """The model's directory, downloaded if `config.model` is a hub id.

    Raises ModelError, one line naming the file, and CommandError where this machine lacks the device; replicas are
    taken to run on this machine.
    """
    _check_device(config)
    path = resolve_model(config.model, config.revision)
    family, spec = find_family(path), load_spec(path)
    if not any(path.glob("*.safetensors")):
        raise ModelError(f"{path}: no *.safetensors file; weights in other formats have to be converted first")
    _check_quantization(path, family, spec, config)
    return path


def may_have_gpu() -> bool:
    """False where torch cannot see a GPU: its build has no use for one, or the CUDA driver is missing or sees none."""
    # Builds for other GPUs go by the name of "cuda" too, and ask another driver.
    build = _torch_build()
    return build is None or build.startswith("rocm") or (build != "cpu" and _num_cuda_devices() > 0)


def torch_is_for_gpus() -> bool:
    """Whether torch's build can compute on a GPU, wherever there is one."""
    return _torch_build() != "cpu"


def _torch_build() -> str | None:
    """What torch was built for, empty where it does not say; None where it was installed in a way of its own."""
    try:
        return version("torch").partition("+")[2]
    except PackageNotFoundError:
        return None


def _num_cuda_devices() -> int:
    """Devices that the driver shows to this process: CUDA_VISIBLE_DEVICES counts. Creates no context on any."""
    for name in _CUDA_DRIVERS:
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        count = ctypes.c_int(0)
        if driver.cuInit(0) == _CUDA_SUCCESS and driver.cuDeviceGetCount(ctypes.byref(count)) == _CUDA_SUCCESS:
            return count.value
    return 0


def _check_device(config: EngineConfig) -> None:
    wants_fp8 = config.quantization == "fp8"
    if not wants_fp8 and config.device != "cuda":
        return
    if wants_fp8 and config.device == "cpu":
        reason = "runs on a GPU only"
    elif not may_have_gpu():
        reason = "needs a CUDA device and a CUDA build of torch, and this machine lacks one of them"
    else:
        return
    asked, instead = ('quantization "fp8"', '"w8a8" on a CPU') if wants_fp8 else ('device "cuda"', '"cpu" or "auto"')
    raise CommandError(f"{asked} {reason}; use {instead}", ExitCode.BAD_INPUT)


def _check_quantization(path: Path, family: Family, spec: ModelSpec, config: EngineConfig) -> None:
    layout = find_quantization(path)
    if config.activations == "int8":
        check_activations(path, layout, config.quantization)
    if config.quantization == "auto" or config.quantization == "fp8":
        return
    check_scheme(path, layout, config.quantization)
    if layout is None and config.quantization == "w4a16":
        _check_group(path, family, spec, config.quantization_group)


def _check_group(path: Path, family: Family, spec: ModelSpec, group: int) -> None:
    """Raises ModelError unless groups of `group` divide the input channels of every linear layer of the blocks."""
    layers = list(_layer_linears(path, family, spec))
    columns = [piece.shape[0 if piece.transposed else -1] for _, piece in layers]
    for (file, piece), number in zip(layers, columns, strict=True):
        if obstacle := group_obstacle(group, number, columns):
            raise ModelError(f"{file}: tensor {piece.source!r} has shape {piece.shape}: {obstacle}")


def _layer_linears(path: Path, family: Family, spec: ModelSpec) -> Iterator[tuple[Path, Piece]]:
    """The blocks' linear layers with their files; nothing where the files do not have them as config.json says."""
    shapes = _shapes(path)
    layers = [piece for piece in family.pieces(spec, shapes.keys()) if is_layer_linear(piece.target)]
    if all(piece.source in shapes and shapes[piece.source][1] == piece.shape for piece in layers):
        yield from ((shapes[piece.source][0], piece) for piece in layers)


def _shapes(path: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """The file and the shape of every tensor, of the files' headers; empty where one cannot be read."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    try:
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(str(file), framework="numpy") as tensors:
                found |= {name: (file, tuple(tensors.get_slice(name).get_shape())) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return {}
    return found
