"""`manta bench`: puts load on an OpenAI-compatible endpoint and prints what it measured."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deployments.cli.client import DEFAULT_URL, Client, EndpointError
from deployments.cli.errors import CommandError, ExitCode

if TYPE_CHECKING:
    from deployments.cli.load import Outcome, Plan, Summary

_SHOWN_ERRORS = 5


def parse_range(option: str, value: str) -> tuple[int, int]:
    """ "128" is 128..128 and "16:256" is 16..256. Raises CommandError that names the option."""
    low, colon, high = value.partition(":")
    try:
        bounds = int(low), int(high if colon else low)
    except ValueError:
        raise CommandError(f"{option} {value}: expected N or LOW:HIGH", ExitCode.BAD_INPUT) from None
    if not 1 <= bounds[0] <= bounds[1]:
        raise CommandError(f"{option} {value}: expected 1 <= LOW <= HIGH", ExitCode.BAD_INPUT)
    return bounds


def bench(
    url: Annotated[str, typer.Option(help="Address of the server.")] = DEFAULT_URL,
    model: Annotated[str | None, typer.Option(help="Served model name; default: the first one served.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests to send.")] = 64,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Requests in flight at most. [default: 8, or no bound with --request-rate]"),
    ] = None,
    request_rate: Annotated[
        float | None, typer.Option(min=1e-6, help="Poisson arrivals per second; without it, the next follows the last.")
    ] = None,
    input_len: Annotated[str, typer.Option(help="Prompt tokens: N, or LOW:HIGH for a uniform draw.")] = "128",
    output_len: Annotated[str, typer.Option(help="Output tokens: N, or LOW:HIGH.")] = "128",
    text: Annotated[bool, typer.Option("--text", help="Send words rather than token ids.")] = False,
    vocab_size: Annotated[int, typer.Option(min=4, help="Token ids are drawn below this.")] = 256,
    warmup: Annotated[int, typer.Option(min=0, help="Requests sent first and not counted.")] = 1,
    seed: Annotated[int, typer.Option(help="Fixes prompts, lengths and arrivals.")] = 0,
    json_path: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the result here too.")] = None,
) -> None:
    """Measure a running endpoint: throughput, and the latencies a user sees.

    TTFT is the time to the first token, ITL the time between pieces of the
    stream, TPOT the time per output token after the first, E2E the time to
    the last. With --request-rate they count from when a request was due, not
    from when a busy client got to send it.

    The environment variable MANTA_API_KEY, if set, is sent as the API key.
    Exit code 1 if any request failed.

    Examples:

      manta bench --num-prompts 64 --concurrency 8 --output-len 16:256

      manta bench --num-prompts 200 --request-rate 4 --json result.json
    """
    from deployments.cli.load import Plan

    input_tokens, output_tokens = parse_range("--input-len", input_len), parse_range("--output-len", output_len)
    client = Client(url)
    try:
        model = client.choose_model(model)
    except EndpointError as error:
        raise CommandError(f"{client.url}: {error}") from None
    finally:
        client.close()
    if concurrency is None and request_rate is None:
        concurrency = 8
    plan = Plan(
        model=model,
        num_prompts=num_prompts,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        vocab_size=vocab_size,
        text=text,
        rate=request_rate,
        concurrency=concurrency,
        seed=seed,
    )
    summary = measure(client.url, plan, warmup)
    print_table(summary)
    if json_path is not None:
        write_json(json_path, client.url, plan, summary)
    if summary.failed:
        raise typer.Exit(ExitCode.FAILED)


def measure(url: str, plan: "Plan", warmup: int) -> "Summary":
    """Runs the plan with a progress bar on stderr; its first `warmup` requests are sent before, uncounted."""
    import asyncio

    from rich.console import Console
    from rich.progress import Progress

    from deployments.cli.load import Call, run, summarise

    calls = plan.calls()
    outcomes: list[Outcome] = []
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("requests", total=len(calls))

        def note(outcome: "Outcome") -> None:
            outcomes.append(outcome)
            progress.advance(bar)

        async def whole_run() -> float:
            if warmup:
                first = [Call(call.body) for call in calls[:warmup]]
                await run(url, first, concurrency=plan.concurrency, on_done=lambda _: None)
            return await run(url, calls, concurrency=plan.concurrency, on_done=note)

        seconds = asyncio.run(whole_run())
    return summarise(outcomes, seconds)


def print_table(summary: "Summary") -> None:
    """The result for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"{summary.completed} requests in {summary.seconds:.2f} s, {summary.failed} failed\n"
        f"{summary.requests_per_second:.2f} requests/s   {summary.output_tokens_per_second:.1f} output tokens/s   "
        f"{summary.total_tokens_per_second:.1f} tokens/s in and out",
        highlight=False,
    )
    table = Table("ms", "mean", "p50", "p90", "p99")
    for name, row in (("TTFT", summary.ttft), ("ITL", summary.itl), ("TPOT", summary.tpot), ("E2E", summary.e2e)):
        if row is not None:
            table.add_row(name, *(f"{1e3 * value:.1f}" for value in (row.mean, row.p50, row.p90, row.p99)))
    if table.row_count:
        console.print(table)
    for message, count in sorted(summary.errors.items(), key=lambda item: -item[1])[:_SHOWN_ERRORS]:
        print(f"{count} x {message}", file=sys.stderr)


def write_json(path: str, url: str, plan: "Plan", summary: "Summary") -> None:
    """The result for programs: plan and summary, seconds throughout."""
    from dataclasses import asdict
    from pathlib import Path

    result: dict[str, Any] = {
        "url": url,
        "plan": asdict(plan),
        "requests_per_second": summary.requests_per_second,
        "output_tokens_per_second": summary.output_tokens_per_second,
        "total_tokens_per_second": summary.total_tokens_per_second,
        **asdict(summary),
    }
    try:
        Path(path).write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise CommandError(f"--json {path}: {error.strerror}") from None
