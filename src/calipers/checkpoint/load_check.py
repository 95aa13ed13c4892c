"""`find_load_problems`: which quantized modules the installed libraries cannot load back."""

from __future__ import annotations

import copy
import io
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import (
    QuantizationScheme,
    QuantizationStatus,
    initialize_module_for_quantization,
)
from compressed_tensors.quantization.utils import is_module_quantized
from loguru import logger
from torch import Tensor, nn

from calipers._quiet import no_progress_bars
from calipers._unwrap import unwrap
from calipers._words import first_line, listing
from calipers.calibration.attention import (
    attention_function,
    carried_scheme,
    find_attention,
    initialize_attention,
    is_attention,
    kept_attention_settings,
)
from calipers.calibration.calls import example_inputs
from calipers.calibration.checks import OnUnfit, resolve_and_check
from calipers.calibration.config import KVCacheLike, SchemeLike, resolve_config
from calipers.calibration.experts import LinearExperts, separated_experts
from calipers.calibration.parts import Only, beyond_language
from calipers.calibration.targets import kind_of
from calipers.checkpoint.loading import loading_experts
from calipers.checkpoint.tensors import (
    checkpoint_tensors,
    loading_dtype,
    quantized_modules,
    stored_weight,
)
from calipers.checkpoint.twin import make_twin, plain_defaults
from calipers.checkpoint.write import write_checkpoint
from calipers.errors import CheckpointError
from calipers.formats import Format

__all__ = ["LoadCheck", "check_load", "find_load_problems", "refuse_unloadable"]

_TOLERANCE = 0.02  # of the outputs' range; a format of the loader's own rounds less, faults do more
_LISTED = 6


@dataclass(frozen=True)
class LoadCheck:
    """What loading a twin back has shown.

    Attributes:
        problems: Module name to the reason why it does not load back.
        whole: Whether no choice of the quantized modules loads back, so that ignoring some of them
            is no way out.
        unchecked: Why it could not be checked; None where it was.
        experts: Why transformers loads the checkpoint inside of `loading_experts` alone; None where
            it needs no such help, or does not load even so.
    """

    problems: dict[str, str] = field(default_factory=dict)
    whole: bool = False
    unchecked: str | None = None
    experts: str | None = None


def find_load_problems(
    model: nn.Module, schemes: Mapping[str, QuantizationScheme] | None = None
) -> LoadCheck:
    """Try on a small twin of the model whether its checkpoint would load back.

    The twin has random weights and the same architecture in small. It is quantized under the same
    schemes, saved as `calipers.save` does it, loaded with `from_pretrained`, and compared with
    itself: tensor by tensor, and in its outputs for an example input. Where that fails, kinds of
    modules (names that differ in numbers alone) are tried one by one, to find out which of them
    do not load back. The model itself is neither run nor changed, and nothing is logged.

    Args:
        model: Any model; what is no transformers model of a released class is not checked.
        schemes: Module name to its scheme, beside those that modules carry already.

    Returns:
        The modules with reasons; or why nothing could be found out.
    """
    carried = {n: carried_scheme(m) for n, m in quantized_modules(model).items()}
    attention = find_attention(model)
    schemes = {
        name: scheme
        for name, scheme in {**carried, **(schemes or {})}.items()
        if scheme.weights is not None or name in attention
    }
    if not schemes:
        return LoadCheck()
    if not type(model).__module__.startswith("transformers.models."):
        return LoadCheck(unchecked=f"{type(model).__name__} is no class of transformers' own")
    with plain_defaults(), kept_attention_settings(), _quiet():
        try:
            twin = make_twin(model, attention_function(attention, schemes))
            with separated_experts(twin):
                chosen = _schemes_of_twin(model, twin, schemes)
            plain = _outputs(twin)
        except Exception as error:
            return LoadCheck(unchecked=f"no small twin could be made: {_kind_and_line(error)}")
        key = (
            type(model),
            json.dumps(twin.config.to_dict(), sort_keys=True, default=str),
            str(twin.dtype),
            tuple((name, each.model_dump_json()) for name, each in chosen.items()),
        )
        if key not in _KNOWN:
            try:
                _KNOWN[key] = _try_loaders(twin, chosen, runs=not isinstance(plain, str))
            except Exception as error:  # a full disk, say
                return LoadCheck(unchecked=f"a small twin cannot be saved: {_kind_and_line(error)}")
        found, whole, experts = _KNOWN[key]
        if isinstance(plain, str) and not found:
            unrun = f"loads, but the twin cannot be run to compare its outputs: {plain}"
            return LoadCheck(unchecked=unrun)
    problems = {name: found[kind_of(name)] for name in schemes if kind_of(name) in found}
    return LoadCheck(problems, whole, experts=experts)


