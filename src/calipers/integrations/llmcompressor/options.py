"""Which of a recipe's options an observer gets that stands in for the one named there."""

from __future__ import annotations

from typing import Any

from compressed_tensors.quantization import QuantizationArgs
from loguru import logger

from calipers.errors import UnknownObserverError
from calipers.observers import Observer

__all__ = ["PREFIX", "options_for"]

#: In front of our names where llmcompressor has an observer of the same name.
PREFIX = "calipers_"


def options_for(cls: type[Observer], args: QuantizationArgs) -> dict[str, Any]:
    """The options that arguments hold for an observer of class `cls`.

    llmcompressor does not always build the observer that a recipe names: of weights it makes
    `minmax` and `mse` memoryless, and AWQ searches with min/max whatever is named. Options of the
    named observer that `cls` lacks are then left out. An option that neither knows stays in, so
    that it is the error that it would be anywhere else.
    """
    options = dict(args.observer_kwargs or {})
    if args.observer is None:
        return options
    mine = _known(cls)
    foreign = set(options) - mine
    try:
        name = args.observer.lower().replace("-", "_").replace(" ", "_").removeprefix(PREFIX)
        foreign &= _known(Observer.get_value_from_registry(name))
    except UnknownObserverError:
        pass  # some other library's: nothing says which options it has
    for option in sorted(foreign):
        logger.debug("{}: option {!r} is of {!r}, left out", cls.__name__, option, args.observer)
        del options[option]
    return options


def _known(cls: type[Observer]) -> set[str]:
    return cls.Options.names() | cls.ignored_options
