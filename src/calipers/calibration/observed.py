"""`ObservedTensor`, the unit of calibration; `ObservedModule` feeds those of one module."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor, nn

from calipers.calibration.attention import STATES
from calipers.calibration.held_out import Samples
from calipers.calibration.targets import TENSORS
from calipers.observers import Observer
from calipers.observers.hooks import Seen, Side, add_hook, remove_hooks
from calipers.observers.input_moments import InputObserver, share_moments
from calipers.observers.statistics import HoldsStatistics, UpdateState

__all__ = ["ObservedModule", "ObservedTensor", "build_observer", "relative_change"]

#: Sides at which tokens are counted: one of them for each module.
_COUNTED = ("input", "k")


def build_observer(
    name: str, base_name: str, args: QuantizationArgs, module: nn.Module
) -> Observer:
    """The observer that some arguments name, for a tensor of a module; attached to nothing.

    Args:
        name: The module's name in the model; the observer is called "{name}.{base_name}".
        base_name: A key of `TENSORS`.
        args: They name the observer and all of its options.
        module: The module that holds the tensor.
    """
    observer: Observer = Observer.load_from_registry(
        args.observer, base_name=base_name, args=args, module=module
    )
    observer.name = f"{name}.{base_name}" if name else base_name
    return observer


@dataclass(eq=False)
class ObservedTensor:
    """One tensor to quantize with its observers.

    Attributes:
        name: Name in the model of the module that it belongs to.
        module: The module; None of a weight that is read from a file.
        base_name: A key of `TENSORS`: "weight", "input", "output", "q", "k", "v".
        args: Its arguments in the scheme.
        observers: Those that look at it: the first decides its scale, others are reported.
        fallback: Asked in place of the first, where that one lacks data.
        shared: Makes a copy of the first that knows what other experts saw as well; None where the
            first stands alone.
        share: What of its statistics is theirs, from 0 to 1.
        lent: What `shared` made, while a scale is derived from it.
    """

    name: str
    module: nn.Module | None
    base_name: str
    args: QuantizationArgs
    observers: list[Observer]
    fallback: Observer | None = None
    shared: Callable[[], Observer] | None = None
    share: float = 0.0
    lent: Observer | None = None
    _fed: list[_Fed] | None = field(default=None, init=False, repr=False)

    @property
    def full_name(self) -> str:
        """Module and base name."""
        return f"{self.name}.{self.base_name}"

    @property
    def observer(self) -> Observer:
        """The first observer."""
        return self.observers[0]

    @property
    def deciding(self) -> Observer:
        """The observer that gives the scale."""
        return self.fallback or self.lent or self.observer

    @property
    def wants_data(self) -> bool:
        """Whether it needs batches to run through the model."""
        # of several observers of a weight data tells which is best
        several = len(self.observers) > 1
        return several or self.base_name != "weight" or self.observer.needs_data

    @property
    def can_share(self) -> bool:
        """Whether the first observer learns from data, all of it in its state: it can be mixed."""
        learns = self.base_name != "weight" or self.observer.needs_data
        return learns and not _hooks_itself(self.observer)

    @property
    def lacks(self) -> str | None:
        """What the first observer lacks, after "it ..."; None where there can be a scale."""
        if self.shared is not None:
            return None
        observer = self.observer
        if self.base_name == "weight":
            if observer.needs_data and not observer.has_data:
                return "its observer weighs by the layer's inputs and saw no token"
            return None
        # "local" activations: the global scale alone
        local = self.args.dynamic
        seen = observer.has_global_statistics if local else observer.has_statistics
        return None if seen else "its observer saw no value"

    def so_far(self) -> Tensor | None:
        """The scale that an activation would get by now, the global one where it is "local".

        None where nothing was seen, and of a weight.
        """
        if self.base_name == "weight" or self.lacks is not None:
            return None
        if self.args.dynamic:
            return self.observer.get_global_scale()
        return self.observer.get_qparams()[0]

    def scale_of(self, held: Mapping[str, Any]) -> Tensor | None:
        """As `so_far`, by what the observer held before."""
        observer = self.observer
        with observer.alone():
            now = observer.held()
            observer.take_over({**held, "_stale": True})
            try:
                return self.so_far()
            finally:
                observer.take_over(now)

    def share_moments(self) -> None:
        """Let the observers of a weight read the same sums over its inputs, which are fed once."""
        self._fed = list(self._find_fed())

    def see(self, seen: Seen) -> None:
        """Let the observers take in a value of the side of the module that they learn from."""
        if self._fed is None:
            self.share_moments()
        for kind, part, observe in self._fed or ():
            if seen.updates is None or kind is None:
                observe(seen.value)
            else:
                seen.updates.update(kind, part, partial(observe, seen.value))

    def _find_fed(self) -> Iterator[_Fed]:
        """The observers to feed."""
        if self.base_name == "weight":
            own = [each for each in self.observers if not _hooks_itself(each)]
            for observer in share_moments(own):
                part = observer.moments if isinstance(observer, InputObserver) else observer
                yield _Fed(self._kind(observer), part, observer.observe_input)
            return
        for observer in self.observers:
            observe = observer.observe_global if self.args.dynamic else observer.observe
            yield _Fed(self._kind(observer), observer, observe)

    def _kind(self, observer: Observer) -> Hashable:
        """What an update depends on besides the statistics; None where that is not known."""
        known = type(observer).__module__.startswith("calipers.")
        if not known or hasattr(observer.module, f"{self.base_name}_g_idx"):
            return None
        side = TENSORS[self.base_name].side
        return type(observer), side, self.base_name, observer.args.model_dump_json()


class _Fed(NamedTuple):
    """An observer that is fed by values.

    Args:
        kind: Those of the same kind learn the same from a value.
        part: What is changed.
        observe: Takes a value in.
    """

    kind: Hashable
    part: HoldsStatistics
    observe: Callable[[Tensor], None]


@dataclass(eq=False)
class ObservedModule:
    """A module to quantize: its tensors, and the hooks that feed them.

    Attributes:
        name: The module's name in the model.
        module: The module itself.
        scheme: The scheme it gets.
        tensors: Its tensors by base name.
        tokens: Tokens that passed through while attached, those aside that a mask leaves out;
            counted where data is observed.
        unmasked: Whether it saw, in a batch with a mask, a value that is not arranged by token
            (those of a routed expert), all of which counted.
        samples: Tokens that scales are judged by: of batches that are held out from the observers
            where there are several, else of all.
        look_at: After which batch to keep what the scales of activations were; None never.
    """

    name: str
    module: nn.Module
    scheme: QuantizationScheme
    tensors: dict[str, ObservedTensor]
    tokens: int = 0
    unmasked: bool = False
    samples: Samples | None = None
    look_at: int | None = None
    _earlier: dict[str, dict[str, Any]] = field(default_factory=dict)
    _attached: bool = False
    _update: UpdateState = field(default_factory=UpdateState)

    @property
    def observers(self) -> dict[str, Observer]:
        """The first observer of each tensor, by base name."""
        return {base_name: each.observer for base_name, each in self.tensors.items()}

    @property
    def weight_observer(self) -> Observer | None:
        """Observer of the weight, None where the scheme leaves weights alone."""
        return self.observers.get("weight")

    @property
    def wants_data(self) -> bool:
        """Whether any of its tensors needs batches to run through the model."""
        return any(each.wants_data for each in self.tensors.values())

    @property
    def is_attention(self) -> bool:
        """Whether it is an attention module, and its tensors are states."""
        return any(base_name in STATES for base_name in self.tensors)

    @property
    def _sides(self) -> list[Side]:
        """Where it is watched."""
        if not self.wants_data:
            return []
        sides = {TENSORS[base_name].side for base_name in self.tensors}
        # A layer is counted by its inputs, even where it is watched for its outputs alone.
        return sorted(sides if self.is_attention else {"input", *sides})

    @property
    def _weight_observers(self) -> list[Observer]:
        return self.tensors["weight"].observers if "weight" in self.tensors else []

    def attach(self) -> None:
        """Add the first observers as submodules `{base_name}_observer`, and the hooks."""
        self._attached = True
        for base_name, observer in self.observers.items():
            self.module.register_module(f"{base_name}_observer", observer)
        if "weight" in self.tensors:
            self.tensors["weight"].share_moments()
        for observer in self._weight_observers:
            if _hooks_itself(observer):
                observer.attach(self.module)
        for side in self._sides:
            add_hook(self.module, side, self._see)

    def remove_hooks(self) -> None:
        """Stop observing; the observers stay."""
        if self._attached:
            remove_hooks(self.module, self)
            for observer in self._weight_observers:
                observer.detach(self.module)

    def detach(self) -> None:
        """Remove hooks and observers; nothing of them stays on the module."""
        self.remove_hooks()
        if self._attached:
            for base_name in self.tensors:
                self.module._modules.pop(f"{base_name}_observer", None)
        self._attached = False

    def forget(self) -> None:
        """Detach, and drop all that the observers learnt."""
        self.detach()
        self.samples = None
        self._earlier = {}
        for tensor in self.tensors.values():
            tensor.fallback = tensor.shared = tensor.lent = None
            for observer in tensor.observers:
                observer.reset()

    def _see(self, seen: Seen) -> None:
        if self.samples is not None:
            self.samples.see(seen)
            if self.samples.held_out:
                return
        self.unmasked = self.unmasked or seen.unmasked
        if seen.side in _COUNTED:
            with self._update.lock:
                self.tokens += seen.tokens
        for base_name, each in self.tensors.items():
            if TENSORS[base_name].side == seen.side:
                each.see(seen)

    @contextmanager
    def whole_batch(self, number: int = 0) -> Iterator[None]:
        """Let a batch count at the end of the block, or, where that raises, not at all.

        Args:
            number: How many batches came before. Where there are `samples`, it decides whether
                this one is held out from the observers.
        """
        before = self.tokens, self.unmasked
        observers = [observer for each in self.tensors.values() for observer in each.observers]
        samples = self.samples
        held_out = False
        try:
            for observer in observers:
                observer.begin_batch()
            if samples is not None:
                samples.begin_batch(number)
                held_out = samples.held_out
            yield
        except BaseException:
            self._undo_batch(observers, before)
            if samples is not None:
                samples.undo_batch()
            raise
        if samples is not None:
            samples.end_batch()
        if held_out:
            self._undo_batch(observers, before)  # some set hooks of their own
            return
        for observer in observers:
            observer.end_batch()
        if number + 1 == self.look_at:
            # by reference, and derived in the end: searching all histograms would hold up the run
            self._earlier = {
                key: each.observer.held()
                for key, each in self.tensors.items()
                if key != "weight" and each.lacks is None
            }

    def moved(self, base_name: str, scale: Tensor | None) -> float | None:
        """Largest relative change of a scale since `look_at`; None where that was not."""
        if base_name not in self._earlier or scale is None:
            return None
        earlier = self.tensors[base_name].scale_of(self._earlier[base_name])
        if earlier is None or earlier.shape != scale.shape:
            return None
        return relative_change(earlier, scale)

    def _undo_batch(self, observers: Sequence[Observer], before: tuple[int, bool]) -> None:
        self.tokens, self.unmasked = before
        for observer in observers:
            observer.undo_batch()


def relative_change(before: Tensor, after: Tensor) -> float | None:
    """Largest |after - before| / |after| of values that are not 0; None where there are none."""
    before, after = before.to(after.device).double(), after.double()
    known = (after != 0) & after.isfinite() & before.isfinite()
    if not bool(known.any()):
        return None
    return float(((after - before).abs() / after.abs())[known].max())


def _hooks_itself(observer: Observer) -> bool:
    """Whether an observer of a user's own sets hooks of its own."""
    return type(observer).attach is not Observer.attach
