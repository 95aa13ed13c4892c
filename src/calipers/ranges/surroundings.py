"""`undisturbed`: results that autocast and inference mode around a call do not change."""

from __future__ import annotations

from contextlib import ContextDecorator, ExitStack

import torch

__all__ = ["undisturbed"]

_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")


class undisturbed(ContextDecorator):
    """Run a block, or as `@undisturbed()` a function, without gradients, autocast, inference mode.

    Autocast would take matrix products in bfloat16. What is made in inference mode cannot be
    changed or differentiated through afterwards, and statistics outlive the call.
    """

    def __init__(self) -> None:
        self._stack: ExitStack | None = None

    def _recreate_cm(self) -> undisturbed:
        return undisturbed()  # a function may call itself, and threads call it at once

    def __enter__(self) -> None:
        inference, devices = torch.is_inference_mode_enabled(), _autocast_devices()
        if not (torch.is_grad_enabled() or inference or devices):
            return  # as inside of another one, of which there are several for each value
        with ExitStack() as stack:
            if inference:
                stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())  # leaving that mode turns gradients on
            for device in devices:
                stack.enter_context(torch.autocast(device, enabled=False))
            self._stack = stack.pop_all()

    def __exit__(self, *exception: object) -> None:
        if self._stack is not None:
            stack, self._stack = self._stack, None
            stack.__exit__(*exception)  # type: ignore[arg-type]


def _autocast_devices() -> list[str]:
    """The kinds of devices under autocast just now."""
    return [device for device in _AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]
