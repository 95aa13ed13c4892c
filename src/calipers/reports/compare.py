"""`compare_reports`: the errors of the modules that several reports have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from calipers.calibration.targets import kind_of
from calipers.reports.records import Measure, Told, choose_measure, error_of

__all__ = ["Comparison", "Row", "compare_reports"]


@dataclass(frozen=True)
class Row:
    """A module, or a kind of modules, and its error in each report.

    Attributes:
        name: The module's; of a kind with `*` for numbers.
        count: Modules of the kind; 1 for a module.
        errors: One for each report; of a kind the medians.
    """

    name: str
    count: int
    errors: tuple[float, ...]

    @property
    def best(self) -> int | None:
        """Index of the report with the smallest error; None where others have the same."""
        least = min(self.errors)
        return self.errors.index(least) if self.errors.count(least) == 1 else None

    def change(self, index: int) -> float | None:
        """Relative change of the error from the first report to another; None from 0."""
        first = self.errors[0]
        return self.errors[index] / first - 1 if first else None


@dataclass(frozen=True)
class Comparison:
    """Several reports, side by side.

    Attributes:
        measure: The error that all of them have.
        kinds: One row for each kind of modules.
        modules: One row for each module that all reports have an error of.
        only: How many modules each report has beyond these.
    """

    measure: Measure
    kinds: list[Row]
    modules: list[Row]
    only: tuple[int, ...]


def compare_reports(reports: Sequence[Told]) -> Comparison:
    """Compare the errors of modules by name, in the order of the first report.

    Args:
        reports: At least two.

    Example:
        >>> def told(*errors):
        ...     names = (f"layers.{i}.q" for i in range(9))
        ...     pairs = zip(names, errors)
        ...     return {"modules": [{"name": n, "weight_error": e} for n, e in pairs]}
        >>> found = compare_reports([told(0.1, 0.2, 0.3), told(0.2, 0.1)])
        >>> found.modules[0].best, found.modules[1].best, found.only
        (0, 1, (1, 0))
        >>> found.kinds
        [Row(name='layers.*.q', count=2, errors=(0.15000000000000002, 0.15000000000000002))]
    """
    measure = choose_measure(reports)
    errors = [
        {m["name"]: e for m in each["modules"] if (e := error_of(m, measure)) is not None}
        for each in reports
    ]
    common = [name for name in errors[0] if all(name in each for each in errors[1:])]
    modules = [Row(name, 1, tuple(each[name] for each in errors)) for name in common]
    kinds: dict[str, list[Row]] = {}
    for row in modules:
        kinds.setdefault(kind_of(row.name), []).append(row)
    of_kinds = [
        Row(kind, len(rows), tuple(median(e) for e in zip(*(r.errors for r in rows), strict=True)))
        for kind, rows in kinds.items()
    ]
    only = tuple(len(each) - len(common) for each in errors)
    return Comparison(measure, of_kinds, modules, only)
