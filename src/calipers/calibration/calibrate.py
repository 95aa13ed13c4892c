"""`calibrate`, the whole of it in one call, and `attach`, by which it can be taken apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from calipers._unwrap import unwrap, without_wrappers
from calipers._words import check_choice
from calipers.calibration.batches import Progress
from calipers.calibration.blocks import Way
from calipers.calibration.checks import OnUnfit
from calipers.calibration.config import KVCacheLike, SchemeLike
from calipers.calibration.convergence import expect_limit, refuse_until_stable
from calipers.calibration.experts import change_when_joined, separated_experts
from calipers.calibration.few_tokens import ENOUGH_TOKENS, ExpertPolicy, OnFewTokens
from calipers.calibration.parts import Only
from calipers.calibration.plan import (
    ObserverChoice,
    Plan,
    plan_observers,
    refuse_beside_statistics,
    refuse_without_data,
)
from calipers.calibration.report import CalibrationReport
from calipers.calibration.run_plan import run_plan
from calipers.calibration.session import Calibration, OnMissing
from calipers.calibration.shadows import Pick, Shadows
from calipers.distributed import Ranks
from calipers.errors import CalipersError
from calipers.statistics_files import Statistics, read_statistics
from calipers.text.for_model import batches_for_model

__all__ = ["attach", "calibrate"]


def calibrate(
    model: torch.nn.Module,
    scheme: SchemeLike | None = "W4A16",
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
    on_few_tokens: OnFewTokens = "shrink",
    enough_tokens: int = ENOUGH_TOKENS,
    all_experts: bool = False,
    kv_cache: KVCacheLike = None,
    only: Only | None = None,
    shadow: str | Iterable[str] = (),
    activation_shadow: str | Iterable[str] = (),
    pick: Pick = "first",
    ranks: Ranks | None = None,
    statistics: str | Path | Statistics | None = None,
    memory: Way = "whole",
    propagate: bool = False,
    until_stable: float | None = None,
) -> CalibrationReport:
    """Quantize a model in place: attach observers, run data, freeze, detach.

    Args:
        model: Any torch model with Linear or Embedding layers, offloaded or not. Of a wrapper
            (torch.compile, DataParallel and their like) the model inside is meant, as in `attach`.
        scheme: A QuantizationConfig, a QuantizationScheme, a preset name, or the path of a YAML
            file; see `resolve_config`. None quantizes no layer, for a `kv_cache` alone.
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
        activation_observer: Observer of static activations and of attention states; None takes the
            one that the scheme names, else "static_minmax".
        on_missing: What to do about modules that saw no data; see `Calibration.freeze`.
        on_unfit: Modules whose columns a group size does not divide: "error" refuses the scheme,
            "skip" leaves them alone.
        progress: Called as `progress(stage, done, total)` for the stages "batches",
            "global scales", "weights" and "activations"; `total` is None where it is not known. The
            last three take turns: one group of layers that engines fuse after the other.
        use_attention_mask: Leave the padding of batches out; see `Calibration.run`.
        tokenizer: The model's tokenizer, for text; or its processor, through which samples with
            "images", "videos" or "audio" beside their "text" go, or with such parts in "messages".
        samples: Most sequences of text.
        sequence_length: Most tokens of a sequence of text; never more than the positions that the
            model's config names.
        scheme_options: Arguments of the scheme's weights that are to be others, as
            `{"group_size": 64}`; see `resolve_config`.
        on_few_tokens: What to do about experts that saw few tokens; see `Calibration.freeze`.
        enough_tokens: Tokens from which an expert stands alone.
        all_experts: Let every expert see every token; see `Calibration.run`.
        kv_cache: What keys and values are quantized to: "FP8" or "INT8" with one scale a layer,
            "FP8_HEAD" or "INT8_HEAD" with one a head, or QuantizationArgs; None leaves it to the
            config. Needs data.
        only: "language" quantizes the language part alone of a model that sees or hears as well:
            towers and projectors are left as they are. None for the whole model.
        shadow: Other observers of weights that see the same in the same pass, each "NAME" or
            "NAME:KEY=VALUE,..." with options of its own. The report has the error of all. One batch
            in eight, the second first, is held out from all observers and judges them; one batch
            alone does both. Data that is given is run, whether or not an observer needs any.
        activation_shadow: Likewise of static activations, attention states and inputs of NVFP4.
        pick: "first" writes the scales of the observer that was chosen, "best" in each module those
            with the least error; layers that share a global scale have one observer, by the sum of
            their errors.
        ranks: Processes that calibrate the same model, each with its share of the data; None takes
            all of torch.distributed, where that is initialised.
        statistics: What `observe` gathered, or the file of it, in place of data: nothing is run,
            and the scales are those that the same data would give.
        memory: "whole" runs one batch after the other through the model; "blocks" all batches
            through one block after the other: of a model offloaded by compressed-tensors, each
            block is then brought in once. The scales are the same.
        propagate: With "blocks", let each block see what the quantized ones before it give, instead
            of what the unquantized ones do.
        until_stable: End the data once no scale moves by this share or more (0.01 is 1%) while the
            tokens double; None runs all of it. Looked at are the scales of activations and of a few
            rows of each weight, on average. The report's `stability` tells how many batches and
            tokens it took. Needs memory "whole" and one process.

    Returns:
        What was done, module by module. The model runs fake-quantized from here on; where an
        exception is raised instead it is as it was before.

    Raises:
        SchemeError: As `attach`.
        MissingDataError: Data is needed and `data` is None, told before any work; or modules that
            it did not reach, see `Calibration.freeze`.
        CalipersError: Text without a tokenizer, or that cannot be read; a path in place of the
            model; a rank that failed or did not come (`RankError`).
        StatisticsError: Statistics of another model, or that lack what an observer asks for.
        ValueError: An unknown observer, an unknown or invalid option, a shadow that would look at
            nothing.

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
    _expect_model(model, "calipers.calibrate(model, ...)")
    check_choice("on_missing", on_missing, OnMissing)
    check_choice("memory", memory, Way)
    if propagate and memory != "blocks":
        raise CalipersError("propagate: only memory='blocks' runs a block once it is quantized")
    expect_limit(until_stable)
    if until_stable is not None:
        refuse_until_stable(blocks=memory == "blocks", statistics=statistics is not None)
    policy = ExpertPolicy(on_few_tokens, enough_tokens, all_experts)
    shadows = Shadows.read(shadow, activation_shadow, pick)
    if statistics is not None:
        refuse_beside_statistics(data is not None, shadows, all_experts)
        statistics = read_statistics(statistics)
    choice = ObserverChoice(
        observer,
        activation_observer,
        dict(observer_options or {}),
        data is not None or statistics is not None,
        shadows,
    )
    model = unwrap(model)
    ranks = ranks or Ranks()
    with ranks.telling_failure("calibrate"), without_wrappers(model), separated_experts(model):
        plan = plan_observers(
            model, scheme, choice, ignore, on_unfit, scheme_options, kv_cache, only
        )
        _tell_of_loader(model, plan)
        batches = None
        if statistics is not None:
            statistics.refuse_other_model(model)
        elif data is None:
            refuse_without_data(plan)
        else:
            batches = batches_for_model(
                data, model, tokenizer, samples=samples, sequence_length=sequence_length
            )
        return run_plan(
            model,
            plan,
            batches,
            on_missing,
            progress,
            use_attention_mask=use_attention_mask,
            experts=policy,
            ranks=ranks,
            statistics=statistics,
            memory=memory,
            propagate=propagate,
            until_stable=until_stable,
        )


