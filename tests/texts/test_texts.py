from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from calipers import texts
from calipers.errors import CalipersError
from calipers.texts import Document, calibration_texts, heldout_texts, read_documents

DATA = Path(texts.__file__).parent / "data"
DOCS = Path(__file__).parents[2] / "docs" / "texts.md"
PARTS = ("calibration", "heldout")
#: Raw bytes of a part, from and to.
SIZES = {"calibration": (600_000, 900_000), "heldout": (250_000, 350_000)}
#: Share of the raw bytes, from and to.
SHARES = {
    "english prose": (0.30, 0.42),
    "dialogue": (0.10, 0.20),
    "code": (0.15, 0.26),
    "table": (0.04, 0.10),
    "other languages": (0.17, 0.27),
}
LANGUAGES = {"en", "ar", "de", "es", "fr", "it", "ja", "ko", "ru", "zh"}


def group(document: Document) -> str:
    if document.kind != "prose":
        return document.kind
    return "english prose" if document.language == "en" else "other languages"


def size(text: str) -> int:
    return len(text.encode())


def shares(documents: list[Document]) -> dict[str, float]:
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[group(document)] += size(document.text)
    return {key: value / sizes.total() for key, value in sizes.items()}


@pytest.fixture(scope="module", params=PARTS)
def part(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def documents(part: str) -> list[Document]:
    return read_documents(part)  # type: ignore[arg-type]


def test_the_files_are_small() -> None:
    assert sum((DATA / f"{part}.jsonl.gz").stat().st_size for part in PARTS) <= 450 * 1024


def test_a_part_has_its_size(part: str, documents: list[Document]) -> None:
    low, high = SIZES[part]
    assert low <= sum(size(document.text) for document in documents) <= high


def test_documents_are_clean_text_of_moderate_length(documents: list[Document]) -> None:
    for document in documents:
        where = (document.source, document.text[:60])
        assert 400 <= size(document.text) <= 16_000, where
        assert document.text.endswith("\n"), where
        assert document.text.strip(), where
        assert "\ufffd" not in document.text, where
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]", document.text), where


def test_every_kind_has_its_share(documents: list[Document]) -> None:
    found = shares(documents)
    assert found.keys() == SHARES.keys()
    for kind, (low, high) in SHARES.items():
        assert low <= found[kind] <= high, (kind, found)


def test_the_first_third_is_a_mixture_too(documents: list[Document]) -> None:
    found = shares(documents[: len(documents) // 3])
    assert found.keys() == SHARES.keys()
    whole = shares(documents)
    for kind, share in found.items():
        assert share == pytest.approx(whole[kind], abs=0.08), kind


def test_both_parts_speak_these_languages(documents: list[Document]) -> None:
    prose = {document.language for document in documents if document.kind == "prose"}
    assert prose >= LANGUAGES


def test_both_parts_hold_several_programming_languages(documents: list[Document]) -> None:
    code = {document.language for document in documents if document.kind == "code"}
    assert code >= {"python", "c", "rust", "javascript", "sql", "shell"}


def test_scripts_are_those_of_the_languages(documents: list[Document]) -> None:
    blocks = {
        "ru": "[\u0430-\u044f]",
        "ar": "[\u0621-\u064a]",
        "zh": "[\u4e00-\u9fff]",
        "ja": "[\u3041-\u3096]",
    }
    for language, block in blocks.items():
        text = "".join(each.text for each in documents if each.language == language)
        assert len(re.findall(block, text)) > 0.3 * len(text), language


def passages(texts: list[str], length: int, step: int) -> set[str]:
    # White space is squeezed: the same passage with other line breaks is the same.
    squeezed = [" ".join(text.split()) for text in texts]
    return {
        text[start : start + length]
        for text in squeezed
        for start in range(0, max(1, len(text) - length + 1), step)
    }


def test_the_parts_share_no_long_passage() -> None:
    # A shared run of 200 characters holds a whole 100-character block of the coarser grid.
    coarse = passages(calibration_texts(), 100, 100)
    fine = passages(heldout_texts(), 100, 1)
    assert coarse & fine == set()


def test_no_document_comes_twice() -> None:
    every = calibration_texts() + heldout_texts()
    assert len(set(every)) == len(every)


def test_the_parts_share_no_source_but_the_written_one() -> None:
    sources = [{each.source for each in read_documents(part)} for part in PARTS]  # type: ignore[arg-type]
    assert sources[0] & sources[1] == {"written"}


@pytest.mark.parametrize("page", [DATA / "README.md", DOCS], ids=lambda page: page.name)
def test_every_source_is_listed_under_its_part(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    _, calibration, heldout = re.split(r"^## (?:Calibration|Held-out) sources$", text, flags=re.M)
    for part, section in zip(PARTS, (calibration, heldout), strict=True):
        listed = set(re.findall(r"^\| `([\w-]+)` \|", section, re.MULTILINE))
        assert listed == {each.source for each in read_documents(part)}  # type: ignore[arg-type]


def test_texts_are_those_of_the_documents() -> None:
    assert calibration_texts() == [each.text for each in read_documents("calibration")]
    assert heldout_texts() == [each.text for each in read_documents("heldout")]


def test_another_part_is_refused() -> None:
    with pytest.raises(
        CalipersError, match=r"part must be one of calibration, heldout, got 'train'"
    ):
        read_documents("train")  # type: ignore[arg-type]


@pytest.mark.slow
def test_importing_reads_no_data() -> None:
    code = (
        "import sys; opened = []\n"
        "def hook(event, args):\n"
        "    if event == 'open': opened.append(str(args[0]))\n"
        "sys.addaudithook(hook)\n"
        "import calipers.texts\n"
        "assert not [path for path in opened if path.endswith('.jsonl.gz')]\n"
        "calipers.texts.heldout_texts()\n"
        "print([path for path in opened if path.endswith('.jsonl.gz')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(texts.__file__).parents[2]), "PATH": ""},
    )
    assert done.stdout.count("heldout.jsonl.gz") == 1
    assert "calibration.jsonl.gz" not in done.stdout
