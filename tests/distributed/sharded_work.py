"""Weights spread over ranks, observed shard by shard and as a whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

import calipers
from calipers.observers import Observer

#: Arguments by name: all of them symmetric integers but the last.
ARGS: dict[str, dict[str, Any]] = {
    "tensor": {"num_bits": 8, "strategy": "tensor"},
    "channel": {"num_bits": 8, "strategy": "channel"},
    "channel, asymmetric": {"num_bits": 4, "strategy": "channel", "symmetric": False},
    "group": {"num_bits": 4, "strategy": "group", "group_size": 8},
    "block": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [4, 16]},
    "tensor_group": {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": torch.float8_e4m3fn,
        "zp_dtype": torch.float8_e4m3fn,
    },
}
#: Rows and columns that two, three and four ranks share out unevenly, or not at all.
SHAPES = [(10, 48), (7, 96), (16, 128), (3, 20), (1, 16)]
EXTREMES = ["memoryless_minmax", "static_minmax", "minmax"]
#: Patience counts the groups that improve, so a shard alone may end a search sooner: none here.
SEARCHES: dict[str, dict[str, Any]] = {
    "memoryless_mse": {"patience": 0},
    "imatrix_mse": {"patience": 0},
    "optimal": {},
    "optimal, hessian": {"objective": "hessian"},
}


class Counts:
    """How often a whole tensor was gathered, and ranks were asked for anything."""

    def __init__(self) -> None:
        self.gathers = self.reductions = 0
        self._gather, self._reduce = DTensor.full_tensor, dist.all_reduce

    def __enter__(self) -> Counts:
        def full_tensor(tensor: DTensor, **kwargs: Any) -> Tensor:
            self.gathers += 1
            return self._gather(tensor, **kwargs)

        def all_reduce(*args: Any, **kwargs: Any) -> Any:
            self.reductions += 1
            return self._reduce(*args, **kwargs)

        DTensor.full_tensor, dist.all_reduce = full_tensor, all_reduce
        return self

    def __exit__(self, *_: object) -> None:
        DTensor.full_tensor, dist.all_reduce = self._gather, self._reduce


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator)
    return (values * (1 + torch.arange(shape[1]) % 5)).to(dtype)


def observer(name: str, args: dict[str, Any], cols: int) -> Observer:
    kind = name.partition(", ")[0]
    options = SEARCHES.get(name, {})
    made: Observer = Observer.load_from_registry(
        kind, base_name="weight", args=QuantizationArgs(**args), **options
    )
    if made.needs_data:
        generator = torch.Generator().manual_seed(5)
        made.observe_input(torch.randn(64, cols, generator=generator) * torch.arange(1, cols + 1))
    return made


def derive(made: Observer, value: Tensor, strategy: str) -> tuple[Tensor, Tensor]:
    if strategy != "tensor_group":
        return made.get_qparams(value)  # type: ignore[return-value]
    scale = made.get_global_scale(value)
    return made.get_qparams(value, global_scale=scale)  # type: ignore[return-value]


def compare(name: str, key: str, value: Tensor, spread: DTensor) -> tuple[str, int, int]:
    """What differs between a spread weight and the whole one, and how much it asked of ranks."""
    args = ARGS[key]
    expected = derive(observer(name, args, value.shape[1]), value, args["strategy"])
    with Counts() as counts:
        found = derive(observer(name, args, value.shape[1]), spread, args["strategy"])
    told = ""
    for one, other in zip(found, expected, strict=True):
        # gloo sends no float8
        whole = one.float().full_tensor() if isinstance(one, DTensor) else one
        if one.dtype != other.dtype or not torch.equal(whole.float(), other.float()):
            told = f"{whole} instead of {other}"
    return told, counts.gathers, counts.reductions


def all_cases(rank: int, world: int, names: list[str]) -> dict[Any, tuple[str, int, int]]:
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            value = weight(shape, dtype)
            for dim in (0, 1):
                spread = distribute_tensor(value, mesh, [Shard(dim)])
                for key in ARGS:
                    for name in names:
                        case = (name, key, shape, dim, str(dtype))
                        found[case] = compare(name, key, value, spread)
    return found


def two_dimensions(rank: int, world: int) -> dict[Any, tuple[str, int, int]]:
    """Rows cut by one dimension of the mesh, columns by another."""
    mesh = init_device_mesh("cpu", (2, 2))
    value = weight((10, 48))
    spread = distribute_tensor(value, mesh, [Shard(0), Shard(1)])
    return {key: compare("static_minmax", key, value, spread) for key in ARGS}


def nothing_but_nan(rank: int, world: int) -> Any:
    """One shard holds no number; then none does."""
    mesh = init_device_mesh("cpu", (world,))
    value = weight((4, 16))
    value[:, :8] = torch.nan
    args = ARGS["channel"]
    made = observer("static_minmax", args, 16)
    scale, _ = made.get_qparams(distribute_tensor(value, mesh, [Shard(1)]))
    whole, _ = observer("static_minmax", args, 16).get_qparams(value)
    assert torch.equal(scale.full_tensor(), whole)  # type: ignore[union-attr]
    try:
        made.observe(distribute_tensor(value * torch.nan, mesh, [Shard(1)]))
    except ValueError as error:
        return str(error)
    return None


def calibrated(rank: int, world: int) -> str:
    """A model with a weight that is spread is refused before any work."""
    mesh = init_device_mesh("cpu", (world,))
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    spread = distribute_tensor(model[0].weight.detach(), mesh, [Shard(0)])
    model[0].weight = nn.Parameter(spread, requires_grad=False)
    try:
        calipers.calibrate(model, "FP8_DYNAMIC")
    except calipers.SchemeError as error:
        return str(error)
    return "calibrated"
