"""Shadows: further observers of a tensor, which are judged beside the one that decides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from compressed_tensors.quantization import QuantizationArgs
from torch import nn

from calipers._words import check_choice
from calipers.calibration.observed import build_observer
from calipers.errors import CalipersError
from calipers.observers import Observer
from calipers.observers.options import check_option_names
from calipers.observers.plugins import spelled_as_registered

__all__ = ["Pick", "Shadow", "Shadows", "observer_label", "read_options", "split_options"]

#: Which observer's scales are written: the one that was chosen, or that of the least error.
Pick = Literal["first", "best"]


@dataclass(frozen=True)
class Shadow:
    """An observer by its name, with options of its own."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, text: str, argument: str = "shadow") -> Shadow:
        """Read "NAME" or "NAME:KEY=VALUE,...".

        Raises:
            CalipersError: An option that is not of that form.
        """
        name, own = split_options(text)
        return cls(name, read_options(own, f"{argument} {text!r}"))

    @property
    def label(self) -> str:
        """What `read` takes to read it again."""
        return _label(self.name, self.options)

    def check(self, argument: str) -> None:
        """Refuse a name or an option that there is not.

        Raises:
            ValueError: Names the observer.
        """
        kind = Observer.get_value_from_registry(self.name)
        given = [name for name in self.options if name not in kind.ignored_options]
        check_option_names(f"{argument} {self.name!r}", kind.Options, given)

    def build(
        self, name: str, base_name: str, args: QuantizationArgs, module: nn.Module
    ) -> Observer:
        """The observer of a module's tensor; see `ObserverChoice.build`."""
        update = {"observer": self.name, "observer_kwargs": dict(self.options)}
        return build_observer(name, base_name, args.model_copy(update=update, deep=True), module)


@dataclass(frozen=True)
class Shadows:
    """Which observers look at each tensor beside the one that was chosen, and who wins.

    Args:
        weight: Those of weights.
        activation: Those of static activations, attention states and inputs of NVFP4.
        pick: "first" writes the scales of the observer that was chosen, "best" those of the one
            with the least error, module by module.
    """

    weight: tuple[Shadow, ...] = ()
    activation: tuple[Shadow, ...] = ()
    pick: Pick = "first"

    @classmethod
    def read(
        cls,
        weight: str | Iterable[str] = (),
        activation: str | Iterable[str] = (),
        pick: str = "first",
    ) -> Shadows:
        """Read and check what a caller asks for.

        Raises:
            ValueError: An unknown observer or option, an observer that is given twice, one that
                weighs weights by inputs for an activation; another word for `pick`, or "best" with
                nothing to pick from.
        """
        check_choice("pick", pick, Pick)
        read = {
            argument: _read_all(given, argument)
            for argument, given in (("shadow", weight), ("activation_shadow", activation))
        }
        if pick == "best" and not any(read.values()):
            raise CalipersError(
                "pick='best' needs other observers to pick from: give shadow= or "
                "activation_shadow= (--shadow, --activation-shadow)"
            )
        return cls(read["shadow"], read["activation_shadow"], pick)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return bool(self.weight or self.activation)

    def build(
        self,
        name: str,
        base_name: str,
        args: QuantizationArgs,
        module: nn.Module,
        first: Observer,
    ) -> list[Observer]:
        """The shadows of one tensor.

        Those that would repeat its first observer are left out, and on an Embedding, whose inputs
        are ids, those that weigh by inputs.

        Raises:
            ValueError: An observer that cannot look at this tensor.
        """
        wanted = self.weight if base_name == "weight" else self.activation
        built = []
        for shadow in wanted:
            observer = shadow.build(name, base_name, args, module)
            if type(observer) is type(first) and observer.options == first.options:
                continue
            if observer.needs_data and base_name != "weight":
                raise CalipersError(
                    f"activation_shadow {shadow.name!r} weighs a weight by its layer's inputs: it "
                    f"cannot measure the {base_name} activations of {name}"
                )
            if not (observer.needs_data and isinstance(module, nn.Embedding)):
                built.append(observer)
        return built

    def refuse_unused(self, built: Iterable[tuple[str, Sequence[Observer]]]) -> None:
        """Refuse shadows that look at nothing.

        Args:
            built: For each tensor of the model its base name and all its observers.

        Raises:
            CalipersError: Names the observer, and says why nothing has it.
        """
        for argument, shadow, why in self._unused(built):
            raise CalipersError(f"{argument} {shadow.label!r} would look at nothing: {why}")

    def without_unused(self, built: Iterable[tuple[str, Sequence[Observer]]]) -> Shadows:
        """Those that look at something; `built` as for `refuse_unused`."""
        idle = {(argument, shadow.label) for argument, shadow, _ in self._unused(built)}
        weight, activation = (
            tuple(each for each in wanted if (argument, each.label) not in idle)
            for argument, wanted in self._by_argument.items()
        )
        pick: Pick = self.pick if weight or activation else "first"
        return Shadows(weight, activation, pick)

    @property
    def _by_argument(self) -> dict[str, tuple[Shadow, ...]]:
        return {"shadow": self.weight, "activation_shadow": self.activation}

    def _unused(
        self, built: Iterable[tuple[str, Sequence[Observer]]]
    ) -> Iterator[tuple[str, Shadow, str]]:
        """Arguments and shadows that look at nothing, with the reason."""
        tensors = list(built)
        for argument, wanted in self._by_argument.items():
            of_weights = argument == "shadow"
            alike = [own for base, own in tensors if (base == "weight") is of_weights]
            used = {observer_label(each) for own in alike for each in own[1:]}
            for shadow in wanted:
                if shadow.label in used:
                    continue
                what = "weights" if of_weights else "static activations or states"
                why = f"the scheme quantizes no {what}"
                if alike:
                    why = f"{what} have that observer already"
                    why += ", or have no inputs that it could weigh by" * of_weights
                yield argument, shadow, why

    def recorded_args(self, base_name: str, args: QuantizationArgs) -> QuantizationArgs:
        """Arguments for a module's scheme, which names no observer where each module has its own.

        All modules keep one scheme so, as engines want it of layers that they fuse.
        """
        wanted = self.weight if base_name == "weight" else self.activation
        if self.pick == "first" or not wanted:
            return args
        signed = ("negative_scales", "signed")
        options = [args.observer_kwargs, *(each.options for each in wanted)]
        allowed = any(given.get(name) for given in options for name in signed)
        kept = {"negative_scales": True} if allowed else {}
        return args.model_copy(update={"observer": None, "observer_kwargs": kept})


