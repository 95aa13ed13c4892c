"""What is measured and what it must reach: the table of issue "Range search at memory speed"."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs

__all__ = ["SMALL", "Case", "all_cases", "gpu_cases"]

Json = dict[str, Any]
#: Rows and columns of the weight on which the cost of a call is measured.
SMALL = 64


@dataclass(frozen=True)
class Case:
    """A line of the table.

    `at_least` bounds theirs / ours from below, `at_most` bounds ours / theirs from above; a case
    with neither is there for information.
    """

    name: str
    args: Json
    observer: str = "memoryless_mse"
    options: Json = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    size: int | None = None
    engine: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    #: Against one read of the tensor rather than against llmcompressor.
    against_read: bool = False
    #: `ranges.min_max` alone, without an observer around it.
    pure: bool = False
    #: NVFP4: ours knows the module's global scale, as it does in a calibration, and so rounds local
    #: scales as they will be stored; the peer never does.
    global_scale: bool = False

    @property
    def is_search(self) -> bool:
        return "minmax" not in self.observer

    @property
    def whole_call(self) -> bool:
        """Whether qparams are derived as well: of a small value the cost of a call counts."""
        return self.size == SMALL and self.observer == "memoryless_minmax"

    def quantization_args(self, size: int) -> QuantizationArgs:
        """The arguments, with groups and blocks cut to the size of the weight."""
        fitted = dict(self.args)
        if "group_size" in fitted:
            fitted["group_size"] = min(fitted["group_size"], size)
        if "block_structure" in fitted:
            fitted["block_structure"] = [min(s, size) for s in fitted["block_structure"]]
        return QuantizationArgs(**fitted)


INT4_G128: Json = {"num_bits": 4, "strategy": "group", "group_size": 128}
INT4_G32: Json = {**INT4_G128, "group_size": 32}
INT8_CHANNEL: Json = {"num_bits": 8, "strategy": "channel"}
NVFP4: Json = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": torch.float8_e4m3fn,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Layout of each min/max case and how many reads of the tensor it may take.
MIN_MAX: dict[str, tuple[Json, float]] = {
    "tensor": ({"num_bits": 8, "strategy": "tensor"}, 1.3),
    "channel": (INT8_CHANNEL, 1.3),
    "block 128x128": ({"num_bits": 8, "strategy": "block", "block_structure": [128, 128]}, 1.3),
    "group 128": ({"num_bits": 8, "strategy": "group", "group_size": 128}, 1.7),
    "group 16": ({"num_bits": 8, "strategy": "group", "group_size": 16}, 4.0),
}


def all_cases() -> list[Case]:
    """The table of what must be reached, top to bottom."""
    grid_80 = {"maxshrink": 0.8}
    cases = [
        *(
            Case(f"mse int4 g128 {name}", INT4_G128, dtype=dtype, at_least=25)
            for name, dtype in DTYPES.items()
        ),
        *(
            Case(f"mse int4 g128 norm 2 {n}", INT4_G128, options={"norm": 2}, dtype=d, at_least=40)
            for n, d in DTYPES.items()
        ),
        Case("mse int8 channel", INT8_CHANNEL, at_least=12),
        Case("mse nvfp4 g16", NVFP4, at_least=40),
        Case("mse nvfp4 g16, global scale", NVFP4, global_scale=True, at_least=40),
        Case(
            "mse nvfp4 g16, global scale, bfloat16",
            NVFP4,
            dtype=torch.bfloat16,
            global_scale=True,
            at_least=100,
        ),
        Case("imatrix_mse int4 g128", INT4_G128, "imatrix_mse", at_least=10),
        # With the default patience of 5 the peer would not walk through all 80 steps.
        Case(
            "mse int8 channel 80 steps",
            INT8_CHANNEL,
            options={**grid_80, "patience": 1000},
            at_least=20,
        ),
        Case("mse int8 channel 80 steps, patience 5", INT8_CHANNEL, options=grid_80),
        Case("mse int4 g128 eager engine", INT4_G128, engine="eager", at_least=3),
    ]
    for dtype_name, dtype in DTYPES.items():
        for layout, (args, reads) in MIN_MAX.items():
            minmax = Case(
                f"minmax {layout} {dtype_name}",
                args,
                "memoryless_minmax",
                dtype=dtype,
                at_most=reads,
                against_read=True,
                pure=True,
            )
            observed = replace(minmax, name=f"{minmax.name}, observe", at_most=None, pure=False)
            cases += [minmax, observed]
    small: list[tuple[str, Json, str]] = [
        ("mse int4 g32", INT4_G32, "memoryless_mse"),
        ("mse int8 channel", INT8_CHANNEL, "memoryless_mse"),
        ("mse nvfp4 g16", NVFP4, "memoryless_mse"),
        ("imatrix_mse int4 g32", INT4_G32, "imatrix_mse"),
        ("minmax channel", INT8_CHANNEL, "memoryless_minmax"),
    ]
    for name, args, observer in small:
        title = f"{SMALL}x{SMALL} {name}"
        cases.append(Case(title, args, observer, size=SMALL, at_most=1.5))
    return cases


def gpu_cases() -> list[Case]:
    """Searches in bfloat16 on a GPU, all to be twice as fast as the peer's own kernels."""
    cases = [
        Case("mse int4 g128", INT4_G128),
        Case("mse int4 g128 norm 2", INT4_G128, options={"norm": 2}),
        Case("mse int8 channel", INT8_CHANNEL),
        Case("mse nvfp4 g16", NVFP4),
        Case("imatrix_mse int4 g128", INT4_G128, "imatrix_mse"),
    ]
    return [replace(case, dtype=torch.bfloat16, at_least=2) for case in cases]
