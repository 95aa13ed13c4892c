"""Experts that a model keeps in one parameter, taken apart into Linear layers: `LinearExperts`.

transformers 5 keeps the matrices of all experts of a layer in parameters of three dimensions, which
compressed-tensors cannot quantize. Here each matrix becomes a Linear whose weight is a view of that
parameter, under the name that the model's checkpoints have for it, so that whatever is true of a
Linear holds for it.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading, get_cache_init_kwargs, offload_module
from compressed_tensors.offload.cache import OffloadCache
from compressed_tensors.quantization import (
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
)
from compressed_tensors.quantization.utils import is_module_quantized
from torch import Tensor, nn

from calipers.calibration.architectures import has_own_forward
from calipers.observers.masks import current_mask, token_mask

__all__ = [
    "LinearExpert",
    "LinearExperts",
    "change_when_joined",
    "find_fused_experts",
    "joins_experts",
    "known_conversions",
    "separate_experts",
    "separated_experts",
]

#: Names of an expert's layers in checkpoints that keep all experts in one tensor: those by which
#: engines know experts.
_USUAL_NAMES = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",)}
#: Experts without the flags of transformers' `use_experts_implementation`: their matrices are
#: stored transposed, and their forward takes the tokens of one expert after the other. These
#: transformers takes apart when it loads a quantized model.
_SORTED_INPUTS = frozenset({"Llama4TextExperts"})
#: What transformers calls the forward that adds up one expert after the other.
_BY_EXPERT = "eager"
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


@dataclass(frozen=True)
class _Form:
    """How experts of one class compute, and what their layers are called.

    Args:
        original: The module that they were, without its parameters: it knows the activation.
        first: Names of the layers that read the hidden state: gate and up, or up alone.
        last: Name of the layer that writes it.
        concatenated: Whether the module's own gate takes [gate, up], not alternating columns.
        takes_routing: Whether the module's forward takes the experts of each token and their
            weights; else the tokens of one expert after the other.
        stored_apart: Whether checkpoints of the model hold single experts, by these names.
    """

    original: Any
    first: tuple[str, ...]
    last: str
    concatenated: bool
    takes_routing: bool
    stored_apart: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all layers of an expert."""
        return (*self.first, self.last)

    def activate(self, parts: list[Tensor]) -> Any:
        """What the last layer reads, from what the first ones gave."""
        if len(parts) == 1:
            return self.original.act_fn(parts[0])
        if not hasattr(self.original, "_apply_gate"):
            gate, up = parts
            return up * self.original.act_fn(gate)
        if self.concatenated:
            joined = torch.cat(parts, dim=-1)
        else:
            joined = torch.stack(parts, dim=-1).flatten(-2)
        return self.original._apply_gate(joined)

    def routing(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The arguments of the module's forward in its order: hidden states, experts, weights."""
        names = list(inspect.signature(type(self.original).forward).parameters)[1:]
        found: tuple[Tensor, ...] = (*args, *(kwargs[name] for name in names[len(args) :]))
        return found


class LinearExpert(nn.Module):
    """One expert; its layers are children under the names of the checkpoint."""

    def __init__(self, form: _Form, layers: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self.form = form
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, hidden: Tensor) -> Tensor:
        """The expert's answer to hidden states of shape (tokens, columns)."""
        answer: Tensor = self.compute(hidden, lambda layer: layer)
        return answer

    def compute(self, hidden: Tensor, pick: Callable[[nn.Module], Callable[[Tensor], Any]]) -> Any:
        """As `forward`; `pick` gives for a layer what is called in its place."""
        layers = [pick(self.get_submodule(name)) for name in self.form.names]
        parts = [layer(hidden) for layer in layers[:-1]]
        return layers[-1](self.form.activate(parts))


class LinearExperts(nn.ModuleList):
    """Experts as modules, in place of the module that kept all of them in one parameter.

    It is called as that module was. Its outputs are those of transformers' eager forward, or of its
    grouped one, whichever the model's config names, but for the order in which a matrix product
    sums.

    Attributes:
        all_experts: Let every expert see every token, for observers alone: what it says about
            tokens that are not its own is not used.
    """

    def __init__(self, form: _Form, experts: list[LinearExpert]) -> None:
        super().__init__(experts)
        self.form = form
        self.all_experts = False

    @property
    def replaced_class(self) -> type[nn.Module]:
        """Class of the module that it stands for."""
        kind: type[nn.Module] = type(self.form.original)
        return kind

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The weighted sum of the answers of each token's experts, shape (tokens, columns)."""
        hidden, *routing = self.form.routing(args, kwargs)
        if self.form.takes_routing:
            return self._route(hidden, *routing)
        return self._in_turn(hidden)

    def _route(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if self.all_experts:
            for expert in self:
                expert(hidden)
        config = getattr(self.form.original, "config", None)
        eager = getattr(config, "_experts_implementation", None) == _BY_EXPERT
        total = torch.zeros_like(hidden)
        parts: Tensor | None = None
        for number in index.unique().tolist():
            if number >= len(self):  # of an expert on another device
                continue
            places, tokens = torch.nonzero(index.T.eq(number), as_tuple=True)
            answer = self._answer(self[number], hidden[tokens], hidden, tokens)
            answer = answer * weights[tokens, places, None]
            if eager:
                total.index_add_(0, tokens, answer.to(total.dtype))
            else:
                if parts is None:
                    parts = answer.new_zeros(*index.shape, answer.shape[-1])
                parts[tokens, places] = answer
        return total if parts is None else parts.sum(dim=1).to(hidden.dtype)

    def _in_turn(self, hidden: Tensor) -> Tensor:
        """Inputs of shape (experts * tokens, columns); zeros where a token is not the expert's."""
        inputs = hidden.view(len(self), -1, hidden.shape[-1])
        if self.all_experts:
            # a token is zero for all experts but its own
            everything = inputs.sum(dim=0)
            for expert in self:
                expert(everything)
        outputs = torch.zeros_like(inputs)
        for number, expert in enumerate(self):
            tokens = inputs[number].any(dim=-1).nonzero().flatten()
            if tokens.numel():
                own = inputs[number]
                outputs[number, tokens] = self._answer(expert, own[tokens], own, tokens)
        return outputs.view(-1, hidden.shape[-1])

    def _answer(self, expert: nn.Module, own: Tensor, hidden: Tensor, tokens: Tensor) -> Tensor:
        """An expert's answer to some tokens, which its observers see with the batch's mask."""
        if self.all_experts:
            assert isinstance(expert, LinearExpert)
            unseen: Tensor = expert.compute(own, lambda layer: layer.forward)  # past the hooks
            return unseen
        mask = current_mask()
        fits = mask is not None and mask.fits(hidden.shape)
        with token_mask(mask.among(tokens)) if mask is not None and fits else nullcontext():
            answer: Tensor = expert(own)
        return answer


def find_fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that keep all of their experts in one parameter and can be taken apart, by name."""
    with disable_onloading():
        return {name: each for name, each in model.named_modules() if _is_fused(each)}


def _is_fused(module: nn.Module) -> bool:
    if isinstance(module, LinearExperts) or has_own_forward(module):
        return False
    flagged = all(hasattr(module, flag) for flag in _FLAGS) and hasattr(module, "_apply_gate")
    if not flagged and type(module).__name__ not in _SORTED_INPUTS:
        return False
    names = set(module._parameters)
    weights = [getattr(module, name) for name in names if not name.endswith("_bias")]
    return (
        names - {"gate_up_proj_bias", "up_proj_bias", "down_proj_bias"}
        in ({"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"})
        and all(isinstance(each, Tensor) and each.ndim == 3 for each in weights)
        and not any(True for child in module.children() for _ in child.parameters())
        and not hasattr(module, "_hf_hook")
    )


def change_when_joined(model: nn.Module, schemes: Mapping[str, QuantizationScheme]) -> list[str]:
    """Experts that transformers would not load as they are saved: it joins them again.

    That is exact for symmetric integer and MXFP4 weights alone; see
    `calipers.checkpoint.loading_experts`.

    Args:
        model: A model whose experts are taken apart.
        schemes: By name of the module.

    Returns:
        Names of modules whose experts are quantized in another way, or that transformers does not
        know one by one.
    """
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, LinearExperts) or not module.form.takes_routing:
            continue  # those that take tokens in turn transformers itself takes apart
        own = [each for layer, each in schemes.items() if layer.startswith(f"{name}.")]
        if own and not (module.form.stored_apart and all(map(_survives_joining, own))):
            found.append(name)
    return found


def _survives_joining(scheme: QuantizationScheme) -> bool:
    args = scheme.weights
    if args is None or scheme.input_activations or scheme.output_activations:
        return False
    if args.type == QuantizationType.INT:
        return bool(args.symmetric)
    return bool(args.num_bits == 4 and args.strategy == QuantizationStrategy.GROUP)  # MXFP4


@contextmanager
def separated_experts(model: nn.Module, *, if_loaded_so: bool = False) -> Iterator[None]:
    """Take experts apart, and put those together again of which nothing was quantized.

    Args:
        model: Any model, as for `separate_experts`.
        if_loaded_so: Only those that transformers takes apart by itself when it loads a
            compressed-tensors checkpoint, whatever is quantized in it.
    """
    restore = separate_experts(model, if_loaded_so=if_loaded_so)
    try:
        yield
    finally:
        restore()


def separate_experts(model: nn.Module, *, if_loaded_so: bool = False) -> Callable[[], None]:
    """Put `LinearExperts` in place of all modules that keep their experts in one parameter.

    The weights of their layers are views: no memory is taken.

    Args:
        model: Any model; also one without such modules, or on the meta device.
        if_loaded_so: As for `separated_experts`.

    Returns:
        Puts the modules back that were there, where nothing in their place is quantized; may be
        called again.
    """
    replaced = []
    conversions = known_conversions(model)
    for name, module in find_fused_experts(model).items():
        if if_loaded_so and type(module).__name__ not in _SORTED_INPUTS:
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        # what lies on a disk must be read, and is written again one by one
        in_memory = get_cache_init_kwargs(module).get("offload_device") != "disk"
        with disable_onloading() if in_memory else nullcontext():
            experts = _separate(module, *_layer_names(conversions, name, module))
        replaced.append((parent, name.rpartition(".")[2], module, experts))
        parent._modules[replaced[-1][1]] = experts

    def restore() -> None:
        kept = []
        for parent, name, module, experts in replaced:
            if any(map(is_module_quantized, experts.modules())):
                kept.append((parent, name, module, experts))
            elif parent._modules.get(name) is experts:
                _follow(module, experts)
                parent._modules[name] = module
        replaced[:] = kept

    return restore


def _follow(module: nn.Module, experts: LinearExperts) -> None:
    """What was done to the whole model meanwhile: moved, cast, trained."""
    module.train(experts.training)
    if not isinstance(module._parameters, OffloadCache):
        with disable_onloading():
            now = next(experts.parameters())
        module.to(device=now.device, dtype=now.dtype)


def _separate(module: Any, first: tuple[str, ...], last: str, stored_apart: bool) -> LinearExperts:
    sorted_inputs = type(module).__name__ in _SORTED_INPUTS
    transposed = sorted_inputs or module.is_transposed
    concatenated = sorted_inputs or module.is_concatenated
    shell = copy.copy(module)
    shell.__dict__.update(_parameters={}, _buffers={})
    shell.__dict__.pop("forward", None)  # of an offloaded module
    form = _Form(shell, first, last, concatenated, not sorted_inputs, stored_apart)
    joined = "gate_up_proj" if "gate_up_proj" in module._parameters else "up_proj"
    trained = module.down_proj.requires_grad
    ups, up_biases = _matrices(module, joined, transposed)
    downs, down_biases = _matrices(module, "down_proj", transposed)
    experts = []
    for up, up_bias, down, down_bias in zip(ups, up_biases, downs, down_biases, strict=True):
        layers = {}
        for place, name in enumerate(first):
            part = _part(place, len(first), up.shape[0], concatenated)
            layers[name] = _linear(up[part], None if up_bias is None else up_bias[part], trained)
        layers[last] = _linear(down, down_bias, trained)
        if isinstance(module._parameters, OffloadCache):
            for layer in layers.values():
                offload_module(layer, **get_cache_init_kwargs(module))
        experts.append(LinearExpert(form, layers))
    made = LinearExperts(form, experts)
    made.train(module.training)
    return made


def _matrices(
    module: nn.Module, name: str, transposed: bool
) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """The matrix of each expert with outputs as rows, and its bias."""
    weight: Any = getattr(module, name).detach()
    bias: Any = getattr(module, f"{name}_bias", None)
    matrices = weight.transpose(-2, -1) if transposed else weight
    return matrices.unbind(), [None] * len(weight) if bias is None else bias.detach().unbind()


def _part(place: int, parts: int, rows: int, concatenated: bool) -> slice:
    """The rows of one of the layers that a matrix joins."""
    if concatenated:
        return slice(place * rows // parts, (place + 1) * rows // parts)
    return slice(place, None, parts)


def _linear(weight: Tensor, bias: Tensor | None, trained: bool) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=trained)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=trained)
    return layer


def _layer_names(
    conversions: list[Any], name: str, module: nn.Module
) -> tuple[tuple[str, ...], str, bool]:
    """Names of an expert's first layers and of its last one; whether checkpoints have them."""
    joined = "gate_up_proj" if "gate_up_proj" in module._parameters else "up_proj"
    first = _stored_names(conversions, f"{name}.{joined}")
    last = _stored_names(conversions, f"{name}.down_proj")
    usual = _USUAL_NAMES[joined]
    if len(first) == len(usual) and len(last) == 1:
        return first, last[0], True
    return usual, "down_proj", False


def _stored_names(conversions: list[Any], parameter: str) -> tuple[str, ...]:
    """What transformers makes a parameter of: "w1" and "w3", where each expert has these."""
    for conversion in conversions:
        if joins_experts(conversion):
            (target,) = conversion._original_target_patterns
            if re.search(f"{target}$", parameter):
                sources = conversion._original_source_patterns
                leaves = [each.partition("*.")[2] for each in sources]
                return tuple(leaf.removesuffix(".weight") for leaf in leaves)
    return ()


def joins_experts(conversion: Any) -> bool:
    """Whether a conversion of transformers makes one parameter of the weights of all experts."""
    sources = [each.partition("*.") for each in conversion._original_source_patterns]
    return len(conversion._original_target_patterns) == 1 and all(
        star and leaf.endswith(".weight") for _, star, leaf in sources
    )


def known_conversions(model: nn.Module) -> list[Any]:
    """How transformers turns the tensors of a checkpoint into the parameters of a model.

    Empty for what is no transformers model, and where the installed transformers cannot tell.
    """
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return []
    if not isinstance(model, PreTrainedModel):
        return []
    found: list[Any] = get_model_conversion_mapping(model, add_legacy=False)
    return found
