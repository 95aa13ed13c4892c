"""`calibrate`: the whole of it in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from calipers._unwrap import unwrap, without_wrappers
from calipers.calibration.batches import Progress
from calipers.calibration.checks import OnUnfit
from calipers.calibration.choice import ObserverChoice
from calipers.calibration.given import expect_model
from calipers.calibration.observed import ObservedModule
from calipers.calibration.plan import plan_observers, without_never_called
from calipers.calibration.report import CalibrationReport
from calipers.calibration.schemes import SchemeLike
from calipers.calibration.session import Calibration, OnMissing, check_on_missing
from calipers.errors import MissingDataError
from calipers.text.for_model import batches_for_model

__all__ = ["calibrate", "refuse_without_data"]


def calibrate(
    model: torch.nn.Module,
    scheme: SchemeLike = "W4A16",
    observer: str | None = None,
    data: str | Path | Iterable[Any] | None = None,
    ignore: str | Iterable[str] = (),
    *,
    observer_options: Mapping[str, Any] | None = None,
    activation_observer: str | None = None,
    on_missing: OnMissing = "error",
    on_unfit: OnUnfit = "error",
    progress: Progress | None = None,
    use_attention_mask: bool = True,
    tokenizer: Any = None,
    samples: int = 128,
    sequence_length: int = 512,
    scheme_options: Mapping[str, Any] | None = None,
) -> CalibrationReport:
    """Quantize a model in place: attach observers, run data, freeze, detach.

    Args:
        model: Any torch model with Linear or Embedding layers, offloaded or not. Of a wrapper
            (torch.compile, DataParallel and their like) the model inside is meant, as in `attach`.
        scheme: A QuantizationConfig, a QuantizationScheme, a preset name, or the path of a YAML
            file; see `resolve_config`.
        observer: Observer of weights; None takes the one that the scheme names, else "optimal"
            where there is data and "memoryless_minmax" where there is none.
        data: Batches, see `Calibration.run`; or text: the path of a file or of a saved dataset, a
            list of strings or of samples with fields, or a dataset, see `read_batches`. None where
            the observers and the scheme need none: weights alone, or dynamic activations; data
            that is given all the same is not run then.
        ignore: Modules left alone: names, class names or "re:" patterns, of layers or of what
            contains them. Output heads and routers are left alone in any case, unless a target of
            the scheme is the exact name of one.
        observer_options: Options of the weight observers.
        activation_observer: Observer of static activations; None takes the one that the scheme
            names, else "static_minmax".
        on_missing: What to do about modules that saw no data; see `Calibration.freeze`.
        on_unfit: Modules whose columns a group size does not divide: "error" refuses the scheme,
            "skip" leaves them alone.
        progress: Called as `progress(stage, done, total)` for the stages "batches",
            "global scales", "weights" and "activations"; `total` is None where it is not known.
        use_attention_mask: Leave the padding of batches out; see `Calibration.run`.
        tokenizer: The model's tokenizer, for text.
        samples: Most sequences of text.
        sequence_length: Most tokens of a sequence of text; never more than the positions that the
            model's config names.
        scheme_options: Arguments of the scheme's weights that are to be others, as
            `{"group_size": 64}`; see `resolve_config`.

    Returns:
        What was done, module by module. The model runs fake-quantized from here on; where an
        exception is raised instead it is as it was before.

    Raises:
        SchemeError: As `attach`.
        MissingDataError: Data is needed and `data` is None, told before any work; or modules that
            it did not reach, see `Calibration.freeze`.
        CalipersError: Text without a tokenizer, or that cannot be read; a path in place of the
            model.
        ValueError: An unknown observer, an unknown or invalid option.

    Example:
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> from calipers.demo import MODEL_PATH
        >>> model = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
        >>> tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
        >>> texts = ["Once upon a time there was a cat.", "It sat on a mat and slept."]
        >>> report = calibrate(model, "FP8", "memoryless_minmax", texts, tokenizer=tokenizer)
        >>> report.batches
        2
    """
    expect_model(model, "calipers.calibrate(model, ...)")
    check_on_missing(on_missing)
    choice = ObserverChoice(
        observer, activation_observer, dict(observer_options or {}), data is not None
    )
    model = unwrap(model)
    with without_wrappers(model):
        plan = plan_observers(model, scheme, choice, ignore, on_unfit, scheme_options)
        if data is None:
            refuse_without_data(plan.observed)
            plan = without_never_called(model, plan)
        else:
            data = batches_for_model(
                data, model, tokenizer, samples=samples, sequence_length=sequence_length
            )
        with Calibration(model, plan) as calibration:
            if data is not None:
                calibration.run(data, progress, use_attention_mask=use_attention_mask)
            return calibration.freeze(on_missing, progress)


def refuse_without_data(observed: Sequence[ObservedModule]) -> None:
    """Refuse observers that need data where there is none.

    Raises:
        MissingDataError: Says why, and for which modules.
    """
    reasons: dict[str, list[str]] = {}
    for each in observed:
        for base_name, built in each.observers.items():
            kind = type(built).__name__
            if base_name != "weight":
                why = f"{base_name} activations are quantized statically ({kind} must see them)"
            elif built.needs_data:
                why = f"{kind} weighs weights by their layer's inputs"
            else:
                continue
            reasons.setdefault(why, []).append(each.name)
    if reasons:
        lines = [
            f"  {why}: {len(names)} modules, {names[0]}{', ...' * (len(names) > 1)}"
            for why, names in reasons.items()
        ]
        raise MissingDataError(
            "\n".join(
                [
                    "this calibration needs data, and data is None:",
                    *lines,
                    "Pass data= (--data FILE): batches, as mappings of arguments (input_ids=...), "
                    "tensors, or tuples of arguments; or text, as strings or a file, with "
                    "tokenizer=.",
                ]
            )
        )