def attach(
    model: torch.nn.Module,
    scheme: SchemeLike | None,
    *,
    observer: str | None = None,
    observer_options: Mapping[str, Any] | None = None,
    activation_observer: str | None = None,
    ignore: str | Iterable[str] = (),
    on_unfit: OnUnfit = "error",
    scheme_options: Mapping[str, Any] | None = None,
    kv_cache: KVCacheLike = None,
    only: Only | None = None,
    shadow: str | Iterable[str] = (),
    activation_shadow: str | Iterable[str] = (),
    pick: Pick = "first",
    ranks: Ranks | None = None,
) -> Calibration:
    """Attach observers to every module that the scheme targets.

    Nothing else about the model changes: it runs in full precision until `Calibration.freeze`.
    Dynamically quantized activations get no observer; "local" ones (NVFP4 inputs) get one that
    watches the global range alone.

    Args:
        model: Any torch model with Linear or Embedding layers, offloaded or not. Of a wrapper
            (torch.compile, DataParallel and their like) the model inside is meant: modules have
            its names, and batches run through it uncompiled. Wrappers around single blocks are
            taken out until the calibration is frozen or detached.
        scheme: A QuantizationConfig, a QuantizationScheme, a preset name ("W4A16"), or the path
            of a YAML file; see `resolve_config`. Never changed. None as in `calibrate`.
        observer: Observer of weights; None takes the one that the scheme names, else
            "memoryless_minmax", which needs no batches ("optimal" is better where there are some).
        observer_options: Options of the weight observers, over those of the scheme.
        activation_observer: As in `calibrate`.
        ignore: As in `calibrate`.
        on_unfit: As in `calibrate`.
        scheme_options: As in `calibrate`.
        kv_cache: As in `calibrate`.
        only: As in `calibrate`.
        shadow: As in `calibrate`.
        activation_shadow: As in `calibrate`.
        pick: As in `calibrate`.
        ranks: As in `calibrate`.

    Returns:
        The calibration: run batches, freeze, detach.

    Raises:
        SchemeError: An unknown scheme, or one that modules cannot take; lists all of them.
        CalipersError: Observers are attached already, an observer is unknown, or a path came in
            place of the model.
        ValueError: An unknown or invalid option. Nothing has been attached then.
    """
    _expect_model(model, "calipers.attach(model, ...)")
    choice = ObserverChoice(
        observer,
        activation_observer,
        dict(observer_options or {}),
        shadows=Shadows.read(shadow, activation_shadow, pick),
    )
    inner = unwrap(model)
    with ExitStack() as wrappers:
        wrappers.enter_context(without_wrappers(inner))
        wrappers.enter_context(separated_experts(inner))
        plan = plan_observers(
            inner, scheme, choice, ignore, on_unfit, scheme_options, kv_cache, only
        )
        return Calibration(inner, plan, wrappers.pop_all(), ranks)
    raise AssertionError  # an ExitStack of these lets no exception vanish


def _tell_of_loader(model: torch.nn.Module, plan: Plan) -> None:
    """Say before any work what a checkpoint of these experts would have to be loaded with."""
    schemes = {each.name: each.scheme for each in plan.resolution.targets}
    if change_when_joined(model, schemes):
        logger.info(
            "once saved, experts under this scheme are loaded one by one: in transformers inside "
            "`with calipers.loading_experts():`, as it would not load them as they are otherwise"
        )


def _expect_model(model: object, call: str) -> None:
    """Refuse what is no torch module.

    Args:
        model: What was given.
        call: How to write the call once the model is loaded.

    Raises:
        CalipersError: Says what came; for a path or a name, the line that loads a model.
    """
    if isinstance(model, torch.nn.Module):
        return
    if isinstance(model, (str, PathLike)):
        raise CalipersError(
            f"model: expected a torch.nn.Module, got {str(model)!r}. Load it first:\n"
            "  from transformers import AutoModelForCausalLM\n"
            f"  model = AutoModelForCausalLM.from_pretrained({str(model)!r})\n"
            f"  {call}"
        )
    raise CalipersError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