def check_load(
    model: nn.Module,
    scheme: SchemeLike | None,
    *,
    ignore: str | Iterable[str] = (),
    on_unfit: OnUnfit = "error",
    scheme_options: Mapping[str, Any] | None = None,
    kv_cache: KVCacheLike = None,
    only: Only | None = None,
) -> None:
    """Refuse, before a calibration, a scheme under which the checkpoint would not load back.

    What `calipers.save` finds out afterwards, as `calibrate --out` does it on the command line. The
    arguments are those of `calipers.calibrate`; nothing in the model is changed.

    Raises:
        SchemeError: The model cannot take this scheme.
        CheckpointError: Names the modules that would not load back, the reasons and the way out.
    """
    inner = unwrap(model)
    config = resolve_config(scheme, ignore, scheme_options, kv_cache)
    with separated_experts(inner):
        resolution = resolve_and_check(inner, config, on_unfit, only)
    refuse_unloadable(inner, {each.name: each.scheme for each in resolution.targets})


def refuse_unloadable(
    model: nn.Module,
    schemes: Mapping[str, QuantizationScheme] | None = None,
    *,
    skip: bool = False,
) -> list[str]:
    """Refuse a model whose checkpoint `find_load_problems` says would not load back.

    Returns:
        With `skip`, where the others load back, the modules to leave alone; else an empty list.

    Raises:
        CheckpointError: Names the modules, the reasons and the way out. What cannot be checked is
            logged in one line.
    """
    check = find_load_problems(model, schemes)
    if check.unchecked is not None:
        logger.info("whether the checkpoint loads back could not be checked: {}", check.unchecked)
    if check.experts is not None:
        logger.warning(
            "transformers loads this checkpoint inside `with calipers.loading_experts():` alone; "
            "without it: {}",
            check.experts,
        )
    if check.problems and not (skip and not check.whole):
        raise CheckpointError(_describe(model, check))
    return list(check.problems)


#: What was found out in this process, by class, config, dtype and schemes of the twin.
_KNOWN: dict[Any, tuple[dict[str, str], bool, str | None]] = {}


def _describe(model: nn.Module, check: LoadCheck) -> str:
    kinds: dict[str, list[str]] = {}
    for name, reason in check.problems.items():
        kinds.setdefault(reason, []).append(name)
    lines = [
        "the checkpoint would not load back with the installed transformers and "
        f"compressed-tensors: tried on a small twin of the model, {len(check.problems)} of the "
        "quantized modules fail",
    ]
    for reason, names in kinds.items():
        lines.append(f"{listing(dict.fromkeys(map(kind_of, names)), _LISTED)}: {reason}")
    if check.whole and all(is_attention(model.get_submodule(name)) for name in check.problems):
        lines.append(
            "a config with nothing but a cache cannot be loaded for this architecture: quantize "
            "weights as well, or pass load_check=False (--no-load-check) for another loader"
        )
    elif check.whole:
        lines.append(
            "no part of the model loads back under this scheme: choose another one, such as "
            "FP8_DYNAMIC or W8A8, or pass load_check=False (--no-load-check) for another loader"
        )
    else:
        ignored = dict.fromkeys(_pattern(kind_of(name)) for name in check.problems)
        ignore = ", ".join(f'"{each}"' for each in ignored)
        language = beyond_language(model, check.problems) == set(check.problems)
        word = 'only="language" (--only language), with ' if language else ""
        lines.append(
            f"leave them alone with {word}ignore=[{ignore}], choose another scheme, or pass "
            "load_check=False (--no-load-check) for another loader"
        )
    return "\n  ".join(lines)


def _pattern(kind: str) -> str:
    return "re:" + re.escape(kind).replace(r"\*", r"\d+") + "$" if "*" in kind else kind


