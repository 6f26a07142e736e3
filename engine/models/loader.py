"""From a model directory to what a decoder is built of.

What is wrong with a directory is a `ModelError`: one line that names the file.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import Auto, DType
from engine.errors import ModelError
from engine.kernels.operators import Operators
from engine.kernels.reference import ReferenceOperators
from engine.models.decoder import Decoder
from engine.models.directory import (
    CONFIG,
    channel_unit,
    check_activations,
    check_scheme,
    find_family,
    find_quantization,
    load_spec,
    read_json,
)
from engine.models.dtypes import Scalar, auto_dtype
from engine.models.parameters import Form, Parameters
from engine.models.spec import ModelSpec
from engine.models.weights import Checkpoint
from engine.parallel.part import Part
from engine.parallel.place import Place
from engine.quant.config import Scheme, has_int4

_DTYPES: dict[Scalar, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model and its parameters, ready to be taken by a `Decoder`."""

    part: Part
    parameters: Parameters
    """Every name of `part.parameters()`. The decoder takes them out, so that nothing is held twice."""
    dtype: torch.dtype
    """Of the activations, and of every parameter that is not quantized."""

    @property
    def spec(self) -> ModelSpec:
        """Of the part."""
        return self.part.spec

    @property
    def num_bytes(self) -> int:
        """Of the parameters that have been read: of all once a decoder has taken them."""
        return self.parameters.bytes_read


def load_parameters(
    path: Path,
    dtype: torch.dtype | DType = "auto",
    device: torch.device | str = "cpu",
    *,
    quantization: Scheme | Auto = "auto",
    group: int = 64,
    int8_activations: bool = False,
    place: Place | None = None,
) -> LoadedModel:
    """Opens a model directory to run in `dtype`; each parameter is loaded when it is taken.

    With a `place`, what its rank holds of them; a scale in 8 bits is then that of the rank's own channels.

    A `dtype` of "auto" is the checkpoint's, or bfloat16 where the device wants that (`auto_dtype`). A `quantization` of
    "auto" leaves the weights as the checkpoint has them; any other turns full ones into that form as they are read, in
    groups of `group` input channels where they are of 4 bits. For a checkpoint that is quantized already it must be the
    same, and then turns its dense head into that form too. With `int8_activations`, what meets weights of 4 bits is
    quantized as it comes. Memory peaks at the parameters that are held plus a slice of some MiB. Raises ModelError, as
    taking a parameter does, and ValueError for a place that the model has no part for.
    """
    family = find_family(path)
    layout = find_quantization(path)
    scheme = None if quantization == "auto" else quantization
    check_scheme(path, layout, scheme)
    spec = load_spec(path)
    if int8_activations:
        check_activations(path, layout, scheme)
    run_dtype = _run_dtype(dtype, path, torch.device(device), int4=has_int4(layout, scheme))
    checkpoint = Checkpoint(path)
    form = Form(run_dtype, device, scheme, group, layout=layout, int8_activations=int8_activations)
    part = Part.all_of(spec) if place is None else Part(spec, place, channel_unit(path, scheme, group))
    part.check()
    parameters = Parameters(checkpoint, part, family.pieces(spec, checkpoint.names), form)
    return LoadedModel(part, parameters, run_dtype)


def load_model(
    path: Path,
    dtype: torch.dtype | DType = "auto",
    device: torch.device | str = "cpu",
    *,
    quantization: Scheme | Auto = "auto",
    group: int = 64,
    operators: Operators | None = None,
) -> Decoder:
    """A decoder of what `load_parameters` loads, on the reference operators unless others are given."""
    loaded = load_parameters(path, dtype, device, quantization=quantization, group=group)
    return Decoder(loaded.part, loaded.parameters, operators or ReferenceOperators(), loaded.dtype)


def _run_dtype(dtype: torch.dtype | DType, path: Path, device: torch.device, *, int4: bool) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        return _DTYPES[dtype]
    try:
        chosen, reason = auto_dtype(read_json(path / CONFIG), device.type, int4=int4)
    except ValueError as error:
        raise ModelError(f"{path / CONFIG}: {error}") from error
    if reason is not None:
        logger.info("%s: %s", path, reason)
    return _DTYPES[chosen]
