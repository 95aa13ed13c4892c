"""`observe`: data runs once, without a scheme, and what any scheme may ask for later is kept."""

from calipers.observing.observe import observe

__all__ = ["observe"]
