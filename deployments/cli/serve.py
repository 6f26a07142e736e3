"""`manta serve`: flags and a config file become one validated configuration; `deployments.launcher` does the rest."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deployments.cli.errors import CommandError, ExitCode, one_line

if TYPE_CHECKING:
    from deployments.config import AppConfig

_MODEL = "Model and engine"
_MACHINE = "Address and machine"


def serve(
    model: Annotated[
        str | None, typer.Argument(help="A model directory, a hub id, or manta-tiny, the built-in model (default).")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML: the args of an application, or a whole Serve config. Flags win."),
    ] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 for all interfaces.", rich_help_panel=_MACHINE)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, rich_help_panel=_MACHINE)] = 8000,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="Start Ray's dashboard too.", rich_help_panel=_MACHINE)
    ] = False,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that requests may go on after Ctrl-C.", rich_help_panel=_MACHINE)
    ] = 10.0,
    replicas: Annotated[int | None, typer.Option(help="Copies of the model. [1]", rich_help_panel=_MACHINE)] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(help="Ranks that share every layer. [1]", rich_help_panel=_MACHINE)
    ] = None,
    pipeline_parallel: Annotated[
        int | None, typer.Option(help="Stages of consecutive layers. [1]", rich_help_panel=_MACHINE)
    ] = None,
    expert_parallel: Annotated[
        int | None, typer.Option(help="Groups of tensor ranks with experts of their own. [1]", rich_help_panel=_MACHINE)
    ] = None,
    gateways: Annotated[int | None, typer.Option(help="HTTP processes. [1]", rich_help_panel=_MACHINE)] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="The name clients ask for. [the model's]", rich_help_panel=_MODEL)
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub model.", rich_help_panel=_MODEL)] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16, float16. [auto]", rich_help_panel=_MODEL)
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option(help="Of weights at load: w8a8, w4a16, fp8, or auto: as they are. [auto]", rich_help_panel=_MODEL),
    ] = None,
    quantization_group: Annotated[
        int | None, typer.Option(help="Channels a scale in w4a16: 32, 64, 128. [64]", rich_help_panel=_MODEL)
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            help="That meet weights of 4 bits: int8 is faster, on a CPU; auto: as they are. [auto]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    kv_dtype: Annotated[
        str | None,
        typer.Option(
            help="model: as the activations; int8; or auto: int8 beside quantized weights. [auto]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    max_model_len: Annotated[str | None, typer.Option(help="Tokens, or auto. [auto]", rich_help_panel=_MODEL)] = None,
    kv_memory: Annotated[
        str | None, typer.Option(help='Such as "2GiB", or auto. [auto]', rich_help_panel=_MODEL)
    ] = None,
    kv_host_memory: Annotated[
        str | None,
        typer.Option(
            help='Shared memory for KV pages beyond the replicas, which survives them: "8GiB", auto, or 0 for none. '
            "[auto]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    kv_disk: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where pages go that it has no room for. [none]", rich_help_panel=_MODEL),
    ] = None,
    kv_disk_size: Annotated[str | None, typer.Option(help='Such as "100GiB". [16GiB]', rich_help_panel=_MODEL)] = None,
    prefix_caching: Annotated[
        bool | None,
        typer.Option(help="Whether prompts that begin alike share what was computed. [yes]", rich_help_panel=_MODEL),
    ] = None,
    max_sequences: Annotated[
        int | None, typer.Option(help="Sequences run at once. [128]", rich_help_panel=_MODEL)
    ] = None,
    max_batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an iteration. [1024]", rich_help_panel=_MODEL)
    ] = None,
    max_stall: Annotated[
        float | None,
        typer.Option(help="Seconds that prompts may keep streams waiting for a token. [0.25]", rich_help_panel=_MODEL),
    ] = None,
    admission: Annotated[
        str | None, typer.Option(help="optimistic, or reserve. [optimistic]", rich_help_panel=_MODEL)
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, or auto. [auto]", rich_help_panel=_MODEL)] = None,
    deterministic: Annotated[
        bool | None,
        typer.Option(help="The same bits however a sequence is cut, at some speed. [no]", rich_help_panel=_MODEL),
    ] = None,
    threads: Annotated[
        str | None, typer.Option(help="Of the arithmetic, per replica, or auto. [auto]", rich_help_panel=_MODEL)
    ] = None,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API, on a private Ray on this machine.

    Ctrl-C stops it: requests may go on for --drain-timeout seconds, then they end with an error. A second one stops it
    at once.

    Exit codes: 0 stopped by Ctrl-C or SIGTERM, 1 failed, 2 bad flag, config file, model or port, 130 interrupted before
    the model was ready.

    Examples:

      manta serve

      manta serve ./my-model --replicas 2 --port 9000

      manta serve org/name --kv-memory 4GiB --max-model-len 4096

      manta serve ./my-model --quantization w8a8

      manta serve ./my-model --tensor-parallel 2
    """
    from deployments.launcher import LaunchOptions, launch

    chosen = {
        "replicas": replicas,
        "served_model_name": served_model_name,
        "gateway.replicas": gateways,
        "parallel.tensor": tensor_parallel,
        "parallel.pipeline": pipeline_parallel,
        "parallel.expert": expert_parallel,
        "engine.model": model,
        "engine.revision": revision,
        "engine.dtype": dtype,
        "engine.quantization": quantization,
        "engine.quantization_group": quantization_group,
        "engine.activations": activations,
        "engine.max_model_len": max_model_len,
        "engine.device": device,
        "engine.threads": threads,
        "engine.deterministic": deterministic,
        "engine.kv.memory": kv_memory,
        "engine.kv.dtype": kv_dtype,
        "kv_host.memory": kv_host_memory,
        "kv_host.disk": kv_disk,
        "kv_host.disk_size": kv_disk_size,
        "engine.kv.prefix_caching": prefix_caching,
        "engine.scheduler.max_sequences": max_sequences,
        "engine.scheduler.max_batch_tokens": max_batch_tokens,
        "engine.scheduler.max_stall_s": max_stall,
        "engine.scheduler.admission": admission,
    }
    application = configure(config, {name: value for name, value in chosen.items() if value is not None})
    launch(application, LaunchOptions(host, port, dashboard, drain_timeout), say=lambda line: print(line, flush=True))


