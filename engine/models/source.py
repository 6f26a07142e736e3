"""Where a model's files come from: a local directory, the built-in model, or the hub when a hub id asks for it."""

import re
from collections.abc import Sequence
from pathlib import Path

from engine.errors import ModelError

BUILT_IN = "manta-tiny"
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")


def resolve_model(model: str, revision: str | None = None, files: Sequence[str] = HUB_FILES) -> Path:
    """The directory that holds the model's files.

    Downloads only for a hub id ("org/name") that is no local directory, and then only files of these patterns.

    Raises ModelError that says what was tried.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model == BUILT_IN:
        from engine.models.tiny import PATH

        return Path(PATH)
    if folder.exists():
        raise ModelError(f"{model}: is a file; give the directory that holds config.json and the weights")
    if not _HUB_ID.match(model) or model.startswith((".", "~")):
        raise ModelError(f'{model}: no such directory, and neither a hub id ("org/name") nor the built-in "{BUILT_IN}"')
    return _download(model, revision, files)


def _download(hub_id: str, revision: str | None, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # The client raises its own, the HTTP library's and the system's errors.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        at = f" at revision {revision!r}" if revision else ""
        raise ModelError(f"{hub_id}: no such directory, and the hub did not deliver it{at}: {reason}") from error
