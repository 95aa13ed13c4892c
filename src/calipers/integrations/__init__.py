"""Observers of calipers inside other libraries, which are imported when a function is called."""

from calipers.integrations import llmcompressor

__all__ = ["llmcompressor"]
