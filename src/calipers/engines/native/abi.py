"""Handing tensors to the native library, in the form that its sources declare."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Container
from math import prod
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from calipers.engines.native import build
from calipers.engines.strides import MOST_DIMS, Dim, Strides
from calipers.formats import E4M3, Format, has_mx_scales, range_dtype
from calipers.grouping import Groups
from calipers.memory import UnreadableError, is_readable

__all__ = [
    "LANES",
    "STRUCTURES",
    "CodeTask",
    "CoupledTask",
    "GridReport",
    "GridSearch",
    "MinMax",
    "NativeFormat",
    "NativeStrides",
    "ProjectionTask",
    "SumTask",
    "SweepTask",
    "address",
    "knows",
    "library",
    "number_of_parts",
    "supports",
]

#: Groups, or splits of long ones, that are worked on at a time, at most.
LANES = 16
#: Groups up to this long are never split.
SHORT = 1024
#: Groups up to this long are not split where there are so many that all threads have enough to do.
LONGEST, MANY = 16384, 512
#: Values of a split (a run in the sources).
SPLIT = 1024
#: Less work (values times candidates) than this is done by the thread that asks for it.
WORTH_THREADS = 2**18

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ANY_SCALE, _FLOAT8_SCALE, _POWER_OF_TWO_SCALE = range(3)


def knows(*dtypes: torch.dtype) -> bool:
    """Whether the kernels read these dtypes."""
    return all(dtype in _TYPES for dtype in dtypes)


def supports(args: QuantizationArgs, *dtypes: torch.dtype) -> bool:
    """Whether the kernels know a number format, the way it makes scales, and values' dtypes."""
    if not knows(*dtypes):
        return False
    if Format.of(args).integer:
        whole = args.zp_dtype is not None and not args.zp_dtype.is_floating_point
        return args.scale_dtype is None and (bool(args.symmetric) or whole)
    known = args.scale_dtype in (None, torch.float8_e4m3fn) or has_mx_scales(args)
    return bool(args.symmetric) and known


_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def _fields(kind: type[Any], names: str) -> list[tuple[str, type[Any]]]:
    """Fields of one kind, by names between spaces, for a structure's `_fields_`."""
    return [(name, kind) for name in names.split()]


class _Dims(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int64),
        ("size", ctypes.c_int64 * MOST_DIMS),
        ("value", ctypes.c_int64 * MOST_DIMS),
        ("weight", ctypes.c_int64 * MOST_DIMS),
    )

    @classmethod
    def of(cls, dims: list[Dim]) -> _Dims:
        array = ctypes.c_int64 * MOST_DIMS
        return cls(
            len(dims),
            array(*(dim.size for dim in dims)),
            array(*(dim.value for dim in dims)),
            array(*(dim.importance for dim in dims)),
        )


