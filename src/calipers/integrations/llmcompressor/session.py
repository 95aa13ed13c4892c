"""What llmcompressor's session knows: the names of modules, and the loss mask of a batch.

Importing this module imports llmcompressor.
"""

from __future__ import annotations

import weakref

from llmcompressor.core import active_session
from torch import Tensor, nn

from calipers.observers.masks import TokenMask

__all__ = ["current_loss_mask", "name_of"]

_names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
#: The models whose modules are in `_names`.
_walked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def name_of(module: nn.Module, *, search: bool = False) -> str:
    """A module's name in the model of the session; its class where it is not part of one.

    With `search` the model is walked through again where the module was not in it before.
    """
    model = active_session().state.model
    unknown = search and module not in _names
    if isinstance(model, nn.Module) and (unknown or model not in _walked):
        _walked.add(model)
        _names.update({each: name for name, each in model.named_modules()})
    return _names.get(module) or type(module).__name__


#: The mask of the session that was asked for last, and what it says, ready to pick tokens.
_ready: tuple[Tensor | None, TokenMask | None] = (None, None)


def current_loss_mask() -> TokenMask | None:
    """Which tokens of the batch that runs count, with llmcompressor's `use_loss_mask`.

    llmcompressor hands "loss_mask" of its dataset (1 where a token counts) to its modifiers, and no
    `attention_mask`. None without one, and where all tokens count.
    """
    global _ready
    state = active_session().state
    masks, index = state.loss_masks, state.current_batch_idx
    if not masks or not 0 <= index < len(masks):
        return None
    source = masks[index]
    if source is None or source.dim() != 2:
        return None
    if _ready[0] is not source:
        mask = TokenMask(source == 1)
        _ready = source, mask if mask.count < source.numel() else None
    return _ready[1]
