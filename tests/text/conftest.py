"""A byte-level tokenizer, and the warnings that reading gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from loguru import logger
from transformers import PreTrainedTokenizerFast

from cli.conftest import train_tokenizer


@pytest.fixture(scope="session")
def chatty() -> PreTrainedTokenizerFast:
    """With a chat template: "role: content", a line each."""
    return train_tokenizer()


@pytest.fixture(scope="session")
def plain() -> PreTrainedTokenizerFast:
    """The same without a chat template."""
    tokenizer = train_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture
def warned() -> Iterator[list[str]]:
    messages: list[str] = []
    sink = logger.add(
        lambda message: messages.append(str(message).strip()), level="WARNING", format="{message}"
    )
    yield messages
    logger.remove(sink)
