"""Where the log lines of Manta's own modules go inside a Serve process: to Serve's log, and to the launcher's console.

Serve configures only its own logger in the processes it starts; without this, ours would be lost there.
"""

import logging
import os

LOG_FILE_VARIABLE = "MANTA_LOG_FILE"
"""Names a file that every process of the application appends to; the launcher shows it on its console."""
PACKAGES = ("engine", "cluster", "deployments", "monitoring")


def configure_logging(process: str) -> None:
    """Routes the loggers of `PACKAGES`, from INFO on. `process` names this process in the launcher's file."""
    handlers: list[logging.Handler] = [_ServeHandler()]
    path = os.environ.get(LOG_FILE_VARIABLE)
    if path:
        handlers.append(logging.FileHandler(path, delay=True))
        handlers[-1].setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {process}: %(message)s", "%H:%M:%S"))
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.handlers = handlers


class _ServeHandler(logging.Handler):
    """Hands records to Serve's logger, whose filters add what its format asks for."""

    def __init__(self) -> None:
        super().__init__()
        self._serve = logging.getLogger("ray.serve")

    def emit(self, record: logging.LogRecord) -> None:
        self._serve.handle(record)
