"""An engine without a model: one token per stream and iteration, a known one, at a chosen pace."""

import json
import time
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from engine.config import EngineConfig
from engine.errors import InvalidRequest
from engine.sequence import Emission, FinishReason, Request
from engine.stats import EngineStats

STEP_S = 0.005
CRASH_PROMPT = (1, 1, 1)
"""A prompt that makes the iteration after it raise."""


ALPHABET = "abcdefghijklmnopqrstuvwxyz"
OFFSET_FILE = "offset.json"
"""In a model's directory: how far its letters are from those of a model without it."""
FIRST_LETTER = 100
"""Token id of "a" in the fake's vocabulary, and of the first token that the fake may generate."""


def token_at(request: Request, sample: int, index: int, offset: int = 0) -> int:
    """The token that the fake generates: a letter that depends on prompt, sample and position, and on its model."""
    return FIRST_LETTER + (sum(request.prompt_token_ids) + 5 * sample + 7 * index + offset) % len(ALPHABET)


class FakeEngine:
    """Counts tokens like an engine does; `max_tokens` of a request must be given."""

    max_model_len = 10_000
    vocab_size = 257
    eos_token_ids = (0,)
    failure: Exception | None = None

    def __init__(self, step_s: float = STEP_S, model_path: Path = Path("/nowhere"), offset: int = 0) -> None:
        self._step_s = step_s
        self.model_path = model_path
        self._offset = offset
        self._requests: dict[str, Request] = {}
        self._produced: dict[str, dict[int, int]] = {}
        """Request id -> open sample -> tokens so far."""
        self._prompt_total = self._generated_total = self._steps_total = 0
        self.step_tokens = 0
        self.closed = False

    def add(self, request: Request) -> None:
        if not request.prompt_token_ids:
            raise InvalidRequest("empty prompt", param="prompt")
        self._requests[request.request_id] = request
        self._produced[request.request_id] = {
            sample: len(request.given[sample] or ()) if request.given else 0 for sample in request.open_samples
        }
        self._prompt_total += len(request.prompt_token_ids)

    def abort(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def has_work(self) -> bool:
        return bool(self._requests)

    def step(self) -> list[Emission]:
        self.step_tokens = len(self._requests)
        time.sleep(self._step_s)
        emissions = []
        for request in list(self._requests.values()):
            if request.prompt_token_ids == CRASH_PROMPT:
                raise RuntimeError("a kernel failed")
            produced = self._produced[request.request_id]
            for sample, index in list(produced.items()):
                produced[sample] += 1
                last = index + 1 == request.params.max_tokens
                if last:
                    del produced[sample]
                emissions.append(
                    Emission(
                        request.request_id,
                        sample,
                        (token_at(request, sample, index, self._offset),),
                        finish_reason=FinishReason.LENGTH if last else None,
                    )
                )
            if not produced:
                del self._requests[request.request_id]
        self._generated_total += len(emissions)
        self._steps_total += 1
        return emissions

    def stats(self) -> EngineStats:
        outstanding = sum(
            (request.params.max_tokens or 0) - max(self._produced[request.request_id].values())
            for request in self._requests.values()
        )
        return EngineStats(
            num_running=len(self._requests),
            num_waiting=0,
            num_pages=100,
            num_free_pages=100 - len(self._requests),
            num_outstanding_tokens=outstanding,
            preemptions_total=0,
            prompt_tokens_total=self._prompt_total,
            generation_tokens_total=self._generated_total,
            steps_total=self._steps_total,
        )

    def close(self) -> None:
        self.closed = True


def build_fake_engine(config: EngineConfig, find_host: object = None) -> FakeEngine:
    """An engine factory for `deployments.app.assemble`."""
    path = Path(config.model)
    offset = path / OFFSET_FILE
    return FakeEngine(model_path=path, offset=int(offset.read_text()) if offset.exists() else 0)


def write_fake_model(directory: Path) -> None:
    """Writes what a gateway needs of the fake's model: a byte-level tokenizer without merges, and a chat template."""
    alphabet = [character for character in ByteLevel.alphabet() if character not in ALPHABET]
    others = sorted(alphabet)
    vocab = {"</s>": 0, **{character: 1 + index for index, character in enumerate(others[: FIRST_LETTER - 1])}}
    vocab |= {letter: FIRST_LETTER + index for index, letter in enumerate(ALPHABET)}
    vocab |= {character: len(vocab) + index for index, character in enumerate(others[FIRST_LETTER - 1 :])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "</s>"}))
