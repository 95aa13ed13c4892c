"""Quiet calls into transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["no_progress_bars"]


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Silences the bars of transformers for a while, leaving the user's settings as they were."""
    import huggingface_hub.utils
    from transformers.utils import logging

    hub: Any = huggingface_hub.utils  # these functions are public, but hidden from type checkers
    hub_was_off = hub.are_progress_bars_disabled()
    bars_were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars_were_on:
            logging.enable_progress_bar()
        if hub_was_off:
            hub.disable_progress_bars()
        else:
            hub.enable_progress_bars()
