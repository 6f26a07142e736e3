"""The few numbers about a model that a comparison needs, from its files."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Sizes of a checkpoint in 16-bit safetensors."""

    num_parameters: int
    vocab_size: int
    kv_bytes_per_token: int
    """Of keys and values at 16 bits, over all layers."""

    @classmethod
    def read(cls, directory: Path) -> "ModelFacts":
        """Raises FileNotFoundError or KeyError if the directory is not that of a model."""
        config = json.loads((directory / "config.json").read_text())
        weights = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads") or heads
        return cls(
            num_parameters=weights // 2,
            vocab_size=config["vocab_size"],
            kv_bytes_per_token=2 * 2 * config["num_hidden_layers"] * kv_heads * head_dim,
        )

    def is_large(self, limit: int) -> bool:
        return self.num_parameters > limit
