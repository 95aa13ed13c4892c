"""Observers of calipers in llmcompressor's recipes: `install` once, recipes stay as they are."""

from calipers.integrations.llmcompressor.installation import (
    SUPPORTED_VERSIONS,
    Installation,
    install,
    uninstall,
)

__all__ = ["SUPPORTED_VERSIONS", "Installation", "install", "uninstall"]
