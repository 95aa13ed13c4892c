"""`calibrate_blocks`: a calibration that has one block of the model in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, Protocol, TypeAlias

import torch
from compressed_tensors.offload import disable_offloading, get_execution_device
from torch import nn

from calipers.calibration.batches import (
    BatchMask,
    Progress,
    eval_mode,
    expect_batches,
    find_mask,
    no_cache,
    run_batch,
    uncompiled,
)
from calipers.calibration.few_tokens import ExpertPolicy
from calipers.calibration.lockstep import Around, Lockstep, find_blocks
from calipers.calibration.observed import ObservedModule
from calipers.calibration.plan import Plan
from calipers.calibration.report import CalibrationReport
from calipers.calibration.session import Calibration, OnMissing, Record
from calipers.calibration.write import rounded_once, undo_on_error
from calipers.distributed import Ranks
from calipers.distributed.collectives import gather_objects
from calipers.errors import CalipersError
from calipers.observers.masks import token_mask

__all__ = ["OUTSIDE", "BlockStore", "InMemory", "Way", "block_of", "calibrate_blocks"]

#: How a model is calibrated: see `calipers.calibration.calibrate`.
Way: TypeAlias = Literal["whole", "blocks"]
#: The name under which what lies outside of all blocks is kept.
OUTSIDE = ""


class BlockStore(Protocol):
    """Where the blocks of a model come from, and where they go."""

    def record(self, block: str) -> Record | None:
        """What an earlier run that was broken off did to this block; None where it did not."""

    def bring(self, block: str) -> AbstractContextManager[object]:
        """A context in which the unquantized weights of a block are in memory."""

    def keep(self, block: str, record: Record) -> None:
        """Keep a block that is quantized; called inside of its context."""


class InMemory:
    """The store of a model that lies in memory, or is offloaded by compressed-tensors.

    An offloaded block is onloaded once for all batches.
    """

    def record(self, block: str) -> Record | None:
        """Nothing is kept of an earlier run."""
        return None

    def bring(self, block: str) -> AbstractContextManager[object]:
        """What is onloaded inside stays until the end."""
        context: AbstractContextManager[object] = disable_offloading()
        return context

    def keep(self, block: str, record: Record) -> None:
        """The block stays where it is."""


def calibrate_blocks(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Any] | None,
    store: BlockStore | None = None,
    on_missing: OnMissing = "error",
    progress: Progress | None = None,
    *,
    use_attention_mask: bool = True,
    experts: ExpertPolicy | None = None,
    propagate: bool = False,
    ranks: Ranks | None = None,
) -> CalibrationReport:
    """Attach, run, freeze and detach, one block after the other.

    All batches pass a block before any comes to the next. Then its scales are derived, and its
    weights are not needed any more.

    Args:
        model: The model that was planned for; no wrapper.
        plan: See `plan_observers`.
        batches: See `Calibration.run`; all are held in memory. None where the plan needs no data.
        store: Where blocks come from and go to; None for a model in memory.
        on_missing: See `Calibration.freeze`; a fallback is found in the same block.
        progress: Called as `progress("blocks", done, total)`.
        use_attention_mask: See `Calibration.run`.
        experts: How experts see tokens, and what is done about few; None takes the defaults.
        propagate: Run each block a second time once it is quantized, so that the next ones see what
            they will get; else they see what the unquantized model gives.
        ranks: As in `calibrate`; what they saw of a block is brought together before its scales are
            derived.

    Returns:
        What was done. Where an exception is raised instead the model is as it was before, but for
        weights that the store brought and dropped.

    Raises:
        CalipersError: The model has no blocks, or comes back to one that it had left.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise CalipersError(
            f"{type(model).__name__} has no ModuleList of blocks to run one after the other: use "
            "memory='whole'"
        )
    policy = experts or ExpertPolicy()
    ranks = ranks or Ranks()
    with (
        ranks.telling_failure("calibrating block by block"),
        undo_on_error([each.module for each in plan.observed]),
        Calibration(model, plan, ranks=ranks) as calibration,
        calibration.seeing_all(policy.all_experts),
    ):
        work = _Work(calibration, ranks, blocks, store or InMemory(), on_missing, policy, progress)
        if batches is not None and not calibration.wants_data:
            calibration.run(batches)  # which runs none of them
            batches = None
        with calibration.clock():
            if batches is None:
                work.derive_all()
            else:
                expect_batches(batches)
                work.run(list(batches), use_attention_mask=use_attention_mask, propagate=propagate)
        return calibration.finish(policy.enough_tokens)