def _schemes_of_twin(
    model: nn.Module, twin: nn.Module, schemes: Mapping[str, QuantizationScheme]
) -> dict[str, QuantizationScheme]:
    """Schemes for the twin's modules: those of the modules of the same names.

    Schemes of a kind of module that only later layers have are given to the last of that kind.
    """
    modules = dict(twin.named_modules())
    known = {name for name, _ in model.named_modules()}
    chosen = {name: each for name, each in schemes.items() if name in modules}
    by_kind: dict[str, dict[str, QuantizationScheme]] = {}
    for name, each in schemes.items():
        by_kind.setdefault(kind_of(name), {}).setdefault(each.model_dump_json(), each)
    for kind, wanted in by_kind.items():
        places = [name for name in modules if kind_of(name) == kind]
        if not places:
            raise CheckpointError(f"it has no module like {kind}")
        seen = {chosen[name].model_dump_json() for name in places if name in chosen}
        for place, (text, each) in zip(reversed(places), wanted.items(), strict=False):
            if text not in seen:
                chosen[place] = each
    known |= _inside_of_experts(twin)  # of which the model may have some, or none
    strange = [n for n, m in modules.items() if n not in known and not list(m.children())]
    if strange:
        raise CheckpointError(f"it has a module that the model lacks: {strange[0]}")
    return {name: chosen[name] for name in modules if name in chosen}


def _inside_of_experts(model: nn.Module) -> set[str]:
    return {
        f"{name}.{inner}"
        for name, module in model.named_modules()
        if isinstance(module, LinearExperts)
        for inner, _ in module.named_modules()
    }


#: What a checkpoint is loaded in.
_Loader = Callable[[], AbstractContextManager[None]]


def _try_loaders(
    twin: nn.Module, schemes: Mapping[str, QuantizationScheme], *, runs: bool
) -> tuple[dict[str, str], bool, str | None]:
    """As `_try_kinds`, and why it takes `loading_experts`, where that is what it takes."""
    plain = _try(twin, schemes, nullcontext, runs=runs)
    if plain is None:
        return {}, False, None
    found, whole = _try_kinds(twin, schemes, loading_experts, runs=runs)
    return found, whole, None if found else plain


def _try_kinds(
    twin: nn.Module,
    schemes: Mapping[str, QuantizationScheme],
    loader: _Loader,
    *,
    runs: bool,
) -> tuple[dict[str, str], bool]:
    """Kinds of modules that do not load back, with reasons; and whether that is all of them."""
    reason = _try(twin, schemes, loader, runs=runs)
    if reason is None:
        return {}, False
    kinds = list(dict.fromkeys(kind_of(name) for name in schemes))
    found: dict[str, str] = {}
    good: list[str] = []
    for kind in kinds:
        alone = {n: s for n, s in schemes.items() if kind_of(n) == kind}
        why = _try(twin, alone, loader, runs=runs)
        if why is None:
            good.append(kind)
        else:
            found[kind] = why
    if not found or (good and _try(twin, _only(schemes, good), loader, runs=runs) is not None):
        # Each alone loads, but not all of them together: take up one after the other.
        kept: list[str] = []
        for kind in good:
            why = _try(twin, _only(schemes, [*kept, kind]), loader, runs=runs)
            if why is None:
                kept.append(kind)
            else:
                found[kind] = why
        good = kept
    return found, not good


def _only(
    schemes: Mapping[str, QuantizationScheme], kinds: list[str]
) -> dict[str, QuantizationScheme]:
    return {name: each for name, each in schemes.items() if kind_of(name) in kinds}


def _try(
    twin: nn.Module,
    schemes: Mapping[str, QuantizationScheme],
    loader: _Loader,
    *,
    runs: bool,
) -> str | None:
    """Quantize a copy of the twin, save it and load it; why it does not come back, or None."""
    quantized = copy.deepcopy(twin)
    try:
        with separated_experts(quantized):
            for name, scheme in schemes.items():
                _quantize(quantized, quantized.get_submodule(name), scheme)
        dtype = loading_dtype(quantized)
        tensors = checkpoint_tensors(quantized, dtype)
    except Exception:
        return None  # what cannot be quantized or compressed is told by others, with its reason
    with tempfile.TemporaryDirectory(prefix="calipers-") as folder:
        write_checkpoint(quantized, Path(folder), tell=False)
        try:
            kind: Any = type(twin)
            config: Any = twin.config
            with loader():
                loaded = kind.from_pretrained(
                    folder,
                    local_files_only=True,
                    attn_implementation=config._attn_implementation,
                ).eval()
        except Exception as error:
            return f"loading raises {_kind_and_line(error)}"
        return _difference(quantized, loaded, tensors, exact=dtype is None, runs=runs)


