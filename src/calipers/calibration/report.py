"""`CalibrationReport`: what a calibration did, module by module, and one screen of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from math import inf, isnan
from typing import TYPE_CHECKING, Any, Literal

from compressed_tensors.offload import disable_onloading
from torch import nn

from calipers._words import did_you_mean
from calipers.calibration.architectures import projection_weights
from calipers.calibration.report_text import report_html, report_text
from calipers.calibration.targets import LeftAlone
from calipers.errors import CalipersError, UnknownModuleError
from calipers.ranges.measures import Plot
from calipers.ranges.output_error import GramKind

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = [
    "ActivationMeasures",
    "CalibrationReport",
    "ExpertCoverage",
    "LeftAlone",
    "ModuleReport",
    "ShadowReport",
    "Stability",
    "WeightMeasures",
    "quantized_share",
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
class WeightMeasures:
    """What quantization did to a weight W, Q being what it is fake-quantized to.

    Attributes:
        error: Relative error ||W - Q|| / ||W||; None where it is no number.
        output_error: Relative error ||X (W - Q)'|| / ||X W'|| of what the layer computes, with the
            inputs X of the calibration data, from what its observer holds of X'X; None where it
            looked at no inputs.
        output_error_from: How much of X'X that was: "gram", all of it; "blocks", the blocks of
            columns that share a scale and a sketch of the rest; "diagonal", the mean squares of
            columns, as if inputs were not correlated.
        held_out_error: The same error, measured on tokens that no observer saw; None where no
            batches were held out (several observers hold them out).
        sqnr_db: 10 log10(||W||^2 / ||W - Q||^2), dB; None without any error.
        clipped: Share of values beyond the last code by more than half of its step. This and the
            next two are of a sample of at most 65536 values.
        zeros: Share of values whose code stands for 0.
        entropy: Bits of the distribution of codes; None where there is no sample, and so are the
            two above.
        bits: Bits of a code.
        scales_saturated: Share of the stored scales at the top of E4M3; None where scales have
            another format.
        scales_underflowed: Share at the bottom of E4M3, its smallest code or 0; None as above.
    """

    error: float | None = None
    output_error: float | None = None
    output_error_from: GramKind | None = None
    held_out_error: float | None = None
    sqnr_db: float | None = None
    clipped: float | None = None
    zeros: float | None = None
    entropy: float | None = None
    bits: int = 0
    scales_saturated: float | None = None
    scales_underflowed: float | None = None


@dataclass(frozen=True)
class ActivationMeasures:
    """How activations fare that are quantized with stored scales.

    Attributes:
        sqnr_db: 10 log10(||x||^2 / ||x - q||^2) of sampled tokens, dB; None where none were seen.
        judged_by: "held-out", tokens that no observer saw; "in-sample", tokens of the calibration.
        clipped: Share of their values beyond the last code by more than half of its step; None
            where the local scales of NVFP4 follow each value.
        moved: Largest relative change of a scale over the last quarter of the batches; None where
            it is not known (few batches, or a number of them that is not known before).
    """

    sqnr_db: float | None = None
    judged_by: Literal["held-out", "in-sample"] | None = None
    clipped: float | None = None
    moved: float | None = None


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
        weight: Measures of the weight; None where it stays as it is.
        activation_measures: By base name ("input", "output", "k" ...) those of activations with
            stored scales.
        plots: By base name what a picture of the tensor needs: a histogram of a sample, the range,
            and the error of other ranges.
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
    weight: WeightMeasures | None = field(default=None, hash=False)
    activation_measures: dict[str, ActivationMeasures] = field(default_factory=dict, hash=False)
    plots: dict[str, Plot] = field(default_factory=dict, hash=False, repr=False)


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


@dataclass
class Stability:
    """Whether scales settled, where data was to end once they do.

    It is looked each time that the tokens have doubled: at the scales of activations, and of eight
    rows of each weight whose observer learns from data. Where scales span rows (tensor, block) the
    mean squares of the inputs stand for them.

    Attributes:
        limit: By what share they might still move.
        reached: Whether the data ended for that reason; the next four are of the last look.
        batches: Batches up to it.
        tokens: Tokens that a module had seen by then.
        moved: What moved the most since the look before, when the tokens were half as many: the
            relative change of a scale, of a weight the mean of its scales.
        slowest: Full name of the tensor that did.
    """

    limit: float
    reached: bool = False
    batches: int = 0
    tokens: int = 0
    moved: float | None = None
    slowest: str | None = None


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
        stability: Whether scales settled, where `until_stable` was given; None elsewhere.
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
    stability: Stability | None = None

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

        Its columns are the attributes of ModuleReport but `weight`, `activation_measures` and
        `plots`, and the attributes of WeightMeasures but `error` and `bits`, which stand there.

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
        names = [each.name for each in fields(ModuleReport) if each.name not in _NESTED]
        measures = [each.name for each in fields(WeightMeasures) if each.name not in _TWICE]
        rows = [
            [getattr(row, name) for name in names]
            + [getattr(row.weight, name, None) for name in measures]
            for row in self.modules
        ]
        return pandas.DataFrame(rows, columns=[*names, *measures]).set_index("name")

    def plot(
        self,
        kind: Literal["depth", "heatmap", "module", "coverage"] = "depth",
        module: str | None = None,
        measure: Literal["held_out_error", "output_error", "error"] | None = None,
    ) -> Figure:
        """A matplotlib Figure of the report, drawn as on the page of `calipers report`.

        Args:
            kind: "depth", the error of each projection by layer; "heatmap", the same as a matrix;
                "module", the histograms of one module's tensors with their ranges and the error
                of other ranges; "coverage", the tokens that experts saw, by layer.
            module: Name of the module, with kind="module" alone.
            measure: Which error: "error" is that of the weight. None for the first of them that
                the report has.

        Returns:
            A figure that pyplot does not know; `figure.savefig(path)` writes it.

        Raises:
            CalipersError: matplotlib is not installed, it comes with the extra "plot"; an
                unknown kind, module or measure; nothing to draw.
        """
        from calipers.reports.plot import plot

        return plot(self.to_dict(), kind, module, measure)

    def __str__(self) -> str:
        return report_text(self)

    def _repr_html_(self) -> str:
        return report_html(self)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers, ready for JSON."""
        data = asdict(self)
        for row in data["modules"]:
            row["fallback"], row["states"] = list(row["fallback"]), list(row["states"])
            for plot in row["plots"].values():
                plot["range"] = list(plot["range"])
        data["coverage"] = [each.to_dict() for each in self.coverage]
        return data


def _badness(row: ModuleReport) -> float:
    error = row.weight_error
    return inf if error is None or isnan(error) else error


#: Attributes of a module that are no single value, and those of its weight that stand twice.
_NESTED, _TWICE = ("weight", "activation_measures", "plots"), ("error", "bits")
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
