"""Which model a directory holds, told by what is in it: wherever the same files lie, they have the same name.

Pages of keys and values outlive processes, so two models must never be taken for one.
"""

import hashlib
from pathlib import Path

from engine.errors import ModelError

SAMPLES = 64
SAMPLE_BYTES = 4096
_SUFFIXES = (".json", ".safetensors")


def model_identity(folder: Path) -> bytes:
    """A digest (32 bytes) of the configuration and the weights.

    Of a large file it covers the length, the beginning (the header of safetensors) and `SAMPLES` places spread over the
    rest: training changes all of a model, and reading all of it would take as long as loading it. Raises ModelError.
    """
    digest = hashlib.blake2b(digest_size=32)
    try:
        for path in sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES):
            digest.update(len(path.name.encode()).to_bytes(8, "little") + path.name.encode())
            digest.update(_file_digest(path))
    except OSError as error:
        raise ModelError(f"{folder}: {error.strerror or error}") from error
    return digest.digest()


def _file_digest(path: Path) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        length = file.seek(0, 2)
        digest.update(length.to_bytes(8, "little"))
        for begin in sample_begins(length):
            file.seek(begin)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.digest()


def sample_begins(length: int) -> list[int]:
    """Where the pieces of a file of so many bytes begin that are read: all of a small one, else evenly spread."""
    if length <= SAMPLES * SAMPLE_BYTES:
        return list(range(0, length, SAMPLE_BYTES))
    return [index * (length - SAMPLE_BYTES) // (SAMPLES - 1) for index in range(SAMPLES)]
