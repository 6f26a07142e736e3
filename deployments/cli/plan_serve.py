"""The settings with which a replica is cut and sized as a plan says. Decides nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.planner.layout import Plan, Problem
from engine.models.directory import CONFIG


def serve_settings(model: str, revision: str | None, problem: Problem, plan: Plan) -> dict[str, Any]:
    """Of `deployments.config.AppConfig`: what the plan decides or was asked for, and nothing else.

    What "auto" would come to is written down, since it is what was counted with.
    """
    form, layout = problem.form, plan.layout
    engine: dict[str, Any] = {"model": _directory(model), "device": problem.accelerator.device, "dtype": form.dtype}
    if revision is not None:
        engine["revision"] = revision
    if form.conversion is not None:
        engine["quantization"] = form.conversion
    group = form.group if form.checkpoint is None else form.head_group
    if form.conversion == "w4a16" and group is not None:
        engine["quantization_group"] = group
    engine["kv"] = {"memory": plan.kv_memory, "dtype": "int8" if form.int8_kv else "model"}
    wishes = problem.wishes
    engine["scheduler"] = {"max_sequences": wishes.sequences, "max_batch_tokens": wishes.batch_tokens}
    settings: dict[str, Any] = {"replicas": plan.replicas}
    if layout.ranks > 1:
        settings["parallel"] = {"tensor": layout.tensor, "pipeline": layout.pipeline, "expert": layout.expert}
    if layout.pipeline > 1:
        settings["parallel"]["layers"] = list(plan.layers)
    return {**settings, "engine": engine}


def as_yaml(settings: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(settings), sort_keys=False, default_flow_style=None, width=1000)


def _directory(model: str) -> str:
    file = Path(model).expanduser()
    return str(file.parent) if file.name == CONFIG and file.is_file() else model
