"""`encode_sample`: the token ids of one sample, whatever its fields are called."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calipers.errors import CalipersError

__all__ = ["Sample", "encode_sample", "encode_text", "is_sample", "text_columns"]

#: Question and answer under the names that common datasets give them.
_PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)
#: The fields that make a sample whole; earlier ones come first where several are filled in.
_KINDS: tuple[tuple[str, ...], ...] = (("text",), ("messages",), *_PAIRS)
#: What an instruction is about; it may be missing.
_CONTEXTS = ("input", "context")
#: The fields of a sample, as errors name them.
_FIELDS = "'text' or 'messages', or 'prompt' and 'response'"


@dataclass(frozen=True)
class Sample:
    """One sample as it was found.

    Attributes:
        value: A string, or a mapping of fields.
        where: Its place, for errors: "chat.jsonl, line 3".
    """

    value: object
    where: str


def text_columns(names: Iterable[str], where: str, *, needed: bool = True) -> list[str]:
    """The columns of a table that hold samples.

    Raises:
        CalipersError: There are none, and some are `needed`; lists the columns.
    """
    names = list(names)
    if needed and not any(set(kind) <= set(names) for kind in _KINDS):
        raise CalipersError(
            f"{where}: expected a column {_FIELDS}, got the columns {', '.join(names) or 'none'}"
        )
    used = {name for kind in _KINDS for name in kind} | set(_CONTEXTS)
    return [name for name in names if name in used]


def is_sample(value: object) -> bool:
    """Whether a value is text rather than a batch: a string, or a mapping with fields of text."""
    if not isinstance(value, Mapping):
        return isinstance(value, str)
    whole = (all(name in value and _is_text(value[name]) for name in kind) for kind in _KINDS)
    # Strings alone are no batch either: `encode_sample` says which fields it expects.
    return any(whole) or (bool(value) and all(isinstance(each, str) for each in value.values()))


def _is_text(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(each, Mapping) for each in value)
    return value is None or isinstance(value, str)


def encode_sample(sample: Sample, tokenizer: Any, length: int) -> Tensor:
    """Token ids of a sample, int64, one dimension, at most `length`; none where it is empty.

    Raises:
        CalipersError: It is no sample, or has messages for which there is no chat template.
    """
    value, where = sample.value, sample.where
    if isinstance(value, str):
        return encode_text(value, tokenizer, length)
    if not isinstance(value, Mapping):
        raise CalipersError(
            f"{where}: expected an object with {_FIELDS}, got {type(value).__name__}"
        )
    kinds = [kind for kind in _KINDS if all(name in value for name in kind)]
    if not kinds:
        names = ", ".join(map(str, value)) or "none"
        raise CalipersError(f"{where}: expected an object with {_FIELDS}, got the fields {names}")
    for kind in kinds:
        if all(value[name] is not None for name in kind):
            return _encode_fields(kind, value, where, tokenizer, length)
    return torch.empty(0, dtype=torch.long)


def _encode_fields(
    kind: tuple[str, ...], fields: Mapping[str, Any], where: str, tokenizer: Any, length: int
) -> Tensor:
    if kind == ("text",):
        return encode_text(_string(fields, "text", where), tokenizer, length)
    if kind == ("messages",):
        return _encode_messages(_messages(fields, "messages", where), where, tokenizer, length)
    prompt, answer = kind
    if isinstance(fields[prompt], list) and isinstance(fields[answer], list):
        both = [*_messages(fields, prompt, where), *_messages(fields, answer, where)]
        return _encode_messages(both, where, tokenizer, length)
    asked, answered = _string(fields, prompt, where), _string(fields, answer, where)
    if prompt == "instruction":
        contexts = [fields[name] for name in _CONTEXTS if fields.get(name)]
        asked = "\n\n".join([asked, *map(str, contexts)])
    if not (asked.strip() or answered.strip()):
        return torch.empty(0, dtype=torch.long)
    if not getattr(tokenizer, "chat_template", None):
        return encode_text(f"{asked}\n{answered}", tokenizer, length)
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return _encode_messages(turns, where, tokenizer, length)


def _string(fields: Mapping[str, Any], name: str, where: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise CalipersError(f"{where}: {name!r} must be a string, got {type(value).__name__}")
    return value


def _messages(fields: Mapping[str, Any], name: str, where: str) -> list[Any]:
    value = fields[name]
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise CalipersError(
            f"{where}: {name!r} must be a list of objects with 'role' and 'content', "
            f"got {type(value).__name__}"
        )
    return value


def encode_text(text: str, tokenizer: Any, length: int | None = None, **options: Any) -> Tensor:
    """Token ids of a string, int64, one dimension; none where it is blank.

    Where they are cut to `length`, the special tokens that the tokenizer puts at the end stay
    there: an encoder has never seen a sequence without them.
    """
    if not text.strip():
        return torch.empty(0, dtype=torch.long)
    # It is cut here, so its length says nothing: no warning about the model's limit. The tokenizer
    # does not cut it: it would keep the length, and save it with a checkpoint.
    found = tokenizer(text, verbose=False, return_special_tokens_mask=True, **options)
    ids = torch.tensor(found["input_ids"], dtype=torch.long)
    if length is None or len(ids) <= length:
        return ids
    added = list(itertools.takewhile(bool, reversed(found["special_tokens_mask"])))
    kept = max(length - len(added), 0)
    return torch.cat([ids[:kept], ids[len(ids) - len(added) :]])[:length]


def _encode_messages(messages: list[Any], where: str, tokenizer: Any, length: int) -> Tensor:
    if not messages:
        return torch.empty(0, dtype=torch.long)
    if not getattr(tokenizer, "chat_template", None):
        raise CalipersError(f"{where}: has messages, but the tokenizer has no chat template")
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except ImportError:
        raise
    except Exception as error:  # whatever the template does with what it does not expect
        raise CalipersError(f"{where}: the chat template does not take it: {error}") from None
    # The template writes the special tokens itself; a second BOS would be one too many.
    return encode_text(text, tokenizer, length, add_special_tokens=False)
