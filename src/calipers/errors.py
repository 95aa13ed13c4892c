"""Errors that calipers raises about what it was given.

All of them are ValueErrors, so code that catches `ValueError` around a call keeps working. A
message names the argument or the modules, what was expected and what came.
"""

from __future__ import annotations

__all__ = [
    "CalipersError",
    "CheckpointError",
    "IntegrationError",
    "MissingDataError",
    "RankError",
    "SchemeError",
    "StatisticsError",
    "UnknownModuleError",
    "UnknownObserverError",
]


class CalipersError(ValueError):
    """Base of all errors that calipers raises about its input."""


class SchemeError(CalipersError):
    """A quantization scheme that a module, or the whole model, cannot take.

    Raised before any work: an unknown preset, a group size that does not divide a module's columns,
    a strategy that means nothing for a weight or an activation, a pattern that matches no module.
    One error lists every offending module.
    """


class MissingDataError(CalipersError):
    """Modules whose observers saw no value, so that no scale can be derived for them.

    Raised when a model is frozen. The message lists all such modules and the options that accept
    them.
    """


class CheckpointError(CalipersError):
    """A checkpoint that cannot be written: the model is not ready for it, or the place is taken."""


class IntegrationError(CalipersError):
    """Another library that calipers cannot work inside: missing, or of a version not known here."""


class RankError(CalipersError):
    """A rank that did not come, failed, or calibrates something else than the others.

    Raised on all ranks that still run. The message names the rank and the stage.
    """


class StatisticsError(CalipersError):
    """A statistics file that cannot be used: damaged, of another model, or without what is asked.

    The message names the file or the modules, and says what the file holds.
    """


class UnknownModuleError(CalipersError, KeyError):
    """A name of no quantized module, asked of a report."""

    __str__ = ValueError.__str__  # KeyError would print the message as a quoted literal


class UnknownObserverError(CalipersError, KeyError):
    """A name under which no observer is registered. The message lists the names that are."""

    __str__ = ValueError.__str__  # KeyError would print the message as a quoted literal