def configure(file: Path | None, chosen: dict[str, Any]) -> "AppConfig":
    """The validated configuration of a file and of flags, which win; `chosen` maps dotted field names to values.

    Raises CommandError that names the field.
    """
    from pydantic import ValidationError

    from deployments.config import AppConfig

    args = {} if file is None else read_args(file)
    for name, value in chosen.items():
        *sections, field = name.split(".")
        section = args
        for key in sections:
            section = section.setdefault(key, {})
        section[field] = value
    try:
        return AppConfig.model_validate(args)
    except ValidationError as error:
        origin = "" if file is None else f"{file}: "
        raise CommandError(f"{origin}{one_line(error)}", ExitCode.BAD_INPUT) from None


def read_args(file: Path) -> dict[str, Any]:
    """The application's args in a YAML file: the file itself, or those of the one application of a Serve config."""
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror or error}", ExitCode.BAD_INPUT) from None
    except yaml.YAMLError as error:
        raise CommandError(f"{file}: not valid YAML: {one_line(error)}", ExitCode.BAD_INPUT) from None
    if isinstance(content, dict) and "applications" in content:
        applications = content["applications"]
        if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
            raise CommandError(f"{file}: applications: expected exactly one", ExitCode.BAD_INPUT)
        content = applications[0].get("args")
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise CommandError(
            f"{file}: expected a mapping of settings, found {type(content).__name__}", ExitCode.BAD_INPUT
        )
    return content
