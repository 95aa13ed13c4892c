"""Whether a model fits into memory whole, or is to be calibrated block by block."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import psutil
import torch
from loguru import logger
from rich.filesize import decimal
from torch import Tensor, nn

from calipers.calibration.blocks import Way
from calipers.calibration.lockstep import find_blocks
from calipers.streaming.source import SourceCheckpoint

__all__ = ["Memory", "Sizes", "available_memory", "measure_sizes", "open_in_blocks"]

Memory: TypeAlias = Literal["auto", "whole", "blocks"]

#: What a process with PyTorch and transformers takes, in bytes, before any weight.
_PROCESS = 10**9
#: Over the weights that are worked on: what is computed of them, and the activations of a batch.
_WORK = 1.3


@dataclass(frozen=True)
class Sizes:
    """What calibrating a model takes, in bytes.

    Attributes:
        model: All weights.
        blocks: How many blocks there are.
        block: Weights of the largest block.
        outside: Weights outside of all blocks.
        hidden: Hidden states of all tokens of the data, in front of a block.
        free: Memory that the process can still take.
    """

    model: int
    blocks: int
    block: int
    outside: int
    hidden: int
    free: int

    @property
    def whole(self) -> int:
        """What it takes with all weights in memory."""
        return int(_PROCESS + _WORK * self.model)

    @property
    def in_blocks(self) -> int:
        """What it takes with one block in memory."""
        # a block reads the hidden states of all batches while it writes others
        return int(_PROCESS + self.outside + _WORK * 2 * self.block + 2 * self.hidden)

    @property
    def way(self) -> Way:
        """What `memory="auto"` takes."""
        return "blocks" if self.blocks and self.whole > self.free else "whole"

    @property
    def reason(self) -> str:
        """Why."""
        if not self.blocks:
            return "the model has no ModuleList of blocks"
        fits = f"all weights at once take about {decimal(self.whole)}"
        if self.way == "whole":
            return f"{fits} of {decimal(self.free)} that are free"
        more = "" if self.in_blocks <= self.free else "; that may be too little for blocks as well"
        return (
            f"{fits}, and {decimal(self.free)} are free; one block at a time takes about "
            f"{decimal(self.in_blocks)}{more}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            **asdict(self),
            "whole": self.whole,
            "in_blocks": self.in_blocks,
            "way": self.way,
            "reason": self.reason,
        }


def measure_sizes(model: nn.Module, tokens: int, device: str | torch.device = "cpu") -> Sizes:
    """The sizes of a model, which may lie on the meta device.

    Args:
        model: A transformers model.
        tokens: How many tokens it will be calibrated with.
        device: Where it will run.
    """
    total = _nbytes(model.parameters())
    blocks = [_nbytes(each.parameters()) for each in find_blocks(model).values()]
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(config, "hidden_size", 0) or 0
    itemsize = next((each.dtype.itemsize for each in model.parameters()), 0)
    return Sizes(
        model=total,
        blocks=len(blocks),
        block=max(blocks, default=0),
        outside=total - sum(blocks),
        hidden=tokens * width * itemsize,
        free=available_memory(device),
    )


def open_in_blocks(
    path: Path, dtype: str, tokens: int, device: str | torch.device = "cpu"
) -> SourceCheckpoint | None:
    """The checkpoint, where `memory="auto"` takes blocks; None where it takes the whole.

    That is also where the size cannot be told: loading the model says what is wrong, or nothing is.

    Args:
        path: A local transformers folder.
        dtype: "auto" for that of the checkpoint, or the name of a torch dtype.
        tokens: How many tokens it will be calibrated with.
        device: Where it will run.
    """
    weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    try:
        # A value takes at least a byte on the disk and at most four in memory: no need to open it.
        if not weights or _PROCESS + _WORK * 4 * weights <= available_memory(device):
            return None
        source = SourceCheckpoint(path, dtype)
        sizes = measure_sizes(source.model, tokens, device)
    except Exception as error:  # a folder that cannot be opened, a device that there is not
        logger.debug("the sizes of {} cannot be told: {}", path, error)
        return None
    if sizes.way == "whole":
        return None
    logger.info("block by block, since {}", sizes.reason)
    return source


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum({id(each): each.nbytes for each in tensors}.values())


def available_memory(device: str | torch.device = "cpu") -> int:
    """Bytes that this process can still take: of the machine, of its cgroup, of its limits."""
    place = torch.device(device)
    if place.type == "cuda":
        return int(torch.cuda.mem_get_info(place)[0])
    found = [int(psutil.virtual_memory().available), *_free_in_cgroups()]
    if sys.platform != "win32":
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            found.append(limit - int(psutil.Process().memory_info().vms))
    return max(0, min(found))


def _free_in_cgroups() -> list[int]:
    """What the control groups of this process leave it; pages of files count as free."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, kinds, own = line.split(":", 2)
        version1 = "memory" in kinds.split(",")
        if kinds and not version1:
            continue
        root = Path("/sys/fs/cgroup/memory" if version1 else "/sys/fs/cgroup")
        most, now = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes")
            if version1
            else ("memory.max", "memory.current")
        )
        place = root / own.lstrip("/")
        for folder in (place, *place.parents):
            free = _free_in(folder, most, now)
            if free is not None:
                found.append(free)
            if folder == root:
                break
    return found


def _free_in(folder: Path, most: str, now: str) -> int | None:
    try:
        limit = (folder / most).read_text(encoding="ascii").strip()
        used = int((folder / now).read_text(encoding="ascii"))
        stat = (folder / "memory.stat").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    if not limit.isdigit():
        return None
    values = dict(zip(stat[::2], stat[1::2], strict=False))
    cached = sum(int(values.get(f"{kind}_file", 0)) for kind in ("active", "inactive"))
    return int(limit) - used + cached
