"""`Pass`: one pass over data by a calibration that gathers statistics; `Kept`, its checkpoints."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from calipers.calibration.batches import Progress
from calipers.calibration.observed import ObservedModule
from calipers.calibration.session import Calibration
from calipers.checkpoint.journal import Staging
from calipers.errors import CalipersError
from calipers.observing.plan import kinds_of, renamed_modules
from calipers.statistics_files import (
    Data,
    Fingerprint,
    Manifest,
    Module,
    Options,
    Statistics,
    weight_digest,
)
from calipers.statistics_files.kinds import pack, unpack
from calipers.statistics_files.manifest import installed_versions

__all__ = ["Kept", "Pass"]


class Pass:
    """A pass over data, and what it has gathered so far.

    Args:
        calibration: Of the model, its observers attached by `plan_statistics`.
        options: What is gathered.
        batches: All of them.
        name: Of the data.

    Attributes:
        done: Batches that an earlier process ran.
        count: Batches so far, those included.
    """

    def __init__(
        self,
        calibration: Calibration,
        options: Options,
        batches: Iterable[Any],
        name: str | None,
    ) -> None:
        self.done = self.count = 0
        self._calibration = calibration
        self._options = options
        self._batches = batches
        self._name = name
        self._fingerprint = Fingerprint.of(calibration.model)
        layers = [each.name for each in calibration.observed if not each.is_attention]
        self._renamed = renamed_modules(calibration.model, layers)
        self._digest = hashlib.sha256()
        #: Digest of all batches, where it can be known before they are run.
        self._whole = digest_of(batches) if isinstance(batches, (list, tuple)) else None

    @property
    def sha256(self) -> str:
        """Digest of the batches so far."""
        return self._digest.hexdigest()

    @property
    def identity(self) -> dict[str, Any]:
        """All that the statistics will depend on, as far as it is known before."""
        return {
            "model": self._fingerprint.model_dump(mode="json"),
            "options": self._options.model_dump(mode="json"),
            "modules": [each.name for each in self._calibration.observed],
            "data": [self._name, self._whole],
            "versions": installed_versions(),
        }

    def is_of(self, manifest: Manifest) -> bool:
        """Whether statistics are what this pass would gather."""
        return (
            not manifest.fingerprint.differences(self._fingerprint)
            and manifest.options == self._options
            and manifest.versions == installed_versions()
            and manifest.modules.keys() == {each.name for each in self._calibration.observed}
            and [(each.name, each.sha256) for each in manifest.data] == [(self._name, self._whole)]
        )

    def run(self, progress: Progress | None = None, kept: Kept | None = None) -> None:
        """Run the batches that are not done yet.

        Raises:
            CalipersError: Other batches than those that an earlier process ran.
        """
        self._calibration.run(
            _Watched(self, kept),
            None if progress is None else self._counting(progress),
            use_attention_mask=self._options.use_attention_mask,
            all_experts=self._options.all_experts,
        )
        if kept is not None and self.done and self.count <= self.done:
            kept.refuse_other(self)

    def __len__(self) -> int:
        if not isinstance(self._batches, Sized):
            raise TypeError("of no known length")
        return max(0, len(self._batches) - self.done)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            digest = self._digest.copy()
            _add_batch(digest, batch)
            yield batch
            self.count += 1
            self._digest = digest

    def _counting(self, progress: Progress) -> Progress:
        """Progress over all batches, those of an earlier process included."""
        return lambda stage, now, total: progress(
            stage, now + self.done, None if total is None else total + self.done
        )

    def statistics(self, *, complete: bool = True) -> Statistics:
        """What was gathered so far."""
        seen = self._calibration
        data = Data(
            name=self._name,
            sha256=self.sha256,
            batches=seen.batches,
            tokens_given=seen.tokens_given,
            tokens_counted=seen.tokens_counted,
        )
        manifest = Manifest(
            fingerprint=self._fingerprint,
            options=self._options,
            modules={each.name: self._seen(each) for each in seen.observed},
            data=[data],
            versions=installed_versions(),
            complete=complete,
        )
        states = {
            tensor.full_name: {
                kind: pack(_gathered(kind, observer)) for kind, observer in kinds_of(tensor).items()
            }
            for each in seen.observed
            for tensor in each.tensors.values()
        }
        return Statistics(manifest, states)

    def _seen(self, each: ObservedModule) -> Module:
        calls, outer_calls = self._calibration.calls_of(each.name)
        weight = "" if each.is_attention else weight_digest(each.module.get_parameter("weight"))
        return Module(
            weight=weight,
            stored_as=self._renamed.get(each.name),
            tokens=each.tokens,
            calls=calls,
            outer_calls=outer_calls,
            unmasked=each.unmasked,
        )

    def take_over(self, found: Statistics) -> None:
        """Go on from what an earlier process gathered."""
        for each in self._calibration.observed:
            for tensor in each.tensors.values():
                for kind, observer in kinds_of(tensor).items():
                    state = unpack(found.states[tensor.full_name][kind])
                    observer.load_state({**observer.state(), **state})
        self._calibration.take_over(found.manifest)
        self.done = found.manifest.batches


class Kept:
    """The checkpoints of a pass: two that take turns, so that one is whole at any moment.

    Args:
        staging: Where they lie.
        work: The pass.
        every: Seconds between two of them.
    """

    def __init__(self, staging: Staging, work: Pass, every: float) -> None:
        self._staging = staging
        self._work = work
        self._every = every
        self._last = time.monotonic()
        self._turn = 0
        #: Digest of the batches that an earlier process ran.
        self._sha256: str | None = None

    def resume(self) -> None:
        """Take over the newer checkpoint, where there is one."""
        notes = {turn: self._staging.note(f"{turn}") for turn in (0, 1) if self._is_done(turn)}
        if not notes:
            return
        turn = max(notes, key=lambda each: int(notes[each]["batches"]))
        self._work.take_over(Statistics.load(self._file(turn), complete=False))
        self._sha256 = notes[turn]["sha256"]
        self._turn = 1 - turn
        logger.info("going on after {} batches", self._work.done)

    def tick(self) -> None:
        """Write a checkpoint where it is time; called between two batches."""
        if time.monotonic() - self._last < self._every:
            return
        work, key = self._work, f"{self._turn}"
        note = {"batches": work.count, "sha256": work.sha256}
        found = work.statistics(complete=False)
        self._staging.write(key, scratch={self._file(self._turn).name: found.write}, note=note)
        self._turn = 1 - self._turn
        self._last = time.monotonic()

    def refuse_other(self, work: Pass) -> None:
        """Refuse batches that are not those that an earlier process ran."""
        if work.count < work.done or work.sha256 != self._sha256:
            raise CalipersError(
                f"{self._staging.scratch.parent} holds statistics of {work.done} batches of other "
                "data: remove it to begin anew, or run with the same data to go on"
            )

    def _is_done(self, turn: int) -> bool:
        return self._staging.done(f"{turn}")

    def _file(self, turn: int) -> Any:
        return self._staging.scratch / f"{turn}.safetensors"


class _Watched:
    """Batches on their way to the model, without those that an earlier process ran."""

    def __init__(self, work: Pass, kept: Kept | None) -> None:
        self._work = work
        self._kept = kept

    def __len__(self) -> int:
        return len(self._work)

    def __iter__(self) -> Iterator[Any]:
        work, kept = self._work, self._kept
        for batch in work:
            # asked for the next one, the model is done with those before
            if kept is not None and work.count == work.done and work.done:
                kept.refuse_other(work)
            if kept is not None and work.count > work.done:
                kept.tick()
            if work.count >= work.done:
                yield batch


def _gathered(kind: str, observer: Any) -> dict[str, Tensor]:
    """The entries of a kind, of an observer's state."""
    found: dict[str, Tensor] = (observer.moments if kind == "moments" else observer).state()
    return found


def digest_of(batches: Iterable[Any]) -> str:
    """Digest of batches in their order."""
    digest = hashlib.sha256()
    for batch in batches:
        _add_batch(digest, batch)
    return digest.hexdigest()


def _add_batch(digest: Any, batch: object) -> None:
    """Add a batch to a digest: tensors by dtype, shape and bytes, all else by its text."""
    if isinstance(batch, Mapping):
        for key in sorted(batch, key=str):
            digest.update(f"{key}:".encode())
            _add_batch(digest, batch[key])
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            _add_batch(digest, value)
    elif isinstance(batch, Tensor):
        digest.update(f"{batch.dtype} {tuple(batch.shape)}".encode())
        if batch.numel():
            plain = batch.detach().cpu().contiguous().reshape(-1)
            digest.update(plain.view(torch.uint8).numpy())
    else:
        plain_value = isinstance(batch, (str, int, float, bool, type(None)))
        digest.update(f"{batch if plain_value else type(batch).__name__}".encode())
