"""`calibrate`: a model in memory, or the path of one of any size, in one call."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from calipers._words import check_choice
from calipers.calibration import CalibrationReport
from calipers.calibration.calibrate import calibrate as calibrate_model
from calipers.calibration.config import SchemeLike
from calipers.calibration.convergence import refuse_until_stable
from calipers.calibration.few_tokens import ExpertPolicy
from calipers.calibration.plan import ObserverChoice
from calipers.calibration.shadows import Shadows
from calipers.checkpoint import save
from calipers.checkpoint.opening import load_model, load_tokenizer
from calipers.checkpoint.save import refuse_taken
from calipers.checkpoint.source import refuse_source
from calipers.distributed import Ranks
from calipers.errors import CalipersError
from calipers.reports import write_report
from calipers.reports.file import common_observer
from calipers.streaming.calibrate import calibrate_stream
from calipers.streaming.plan import plan_stream
from calipers.streaming.quantize import SHARD_BYTES
from calipers.streaming.sizes import Memory, open_in_blocks
from calipers.streaming.source import SourceCheckpoint
from calipers.text.for_model import batches_for_model

__all__ = ["calibrate"]


def calibrate(
    model: torch.nn.Module | str | os.PathLike[str],
    scheme: SchemeLike | None = "W4A16",
    observer: str | None = None,
    data: str | Path | Iterable[Any] | None = None,
    ignore: str | Iterable[str] = (),
    *,
    memory: Memory = "auto",
    propagate: bool = False,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    load_check: bool = True,
    device: str | None = None,
    dtype: str = "auto",
    **options: Any,
) -> CalibrationReport:
    """Quantize a model in place, or from its folder into another one.

    Args:
        model: A model, which is quantized in place; see `calipers.calibration.calibrate`, whose
            arguments all are taken. Or the path of a local transformers folder, of which a
            quantized checkpoint is written to `out`.
        scheme: As in `calipers.calibration.calibrate`, and so are the next three.
        observer: Observer of weights.
        data: Batches or text.
        ignore: Modules left alone.
        memory: "whole" has all weights in memory. "blocks" reads the weights of one decoder block
            at a time, runs all batches through it, derives its scales and writes it: see
            docs/scaling.md. The checkpoint is the same, byte for byte. "auto" takes "blocks" for a
            path whose weights would not fit into the memory that is free. For a model, "auto" is
            "whole".
        propagate: With "blocks", run each block a second time once it is quantized, so that the
            next ones see what the quantized model gives them.
        out: Folder to write the checkpoint to, with the report beside it as
            `calipers-report.json`; needed for a path, and for a path alone. Where the process is
            killed, the same call goes on after the blocks that were written.
        force: Replace an existing folder.
        load_check: As in `calipers.save`.
        device: Where the model of a path runs; None takes a GPU if there is one.
        dtype: "auto" for that of the checkpoint, or the name of a torch dtype.
        **options: The other arguments of `calipers.calibration.calibrate`, by the same names.

    Returns:
        What was done, module by module.

    Raises:
        CheckpointError: As `calipers.save`.
        ValueError: As `calipers.calibration.calibrate`.

    Example:
        >>> import tempfile
        >>> from calipers.demo import MODEL_PATH
        >>> texts = ["Once upon a time there was a cat.", "It sat on a mat and slept."]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     out = f"{folder}/quantized"
        ...     report = calibrate(MODEL_PATH, "FP8", data=texts, memory="blocks", out=out)
        >>> report.batches
        2
    """
    check_choice("memory", memory, Memory)
    if propagate and memory == "whole":
        raise CalipersError("propagate: only memory='blocks' runs a block once it is quantized")
    known = inspect.signature(calibrate_model).parameters
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"calibrate() got an unexpected keyword argument {unknown[0]!r}")
    named = {"scheme": scheme, "observer": observer, "data": data, "ignore": ignore}
    given: dict[str, Any] = {**named, **options}
    if not isinstance(model, (str, os.PathLike)):
        if out is not None:
            raise CalipersError("out: a model is quantized in place; save(model, path) writes it")
        given["memory"] = "blocks" if memory == "blocks" else "whole"
        return calibrate_model(model, propagate=propagate, **given)
    if out is None:
        raise CalipersError(
            f"out: expected the folder to write, since model is a path ({str(model)!r}), got None"
        )
    path, target = Path(model).expanduser(), Path(out).expanduser()
    refuse_source(target, path)
    refuse_taken(target, force=force)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    given.setdefault("tokenizer", _tokenizer(path, data))
    source = None
    if memory == "auto" and not propagate:
        tokens = options.get("samples", 128) * options.get("sequence_length", 512)
        source = open_in_blocks(path, dtype, tokens, place)
        memory = "whole" if source is None else "blocks"
    if memory == "whole":
        report = _calibrate_whole(given, path, target, force, load_check, place, dtype)
        _leave_report(report, path, target, given)
        return report
    if options.get("statistics") is not None:
        raise CalipersError(
            "statistics: nothing has to be run then; quantize_checkpoint takes them for a "
            "checkpoint that does not fit into memory"
        )
    if options.get("until_stable") is not None:
        refuse_until_stable(blocks=True, statistics=False)
    report = _calibrate_blocks(
        source or SourceCheckpoint(path, dtype),
        target,
        given,
        propagate=propagate,
        force=force,
        load_check=load_check,
        device=place,
    )
    _leave_report(report, path, target, given)
    return report


def _leave_report(
    report: CalibrationReport, path: Path, out: Path, given: Mapping[str, Any]
) -> None:
    """Write the report beside the checkpoint, on the first rank alone."""
    if (given.get("ranks") or Ranks()).rank:
        return
    scheme = given["scheme"]
    plain = scheme is None or isinstance(scheme, (str, os.PathLike))
    write_report(
        report,
        out,
        model=path,
        scheme=scheme if plain else type(scheme).__name__,
        observer=given["observer"] or common_observer(report),
        options=given.get("observer_options") or {},
    )


def _calibrate_whole(
    given: Mapping[str, Any],
    path: Path,
    out: Path,
    force: bool,
    load_check: bool,
    device: str,
    dtype: str,
) -> CalibrationReport:
    model = load_model(path, device=device, dtype=dtype)
    report = calibrate_model(model, **given)
    save(model, out, force=force, load_check=load_check)
    return report


def _calibrate_blocks(
    source: SourceCheckpoint,
    out: Path,
    given: Mapping[str, Any],
    *,
    propagate: bool,
    force: bool,
    load_check: bool,
    device: str,
) -> CalibrationReport:
    defaults = {
        name: each.default for name, each in inspect.signature(calibrate_model).parameters.items()
    }
    chosen = {**defaults, **given}
    data = chosen["data"]
    choice = ObserverChoice(
        chosen["observer"],
        chosen["activation_observer"],
        dict(chosen["observer_options"] or {}),
        data is not None,
        Shadows.read(chosen["shadow"], chosen["activation_shadow"], chosen["pick"]),
    )
    plan = plan_stream(
        source,
        chosen["scheme"],
        choice,
        chosen["ignore"],
        chosen["on_unfit"],
        chosen["scheme_options"],
        chosen["kv_cache"],
        chosen["only"],
        runs_data=True,
        load_check=load_check,
        shard_bytes=SHARD_BYTES,
    )
    batches = None
    if data is not None:
        batches = batches_for_model(
            data,
            source.model,
            chosen["tokenizer"],
            samples=chosen["samples"],
            sequence_length=chosen["sequence_length"],
        )
    return calibrate_stream(
        plan,
        out,
        batches,
        on_missing=chosen["on_missing"],
        progress=chosen["progress"],
        use_attention_mask=chosen["use_attention_mask"],
        experts=ExpertPolicy(
            chosen["on_few_tokens"], chosen["enough_tokens"], chosen["all_experts"]
        ),
        propagate=propagate,
        ranks=chosen["ranks"],
        force=force,
        device=device,
    )


def _tokenizer(path: Path, data: Any) -> Any:
    """The tokenizer of a model's folder; None without data, or where there is none."""
    if data is None:
        return None
    try:
        return load_tokenizer(path)
    except Exception:  # whatever transformers and its plug-ins raise; text without one is refused
        return None
