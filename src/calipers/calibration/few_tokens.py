"""Experts that saw few tokens: what stands in for statistics of their own.

A router sends most tokens to some experts and hardly any to others. The statistics of the latter
say little, or nothing; those of all experts of the layer together say more.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import floor, log2
from typing import Any, Literal

import torch
from loguru import logger
from torch import Tensor

from calipers._words import check_choice
from calipers.calibration.observed import ObservedModule, ObservedTensor
from calipers.calibration.report import ExpertCoverage
from calipers.errors import CalipersError, MissingDataError
from calipers.observers import Observer

__all__ = [
    "ENOUGH_TOKENS",
    "ExpertPolicy",
    "OnFewTokens",
    "expert_coverage",
    "forget_shared",
    "lent_statistics",
    "settle_few_tokens",
]

OnFewTokens = Literal["shrink", "pooled", "own", "error"]
#: From so many tokens on an expert stands alone.
ENOUGH_TOKENS = 256

_EXPERT = re.compile(r"(?P<layer>(?:.*\.)?experts)\.(?P<number>\d+)\.(?P<leaf>.+)")
#: Integers are mixed in parts of 2^-20, where that fits into 64 bits.
_FINEST = 20


@dataclass(frozen=True)
class ExpertPolicy:
    """How experts see tokens, and what is done about those that see few.

    Args:
        on_few_tokens: See `settle_few_tokens`.
        enough_tokens: Tokens from which an expert stands alone.
        all_experts: Let every expert see every token.

    Raises:
        CalipersError: Another word, or a number that is none.
    """

    on_few_tokens: OnFewTokens = "shrink"
    enough_tokens: int = ENOUGH_TOKENS
    all_experts: bool = False

    def __post_init__(self) -> None:
        check_choice("on_few_tokens", self.on_few_tokens, OnFewTokens)
        number = self.enough_tokens
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise CalipersError(
                f"enough_tokens: expected a whole number of tokens from 1, got {number!r}"
            )


@dataclass
class _Layer:
    """The experts of one layer that were observed: modules by name of the expert."""

    name: str
    experts: dict[str, list[ObservedModule]] = field(default_factory=dict)

    @property
    def tokens(self) -> dict[str, int]:
        return {name: max(each.tokens for each in own) for name, own in self.experts.items()}

    def tokens_of_tensors(self) -> dict[int, int]:
        """Tokens that the expert of each tensor saw, by the tensor's id."""
        tokens = self.tokens
        return {
            id(tensor): tokens[name]
            for name, modules in self.experts.items()
            for module in modules
            for tensor in module.tensors.values()
        }

    def kinds(self) -> list[list[ObservedTensor]]:
        """Tensors of the experts that are alike: one for each expert."""
        found: dict[tuple[Any, ...], list[ObservedTensor]] = {}
        for name, modules in self.experts.items():
            for tensor in (each for module in modules for each in module.tensors.values()):
                leaf = tensor.name.removeprefix(f"{name}.")
                kind = (leaf, tensor.base_name, type(tensor.observer), str(tensor.args))
                found.setdefault(kind, []).append(tensor)
        return list(found.values())


def _layers(observed: Iterable[ObservedModule]) -> list[_Layer]:
    """Layers with experts, `....experts.3.up_proj`, as far as they are watched with data."""
    layers: dict[str, _Layer] = {}
    for each in observed:
        match = _EXPERT.fullmatch(each.name)
        if match is not None and each.wants_data:
            layer = layers.setdefault(match["layer"], _Layer(match["layer"]))
            expert = f"{match['layer']}.{match['number']}"
            layer.experts.setdefault(expert, []).append(each)
    return list(layers.values())


def expert_coverage(
    observed: Iterable[ObservedModule], enough: int = ENOUGH_TOKENS
) -> list[ExpertCoverage]:
    """How many tokens each expert saw, layer by layer; of models without experts nothing."""
    return [ExpertCoverage(each.name, each.tokens, enough) for each in _layers(observed)]


def settle_few_tokens(
    observed: Sequence[ObservedModule],
    on_few_tokens: OnFewTokens = "shrink",
    enough: int = ENOUGH_TOKENS,
    *,
    unseen: bool = True,
) -> None:
    """Decide for each tensor of an expert whose statistics it is quantized by.

    Nothing is computed yet: `lent_statistics` does so when a tensor's turn has come. Observers
    themselves are not changed.

    Args:
        observed: All modules of the calibration.
        on_few_tokens: What to do about experts that saw fewer tokens than `enough`. "shrink": mix
            their statistics with those of all experts of the layer, as if these had seen the tokens
            that lack. "pooled": those of all experts of the layer alone. "own": nothing. "error":
            refuse.
        enough: Tokens from which an expert stands alone.
        unseen: Whether experts that saw no token are meant too.

    Raises:
        MissingDataError: With "error", names the experts and their tokens.
        CalipersError: Another word, or a number that is none.
    """
    ExpertPolicy(on_few_tokens, enough)
    forget_shared(observed)
    layers = _layers(observed)
    if on_few_tokens == "error":
        _refuse(layers, enough)
    if on_few_tokens in ("shrink", "pooled"):
        for layer in layers:
            tokens = layer.tokens_of_tensors()
            for members in layer.kinds():
                _share(members, tokens, on_few_tokens, enough, unseen=unseen)
        _tell(layers, on_few_tokens, enough)


def forget_shared(observed: Iterable[ObservedModule]) -> None:
    """Let every tensor stand alone again, and what was merged for others go."""
    for tensor in (tensor for module in observed for tensor in module.tensors.values()):
        tensor.shared, tensor.share = None, 0.0


