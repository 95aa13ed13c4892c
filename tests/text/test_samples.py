"""The fields of a sample, and the chat template."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from calipers.demo import MODEL_PATH
from calipers.errors import CalipersError
from calipers.text import read_batches

QUESTION, ANSWER = "Who jumps?", "The fox."
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]


def text_of(sample, tokenizer):
    (ids,) = read_batches([sample], tokenizer, sequence_length=200)
    return tokenizer.decode(ids[0])


@pytest.mark.parametrize(
    "sample",
    [
        {"messages": TURNS},
        {"prompt": QUESTION, "response": ANSWER},
        {"prompt": QUESTION, "completion": ANSWER},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"instruction": QUESTION, "output": ANSWER, "input": ""},
        {"instruction": QUESTION, "response": ANSWER, "context": None},
        {"question": QUESTION, "answer": ANSWER, "id": 7},
        {"text": None, "prompt": "unused", "messages": TURNS},
    ],
    ids=lambda sample: "-".join(sample),
)
def test_pairs_and_messages_go_through_the_template(sample, chatty):
    assert text_of(sample, chatty) == f"user: {QUESTION}\nassistant: {ANSWER}\n"


def test_an_instruction_takes_its_input_along(chatty, plain):
    sample = {"instruction": "Sort.", "input": "b a", "output": "a b"}
    assert text_of(sample, chatty) == "user: Sort.\n\nb a\nassistant: a b\n"
    assert text_of(sample, plain) == "Sort.\n\nb a\na b"


def test_pairs_without_a_template_are_joined(plain):
    assert text_of({"prompt": QUESTION, "response": ANSWER}, plain) == f"{QUESTION}\n{ANSWER}"


def test_text_comes_before_all_else(chatty):
    assert text_of({"text": "itself", "messages": TURNS}, chatty) == "itself"


def test_messages_without_a_template_are_an_error(plain):
    with pytest.raises(CalipersError, match=r"^data\[0\]: has messages, but .* no chat template"):
        read_batches([{"messages": TURNS}], plain, sequence_length=9)


@pytest.mark.parametrize("name", ["prompt", "response", "messages"])
def test_fields_of_another_type(name, chatty):
    sample = {"prompt": "x", "response": "y"} | {name: 3}
    if name == "messages":
        sample = {"messages": 3}
    with pytest.raises(CalipersError, match=rf"^data\[0\]: '{name}' must be a .*, got int"):
        read_batches([sample], chatty, sequence_length=9)


def test_what_the_template_refuses_names_the_sample():
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CalipersError, match=r"^data\[0\]: the chat template .* must alternate"):
        read_batches([{"messages": TURNS}], tokenizer, sequence_length=9)


def test_the_template_writes_the_only_bos():
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    bos = tokenizer.bos_token_id
    (ids,) = read_batches([QUESTION], tokenizer, sequence_length=99)
    assert ids[0].tolist().count(bos) == 1  # this tokenizer adds one
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (ids,) = read_batches([{"messages": TURNS}], tokenizer, sequence_length=99)
    assert ids[0].tolist().count(bos) == 1
