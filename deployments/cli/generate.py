"""`manta generate`: a file of prompts through an engine in this process, resumable.

Everything that can be wrong is found before anything runs, in the order of what it costs to find: flags, the prompt
file, the output file, the model, the length of every prompt.
"""

import logging
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deployments.cli.errors import CommandError, ExitCode, one_line

if TYPE_CHECKING:
    from deployments.offline import Completed, OfflineGenerator
    from deployments.prompt_file import Defaults, Prompt, PromptFile
    from deployments.result_file import ResultFile
    from engine.config import EngineConfig

_SHOWN_BAD_LINES = 10
_SAMPLING = "Sampling (a line of the file may say otherwise)"
_ENGINE = "Engine"


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model directory, a hub id, or manta-tiny, the built-in model.")
    ],
    prompts: Annotated[Path, typer.Option(metavar="FILE", help="JSONL, one prompt a line.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSONL; an existing one is continued.")],
    token_ids: Annotated[bool, typer.Option("--token-ids", help="Write the output's token ids too.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Output tokens at most.", rich_help_panel=_SAMPLING)] = 256,
    min_tokens: Annotated[int, typer.Option(help="Output tokens at least.", rich_help_panel=_SAMPLING)] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=_SAMPLING)] = 1.0,
    top_p: Annotated[float, typer.Option(rich_help_panel=_SAMPLING)] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 keeps every token.", rich_help_panel=_SAMPLING)] = 0,
    min_p: Annotated[float, typer.Option(rich_help_panel=_SAMPLING)] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(rich_help_panel=_SAMPLING)] = 1.0,
    presence_penalty: Annotated[float, typer.Option(rich_help_panel=_SAMPLING)] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(rich_help_panel=_SAMPLING)] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="May be repeated.", rich_help_panel=_SAMPLING)] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", rich_help_panel=_SAMPLING)] = False,
    seed: Annotated[
        int | None,
        typer.Option(help="Makes the run repeatable; every prompt draws differently.", rich_help_panel=_SAMPLING),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.", rich_help_panel=_ENGINE)] = "auto",
    quantization: Annotated[
        str, typer.Option(help="Of the weights at load: w8a8, w4a16, or auto: as they are.", rich_help_panel=_ENGINE)
    ] = "auto",
    quantization_group: Annotated[
        int, typer.Option(help="Channels a scale in w4a16: 32, 64, 128.", rich_help_panel=_ENGINE)
    ] = 64,
    activations: Annotated[
        str,
        typer.Option(help="That meet weights of 4 bits: int8 is faster; auto: as they are.", rich_help_panel=_ENGINE),
    ] = "auto",
    kv_dtype: Annotated[
        str, typer.Option(help="model, int8, or auto: int8 beside quantized weights.", rich_help_panel=_ENGINE)
    ] = "auto",
    kv_memory: Annotated[str, typer.Option(help='Such as "2GiB", or auto.', rich_help_panel=_ENGINE)] = "auto",
    max_model_len: Annotated[str, typer.Option(help="Tokens, or auto.", rich_help_panel=_ENGINE)] = "auto",
    max_sequences: Annotated[int, typer.Option(help="Prompts run at once.", rich_help_panel=_ENGINE)] = 128,
    max_batch_tokens: Annotated[int, typer.Option(help="Tokens of an iteration.", rich_help_panel=_ENGINE)] = 1024,
    threads: Annotated[str, typer.Option(help="Threads, or auto.", rich_help_panel=_ENGINE)] = "auto",
) -> None:
    """Run a file of prompts through a model, offline: no server, no Ray.

    Each line of --prompts is an object with "prompt" (text), "messages"
    (a conversation) or "token_ids", maybe an "id", and maybe sampling
    parameters under their OpenAI names. Each line of --out has "id", "text",
    "finish_reason" and "usage", in the order in which the prompts finished;
    with "n" above 1, "samples" holds the texts.

    Results are written as they finish. Whatever ends a run, Ctrl-C or
    kill -9, the same command continues it and tries failed prompts again.
    Exit code 1 if a prompt failed; its line has "error".

    Examples:

      manta generate manta-tiny --prompts in.jsonl --out out.jsonl

      manta generate ./my-model --prompts in.jsonl --out out.jsonl --stop "#"
    """
    from deployments.prompt_file import PromptFile

    sampling = {
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "ignore_eos": ignore_eos,
    }
    defaults = sampling_defaults(model, sampling, tuple(stop or ()), seed)
    config = engine_config(
        {
            "model": model,
            "dtype": dtype,
            "quantization": quantization,
            "quantization_group": quantization_group,
            "activations": activations,
            "max_model_len": max_model_len,
            "threads": threads,
        },
        {"memory": kv_memory, "dtype": kv_dtype},
        {"max_sequences": max_sequences, "max_batch_tokens": max_batch_tokens, "max_stall_s": None},
    )
    file = PromptFile(prompts, defaults)
    check_prompts(file)
    with opened_results(out, prompts) as results:
        num_left = count_left(file, results)
        if num_left == 0:
            say(f"nothing to do: {len(results.finished)} prompts are done in {out}")
            return
        generator = build_generator(config)
        check_lengths(generator, left(file, results), prompts)
        num_failed = run(generator, file, results, num_left, token_ids)
    if num_failed:
        raise CommandError(f'{num_failed} prompts failed: see "error" in {out}; the same command tries them again')


