"""`Statistics`: what one pass over data taught about every module, for any scheme to come."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from loguru import logger
from torch import Tensor, nn

from calipers._words import listing
from calipers.errors import StatisticsError
from calipers.grouping import ATTENTION_NAMES, BASE_NAMES
from calipers.observers import Observer
from calipers.statistics_files.derive import derive_state, lacks_products
from calipers.statistics_files.file import read_file, replace_file, write_file
from calipers.statistics_files.fingerprint import Fingerprint, saved_tensors, weight_digest
from calipers.statistics_files.kinds import State, merge_states
from calipers.statistics_files.manifest import Manifest, Module

__all__ = ["Statistics", "read_statistics"]


class Statistics:
    """What passes over data taught about the modules of a model; made by `calipers.observe`.

    Args:
        manifest: What it says about itself.
        states: "module.base_name" to the packed states of that tensor by kind.

    Attributes:
        manifest: As given.
        states: As given.
        name: What errors call it: the file that it was read from.
    """

    def __init__(
        self,
        manifest: Manifest,
        states: Mapping[str, Mapping[str, State]],
        name: str = "statistics",
    ) -> None:
        self.manifest = manifest
        self.states = {key: dict(kinds) for key, kinds in states.items()}
        self.name = name

    @classmethod
    def load(cls, path: str | Path, *, complete: bool = True) -> Statistics:
        """Read a statistics file.

        Args:
            path: The file.
            complete: Refuse what an interrupted `observe` goes on from.

        Raises:
            StatisticsError: It is damaged, of a later format, holds an unknown entry, or is what an
                interrupted `observe` goes on from.
            OSError: It cannot be read.
        """
        path = Path(path)
        manifest, states = read_file(path)
        if complete and not manifest.complete:
            raise StatisticsError(
                f"{path}: belongs to an `observe` that was interrupted after {manifest.batches} "
                "batches: run the same command again, it goes on from there"
            )
        return cls(manifest, states, str(path))

    def save(self, path: str | Path) -> None:
        """Write a statistics file; what stood there is replaced in one step.

        The same statistics give the same bytes.

        Raises:
            OSError: It cannot be written.
        """
        replace_file(Path(path), self.manifest, self.states)

    def write(self, path: Path) -> None:
        """Write a statistics file at a path where nobody looks before this returns; see `save`."""
        write_file(path, self.manifest, self.states)

    @property
    def modules(self) -> dict[str, Module]:
        """What was seen of each module, by name."""
        return self.manifest.modules

    def merge(self, *others: Statistics) -> Statistics:
        """The statistics of all passes together, this one's first and others in their order.

        Exact for extremes, histograms and counts, in any order. Sums are added in float64, one
        after the other: another order may change their last bits.

        Raises:
            StatisticsError: Other models, other kinds of statistics, or the same data twice.
        """
        merged = self
        for other in others:
            merged = merged._plus(other)
        return merged

    def _plus(self, other: Statistics) -> Statistics:
        mine, theirs = self.manifest, other.manifest
        both = f"{self.name} and {other.name}"
        differences = mine.fingerprint.differences(theirs.fingerprint)
        if differences:
            raise StatisticsError(f"{both} are of different models: {'; '.join(differences)}")
        if mine.options != theirs.options:
            raise StatisticsError(
                f"{both} hold different statistics: {mine.options!r} and {theirs.options!r}"
            )
        if mine.modules.keys() != theirs.modules.keys():
            apart = sorted(mine.modules.keys() ^ theirs.modules.keys())
            raise StatisticsError(f"{both} are of different modules: {listing(apart, 3)}")
        kinds = [{key: each.keys() for key, each in some.states.items()} for some in (self, other)]
        if kinds[0] != kinds[1]:
            raise StatisticsError(f"{both} hold different kinds of statistics of the same modules")
        seen = {each.sha256 for each in mine.data if each.batches}
        twice = [each for each in theirs.data if each.sha256 in seen]
        if twice:
            what = twice[0].name or f"sha256 {twice[0].sha256[:12]}..."
            raise StatisticsError(f"{both} hold the same data ({what}): it would count twice")
        names = {**mine.versions, **theirs.versions}
        manifest = Manifest(
            fingerprint=mine.fingerprint,
            options=mine.options,
            modules={name: each.plus(theirs.modules[name]) for name, each in mine.modules.items()},
            data=[*mine.data, *theirs.data],
            versions={
                name: sorted({*mine.versions.get(name, ()), *theirs.versions.get(name, ())})
                for name in names
            },
        )
        states: dict[str, dict[str, State]] = {}
        for key, own in self.states.items():
            states[key] = {
                kind: merge_states(key, kind, state, other.states[key][kind])
                for kind, state in own.items()
            }
        return Statistics(manifest, states, f"{self.name} + {other.name}")

    def refuse_other_model(
        self, model: nn.Module, digests: Mapping[str, str] | None = None
    ) -> None:
        """Refuse a model that these statistics are not of.

        Args:
            model: With experts that lie in one parameter taken apart, as `calibrate` does.
            digests: As in `Fingerprint.of`, of a model whose weights lie in a checkpoint.

        Raises:
            StatisticsError: Says in what it differs, and names modules whose weights differ.
        """
        if digests is None:
            digests = {name: weight_digest(each) for name, each in saved_tensors(model)}
        differences = self.manifest.fingerprint.differences(Fingerprint.of(model, digests))
        if not differences:
            return
        changed = [
            name
            for name, each in self.modules.items()
            if each.weight and each.weight != digests.get(f"{name}.weight" if name else "weight")
        ]
        if changed:
            more = f" of {len(changed)} of {len(self.modules)} modules"
            differences.append(f"weights{more} are others: {listing(changed, 3)}")
        raise StatisticsError(f"{self.name}: of another model: {'; '.join(differences)}")

    def refuse_other_weight(self, name: str, weight: Tensor) -> None:
        """Refuse the weight of a module, as read from a checkpoint, that these are not of.

        Args:
            name: The module's name in the model or in its checkpoint.
            weight: Its weight.

        Raises:
            StatisticsError: The module is not in the file, or its weight differs.
        """
        found = self.modules.get(self._own_name(name))
        if found is None:
            raise StatisticsError(f"{self.name}: has no module {name}")
        if found.weight != weight_digest(weight):
            raise StatisticsError(
                f"{self.name}: of another model: {name} had a weight of other shape, dtype or "
                f"values than this one of {weight.dtype} and shape {tuple(weight.shape)}"
            )

    def _own_name(self, name: str) -> str:
        """The name in the model of a module by this name, or of this name in checkpoints."""
        return name if name in self.modules else self._stored.get(name, name)

    @cached_property
    def _stored(self) -> dict[str, str]:
        """Names in checkpoints, where they are others, to those in the model."""
        return {each.stored_as: name for name, each in self.modules.items() if each.stored_as}

    def states_for(self, observers: Mapping[str, Observer]) -> dict[str, dict[str, Tensor]]:
        """States of observers that have seen what these statistics were gathered from.

        Args:
            observers: By "module.base_name", the module as the model or as its checkpoint names it;
                they have seen nothing yet, and are not changed.

        Returns:
            By the same names what `Observer.load_state` takes, without observers that learn nothing
            from data and without those of modules that saw no value.

        Raises:
            StatisticsError: Lists the observers whose state cannot be derived, and why.
        """
        found: dict[str, dict[str, Tensor]] = {}
        problems: dict[str, list[str]] = {}
        lacking: list[str] = []
        for key, observer in observers.items():
            module, _, base_name = key.rpartition(".")
            module = self._own_name(module)
            kinds = self.states.get(f"{module}.{base_name}" if module else key)
            learns = observer.base_name != "weight" or observer.needs_data
            if kinds is None:
                if learns:
                    why = self._absence(module, observer.base_name)
                    problems.setdefault(why, []).append(key)
                continue
            try:
                state = derive_state(observer, kinds, self.manifest.options.products)
            except StatisticsError as error:
                why = f"{observer.args.observer or type(observer).__name__}: {error}"
                problems.setdefault(why, []).append(key)
                continue
            if state is not None:
                found[key] = state
                if lacks_products(observer, state):
                    lacking.append(key)
        if problems:
            lines = [f"  {why}: {listing(keys, 2)}" for why, keys in problems.items()]
            raise StatisticsError(
                "\n".join([f"{self.name}: not all that is asked is there:", *lines])
            )
        if lacking:
            logger.warning(
                "{} holds no products of inputs (--products) that fit {} of the weights ({}): "
                "their observers take the objective imatrix in place of hessian",
                self.name,
                len(lacking),
                listing(lacking, 2),
            )
        return found

    def _absence(self, module: str, base_name: str) -> str:
        """Why there is nothing of a tensor."""
        if base_name in ATTENTION_NAMES:
            option = "queries=True (--queries)" if base_name == "q" else "kv=True (--kv)"
            return f"the file holds no states {base_name} of attention: observe with {option}"
        if module in self.modules and base_name == "output":
            return "the file holds no outputs: observe with outputs=True (--outputs)"
        if module in self.modules:
            own = [base for base in BASE_NAMES if f"{module}.{base}" in self.states]
            return f"the file holds no {base_name} of it, only what concerns its {', '.join(own)}"
        return "not in the file, since the module was left alone when it was made"


def read_statistics(given: str | Path | Statistics) -> Statistics:
    """Statistics as they are, or read from their file."""
    return given if isinstance(given, Statistics) else Statistics.load(given)
