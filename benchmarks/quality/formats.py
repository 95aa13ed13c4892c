"""The weight formats and the observers that are compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

__all__ = ["BASELINES", "OURS", "PEERS", "Choice", "asymmetric_formats", "formats"]

Json = dict[str, Any]


def _int(bits: int, group_size: int | None = None, symmetric: bool = True) -> QuantizationArgs:
    strategy = "channel" if group_size is None else "group"
    return QuantizationArgs(
        num_bits=bits, strategy=strategy, group_size=group_size, symmetric=symmetric
    )


def formats() -> dict[str, QuantizationArgs]:
    """Formats by name; NVFP4 and MXFP4 as compressed-tensors' presets have them."""
    return {
        "int4 g128": _int(4, 128),
        "int4 g64": _int(4, 64),
        "int4 channel": _int(4),
        "int3 g64": _int(3, 64),
        "NVFP4": preset_name_to_scheme("NVFP4A16", ["Linear"]).weights,
        "MXFP4": preset_name_to_scheme("MXFP4A16", ["Linear"]).weights,
    }


def asymmetric_formats() -> dict[str, QuantizationArgs]:
    """Formats with zero points, of few bits."""
    return {f"asymmetric int{bits} g64": _int(bits, 64, symmetric=False) for bits in (3, 2)}


@dataclass(frozen=True)
class Choice:
    """An observer with its options, of this package or of llmcompressor."""

    name: str
    options: Json = field(default_factory=dict)
    peer: bool = False
    #: Formats that it is made for, by the start of their names; None: all.
    only: str | None = None

    def __str__(self) -> str:
        values = [k if v is True else str(v) for k, v in self.options.items()]
        label = " ".join([self.name, *values])
        return f"llmcompressor {label}" if self.peer else label

    def fits(self, kind: str) -> bool:
        return self.only is None or kind.startswith(self.only)


#: The three whose best is 1 in the tables.
BASELINES = [
    Choice(name, peer=True) for name in ("memoryless_minmax", "memoryless_mse", "imatrix_mse")
]
PEERS = [*BASELINES, Choice("nvfp4_expanded_imatrix", peer=True, only="NVFP4")]
OURS = [
    Choice("memoryless_minmax"),
    Choice("memoryless_mse"),
    Choice("imatrix_mse"),
    Choice("nvfp4_expanded_imatrix", only="NVFP4"),
    Choice("optimal", {"objective": "mse"}),
    Choice("optimal", {"objective": "imatrix"}),
    Choice("optimal", {"objective": "imatrix", "negative_scales": True}, only="int"),
    Choice("optimal", {"objective": "hessian"}),
    Choice("optimal", {"objective": "hessian", "negative_scales": True}, only="int"),
]