def sampling_defaults(model: str, sampling: dict[str, Any], stop: tuple[str, ...], seed: int | None) -> "Defaults":
    """What the flags say about sampling. Raises CommandError naming the flag that is out of range."""
    from pydantic import ValidationError

    from deployments.prompt_file import Defaults
    from engine.sampling_params import SamplingParams

    if not all(stop):
        raise CommandError("--stop: a stop string must not be empty", ExitCode.BAD_INPUT)
    try:
        params = SamplingParams.model_validate(sampling)
    except ValidationError as error:
        raise CommandError(flag_error(error), ExitCode.BAD_INPUT) from None
    # The same directory is the same model, however it is spelled.
    name = str(Path(model).resolve()) if Path(model).is_dir() else model
    return Defaults(name, params, stop, seed)


def engine_config(engine: dict[str, Any], kv: dict[str, Any], scheduler: dict[str, Any]) -> "EngineConfig":
    """What the flags say about the engine. Raises CommandError naming the flag that is wrong."""
    from pydantic import ValidationError

    from engine.config import EngineConfig

    # More sequences than tokens in an iteration cannot be: the larger budget is what a user of the flag means.
    scheduler["max_batch_tokens"] = max(scheduler["max_batch_tokens"], scheduler["max_sequences"])
    try:
        return EngineConfig.model_validate({**engine, "kv": kv, "scheduler": scheduler})
    except ValidationError as error:
        raise CommandError(flag_error(error), ExitCode.BAD_INPUT) from None


def flag_error(error: Any) -> str:
    """A pydantic error in terms of the flag that caused it."""
    detail = error.errors()[0]
    names = [part for part in detail["loc"] if isinstance(part, str) and part != "scheduler"]
    flag = "-".join(names[:2]) if names[:1] == ["kv"] else next(iter(names), "").replace("_", "-")
    return f"--{flag} {detail['input']}: {detail['msg'].removeprefix('Value error, ')}"


def check_prompts(file: "PromptFile") -> None:
    """Raises CommandError unless every line of the file can be run; the bad lines are listed on stderr."""
    bad, total = 0, 0
    try:
        for item in file.read():
            total += 1
            if isinstance(item, tuple):
                number, error = item
                bad += 1
                report_bad_line(file.path, number, error, bad)
    except OSError as error:
        raise CommandError(f"--prompts {file.path}: {error.strerror}", ExitCode.BAD_INPUT) from None
    refuse_bad_lines(file.path, bad)
    if total == 0:
        raise CommandError(f"--prompts {file.path}: holds no prompt", ExitCode.BAD_INPUT)


def check_lengths(generator: "OfflineGenerator", prompts: Iterable["Prompt"], path: Path) -> None:
    """Raises CommandError unless the model can serve every prompt; the others are listed on stderr."""
    from engine.errors import InvalidRequest

    bad = 0
    for prompt in prompts:
        try:
            generator.request(prompt)
        except InvalidRequest as error:
            bad += 1
            report_bad_line(path, prompt.number, error, bad)
    refuse_bad_lines(path, bad)


def report_bad_line(path: Path, number: int, error: Exception, count: int) -> None:
    """One line on stderr for each of the first bad lines."""
    if count <= _SHOWN_BAD_LINES:
        say(f"{path}, line {number}: {one_line(error)}")


def refuse_bad_lines(path: Path, count: int) -> None:
    if count:
        raise CommandError(f"{path}: {count} bad lines; nothing was run", ExitCode.BAD_INPUT)


