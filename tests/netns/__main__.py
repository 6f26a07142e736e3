"""`python -m tests.netns`: see `tests.netns.run`, which this runs in a world of its own, or says why that cannot be."""

import sys

from tests.netns.isolation import obstacle, run_isolated
from tests.netns.run import parser


def main() -> int:
    parser().parse_args()
    if reason := obstacle():
        print(f"tests/netns: {reason}", file=sys.stderr)
        return 2
    return run_isolated("tests.netns.run", sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
