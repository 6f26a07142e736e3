"""The output of an offline run: a JSONL file that a later run can continue.

Owns the file from the moment it is opened: one writer at a time, one flushed line per finished prompt, and recovery of
what a killed run left behind. Knows nothing about prompts or engines.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self


class ResultFileError(ValueError):
    """An output file that cannot be continued; says which line is not a result, or who holds the file."""


class ResultFile:
    """Results by id, appended as they come.

    Opening an existing file keeps its results, drops a last line that was cut in the middle of a write, and drops
    failed prompts, so that they are tried again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.finished: dict[str, str] = {}
        """Id -> fingerprint of every result that was already there."""
        self.num_retried = 0
        """Failed prompts that were dropped."""
        self.was_torn = False
        """Whether a cut last line was dropped."""
        self._file: BinaryIO = path.open("a+b")
        try:
            self._lock(self._file)
            self._recover()
        except BaseException:
            self._file.close()
            raise

    def append(self, result: Mapping[str, Any]) -> None:
        """Writes one result, which has an "id" and a "fingerprint". It survives the death of this process."""
        # One unbuffered write per line: what a kill can leave behind is at most one torn line, at the end.
        self._file.write(json.dumps(result, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _recover(self) -> None:
        end = 0
        failed = False
        self._file.seek(0)
        for number, raw in enumerate(self._file, 1):
            if not raw.endswith(b"\n"):
                self.was_torn = True
                break
            result = self._parse(raw, number)
            end += len(raw)
            if "error" in result:
                failed = True
                self.num_retried += 1
            else:
                self.finished[result["id"]] = result["fingerprint"]
        if self.was_torn:
            self._file.truncate(end)
        if failed:
            self._drop_failed()
        self._file.seek(0, os.SEEK_END)

    def _parse(self, raw: bytes, number: int) -> dict[str, Any]:
        try:
            result = json.loads(raw)
        except ValueError:
            result = None
        if not isinstance(result, dict) or not {"id", "fingerprint"} <= result.keys():
            raise ResultFileError(
                f"{self.path}, line {number}: not a result of an earlier run; choose another output file"
            )
        return result

    def _drop_failed(self) -> None:
        """Rewrites the file without its failed prompts: aside and renamed, so that a kill here loses nothing."""
        partial = self.path.with_name(f".{self.path.name}.partial")
        kept = partial.open("w+b")
        # Locked before it takes the name, or a second run could slip in between.
        self._lock(kept)
        self._file.seek(0)
        kept.writelines(raw for raw in self._file if "error" not in json.loads(raw))
        kept.flush()
        os.fsync(kept.fileno())
        partial.replace(self.path)
        self._file.close()
        self._file = kept

    def _lock(self, file: BinaryIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResultFileError(f"{self.path} is being written by another run") from None
