"""The tensors of a checkpoint, taken one module at a time from a model that stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.offload import align_module_device, disable_onloading
from compressed_tensors.offload.cache import OffloadCache
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import is_module_quantized
from torch import Tensor, nn

from calipers.calibration.attention import STATES
from calipers.calibration.experts import separated_experts
from calipers.checkpoint.names import are_renamed
from calipers.errors import CheckpointError

__all__ = [
    "SavedPart",
    "checkpoint_bytes",
    "checkpoint_tensors",
    "has_broken_ties",
    "loading_dtype",
    "module_format",
    "quantized_modules",
    "saved_parts",
    "saved_state",
    "stored_weight",
    "without_shared_memory",
]


def quantized_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that carry a quantization scheme, by name; a module with two names appears once."""
    return {name: module for name, module in model.named_modules() if is_module_quantized(module)}


def checkpoint_tensors(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """State dict of the checkpoint: frozen quantized modules compressed, all others as they are.

    Weights that the model declares tied (an output head and its embedding), and that still are, are
    left out: loading ties them again. Tensors shared in any other way are stored under each name,
    since nothing would share them again.

    With the `loading_dtype`, tensors have it already where a loader would not cast to it.

    Returns:
        Contiguous tensors by full name, no two of them sharing memory. Those of quantized and of
        offloaded modules are on the CPU, others on their own device. Some are the model's own
        memory: do not write to them.

    Raises:
        CheckpointError: A module cannot be compressed, or holds a tensor without data.
    """
    if quantized_modules(model):
        with separated_experts(model, if_loaded_so=True):
            return _tensors(model, dtype if are_renamed(model) else None)
    return _tensors(model, None)


def _tensors(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for part in saved_parts(model):
        for key, value in saved_state(part, dtype).items():
            if key in part.tied:
                continue
            name = _join(part.prefix, key)
            if value.is_meta:
                raise CheckpointError(
                    f"{name} lies on the meta device and holds no data: load the model's weights, "
                    "or take accelerate's hooks off with compressed_tensors.offload.from_accelerate"
                )
            on_cpu = part.scheme is not None or part.offloaded
            tensors[name] = value.cpu() if on_cpu else value
    return without_shared_memory(tensors)


def checkpoint_bytes(model: nn.Module) -> int:
    """Bytes of the tensors of `checkpoint_tensors`, computed without compressing the whole model.

    Modules of equal shapes and equal scheme compress to equal sizes, so one of each kind is
    compressed.

    Raises:
        CheckpointError: A module cannot be compressed.
    """
    total = 0
    known: dict[object, int] = {}
    dtype = loading_dtype(model) if are_renamed(model) else None
    for part in saved_parts(model):
        with disable_onloading():
            stored = _stored(part.module)
            shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in stored.items()}
            if part.scheme is None:
                state = {k: v.to("meta") for k, v in stored.items() if k not in part.tied}
                total += _bytes(_in_dtype(part, state, dtype))
                continue
        kind = (type(part.module), part.scheme.model_dump_json(), tuple(sorted(shapes.items())))
        if kind not in known:
            known[kind] = _bytes(saved_state(part, dtype))
        total += known[kind]
    return total


def _bytes(state: dict[str, Tensor]) -> int:
    return sum(value.numel() * value.dtype.itemsize for value in state.values())


def has_broken_ties(model: nn.Module) -> bool:
    """Whether the model declares a tie that a checkpoint of it cannot keep.

    A tie breaks when one side is quantized, or when the two sides hold different tensors already. A
    loader that tied them again would overwrite one of them.
    """
    kept = {_join(part.prefix, key) for part in saved_parts(model) for key in part.tied}
    return not _declared_ties(model).keys() <= kept


def loading_dtype(model: nn.Module) -> torch.dtype | None:
    """The one dtype that a loader makes of the compressed weights, where it is not the model's own.

    compressed-tensors 0.19 decompresses FP4 and MX weights to bfloat16 whatever dtype the model is
    loaded in, so that a float32 or float16 model made from such a checkpoint fails in its first
    matmul. This asks the decompressor itself, one module per scheme. None where the weights come
    back in the dtype that they had.

    Raises:
        CheckpointError: A module cannot be compressed, or not be decompressed again.
    """
    asked: set[str] = set()
    for part in saved_parts(model):
        if part.scheme is None or part.scheme.weights is None:
            continue
        kind = f"{type(part.module).__name__} {part.scheme.model_dump_json()}"
        if kind in asked:
            continue
        asked.add(kind)
        weight = stored_weight(part.prefix, part.module)
        if weight.dtype != _local_state(part.module)["weight"].dtype:
            return weight.dtype
    return None


def stored_weight(name: str, module: nn.Module) -> Tensor:
    """The weight that a loader makes of what a checkpoint stores for a module.

    Args:
        name: The module's name in the model.
        module: A Linear or an Embedding, quantized and frozen or not.

    Raises:
        CheckpointError: It cannot be compressed, or not be decompressed again.
    """
    state = _local_state(module)
    if not is_module_quantized(module):
        return state["weight"]
    scheme = module.quantization_scheme
    compressed = _compress(name, state, scheme, type(module))
    try:
        weight: Tensor = _compressor(scheme, type(module)).decompress(compressed, scheme)["weight"]
    except Exception as error:
        raise CheckpointError(
            f"module {name} cannot be decompressed again: {type(error).__name__}: {error}"
        ) from error
    return weight


def saved_state(part: SavedPart, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """What a checkpoint stores of a module, tied tensors included.

    Args:
        part: The module.
        dtype: The `loading_dtype` of a model some of whose weights transformers renames, else None.

    Returns:
        By local name; some are the module's own memory.

    Raises:
        CheckpointError: The module cannot be compressed.
    """
    state = _local_state(part.module)
    if part.scheme is not None:
        state = _compress(part.prefix, state, part.scheme, type(part.module))
    return _in_dtype(part, state, dtype)


def _in_dtype(
    part: SavedPart, state: dict[str, Tensor], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The tensors of a module in the dtype that a loader does not cast to itself, if any.

    transformers does not cast the weights that it renames (of many multimodal models), and would
    then run layers of two dtypes on each other. Global scales and scales of a dtype of their own
    stay, as do the modules that transformers keeps in float32.
    """
    if dtype is None or part.stays_float32:
        return state
    with disable_onloading():
        dtypes = {t.dtype for t in _stored(part.module).values()}
    own = {each for each in dtypes if each.is_floating_point and each.itemsize > 1}
    fixed = set() if part.scheme is None else _scales_with_dtype(part.scheme)
    return {
        key: value
        if value.dtype not in own or key in fixed or key.endswith("global_scale")
        else value.to(dtype)
        for key, value in state.items()
    }


def _scales_with_dtype(scheme: QuantizationScheme) -> set[str]:
    all_args = {"weight": scheme.weights, "input": scheme.input_activations}
    all_args["output"] = scheme.output_activations
    all_args |= dict.fromkeys(STATES, scheme.input_activations)
    named = {name for name, args in all_args.items() if args is not None and args.scale_dtype}
    return {f"{name}_scale" for name in named}


@dataclass(frozen=True)
class SavedPart:
    """One module of the model, and what of it a checkpoint leaves out.

    Attributes:
        prefix: One of its names in the model.
        module: The module.
        scheme: Its scheme; None where it is not quantized.
        tied: Local names of tensors that loading will tie again.
        offloaded: Whether compressed-tensors keeps its tensors elsewhere.
        stays_float32: Whether transformers keeps it in float32 whatever the model's dtype.
    """

    prefix: str
    module: nn.Module
    scheme: QuantizationScheme | None
    tied: frozenset[str]
    offloaded: bool
    stays_float32: bool


def saved_parts(model: nn.Module) -> Iterator[SavedPart]:
    """Every module under each of its names, with the local keys that loading will tie again."""
    named = list(model.named_modules(remove_duplicate=False))
    plain = {
        _join(prefix, key): (module, key)
        for prefix, module in named
        if not is_module_quantized(module)
        for key in (*module._parameters, *module._buffers)
    }
    tied = {
        name
        for name, source in _declared_ties(model).items()
        if name in plain and source in plain and _equal(plain[name], plain[source])
    }
    float32 = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for prefix, module in named:
        keys = (*module._parameters, *module._buffers)
        yield SavedPart(
            prefix=prefix,
            module=module,
            scheme=module.quantization_scheme if is_module_quantized(module) else None,
            tied=frozenset(key for key in keys if _join(prefix, key) in tied),
            offloaded=isinstance(module._parameters, OffloadCache),
            stays_float32=bool(float32 & set(prefix.split("."))),
        )


def _equal(one: tuple[nn.Module, str], other: tuple[nn.Module, str]) -> bool:
    """Whether two tensors of a model are the same one, or, since offloading makes copies, equal."""
    a, b = (_local_state(module).get(key) for module, key in (one, other))
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta or b.is_meta:
        return getattr(*one) is getattr(*other)
    return a.data_ptr() == b.data_ptr() or bool(torch.equal(a, b.to(a.device)))


def _stored(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the module itself, under their local names."""
    named = {**dict(module._parameters.items()), **dict(module._buffers.items())}
    hidden = module._non_persistent_buffers_set
    return {key: t.data for key, t in named.items() if t is not None and key not in hidden}


def _local_state(module: nn.Module) -> dict[str, Tensor]:
    with align_module_device(module):
        return _stored(module)


def _compress(
    prefix: str, state: dict[str, Tensor], scheme: QuantizationScheme, kind: type[nn.Module]
) -> dict[str, Tensor]:
    try:
        with torch.no_grad():
            compressed: dict[str, Tensor] = _compressor(scheme, kind).compress(state, scheme)
    except Exception as error:
        raise CheckpointError(
            f"module {prefix} cannot be compressed: {type(error).__name__}: {error}"
        ) from error
    return compressed


def _compressor(scheme: QuantizationScheme, kind: type[nn.Module]) -> type[BaseCompressor]:
    name = module_format(kind, scheme).value
    compressor: type[BaseCompressor] = BaseCompressor.get_value_from_registry(name)
    return compressor


def module_format(kind: type[nn.Module], scheme: QuantizationScheme) -> CompressionFormat:
    """The compression format of a module: its scheme's, else the one that fits the scheme.

    compressed-tensors finds a format for Linear and Embedding themselves alone. A subclass is
    stored and loaded as they are, once its format is named.
    """
    plain = next((base for base in (nn.Linear, nn.Embedding) if issubclass(kind, base)), kind)
    return CompressionFormat(scheme.format or infer_module_format(plain, scheme))


def _declared_ties(model: nn.Module) -> dict[str, str]:
    """What transformers will tie after loading: {name: name it is tied to}."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def without_shared_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors made contiguous, each in memory of its own that holds no other one."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.contiguous()
        storage = value.untyped_storage()
        if value.numel() and (storage.data_ptr() in seen or storage.nbytes() > value.nbytes):
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        separate[name] = value
    return separate


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key
