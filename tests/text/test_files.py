"""`read_batches`: one set of samples in every kind of file, and files that are none."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from calipers.errors import CalipersError
from calipers.text import read_batches

TEXTS = ["The quick brown fox, he said.", "jumps\nover the lazy dog", 'a "quoted" word', "naïve"]
ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]


@pytest.fixture(autouse=True)
def no_bars() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write_jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def write_json(path: Path, rows: list[Any]) -> None:
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def write_json_of_data(path: Path, rows: list[Any]) -> None:
    path.write_text(json.dumps({"version": 1, "data": rows}), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:  # with the mark of Excel
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def save_dataset(path: Path, rows: list[dict[str, Any]]) -> None:
    datasets.Dataset.from_list(rows).save_to_disk(str(path))


def save_splits(path: Path, rows: list[dict[str, Any]]) -> None:
    whole = datasets.Dataset.from_list(rows)
    splits = {"test": whole.select([0]), "train": whole}
    datasets.DatasetDict(splits).save_to_disk(str(path))


KINDS: dict[str, tuple[str, Callable[[Path, list[Any]], None]]] = {
    "jsonl": ("some.jsonl", write_jsonl),
    "json": ("some.json", write_json),
    "json of data": ("some.json", write_json_of_data),
    "lines called json": ("some.json", write_jsonl),
    "csv": ("some.csv", write_csv),
    "parquet": ("some.PARQUET", write_parquet),
    "saved dataset": ("folder", save_dataset),
    "saved splits": ("folder", save_splits),
}


def texts_of(batches: list[Any], tokenizer: Any) -> list[str]:
    assert all(len(ids) == 1 for ids in batches)
    return [tokenizer.decode(ids[0]) for ids in batches]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_holds_the_same_samples(kind, plain, tmp_path, warned):
    name, write = KINDS[kind]
    write(tmp_path / name, ROWS)
    batches = read_batches(tmp_path / name, plain, sequence_length=100)
    assert texts_of(batches, plain) == TEXTS
    assert warned == []
    few = read_batches(str(tmp_path / name), plain, sequence_length=3, samples=2)
    assert [ids.tolist() for ids in few] == [ids[:, :3].tolist() for ids in batches[:2]]


@pytest.mark.parametrize("kind", ["jsonl", "json", "json of data", "parquet", "saved splits"])
def test_messages_in_every_kind_of_file(kind, chatty, tmp_path):
    name, write = KINDS[kind]
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]
    write(tmp_path / name, [{"messages": turns}] * 2)
    batches = read_batches(tmp_path / name, chatty, sequence_length=100)
    assert texts_of(batches, chatty) == ["user: hello\nassistant: you\n"] * 2


def test_splits_of_a_saved_dataset(plain, tmp_path):
    save_splits(tmp_path / "two", ROWS)
    save_dataset(tmp_path / "one", ROWS)
    datasets.DatasetDict({"only": datasets.Dataset.from_list(ROWS)}).save_to_disk(
        str(tmp_path / "only")
    )

    def count(name: str) -> int:
        return len(read_batches(tmp_path / name, plain, sequence_length=100))

    assert (count("two"), count("two:test"), count("only")) == (4, 1, 4)
    with pytest.raises(CalipersError, match=r"two: no split 'dev'; it has test, train$"):
        count("two:dev")
    with pytest.raises(CalipersError, match="one: is one dataset without splits"):
        count("one:test")
    with pytest.raises(CalipersError, match="none:test: no such file"):
        count("none:test")


def test_long_fields_of_csv(plain, tmp_path):
    """Longer than the module's own limit, which is left as it was."""
    write_csv(tmp_path / "long.csv", [{"text": "word " * 40_000}])
    limit = csv.field_size_limit()
    (ids,) = read_batches(tmp_path / "long.csv", plain, sequence_length=5)
    assert ids.shape == (1, 5)
    assert csv.field_size_limit() == limit


def test_a_text_is_read_with_any_line_ends(plain, tmp_path):
    for name, data in {"unix": b"one\ntwo\n", "dos": b"\xef\xbb\xbfone\r\ntwo\r\n"}.items():
        (tmp_path / f"{name}.txt").write_bytes(data)
    unix, dos = (
        read_batches(tmp_path / f"{name}.txt", plain, sequence_length=100)
        for name in ("unix", "dos")
    )
    assert [ids.tolist() for ids in unix] == [ids.tolist() for ids in dos]


# -- no more than wanted ---------------------------------------------------------------------