def _read_all(given: str | Iterable[str], argument: str) -> tuple[Shadow, ...]:
    texts = [given] if isinstance(given, str) else list(given)
    singles = [each for text in texts for each in _split(text, argument)]
    shadows = tuple(Shadow.read(text, argument) for text in singles)
    seen: set[str] = set()
    for shadow in shadows:
        shadow.check(argument)
        label = shadow.label
        if label in seen:
            raise CalipersError(f"{argument} {label!r} is given twice")
        seen.add(label)
    return shadows


def _split(text: str, argument: str) -> list[str]:
    """Observers of a list with commas, which stand between the options of one as well."""
    if not isinstance(text, str):
        raise CalipersError(f"{argument}: expected names of observers, got {text!r}")
    found: list[str] = []
    for piece in text.split(","):
        if found and ":" in found[-1] and "=" in piece and ":" not in piece.partition("=")[0]:
            found[-1] += f",{piece}"
        else:
            found.append(piece.strip())
    return found


def observer_label(observer: Observer) -> str:
    """An observer as `Shadow.read` reads it: "optimal:objective=hessian"."""
    return _label(observer.args.observer or type(observer).__name__, observer.args.observer_kwargs)


def _label(name: str, options: Mapping[str, Any]) -> str:
    told = ",".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in options.items()
    )
    return f"{name}:{told}" if told else name


def split_options(text: str) -> tuple[str, list[str]]:
    """The name of an observer and its options, of "NAME" or "NAME:KEY=VALUE,..."."""
    name, _, own = text.partition(":")
    return spelled_as_registered(name.strip()), own.split(",") if own else []


def read_options(given: Iterable[str], what: str) -> dict[str, Any]:
    """Options of the form key=value; values are read as YAML scalars.

    Args:
        given: The options.
        what: What errors call them.

    Raises:
        CalipersError: One without a key or an equals sign, or of a value that is no scalar.
    """
    found = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise CalipersError(f"{what}: expected key=value, got {item!r}")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise CalipersError(f"{what}: cannot read the value of {item!r}") from None
    return found
