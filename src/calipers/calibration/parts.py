"""The language part of a model that sees or hears as well: what `only="language"` means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from torch import nn

from calipers.calibration.architectures import find_output_heads, is_projection
from calipers.errors import CalipersError

__all__ = ["Only", "beyond_language", "find_language_part", "find_outside"]

#: Parts that a scheme can be kept to.
Only = Literal["language"]
#: Under these names transformers' models hold their language model, where no config tells.
_NAMES = ("language_model", "text_model", "text_decoder")
#: Beside their language model, what it says is brought into the space of images by one of these.
_PROJECTIONS = ("text_projection", "text_proj")


def find_outside(model: nn.Module) -> set[str]:
    """Names of the modules outside of the language part: towers, projectors and what they hold.

    Output heads count as language. Empty for a model that is a language model as a whole.

    Raises:
        CalipersError: The model has no language part, or none that can be told from the rest.
    """
    roots = find_language_part(model)
    if not roots:
        raise CalipersError(
            f"only='language' (--only language): {type(model).__name__} has no language part that "
            "can be told from the rest: name what to leave alone with ignore= (--ignore)"
        )
    if "" in roots:
        return set()
    heads = find_output_heads(model)
    return {
        name
        for name, module in model.named_modules()
        if name not in heads
        and not _is_inside(name, roots)
        and (isinstance(module, nn.Embedding) or is_projection(module))
    }


def beyond_language(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those of some modules that `only="language"` would leave alone."""
    return set(names) & find_outside(model) if find_language_part(model) else set()


def find_language_part(model: nn.Module) -> set[str]:
    """Names of the outermost modules that work on text alone; {""} for the whole model.

    Those built from the config that transformers' `get_text_config` gives, where a model has
    several; else its decoder, where its input is an image or a sound; else modules of the usual
    names. With them the projection of the text beside them (CLIP's). Empty where there are none.
    """
    roots = _find_text_models(model)
    for root in list(roots - {""}):
        parent = root.rpartition(".")[0]
        children = model.get_submodule(parent)._modules
        roots |= {".".join(filter(None, (parent, x))) for x in _PROJECTIONS if children.get(x)}
    return roots


def _find_text_models(model: nn.Module) -> set[str]:
    config = getattr(model, "config", None)
    text = _kind(_text_config(config))
    if text is not None and text != _kind(config):
        within = _models_within(model)
        found = {name for name, module in within if _kind(module.config) == text}
        if found:
            return set(_outermost(found))
    elif getattr(model, "main_input_name", None) == "input_ids":
        return {""}
    names = {id(module): name for name, module in model.named_modules()}
    decoder = names.get(id(_decoder(model)), "")
    named = {name for name in names.values() if name.rpartition(".")[2] in _NAMES}
    return {decoder} if decoder else set(_outermost(named))


def _text_config(config: Any) -> Any:
    get = getattr(config, "get_text_config", None)
    try:
        return get(decoder=True) if callable(get) else None
    except (ValueError, TypeError):
        return None  # several of them


def _kind(config: Any) -> tuple[str, object] | None:
    """What configs of one kind of model share; what an encoder-decoder gives may be a copy."""
    return None if config is None else (type(config).__name__, getattr(config, "model_type", None))


def _models_within(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Models of transformers inside of the model."""
    for name, module in model.named_modules():
        if name and hasattr(module, "base_model_prefix") and hasattr(module, "config"):
            yield name, module


def _decoder(model: Any) -> object:
    return model.get_decoder() if callable(getattr(model, "get_decoder", None)) else None


def _outermost(names: set[str]) -> Iterator[str]:
    return (name for name in names if not _is_inside(name, names - {name}))


def _is_inside(name: str, roots: set[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)
