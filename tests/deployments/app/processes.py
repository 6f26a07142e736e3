"""What runs below a process, for tests that kill some of it or that want nothing left."""

from pathlib import Path


def below(pid: int) -> dict[int, str]:
    """Process id -> command line of every process below `pid`; zombies left out."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                command = (entry / "cmdline").read_text().replace("\0", " ").strip()
            except OSError:
                continue
            if state not in "ZX":
                parents[int(entry.name)] = (int(parent), command)
    found: dict[int, str] = {}
    frontier = [pid]
    while frontier:
        parent = frontier.pop()
        children = {child: command for child, (above, command) in parents.items() if above == parent}
        found |= children
        frontier.extend(children)
    return found
