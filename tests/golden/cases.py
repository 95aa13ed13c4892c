"""The cases of the golden scales: fixed inputs, and what every observer makes of them.

A case is a name and a function that gives tensors by name (scale, zero_point, global_scale, ...).
Only what users may call is used here, so that code can be moved without an edit of this file. Names
of cases are keys of the recorded file: a renamed option or observer keeps its label here.

Dtypes take turns: each observer sees each strategy and each number format in each dtype. The native
engine runs all cases; the eager engine, which takes several times as long, every other one of the
large product of observers, strategies and formats, so that each pair of the three is there.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from calipers import calibrate
from calipers.observers import Observer

__all__ = ["CASES", "ENGINES", "Case", "Results"]

ENGINES = ("eager", "native")
Results = dict[str, Tensor]
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """Its name, and a function that computes the scales.

    `engines`: values of CALIPERS_ENGINE that it is run under.
    """

    name: str
    run: Callable[[], Results]
    engines: tuple[str, ...] = ENGINES

    def __str__(self) -> str:
        return self.name


#: Label, name in the registry, options.
OBSERVERS: dict[str, tuple[str, Options]] = {
    "memoryless_minmax": ("memoryless_minmax", {}),
    "static_minmax": ("static_minmax", {}),
    "minmax": ("minmax", {"averaging_constant": 0.3}),
    "histogram": ("histogram", {}),
    "histogram-percentile": ("histogram", {"method": "percentile", "percentile": 99}),
    "histogram-minmax": ("histogram", {"method": "minmax"}),
    "memoryless_mse": ("memoryless_mse", {}),
    "mse": ("mse", {"averaging_constant": 0.3}),
    "nvfp4_expanded_mse": ("nvfp4_expanded_mse", {}),
    "imatrix_mse": ("imatrix_mse", {}),
    "nvfp4_expanded_imatrix": ("nvfp4_expanded_imatrix", {}),
    "optimal-mse": ("optimal", {"objective": "mse"}),
    "optimal-imatrix": ("optimal", {"objective": "imatrix"}),
    "optimal-hessian": ("optimal", {"objective": "hessian"}),
    "optimal-mse-signed": ("optimal", {"objective": "mse", "negative_scales": True}),
    "optimal-imatrix-signed": ("optimal", {"objective": "imatrix", "negative_scales": True}),
    "optimal-hessian-signed": ("optimal", {"objective": "hessian", "negative_scales": True}),
    "nvfp4_headroom": ("nvfp4_headroom", {}),
}
SIGNED = [label for label in OBSERVERS if label.endswith("-signed")]
#: They look at inputs, which an activation has not.
OF_WEIGHTS = [*SIGNED, "imatrix_mse", "nvfp4_expanded_imatrix", "optimal-imatrix"]
OF_WEIGHTS += ["optimal-hessian"]
OF_ACTIVATIONS = [label for label in OBSERVERS if label not in OF_WEIGHTS]

FORMATS: dict[str, Options] = {
    "int8": {"num_bits": 8},
    "int8-asym": {"num_bits": 8, "symmetric": False},
    "int4": {"num_bits": 4},
    "int4-asym": {"num_bits": 4, "symmetric": False},
    "int3": {"num_bits": 3},
    "int3-asym": {"num_bits": 3, "symmetric": False},
    "fp8": {"num_bits": 8, "type": "float"},
}
COLS = 256
GROUPS: dict[str, Options] = {
    "tensor": {"strategy": "tensor"},
    "channel": {"strategy": "channel"},
    "group": {"strategy": "group", "group_size": 64},
    "group-short": {"strategy": "group", "group_size": 96},
    "group-g_idx": {"strategy": "group", "group_size": 64},
    "group-unequal": {"strategy": "group", "group_size": 64},
    "block": {"strategy": "block", "block_structure": [5, 96]},
    "group-experts": {"strategy": "group", "group_size": 64},
    "block-experts": {"strategy": "block", "block_structure": [5, 96]},
}
NVFP4: Options = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": torch.float8_e4m3fn,
    "zp_dtype": torch.float8_e4m3fn,
}
MX: Options = {
    "type": "float",
    "strategy": "group",
    "group_size": 32,
    "scale_dtype": torch.uint8,
    "zp_dtype": torch.uint8,
}
#: Formats that come with a strategy of their own.
WHOLE: dict[str, Options] = {
    "nvfp4": NVFP4,
    "nvfp4-given": NVFP4,
    "nvfp4-short": NVFP4,
    "nvfp4-g_idx": NVFP4,
    "mxfp4": {**MX, "num_bits": 4},
    "mxfp8": {**MX, "num_bits": 8},
    "fp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
    "int4-fp16-scale": {**GROUPS["group"], "num_bits": 4, "scale_dtype": torch.float16},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# -- inputs ------------------------------------------------------------------------------------


@functools.cache
def values(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Normal values with outliers, float64, on a lattice of 2^-16.

    On the lattice, since the logarithms behind normal values differ in the last bit from machine to
    machine.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    value = torch.randn(shape, generator=generator, dtype=torch.float64)
    outlier = torch.rand(shape, generator=generator, dtype=torch.float64) < 0.02
    value = torch.where(outlier, value * 3, value).clamp(-8, 8)
    return (value * 2**16).round() / 2**16


def weight(rows: int = 12, cols: int = COLS, experts: int = 0, seed: int = 1) -> Tensor:
    """Rows of different sizes, every third off zero, shape (experts, rows, cols), float64."""
    shape = (experts, rows, cols) if experts else (rows, cols)
    row = torch.arange(rows, dtype=torch.float64)
    sizes = (1 + row % 5) / 64
    shift = (row % 3 == 2) * 2.0
    return (values(shape, seed) + shift[:, None]) * sizes[:, None]


def inputs(cols: int = COLS, seed: int = 10) -> list[Tensor]:
    """Three batches of inputs (2, 8, cols): columns of different sizes that go together."""
    batches = [values((2, 8, cols), seed + i) for i in range(3)]
    sizes = 0.5 + torch.arange(cols, dtype=torch.float64) % 7 / 4
    return [(batch + 0.5 * batch.roll(1, -1)) * sizes for batch in batches]


def batches(shape: tuple[int, ...], seed: int = 20) -> list[Tensor]:
    """Three batches, the second with the largest values, all of them a bit off zero."""
    return [
        (values(shape, seed + i) + 0.25) * factor for i, factor in enumerate((1.0, 1.75, 0.625))
    ]


def token_masks() -> list[Tensor]:
    """Of three batches of (2, 8) tokens: padding at the end, none, holes."""
    masks = torch.ones(3, 2, 8, dtype=torch.int64)
    masks[0, 1, 5:] = 0
    masks[2, :, ::3] = 0
    return list(masks)


def columns_in_any_order(cols: int = COLS, group_size: int = 64) -> Tensor:
    """Groups of one size, in an order as by activation (`g_idx`)."""
    return torch.arange(cols) * 37 % cols // group_size


def unequal_groups() -> Tensor:
    """Groups of 100, 28, 64 and 64 columns, in no order."""
    sizes = torch.repeat_interleave(torch.arange(4), torch.tensor([100, 28, 64, 64]))
    return sizes[torch.arange(COLS) * 37 % COLS]


# -- running an observer -----------------------------------------------------------------------


def module_with(**buffers: Tensor) -> nn.Module:
    module = nn.Module()
    for name, value in buffers.items():
        module.register_buffer(name, value)
    return module


def build(label: str, base_name: str, options: Options, module: nn.Module, **more: Any) -> Observer:
    name, own = OBSERVERS[label]
    args = QuantizationArgs(**options)
    return Observer.load_from_registry(name, base_name, args, module, **{**own, **more})


def show_inputs(observer: Observer, dtype: torch.dtype, seen: Sequence[Tensor]) -> None:
    if observer.needs_data:
        for batch in seen:
            observer.observe_input(batch.to(dtype))


def qparams(observer: Observer, **given: Any) -> Results:
    scale, zero_point = observer.get_qparams(**given)
    assert scale is not None
    assert zero_point is not None
    return {"scale": scale, "zero_point": zero_point}


def of_weight(
    label: str, kind: str, options: Options, dtype: torch.dtype, value: Tensor | None = None
) -> Results:
    """Scales of a weight, by an observer that has seen its inputs where it wants to."""
    # 65536 counts for each scale
    rows = 4 if label.startswith("histogram") else 12
    cols = COLS - 8 if kind == "nvfp4-short" else COLS
    if value is None:
        value = weight(rows, cols, experts=2 if kind.endswith("experts") else 0)
    else:
        value = value[:rows]
    value = value.to(dtype)
    module = module_with()
    if kind == "group-unequal":
        module.register_buffer("weight_g_idx", unequal_groups())
    elif kind.endswith("g_idx"):
        g_idx = columns_in_any_order(cols, options["group_size"])
        module.register_buffer("weight_g_idx", g_idx)
    observer = build(label, "weight", options, module)
    seen = dtype if dtype.is_floating_point else torch.float32
    show_inputs(observer, seen, inputs(cols))
    if options["strategy"] != "tensor_group":
        observer.observe(value)
        return qparams(observer)
    if kind == "nvfp4-given":
        given = torch.tensor([1000.0])
        return {**qparams(observer, observed=value, global_scale=given)}
    global_scale = observer.get_global_scale(value)
    assert global_scale is not None
    module.register_buffer("weight_global_scale", global_scale)
    observer.observe(value)
    return {"global_scale": global_scale, **qparams(observer)}


def of_batches(
    label: str,
    base_name: str,
    options: Options,
    given: Sequence[Tensor],
    masks: Sequence[Tensor | None] = (None, None, None),
    via: str = "",
) -> Results:
    """Scales after three batches of an activation.

    `via` "merge": a second observer sees the last batch and is merged; "state": what the first two
    batches left goes through `state` and `load_state`.
    """
    module, found = module_with(), {}
    if options["strategy"] == "tensor_group":
        scout = build(label, base_name, options, module)
        for batch, mask in zip(given, masks, strict=True):
            scout.observe_global(batch, mask)
        scale = scout.get_global_scale()
        assert scale is not None
        found["global_scale"] = scale
        module.register_buffer(f"{base_name}_global_scale", scale)
    observer = build(label, base_name, options, module)
    for batch, mask in zip(given[:2], masks[:2], strict=True):
        observer.observe(batch, mask=mask)
    if via == "merge":
        other = build(label, base_name, options, module)
        other.observe(given[2], mask=masks[2])
        observer.merge(other)
        return {**found, **qparams(observer)}
    if via == "state":
        state, observer = observer.state(), build(label, base_name, options, module)
        observer.load_state(state)
    observer.observe(given[2], mask=masks[2])
    return {**found, **qparams(observer)}


# -- cases -------------------------------------------------------------------------------------


def weights() -> Iterator[Case]:
    """Every observer x strategy x format of weights."""
    for (i, label), (j, kind), (k, fmt) in itertools.product(
        enumerate(OBSERVERS), enumerate(GROUPS), enumerate(FORMATS)
    ):
        options = {**FORMATS[fmt], **GROUPS[kind]}
        if label in SIGNED and fmt not in ("int8", "int4", "int3"):
            continue
        if kind.endswith("experts") and fmt not in ("int4", "int8-asym", "fp8"):
            continue
        if kind == "group-unequal" and label.startswith("optimal-hessian"):
            continue  # takes no group of more than group_size columns
        dtype = list(DTYPES)[(i + j + k) % 3]
        run = functools.partial(of_weight, label, kind, options, DTYPES[dtype])
        both = (i + j + k) % 2 == 0
        if label.startswith("nvfp4"):  # hundreds of candidates: as NVFP4 below
            both = both and fmt.startswith("int4")
        engines = ENGINES if both else ("native",)
        yield Case(f"weight/{label}/{kind}/{fmt}/{dtype}", run, engines)


def whole_formats() -> Iterator[Case]:
    """NVFP4, MX and others that come with their strategy."""
    for (i, label), (j, kind), (k, dtype) in itertools.product(
        enumerate(OBSERVERS), enumerate(WHOLE), enumerate(DTYPES)
    ):
        options = WHOLE[kind]
        if label in SIGNED and options.get("type") == "float":
            continue
        if kind not in ("nvfp4", "mxfp4") and (i + j + k) % 3:
            continue
        run = functools.partial(of_weight, label, kind, options, DTYPES[dtype])
        yield Case(f"weight/{label}/{kind}/{dtype}", run)


def odd_weights() -> Iterator[Case]:
    """NaN and Inf, groups of zeros, integers, float64, values at both ends of float32."""
    plain = weight()
    holes, zeros, spoilt = plain.clone(), plain.clone(), plain.clone()
    spoilt.view(-1)[::17] = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(100)[:181]
    zeros[1:3, :128] = 0
    holes[:, ::3] = 0
    odd = {
        "nonfinite": (spoilt, torch.float32),
        "zero-groups": (zeros, torch.bfloat16),
        "many-zeros": (holes, torch.float16),
        "integers": ((plain * 64).round().clamp(-128, 127), torch.int8),
        "float64": (plain, torch.float64),
        "huge": (plain * 2.0**100, torch.float32),
        "tiny": (plain * 2.0**-120, torch.float32),
        "beyond-float32": (plain * 2.0**200, torch.float64),
    }
    for label, (what, (value, dtype)), fmt in itertools.product(
        OBSERVERS, odd.items(), ("int4", "int4-asym")
    ):
        if label in SIGNED and fmt != "int4":
            continue
        if fmt != "int4" and what not in ("nonfinite", "zero-groups", "huge"):
            continue
        options = {**FORMATS[fmt], **GROUPS["group"]}
        run = functools.partial(of_weight, label, "group", options, dtype, value)
        yield Case(f"odd/{label}/{what}/{fmt}", run)


def steps() -> Iterator[Case]:
    """Options of the grid and of averages other than the default ones."""
    options = {**FORMATS["int4-asym"], **GROUPS["group"]}
    grids = {
        "norm-2": {"norm": 2.0},
        "norm-1": {"norm": 1.0},
        "norm-0.7": {"norm": 0.7},
        "coarse": {"grid": 10.0, "maxshrink": 0.8},
        "no-patience": {"patience": 0, "maxshrink": 0.5},
        "patience-1": {"patience": 1},
        "expand": {"expand": 1.3},
    }
    for label, (what, more) in itertools.product(("memoryless_mse", "imatrix_mse"), grids.items()):

        def run(label: str = label, more: Options = more) -> Results:
            observer = build(label, "weight", options, module := module_with(), **more)
            show_inputs(observer, torch.float32, inputs())
            observer.observe(weight().float())
            del module
            return qparams(observer)

        yield Case(f"steps/{label}/{what}", run)


ACTIVATIONS = {
    "tensor": {"strategy": "tensor"},
    "group": {"strategy": "group", "group_size": 64},
    "token": {"strategy": "token", "dynamic": True},
}
ATTENTION = {"tensor": {"strategy": "tensor"}, "attn_head": {"strategy": "attn_head"}}


def activations() -> Iterator[Case]:
    """Inputs, outputs and attention states over three batches."""
    formats = ("int8", "int8-asym", "fp8", "int4", "int4-asym")
    for (i, label), (j, kind), (k, fmt) in itertools.product(
        enumerate(OF_ACTIVATIONS), enumerate(ACTIVATIONS), enumerate(formats)
    ):
        dtype = list(DTYPES)[(i + j + k) % 3]
        given = [batch.to(DTYPES[dtype]) for batch in batches((2, 8, COLS))]
        options = {**FORMATS[fmt], **ACTIVATIONS[kind]}
        for base_name in ("input", "output") if kind == "tensor" else ("input",):
            run = functools.partial(of_batches, label, base_name, options, given)
            engines = ENGINES if base_name == "input" else ("native",)
            yield Case(f"{base_name}/{label}/{kind}/{fmt}/{dtype}", run, engines)
    for (i, label), (j, kind), (k, fmt), (n, base_name) in itertools.product(
        enumerate(OF_ACTIVATIONS), enumerate(ATTENTION), enumerate(formats[:3]), enumerate("qkv")
    ):
        dtype = list(DTYPES)[(i + j + k) % 3]
        given = [batch.to(DTYPES[dtype]) for batch in batches((2, 4, 8, 32), 30 + 10 * n)]
        options = {**FORMATS[fmt], **ATTENTION[kind]}
        run = functools.partial(of_batches, label, base_name, options, given)
        engines = ENGINES if (i + j + k + n) % 2 == 0 else ("native",)
        yield Case(f"{base_name}/{label}/{kind}/{fmt}/{dtype}", run, engines)
    for label, fmt, dtype in itertools.product(
        OF_ACTIVATIONS, ("nvfp4", "mxfp4", "mxfp8"), ("fp32", "bf16")
    ):
        given = [batch.to(DTYPES[dtype]) for batch in batches((2, 8, COLS))]
        run = functools.partial(of_batches, label, "input", WHOLE[fmt], given)
        yield Case(f"input/{label}/{fmt}/{dtype}", run)


def ways() -> Iterator[Case]:
    """Masks, two observers merged, and statistics through `state` and `load_state`."""
    kinds = {
        "tensor": ("input", {**FORMATS["int8-asym"], **ACTIVATIONS["tensor"]}, (2, 8, COLS)),
        "group": ("input", {**FORMATS["int4"], **ACTIVATIONS["group"]}, (2, 8, COLS)),
        "token": ("input", {**FORMATS["int8"], **ACTIVATIONS["token"]}, (2, 8, COLS)),
        "attn_head": ("k", {**FORMATS["fp8"], **ATTENTION["attn_head"]}, (2, 4, 8, 32)),
        "nvfp4": ("input", NVFP4, (2, 8, COLS)),
    }
    for label, (kind, (base_name, options, shape)) in itertools.product(
        OF_ACTIVATIONS, kinds.items()
    ):
        given = [batch.float() for batch in batches(shape)]
        for way, masks, via in (
            ("mask", token_masks(), ""),
            ("merge", [None] * 3, "merge"),
            ("state", [None] * 3, "state"),
            ("mask-merge", token_masks(), "merge"),
        ):
            run = functools.partial(of_batches, label, base_name, options, given, masks, via)
            engines = ENGINES if way in ("state", "mask-merge") else ("native",)
            yield Case(f"{way}/{label}/{kind}", run, engines)
    of_inputs = ["imatrix_mse", "nvfp4_expanded_imatrix", "optimal-imatrix", "optimal-hessian"]
    for label, way in itertools.product(of_inputs, ("mask", "merge", "state", "attach")):
        run = functools.partial(of_seen_inputs, label, way)
        yield Case(f"{way}/{label}/inputs", run)


def of_seen_inputs(label: str, way: str) -> Results:
    """Scales of a weight whose observer got its inputs in another way."""
    options = {**FORMATS["int4"], **GROUPS["group"]}
    module = nn.Linear(COLS, 12, bias=False)
    observer = build(label, "weight", options, module)
    seen = [batch.float() for batch in inputs()]
    if way == "attach":
        observer.attach(module)
        for batch in seen:
            module(batch)
        observer.detach(module)
    elif way == "mask":
        for batch, mask in zip(seen, token_masks(), strict=True):
            observer.observe_input(batch, mask)
    else:
        other = build(label, "weight", options, module)
        for batch in seen[:2]:
            observer.observe_input(batch)
        if way == "merge":
            other.observe_input(seen[2])
            observer.merge(other)
        else:
            other.load_state(observer.state())
            observer = other
            observer.observe_input(seen[2])
    observer.observe(weight().float())
    return qparams(observer)


class _FirstForm(Observer):
    def calculate_qparams(
        self, observed: Tensor, reduce_dims: Any = None, tensor_id: Any = None
    ) -> tuple[Tensor, Tensor]:
        dims = tuple(range(observed.dim())) if reduce_dims is None else reduce_dims
        scale = observed.abs().amax(dims, keepdim=reduce_dims is not None) / 7
        scale = scale.reshape(1) if reduce_dims is None else scale
        return scale, torch.zeros_like(scale, dtype=self.args.zp_dtype)


class _SecondForm(Observer):
    def get_min_max(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        dims = (0, -1)
        return observed.amin(dims) * 0.75, observed.amax(dims) * 0.75


def own_observers() -> Iterator[Case]:
    """Observers as users write them, of both forms."""
    forms = {"calculate_qparams": _FirstForm, "get_min_max": _SecondForm}
    for (form, cls), kind in itertools.product(forms.items(), GROUPS):
        if cls is _FirstForm and kind.endswith("experts"):
            continue

        def run(cls: type[Observer] = cls, kind: str = kind) -> Results:
            value = weight(experts=2 if kind.endswith("experts") else 0).float()
            g_idx = unequal_groups() if kind == "group-unequal" else None
            g_idx = columns_in_any_order() if kind == "group-g_idx" else g_idx
            observer = cls("weight", QuantizationArgs(**FORMATS["int4"], **GROUPS[kind]))
            observer.observe(value, g_idx)
            return qparams(observer)

        yield Case(f"own/{form}/{kind}", run)
        if kind != "tensor":
            continue
        for strategy, base_name in (("token", "input"), ("attn_head", "k"), ("tensor", "q")):

            def run_on_states(
                cls: type[Observer] = cls, strategy: str = strategy, base_name: str = base_name
            ) -> Results:
                dynamic = {"dynamic": True} if strategy == "token" else {}
                args = QuantizationArgs(num_bits=8, strategy=strategy, **dynamic)
                observer = cls(base_name, args)
                shape = (2, 8, COLS) if base_name == "input" else (2, 4, 8, 32)
                observer.observe(batches(shape)[0].float())
                return qparams(observer)

            yield Case(f"own/{form}/{base_name}-{strategy}", run_on_states)


# -- models ------------------------------------------------------------------------------------

QPARAMS = ("scale", "zero_point", "global_scale")


def model() -> LlamaForCausalLM:
    """A Llama of one layer, 32 wide, whose siblings q, k, v and gate, up differ in size."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    llama = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(llama.named_parameters()):
            if parameter.dim() == 2:
                size = 2.0 if "embed" in name else 0.125 * (1 + i % 4)
                parameter.copy_(values(tuple(parameter.shape), 60 + i) * size)
    return llama


