"""How the tokens of one request are chosen. Plain values and their ranges; knows neither logits nor tensors nor text.

Stop strings are absent on purpose: the engine works from token ids to token ids, and text is the gateway's.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_LOGPROBS = 20
MAX_SAMPLES = 128

TokenId = Annotated[int, Field(ge=0)]


class SamplingParams(BaseModel):
    """Sampling parameters of a request; names and meaning are those of the OpenAI API and its common extensions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int = Field(default=1, ge=1, le=MAX_SAMPLES)
    """Independent samples of the same prompt."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Output tokens per sample; None runs to the model's length."""
    min_tokens: int = Field(default=0, ge=0)
    """Output tokens before any stop token may be drawn."""
    temperature: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """0 is greedy."""
    top_k: int = Field(default=0, ge=0)
    """0 keeps every token."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    """Drops tokens less probable than this share of the most probable one."""
    repetition_penalty: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """Divides positive and multiplies negative logits of tokens in the prompt or the output (CTRL, 2019)."""
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Subtracted once from tokens that are in the output."""
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Subtracted per occurrence in the output."""
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100.0, le=100.0)]] | None = None
    allowed_token_ids: tuple[TokenId, ...] | None = Field(default=None, min_length=1)
    """When given, no other token can be drawn."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    """Fixes the randomness of the request; None draws one at admission."""
    stop_token_ids: tuple[TokenId, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """None: none; k: the drawn token's logprob and those of the k most probable tokens."""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """The same for the prompt's own tokens."""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """Whether the distribution depends on tokens seen so far other than through the model."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
