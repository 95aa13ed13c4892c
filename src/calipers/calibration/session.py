"""`Calibration`: a model with observers attached, from the first batch to the frozen scales."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from loguru import logger

from calipers._words import check_choice
from calipers.calibration.attention import AttentionHooks
from calipers.calibration.batches import (
    BatchMask,
    Progress,
    expect_batches,
    find_mask,
    number_of_batches,
    run_batches,
)
from calipers.calibration.calls import CallCounter
from calipers.calibration.convergence import Watch, expect_limit
from calipers.calibration.experts import LinearExperts
from calipers.calibration.few_tokens import (
    ENOUGH_TOKENS,
    OnFewTokens,
    expert_coverage,
    forget_shared,
    settle_few_tokens,
)
from calipers.calibration.freeze import freeze_modules, initialize_modules
from calipers.calibration.held_out import is_held_out
from calipers.calibration.missing import OnMissing, settle_missing
from calipers.calibration.observed import ObservedModule
from calipers.calibration.plan import Plan
from calipers.calibration.ranks import forget_observed, reduce_observed
from calipers.calibration.report import (
    CalibrationReport,
    ModuleReport,
    Stability,
    quantized_share,
    with_shares,
)
from calipers.calibration.targets import LeftAlone, Reason, gather_experts, leave_alone
from calipers.distributed import Ranks
from calipers.errors import CalipersError
from calipers.observers.masks import token_mask
from calipers.observers.statistics import UpdateState
from calipers.statistics_files import Manifest, Statistics

__all__ = ["Calibration", "OnMissing", "Record", "take_over_counts"]

#: What is counted of the data, by attribute name.
_COUNTS = ("batches", "tokens_given", "tokens_counted", "_held_out")
#: Fewer batches have no last quarter.
_QUARTERS = 4
#: A smaller share of quantized weights is warned of.
_LITTLE = 0.5
#: A larger share of batches held out is warned of: that of four batches.
_MUCH_HELD_OUT = 0.25


@dataclass(frozen=True)
class Record:
    """What became of some modules of a calibration: enough to do it again without any data.

    Attributes:
        rows: Reports of those that were quantized.
        reasons: Why the others were not, by name.
        tokens: Tokens that each saw, by name.
        unmasked: Those that saw values which no mask fits.
        qparams: Scales, zero points and global scales by their full names.
    """

    rows: list[ModuleReport]
    reasons: dict[str, Reason]
    tokens: dict[str, int]
    unmasked: list[str]
    qparams: dict[str, torch.Tensor]


class Calibration:
    """Observers attached to a model; made by `attach`.

    While attached the model runs in full precision, with nothing added but the submodules
    `weight_observer`, `input_observer` and `output_observer` and the hooks that feed them. As a
    context manager it detaches at the end of the block. Threads may share it: `run` and `freeze`
    wait for each other.

    Args:
        model: The model.
        plan: What to quantize and how; its observers are attached here.
        wrappers: Closed once the calibration is frozen or detached: puts wrappers of single
            blocks back that were taken out of the model.
        ranks: Processes that calibrate the same model with other data; None takes all of
            torch.distributed, where that is initialised.

    Attributes:
        model: The model.
        observed: The observed modules with their observers.
        batches: Batches that the model took so far; none where no observer needs data. Once frozen,
            those of all ranks, and so are the next two.
        tokens_given: Tokens of those batches that carry a mask of them.
        tokens_counted: Those of them that counted.
        stability: Whether scales settled, where data was to end once they do.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        plan: Plan,
        wrappers: ExitStack | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.model = model
        self._ranks = ranks or Ranks()
        self._wrappers = wrappers or ExitStack()
        self.observed = list(plan.observed)
        self.batches = 0
        self._plan = plan
        self._update = UpdateState()
        self.tokens_given = self.tokens_counted = self._held_out = 0
        self._seconds = 0.0
        self._skipped = False
        self.stability: Stability | None = None
        self._rows: list[ModuleReport] = []
        self._reasons: dict[str, Reason] = {}
        self._state: Literal["attached", "frozen", "detached"] = "attached"
        # Attention that is never called has states that nobody measured: told as missing.
        layers = [each.name for each in self.observed if not each.is_attention]
        self._calls = CallCounter(model, layers)
        self._attention = AttentionHooks(model)
        try:
            self._attention.install(plan.states)
            for each in self.observed:
                each.attach()
        except BaseException:
            self.detach()
            raise

    @property
    def wants_data(self) -> bool:
        """Whether any observer needs batches to run through the model."""
        return any(each.wants_data for each in self.observed)

    def run(
        self,
        batches: Iterable[Any],
        progress: Progress | None = None,
        *,
        use_attention_mask: bool = True,
        all_experts: bool = False,
        until_stable: float | None = None,
    ) -> None:
        """Run batches through the model, so that the observers see its tensors.

        May be called several times; statistics go on growing. The model runs in eval mode without
        gradients, and every module's training flag is restored. An exception goes on; a batch
        counts wholly or not at all, so that all statistics are then those of the batches before.

        Where no observer needs data nothing is run, and no batch counts: weights alone whose
        observer looks at nothing else, or dynamic activations. Which layers the model calls is then
        found with its own example input or, where there is none, with the first batch.

        Args:
            batches: Each one a mapping (called as `model(**batch)`), a tensor (`model(batch)`),
                or a tuple or list (`model(*batch)`). Tensors are moved to the model's device.
            progress: Called as `progress("batches", done, total)`; `total` is None where
                `batches` has no length.
            use_attention_mask: Leave padding out: where a batch is a mapping whose
                "attention_mask" has the shape (batch, tokens) of its tokens, a token with 0 there
                enters no statistic of a module that sees values of shape (batch, tokens, ...) or
                (batch * tokens, ...), nor of an attention state, nor of `LinearExperts`. Modules
                that see others (routed experts of custom code) count all; the report names them.
            all_experts: Let every expert see every token, which costs as much as a dense model of
                all experts. The model's output stays as it is. Only for experts that the model
                keeps in one parameter.
            until_stable: End the data once no scale moves by this share or more while the tokens
                double, see `Stability`; None takes all batches.

        Raises:
            CalipersError: The calibration is frozen or detached, or `batches`, or one of them, is
                of a type that cannot be run; `until_stable` with several ranks, or no share.
        """
        expect_limit(until_stable)
        if until_stable is not None and self._ranks.size > 1:
            raise CalipersError(
                "until_stable: a rank sees its own share of the data alone, so that none knows "
                "whether scales have settled; calibrate with one process"
            )
        with self._update.lock, self._ranks.telling_failure("running batches"):
            self._expect_attached("run batches")
            whole = functools.partial(self._whole_batch, use_mask=use_attention_mask)
            with self.clock(), self.seeing_all(all_experts):
                if self.wants_data:
                    expect_batches(batches)
                    self.look_at_last_quarter(number_of_batches(batches))
                    if until_stable is not None:
                        watch = Watch(self.observed, until_stable)
                        batches = watch.batches(batches)
                        self.stability = watch.stability
                    run_batches(self.model, batches, progress, whole)
                else:
                    self._skip_data(batches)

    def _skip_data(self, batches: Iterable[Any]) -> None:
        """No pass over the data, but for what finds layers that are never called."""
        expect_batches(batches)
        if self._skipped:
            return
        self._skipped = True
        logger.info("the data was not run: no observer of this calibration needs any")
        on_meta = any(each.is_meta for each in self.model.parameters())
        if self.observed and not on_meta and not self._calls.run_example(self.model):
            first = itertools.islice(batches, 1)
            run_batches(self.model, first, within=lambda _: self._calls.whole())

    def look_at_last_quarter(self, coming: int | None) -> None:
        """Let modules keep what the scales of activations are before the last quarter of the data.

        Args:
            coming: Batches that come to those that came already; None where that is not known.
        """
        total = 0 if coming is None or self._ranks.size > 1 else self.batches + coming
        if total >= _QUARTERS:
            for each in self.observed:
                each.look_at = max(self.batches, total - total // _QUARTERS)

    def calls_of(self, name: str) -> tuple[int, int]:
        """Calls of an observed module, and of the module around it."""
        return self._calls.count(name)

    def load(self, statistics: Statistics) -> None:
        """Let the observers know what statistics tell, as if they had seen the same data.

        Args:
            statistics: Of this model, see `Statistics.refuse_other_model`.

        Raises:
            StatisticsError: They lack what an observer asks for; nothing is changed then.
        """
        observers = {
            tensor.full_name: tensor.observer
            for each in self.observed
            for tensor in each.tensors.values()
        }
        states = statistics.states_for(observers)
        self.take_over(statistics.manifest)
        for name, state in states.items():
            observers[name].load_state(state)

    def take_over(self, manifest: Manifest) -> None:
        """Count as seen what an earlier pass over data counted, in place of what was counted here.

        Args:
            manifest: Of the statistics of that pass. The observers take over theirs by themselves.

        Raises:
            CalipersError: The calibration is frozen or detached.
        """
        with self._update.lock:
            self._expect_attached("take over statistics")
            if any(each.wants_data for each in self.observed):
                self.batches = manifest.batches
                self.tokens_given = sum(each.tokens_given for each in manifest.data)
                self.tokens_counted = sum(each.tokens_counted for each in manifest.data)
            take_over_counts(manifest, self.observed, self._calls)

    def freeze(
        self,
        on_missing: OnMissing = "error",
        progress: Progress | None = None,
        *,
        on_few_tokens: OnFewTokens = "shrink",
        enough_tokens: int = ENOUGH_TOKENS,
    ) -> CalibrationReport:
        """Derive all scales, write them onto the modules and turn the model into a quantized one.

        The scales are parameters of the modules (`weight_scale`, `weight_zero_point`,
        `weight_global_scale`, `input_scale`, ...) as compressed-tensors registers them, and
        modules have its status FROZEN: the model runs fake-quantized from here on. Weights are
        worked on one at a time.

        Where several ranks calibrate, what all of them saw is brought together first, and all come
        to the same scales; see `calipers.distributed.reduce_statistics`.

        Args:
            on_missing: What to do about modules whose observers lack data. "error": refuse, with
                one error that lists them all. "skip": leave them unquantized. "fallback": weights
                use their own range without importance; activations the merged statistics of the
                nearest modules whose names are equal but for numbers (other experts of the layer
                before other layers).
            progress: Called as `progress(stage, done, total)`.
            on_few_tokens: What to do about experts that saw few tokens, or none. "shrink": mix
                their statistics with those of all experts of the layer, as if these had seen the
                tokens that lack. "pooled": take those of all experts of the layer. "own": nothing;
                `on_missing` decides about those that saw none. "error": refuse, with one error
                that names them. An expert without any token is left to `on_missing` where that is
                "skip", or where no expert of its layer saw any.
            enough_tokens: Tokens from which an expert stands alone.

        Returns:
            What was done, module by module.

        Raises:
            MissingDataError: Modules lack data and `on_missing` is "error", or "fallback" where no
                neighbour has any; or experts saw few tokens and `on_few_tokens` is "error". Nothing
                is changed.
            RankError: A rank failed, or did not come: on all ranks.
            CalipersError: The calibration is frozen or detached, or `on_missing` or
                `on_few_tokens` is unknown.
            Exception: Whatever else went wrong. No module is quantized then and the statistics
                are kept, so that freeze may be called again.
        """
        with self._update.lock, self._ranks.telling_failure("deriving scales"):
            return self._freeze(on_missing, progress, on_few_tokens, enough_tokens)

    def _freeze(
        self,
        on_missing: OnMissing,
        progress: Progress | None,
        on_few_tokens: OnFewTokens,
        enough_tokens: int,
    ) -> CalibrationReport:
        self._expect_attached("freeze")
        check_choice("on_missing", on_missing, OnMissing)
        with self.clock():
            self.derive(self.observed, on_missing, progress, on_few_tokens, enough_tokens)
            for each in self.observed:
                each.remove_hooks()
        return self.finish(enough_tokens)

    def derive(
        self,
        observed: Sequence[ObservedModule],
        on_missing: OnMissing,
        progress: Progress | None,
        on_few_tokens: OnFewTokens,
        enough_tokens: int,
        *,
        last: bool = True,
    ) -> None:
        """Quantize some of the observed modules, as `freeze` does all of them.

        Args:
            observed: Modules that no batch comes to again, quantized together or not at all. Those
                that engines fuse, and the experts of a layer, are given together.
            on_missing: See `freeze`; a fallback is found among `observed`.
            progress: See `freeze`.
            on_few_tokens: See `freeze`.
            enough_tokens: See `freeze`.
            last: Whether no other modules will be given: what is counted of the data is summed over
                all ranks then.
        """
        counts = _COUNTS if last else ()
        with self._whole_over_ranks(observed, counts):
            never_called = self._calls.never_called
            called = [each for each in observed if each.name not in never_called]
            settle_few_tokens(called, on_few_tokens, enough_tokens, unseen=on_missing != "skip")
            kept = settle_missing(called, on_missing, self.batches, self.model)
            self._rows += freeze_modules(kept, self._plan.choice, progress)
            forget_shared(kept)
        wanted = {each.name for each in kept}
        for each in observed:
            if each.name not in wanted:
                uncalled = each.name in never_called
                self._reasons[each.name] = "never called" if uncalled else "no data"

    def finish(self, enough_tokens: int) -> CalibrationReport:
        """Stop observing, and report all that `derive` did."""
        self._calls.remove()
        self._state = "frozen"
        reasons = self._reasons
        kept = [each for each in self.observed if each.name not in reasons]
        called = [each for each in self.observed if reasons.get(each.name) != "never called"]
        self._attention.remove(keep={each.name for each in kept})
        left_alone = self._left_alone(reasons)
        place = {each.name: number for number, each in enumerate(self.observed)}
        rows = sorted(self._rows, key=lambda row: place[row.name])
        share = quantized_share(rows, self.model, left_alone)
        self._wrappers.close()
        layers = [each for each in self.observed if not each.is_attention]
        _tell(left_alone)
        if layers or not self.observed:
            _tell_of_little(rows, self.model, left_alone)
        if self._held_out > self.batches * _MUCH_HELD_OUT:
            _tell_of_held_out(self._held_out, self.batches)
        return CalibrationReport(
            modules=rows,
            skipped=[e.name for e in self.observed if reasons.get(e.name) == "no data"],
            left_alone=with_shares(rows, self.model, left_alone),
            quantized_share=share,
            seconds=self._seconds,
            batches=self.batches,
            held_out=self._held_out,
            tokens_given=self.tokens_given,
            tokens_counted=self.tokens_counted,
            unmasked=[each.name for each in kept if each.unmasked],
            coverage=expert_coverage(called, enough_tokens) if self.batches else [],
            stability=self.stability,
        )

    def detach(self) -> None:
        """Remove every observer and hook; may be called at any time and again.

        Where the model was not frozen it is exactly as before `attach`; where it was, its
        quantization stays and nothing else.
        """
        self._calls.remove()
        for each in self.observed:
            each.detach()
        self._attention.remove()
        self._wrappers.close()
        self._state = "detached"

    def __enter__(self) -> Calibration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()

    def _left_alone(self, reasons: dict[str, Reason]) -> list[LeftAlone]:
        """Those of the plan and those found while running, in the model's order."""
        records = {each.name: each for each in self._plan.resolution.left_alone}
        for each in self.observed:
            if each.name in reasons:
                records[each.name] = leave_alone(each.name, each.module, reasons[each.name])
        order = {name: place for place, (name, _) in enumerate(self.model.named_modules())}
        ordered = sorted(records.values(), key=lambda each: order[each.name])
        return gather_experts(self.model, ordered)

    def _expect_attached(self, what: str) -> None:
        if self._state != "attached":
            raise CalipersError(f"cannot {what}: the calibration is already {self._state}")

    @contextmanager
    def _whole_batch(self, batch: object, use_mask: bool) -> Iterator[None]:
        """Let a batch count at the end of the block, or, where that raises, not at all."""
        masked = find_mask(batch, self.model) if use_mask else BatchMask()
        number = self.number_of(self.batches)
        with ExitStack() as stack:
            for each in self.observed:
                if each.wants_data:
                    stack.enter_context(each.whole_batch(number))
            stack.enter_context(self._calls.whole())
            stack.enter_context(token_mask(masked.mask))
            yield
        self.count_batch(masked)

    def number_of(self, batch: int) -> int:
        """The number among the batches of all ranks of one of this rank's own."""
        return self._ranks.size * batch + self._ranks.rank

    def count_batch(self, masked: BatchMask) -> None:
        """Count one more batch that the model took, or, in blocks, is going to take."""
        number = self.number_of(self.batches)
        self._held_out += bool(self._plan.choice.shadows) and is_held_out(number)
        self.batches += 1
        self.tokens_given += masked.given
        self.tokens_counted += masked.counted
        self._ranks.show_life()

    @contextmanager
    def _whole_over_ranks(
        self, observed: Sequence[ObservedModule], names: Sequence[str]
    ) -> Iterator[None]:
        """Hold what all ranks saw inside of the block.

        Where that raises it stays with the first rank, and the others hold nothing: the ranks
        together know what they knew, and may go on.
        """
        counts = {name: getattr(self, name) for name in names}
        counts = reduce_observed(self._ranks, self.model, observed, self._calls, counts)
        self.__dict__.update(counts)
        try:
            yield
        except BaseException:
            if self._ranks.rank:
                forget_observed(observed, self._calls)
                self.__dict__.update(dict.fromkeys(names, 0))
            raise

    def record(self, observed: Sequence[ObservedModule]) -> Record:
        """What became of modules that `derive` was given."""
        names = {each.name for each in observed}
        return Record(
            rows=[row for row in self._rows if row.name in names],
            reasons={name: why for name, why in self._reasons.items() if name in names},
            tokens={each.name: each.tokens for each in observed},
            unmasked=[each.name for each in observed if each.unmasked],
            qparams={
                f"{each.name}.{key}": value
                for each in observed
                if each.name not in self._reasons
                for key, value in _qparams(each.module).items()
            },
        )

    def restore(self, observed: Sequence[ObservedModule], record: Record) -> None:
        """Do to modules what an earlier `derive` did, from its record."""
        kept = [each for each in observed if each.name not in record.reasons]
        initialize_modules(kept, self._plan.choice)
        for each in kept:
            for key in _qparams(each.module):
                value = record.qparams[f"{each.name}.{key}"]
                setattr(each.module, key, torch.nn.Parameter(value, requires_grad=False))
        for each in observed:
            each.tokens = record.tokens[each.name]
            each.unmasked = each.name in record.unmasked
        self._rows += record.rows
        self._reasons |= record.reasons

    @contextmanager
    def seeing_all(self, all_experts: bool) -> Iterator[None]:
        """Let every expert see every token inside of the block, where that is asked for."""
        experts = [each for each in self.model.modules() if isinstance(each, LinearExperts)]
        if all_experts and not experts:
            raise CalipersError(
                "all_experts: the model has no experts that can be sent tokens which are not theirs"
            )
        try:
            for each in experts:
                each.all_experts = all_experts
            yield
        finally:
            for each in experts:
                each.all_experts = False

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Let the time inside of the block count as the calibration's."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - start


def take_over_counts(
    manifest: Manifest, observed: Sequence[ObservedModule], calls: CallCounter
) -> None:
    """Count as seen by modules what an earlier pass over data counted, in place of what they saw.

    Args:
        manifest: Of the statistics of that pass.
        observed: The modules, whose tokens are set.
        calls: Their calls, which are set as well.
    """
    for each in observed:
        known = manifest.modules.get(each.name)
        if known is None:
            continue
        calls.restore(each.name, known.calls, known.outer_calls)
        if each.wants_data:
            each.tokens, each.unmasked = known.tokens, known.unmasked


def _qparams(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that quantizing a module has put there, by local name."""
    own = module._parameters.items()
    return {key: value for key, value in own if value is not None and key not in ("weight", "bias")}


def _tell(left_alone: Sequence[LeftAlone]) -> None:
    never_called = [each.name for each in left_alone if each.reason == "never called"]
    if never_called:
        logger.warning(
            "{} layers were left alone, since the model reads their weights without calling them "
            "({}, ...): a quantized forward would not run",
            len(never_called),
            never_called[0],
        )


def _tell_of_little(
    rows: Sequence[ModuleReport], model: torch.nn.Module, left_alone: Sequence[LeftAlone]
) -> None:
    """Warn where most of the weights that were to be quantized are not."""
    wanted = [each for each in left_alone if each.reason != "not the language part"]
    share = quantized_share(rows, model, wanted)
    if share < _LITTLE:
        whose = "model" if len(wanted) == len(left_alone) else "language part"
        logger.warning(
            "only {:.0%} of the {}'s projection weights are quantized: see the report's "
            "left_alone for what was not, and why",
            share,
            whose,
        )


def _tell_of_held_out(held_out: int, batches: int) -> None:
    logger.warning(
        "{} of {} batches held out to judge observers by: they learnt from the others alone; of "
        "eight batches or more it is one in eight, so give more and smaller ones",
        held_out,
        batches,
    )
