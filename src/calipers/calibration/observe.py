"""`observe`: run data once, without any scheme, and keep what any scheme may ask for later."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from calipers._unwrap import unwrap, without_wrappers
from calipers.calibration.batches import Progress, expect_batches
from calipers.calibration.experts import separated_experts
from calipers.calibration.parts import Only
from calipers.calibration.plan import Plan
from calipers.calibration.session import Calibration
from calipers.calibration.statistics_plan import kinds_of, plan_statistics
from calipers.errors import CalipersError, StatisticsError
from calipers.statistics_files import Data, Fingerprint, Manifest, Options, Statistics
from calipers.statistics_files.file import read_file, remove_leftovers, write_file
from calipers.statistics_files.kinds import State, pack, unpack
from calipers.statistics_files.manifest import installed_versions
from calipers.text.for_model import batches_for_model

__all__ = ["observe"]

#: Seconds between two checkpoints of a run: what is lost at most when it is killed.
EVERY = 60.0


def observe(
    model: nn.Module,
    data: str | Path | Iterable[Any],
    out: str | Path | None = None,
    *,
    ignore: str | Iterable[str] = (),
    include: str | Iterable[str] = (),
    only: Only | None = None,
    products: int | None = None,
    histograms: bool = False,
    outputs: bool = False,
    kv: bool = False,
    queries: bool = False,
    tokenizer: Any = None,
    samples: int = 128,
    sequence_length: int = 512,
    use_attention_mask: bool = True,
    all_experts: bool = False,
    progress: Progress | None = None,
    every: float = EVERY,
    force: bool = False,
    name: str | None = None,
) -> Statistics:
    """Run data once, without a scheme, and gather what any scheme may ask for later.

    Of every Linear (experts one by one) the sum of x^2 of each input column and the extremes of
    each input column are gathered; more on demand. The model stays as it is.

    Args:
        model: Any torch model with Linear layers, as `calibrate` takes it.
        data: Batches or text, as `calibrate` takes them.
        out: Where to write the statistics file; None writes none. While data runs, what was
            gathered so far is kept beside it: the same call goes on from there after the process
            was killed, and ends with the same bytes.
        ignore: Modules left alone, as in `calibrate`.
        include: Exact names of layers that are left alone otherwise: output heads, routers.
        only: As in `calibrate`.
        products: Sum products of inputs too, for the objective "hessian", of groups of so many
            columns; 0 for whole rows (strategies channel and tensor). None sums none.
        histograms: Count the values of activations by bit pattern, for the observer "histogram".
        outputs: Watch outputs of layers as well.
        kv: Watch the keys and values of attention, for a quantized cache.
        queries: Watch the queries as well.
        tokenizer: As in `calibrate`.
        samples: As in `calibrate`.
        sequence_length: As in `calibrate`.
        use_attention_mask: As in `calibrate`.
        all_experts: As in `calibrate`.
        progress: Called as `progress("batches", done, total)`.
        every: Seconds between two checkpoints beside `out`.
        force: Replace `out` if it exists.
        name: What the file calls the data; None takes the path where `data` is one.

    Returns:
        The statistics; `calibrate(model, scheme, statistics=...)` takes them in place of data.

    Raises:
        CalipersError: `out` exists and holds something else, or nothing is there to observe.
        SchemeError: Patterns that match nothing, attention that cannot be watched.

    Example:
        >>> import torch
        >>> from calipers import observe
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> statistics = observe(model, [torch.ones(3, 4)])
        >>> statistics.states["0.weight"]["moments"]["input_square_sum"]
        tensor([3., 3., 3., 3.], dtype=torch.float64)
    """
    if not isinstance(model, nn.Module):
        raise CalipersError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    options = Options(
        products=_checked_width(products),
        histograms=histograms,
        outputs=outputs,
        states="qkv" if queries else "kv" * kv,
        use_attention_mask=use_attention_mask,
        all_experts=all_experts,
    )
    if name is None and isinstance(data, (str, Path)):
        name = str(data)
    model = unwrap(model)
    with without_wrappers(model), separated_experts(model):
        plan = plan_statistics(model, options, ignore, include, only)
        batches = batches_for_model(
            data, model, tokenizer, samples=samples, sequence_length=sequence_length
        )
        expect_batches(batches)
        with Calibration(model, plan) as calibration:
            work = _Pass(calibration, plan, options, name, None if out is None else Path(out))
            if work.out is not None and work.out.exists() and not force:
                return work.already_there(batches)
            work.resume()
            watched = _Watched(batches, work, every)
            calibration.run(
                watched,
                None if progress is None else watched.counting(progress),
                use_attention_mask=use_attention_mask,
                all_experts=all_experts,
            )
            watched.refuse_less()
            return work.finish(watched.sha256)


def _checked_width(products: int | None) -> int | None:
    if products is not None and (isinstance(products, bool) or products < 0):
        raise CalipersError(
            f"products (--products): expected columns of a group, or 0 for rows, got {products!r}"
        )
    return products


class _Pass:
    """A pass over data: its statistics so far, and where they are kept meanwhile.

    Args:
        calibration: Of the model, its observers attached.
        plan: What is observed.
        options: What is gathered.
        name: Of the data.
        out: Where the statistics file will be; None for nowhere.
    """

    def __init__(
        self,
        calibration: Calibration,
        plan: Plan,
        options: Options,
        name: str | None,
        out: Path | None,
    ) -> None:
        self.calibration = calibration
        self.options = options
        self.name = name
        self.out = out
        self.staging = None if out is None else out.with_name(f".{out.name}.partial")
        self.fingerprint = Fingerprint.of(calibration.model)
        #: What an earlier process did: batches, and the digest of them.
        self.done, self.sha256 = 0, hashlib.sha256().hexdigest()
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(out)
            remove_leftovers(self.staging)  # type: ignore[arg-type]  # as `out`

    def manifest(self, sha256: str, *, complete: bool) -> Manifest:
        """What the statistics so far say about themselves."""
        seen = self.calibration
        data = Data(
            name=self.name,
            sha256=sha256,
            batches=seen.batches,
            tokens_given=seen.tokens_given,
            tokens_counted=seen.tokens_counted,
        )
        return Manifest(
            fingerprint=self.fingerprint,
            options=self.options,
            modules=seen.seen(),
            data=[data],
            versions=installed_versions(),
            complete=complete,
        )

    def states(self) -> dict[str, dict[str, State]]:
        """The statistics so far."""
        return {
            tensor.full_name: {
                kind: pack(_gathered(kind, observer)) for kind, observer in kinds_of(tensor).items()
            }
            for each in self.calibration.observed
            for tensor in each.tensors.values()
        }

    def keep(self, sha256: str) -> None:
        """Write what there is so far beside the file, so that another process can go on."""
        if self.staging is not None:
            write_file(self.staging, self.manifest(sha256, complete=False), self.states())

    def finish(self, sha256: str) -> Statistics:
        """The statistics; written, where they are to be."""
        found = Statistics(self.manifest(sha256, complete=True), self.states())
        if self.out is not None:
            found.save(self.out)
            found.name = str(self.out)
        if self.staging is not None:
            self.staging.unlink(missing_ok=True)
        return found

    def resume(self) -> None:
        """Take over what an earlier process left, where it was the same run."""
        if self.staging is None or not self.staging.exists():
            return
        try:
            manifest, states = read_file(self.staging)
        except StatisticsError as error:
            logger.warning("observe begins anew: {}", error)
            return
        if not self._is_ours(manifest):
            logger.warning("observe begins anew: {} is of another run", self.staging)
            return
        for each in self.calibration.observed:
            for tensor in each.tensors.values():
                for kind, observer in kinds_of(tensor).items():
                    state = unpack(states[tensor.full_name][kind])
                    observer.load_state({**observer.state(), **state})
        self.calibration.take_over(manifest)
        self.done, self.sha256 = manifest.batches, manifest.data[0].sha256
        logger.info("observe goes on after {} batches, kept in {}", self.done, self.staging)

    def already_there(self, batches: Iterable[Any]) -> Statistics:
        """The statistics of this very run, where its file is there already.

        Raises:
            CalipersError: It holds something else.
        """
        assert self.out is not None
        assert self.staging is not None
        problem = f"{self.out} exists: choose another place, or replace it with force (--force)"
        try:
            found = Statistics.load(self.out)
        except StatisticsError:
            raise CalipersError(problem) from None
        if not isinstance(batches, Sized) or not self._is_ours(found.manifest):
            raise CalipersError(problem)
        digest = hashlib.sha256()
        for batch in batches:
            _add_batch(digest, batch)
        if [each.sha256 for each in found.manifest.data] != [digest.hexdigest()]:
            raise CalipersError(problem)
        logger.info("{} is there already, of the same model, data and options", self.out)
        self.staging.unlink(missing_ok=True)
        return found

    def _is_ours(self, manifest: Manifest) -> bool:
        """Whether statistics are of this model, these options and versions, and one pass."""
        return (
            not manifest.fingerprint.differences(self.fingerprint)
            and manifest.options == self.options
            and manifest.versions == installed_versions()
            and manifest.modules.keys() == {each.name for each in self.calibration.observed}
            and [each.name for each in manifest.data] == [self.name]
        )


class _Watched:
    """Batches on their way to the model: counted, digested, and kept now and then.

    Args:
        batches: All of them; those that an earlier process ran are passed over.
        work: The pass.
        every: Seconds between two checkpoints.
    """

    def __init__(self, batches: Iterable[Any], work: _Pass, every: float) -> None:
        self._batches = batches
        self._work = work
        self._every = every
        self._digest = hashlib.sha256()
        self._count = 0

    @property
    def sha256(self) -> str:
        """Digest of the batches so far."""
        return self._digest.hexdigest()

    def __len__(self) -> int:
        length = len(self._batches) if isinstance(self._batches, Sized) else None
        if length is None:
            raise TypeError("of no known length")
        return max(0, length - self._work.done)

    def __iter__(self) -> Iterator[Any]:
        kept = time.monotonic()
        for batch in self._batches:
            # asked for the next one, the model is done with those before
            if self._count > self._work.done and time.monotonic() - kept >= self._every:
                self._work.keep(self.sha256)
                kept = time.monotonic()
            _add_batch(self._digest, batch)
            self._count += 1
            if self._count == self._work.done:
                self._refuse_other()
            if self._count > self._work.done:
                yield batch

    def counting(self, progress: Progress) -> Progress:
        """Progress over all batches, those of an earlier process included."""
        done = self._work.done
        return lambda stage, now, total: progress(
            stage, now + done, None if total is None else total + done
        )

    def refuse_less(self) -> None:
        """Refuse fewer batches than an earlier process ran."""
        if self._count < self._work.done:
            self._refuse_other()

    def _refuse_other(self) -> None:
        if self.sha256 != self._work.sha256 or self._count < self._work.done:
            raise CalipersError(
                f"{self._work.staging} holds statistics of {self._work.done} batches of other "
                "data: remove it to begin anew, or run with the same data to go on"
            )


def _gathered(kind: str, observer: Any) -> dict[str, Tensor]:
    """The entries of a kind, of an observer's state."""
    found: dict[str, Tensor] = (observer.moments if kind == "moments" else observer).state()
    return found


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
