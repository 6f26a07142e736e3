"""What an operator may choose about what runs beside the replicas. Frozen; holds no resolved value."""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from engine.config import Auto, Bytes, Config, parse_bytes


class KVTierConfig(Config):
    """Where KV pages go that the replicas of a node have no room for, and live on when a replica dies."""

    memory: Annotated[Annotated[int, Field(ge=0)] | Auto, BeforeValidator(parse_bytes)] = "auto"
    """Bytes of shared memory on each node; "auto" is a quarter of what is free there, 0 turns all of this off."""
    disk: Path | None = None
    """A folder on each node for what that memory has no room for; it survives a restart. None for no such tier."""
    disk_size: Annotated[Bytes, BeforeValidator(parse_bytes)] = 16 * 2**30
    """Bytes of files in that folder."""

    @property
    def enabled(self) -> bool:
        return self.memory != 0