class NativeStrides(ctypes.Structure):
    """`Box` of box.h: where groups lie, and the runs that long ones are split into."""

    _fields_ = (
        *_fields(_POINTER, "values weights columns"),
        *_fields(_INT, "lists value_type weight_type finite_only"),
        *_fields(_Dims, "kept reduced"),
        *_fields(_INT, "groups size runs run_length"),
    )

    @classmethod
    def of(cls, view: Groups, importance: Groups | None = None) -> NativeStrides:
        """The values of a view, which must outlive it, split where that is better.

        Raises:
            UnreadableError: Values, importance or columns that do not lie in memory as strides say.
        """
        strides = _checked_strides(view, importance)
        groups = prod(view.qparam_shape)
        size = prod(view.shape) // max(1, groups)
        whole = size <= SHORT or (size <= LONGEST and groups >= MANY)
        splits = 1 if whole else -(-size // SPLIT)
        native = cls(
            _start(strides.values, _TYPES),
            None if strides.importance is None else _start(strides.importance, _TYPES),
            address(strides.columns, torch.int64),
            1 if strides.columns is None else strides.columns.shape[0],
            _TYPES[strides.values.dtype],
            0 if strides.importance is None else _TYPES[strides.importance.dtype],
            view.finite_only,
            _Dims.of(strides.kept),
            _Dims.of(strides.reduced),
            groups,
            size,
            splits,
            size if whole else SPLIT,
        )
        native.keeps = strides  # what the addresses point to
        return native

    @property
    def blocks(self) -> int:
        """Number of times that `LANES` groups or splits are worked on."""
        return int(-(-self.groups * self.runs // LANES))


class NativeFormat(ctypes.Structure):
    """`Format` of format.h."""

    _fields_ = (
        *_fields(_INT, "integer symmetric scale_type is_global mx_offset"),
        *_fields(_FLOAT, "lowest highest half_range global_scale scale_limit scale_eps shift"),
        *_fields(_INT, "smallest range_type"),
    )

    @classmethod
    def of(
        cls,
        args: QuantizationArgs,
        global_scale: Tensor | None,
        dtype: torch.dtype = torch.float32,
    ) -> NativeFormat:
        """The format of arguments that the kernels support, for values of a dtype."""
        codes = Format.of(args)
        scale_type, limit = _ANY_SCALE, 0.0
        eps = torch.finfo(args.scale_dtype or torch.float32).eps if not has_mx_scales(args) else 0.0
        if args.scale_dtype == torch.float8_e4m3fn:
            scale_type, limit = _FLOAT8_SCALE, E4M3.high
        elif has_mx_scales(args):
            scale_type = _POWER_OF_TWO_SCALE
        return cls(
            codes.integer,
            bool(args.symmetric),
            scale_type,
            global_scale is not None,
            codes.mx_offset,
            codes.low,
            codes.high,
            codes.width / 2,
            1.0 if global_scale is None else float(global_scale),
            limit,
            eps,
            codes.shift,
            codes.smallest_bits,
            _TYPES[range_dtype(args, dtype)],
        )


class MinMax(ctypes.Structure):
    """`MinMax` of min_max.h."""

    _fields_ = (("box", NativeStrides), *_fields(_POINTER, "low high"))


class GridSearch(ctypes.Structure):
    """`GridSearch` of grid.h."""

    _fields_ = (
        ("box", NativeStrides),
        ("format", NativeFormat),
        *_fields(_POINTER, "low high units factors"),
        ("steps", _INT),
        *_fields(_FLOAT, "norm expand clip_steps"),
        ("squares_first", _INT),
        *_fields(_FLOAT, "doubt noise"),
        *_fields(_POINTER, "known_errors errors best_low best_high doubtful"),
    )


class GridReport(ctypes.Structure):
    """`GridReport` of grid.h."""

    _fields_ = (("gains", _POINTER), ("evaluated", _INT))


class SumTask(ctypes.Structure):
    """`SumTask` of sums.h."""

    _fields_ = (
        ("box", NativeStrides),
        ("format", NativeFormat),
        *_fields(_POINTER, "inverse_base ratios zeros"),
        ("count", _INT),
        ("sums", _POINTER),
    )


class ProjectionTask(ctypes.Structure):
    """`ProjectionTask` of optimal.h."""

    _fields_ = (
        ("box", NativeStrides),
        ("format", NativeFormat),
        *_fields(_POINTER, "inverse_base zeros ratios offsets"),
        ("count", _INT),
        ("factors", _POINTER),
        *_fields(_INT, "fine_count rounds residual"),
        *_fields(_POINTER, "best_ratio best_zero"),
    )


class CodeTask(ctypes.Structure):
    """`CodeTask` of optimal.h."""

    _fields_ = (
        ("box", NativeStrides),
        ("format", NativeFormat),
        ("scales", _POINTER),
        ("count", _INT),
        ("covering", _POINTER),
        *_fields(_INT, "above start"),
        ("best", _POINTER),
    )


class CoupledTask(ctypes.Structure):
    """`CoupledTask` of hessian.h."""

    _fields_ = (
        ("format", NativeFormat),
        *_fields(_POINTER, "values products slopes matrix factors scales zeros"),
        *_fields(_INT, "blocks rows width rank rows_of_group count"),
        *_fields(_POINTER, "shares sums"),
    )


class SweepTask(ctypes.Structure):
    """`SweepTask` of sweeps.h."""

    _fields_ = (
        ("format", NativeFormat),
        *_fields(_POINTER, "values matrix factors matrix_panels factor_panels back_panels"),
        *_fields(_POINTER, "start start_zeros plain plain_zeros"),
        *_fields(_POINTER, "candidates candidate_zeros fresh"),
        *_fields(_INT, "rows groups blocks width rank count"),
        *_fields(_POINTER, "scales zeros products applied of_values shares totals own limits"),
    )


def address(
    tensor: Tensor | None, dtype: torch.dtype = torch.float32, count: int | None = None
) -> int | None:
    """Where the elements of a tensor begin that a kernel goes through one after the other.

    Args:
        tensor: What the kernel reads or writes; None gives None.
        dtype: As which it does.
        count: How many elements there must be; None for a tensor that was made for the call.

    Raises:
        UnreadableError: The elements do not lie in the memory of the CPU.
        TypeError: Another dtype or number, or gaps between elements.
    """
    if tensor is None:
        return None
    start = _start(tensor, (dtype,))
    if not tensor.is_contiguous() or count not in (None, tensor.numel()):
        raise TypeError(
            f"expected {'some' if count is None else count} {dtype} without gaps, got "
            f"{tensor.numel()} {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    return start


def _start(tensor: Tensor, dtypes: Container[torch.dtype]) -> int:
    """The address of the first element of a tensor of any strides: no other code asks for it.

    Raises:
        UnreadableError: The elements do not lie in the memory of the CPU, as strides say.
        TypeError: Another dtype than the kernel reads.
    """
    if tensor.device.type != "cpu" or not is_readable(tensor):
        raise UnreadableError(
            f"a {type(tensor).__name__} on {tensor.device} cannot be read where it lies"
        )
    if tensor.dtype not in dtypes:
        raise TypeError(f"a kernel does not read {tensor.dtype} here")
    return tensor.data_ptr()


def _checked_strides(view: Groups, importance: Groups | None) -> Strides:
    """Where the values of a view lie; their importance and columns must fit them."""
    if importance is not None and importance.values.shape != view.values.shape:
        raise UnreadableError("importance must have the shape of the values")
    columns = view.columns
    if columns is not None and columns.numel():
        lowest, highest = torch.aminmax(columns)
        if lowest < 0 or highest >= view.values.shape[-1]:
            raise UnreadableError("columns beyond the values")
    return Strides.of(view, importance)


def number_of_parts(blocks: int, work: int) -> int:
    """Number of parts to cut blocks into: one for each of torch's threads, if that pays.

    Args:
        blocks: How many there are.
        work: Number of values times candidates.
    """
    return max(1, min(torch.get_num_threads(), blocks)) if work >= WORTH_THREADS else 1


#: Structures of the same name in the sources; two have a prefix here.
STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "Box": NativeStrides,
    "Format": NativeFormat,
    "MinMax": MinMax,
    "GridSearch": GridSearch,
    "GridReport": GridReport,
    "SumTask": SumTask,
    "ProjectionTask": ProjectionTask,
    "CodeTask": CodeTask,
    "CoupledTask": CoupledTask,
    "SweepTask": SweepTask,
}


def library() -> ctypes.CDLL:
    """The library, whose structures are as large as those of this file.

    Raises:
        BuildError: It cannot be built or loaded, or a structure is of another size.
    """
    found = build.library()
    _compare_sizes(found)
    return found


@functools.lru_cache(maxsize=1)
def _compare_sizes(library: ctypes.CDLL) -> None:
    for name, structure in STRUCTURES.items():
        size_of = getattr(library, f"size_of_{name}")
        size_of.restype = ctypes.c_int64
        if size_of() != ctypes.sizeof(structure):
            raise build.BuildError(
                f"structure {name} has {size_of()} bytes in C++ and "
                f"{ctypes.sizeof(structure)} in Python"
            )