class _Work:
    """One calibration in blocks."""

    def __init__(
        self,
        calibration: Calibration,
        ranks: Ranks,
        blocks: Mapping[str, nn.Module],
        store: BlockStore,
        on_missing: OnMissing,
        policy: ExpertPolicy,
        progress: Progress | None,
    ) -> None:
        self._calibration = calibration
        self._ranks = ranks
        self._blocks = blocks
        self._store = store
        self._on_missing = on_missing
        self._policy = policy
        self._progress = progress
        self._done = 0
        #: Observed modules by the block that they lie in.
        self._members: dict[str, list[ObservedModule]] = {name: [] for name in (*blocks, OUTSIDE)}
        for each in calibration.observed:
            self._members[block_of(each.name, blocks)].append(each)

    def run(self, batches: list[Any], *, use_attention_mask: bool, propagate: bool) -> None:
        """Pass all batches through all blocks, and derive each block's scales after it."""
        model = self._calibration.model
        device = get_execution_device(model, torch.device("cpu"))
        masks = [find_mask(each, model) if use_attention_mask else BatchMask() for each in batches]

        # a cache would hold the states of all layers of all batches
        options = no_cache(model)

        def through_model(batch: Any, masked: BatchMask) -> Callable[[], None]:
            def run() -> None:
                with token_mask(masked.mask):
                    run_batch(model, batch, device, options)

            return run

        self._calibration.look_at_last_quarter(len(batches))
        for each in masks:
            self._calibration.count_batch(each)
        self._tell(0)
        lockstep = Lockstep(self._blocks)
        runs = [through_model(*each) for each in zip(batches, masks, strict=True)]
        with eval_mode(model), torch.no_grad(), uncompiled(model), lockstep.gates():
            lockstep.start(runs, self._seen_by())
            left = set(self._blocks)
            while (block := self._agree(lockstep.next_block())) is not None:
                left.discard(block)
                with self._store.bring(block):
                    last = not left and not self._members[OUTSIDE]
                    self._pass(lockstep, block, propagate=propagate, last=last)
        for block in self._blocks:
            if block in left:  # no batch came to it
                with self._store.bring(block):
                    self._derive(block)
        self._derive(OUTSIDE)

    def _agree(self, block: str | None) -> str | None:
        """The first block that a batch of any rank stands in front of."""
        if self._ranks.size == 1:
            return block
        found = gather_objects(self._ranks, block, "the next block")
        order = list(self._blocks)
        return min((each for each in found if each is not None), key=order.index, default=None)

    def _pass(self, lockstep: Lockstep, block: str, *, propagate: bool, last: bool) -> None:
        """Let all batches pass one block, observe and quantize it."""
        known = self._store.record(block) is not None
        if not propagate:
            around = self._seen_by(None if known else block)
            lockstep.run(block, around, keep=True, last=last)
            self._derive(block)
            return
        if not known:
            lockstep.run(block, self._seen_by(block), keep=False)
        self._derive(block, keep=False)
        if last:
            lockstep.stop(but_first=True)
        with rounded_once([each.module for each in self._members[block]]):
            lockstep.run(block, self._seen_by(), keep=True)
        self._keep(block)

    def derive_all(self) -> None:
        """Derive the scales of all blocks, where no data is needed."""
        self._tell(0)
        for block in self._blocks:
            with self._store.bring(block):
                self._derive(block)
        self._derive(OUTSIDE)

    def _seen_by(self, block: str | None = None) -> Around:
        """What the turn of a batch has around it: observers see it wholly or not at all.

        Args:
            block: The block that observes; None for what lies outside of all blocks alone.
        """
        observing = [*(self._members[block] if block else ()), *self._members[OUTSIDE]]
        observing = [each for each in observing if each.wants_data]

        @contextmanager
        def around(number: int) -> Iterator[None]:
            with ExitStack() as stack:
                for each in observing:
                    stack.enter_context(each.whole_batch(self._calibration.number_of(number)))
                yield

        return around

    def _derive(self, block: str, *, keep: bool = True) -> None:
        """Quantize the modules of a block, or do again what an earlier run did to them."""
        members, known = self._members[block], self._store.record(block)
        if known is None:
            self._calibration.derive(
                members,
                self._on_missing,
                None,
                self._policy.on_few_tokens,
                self._policy.enough_tokens,
                last=block == OUTSIDE,
            )
        else:
            self._calibration.restore(members, known)
        for each in members:
            each.forget()
        if keep:
            self._keep(block)

    def _keep(self, block: str) -> None:
        if self._store.record(block) is None:
            self._store.keep(block, self._calibration.record(self._members[block]))
        self._done += 1
        self._tell(self._done)

    def _tell(self, done: int) -> None:
        if self._progress is not None:
            self._progress("blocks", done, len(self._members))


def block_of(name: str, blocks: Container[str]) -> str:
    """The block that a module lies in; `OUTSIDE` of one that lies in none."""
    parts = name.split(".")
    around = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((each for each in around if each in blocks), OUTSIDE)
