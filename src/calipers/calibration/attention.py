"""Attention modules whose states a scheme quantizes: which, what they cannot take, hooking them.

compressed-tensors finds them by the class name and the projections (`is_cached_attention_module`),
and gives every one of them the `kv_cache_scheme` of a config. It learns of their states from two
submodules, which this file puts there and takes away again: `kv_cache` (keys and values, on their
way into the cache) and `impl` (queries, on their way into the attention function).
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from compressed_tensors.modeling import (
    IMPL_ATTR,
    KV_CACHE_ATTR,
    QuantizedAttentionImpl,
    QuantizedKVCache,
    initialize_hooked_attention,
    initialize_hooked_kv_cache,
)
from compressed_tensors.modeling.attention import HOOKED_ATTENTION_NAME
from compressed_tensors.offload import disable_onloading
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    initialize_module_for_quantization,
)
from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module
from compressed_tensors.utils import (
    get_head_dim,
    get_num_attn_heads,
    get_num_kv_heads,
    is_narrow_match,
)
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from calipers._words import first_line
from calipers.errors import SchemeError

__all__ = [
    "CACHE_STATES",
    "STATES",
    "AttentionHooks",
    "attention_function",
    "cache_scheme",
    "carried_scheme",
    "clear_states",
    "find_attention",
    "find_model_problems",
    "find_scheme_problems",
    "find_state_problems",
    "initialize_attention",
    "is_attention",
    "is_cache_scheme",
    "is_state_scheme",
    "kept_attention_settings",
    "sees_cache",
]

#: What a `kv_cache_scheme` quantizes, and what a scheme that targets attention does.
CACHE_STATES = ("k", "v")
STATES = ("q", *CACHE_STATES)

_STRATEGIES = (QuantizationStrategy.TENSOR, QuantizationStrategy.ATTN_HEAD)
#: compressed-tensors reads no targets of a kv_cache_scheme; these tell it from others.
_CACHE_TARGETS = ["kv_cache_scheme"]


def find_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Attention modules by name, as compressed-tensors finds them for a `kv_cache_scheme`.

    Modules that only look like one, since they never see a cache, are among them; see `sees_cache`.
    """
    return {name: module for name, module in model.named_modules() if is_attention(module)}


def is_attention(module: nn.Module) -> bool:
    """Whether compressed-tensors takes a module for an attention with a cache."""
    return bool(is_cached_attention_module(module))


def sees_cache(module: nn.Module) -> bool:
    """Whether an attention module writes its keys and values into a cache.

    It does not where it has no place in one (the vision tower of Llama 4, encoders), nor where it
    reads those of another layer.
    """
    return getattr(module, "layer_idx", None) is not None and not getattr(
        module, "is_kv_shared_layer", False
    )


def cache_scheme(args: QuantizationArgs) -> QuantizationScheme:
    """The scheme of an attention module under a `kv_cache_scheme`."""
    return QuantizationScheme(targets=list(_CACHE_TARGETS), input_activations=args)


def is_cache_scheme(scheme: QuantizationScheme) -> bool:
    """Whether a scheme is one of `cache_scheme`."""
    return bool(scheme.targets == _CACHE_TARGETS)


def carried_scheme(module: nn.Module) -> QuantizationScheme:
    """The scheme of a quantized module, that of a cache alone as `cache_scheme` gives it."""
    scheme: Any = module.quantization_scheme
    if is_attention(module) and not hasattr(module, IMPL_ATTR):
        return cache_scheme(scheme.input_activations)
    found: QuantizationScheme = scheme
    return found


def attention_function(names: Collection[str], schemes: Mapping[str, QuantizationScheme]) -> str:
    """Which attention function a model may have under these schemes.

    Args:
        names: The model's attention modules.
        schemes: Of modules, by name.
    """
    states = [each for name, each in schemes.items() if name in names and not is_cache_scheme(each)]
    return "sdpa" if states else "eager"  # see `_function_problems`


def initialize_attention(
    module: nn.Module, scheme: QuantizationScheme, model: nn.Module | None = None
) -> None:
    """Empty scales on an attention module, as a loader makes them.

    Args:
        module: The attention module.
        scheme: The scheme of its states.
        model: The model that it is in, where the submodules that its states pass through are to be
            put there as well, to stay; None where they are there already.
    """
    if model is not None:
        cache = is_cache_scheme(scheme)
        (initialize_hooked_kv_cache if cache else initialize_hooked_attention)(model, module)
    # A loader makes no zero points of symmetric states.
    initialize_module_for_quantization(module, scheme, force_zero_point=False)


def is_state_scheme(model: nn.Module, name: str, scheme: QuantizationScheme) -> bool:
    """Whether a scheme that matches an attention module means its states.

    As compressed-tensors has it: a target must match neither the module around it nor one inside.
    """
    return bool(name) and bool(is_narrow_match(model, scheme.targets, name))


