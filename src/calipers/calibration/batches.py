"""Batches through a model in eval mode, each with the mask of its tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
from compressed_tensors.offload import get_execution_device
from compressed_tensors.offload.utils import send_tensors
from loguru import logger

from calipers.errors import CalipersError
from calipers.observers.masks import TokenMask

__all__ = [
    "BatchMask",
    "Progress",
    "eval_mode",
    "expect_batches",
    "find_mask",
    "no_cache",
    "number_of_batches",
    "run_batch",
    "run_batches",
    "uncompiled",
]

# stage, done, total (None where it is not known)
Progress: TypeAlias = Callable[[str, int, "int | None"], object]


def run_batches(
    model: torch.nn.Module,
    batches: Iterable[Any],
    progress: Progress | None = None,
    within: Callable[[object], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Run batches through the model without gradients.

    Args:
        model: Run in eval mode; every module's training flag is restored, also after an error.
        batches: Each one a mapping (called as `model(**batch)`, a transformers BatchEncoding
            included), a tensor (`model(batch)`), or a tuple or list (`model(*batch)`). Tensors
            are moved to the device that the model executes on.
        progress: Called as `progress("batches", done, total)` before the first batch and after
            each; `total` is None where `batches` has no length.
        within: Called with each batch, for a context that the model's call runs in.

    Raises:
        CalipersError: `batches` is itself one batch or text, or a batch is of another type.
    """
    expect_batches(batches)
    total = number_of_batches(batches)
    device = get_execution_device(model, torch.device("cpu"))
    with eval_mode(model), torch.no_grad(), uncompiled(model):
        if progress is not None:
            progress("batches", 0, total)
        for done, batch in enumerate(batches, start=1):
            with within(batch):
                run_batch(model, batch, device)
            if progress is not None:
                progress("batches", done, total)


def number_of_batches(batches: Iterable[Any]) -> int | None:
    """How many batches there are; None where that is not known."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except (TypeError, NotImplementedError):
        return None  # a DataLoader over an iterable dataset has a length only in name


def expect_batches(batches: object) -> None:
    """Refuse one batch, or text, in place of an iterable of batches.

    Raises:
        CalipersError: Says what came.
    """
    if isinstance(batches, (torch.Tensor, Mapping, str, bytes)) or not isinstance(
        batches, Iterable
    ):
        raise CalipersError(
            f"batches must be an iterable of batches, got {type(batches).__name__}; "
            "put a single batch into a list"
        )


def uncompiled(model: torch.nn.Module) -> AbstractContextManager[object]:
    """Runs what `Module.compile` compiled as it is written: observers must see each value."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
        return stance
    return nullcontext()


def no_cache(model: torch.nn.Module) -> dict[str, Any]:
    """The argument by which a forward fills no cache; none where it has no such argument."""
    caches = "use_cache" in inspect.signature(model.forward).parameters
    return {"use_cache": False} if caches else {}


def run_batch(
    model: torch.nn.Module,
    batch: object,
    device: torch.device | str,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Call the model with one batch, whose tensors are moved to the device.

    Args:
        model: The model.
        batch: As `run_batches` takes it.
        device: The device that the model executes on.
        options: More arguments of the model's forward, where the batch does not name them.

    Raises:
        CalipersError: The batch is of another type than `run_batches` takes.
    """
    more = dict(options or {})
    if isinstance(batch, Mapping):
        model(**{**more, **send_tensors(dict(batch), device=device)})
    elif isinstance(batch, torch.Tensor):
        model(send_tensors(batch, device=device), **more)
    elif isinstance(batch, (tuple, list)):
        model(*send_tensors(batch, device=device), **more)
    else:
        raise CalipersError(
            "a batch must be a mapping of arguments, a tensor, or a tuple or list of arguments, "
            f"got {type(batch).__name__}"
        )


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Every module in eval mode for a while; training flags are put back."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


_KEY = "attention_mask"


class BatchMask(NamedTuple):
    """The tokens of one batch.

    Args:
        mask: Which of them count; None where all do.
        given: Tokens of the batch, 0 where it carries no mask of its tokens.
        counted: Those that count.
    """

    mask: TokenMask | None = None
    given: int = 0
    counted: int = 0


def find_mask(batch: object, model: torch.nn.Module) -> BatchMask:
    """The mask of a batch.

    Args:
        batch: A mapping with "attention_mask" of shape (batch, tokens), not 0 where a token
            counts, and with another tensor that starts with that shape (input_ids). Any other
            mask says nothing about single tokens; it is left to the model.
        model: An encoder-decoder takes a mask of its encoder. Where its decoder has tokens of the
            same shape, nothing tells them apart: the mask is not used then, with a warning.
    """
    found = batch.get(_KEY) if isinstance(batch, Mapping) else None
    if not isinstance(batch, Mapping) or not isinstance(found, torch.Tensor) or found.dim() != 2:
        return BatchMask()
    alike = {
        key
        for key, value in batch.items()
        if isinstance(value, torch.Tensor) and key != _KEY and value.shape[:2] == found.shape
    }
    if not alike or (found.dtype != torch.bool and not bool((found >= 0).all())):
        return BatchMask()  # of other tokens, or additive
    decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True
    if decoder and (alike & {"decoder_input_ids", "decoder_inputs_embeds", "labels"}):
        logger.warning(
            "attention_mask not used: encoder and decoder have {} tokens a sequence each, so that "
            "nothing tells them apart; pad one of them to another length",
            found.shape[1],
        )
        return BatchMask()
    if bool((found != 0).all()):
        return BatchMask(None, found.numel(), found.numel())
    mask = TokenMask(found)
    return BatchMask(mask, found.numel(), mask.count)
