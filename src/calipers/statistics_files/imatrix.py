"""llama.cpp's imatrix files (GGUF): read into statistics, and written from them.

Facts of llama.cpp's `tools/imatrix/imatrix.cpp`: for each weight that is multiplied by an input the
file has "<tensor>.in_sum2", float32, the sum of x^2 of each input column, one row for each matrix
of the tensor, and "<tensor>.counts", float32, the tokens behind each matrix (a newer one has
"<tensor>.in_sum" as well, the sum of x, which is not read here). All experts of a layer are one
tensor. Its keys are `general.type` "imatrix", `imatrix.datasets`, `imatrix.chunk_count` and
`imatrix.chunk_size`. Rows of q and k are permuted in GGUF files of Llama; input columns are not.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loguru import logger

from calipers._files import replacing
from calipers._words import listing
from calipers.errors import StatisticsError
from calipers.statistics_files.fingerprint import Fingerprint
from calipers.statistics_files.kinds import State
from calipers.statistics_files.manifest import Data, Manifest, Module, Options, installed_versions
from calipers.statistics_files.statistics import Statistics

__all__ = ["read_imatrix", "write_imatrix"]

_SUM, _COUNT, _MEAN = ".in_sum2", ".counts", ".in_sum"
_TYPE, _DATASETS = "general.type", "imatrix.datasets"
_CHUNKS, _CHUNK_SIZE = "imatrix.chunk_count", "imatrix.chunk_size"
#: transformers' names of architectures where gguf's differ by more than underscores and "_text".
_ARCHITECTURES = {"cohere": "command-r", "mistral": "llama", "mixtral": "llama", "umt5": "t5"}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_EXPERT = re.compile(r"(?P<layer>.*\.experts)\.(?P<number>\d+)\.(?P<leaf>[^.]+)")
#: What models that see or hear as well put in front of the names of their language part.
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.")


def read_imatrix(
    path: str | Path,
    fingerprint: Fingerprint,
    modules: Mapping[str, Module],
    columns: Mapping[str, int],
) -> Statistics:
    """Statistics of the inputs of a model's weights, from an imatrix file of llama.cpp.

    The file does not say which weights it is of: the model is taken on trust, but for its names and
    widths.

    Args:
        path: A GGUF file of the type "imatrix".
        fingerprint: Of the model.
        modules: The model's layers that may be quantized, by name, each with its `weight_digest`.
        columns: How many inputs each of them has.

    Returns:
        Statistics of all of `modules`; those that the file lacks have no tokens, and a warning
        names some of them.

    Raises:
        StatisticsError: No package gguf, an architecture that it does not know, no such file, a
            file of another type, or tensors that do not belong together.
    """
    path = Path(path)
    tensors, fields = _read_gguf(path)
    names = _Names.of(fingerprint)
    states: dict[str, dict[str, State]] = {}
    found: dict[str, Module] = {}
    used: set[str] = set()
    for module, record in modules.items():
        place = names.find(record.stored_as or module)
        sums = None if place is None else tensors.get(place.tensor + _SUM)
        counts = None if place is None else tensors.get(place.tensor + _COUNT)
        state: State = {"num_nonfinite": _whole(0), "num_input_tokens": _whole(0)}
        if place is not None and (sums is not None or counts is not None):
            row = place.matrix
            if sums is None or counts is None or len(counts) not in (1, len(sums)):
                raise StatisticsError(f"{path}: sums and counts of {place.tensor} do not fit")
            if row >= len(sums) or sums.shape[1] != columns[module]:
                raise StatisticsError(
                    f"{path} is of another model: {place.tensor} has {len(sums)} matrices of "
                    f"{sums.shape[1]} inputs, and {module} is matrix {row + 1} of "
                    f"{columns[module]} inputs"
                )
            used.add(place.tensor)
            # dense tensors have one count, as older files have for all experts
            tokens = round(float(counts[row if len(counts) > 1 else 0].item()))
            if tokens:
                state["num_input_tokens"] = _whole(tokens)
                state["input_square_sum"] = torch.from_numpy(sums[row].astype(np.float64))
            record = record.model_copy(update={"tokens": tokens})
        states[f"{module}.weight"] = {"moments": state}
        found[module] = record
    _tell(path, tensors, used, [name for name, each in found.items() if not each.tokens])
    chunks = int(fields.get(_CHUNKS, 0))
    data = Data(
        name=", ".join(fields.get(_DATASETS, [])) or path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        batches=chunks,
        tokens_given=chunks * int(fields.get(_CHUNK_SIZE, 0)),
        tokens_counted=chunks * int(fields.get(_CHUNK_SIZE, 0)),
    )
    manifest = Manifest(
        fingerprint=fingerprint,
        options=Options(),
        modules=found,
        data=[data],
        versions={**installed_versions(), "gguf": [_gguf_version()]},
    )
    return Statistics(manifest, states, str(path))


def write_imatrix(statistics: Statistics, path: str | Path) -> None:
    """Write what llama.cpp's `llama-quantize --imatrix` reads.

    Sums are rounded to float32, which is what the format holds.

    Args:
        statistics: Of a model whose architecture gguf knows. Modules that have no name there are
            left out, with a warning.
        path: Where to write; what stood there is replaced in one step.

    Raises:
        StatisticsError: No package gguf, an architecture that it does not know, or nothing to
            write.
        OSError: It cannot be written.
    """
    path = Path(path)
    gguf = _gguf()
    names = _Names.of(statistics.manifest.fingerprint)
    entries: dict[str, dict[int, State]] = defaultdict(dict)
    nameless = []
    for module, record in statistics.modules.items():
        moments = statistics.states.get(f"{module}.weight", {}).get("moments")
        place = names.find(record.stored_as or module)
        if moments is None:
            continue
        if place is None:
            nameless.append(module)
        else:
            entries[place.tensor][place.matrix] = moments
    if nameless:
        logger.warning(
            "{} modules have no name in GGUF and are left out: {}",
            len(nameless),
            listing(nameless, 3),
        )
    tensors = {
        tensor: found
        for tensor, found in sorted(entries.items())
        if any(map(_tokens, found.values()))
    }
    if not tensors:
        raise StatisticsError(f"{statistics.name} has no inputs of weights that GGUF has names for")
    data = statistics.manifest.data
    most = max(each.tokens for each in statistics.modules.values())
    chunks = statistics.manifest.batches
    with replacing(path) as beside:
        writer = gguf.GGUFWriter(beside, "")  # an imatrix names no architecture
        writer.add_string(_TYPE, "imatrix")
        writer.add_array(_DATASETS, [each.name or "batches" for each in data])
        writer.add_uint32(_CHUNKS, chunks)
        writer.add_uint32(_CHUNK_SIZE, max(1, most // max(1, chunks)))
        for tensor, found in tensors.items():
            sums, counts = _rows(found, names.experts)
            writer.add_tensor(tensor + _SUM, sums)
            writer.add_tensor(tensor + _COUNT, counts)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _rows(found: Mapping[int, State], experts: int) -> tuple[Any, Any]:
    """Sums and counts of the matrices of a tensor, float32, one row each; zeros of unseen ones."""
    rows = max(max(found) + 1, experts if len(found) > 1 else 1)
    cols = max(each["input_square_sum"].numel() for each in found.values() if _tokens(each))
    sums = np.zeros((rows, cols), dtype=np.float32)
    counts = np.zeros((rows, 1), dtype=np.float32)
    for number, state in found.items():
        if _tokens(state):
            sums[number] = state["input_square_sum"].float().numpy()
            counts[number] = _tokens(state)
    return sums, counts


def _tokens(state: State) -> int:
    return int(state["num_input_tokens"])


def _whole(number: int) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.int64, device="cpu")


@dataclass(frozen=True)
class _Place:
    """Where GGUF keeps a weight: a tensor, and which of its matrices."""

    tensor: str
    matrix: int = 0


class _Names:
    """Names of tensors of one architecture, as gguf's own map has them.

    Args:
        table: That map.
        experts: Experts of a layer, 0 of a model without.
    """

    def __init__(self, table: Any, experts: int) -> None:
        self._table = table
        self.experts = experts

    @classmethod
    def of(cls, fingerprint: Fingerprint) -> _Names:
        gguf = _gguf()
        config = fingerprint.config
        text = config.get("text_config")
        config = text if isinstance(text, dict) else config
        kind, layers = config.get("model_type"), config.get("num_hidden_layers")
        known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        plain = str(kind).removesuffix("_text")
        spellings = [_ARCHITECTURES.get(plain), plain]
        spellings += [plain.replace("_", ""), plain.replace("_", "-")]
        found = next((known[each] for each in spellings if each in known), None)
        if found is None or not isinstance(layers, int):
            raise StatisticsError(
                f"{fingerprint.kind}: gguf {_gguf_version()} knows no architecture {kind!r}, so "
                "that names of its tensors cannot be told"
            )
        experts = next((config[name] for name in _EXPERTS if config.get(name)), 0)
        return cls(gguf.get_tensor_name_map(found, layers), experts)

    def find(self, module: str) -> _Place | None:
        """Where the weight of a module lies; None where there is no name for it."""
        for prefix in _PREFIXES:
            if module.startswith(prefix):
                module = f"model.{module.removeprefix(prefix)}"
                break
        expert = _EXPERT.fullmatch(module)
        number = 0
        if expert is not None:
            module, number = f"{expert['layer']}.{expert['leaf']}", int(expert["number"])
        for name in (module, f"model.{module}"):
            tensor = self._table.get_name(f"{name}.weight", try_suffixes=(".weight",))
            if tensor is not None:
                return _Place(tensor, number)
        return None


def _tell(path: Path, tensors: Iterable[str], used: set[str], lacking: list[str]) -> None:
    """Say what of the file has no place, and which modules it says nothing about."""
    own = {name.removesuffix(_SUM) for name in tensors if name.endswith(_SUM)}
    if own - used:
        left = listing(sorted(own - used), 3)
        logger.warning("{}: {} tensors belong to no module: {}", path, len(own - used), left)
    if not used:
        raise StatisticsError(f"{path}: none of its tensors belongs to a module of this model")
    if lacking:
        logger.warning(
            "{}: knows no token of {} modules: {}", path, len(lacking), listing(lacking, 3)
        )


def _read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors as rows of float32 by name, and the fields of the file."""
    gguf = _gguf()
    if not path.is_file():
        raise StatisticsError(f"no such imatrix file: {path}")
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {each.name: np.array(each.data) for each in reader.tensors}
    except Exception as error:  # whatever the reader stumbles over in a file that is none
        raise StatisticsError(
            f"{path}: is damaged, or no GGUF file (older imatrix files, .dat, are converted by "
            f"`llama-imatrix --in-file OLD -o NEW.gguf`): {type(error).__name__}: {error}"
        ) from None
    if fields.get(_TYPE) != "imatrix":
        kind = fields.get(_TYPE)
        raise StatisticsError(f"{path}: is a GGUF file of the type {kind!r}, no imatrix")
    ends = (_SUM, _COUNT, _MEAN)
    unknown = sorted(name for name in tensors if not name.endswith(ends))
    if unknown:
        raise StatisticsError(f"{path}: has tensors that no imatrix has: {listing(unknown, 3)}")
    for name, value in tensors.items():
        negative = not name.endswith(_MEAN) and bool((value < 0).any())
        if value.dtype != np.float32 or negative or not np.isfinite(value).all():
            raise StatisticsError(f"{path}: {name} must be finite float32 from 0")
    return {name: value.reshape(-1, value.shape[-1]) for name, value in tensors.items()}, fields


def _gguf() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise StatisticsError(
            "imatrix files of llama.cpp need the package gguf: pip install 'calipers[gguf]' "
            f"({error})"
        ) from None


def _gguf_version() -> str:
    return version("gguf")