def test_lines_that_are_not_wanted_are_not_read(plain, tmp_path):
    for name in ("some.jsonl", "some.csv"):
        write = write_jsonl if name.endswith("jsonl") else write_csv
        write(tmp_path / name, ROWS)
        with (tmp_path / name).open("ab") as file:
            file.write(b"\xff\n" * 100_000)
        assert len(read_batches(tmp_path / name, plain, sequence_length=9, samples=4)) == 4
        with pytest.raises(CalipersError, match="not UTF-8"):
            read_batches(tmp_path / name, plain, sequence_length=9, samples=5)


def test_rows_of_parquet_that_are_not_wanted_are_not_read(plain, tmp_path, monkeypatch):
    path = tmp_path / "long.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["some words"] * 10_000}), path, row_group_size=100
    )
    read: list[int] = []
    rows_of = pyarrow.parquet.ParquetFile.iter_batches

    def counted(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for rows in rows_of(self, *args, **kwargs):
            read.append(len(rows))
            yield rows

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", counted)
    assert len(read_batches(path, plain, sequence_length=9, samples=70)) == 70
    assert 70 <= sum(read) <= 200


def test_values_that_are_not_wanted_are_not_asked_for(plain):
    endless = (f"sample {number}" for number in itertools.count())
    assert len(read_batches(endless, plain, sequence_length=9, samples=3)) == 3
    assert next(endless) == "sample 3"


def test_a_streamed_dataset_is_read_as_far_as_wanted(plain):
    def rows() -> Iterator[dict[str, str]]:
        yield from ({"text": text} for text in TEXTS)
        raise AssertionError("read too far")

    stream = datasets.IterableDataset.from_generator(rows)
    batches = read_batches(stream, plain, sequence_length=100, samples=4)
    assert texts_of(batches, plain) == TEXTS


# -- in Python -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        TEXTS,
        tuple(TEXTS),
        ROWS,
        pandas.Series(TEXTS),
        datasets.Dataset.from_list(ROWS),
        datasets.Dataset.from_list(ROWS).with_format("numpy"),
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}),
    ],
    ids=["list", "tuple", "rows", "series", "dataset", "formatted", "splits"],
)
def test_python_values(value, plain):
    assert texts_of(read_batches(value, plain, sequence_length=100), plain) == TEXTS


# -- what is left out ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_empty_samples_are_left_out_and_told_once(kind, plain, tmp_path, warned):
    name, write = KINDS[kind]
    texts = ["", "x", "some words", " \n", "some more", ""]
    write(tmp_path / name, [{"id": 1, "text": text} for text in texts])
    read = read_batches(tmp_path / name, plain, sequence_length=100)
    assert texts_of(read, plain) == ["some words", "some more"]
    (message,) = warned
    assert str(tmp_path / name) in message
    assert "left out 4 of 6 samples: empty, or shorter than two tokens" in message
    warned.clear()
    assert len(read_batches(tmp_path / name, plain, sequence_length=9, samples=1)) == 1
    assert "left out 2 of 3 samples" in warned[0]


def test_nothing_of_columns_is_an_empty_sample(plain, warned):
    rows = [{"text": None}, {"text": "some words"}, {"prompt": None, "response": "x"}]
    assert len(read_batches(rows, plain, sequence_length=9)) == 1
    assert warned == ["data: left out 2 of 3 samples: empty, or shorter than two tokens"]


def test_empty_samples_alone_are_an_error(plain):
    with pytest.raises(CalipersError, match="data: holds no sequence of at least two tokens"):
        read_batches(["", " "], plain, sequence_length=9)
    with pytest.raises(CalipersError, match="data: holds no sequence of at least two tokens"):
        read_batches([], plain, sequence_length=9)


# -- errors ----------------------------------------------------------------------------------

