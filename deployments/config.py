"""What an operator may choose about the whole application: the `args` of a Serve config file and the CLI's flags.

Holds no Ray object, so that a config can be checked without a cluster.
"""

from typing import Annotated

from pydantic import Field

from cluster.config import KVTierConfig, ParallelConfig
from engine.config import Auto, Config, EngineConfig


class StreamsConfig(Config):
    """Streamed answers that outlive their gateway."""

    grace_s: float = Field(default=60.0, ge=0.0, le=86_400.0)
    """How long a stream whose client is away goes on, and its answer is kept. 0: streams end with their connection."""
    lease_s: float = Field(default=5.0, ge=2.0, le=600.0)
    """How long a gateway may be silent before another one goes on with its streams."""
    max_streams: int = Field(default=4096, ge=1)
    """Streams kept at once, over all gateways."""
    max_bytes: int = Field(default=256 * 2**20, ge=2**20)
    """Memory for them."""


class GatewayConfig(Config):
    """The HTTP side."""

    replicas: int = Field(default=1, ge=1, le=1024)
    """Gateway processes."""
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024)
    """Larger request bodies are refused with 413."""
    continuation_timeout_s: float = Field(default=600.0, ge=0.0)
    """How long an interrupted stream waits for a replica that goes on with it."""
    drain_timeout_s: float = Field(default=600.0, ge=0.0)
    """How long a gateway that is replaced, or one too many, may go on with the requests of its clients."""
    max_queued_requests: int = Field(default=1024, ge=1)
    """Requests a gateway holds at once; more are refused with 429 and Retry-After."""
    streams: StreamsConfig = StreamsConfig()


class AppConfig(Config):
    """One model, served."""

    served_model_name: Annotated[str, Field(min_length=1)] | None = None
    """The name clients ask for; default: the model's own name (the last part of a path)."""
    replicas: int = Field(default=1, ge=1, le=1024)
    """Copies of the model."""
    cpus_per_replica: Annotated[float, Field(gt=0)] | Auto = "auto"
    """Ray CPUs that one replica reserves, all its ranks together; "auto" shares the cores of the machine between the
    replicas."""
    nodes_may_join: bool = False
    """Whether there may be more nodes later: a replica that none has room for then waits for them, and is not
    refused."""
    drain_timeout_s: float = Field(default=10.0, ge=0.0)
    """How long a replica that is to go may keep requests that no other replica can take over."""
    engine: EngineConfig = EngineConfig()
    parallel: ParallelConfig = ParallelConfig()
    gateway: GatewayConfig = GatewayConfig()
    kv_host: KVTierConfig = KVTierConfig()

    @property
    def model_name(self) -> str:
        """The name clients ask for: the one chosen, or the last part of the model's path or hub id."""
        return self.served_model_name or self.engine.model.rstrip("/").rpartition("/")[2]
