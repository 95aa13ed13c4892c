"""`expect_model`: a model, and not the name of one."""

from __future__ import annotations

from os import PathLike

from torch import nn

from calipers.errors import CalipersError

__all__ = ["expect_model"]


def expect_model(model: object, call: str) -> None:
    """Refuse what is no torch module.

    Args:
        model: What was given.
        call: How to write the call once the model is loaded.

    Raises:
        CalipersError: Says what came; for a path or a name, the line that loads a model.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, (str, PathLike)):
        raise CalipersError(
            f"model: expected a torch.nn.Module, got {str(model)!r}. Load it first:\n"
            "  from transformers import AutoModelForCausalLM\n"
            f"  model = AutoModelForCausalLM.from_pretrained({str(model)!r})\n"
            f"  {call}"
        )
    raise CalipersError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
