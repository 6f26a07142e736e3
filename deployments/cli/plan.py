"""`manta plan`: where a model's ranks would go on some machines, and what each would hold, before anything is started.

Reads config.json alone, turns flags into a `Problem`, and prints what `cluster.planner` makes of it.
"""

from typing import Annotated

import typer

from deployments.cli.errors import CommandError, ExitCode

_LAYOUT = "Layout"
_FORM = "Model and memory"
_RATES = "Rates"
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_QUANTIZATIONS = ("auto", "w8a8", "w4a16", "fp8")
_KV_DTYPES = ("auto", "model", "int8")
_PREFERENCES = ("throughput", "latency")


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model directory or its config.json, a hub id, or manta-tiny.")
    ],
    nodes: Annotated[
        str | None,
        typer.Option(help='"8x80GiB", "2*8x80GiB", "a=8x80GiB,b=4x40GiB". Default: this machine.'),
    ] = None,
    accelerator: Annotated[
        str,
        typer.Option(
            help="auto (by the memory of --nodes; without, this machine's), h100, h200, a100, a100-40g, l40s, l4, a10, "
            "rtx4090, cpu."
        ),
    ] = "auto",
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, help="Ranks that share each layer.", rich_help_panel=_LAYOUT)
    ] = None,
    pipeline_parallel: Annotated[
        int | None, typer.Option(min=1, help="Stages of layers.", rich_help_panel=_LAYOUT)
    ] = None,
    expert_parallel: Annotated[
        int | None,
        typer.Option(min=1, help="Groups of tensor ranks that experts are dealt to.", rich_help_panel=_LAYOUT),
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Copies. Default: as many as are best.", rich_help_panel=_LAYOUT)
    ] = None,
    prefer: Annotated[
        str, typer.Option(help="throughput of all, or latency of one stream alone.", rich_help_panel=_LAYOUT)
    ] = "throughput",
    revision: Annotated[str | None, typer.Option(help="Of a hub model.", rich_help_panel=_FORM)] = None,
    dtype: Annotated[str, typer.Option(help=", ".join(_DTYPES), rich_help_panel=_FORM)] = "auto",
    quantization: Annotated[
        str, typer.Option(help="Of weights at load: w8a8, w4a16, fp8, or auto: as they are.", rich_help_panel=_FORM)
    ] = "auto",
    quantization_group: Annotated[
        int, typer.Option(help="Channels a scale in w4a16: 32, 64, 128.", rich_help_panel=_FORM)
    ] = 64,
    kv_dtype: Annotated[str, typer.Option(help=", ".join(_KV_DTYPES), rich_help_panel=_FORM)] = "auto",
    context: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens of a sequence, half of them prompt, to count with. Default: the model's, up to 4096.",
            rich_help_panel=_FORM,
        ),
    ] = None,
    max_sequences: Annotated[int, typer.Option(min=1, help="Run at once by one replica.", rich_help_panel=_FORM)] = 128,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Of one step.", rich_help_panel=_FORM)] = 1024,
    memory_share: Annotated[
        float, typer.Option(min=0.1, max=1.0, help="Of an accelerator's memory, for ranks.", rich_help_panel=_FORM)
    ] = 0.9,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Take arithmetic and memory to be as fast as here.", rich_help_panel=_RATES),
    ] = False,
    tflops: Annotated[
        float | None, typer.Option(min=1e-6, help="Attained in 16 bits, in 10^12/s.", rich_help_panel=_RATES)
    ] = None,
    memory_bandwidth: Annotated[
        str | None, typer.Option(help='Attained, a second, such as "2.7TB".', rich_help_panel=_RATES)
    ] = None,
    link_in_node: Annotated[
        str | None, typer.Option(help='An accelerator\'s, one way, a second: "360GB".', rich_help_panel=_RATES)
    ] = None,
    link_between_nodes: Annotated[str | None, typer.Option(help="The same.", rich_help_panel=_RATES)] = None,
    latency_in_node: Annotated[
        float | None, typer.Option(min=0, help="Microseconds of a small message.", rich_help_panel=_RATES)
    ] = None,
    latency_between_nodes: Annotated[
        float | None, typer.Option(min=0, help="The same.", rich_help_panel=_RATES)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes and seconds.")] = False,
) -> None:
    """Plan how a model is laid out over accelerators: tensor x pipeline x expert parallel.

    Prints the bytes that every rank holds (weights, pages of keys and
    values, workspace), what concurrency that gives, predicted speeds, and
    why; last, the settings by which `manta serve --config FILE` or a
    Serve config's args do just that. Nothing is started and no weight is
    read. What cannot fit is refused, with the nearest layouts that work.

    Exit code 2 where there is no layout.

    Examples:

      manta plan ./Llama-2-7b --nodes 8x80GiB

      manta plan ./Llama-3-70B --nodes 2*8x80GiB --prefer latency

      manta plan ./Llama-3-70B --nodes a=8x80GiB,b=4x40GiB --accelerator a100
    """
    from cluster.planner.form import Choices
    from cluster.planner.layout import Problem
    from cluster.planner.plan import NoLayout
    from cluster.planner.plan import plan as best_layout
    from deployments.cli import plan_flags as flags
    from deployments.cli import plan_report
    from deployments.cli.plan_serve import serve_settings

    machines, kind = flags.machines(nodes, accelerator, measure=measure)
    rates = flags.RateFlags(
        tflops, memory_bandwidth, link_in_node, link_between_nodes, latency_in_node, latency_between_nodes
    )
    choices = Choices(
        kind.device,
        flags.one_of("--dtype", dtype, _DTYPES),
        flags.one_of("--quantization", quantization, _QUANTIZATIONS),
        flags.group(quantization_group),
        flags.one_of("--kv-dtype", kv_dtype, _KV_DTYPES),
    )
    spec, form = flags.read_model(model, revision, choices)
    wishes = flags.wishes(
        tensor=tensor_parallel,
        pipeline=pipeline_parallel,
        expert=expert_parallel,
        replicas=replicas,
        prefer=flags.one_of("--prefer", prefer, _PREFERENCES),
        context=context,
        sequences=max_sequences,
        batch_tokens=max_batch_tokens,
        memory_share=memory_share,
    )
    problem = Problem(spec, form, machines, rates.applied_to(kind), wishes)
    try:
        found = best_layout(problem)
    except NoLayout as error:
        raise CommandError(f"{model}: {error}", ExitCode.BAD_INPUT) from None
    settings = serve_settings(model, revision, problem, found)
    print((plan_report.as_json if as_json else plan_report.text)(model, problem, found, settings))
