"""Options of observers: pydantic models, checked when an observer is built."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

__all__ = ["ObserverOptions", "build_options", "check_option_names"]


class ObserverOptions(BaseModel):
    """No options; the base of the options of every observer."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


OptionsT = TypeVar("OptionsT", bound=ObserverOptions)


def build_options(owner: str, model: type[OptionsT], given: Mapping[str, Any]) -> OptionsT:
    """Check options and fill in defaults.

    Args:
        owner: Name of the observer, for errors.
        model: Its options.
        given: Option names and values.

    Raises:
        ValueError: An unknown option, with the valid ones listed; or a value of the wrong type or
            out of range, with what was expected.
    """
    check_option_names(owner, model, given)
    try:
        return model(**given)
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
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            valid = ", ".join(known) if known else "none"
            raise ValueError(f"{owner}: unknown option {name!r}{hint}; valid options: {valid}")