def _difference(
    quantized: nn.Module,
    loaded: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    exact: bool,
    runs: bool,
) -> str | None:
    state = loaded.state_dict()
    wrong = [
        name
        for name, tensor in tensors.items()
        if name in state
        and not torch.equal(state[name].double(), tensor.to(state[name].dtype).double())
    ]
    different = _other_values(wrong) or _joined_experts(quantized, loaded)
    if different is not None or not runs:
        return different
    for each in (quantized, loaded):
        _run_as_loaded(each)
    expected, found = _outputs(quantized), _outputs(loaded)
    if isinstance(expected, str):
        return None  # the fake-quantized model does not run: no matter of loading
    if isinstance(found, str):
        return f"the loaded model cannot run: {found}"
    if not torch.isfinite(found).all() and torch.isfinite(expected).all():
        return "the loaded model's outputs are not finite"
    spread = expected.max() - expected.min()
    apart = (found - expected).abs().max() / spread
    if exact and not apart <= _TOLERANCE:
        return f"loads with other outputs, by {apart:.0%} of their range"
    return None


@torch.no_grad()
def _joined_experts(quantized: nn.Module, loaded: nn.Module) -> str | None:
    """What is wrong with experts that the loader has joined into one parameter, if anything."""
    wrong = []
    with separated_experts(loaded):
        modules = dict(loaded.named_modules())
        for name, module in quantized.named_modules():
            found = modules.get(name)
            inside = any(isinstance(modules.get(each), LinearExperts) for each in _around(name))
            if not inside or not isinstance(found, nn.Linear) or is_module_quantized(found):
                continue
            expected = stored_weight(name, module).double()
            apart = (found.weight.double() - expected).norm()
            if not apart <= _TOLERANCE * expected.norm():  # NaN is wrong
                wrong.append(f"{name}.weight")
            scheme: Any = getattr(module, "quantization_scheme", None)
            if scheme and (scheme.input_activations or scheme.output_activations):
                return "experts come back as one parameter, whose inputs are not quantized"
    return _other_values(wrong)


def _run_as_loaded(model: nn.Module) -> None:
    """Let a model round as transformers' quantized models do.

    torch.matmul copies some inputs where a weight requires a gradient, which packed ones do not.
    Jamba's mixers call a layer whose weight they multiply by otherwise.
    """
    model.requires_grad_(False)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._is_quantized = True


def _other_values(wrong: list[str]) -> str | None:
    return (
        f"loaded with other values of {len(wrong)} tensors, such as {wrong[0]}" if wrong else None
    )


def _around(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


@torch.no_grad()
def _quantize(model: nn.Module, module: Any, scheme: QuantizationScheme) -> None:
    """Scales that take no search: one power of two for all of a weight."""
    scheme = scheme.model_copy(deep=True)
    if is_attention(module):
        initialize_attention(module, scheme, model)
    else:
        initialize_module_for_quantization(module, scheme)
    args: Any = scheme.weights
    scale = 1.0
    if args is not None:
        largest = module.weight.abs().max().float() / Format.of(args).high
        scale = float(2.0 ** torch.ceil(torch.log2(largest)))
    for name, parameter in module.named_parameters(recurse=False):
        if name == "weight_scale":
            parameter.fill_(1.0 if hasattr(module, "weight_global_scale") else scale)
        elif name == "weight_global_scale":
            parameter.fill_(1.0 / scale)
        elif name.endswith("global_scale"):
            parameter.fill_(64.0)
        elif name.endswith("_scale"):
            parameter.fill_(2.0**-5)
        elif name.endswith("_zero_point"):
            parameter.zero_()
    module.quantization_status = QuantizationStatus.FROZEN


def _outputs(model: Any) -> Tensor | str:
    """The model's floats for its example input, in one row; or why there are none."""
    inputs = example_inputs(model)
    if inputs is None:
        return "it takes inputs of a kind that is not known"
    try:
        with torch.no_grad():
            output = model(**inputs)
    except Exception as error:
        return _kind_and_line(error)
    for key in ("logits", "last_hidden_state", "logits_per_image", "image_embeds", "text_embeds"):
        value = output.get(key) if hasattr(output, "get") else None
        if isinstance(value, Tensor):
            return value.float().flatten()
    values = output.values() if hasattr(output, "values") else output
    floats = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return torch.cat([each.float().flatten() for each in floats]) if floats else "no output"


def _kind_and_line(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)[:200]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars, warnings or lines in the log from transformers and compressed-tensors."""
    from transformers.utils.logging import get_verbosity, set_verbosity

    verbosity = get_verbosity()
    set_verbosity(logging.CRITICAL)
    nowhere = io.StringIO()  # compressed-tensors draws bars there, whatever is asked of it
    try:
        with no_progress_bars(), warnings.catch_warnings(), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        set_verbosity(verbosity)
