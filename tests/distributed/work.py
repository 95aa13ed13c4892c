"""What the ranks of these tests do; their one-process counterparts as well."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import calipers
from calipers.distributed import Ranks, share_of_rank

WIDTH, HIDDEN, EXPERTS = 32, 64, 4
FP8 = {"scheme": "FP8", "ignore": ["unused"], "on_missing": "fallback"}


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.relu(self.up_proj(hidden)))


class Moe(nn.Module):
    """The first value of each token names the expert that it goes to."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH, bias=False)
        self.unused = nn.Linear(WIDTH, WIDTH, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.reshape(-1, WIDTH)
        chosen = tokens[:, 0].long()
        out = self.dense(tokens)
        for number, expert in enumerate(self.experts):
            own = tokens[chosen == number]
            if len(own):
                out[chosen == number] += expert(own)
        return out


def model() -> Moe:
    torch.manual_seed(0)
    return Moe().eval()


def batches(count: int = 7) -> list[torch.Tensor]:
    """Batches of other sizes and scales each, every one of two experts alone."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        batch = torch.randn(2, 3 + number, WIDTH, generator=generator) * (1 + number) ** 2
        batch[..., 0] = number % EXPERTS
        batch[:, -1, 0] = 0
        found.append(batch)
    return found


def split(name: str, rank: int, world: int, count: int = 7) -> list[torch.Tensor]:
    """A rank's share of the batches."""
    whole = batches(count)
    if name == "dealt":
        return list(share_of_rank(whole))
    if name == "rows":  # one after the other, of uneven sizes
        cuts = [count * (r * r) // (world * world) for r in range(world + 1)]
        return whole[cuts[rank] : cuts[rank + 1]]
    assert name == "last"  # nobody else has any
    return whole if rank == world - 1 else []


def calibrated(data: Sequence[torch.Tensor], kwargs: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Scales of the model, and what the report counts."""
    own = model()
    report = calipers.calibrate(own, data=data, enough_tokens=20, **kwargs, **more)
    scales = {k: v for k, v in own.state_dict().items() if "scale" in k or "zero_point" in k}
    rows = {each.name: each.tokens for each in report.modules}
    errors = {each.name: each.weight_error for each in report.modules}
    return {
        "scales": scales,
        "tokens": rows,
        "errors": errors,
        "batches": report.batches,
        "left": [each.name for each in report.left_alone],
        "coverage": [each.tokens for each in report.coverage],
    }


def calibrated_ranks(rank: int, world: int, name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    return calibrated(split(name, rank, world), kwargs)


def failing(rank: int, world: int, culprit: int) -> Any:
    """One rank fails while it runs its data."""
    data: Any = list(split("dealt", rank, world))
    if rank == culprit:
        data[-1] = torch.ones(1, WIDTH + 1)
    started = time.monotonic()
    try:
        calibrated(data, FP8)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return None


def never_there(rank: int, world: int, culprit: int) -> Any:
    """One rank never comes."""
    if rank == culprit:
        time.sleep(15)
        return None
    started = time.monotonic()
    try:
        calibrated(split("dealt", rank, world), FP8, ranks=Ranks(timeout=2))
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return None


def slow(rank: int, world: int) -> Any:
    """One rank needs longer than the timeout, and shows that it lives."""
    data: Any = split("dealt", rank, world)

    def slowly() -> Any:
        for batch in data:
            time.sleep(0.6)
            yield batch

    return calibrated(slowly() if rank else data, FP8, ranks=Ranks(timeout=1.5))


def otherwise(rank: int, world: int) -> Any:
    """One rank calibrates other modules."""
    left = (["dense"], [])[rank]
    try:
        return calibrated(batches(), {"scheme": "FP8", "ignore": ["unused", *left]})
    except Exception as error:
        return str(error)