def find_scheme_problems(scheme: QuantizationScheme) -> Iterator[str]:
    """What a scheme of attention states must not hold, in compressed-tensors' terms."""
    if scheme.weights is not None:
        yield "attention has no weights of its own: target its q_proj, k_proj and v_proj instead"
    if scheme.output_activations is not None:
        yield "outputs of attention cannot be quantized, only its states (input_activations)"
    if scheme.input_activations is None:
        yield "its states are the scheme's input_activations, which are missing"


def find_state_problems(module: nn.Module, args: QuantizationArgs) -> Iterator[str]:
    """Arguments that the states of an attention module cannot take.

    Args:
        module: An attention module.
        args: Of its scheme.
    """
    if args.strategy not in _STRATEGIES:
        known = ", ".join(repr(each.value) for each in _STRATEGIES)
        got = getattr(args.strategy, "value", args.strategy)
        yield f"states of attention take the strategies {known}, got {got!r}"
    elif args.dynamic:
        got = getattr(args.dynamic, "value", args.dynamic)
        yield f"states of attention are quantized statically, got dynamic={got!r}"
    elif args.strategy == QuantizationStrategy.ATTN_HEAD:
        yield from _head_problems(module)


def _head_problems(module: Any) -> Iterator[str]:
    if hasattr(module, "kv_b_proj"):
        yield (
            "its cache holds one latent for all heads (multi-head latent attention), and "
            f"compressed-tensors {version('compressed-tensors')} makes one scale for each head of "
            "the config: use strategy 'tensor'"
        )
        return
    config, projection = getattr(module, "config", None), getattr(module, "k_proj", None)
    size = getattr(module, "head_dim", None)
    if config is None or not isinstance(size, int) or not isinstance(projection, nn.Linear):
        return
    try:
        expected = get_num_kv_heads(config.get_text_config(decoder=True))
    except (AttributeError, ValueError):
        return
    with disable_onloading():
        heads = projection.weight.shape[0] // size
    if heads != expected:
        yield (
            f"has {heads} heads of keys, and compressed-tensors makes {expected} scales, as many "
            "as the config names: use strategy 'tensor'"
        )


def find_model_problems(
    model: nn.Module, found: Mapping[str, nn.Module], states: Collection[str], *, cache: bool
) -> Iterator[str]:
    """Why no cache, or no states of attention, of this model can be quantized; one line for each.

    Args:
        model: The model.
        found: Its attention modules, see `find_attention`.
        states: Names of those whose queries are quantized as well.
        cache: Whether there is a `kv_cache_scheme`.
    """
    library = f"compressed-tensors {version('compressed-tensors')}"
    what = "kv_cache_scheme" if cache else "states of attention"
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or not hasattr(model, "set_attn_implementation"):
        yield (
            f"{what}: {library} hooks the attention of transformers models, got "
            f"{type(model).__name__}"
        )
        return
    if not found:
        yield (
            f"{what}: {library} finds no attention in {type(model).__name__} that it could "
            "quantize: a module with 'Attention' in its class name, one of k_proj, v_proj, "
            "qkv_proj or kv_b_proj, and past_key_values among the arguments of its forward"
        )
    elif getattr(config, "is_encoder_decoder", False):
        yield (
            f"{what}: {library} puts its QuantizedKVCache before an EncoderDecoderCache, which has "
            f"no update of its own, so that {type(model).__name__} would not run"
        )
    elif cache and not any(map(sees_cache, found.values())):
        yield (
            f"kv_cache_scheme: no attention of {type(model).__name__} writes into a cache "
            f"({', '.join(list(found)[:3])})"
        )
    else:
        yield from _config_problems(config, what, library)
        if states:
            yield from _function_problems(model, library)
            yield from _unhooked_problems(model, states, library)


def _config_problems(config: Any, what: str, library: str) -> Iterator[str]:
    """A config from which no shapes of scales can be read, as where layers differ (Gemma 4)."""
    try:
        decoder = config.get_text_config(decoder=True)
        for read in (get_num_attn_heads, get_num_kv_heads, get_head_dim):
            read(decoder)
    except Exception as error:  # whatever the config raises
        yield (
            f"{what}: {library} reads the number and size of heads from the config, which does "
            f"not have them: {type(error).__name__}: {first_line(error)}"
        )


def _function_problems(model: Any, library: str) -> Iterator[str]:
    """An attention function that the hooked one could not call."""
    name = model.config._attn_implementation
    if name not in (*ALL_ATTENTION_FUNCTIONS.valid_keys(), HOOKED_ATTENTION_NAME):
        yield (
            f"states of attention: the model's attention function is {name!r}, which {library} "
            "cannot call: model.set_attn_implementation('sdpa') where the model has it, or "
            "quantize the cache alone (kv_cache_scheme)"
        )