BAD_FILES = {
    "latin.txt": (b"caf\xe9", "latin.txt: not UTF-8: byte 0xe9 at position 3; save"),
    "latin.jsonl": (
        b'{"text": "some words"}\n{"text": "caf\xe9"}\n',
        "latin.jsonl: not UTF-8: byte 0xe9 at position 36; save",
    ),
    "latin.json": (b'["caf\xe9"]', "latin.json: not UTF-8: byte 0xe9 at position 5; save"),
    "latin.csv": (b"text\ncaf\xe9\n", "latin.csv: not UTF-8: byte 0xe9 at position 8; save"),
    "wide.txt": ("text".encode("utf-16"), "wide.txt: not UTF-8: byte 0xff at position 0; save"),
    "a.jsonl": (b'{"text": "some words"}\n{"text": "so\n', "a.jsonl, line 2: not JSON"),
    "b.jsonl": (b'\n{"prompt": "hello", "id": 1}\n', "b.jsonl, line 2: expected an object with"),
    "c.jsonl": (b"[1]\n", "c.jsonl, line 1: expected an object with 'text' or 'messages', or"),
    "d.jsonl": (b'{"text": 3}\n', "d.jsonl, line 1: 'text' must be a string, got int"),
    "e.jsonl": (
        b'{"messages": ["hello"]}\n',
        "e.jsonl, line 1: 'messages' must be a list of objects",
    ),
    "a.json": (b'[\n{"text": }]', "a.json, line 2: not JSON"),
    "b.json": (b'{"train": [1]}', "b.json: expected a list of samples, or an object with"),
    "c.json": (b'["some words", 3]', "c.json, sample 2: expected an object with"),
    "d.json": (b'{"text": "a b"}\n{"text": \n', "d.json, line 2: not JSON"),
    "a.csv": (b"id,body\n1,text\n", "a.csv: expected a column 'text' or 'messages', or 'prompt'"),
    "b.csv": (
        b'id,text\n1,"so it\nis"\n2,well, no\n',
        "b.csv, line 4: expected 2 fields, got 3; put a text with commas",
    ),
    "c.csv": (b'text\n"open', "c.csv, line 2: not CSV: unexpected end of data"),
    "d.csv": (b"", "d.csv: holds no sequence of at least two tokens"),
    "a.parquet": (b"PAR1 no", "a.parquet: not a parquet file"),
    "a.pdf": (b"", "a.pdf: expected a .txt, .csv, .json, .jsonl, .parquet file, or a folder"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_the_place(name, plain, tmp_path):
    data, expected = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CalipersError) as caught:
        read_batches(tmp_path / name, plain, sequence_length=9)
    assert str(caught.value).startswith(f"{tmp_path}/{expected}")


def test_columns_that_hold_no_text_are_listed(plain, tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"id": 1, "body": "x"}])
    save_dataset(tmp_path / "saved", [{"id": 1, "body": "x"}])
    for name in ("a.parquet", "saved"):
        with pytest.raises(CalipersError, match=rf"{name}: .* got the columns id, body$"):
            read_batches(tmp_path / name, plain, sequence_length=9)


def test_a_parquet_file_that_is_damaged_inside(plain, tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [{"text": text} for text in TEXTS] * 1000)
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)  # the first page's header
    path.write_bytes(data)
    with pytest.raises(CalipersError, match=r"a\.parquet: cannot be read: "):
        read_batches(path, plain, sequence_length=9)


def test_a_folder_that_is_no_dataset(plain, tmp_path):
    with pytest.raises(CalipersError, match="or a folder saved by datasets' save_to_disk"):
        read_batches(tmp_path, plain, sequence_length=9)
    (tmp_path / "state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CalipersError, match="no dataset that can be loaded"):
        read_batches(tmp_path, plain, sequence_length=9)


@pytest.mark.parametrize("value", [3, None, b"bytes", {"text": "one"}])
def test_values_that_are_no_samples(value, plain):
    with pytest.raises(CalipersError, match=f"data: expected .* got {type(value).__name__}"):
        read_batches(value, plain, sequence_length=9)


def test_a_bad_value_is_named_by_its_place(plain):
    with pytest.raises(CalipersError, match=r"^data\[1\]: expected an object with .* got int"):
        read_batches(["some words", 3], plain, sequence_length=9)
    with pytest.raises(CalipersError, match=r"^dataset: .* got the columns body$"):
        read_batches(datasets.Dataset.from_dict({"body": ["x"]}), plain, sequence_length=9)


def test_numbers_that_cannot_be(plain):
    with pytest.raises(CalipersError, match="sequence length: expected at least 2, got 1"):
        read_batches(["some words"], plain, sequence_length=1)
    with pytest.raises(CalipersError, match="samples: expected at least 1, got 0"):
        read_batches(["some words"], plain, sequence_length=9, samples=0)
    with pytest.raises(CalipersError, match="needs the model's tokenizer, got None"):
        read_batches(["some words"], None, sequence_length=9)


@pytest.mark.parametrize(
    ("name", "write", "module"),
    [("a.parquet", write_parquet, "pyarrow.parquet"), ("saved", save_dataset, "datasets")],
)
def test_a_missing_package_names_the_extra(name, write, module, plain, tmp_path, monkeypatch):
    write(tmp_path / name, ROWS)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CalipersError, match=r"needs the package .* pip install 'calipers\[data\]'"):
        read_batches(tmp_path / name, plain, sequence_length=9)
