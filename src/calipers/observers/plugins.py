"""Observers of other packages and files: entry points, and modules named on the command line."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from compressed_tensors.registry import RegistryMixin

from calipers._words import did_you_mean
from calipers.errors import CalipersError, UnknownObserverError

if TYPE_CHECKING:
    from calipers.observers.base import Observer

__all__ = ["GROUP", "ObserverRegistry", "load_entry_points", "load_plugin", "spelled_as_registered"]

#: Entry points of this group name modules that register observers, or observer classes.
GROUP = "calipers.observers"

#: Files that were run, since their observers cannot be registered twice.
_files: dict[Path, ModuleType] = {}

#: What went wrong with each entry point that could not be loaded; None before any was tried.
_failures: list[str] | None = None


def load_entry_points() -> list[str]:
    """Import what installed packages offer under the entry-point group, once in a process.

    An entry point names a module, which registers its observers when it is imported, or an
    observer class, which is registered under the entry point's name. This happens the first time
    that an observer is looked up which is not known yet, or that observers are listed.

    Returns:
        A line for each that cannot be loaded, with its name, its package and the reason.
    """
    global _failures
    if _failures is None:
        _failures = []  # first, since a plugin may look up an observer while it is imported
        for point in importlib.metadata.entry_points(group=GROUP):
            try:
                _register(point.name, point.load())
            except Exception as error:  # whatever a package of somebody else does
                package = "" if point.dist is None else f" of {point.dist.name}"
                _failures.append(
                    f"plugin {point.name!r}{package} ({point.value}) cannot be loaded: "
                    f"{type(error).__name__}: {error}"
                )
    return _failures


def _register(name: str, loaded: Any) -> None:
    from calipers.observers.base import Observer

    if isinstance(loaded, type) and issubclass(loaded, Observer):
        known = [Observer.get_value_from_registry(each) for each in Observer.registered_names()]
        if loaded not in known:  # it may have registered itself
            Observer.register_value(loaded, name)
    elif not isinstance(loaded, ModuleType):
        raise TypeError(f"expected a module or an Observer class, got {type(loaded).__name__}")


def load_plugin(plugin: str) -> ModuleType:
    """Import a module that registers observers.

    Args:
        plugin: The path of a Python file, or the name of a module; modules in the current
            directory are found too. A file is run once in a process.

    Returns:
        The module.

    Raises:
        CalipersError: No such file or module, or an error in it; names the plugin.
    """
    is_file = plugin.endswith(".py") or "/" in plugin or os.sep in plugin
    try:
        return _import_file(Path(plugin)) if is_file else _import_module(plugin)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        if isinstance(error, FileNotFoundError) and is_file and not Path(plugin).is_file():
            told = "no such file"
        raise CalipersError(f"plugin {plugin}: {told}") from error


def _import_file(path: Path) -> ModuleType:
    path = path.expanduser().resolve(strict=True)
    if path in _files:
        return _files[path]
    name = path.stem if path.stem not in sys.modules else f"calipers_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickle and dataclasses look a module up by its name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _files[path] = module
    return module


def _import_module(name: str) -> ModuleType:
    here = os.getcwd()
    sys.path.append(here)  # last: no file of that directory hides an installed module
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(here)


def spelled_as_registered(name: str) -> str:
    """The name of an observer in lower case, with underscores."""
    return name.lower().replace("-", "_")


class ObserverRegistry(RegistryMixin):
    """The registry of `Observer`, which knows the observers of installed packages too."""

    @classmethod
    def get_value_from_registry(cls, name: str) -> type[Observer]:
        """The observer class registered under `name`.

        Where none is, packages that offer observers (entry points of the group
        "calipers.observers") are imported first.

        Raises:
            UnknownObserverError: A ValueError that lists the registered names, and packages whose
                observers could not be imported.
        """
        try:
            found: type[Observer] = super().get_value_from_registry(name)
        except KeyError:
            failures = load_entry_points()
            try:
                return super().get_value_from_registry(name)  # type: ignore[no-any-return]
            except KeyError:
                pass
            names = (*cls.registered_names(), *cls.registered_aliases())
            known = sorted(n.replace("-", "_") for n in names)
            near = did_you_mean(str(name).lower().replace("-", "_"), known)
            raise UnknownObserverError(
                " ".join(
                    [
                        f"unknown observer {name!r}.{near} Registered: {', '.join(known)}.",
                        *(f"{each}." for each in failures),
                    ]
                )
            ) from None
        return found

    @classmethod
    def load_from_registry(cls, name: str, *args: Any, **kwargs: Any) -> Observer:
        """Build the observer registered under `name`, in either form of construction.

        Raises:
            UnknownObserverError: A ValueError that lists the registered names.
        """
        return cls.get_value_from_registry(name)(*args, **kwargs)
