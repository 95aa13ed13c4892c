"""`CalibrationReport`: what a calibration did, module by module, and one screen of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from html import escape
from math import exp, inf, isnan, log
from typing import TYPE_CHECKING, Any, Literal

from compressed_tensors.offload import disable_onloading
from torch import nn

from calipers._words import did_you_mean
from calipers.calibration.architectures import projection_weights
from calipers.calibration.targets import LeftAlone, kind_of
from calipers.errors import CalipersError, UnknownModuleError

if TYPE_CHECKING:
    import pandas

__all__ = [
    "CalibrationReport",
    "ExpertCoverage",
    "KindSummary",
    "LeftAlone",
    "ModuleReport",
    "ShadowReport",
    "ShadowSummary",
    "quantized_share",
    "shadow_cells",
    "shadow_headings",
    "summarize_coverage",
    "summarize_left_alone",
    "summarize_modules",
    "summarize_shadows",
    "with_shares",
]


@dataclass(frozen=True)
class ShadowReport:
    """One of several observers that looked at the same tensor.

    Attributes:
        observer: Its name, with its options: "optimal:objective=hessian".
        error: Squared error over the size of what was quantized, of a weight over that of the
            layer's output: ||X (W - fakequant(W))'||^2 / ||X W'||^2 with inputs X; without inputs
            ||W - fakequant(W)||^2 / ||W||^2. None where it had no data, or nothing to be judged by.
        chosen: Whether its scales were written.
        judged_by: "held-out", values of batches that no observer saw; "in-sample", values that the
            observers saw as well, where no other batch reached the module; "weight", the weight
            itself, where its inputs are not known.
    """

    observer: str
    error: float | None
    chosen: bool
    judged_by: Literal["held-out", "in-sample", "weight"]


@dataclass(frozen=True)
class ModuleReport:
    """One quantized module.

    Attributes:
        name: The module's name in the model.
        weight_observer: Name of the weight's observer, None where weights stay as they are.
        weight_bits: Bits per weight code, scales not counted; None as above.
        weight_error: Relative weight error ||W - fakequant(W)||_F / ||W||_F, computed in
            float32; 0.0 for a weight of zeros; None as above.
        activation_observer: Name of the observer of inputs or outputs; None where activations
            are not quantized, or dynamically.
        tokens: Tokens that the module saw while it was observed; 0 where no data was needed.
        fallback: "weight", "input", "output": those whose own data was missing, so that the
            stated fallback was used.
        objective: What the weight's observer minimised, where it has a choice ("imatrix").
        activations: "static" where inputs or outputs are quantized with stored scales, "local"
            (NVFP4) where only the global scale is stored, "dynamic" where none is; None where
            activations are not quantized.
        shared: Of an expert that saw few tokens: what share of its statistics, from 0 to 1, comes
            from all experts of the layer.
        states: "q", "k", "v": the states of an attention module that are quantized, with stored
            scales, by the observer of activations; none of a layer.
        shadows: By base name ("weight", "input", "k" ...) all observers of the tensor, the one that
            was asked for first; empty where there is no other.
    """

    name: str
    weight_observer: str | None = None
    weight_bits: int | None = None
    weight_error: float | None = None
    activation_observer: str | None = None
    tokens: int = 0
    fallback: tuple[str, ...] = ()
    objective: str | None = None
    activations: Literal["static", "local", "dynamic"] | None = None
    shared: float = 0.0
    states: tuple[str, ...] = ()
    shadows: dict[str, list[ShadowReport]] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class ExpertCoverage:
    """How many tokens each expert of a layer saw.

    Attributes:
        name: The experts' common name in the model, "model.layers.0.mlp.experts".
        tokens: By full name of the expert, "model.layers.0.mlp.experts.3".
        enough: Tokens from which an expert stood alone.
    """

    name: str
    tokens: dict[str, int]
    enough: int

    @property
    def few(self) -> list[str]:
        """Names of the experts that saw fewer tokens than `enough`, or none."""
        return [name for name, count in self.tokens.items() if count < self.enough]

    @property
    def unseen(self) -> list[str]:
        """Names of the experts that saw no token."""
        return [name for name, count in self.tokens.items() if not count]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain dicts, lists, strings and numbers, ready for JSON."""
        return {**asdict(self), "few": self.few, "unseen": self.unseen}


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibration did.

    `print(report)` shows one screen of it, `report[name]` gives one module's record, and a loop
    over the report goes through them all.

    Attributes:
        modules: The quantized modules in the model's order.
        skipped: Names of modules left unquantized because they saw no data.
        left_alone: All other modules with projection weights that were not quantized, each with
            its reason, in the model's order; those of `skipped` among them.
        quantized_share: Share of the model's projection weights that is quantized, from 0 to 1:
            weights of Linear, Conv1D, convolutions and fused experts; embeddings, norms and output
            heads do not count. 1.0 where the model holds none.
        seconds: Wall-clock time spent in running batches and freezing.
        batches: Batches that the model took; 0 where no observer needed data.
        held_out: Those of them that no observer saw, since several are judged by them.
        tokens_given: Tokens of the batches whose attention mask was used.
        tokens_counted: Those of them that counted: all but padding.
        unmasked: Names of modules whose values are not arranged by token in such a batch (routed
            experts of custom code), so that all of them counted, padding as well.
        coverage: How many tokens each expert saw, layer by layer; empty for models without experts,
            and where no observer needed data.
    """

    modules: list[ModuleReport] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    left_alone: list[LeftAlone] = field(default_factory=list)
    quantized_share: float = 1.0
    seconds: float = 0.0
    batches: int = 0
    tokens_given: int = 0
    tokens_counted: int = 0
    unmasked: list[str] = field(default_factory=list)
    held_out: int = 0
    coverage: list[ExpertCoverage] = field(default_factory=list)

    def __getitem__(self, name: str) -> ModuleReport:
        """The record of one quantized module, by its name in the model.

        Raises:
            UnknownModuleError: A ValueError and a KeyError; no module of that name was quantized.
                Says why where it was left alone, and which name is meant where one is near.
        """
        for row in self.modules:
            if row.name == name:
                return row
        raise UnknownModuleError(f"no quantized module {name!r}{self._why_none(name)}")

    def __contains__(self, name: object) -> bool:
        return any(name in (row.name, row) for row in self.modules)

    def __iter__(self) -> Iterator[ModuleReport]:
        return iter(self.modules)

    def _why_none(self, name: object) -> str:
        for each in self.left_alone:
            if each.name == name:
                return f": it was left alone ({each.why})"
        near = did_you_mean(name, [row.name for row in self.modules])
        return f".{near}" if near else ""

    def worst(self, n: int = 5) -> list[ModuleReport]:
        """The modules of the largest relative weight errors, the largest first.

        Args:
            n: How many at most, at least 0.

        Returns:
            Their records; modules whose weights were not quantized are not among them.

        Raises:
            CalipersError: `n` is no whole number, or negative.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise CalipersError(f"n: expected how many modules, a whole number from 0, got {n!r}")
        judged = [row for row in self.modules if row.weight_error is not None]
        # NaN, of a weight that holds some, compares with nothing: it is the worst
        return sorted(judged, key=_badness, reverse=True)[:n]

    def to_dataframe(self) -> pandas.DataFrame:
        """A pandas DataFrame with one row for each quantized module, indexed by name.

        Its columns are the attributes of ModuleReport.

        Raises:
            CalipersError: pandas is not installed; it comes with the extra "notebook".
        """
        try:
            import pandas
        except ImportError:
            raise CalipersError(
                "to_dataframe needs pandas, which is not installed: "
                "pip install 'calipers[notebook]'"
            ) from None
        names = [each.name for each in fields(ModuleReport)]
        rows = [[getattr(row, name) for name in names] for row in self.modules]
        return pandas.DataFrame(rows, columns=names).set_index("name")

    def __str__(self) -> str:
        return report_text(self)

    def _repr_html_(self) -> str:
        return report_html(self)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers, ready for JSON."""
        data = asdict(self)
        for row in data["modules"]:
            row["fallback"], row["states"] = list(row["fallback"]), list(row["states"])
        data["coverage"] = [each.to_dict() for each in self.coverage]
        return data


def _badness(row: ModuleReport) -> float:
    error = row.weight_error
    return inf if error is None or isnan(error) else error


#: These do not count as left out.
_NO_REST = ("output head", "quantized before")


def quantized_share(
    modules: Sequence[ModuleReport], model: nn.Module, left_alone: Sequence[LeftAlone]
) -> float:
    """Share of the projection weights outside of output heads that is quantized, from 0 to 1."""
    done = _quantized(modules, model, left_alone)
    rest = sum(each.weights for each in left_alone if each.reason not in _NO_REST)
    return done / (done + rest) if done + rest else 1.0


def with_shares(
    modules: Sequence[ModuleReport], model: nn.Module, left_alone: Sequence[LeftAlone]
) -> list[LeftAlone]:
    """The records with the `share` of each."""
    rest = sum(each.weights for each in left_alone if each.reason not in _NO_REST)
    total = _quantized(modules, model, left_alone) + rest
    return [
        each if each.reason in _NO_REST else replace(each, share=each.weights / max(total, 1))
        for each in left_alone
    ]


def _quantized(
    modules: Sequence[ModuleReport], model: nn.Module, left_alone: Sequence[LeftAlone]
) -> int:
    """Projection weights that are quantized, by this calibration or before."""
    with disable_onloading():
        done = sum(
            projection_weights(model.get_submodule(each.name))
            for each in modules
            if each.weight_bits is not None
        )
    return done + sum(each.weights for each in left_alone if each.reason == "quantized before")


_COLUMNS = 80
#: With headings, the worst modules and what was left alone, 24 lines at most.
_KINDS = 8
_WORST = 5
_LEFT_ALONE = 3
#: Of several observers of the same tensors, whose table takes the place of others.
_SHADOWS, _WORST_BESIDE_SHADOWS = 6, 3
_HEADINGS = ["modules", "count", "weight error (max)", "observer", "bits", "activations"]


@dataclass(frozen=True)
class KindSummary:
    """Modules whose names differ by numbers alone and that were treated alike.

    Attributes:
        name: Their name with `*` for numbers; of a module alone in its kind its own. After it, the
            states of attention, and the tensors that a fallback was used for.
        count: How many they are.
        observer: Of the weights, with what it minimised; None where weights stay as they are.
        bits: Of the weights; None as above.
        mean_error: Mean of their relative weight errors; None as above.
        max_error: The largest of them.
        activations: How activations are quantized; None where they are not.
        tokens: Most tokens that one of them saw.
    """

    name: str
    count: int
    observer: str | None
    bits: int | None
    mean_error: float | None
    max_error: float | None
    activations: str | None
    tokens: int


def summarize_modules(modules: Iterable[ModuleReport]) -> list[KindSummary]:
    """One summary for each kind of modules, in the order of the first of each."""
    kinds: dict[tuple[Any, ...], list[ModuleReport]] = defaultdict(list)
    for row in modules:
        observer = row.weight_observer
        if observer is not None and row.objective is not None:
            observer = f"{observer} ({row.objective})"
        activations = row.activation_observer or row.activations
        kind = (kind_of(row.name), observer, row.weight_bits, activations, row.fallback, row.states)
        kinds[kind].append(row)
    summaries = []
    for (name, observer, bits, activations, fallback, states), members in kinds.items():
        errors = [m.weight_error for m in members if m.weight_error is not None]
        note = f" ({', '.join(states)})" if states else ""
        note += f" (fallback: {', '.join(fallback)})" if fallback else ""
        summaries.append(
            KindSummary(
                name=(name if len(members) > 1 else members[0].name) + note,
                count=len(members),
                observer=observer,
                bits=bits,
                mean_error=sum(errors) / len(errors) if errors else None,
                max_error=max(errors, default=None),
                activations=activations,
                tokens=max(m.tokens for m in members),
            )
        )
    return summaries


@dataclass(frozen=True)
class ShadowSummary:
    """One of several observers, over all tensors that it looked at with others.

    Attributes:
        tensors: "weights" or "activations", states of attention among these.
        observer: With its options.
        error: Geometric mean of its errors; None where it has none.
        judged: Tensors that it has an error of.
        best: On how many of them no other observer has a smaller error, or the same before it.
        chosen: On how many its scales were written.
    """

    tensors: str
    observer: str
    error: float | None
    judged: int
    best: int
    chosen: int


def summarize_shadows(modules: Iterable[ModuleReport]) -> list[ShadowSummary]:
    """One summary for each of several observers of weights, then of activations."""
    found: dict[tuple[str, str], list[tuple[ShadowReport, bool]]] = {}
    for base_name, rows in (pair for each in modules for pair in each.shadows.items()):
        judged = [row for row in rows if row.error is not None]
        best = min(judged, key=_shadow_badness, default=None)
        tensors = "weights" if base_name == "weight" else "activations"
        for row in rows:
            found.setdefault((tensors, row.observer), []).append((row, row is best))
    summaries = []
    for (tensors, observer), pairs in sorted(
        found.items(), key=lambda pair: pair[0][0] != "weights"
    ):
        errors = [row.error for row, _ in pairs if row.error is not None]
        summaries.append(
            ShadowSummary(
                tensors,
                observer,
                error=_geometric_mean(errors) if errors else None,
                judged=len(errors),
                best=sum(best for _, best in pairs),
                chosen=sum(row.chosen for row, _ in pairs),
            )
        )
    return summaries


def _shadow_badness(row: ShadowReport) -> float:
    return inf if row.error is None or isnan(row.error) else row.error


def _geometric_mean(values: Sequence[float]) -> float:
    return 0.0 if 0.0 in values else exp(sum(map(log, values)) / len(values))


def shadow_headings(modules: Iterable[ModuleReport]) -> list[str]:
    """The heads of a table of several observers, which say what the errors were measured on."""
    kinds = {row.judged_by for each in modules for rows in each.shadows.values() for row in rows}
    error = f"{kinds.pop()} error" if len(kinds) == 1 else "error"
    return ["observers", "tensors", error, "best", "chosen"]


def summarize_left_alone(left_alone: Iterable[LeftAlone]) -> list[str]:
    """One line for all modules whose names differ by numbers alone and that share a reason."""
    kinds: dict[tuple[str, str], list[LeftAlone]] = defaultdict(list)
    for each in left_alone:
        kinds[kind_of(each.name), each.why].append(each)
    lines = []
    for (kind, why), members in kinds.items():
        name = members[0].name if len(members) == 1 else f"{kind} ({len(members)})"
        share = sum(each.share for each in members)
        lines.append(f"{name}: {why}" + (f" ({share:.1%})" if share else ""))
    return lines


def summarize_coverage(coverage: Sequence[ExpertCoverage]) -> list[str]:
    """A line on experts that saw few tokens; none where there are none."""
    few = sum(len(each.few) for each in coverage)
    if not few:
        return []
    experts = sum(len(each.tokens) for each in coverage)
    unseen = sum(len(each.unseen) for each in coverage)
    enough = coverage[0].enough
    return [f"experts: {few} of {experts} saw fewer than {enough} tokens, {unseen} none (coverage)"]


def report_text(report: CalibrationReport) -> str:
    """At most 24 lines of at most 80 columns: the kinds, the worst modules, what was left alone."""
    lines = [_headline(report)]
    kinds = summarize_modules(report.modules)
    shadows = _shadow_lines(report)
    most, bad = _KINDS, _WORST
    if shadows:
        bad = _WORST_BESIDE_SHADOWS
        most = min(_KINDS, _KINDS + _WORST - bad - len(shadows))
    if kinds:
        rows = [_HEADINGS, *(_cells(each) for each in kinds[:most])]
        shared, rows = _without_shared(rows)
        lines += [_shorten(shared, _COLUMNS)] if shared else []
        lines += _table(rows)
        lines += _more(len(kinds) - most, "kinds of modules")
    lines += shadows
    worst = report.worst(bad)
    if len(report.modules) > 1 and worst:
        lines.append("largest weight errors")
        width = max(len(each.name) for each in worst)
        lines += [_shorten(f"  {m.name:<{width}}", 71) + f"  {m.weight_error:.4f}" for m in worst]
    lines += [_shorten(each, _COLUMNS) for each in summarize_coverage(report.coverage)]
    left_alone = summarize_left_alone(report.left_alone)
    if left_alone:
        lines.append("left unquantized")
        lines += [_shorten(f"  {each}", _COLUMNS) for each in left_alone[:_LEFT_ALONE]]
        lines += _more(len(left_alone) - _LEFT_ALONE, "kinds (see left_alone)")
    return "\n".join(lines)


def _shadow_lines(report: CalibrationReport) -> list[str]:
    """How several observers of the same tensors compare; empty without shadows."""
    summaries = summarize_shadows(report.modules)
    if not summaries:
        return []
    rows = [shadow_headings(report.modules), *shadow_cells(summaries[:_SHADOWS])]
    return [*_table(rows), *_more(len(summaries) - _SHADOWS, "observers (see shadows)")]


def shadow_cells(summaries: Iterable[ShadowSummary]) -> list[list[str]]:
    """The rows of a table of several observers."""
    return [
        [
            each.observer,
            each.tensors,
            "-" if each.error is None else f"{each.error:.3g}",
            f"{each.best} of {each.judged}",
            str(each.chosen),
        ]
        for each in summaries
    ]


def report_html(report: CalibrationReport) -> str:
    """The same as tables, for notebooks; not cut to a screen, but for the worst modules."""
    parts = [f"<p>{escape(_headline(report))}</p>"]
    kinds = [_cells(each) for each in summarize_modules(report.modules)]
    parts.append(_html_table(_HEADINGS, kinds))
    shadows = shadow_cells(summarize_shadows(report.modules))
    parts.append(_html_table(shadow_headings(report.modules), shadows))
    worst = [[m.name, f"{m.weight_error:.4f}"] for m in report.worst(_WORST)]
    parts.append(_html_table(["largest weight errors", ""], worst))
    parts += [f"<p>{escape(each)}</p>" for each in summarize_coverage(report.coverage)]
    left_alone = [[each] for each in summarize_left_alone(report.left_alone)]
    parts.append(_html_table(["left unquantized"], left_alone))
    return "\n".join(part for part in parts if part)


def _headline(report: CalibrationReport) -> str:
    count = len(report.modules)
    told = (
        f"{count} module{'s' * (count != 1)} quantized, {report.quantized_share:.1%} of the "
        f"projection weights"
    )
    if report.batches:
        told += f"; {report.batches} batch{'es' * (report.batches != 1)}"
    return f"{told}; {report.seconds:.1f} s"


def _cells(kind: KindSummary) -> list[str]:
    error = "-"
    if kind.mean_error is not None:
        error = f"{kind.mean_error:.4f} ({kind.max_error:.4f})"
    return [
        kind.name,
        str(kind.count),
        error,
        kind.observer or "-",
        "-" if kind.bits is None else str(kind.bits),
        kind.activations or "-",
    ]


def _without_shared(rows: list[list[str]]) -> tuple[str, list[list[str]]]:
    """Take out columns that say the same of every kind, for one line and more room for names."""
    shared, kept = [], []
    for heading, *cells in zip(*rows, strict=True):
        if heading in ("observer", "bits", "activations") and len(set(cells)) == 1:
            shared += [f"{heading} {cells[0]}"] if cells[0] != "-" else []
        else:
            kept.append([heading, *cells])
    return ", ".join(shared), [list(row) for row in zip(*kept, strict=True)]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side; the first one, names, gets what room the others leave."""
    rows = [[*row[:2], *(_shorten(cell, 18) for cell in row[2:])] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    room = _COLUMNS - sum(widths[1:]) - 2 * (len(widths) - 1)
    widths[0] = min(widths[0], room)
    return [
        "  ".join(
            _shorten(cell, width).ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _more(count: int, what: str) -> list[str]:
    return [f"  ... and {count} other {what}"] if count > 0 else []


def _shorten(text: str, width: int) -> str:
    """Cut to a width in the middle: the end of a module's name tells the most."""
    if len(text) <= width:
        return text
    head = (width - 3) // 3
    return f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"


def _html_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{escape(each)}</th>" for each in headings)
    body = "\n".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
