"""Put observers of calipers into llmcompressor's registry, and take them out again."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from compressed_tensors.registry.registry import (
    _ALIAS_REGISTRY,
    _REGISTRY,
    standardize_lookup_name,
)

from calipers.errors import IntegrationError, MissingDataError
from calipers.integrations.llmcompressor.options import PREFIX
from calipers.observers import Observer

__all__ = ["SUPPORTED_VERSIONS", "Installation", "install", "uninstall"]

#: Series of llmcompressor whose observer interface is known here.
SUPPORTED_VERSIONS = ("0.14",)

#: What the adapter builds on, looked for before anything is changed.
_INTERFACE = {
    "llmcompressor.observers.Observer": (
        "update_statistics_from_observed",
        "has_statistics",
        "get_qparams",
        "get_statistics",
        "delete_statistics",
        "sync_activation_stats",
        "attach",
        "detach",
        "register",
    ),
    "llmcompressor.observers.FusionHandler": ("fuse",),
    "llmcompressor.observers.IMatrixMSEObserver": ("_get_validated_importance",),
    "llmcompressor.observers.mse.NVFP4ExpandedMSEObserver": ("register",),
    "llmcompressor.modifiers.utils.hooks.HooksMixin": ("register_hook",),
    "llmcompressor.pipelines.registry.CalibrationPipeline": ("from_modifiers",),
}


@dataclass(frozen=True)
class Installation(AbstractContextManager["Installation"]):
    """What `install` did. As a context manager it is undone on leaving.

    Args:
        replace: Whether llmcompressor's own names are served by calipers.
        names: The names in llmcompressor's registry that calipers answers to, with underscores.
        before: What was in force before; leaving brings it back.
    """

    replace: bool
    names: tuple[str, ...]
    before: Installation | None = field(default=None, repr=False, compare=False)

    def __exit__(self, *exception: object) -> None:
        """Bring back what was in force before."""
        if self.before is None:
            uninstall()
        else:
            install(replace=self.before.replace)


@dataclass
class _State:
    """What is in force now and how to undo it: for each change a call, the latest last."""

    installation: Installation | None = None
    undo: list[Callable[[], object]] = field(default_factory=list)


_state = _State()


def install(replace: bool = False) -> Installation:
    """Register every observer of calipers with llmcompressor.

    An observer is registered under its own name where llmcompressor has none of that name, and
    with the prefix `calipers_` otherwise. Observers of your own that are registered with
    `calipers.observers.Observer` come along. A second call changes nothing, or, with another
    `replace` or with observers registered since, brings the registry to what it asks for.

    Args:
        replace: Serve llmcompressor's own names too (memoryless_minmax, static_minmax, minmax,
            memoryless_mse, mse, imatrix_mse, nvfp4_expanded_mse, fouroversix,
            nvfp4_expanded_imatrix), so that recipes run on calipers as they are.

    Returns:
        The installation: the names that it serves, and a context manager that undoes it.

    Raises:
        IntegrationError: llmcompressor is missing, is of a version that this integration does not
            know, or another package holds one of the prefixed names. Nothing is changed then.
    """
    _check_llmcompressor()
    before = _state.installation
    uninstall()
    try:
        _state.installation = _apply(replace, before)
    except BaseException:
        uninstall()
        if before is not None:
            _state.installation = _apply(before.replace, before.before)
        raise
    return _state.installation


def uninstall() -> None:
    """Take out what `install` put in: llmcompressor's registry is what it was before.

    Observers that are attached to a model at that moment go on working until they are detached;
    those built afterwards are llmcompressor's own. Nothing happens where nothing is installed.
    """
    while _state.undo:
        _state.undo.pop()()
    _state.installation = None


def _apply(replace: bool, before: Installation | None) -> Installation:
    from llmcompressor.observers import Observer as PeerObserver

    entries, aliases = _REGISTRY[PeerObserver], _ALIAS_REGISTRY[PeerObserver]
    planned = _plan(entries, aliases, replace)
    for name, adapter in planned.items():
        _put(entries, name, adapter)
        _put(aliases, name, name)
    _feed_data_to_our_observers()
    names = tuple(sorted(name.replace("-", "_") for name in planned))
    return Installation(replace, names, before)


def _plan(entries: dict[str, Any], aliases: dict[str, str], replace: bool) -> dict[str, Any]:
    """The adapter for each name to be registered; nothing is changed yet."""
    from llmcompressor.observers.mse import NVFP4ExpandedMSEObserver as PeerFourOverSix

    from calipers.integrations.llmcompressor.adapter import adapt

    planned: dict[str, Any] = {}
    ours = {*Observer.registered_names(), *Observer.registered_aliases()}
    for name in sorted(map(standardize_lookup_name, ours)):
        cls: Any = Observer.get_value_from_registry(name)
        theirs = entries.get(aliases.get(name, name))
        if theirs is None:
            planned[name] = adapt(cls)
            continue
        prefixed = standardize_lookup_name(PREFIX) + name
        if prefixed in entries:
            raise IntegrationError(
                f"llmcompressor's registry holds {prefixed.replace('-', '_')!r} already, from "
                f"{entries[prefixed].__module__}; calipers needs that name"
            )
        planned[prefixed] = adapt(cls)
        if replace and theirs.__module__.partition(".")[0] == "llmcompressor":
            # One of its names (fouroversix) stands for a function that warns and builds a class.
            original = theirs if isinstance(theirs, type) else PeerFourOverSix
            planned[name] = adapt(cls, original)
    return planned


def _put(registry: dict[str, Any], name: str, value: Any) -> None:
    if name in registry:
        _state.undo.append(functools.partial(registry.__setitem__, name, registry[name]))
    else:
        _state.undo.append(functools.partial(registry.pop, name, None))
    registry[name] = value


def _feed_data_to_our_observers() -> None:
    """Have recipes run on data where the observer of a weight needs it.

    llmcompressor knows the observers that need data by two names, spelled as they are.
    """
    from llmcompressor.pipelines.registry import CalibrationPipeline

    original = CalibrationPipeline.__dict__["from_modifiers"]

    @functools.wraps(original.__func__)
    def from_modifiers(cls: Any, modifiers: list[Any], *args: Any, **kwargs: Any) -> Any:
        needy = set()
        for modifier in modifiers:
            if name := _needing_data(modifier):
                needy.add(name)
                modifier.requires_calibration_data = True
        pipeline = original.__func__(cls, modifiers, *args, **kwargs)
        return _asking_for_data(pipeline, sorted(needy)) if needy else pipeline

    _state.undo.append(lambda: setattr(CalibrationPipeline, "from_modifiers", original))
    CalibrationPipeline.from_modifiers = classmethod(from_modifiers)


def _asking_for_data(pipeline: Any, observers: list[str]) -> Any:
    """The same pipeline, which says what is missing where it is called without data."""

    def call(model: Any, dataloader: Any, dataset_args: Any) -> Any:
        if dataloader is None:
            raise MissingDataError(
                f"observer {', '.join(map(repr, observers))} measures weights by the inputs of "
                "their modules, and the recipe runs without data: give it a dataset"
            )
        return pipeline(model, dataloader, dataset_args)

    cls = type(pipeline)
    return type(cls.__name__, (cls,), {"__call__": staticmethod(call)})()


def _needing_data(modifier: Any) -> str | None:
    """The observer of ours by which a modifier measures weights, if that one needs data.

    Raises:
        ValueError: An unknown or invalid option of such an observer, before any data is read.
    """
    from llmcompressor.observers import Observer as PeerObserver

    from calipers.integrations.llmcompressor.adapter import Adapter

    config = getattr(modifier, "resolved_config", None)
    schemes = () if config is None else config.config_groups.values()
    for args in (scheme.weights for scheme in schemes if scheme.weights is not None):
        found = None
        if args.observer is not None:
            found = PeerObserver.get_value_from_registry(args.observer)
        if isinstance(found, type) and issubclass(found, Adapter):
            adapter: Adapter = found("weight", args)
            if adapter.inner.needs_data:
                return str(args.observer)
    return None


def _check_llmcompressor() -> None:
    """Raise unless llmcompressor is installed in a version with the interface known here."""
    known = " or ".join(f"{series}.x" for series in SUPPORTED_VERSIONS)
    try:
        version = importlib.metadata.version("llmcompressor")
    except importlib.metadata.PackageNotFoundError:
        raise IntegrationError(
            f"llmcompressor is not installed: this integration needs llmcompressor {known}"
        ) from None
    if ".".join(version.split(".")[:2]) not in SUPPORTED_VERSIONS:
        raise IntegrationError(
            f"llmcompressor {version}: its observer interface is not known to this version of "
            f"calipers, which works with llmcompressor {known}"
        )
    missing: list[str] = []
    for path, names in _INTERFACE.items():
        module, _, attribute = path.rpartition(".")
        found = getattr(importlib.import_module(module), attribute, None)
        missing += [f"{path}.{name}" for name in names if not hasattr(found, name)]
    if missing:
        raise IntegrationError(
            f"llmcompressor {version} lacks what this integration builds on: {', '.join(missing)}"
        )