def text() -> list[dict[str, Tensor]]:
    """Two batches of (2, 8) tokens; the second one is padded."""
    generator = torch.Generator("cpu").manual_seed(7)
    ids = [torch.randint(0, 64, (2, 8), generator=generator) for _ in range(2)]
    masks = token_masks()
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, masks[1::-1], strict=True)]


def of_model(
    scheme: str, label: str, activation_observer: str | None, options: Options | None
) -> Results:
    """Every scale that `calibrate` writes into a model."""
    name, own = OBSERVERS[label]
    llama = model()
    calibrate(
        llama,
        scheme,
        name,
        text(),
        observer_options=own,
        activation_observer=activation_observer,
        scheme_options=options,
    )
    tensors = {**dict(llama.named_parameters()), **dict(llama.named_buffers())}
    return {
        name.removeprefix("model.layers.0."): tensor.detach()
        for name, tensor in sorted(tensors.items())
        if name.endswith(QPARAMS)
    }


def models() -> Iterator[Case]:
    """`calibrate`: global scales that q, k, v and gate, up share, presets, static activations."""
    whole = {"group_size": 32}
    rows: list[tuple[str, str, str | None, Options | None]] = [
        *(("NVFP4", label, None, None) for label in OBSERVERS if label not in SIGNED),
        ("NVFP4", "optimal-imatrix", "mse", None),
        ("NVFP4A16", "memoryless_minmax", None, None),
        ("NVFP4A16", "optimal-mse", None, None),
        ("MXFP4", "memoryless_mse", None, None),
        ("MXFP4", "optimal-imatrix", None, None),
        ("MXFP8", "memoryless_minmax", None, None),
        ("W4A16", "optimal-imatrix", None, whole),
        ("W4A16", "optimal-hessian-signed", None, whole),
        ("W4A16_ASYM", "imatrix_mse", None, whole),
        ("W8A16", "memoryless_mse", None, whole),
        ("W8A8", "memoryless_minmax", None, None),
        *(
            ("FP8", "memoryless_minmax", each, None)
            for each in (None, "minmax", "histogram", "mse")
        ),
        ("FP8_DYNAMIC", "optimal-imatrix", None, None),
    ]
    for scheme, label, activations, options in rows:
        run = functools.partial(of_model, scheme, label, activations, options)
        beside = f"+{activations}" if activations else ""
        yield Case(f"model/{scheme}/{label}{beside}", run)


CASES = [
    *weights(),
    *whole_formats(),
    *odd_weights(),
    *steps(),
    *activations(),
    *ways(),
    *own_observers(),
    *models(),
]
