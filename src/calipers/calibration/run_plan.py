"""A planned calibration: attach observers, run data, freeze, detach."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from calipers.calibration.batches import Progress
from calipers.calibration.blocks import Way, calibrate_blocks
from calipers.calibration.calls import find_never_called
from calipers.calibration.convergence import refuse_until_stable
from calipers.calibration.few_tokens import ExpertPolicy
from calipers.calibration.plan import Plan, without_modules
from calipers.calibration.report import CalibrationReport
from calipers.calibration.session import Calibration, OnMissing
from calipers.distributed import Ranks
from calipers.statistics_files import Statistics

__all__ = ["run_plan"]


def run_plan(
    model: torch.nn.Module,
    plan: Plan,
    batches: Iterable[Any] | None,
    on_missing: OnMissing = "error",
    progress: Progress | None = None,
    *,
    use_attention_mask: bool = True,
    experts: ExpertPolicy | None = None,
    ranks: Ranks | None = None,
    statistics: Statistics | None = None,
    memory: Way = "whole",
    propagate: bool = False,
    until_stable: float | None = None,
) -> CalibrationReport:
    """What `calibrate` does to a model once it is planned: attach, run, freeze, detach.

    Args:
        model: The model that was planned for; no wrapper.
        plan: See `plan_observers`.
        batches: See `Calibration.run`; None where `refuse_without_data` lets the plan pass.
        on_missing: See `Calibration.freeze`.
        progress: As in `calibrate`.
        use_attention_mask: See `Calibration.run`.
        experts: How experts see tokens, and what is done about few; None takes the defaults.
        ranks: As in `calibrate`.
        statistics: Of this model, in place of batches; None where there are none.
        memory: As in `calibrate`.
        propagate: As in `calibrate`.
        until_stable: As in `calibrate`.

    Raises:
        CalipersError: `until_stable` with blocks or statistics.
    """
    if until_stable is not None:
        refuse_until_stable(blocks=memory == "blocks", statistics=statistics is not None)
    policy = experts or ExpertPolicy()
    if batches is None and statistics is None:
        uncalled = find_never_called(model, [each.name for each in plan.observed])
        plan = without_modules(plan, uncalled, "never called")
    if memory == "blocks" and statistics is None:
        return calibrate_blocks(
            model,
            plan,
            batches,
            None,
            on_missing,
            progress,
            use_attention_mask=use_attention_mask,
            experts=policy,
            propagate=propagate,
            ranks=ranks,
        )
    with Calibration(model, plan, ranks=ranks) as calibration:
        if statistics is not None:
            calibration.load(statistics)
        elif batches is not None:
            calibration.run(
                batches,
                progress,
                use_attention_mask=use_attention_mask,
                all_experts=policy.all_experts,
                until_stable=until_stable,
            )
        return calibration.freeze(
            on_missing,
            progress,
            on_few_tokens=policy.on_few_tokens,
            enough_tokens=policy.enough_tokens,
        )
