"""`undisturbed`: results that autocast and inference mode around a call do not change."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

import torch

__all__ = ["undisturbed"]

Given = ParamSpec("Given")
Found = TypeVar("Found")


def undisturbed(function: Callable[Given, Found]) -> Callable[Given, Found]:
    """Run a function without gradients, outside of autocast and of inference mode.

    Autocast would take matrix products in bfloat16. What is made in inference mode cannot be
    changed or differentiated through afterwards, and statistics outlive the call.
    """

    @functools.wraps(function)
    def wrapped(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            for device in _autocast_devices():
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return wrapped


def _autocast_devices() -> list[str]:
    """The kinds of devices under autocast just now."""
    kinds = {"cpu"}
    if torch.accelerator.is_available():
        kinds.add(torch.accelerator.current_accelerator().type)  # type: ignore[union-attr]
    return [kind for kind in kinds if torch.is_autocast_enabled(kind)]
