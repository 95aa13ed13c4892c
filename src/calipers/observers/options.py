"""Options of observers: pydantic models, checked when an observer is built."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from loguru import logger
from pydantic import BaseModel, ConfigDict, ValidationError

__all__ = ["ObserverOptions", "build_options", "check_option_names"]


class ObserverOptions(BaseModel):
    """No options; the base of the options of every observer."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    #: Former names of options and the present ones: understood for one release, with a warning.
    former_names: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def names(cls) -> set[str]:
        """Every name by which an option can be given."""
        return {*cls.model_fields, *cls.former_names}


OptionsT = TypeVar("OptionsT", bound=ObserverOptions)


def build_options(owner: str, model: type[OptionsT], given: Mapping[str, Any]) -> OptionsT:
    """Check options and fill in defaults.

    Args:
        owner: Name of the observer, for errors.
        model: Its options.
        given: Option names and values.

    Raises:
        ValueError: An unknown option, with the valid ones listed; or a value of the wrong type or
            out of range, with what was expected; an option by its former and its present name.
    """
    check_option_names(owner, model, given)
    options = {model.former_names.get(name, name): value for name, value in given.items()}
    for old, new in model.former_names.items():
        if old in given and new in given:
            raise ValueError(f"{owner}: {old!r} is the former name of {new!r}: give one of them")
        if old in given:
            _warn_once(f"{owner}: option {old!r} is called {new!r} now; the next release drops it")
    try:
        return model(**options)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors()
        )
        raise ValueError(f"{owner}: invalid option: {problems}") from None


def check_option_names(owner: str, model: type[ObserverOptions], given: Iterable[str]) -> None:
    """Refuse options that there are not; a part of `build_options`.

    Raises:
        ValueError: An unknown option, with the valid ones listed.
    """
    known = list(model.model_fields)
    for name in given:
        if name not in model.names():
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            valid = ", ".join(known) if known else "none"
            raise ValueError(f"{owner}: unknown option {name!r}{hint}; valid options: {valid}")


@functools.cache
def _warn_once(problem: str) -> None:
    logger.warning(problem)
