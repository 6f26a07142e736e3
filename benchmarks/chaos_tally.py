"""What became of the requests of each kind, and under the kills of each victim, as a table. Pure."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from benchmarks.chaos_streams import Answer


@dataclass(slots=True)
class Row:
    """What became of some requests."""

    answers: int = 0
    cut: int = 0
    """Those whose replica or gateway was killed under them."""
    resumed: int = 0
    """Streams that their clients came back to."""
    repeated: int = 0
    """Requests that were sent again because nothing had come of them."""
    errors: int = 0
    mismatches: int = 0
    gaps: list[float] = field(default_factory=list)

    def add(self, other: "Row") -> None:
        self.answers += other.answers
        self.cut += other.cut
        self.resumed += other.resumed
        self.repeated += other.repeated
        self.errors += other.errors
        self.mismatches += other.mismatches
        self.gaps += other.gaps


class Tally:
    """All rounds so far."""

    def __init__(self, kinds: Sequence[str], victims: Sequence[str]) -> None:
        self.kinds = {name: Row() for name in kinds}
        self.victims = {name: Row() for name in victims}
        self.kills = dict.fromkeys(victims, 0)

    def add(
        self,
        victim: str,
        answers: Sequence[Answer],
        wanted: Sequence[Answer],
        moment: float,
        continued: Collection[str],
    ) -> list[str]:
        """Takes in the answers of one kill, one of each kind in their order; returns what is wrong with them.

        `moment`: of the kill. `continued`: ids of answers that went on at another replica.
        """
        self.kills[victim] += 1
        complaints = []
        for (name, total), answer, expected in zip(self.kinds.items(), answers, wanted, strict=True):
            row = Row(answers=1, resumed=answer.resumed, repeated=answer.repeated)
            if answer.error is not None:
                row.errors = 1
                complaints.append(f"{name}: {answer.error}")
            elif (found := answer.difference(expected)) is not None:
                row.mismatches = 1
                complaints.append(f"{name}: {found}")
            gap = answer.gap(moment, expected.first_s)
            row.cut = int(answer.resumed or answer.repeated or answer.id in continued)
            if row.cut and gap is not None:
                row.gaps = [gap]
            total.add(row)
            if victim == "kv-host" and not row.cut and gap is not None:
                # Nobody is cut, and everybody might have had to wait.
                row.gaps = [gap]
            self.victims[victim].add(row)
        return complaints

    @property
    def failed(self) -> bool:
        return any(row.errors or row.mismatches for row in self.kinds.values())

    def table(self) -> str:
        total = Row()
        for row in self.kinds.values():
            total.add(row)
        lines = [_HEAD, *(_line(name, row) for name, row in self.kinds.items())]
        lines += [_line(f"{name}, {self.kills[name]} kills", row) for name, row in self.victims.items()]
        return "\n".join([*lines, _line("all", total)])


_HEAD = (
    f"{'':20}{'answers':>9}{'cut':>6}{'resumed':>9}{'repeated':>10}{'errors':>8}{'mismatches':>12}"
    f"{'gap p50':>10}{'gap p99':>10}"
)


def _line(name: str, row: Row) -> str:
    gaps = (percentile(row.gaps, share) for share in (0.5, 0.99))
    shown = "".join(f"{'-' if gap is None else f'{gap:.2f} s':>10}" for gap in gaps)
    counts = f"{row.answers:9}{row.cut:6}{row.resumed:9}{row.repeated:10}{row.errors:8}{row.mismatches:12}"
    return f"{name:20}{counts}{shown}"


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below or at which this share of them lies; None of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