def _share(
    members: list[ObservedTensor],
    tokens: Mapping[int, int],
    on_few_tokens: OnFewTokens,
    enough: int,
    *,
    unseen: bool,
) -> None:
    """Let tensors of one kind share what those among them know that saw anything."""
    members = [each for each in members if each.wants_data and each.can_share]
    knowing = [each for each in members if each.lacks is None]
    pool = _Pool(knowing, sum(tokens[id(each)] for each in knowing))
    for tensor in members:
        seen = tokens[id(tensor)]
        alone = knowing == [tensor]
        if not knowing or alone or seen >= enough:
            continue
        if tensor.lacks is not None and not unseen:
            continue
        everything = on_few_tokens == "pooled" or tensor.lacks is not None
        tensor.share = 1.0 if everything else (enough - seen) / enough
        tensor.shared = partial(pool.mixed, tensor.observer, tensor.share, enough - seen)


@dataclass
class _Pool:
    """What experts of a layer know together.

    Args:
        members: Tensors whose observers have seen something.
        tokens: Tokens that they saw.
    """

    members: list[ObservedTensor]
    tokens: int
    _whole: Observer | None = None

    @property
    def whole(self) -> Observer:
        """An observer that has seen what any of them saw."""
        if self._whole is None:
            self._whole = copy.deepcopy(self.members[0].observer)
            for each in self.members[1:]:
                self._whole.merge(each.observer)
        return self._whole

    def mixed(self, own: Observer, share: float, lacking: int) -> Observer:
        """A copy of an observer of which `share` is known from the whole pool.

        Args:
            own: The observer of one member, or of an expert that saw nothing.
            share: From 0 to 1.
            lacking: Tokens that the pool stands in for.
        """
        mixed = copy.deepcopy(own)
        if share < 1.0:
            weight = lacking / max(self.tokens, 1)
            mixed.load_state(_mix(own, self.whole.state(), share, weight))
        else:
            mixed.reset()
            mixed.merge(self.whole)
        return mixed


def _mix(own: Observer, others: Mapping[str, Tensor], share: float, weight: float) -> Any:
    """A state between that of an observer and another one of its class.

    Args:
        own: The observer.
        others: The state of the other one.
        share: What of an average, and of a range, is the other's.
        weight: How often a sum of the other's counts.
    """
    mixed: dict[str, Tensor] = {}
    state, entries = own.state(), own.entries()
    finest = _finest([*state.values(), *others.values()])
    for key in {**state, **others}:
        part, name = entries[key]
        mine, theirs = state.get(key), others.get(key)
        if mine is None or theirs is None:
            mixed[key] = theirs if mine is None else mine  # type: ignore[assignment]
            continue
        statistic = part.statistics[name]
        theirs = theirs.to(mine.device)
        if statistic.integer:
            mixed[key] = mine + (theirs * weight).round().to(mine.dtype)
        elif statistic.reduce == "sum" and not mine.is_floating_point():
            mixed[key] = mine * finest + (theirs.double() * (weight * finest)).round().long()
        elif statistic.reduce == "sum":
            mixed[key] = (mine.double() + theirs.double() * weight).to(mine.dtype)
        elif statistic.reduce == "last":
            mixed[key] = mine
        else:
            mixed[key] = _between(mine, theirs, share)
    return mixed


def _finest(values: Iterable[Tensor]) -> int:
    """The factor by which whole numbers are multiplied, so that shares of them are whole too."""
    whole = [each for each in values if each.numel() and not each.is_floating_point()]
    largest = max((float(each.abs().max()) for each in whole), default=0.0)
    return 1 << max(0, min(_FINEST, 61 - floor(log2(max(largest, 1.0))) - 1))


def _between(mine: Tensor, theirs: Tensor, share: float) -> Tensor:
    """Ends of ranges and moving averages; a group without values says nothing."""
    average = (mine.double() * (1 - share) + theirs.double() * share).to(mine.dtype)
    return torch.where(mine.isinf(), theirs, torch.where(theirs.isinf(), mine, average))


@contextmanager
def lent_statistics(group: Sequence[ObservedModule]) -> Iterator[None]:
    """Give tensors that share statistics an observer which knows them, inside of the block."""
    tensors = [tensor for each in group for tensor in each.tensors.values()]
    try:
        for tensor in tensors:
            if tensor.shared is not None:
                tensor.lent = tensor.shared()
        yield
    finally:
        for tensor in tensors:
            tensor.lent = None


def _refuse(layers: Iterable[_Layer], enough: int) -> None:
    lines = []
    for layer in layers:
        few = {name: count for name, count in layer.tokens.items() if count < enough}
        if few:
            told = ", ".join(f"{name.rpartition('.')[2]} ({count})" for name, count in few.items())
            lines.append(
                f"  {layer.name}: {len(few)} of {len(layer.experts)} experts, with their tokens: "
                f"{told}"
            )
    if lines:
        raise MissingDataError(
            "\n".join(
                [
                    f"experts saw fewer than {enough} tokens:",
                    *lines,
                    "Run more data, let every expert see every token (all_experts=True, "
                    "--all-experts), or choose what stands in for the tokens that lack: "
                    "on_few_tokens='shrink' or 'pooled' (--on-few-tokens), or enough_tokens "
                    "(--enough-tokens)",
                ]
            )
        )


def _tell(layers: Iterable[_Layer], on_few_tokens: OnFewTokens, enough: int) -> None:
    counts = [count for layer in layers for count in layer.tokens.values()]
    few = [count for count in counts if count < enough]
    if few and any(counts):
        logger.warning(
            "{} of {} experts saw fewer than {} tokens, {} of them none: what all experts of their "
            "layer saw stands in for the rest (on_few_tokens={!r}; see the report's coverage)",
            len(few),
            len(counts),
            enough,
            few.count(0),
            on_few_tokens,
        )
