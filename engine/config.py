"""What an operator may choose about one replica. Frozen and composed; holds no resolved value and no device state.

Every field whose value is "auto" is resolved once, by `engine.build`, and the resolved values are logged there.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*$", re.IGNORECASE)


def parse_bytes(value: Any) -> Any:
    """Turns "2GiB", "512MB" or "1g" into a number of bytes; other types pass through to pydantic's own checks."""
    if not isinstance(value, str) or value == "auto":
        return value
    match = _SIZE.match(value)
    if match is None:
        raise ValueError(f'expected a size such as "512MiB" or "2GB", or "auto"; got {value!r}')
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


Bytes = Annotated[int, Field(gt=0)]
Auto = Literal["auto"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["auto", "w8a8", "w4a16", "fp8"]
Activations = Literal["auto", "int8"]
Admission = Literal["optimistic", "reserve"]


class Config(BaseModel):
    """Base of every configuration: immutable, and an unknown field is an error that names it."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class KVConfig(Config):
    """The paged KV cache of one replica."""

    memory: Annotated[Bytes | Auto, BeforeValidator(parse_bytes)] = "auto"
    """Bytes of keys and values; "auto" takes `memory_share` of what is free once the weights are loaded."""
    memory_share: float = Field(default=0.5, gt=0.0, le=0.95)
    """Share of the free memory that "auto" takes; replicas on one machine divide it between them."""
    dtype: Literal["auto", "model", "int8"] = "auto"
    """"model" is that of the activations; "int8" takes half the memory, with a scale for each token and head. "auto" is
    "int8" on a CPU where the weights are quantized too, else "model"."""
    prefix_caching: bool = True
    """Whether a prompt that begins like one that was computed before takes its pages over."""
    offload: bool = True
    """Whether pages are copied to the node's KV host, where there is one, and loaded from it."""
    offload_bandwidth: Annotated[Bytes | None, BeforeValidator(parse_bytes)] = None
    """Bytes a second at most that copying pages there may take; None is as fast as pages are filled."""
    page_tokens: Annotated[int, Field(ge=1, le=512)] | Auto = "auto"
    """Tokens of one sequence that share one page; "auto" is 16 on a CPU and 256, which its kernels want, on a GPU."""


class SchedulerConfig(Config):
    """How iterations are composed (Orca, OSDI'22; chunked prefill)."""

    max_sequences: int = Field(default=128, ge=1, le=4096)
    """Sequences that may run at once: the batch limit of a decode iteration."""
    max_batch_tokens: int = Field(default=1024, ge=1)
    """Tokens of one iteration, decodes and prompt chunks together."""
    max_stall_s: Annotated[float, Field(gt=0.0)] | None = 0.25
    """Seconds that an iteration should take at most while streams decode: where `max_batch_tokens` take longer, shorter
    prompt chunks run beside decodes, down to 128 tokens. A stream whose replica died waits about as long, and others
    wait so long for it at most. None is no limit, for work that nobody waits for token by token."""
    admission: Admission = "optimistic"
    """"optimistic" admits on free pages and preempts when they run out; "reserve" holds max_tokens pages up front."""

    @model_validator(mode="after")
    def _decodes_fit(self) -> "SchedulerConfig":
        if self.max_batch_tokens < self.max_sequences:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_sequences ({self.max_sequences}): "
                "every running sequence decodes one token an iteration"
            )
        return self


class EngineConfig(Config):
    """One replica of one model."""

    model: str = "manta-tiny"
    """A local directory, a hub id, or the name of the built-in model."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: DType = "auto"
    """Type of weights, activations and KV; "auto" takes the checkpoint's, but bfloat16 in place of float16 on a
    CPU, of float32 on a GPU, and of float16 there where weights are of 4 bits."""
    quantization: Quantization = "auto"
    """What to turn weights into at load: "w8a8" is 8 bits with activations quantized per token, "w4a16" 4 bits in
    groups, "fp8" 8-bit floats on a GPU; "auto" leaves them as the checkpoint has them, quantized or not."""
    quantization_group: Literal[32, 64, 128] = 64
    """Input channels that share a scale in "w4a16"."""
    activations: Activations = "auto"
    """Type of what meets weights of 4 bits: "auto" is that of the run; "int8" quantizes each token group by group as it
    comes (W4A8), on a CPU only: prompts and batches are computed faster."""
    max_model_len: Annotated[int, Field(ge=2)] | Auto = "auto"
    """Longest sequence, prompt and output together; "auto" takes the model's, or what the KV memory can hold."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What computes; "auto" is a GPU where torch sees one."""
    deterministic: bool = False
    """Whether a token's probabilities are the same, bit for bit, however its sequence is cut into chunks: then a stream
    that goes on from another replica, or from a cached prompt, draws what it would have drawn. On a CPU only; slower
    with 8-bit keys and values."""
    threads: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Threads of the arithmetic; "auto" takes the cores this process may run on."""
    kv: KVConfig = KVConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
