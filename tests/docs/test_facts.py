"""What the pages state about options and defaults is what the code has."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from calipers import demo, texts
from calipers.cli import app
from calipers.observers import Observer
from calipers.texts import Document, read_documents
from calipers.verdict import _KINDS
from docs.pages import ROOT, read_table

README = ROOT / "README.md"
COMMAND_LINE = ROOT / "docs" / "command-line.md"


def shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def registered() -> dict[str, type[Observer]]:
    """The observers of the package, aliases included; tests register some of their own."""
    names = (*Observer.registered_names(), *Observer.registered_aliases())
    found = {name.replace("-", "_"): Observer.get_value_from_registry(name) for name in names}
    return {name: cls for name, cls in found.items() if cls.__module__.startswith("calipers.")}


def test_observer_table_of_the_readme() -> None:
    listed = {}
    for names, options, needs_data, summary in read_table(README.read_text("utf-8"), "name"):
        assert summary
        for name in re.findall(r"`(\w+)`", names):
            listed[name] = (re.findall(r"`(\w+)=([^`]+)`", options), needs_data)
    assert listed == {
        name: (
            [(option, shown(field.default)) for option, field in cls.Options.model_fields.items()],
            "yes" if cls.needs_data else "no",
        )
        for name, cls in registered().items()
    }


def test_rooms_of_the_readme_exist() -> None:
    rows = read_table(README.read_text("utf-8"), "room")
    rooms = [re.findall(r"`([^`]+)`", row[0])[0] for row in rows]
    assert len(rooms) == 18
    assert all((ROOT / room).is_dir() for room in rooms)


def test_the_way_from_a_tensor_to_a_checkpoint_is_short() -> None:
    rows = read_table(README.read_text("utf-8"), "file")
    files = [ROOT / re.findall(r"`([^`]+)`", row[0])[0] for row in rows]
    assert len(files) == 6
    assert sum(len(file.read_text("utf-8").splitlines()) for file in files) <= 1300


def test_links_of_the_readme_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text("utf-8"))
    assert links
    assert all((ROOT / link).exists() for link in links)


def commands() -> dict[str, typer.core.TyperCommand]:
    return typer.main.get_command(app).commands


def test_command_line_page_lists_the_commands() -> None:
    rows = read_table(COMMAND_LINE.read_text("utf-8"), "command")
    listed = [re.findall(r"`calipers (\w+)`", row[0])[0] for row in rows]
    assert listed == list(commands())


@pytest.mark.parametrize(
    "command",
    [
        "calibrate",
        "quantize",
        "evaluate",
        "compare",
        "report",
        "coverage",
        "demo",
        "observers",
        "schemes",
        "doctor",
    ],
)
def test_command_line_page_lists_the_options(command: str) -> None:
    _, section = COMMAND_LINE.read_text("utf-8").split(f"\n## calipers {command}\n")
    section = section.split("\n## ")[0]
    listed = []
    for name, default, summary in read_table(section, "option"):
        assert summary
        listed.append((name.strip("`").split(), default.strip("`")))
    options = [p for p in commands()[command].params if p.opts[0].startswith("--")]
    expected = []
    for option in options:
        value = option.metavar if option.metavar and not option.is_flag else None
        default = option.default() if callable(option.default) else option.default
        plain = "" if default is None or default is False or default == [] else str(default)
        expected.append(([option.opts[0], *([value] if value else [])], plain))
    assert listed == expected


def test_json_fields_of_the_command_line_page() -> None:
    """The fields are those that the tests of the command hold it to."""
    fields = importlib.import_module("cli.test_calibrate").FIELDS
    rows = read_table(COMMAND_LINE.read_text("utf-8"), "field")
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row[0])} == fields


def test_numbers_of_the_report_page() -> None:
    """Every number of a report that is no name stands on the page that explains them."""
    page = (ROOT / "docs" / "reading-a-report.md").read_text("utf-8")
    report = importlib.import_module("calipers.calibration.report")
    for kind in (report.WeightMeasures, report.ActivationMeasures, report.Stability):
        names = {each.name for each in dataclasses.fields(kind)} - {"limit"}
        told = {name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", page)}
        assert names <= told, kind


def test_names_of_other_versions_exist() -> None:
    page = (ROOT / "docs" / "coming-from-llmcompressor.md").read_text("utf-8")
    observers = importlib.import_module("calipers.observers")
    names = {name for row in read_table(page, "name") for name in re.findall(r"`(\w+)`", row[0])}
    assert len(names) > 5
    assert [name for name in names if not hasattr(observers, name)] == []


def test_sizes_of_the_demo_files() -> None:
    data = Path(demo.__file__).parent / "data"
    rows = read_table((ROOT / "docs" / "demo-model.md").read_text("utf-8"), "File")
    listed = {name.strip("`"): int(size.replace(",", "")) for name, size, _ in rows}
    assert listed == {name: (data / name).stat().st_size for name in listed}
    assert len(listed) == 4


def test_bands_are_those_of_the_verdict() -> None:
    rows = read_table((ROOT / "docs" / "evaluating.md").read_text("utf-8"), "kind of scheme")
    listed = {}
    for name, *cells in rows:
        shares = [float(cell.removesuffix("%")) / 100 for cell in cells[:3]]
        listed[name] = [*shares, *map(float, cells[3:])]
    assert listed == {
        kind.name: pytest.approx([*kind.perplexity, *kind.outputs]) for kind in _KINDS.values()
    }


TEXTS = (ROOT / "docs" / "texts.md").read_text("utf-8")
KINDS: dict[str, Callable[[Document], bool]] = {
    "English prose": lambda each: each.kind == "prose" and each.language == "en",
    "dialogue": lambda each: each.kind == "dialogue",
    "code": lambda each: each.kind == "code",
    "tables and records": lambda each: each.kind == "table",
    "prose in other languages": lambda each: each.kind == "prose" and each.language != "en",
}


def test_what_is_in_the_texts() -> None:
    listed = {name: cells for name, *cells in read_table(TEXTS, "")}
    for column, part in enumerate(("calibration", "heldout")):
        documents = read_documents(part)  # type: ignore[arg-type]
        sizes = [len(each.text.encode()) for each in documents]
        packed = Path(texts.__file__).parent / "data" / f"{part}.jsonl.gz"
        expected = {
            "documents": f"{len(documents)}",
            "bytes of UTF-8": f"{sum(sizes):,}",
            "bytes in the package": f"{packed.stat().st_size:,}",
        }
        for name, belongs in KINDS.items():
            size = sum(n for each, n in zip(documents, sizes, strict=True) if belongs(each))
            expected[name] = f"{100 * size / sum(sizes):.1f} %"
        for kind in ("prose", "code"):
            languages = {each.language for each in documents if each.kind == kind}
            expected[f"languages of {kind}"] = ", ".join(sorted(languages))
        assert {name: cells[column] for name, cells in listed.items()} == expected


def test_bytes_of_the_sources() -> None:
    _, *sections = re.split(r"^## (?:Calibration|Held-out) sources$", TEXTS, flags=re.MULTILINE)
    for part, section in zip(("calibration", "heldout"), sections, strict=True):
        sizes: dict[str, int] = {}
        for each in read_documents(part):  # type: ignore[arg-type]
            sizes[each.source] = sizes.get(each.source, 0) + len(each.text.encode())
        rows = read_table(section, "source")
        assert {row[0].strip("`"): int(row[-1].replace(",", "")) for row in rows} == sizes


@pytest.mark.slow
def test_what_so_many_tokens_tell() -> None:
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL_PATH)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_PATH)
    text = demo.CALIBRATION_TEXT.read_text("utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[0][: 64 * 256].view(64, 256)
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            seen = inputs.setdefault(name, [])
            module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
    with torch.no_grad():
        for batch in ids.split(8):
            model(batch)
    tokens = [torch.cat(seen).flatten(0, 1).float() for seen in inputs.values()]
    assert (len(tokens), len(tokens[0])) == (21, 16_384)
    generator = torch.Generator().manual_seed(0)
    rows = read_table((ROOT / "docs" / "experts.md").read_text("utf-8"), "tokens")
    assert len(rows) == 4
    for count, *figures in rows:
        found = []
        for value in tokens * 4:
            whole = value.square().mean(0)
            some = value[torch.randperm(len(value), generator=generator)[: int_of(count)]]
            error = (some.square().mean(0) - whole).abs() / whole
            largest = some.abs().max() / value.abs().max()
            found.append(torch.stack([error.median(), error.quantile(0.9), largest]))
        medians = torch.stack(found).median(0).values * 100
        for shown, figure in zip(figures, medians.tolist(), strict=True):
            assert int(shown.rstrip("%")) == pytest.approx(figure, abs=2)


def int_of(text: str) -> int:
    return int(text.replace(",", ""))
