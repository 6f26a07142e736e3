"""`benchmarks.dispatch` over several hosts: in a world of its own, where the group is who sits at the switch."""

import sys

from benchmarks import dispatch
from tests.netns.hosts import Host, address_of, make_switch
from tests.netns.isolation import obstacle, run_isolated

_SWITCH = 254
"""The number of this process at the switch."""


def main(arguments: list[str]) -> int:
    if "--world" not in arguments:
        if reason := obstacle():
            print(f"benchmarks.dispatch --hosts: {reason}", file=sys.stderr)
            return 2
        return run_isolated("tests.netns.dispatch", ["--world", *arguments])
    options = dispatch.parser().parse_args([each for each in arguments if each != "--world"])
    make_switch()
    others = [Host(f"host{number}", number) for number in range(1, options.hosts)]
    for host in others:
        host.start()

    def layout_of(ranks: int) -> dispatch.Layout:
        """As many ranks on each host, the first of which is this one."""
        host_of = [rank * options.hosts // ranks for rank in range(ranks)]

        def inside(rank: int, command: list[str]) -> list[str]:
            return others[host_of[rank] - 1].inside(command) if host_of[rank] else command

        return dispatch.Layout(tuple(not host for host in host_of), address_of(_SWITCH), inside)

    dispatch.report(options, layout_of)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
