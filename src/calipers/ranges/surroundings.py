"""`undisturbed`: results that autocast and inference mode around a call do not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["undisturbed"]

_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Run a block, or as `@undisturbed()` a function, without gradients, autocast, inference mode.

    Autocast would take matrix products in bfloat16. What is made in inference mode cannot be
    changed or differentiated through afterwards, and statistics outlive the call.
    """
    with torch.no_grad():
        if not torch.is_inference_mode_enabled() and not _autocast_devices():
            yield
            return
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())  # leaving that mode turns gradients on
            for device in _autocast_devices():
                stack.enter_context(torch.autocast(device, enabled=False))
            yield


def _autocast_devices() -> list[str]:
    """The kinds of devices under autocast just now."""
    return [device for device in _AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]
