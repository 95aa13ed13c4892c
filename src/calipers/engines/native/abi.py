"""Handing tensors to the native library, in the form that its sources declare."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Container
from math import prod

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
    "NativeBox",
    "NativeFormat",
    "ProjectionTask",
    "SumTask",
    "address",
    "knows",
    "library",
    "number_of_parts",
    "supports",
]

#: Groups, or runs of the values of long ones, that are worked on at a time, at most.
LANES = 16
#: Groups up to this long are never cut into runs.
SHORT = 1024
#: Groups up to this long are not cut where there are so many that all threads have enough to do.
LONGEST, MANY = 16384, 512
#: Values of a run.
RUN = 1024
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
            array(*(dim.weight for dim in dims)),
        )


class NativeBox(ctypes.Structure):
    """`Box` of box.h."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("lists", ctypes.c_int64),
        ("value_type", ctypes.c_int64),
        ("weight_type", ctypes.c_int64),
        ("finite_only", ctypes.c_int64),
        ("kept", _Dims),
        ("reduced", _Dims),
        ("groups", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("runs", ctypes.c_int64),
        ("run_length", ctypes.c_int64),
    )

    @classmethod
    def of(cls, view: Groups, importance: Groups | None = None) -> NativeBox:
        """The values of a view, which must outlive it, cut into runs where that is better.

        Raises:
            UnreadableError: Values, weights or columns that do not lie in memory as strides say.
        """
        box = _checked_box(view, importance)
        groups = prod(view.qparam_shape)
        size = prod(view.shape) // max(1, groups)
        whole = size <= SHORT or (size <= LONGEST and groups >= MANY)
        runs = 1 if whole else -(-size // RUN)
        native = cls(
            _start(box.values, _TYPES),
            None if box.weights is None else _start(box.weights, _TYPES),
            address(box.columns, torch.int64),
            1 if box.columns is None else box.columns.shape[0],
            _TYPES[box.values.dtype],
            0 if box.weights is None else _TYPES[box.weights.dtype],
            view.finite_only,
            _Dims.of(box.kept),
            _Dims.of(box.reduced),
            groups,
            size,
            runs,
            size if whole else RUN,
        )
        native.keeps = box  # what the addresses point to
        return native

    @property
    def blocks(self) -> int:
        """Number of blocks of `LANES` units."""
        return int(-(-self.groups * self.runs // LANES))


class NativeFormat(ctypes.Structure):
    """`Format` of format.h."""

    _fields_ = (
        ("integer", ctypes.c_int64),
        ("symmetric", ctypes.c_int64),
        ("scale_type", ctypes.c_int64),
        ("is_global", ctypes.c_int64),
        ("mx_offset", ctypes.c_int64),
        ("lowest", ctypes.c_float),
        ("highest", ctypes.c_float),
        ("half_range", ctypes.c_float),
        ("global_scale", ctypes.c_float),
        ("scale_limit", ctypes.c_float),
        ("scale_eps", ctypes.c_float),
        ("shift", ctypes.c_float),
        ("smallest", ctypes.c_int64),
        ("range_type", ctypes.c_int64),
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

    _fields_ = (("box", NativeBox), ("low", ctypes.c_void_p), ("high", ctypes.c_void_p))


class GridSearch(ctypes.Structure):
    """`GridSearch` of grid.h."""

    _fields_ = (
        ("box", NativeBox),
        ("format", NativeFormat),
        ("low", ctypes.c_void_p),
        ("high", ctypes.c_void_p),
        ("units", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
        ("steps", ctypes.c_int64),
        ("norm", ctypes.c_float),
        ("expand", ctypes.c_float),
        ("clip_steps", ctypes.c_float),
        ("squares_first", ctypes.c_int64),
        ("doubt", ctypes.c_float),
        ("noise", ctypes.c_float),
        ("known_errors", ctypes.c_void_p),
        ("errors", ctypes.c_void_p),
        ("best_low", ctypes.c_void_p),
        ("best_high", ctypes.c_void_p),
        ("doubtful", ctypes.c_void_p),
    )


class GridReport(ctypes.Structure):
    """`GridReport` of grid.h."""

    _fields_ = (("gains", ctypes.c_void_p), ("evaluated", ctypes.c_int64))


class SumTask(ctypes.Structure):
    """`SumTask` of sums.h."""

    _fields_ = (
        ("box", NativeBox),
        ("format", NativeFormat),
        ("inverse_base", ctypes.c_void_p),
        ("ratios", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("sums", ctypes.c_void_p),
    )


class ProjectionTask(ctypes.Structure):
    """`ProjectionTask` of optimal.h."""

    _fields_ = (
        ("box", NativeBox),
        ("format", NativeFormat),
        ("inverse_base", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("ratios", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("factors", ctypes.c_void_p),
        ("fine_count", ctypes.c_int64),
        ("rounds", ctypes.c_int64),
        ("residual", ctypes.c_int64),
        ("best_ratio", ctypes.c_void_p),
        ("best_zero", ctypes.c_void_p),
    )


class CodeTask(ctypes.Structure):
    """`CodeTask` of optimal.h."""

    _fields_ = (
        ("box", NativeBox),
        ("format", NativeFormat),
        ("scales", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("covering", ctypes.c_void_p),
        ("above", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("best", ctypes.c_void_p),
    )


class CoupledTask(ctypes.Structure):
    """`CoupledTask` of hessian.h."""

    _fields_ = (
        ("format", NativeFormat),
        ("values", ctypes.c_void_p),
        ("products", ctypes.c_void_p),
        ("slopes", ctypes.c_void_p),
        ("matrix", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("blocks", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("rows_of_group", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("shares", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
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


def _checked_box(view: Groups, importance: Groups | None) -> Strides:
    """The box of a view, whose weights and columns fit its values."""
    if importance is not None and importance.values.shape != view.values.shape:
        raise UnreadableError("weights must have the shape of the values")
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
    "Box": NativeBox,
    "Format": NativeFormat,
    "MinMax": MinMax,
    "GridSearch": GridSearch,
    "GridReport": GridReport,
    "SumTask": SumTask,
    "ProjectionTask": ProjectionTask,
    "CodeTask": CodeTask,
    "CoupledTask": CoupledTask,
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
