"""The runs of a comparison: schemes times observers, checked, executed and judged."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from calipers.agreement import Agreement, ReferenceLogits
from calipers.calibration import CalibrationReport, calibrate, resolve_config
from calipers.calibration.batches import Progress
from calipers.calibration.config import has_free_group_size
from calipers.calibration.plan import ObserverChoice, plan_observers
from calipers.calibration.shadows import Shadows, read_options, split_options
from calipers.calibration.targets import schemes_by_target
from calipers.checkpoint import compressed_size
from calipers.cli.judging import (
    Change,
    Measured,
    common_objective,
    compare_measured,
    figure,
    in_words,
    measure,
)
from calipers.cli.schemes import kv_cache_of, sized
from calipers.errors import CalipersError
from calipers.evaluation import Perplexity
from calipers.observers import Observer
from calipers.text.for_model import model_inputs

__all__ = ["Run", "RunResult", "check_runs", "execute", "judge_schemes", "plan_runs"]


@dataclass(frozen=True)
class Run:
    """One scheme with one observer of weights and its options.

    Attributes:
        scheme: As given.
        observer: Of weights; None where the scheme quantizes none.
        options: Of that observer.
        scheme_options: Arguments of the scheme's weights that are to be others.
        kv_cache: As `calibrate` takes it.
        shadows: Which observers look at each tensor beside, and who wins.
    """

    scheme: str
    observer: str | None
    options: dict[str, Any]
    scheme_options: dict[str, Any] = field(default_factory=dict)
    kv_cache: str | None = None
    shadows: Shadows = field(default_factory=Shadows)

    @property
    def name(self) -> str:
        """The observer with its options, as a table shows it."""
        return " ".join([self.observer or "-", *(f"{k}={v}" for k, v in self.options.items())])

    @property
    def cache(self) -> str | None:
        """A word for what keys and values are quantized to; None where they are not."""
        return kv_cache_of(resolve_config(self.scheme, kv_cache=self.kv_cache))

    def arguments(self) -> dict[str, Any]:
        """What `calibrate` is called with, the model and its data aside."""
        return {
            "scheme": self.scheme,
            "observer": self.observer,
            "observer_options": self.options,
            "scheme_options": self.scheme_options,
            "kv_cache": self.kv_cache,
            "shadow": [each.label for each in self.shadows.weight],
            "activation_shadow": [each.label for each in self.shadows.activation],
            "pick": self.shadows.pick,
        }


@dataclass(frozen=True)
class RunResult:
    """What came of a run.

    Attributes:
        run: What was asked for.
        weight_error: Mean relative error of the weights over modules; None where none changed.
        after: Perplexity; None for a model without a language head.
        change: Of the perplexity, or the output error.
        bytes: Of the tensors of the checkpoint that it would make.
        seconds: Wall-clock time of the calibration.
        objective: What the observer minimised, where it has a choice.
        report: What the calibration did, module by module.
        agreement: Of its predictions with the unquantized model's; None where that kept none.
    """

    run: Run
    weight_error: float | None
    after: Perplexity | None
    change: Change
    bytes: int
    seconds: float
    objective: str | None
    report: CalibrationReport = field(default_factory=CalibrationReport)
    agreement: Agreement | None = None


def plan_runs(
    schemes: Sequence[str],
    observers: Sequence[str],
    common: list[str],
    group_size: int | None = None,
    kv_cache: str | None = None,
    shadows: Shadows | None = None,
) -> list[Run]:
    """Every scheme with every observer, whose options of its own stand behind a colon.

    Options "key=value" in `common` go to those observers that have them, and `group_size` to those
    schemes whose groups have no fixed size. A scheme without weights is one run, without observer.

    Raises:
        CalipersError: An unknown observer, an option without a value, a common option that no
            observer has, or a group size that no scheme has.
    """
    given = read_options(common, "--option")
    used: set[str] = set()
    chosen: list[tuple[str | None, dict[str, Any]]] = []
    for each in dict.fromkeys(observers):
        name, own = split_options(each)
        known = Observer.get_value_from_registry(name).Options.names()
        options = {key: value for key, value in given.items() if key in known}
        used |= options.keys()
        options |= read_options(own, "--option")
        chosen.append((name, options))
    if unused := given.keys() - used:
        names = ", ".join(str(name) for name, _ in chosen)
        raise CalipersError(f"--option: none of {names} has an option {min(unused)!r}")
    runs = []
    for scheme in dict.fromkeys(schemes):
        weights = _weights_of(scheme, kv_cache)
        more = sized(group_size) if any(map(has_free_group_size, weights)) else {}
        for observer, having in chosen if weights else [(None, {})]:
            runs.append(Run(scheme, observer, having, more, kv_cache, shadows or Shadows()))
    if group_size is not None and not any(each.scheme_options for each in runs):
        resolve_config(schemes[0], (), {"group_size": group_size})  # says why not
    return runs


def _weights_of(scheme: str, kv_cache: str | None) -> list[Any]:
    """Arguments of the weights that a scheme quantizes."""
    groups = schemes_by_target(resolve_config(scheme, kv_cache=kv_cache)).values()
    return [each.weights for each in groups if each.weights is not None]


def check_runs(
    model: Any,
    runs: Sequence[Run],
    activation_observer: str | None,
    ignore: Sequence[str],
    on_unfit: Any,
    only: Any,
) -> list[Run]:
    """Refuse what the model cannot take before anything is run.

    Returns:
        The runs, each with those shadows that look at something in it.

    Raises:
        CalipersError: Names the scheme and the observer; also of a shadow that looks at nothing in
            any run.
    """

    def check(run: Run, *, spare: bool = True) -> Run:
        choice = ObserverChoice(run.observer, activation_observer, run.options, True, run.shadows)
        where = (ignore, on_unfit, run.scheme_options, run.kv_cache, only)
        try:
            plan = plan_observers(model, run.scheme, choice, *where, spare_shadows=spare)
        except CalipersError as error:
            raise CalipersError(f"scheme {run.scheme}, observer {run.name}: {error}") from None
        return replace(run, shadows=plan.choice.shadows)

    checked = [check(run) for run in runs]
    used = {each.label for run in checked for each in run.shadows.weight}
    used_by_states = {each.label for run in checked for each in run.shadows.activation}
    wanted = runs[0].shadows
    idle = Shadows(
        tuple(each for each in wanted.weight if each.label not in used),
        tuple(each for each in wanted.activation if each.label not in used_by_states),
    )
    if idle:
        check(replace(runs[0], shadows=idle), spare=False)
    return checked


def execute(
    fresh_model: Callable[[], Any],
    runs: Sequence[Run],
    texts: Sequence[Tensor | Mapping[str, Any]],
    judged: Sequence[Tensor],
    before: Measured,
    reference: ReferenceLogits,
    progress: Progress,
    *,
    stored: torch.dtype | None = None,
    **others: Any,
) -> list[RunResult]:
    """Quantize a model as each run asks for, and measure what came of it.

    Args:
        fresh_model: Gives an unquantized model for each run, which is let go after it.
        runs: Schemes and observers.
        texts: What to calibrate with: token ids, shape (batch, tokens) each, or arguments of the
            model.
        judged: Token ids to measure with.
        before: What the unquantized model did with `judged`.
        reference: What it kept of its logits meanwhile.
        progress: Called for each run, and for each batch that is measured.
        stored: The dtype that the checkpoint's size is told for; None for that of the model.
        others: Other arguments of `calibrate`.
    """
    results = []
    for done, run in enumerate(runs):
        progress("runs", done, len(runs))
        model = fresh_model()
        started = time.perf_counter()
        report = calibrate(model, data=model_inputs(texts, model), **run.arguments(), **others)
        seconds = time.perf_counter() - started
        errors = [each.weight_error for each in report.modules if each.weight_error is not None]
        after = measure(model, judged, progress, reference.compare)
        if stored is not None:
            model.to(stored)  # after all that is measured
        results.append(
            RunResult(
                run,
                sum(errors) / len(errors) if errors else None,
                after if isinstance(after, Perplexity) else None,
                compare_measured(before, after),
                compressed_size(model) if report.modules else model.get_memory_footprint(),
                seconds,
                common_objective(report),
                report,
                reference.agreement(),
            )
        )
        del model
        gc.collect()  # hooks and the modules that hold them are cycles
    progress("runs", len(runs), len(runs))
    return results


def judge_schemes(results: Sequence[RunResult], ignore: Sequence[str] = ()) -> dict[str, str]:
    """One verdict for each scheme, on the best of its runs."""
    found = {}
    for name in dict.fromkeys(each.run.scheme for each in results):
        tried = [each for each in results if each.run.scheme == name]
        best = min(tried, key=_rank)
        # What was tried and did no better is not advised.
        hessian = any(each.objective == "hessian" for each in tried)
        objective = "hessian" if hessian else best.objective
        words = in_words(resolve_config(name, ignore), best.change, objective)
        found[name] = words if best.run.observer is None else f"{best.run.name}: {words}"
    return found


def _rank(result: RunResult) -> float:
    """The change of the perplexity, or the output error; a broken run comes last."""
    value, _ = figure(result.change)
    return math.inf if math.isnan(value) else value