def _unhooked_problems(model: nn.Module, states: Collection[str], library: str) -> Iterator[str]:
    """Attention whose function is replaced for the whole model although no scheme targets it."""
    others = [
        name
        for name, module in model.named_modules()
        if name not in states and _calls_attention_function(module)
    ]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        yield (
            f"states of attention: {library} replaces the attention function of the whole model, "
            "and the new one fails for attention without a scheme: target these as well, or "
            f"quantize the cache alone (kv_cache_scheme): {', '.join(others[:3])}{more}"
        )


def _calls_attention_function(module: nn.Module) -> bool:
    if "attention" not in type(module).__name__.lower():
        return False
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return False


class _CopiedCache(QuantizedKVCache):
    """A cache that refers to the copy of its attention module once both are copied, or unpickled.

    That of compressed-tensors goes on referring to the original, and quantizes by its scales, or
    not at all once the original is gone.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "attn_module": self.attn_module(), "past_key_values": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "attn_module": weakref.ref(state["attn_module"])})


class AttentionHooks:
    """The submodules of compressed-tensors on attention modules, as long as they are needed.

    Args:
        model: The transformers model; nothing is done to it before `install`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._added: dict[str, list[str]] = {}
        self._hooks: dict[str, set[int]] = {}
        self._settings: list[tuple[Any, dict[str, Any]]] = []
        self._function: str | None = None

    def install(self, states: Mapping[str, Collection[str]]) -> None:
        """Let modules show their states; they compute what they did before.

        Args:
            states: Name of each attention module to the states that are wanted of it.

        Raises:
            SchemeError: The attention function of the model cannot be replaced.
        """
        if any("q" in wanted for wanted in states.values()):
            self._settings = _attention_settings(self._model)
            self._function = QuantizedAttentionImpl._original_impl
        for name, wanted in states.items():
            module = self._model.get_submodule(name)
            children, hooks = set(module._modules), set(module._forward_pre_hooks)
            try:
                if "q" in wanted:
                    initialize_hooked_attention(self._model, module)
                else:
                    initialize_hooked_kv_cache(self._model, module)
            except (AssertionError, KeyError, ValueError) as error:
                raise SchemeError(
                    f"{type(self._model).__name__} does not let its attention function be "
                    f"replaced, so that {name} cannot be quantized: "
                    f"{type(error).__name__}: {error}"
                ) from error
            else:
                getattr(module, KV_CACHE_ATTR).__class__ = _CopiedCache
            finally:
                self._added[name] = sorted(set(module._modules) - children)
                self._hooks[name] = set(module._forward_pre_hooks) - hooks

    def remove(self, keep: Collection[str] = ()) -> None:
        """Take the submodules away again, and let the model have its own attention function.

        Args:
            keep: Names of modules that keep theirs from now on: quantized ones.
        """
        for name, added in self._added.items():
            if name in keep:
                continue
            module = self._model.get_submodule(name)
            for child in added:
                module._modules.pop(child, None)
            for key in self._hooks[name]:
                module._forward_pre_hooks.pop(key, None)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        if not any(IMPL_ATTR in self._added[name] for name in keep if name in self._added):
            _restore_settings(self._settings)
            if self._function is not None:
                QuantizedAttentionImpl._original_impl = self._function
        self._settings, self._function, self._added, self._hooks = [], None, {}, {}


def clear_states(module: nn.Module) -> None:
    """Remove the scales and zero points of attention states; upstream leaves some of them there."""
    for state in STATES:
        for what in ("scale", "zero_point", "global_scale"):
            with disable_onloading():
                present = hasattr(module, f"{state}_{what}")
            if present:
                delattr(module, f"{state}_{what}")


@contextmanager
def kept_attention_settings() -> Iterator[None]:
    """A block after which models that are hooked already call the function that they called before.

    compressed-tensors remembers one attention function for all hooked models of a process: that of
    the model which was hooked last.
    """
    before = QuantizedAttentionImpl._original_impl
    try:
        yield
    finally:
        QuantizedAttentionImpl._original_impl = before


def _attention_settings(model: nn.Module) -> list[tuple[Any, dict[str, Any]]]:
    """Each config of a model, with what it says of the attention function."""
    configs = {id(each): each for each in _configs(model)}
    return [
        (each, {key: value for key, value in vars(each).items() if key.startswith("_attn_")})
        for each in configs.values()
    ]


def _restore_settings(settings: Iterable[tuple[Any, dict[str, Any]]]) -> None:
    for config, before in settings:
        for key in [key for key in vars(config) if key.startswith("_attn_")]:
            del config.__dict__[key]
        config.__dict__.update(before)


def _configs(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "to_dict"):
            yield config
            for key in getattr(config, "sub_configs", ()):
                if getattr(config, key, None) is not None:
                    yield getattr(config, key)
