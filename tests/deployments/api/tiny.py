"""A tokenizer, a chat template and a scripted backend: the API's tests need no model, no weights and no Ray."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from deployments.backend import NotReady
from deployments.chat_template import ChatTemplate
from deployments.messages import ModelCard
from deployments.text import TextModel
from engine.batch import TokenLogprob
from engine.sequence import Emission, FinishReason, Request

MODEL = "tiny"
MAX_MODEL_LEN = 256
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('tool turns are not known') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("<|im_start|>", "<|im_end|>")
_CORPUS = ["the fox said hello to the moon", "one two three four five", "Grüße über Häuser", "日本語のテキスト 😀"] * 4


def byte_level_tokenizer() -> Tokenizer:
    """Byte-level BPE of 320 tokens: most characters outside ASCII take several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=318, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    return tokenizer


def text_model(template: str | None = TEMPLATE) -> TextModel:
    compiled = ChatTemplate(template, {"eos_token": "<|im_end|>"}, origin="test") if template is not None else None
    return TextModel(byte_level_tokenizer(), compiled)


def card(max_model_len: int = MAX_MODEL_LEN, identity: str = "tiny-1") -> ModelCard:
    tokenizer = byte_level_tokenizer()
    size = tokenizer.get_vocab_size()
    eos = tokenizer.token_to_id("<|im_end|>")
    return ModelCard(MODEL, "/models/tiny", max_model_len, size, (eos,), 1_700_000_000, identity)


@dataclass(slots=True)
class Script:
    """What the backend answers: one text per sample, token by token, then the stop token or the length limit."""

    text: TextModel
    answers: tuple[str, ...] = ("hello to the moon",)
    delay: float = 0.0
    """Seconds before every emission."""
    fail_after: int | None = None
    """Emissions after which `error` is raised."""
    error: Exception | None = None


@dataclass(slots=True)
class FakeBackend:
    """Plays a script and remembers what happened to it."""

    script: Script
    model: ModelCard
    is_ready: bool = True
    requests: list[Request] = field(default_factory=list)
    closed_at: list[float] = field(default_factory=list)
    """When a generator ended, however it ended."""
    emitted: int = 0

    async def card(self) -> ModelCard:
        if not self.is_ready:
            raise NotReady("the model is loading")
        return self.model

    async def ready(self) -> bool:
        return self.is_ready

    async def metrics(self) -> bytes:
        return b"# HELP manta:up x\n"

    async def generate(self, request: Request) -> AsyncGenerator[Emission, None]:
        self.requests.append(request)
        try:
            for count, emission in enumerate(self._emissions(request)):
                if count == self.script.fail_after:
                    assert self.script.error is not None
                    raise self.script.error
                await asyncio.sleep(self.script.delay)
                self.emitted += 1
                yield emission
        finally:
            self.closed_at.append(time.perf_counter())

    def _emissions(self, request: Request) -> Iterator[Emission]:
        params = request.params
        if params.prompt_logprobs is not None and not request.num_scored:
            rest = tuple(logprob_of(token, params.prompt_logprobs) for token in request.prompt_token_ids[1:])
            half = len(rest) // 2
            yield Emission(request.request_id, 0, prompt_logprobs=rest[:half])
            yield Emission(request.request_id, 0, prompt_logprobs=rest[half:])
        answers = [self.script.answers[sample % len(self.script.answers)] for sample in range(params.n)]
        streams = [self._stream(request, sample, answers[sample]) for sample in request.open_samples]
        for sample, stream in zip(request.open_samples, streams, strict=True):
            for _ in request.given[sample] or () if request.given else ():
                next(stream)
        while streams:
            for stream in tuple(streams):
                emission = next(stream)
                yield emission
                if emission.finish_reason is not None:
                    streams.remove(stream)

    def _stream(self, request: Request, sample: int, answer: str) -> Iterator[Emission]:
        eos = self.model.eos_token_ids[0]
        limit = request.params.max_tokens or self.model.max_model_len - len(request.prompt_token_ids)
        tokens = [*self.script.text.encode(answer), eos]
        for count, token in enumerate(tokens, start=1):
            reason = FinishReason.STOP if token == eos else FinishReason.LENGTH if count == limit else None
            logprobs = ()
            if request.params.logprobs is not None:
                logprobs = (logprob_of(token, request.params.logprobs),)
            stop = token if reason is FinishReason.STOP else None
            yield Emission(request.request_id, sample, (token,), logprobs, (), reason, stop)
            if reason is not None:
                return


def logprob_of(token: int, top: int) -> TokenLogprob:
    """Made-up but consistent: the token is the most probable one, and its neighbours follow."""
    return TokenLogprob(token, -0.5, 1, tuple((token + other, -0.5 - other) for other in range(top)))
