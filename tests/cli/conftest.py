"""A tiny random Llama on disk, texts, and a way to run the command on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner, Result

import architectures
from calipers.cli import app

SENTENCES = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen jugs.\n"
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"

Calipers = Callable[..., Result]


def train_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SENTENCES], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers directory: a random Llama of two layers, float32, and its tokenizer."""
    return save_llama(tmp_path_factory.mktemp("models") / "llama", hidden_size=128)


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `llama`, with 192 columns, which 128 does not divide."""
    return save_llama(tmp_path_factory.mktemp("models") / "narrow", hidden_size=192)


def save_llama(path: Path, hidden_size: int) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=320,
                hidden_size=hidden_size,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
            )
        )
    model.save_pretrained(path)
    train_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers directory: a random Qwen3-MoE of two layers with four experts each."""
    path = tmp_path_factory.mktemp("models") / "moe"
    with torch.random.fork_rng():
        model = architectures.spread_weights(architectures.qwen3_moe(vocab_size=320))
    model.save_pretrained(path)
    train_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT without a head and its tokenizer."""
    path = tmp_path_factory.mktemp("models") / "bert"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=320,
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
        BertModel(config).save_pretrained(path)
    train_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.txt, text.jsonl, chat.jsonl, short.jsonl and broken.jsonl."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "text.txt").write_text(SENTENCES * 40, encoding="utf-8")
    text = json.dumps({"text": SENTENCES * 2})
    (folder / "text.jsonl").write_text(f"{text}\n\n{text}\n{text}\n", encoding="utf-8")
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": SENTENCES}]
    chat = json.dumps({"messages": messages})
    (folder / "chat.jsonl").write_text(f"{chat}\n{chat}\n", encoding="utf-8")
    (folder / "wrong.jsonl").write_text(f'{text}\n{{"prompt": "hello"}}\n', encoding="utf-8")
    (folder / "broken.jsonl").write_text(f"{text}\n{{\n", encoding="utf-8")
    (folder / "empty.txt").write_text("", encoding="utf-8")
    return folder


@pytest.fixture
def calipers(monkeypatch: pytest.MonkeyPatch) -> Calipers:
    """Run the command in this process; streams are no terminals, and are kept apart."""
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)

    def run(*args: object) -> Result:
        return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)

    return run


def succeeded(result: Result) -> dict[str, Any]:
    """The JSON document that a command printed; it must have succeeded and printed nothing else."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def error_of(result: Result) -> str:
    """The message of a command that failed over its input; nothing may be on standard output."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    # transformers draws a bar of its own while it loads a model
    lines = [line for line in result.stderr.splitlines() if "Loading weights" not in line]
    head = next(i for i, line in enumerate(lines) if line.startswith("error: "))
    return "\n".join(lines[head:])