@contextmanager
def opened_results(out: Path, prompts: Path) -> Iterator["ResultFile"]:
    """The output file, locked and recovered. Raises CommandError if it cannot be written or continued."""
    from deployments.result_file import ResultFile, ResultFileError

    try:
        if out.exists() and out.samefile(prompts):
            raise CommandError(f"--out {out} is the prompt file", ExitCode.BAD_INPUT)
        results = ResultFile(out)
    except OSError as error:
        raise CommandError(f"--out {out}: {error.strerror}", ExitCode.BAD_INPUT) from None
    except ResultFileError as error:
        raise CommandError(f"--out {error}", ExitCode.BAD_INPUT) from None
    if results.was_torn:
        say(f"{out}: dropped a last line that was cut off")
    if results.num_retried:
        say(f"{out}: {results.num_retried} failed prompts are tried again")
    with results:
        yield results


def count_left(file: "PromptFile", results: "ResultFile") -> int:
    """Prompts without a result. Raises CommandError if the results are not of these prompts, options and model."""
    unknown = set(results.finished)
    num_left = 0
    for prompt in file.prompts():
        known = results.finished.get(prompt.id)
        if known is None:
            num_left += 1
        elif known != prompt.fingerprint:
            raise CommandError(
                f'{file.path}, line {prompt.number}: the result of id "{prompt.id}" in {results.path} is of another '
                "prompt, other sampling options or another model; restore them, or choose another --out",
                ExitCode.BAD_INPUT,
            )
        unknown.discard(prompt.id)
    if unknown:
        raise CommandError(
            f"{results.path} holds {len(unknown)} results of prompts that {file.path} does not have, such as id "
            f'"{min(unknown)}": its lines were changed or removed; restore them, or choose another --out',
            ExitCode.BAD_INPUT,
        )
    return num_left


def left(file: "PromptFile", results: "ResultFile") -> Iterator["Prompt"]:
    """The prompts without a result, as the file was read."""
    return (prompt for prompt in file.prompts() if prompt.id not in results.finished)


def build_generator(config: "EngineConfig") -> "OfflineGenerator":
    """Loads the model. Raises ModelError, or CommandError if the memory does not suffice."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("engine").setLevel(logging.INFO)

    from engine.ahead import begin_compiling

    begin_compiling(config)

    from deployments.offline import OfflineGenerator
    from deployments.text import TextModel
    from engine.build import build_engine

    try:
        engine = build_engine(config)
    except ValueError as error:
        raise CommandError(one_line(error), ExitCode.BAD_INPUT) from None
    assert engine.model_path is not None
    # As many waiting as running, so that a sequence that ends is replaced in the next iteration.
    return OfflineGenerator(engine, TextModel.load(engine.model_path), window=2 * config.scheduler.max_sequences)


def run(
    generator: "OfflineGenerator", file: "PromptFile", results: "ResultFile", num_left: int, token_ids: bool
) -> int:
    """Generates what is left and writes it. Returns how many prompts failed; KeyboardInterrupt after Ctrl-C."""
    from deployments.cli.progress import Progress

    num_done = num_failed = 0
    begin = time.perf_counter()
    with stopped_by_ctrl_c(generator) as interrupted, Progress(num_left, lambda: generator.num_output_tokens) as bar:
        for completed in generator.run(left(file, results)):
            results.append(record(completed, token_ids))
            num_done += 1
            num_failed += completed.error is not None
            bar.advance()
    seconds = time.perf_counter() - begin
    tokens = generator.num_output_tokens
    say(f"{num_done} of {num_left} prompts, {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s")
    if interrupted and num_done < num_left:
        say("interrupted; the same command continues")
        raise KeyboardInterrupt
    return num_failed


@contextmanager
def stopped_by_ctrl_c(generator: "OfflineGenerator") -> Iterator[list[int]]:
    """Ctrl-C ends the run after the iteration under way, and a second one at once. The list is not empty after it."""
    signals: list[int] = []

    def stop(number: int, _: object) -> None:
        signals.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        generator.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)


def record(completed: "Completed", token_ids: bool) -> dict[str, Any]:
    """The line of the output file for one prompt."""
    head = {"id": completed.prompt.id, "fingerprint": completed.prompt.fingerprint}
    if completed.error is not None:
        return {**head, "error": completed.error}
    samples = [
        {"text": output.text, "finish_reason": output.finish_reason}
        | ({"token_ids": output.token_ids} if token_ids else {})
        for output in completed.outputs
    ]
    num_prompt, num_output = completed.num_prompt_tokens, completed.num_output_tokens
    usage = {"prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output}
    return {**head, **(samples[0] if len(samples) == 1 else {"samples": samples}), "usage": usage}


def say(text: str) -> None:
    """Tells the user, apart from any result."""
    print(text, file=sys.stderr)
