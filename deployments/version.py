"""Which version of Manta runs. Reads the installed distribution's metadata and nothing else."""

from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "manta-serve"


def installed_version() -> str:
    """Version of the installed distribution, or "unknown" when the tree is run without being installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"
