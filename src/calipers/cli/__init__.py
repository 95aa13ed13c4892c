"""The command `calipers`."""

from calipers.cli.app import app

__all__ = ["app"]
