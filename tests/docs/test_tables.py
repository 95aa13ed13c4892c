"""Measured tables are those of the committed result files, and no other table looks measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.quality.plot import draw
from benchmarks.results import FOLDER, Result, Table, measured
from benchmarks.tables import MARK, pages, written
from docs.pages import ROOT

FILES = sorted(FOLDER.glob("*.json"))
FACTS = "tests/docs/test_facts.py::"
ATTENTION = "tests/checkpoint/test_attention.py::"
#: Tables that no benchmark fills, by page and head, and the test that holds their figures to the
#: code; None where there are only words.
UNMEASURED = {
    ("README.md", "name, options and defaults"): FACTS + "test_observer_table_of_the_readme",
    ("README.md", "room"): FACTS + "test_rooms_of_the_readme_exist",
    ("README.md", "file, what happens there"): FACTS
    + "test_the_way_from_a_tensor_to_a_checkpoint_is_short",
    ("docs/api/index.md", "name, is"): (
        "tests/docs/test_api_pages.py::test_the_front_page_names_the_public_names"
    ),
    ("docs/attention-and-cache.md", "word, format"): (
        "tests/calibration/test_schemes.py::test_words_for_a_cache"
    ),
    ("docs/attention-and-cache.md", "state"): (
        "tests/calibration/test_attention.py::"
        "test_a_state_that_no_batch_shows_is_an_error_that_names_it"
    ),
    ("docs/attention-and-cache.md", "name, shape"): ATTENTION
    + "test_a_cache_comes_back_to_the_last_bit",
    ("docs/attention-and-cache.md", "model, cache alone"): ATTENTION
    + "test_a_cache_comes_back_to_the_last_bit",
    ("docs/attention-and-cache.md", "model, why"): (
        "tests/calibration/test_attention.py::test_what_upstream_cannot_do_is_told_before_any_work"
    ),
    ("docs/choosing-an-observer.md", "what is quantized"): None,
    ("docs/coming-from-llmcompressor.md", "name, of, here"): FACTS
    + "test_names_of_other_versions_exist",
    ("docs/coming-from-llmcompressor.md", "llmcompressor, calipers, why"): None,
    ("docs/coming-from-llmcompressor.md", "package, versions"): None,
    ("docs/command-line.md", "command"): FACTS + "test_command_line_page_lists_the_commands",
    ("docs/command-line.md", "exit status"): None,
    ("docs/command-line.md", "option, default"): FACTS + "test_command_line_page_lists_the_options",
    ("docs/command-line.md", "`FILE`, holds"): None,
    ("docs/command-line.md", "fields"): None,
    ("docs/command-line.md", "field"): FACTS + "test_json_fields_of_the_command_line_page",
    ("docs/demo-model.md", "File, Bytes, Content"): FACTS + "test_sizes_of_the_demo_files",
    ("docs/evaluating.md", "kind of scheme"): FACTS + "test_bands_are_those_of_the_verdict",
    (
        "docs/experts.md",
        "model, names of an expert's layers",
    ): "tests/calibration/test_experts.py::test_all_of_them_are_quantized",
    (
        "docs/experts.md",
        "scheme, `from_pretrained`",
    ): "tests/checkpoint/test_experts.py::test_schemes_of_the_page_load_as_it_says",
    ("docs/experts.md", "experts, vLLM says"): None,
    ("docs/report-page.md", "part"): None,
    ("docs/report-page.md", "kind"): None,
    ("docs/experts.md", "`on_few_tokens`"): None,
    ("docs/experts.md", "tokens, error of the median column"): FACTS
    + "test_what_so_many_tokens_tell",
    ("docs/index.md", "word, meaning"): None,
    ("docs/numerics.md", "statistic, of, merged"): None,
    ("docs/performance.md", "engine, where, how"): None,
    (
        "docs/presets.md",
        "preset, weights",
    ): "tests/checkpoint/test_save.py::test_every_preset_is_documented",
    ("docs/presets.md", "with transformers 5.24"): None,
    (
        "docs/ranks.md",
        "word, statistics",
    ): "tests/distributed/test_calibrate.py::"
    "test_any_split_over_any_number_of_ranks_gives_the_same",
    (
        "docs/ranks.md",
        "groups",
    ): "tests/distributed/test_sharded.py::"
    "test_searches_are_gathered_only_where_groups_lie_in_several_shards",
    ("docs/reading-a-report.md", "number, says"): FACTS + "test_numbers_of_the_report_page",
    ("docs/reading-a-report.md", "`output_error_from`, of"): (
        "tests/calibration/test_measures.py::test_the_error_of_the_prediction_on_the_demo_model"
    ),
    (
        "docs/statistics-files.md",
        "statistics, of",
    ): "tests/statistics_files/test_file.py::test_what_a_linear_costs",
    ("docs/texts.md", ", calibration, held-out"): FACTS + "test_what_is_in_the_texts",
    ("docs/texts.md", "source, work"): FACTS + "test_bytes_of_the_sources",
    ("docs/tutorial.md", "reason, which"): None,
    ("docs/write-your-own-observer.md", "you override"): None,
}
#: A cell that is a figure: a number, perhaps with an uncertainty, a unit or a number of groups.
FIGURE = re.compile(r"[-+]?\d[\d,]*(\.\d+)?( ?(%|x|ms|s|MiB|MB|GB))?( (±|of) [\d.,]+ ?%?)?")


def tables(text: str) -> list[tuple[str | None, list[list[str]]]]:
    """The mark above each table, None without one, and its rows of cells, the head first."""
    # What stands in fences is no table.
    lines = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL).split("\n")
    found, at = [], 0
    while at < len(lines):
        end = at
        while end < len(lines) and lines[end].startswith("|"):
            end += 1
        if end - at > 1 and set(lines[at + 1]) <= set("|-: "):
            mark = lines[at - 1] if at and MARK.fullmatch(lines[at - 1]) else None
            rows = [line for line in lines[at:end] if line != lines[at + 1]]
            cells = [[c.strip() for c in line.strip().strip("|").split("|")] for line in rows]
            found.append((mark, cells))
        at = max(end, at + 1)
    return found


def complaints(page: str, text: str) -> list[str]:
    """What is wrong with the tables of a page that have no mark."""
    found = []
    for mark, (head, *rows) in tables(text):
        if mark is not None:
            continue
        title = ", ".join(head)
        keys = [key for key in UNMEASURED if key[0] == page and _begins(title, key[1])]
        if not keys:
            found.append(f"{page}: the table {title!r} has no mark and is not listed here")
        elif UNMEASURED[keys[0]] is None:
            figures = [cell for row in rows for cell in row[1:] if FIGURE.fullmatch(cell)]
            if figures:
                found.append(
                    f"{page}: the table {title!r} has figures that nothing tests: {figures}"
                )
    return found


def _begins(title: str, key: str) -> bool:
    return f"{title},".startswith(f"{key},")


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_marked_tables_are_those_of_the_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert written(text) == text, "`make doc-tables` writes it"


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_other_table_is_listed_with_its_test(page: Path) -> None:
    assert complaints(page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8")) == []


def test_the_listed_tables_and_tests_exist() -> None:
    for (page, key), test in UNMEASURED.items():
        heads = [", ".join(rows[0]) for _, rows in tables((ROOT / page).read_text("utf-8"))]
        assert any(_begins(head, key) for head in heads), (page, key)
        if test is not None:
            file, name = test.split("::")
            assert f"def {name}(" in (ROOT / file).read_text("utf-8"), test


def test_a_changed_figure_is_seen_and_written_back() -> None:
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    figure = re.search(r"^\| mse int4 g128 float32 \| ([\d,]+) \|", text, re.MULTILINE)
    assert figure is not None
    changed = text[: figure.start(1)] + "1" + text[figure.start(1) :]
    assert written(changed) != changed
    assert written(changed) == text


def test_a_table_without_a_mark_is_seen() -> None:
    table = "| engine | where | how |\n|---|---|---|\n| `native` | CPU | {} |\n"
    page = "docs/performance.md"
    assert complaints(page, table.format("C++: 8 lanes, sixteen groups")) == []
    for figure in ("12.5 ms", "0.82", "34.6x", "+39.5% ± 2.7%", "0 of 131,072", "5,231"):
        assert figure in complaints(page, table.format(figure))[0]
    (unknown,) = complaints(page, "| engine | s |\n|---|---|\n| `native` | fast |\n")
    assert "has no mark" in unknown


@pytest.mark.parametrize("mark", ["table: nothing.json#main", "table: optimal.json#nothing"])
def test_a_mark_without_its_table_is_an_error(mark: str) -> None:
    with pytest.raises(ValueError, match="nothing"):
        written(f"<!-- {mark} -->\n")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_result_says_where_it_comes_from(path: Path) -> None:
    found = Result.read(path)
    assert re.fullmatch("[0-9a-f]{7,40}", found.commit or ""), "of code that was committed"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found.date)
    assert re.search(r"\d cores? of an ", found.machine)
    assert "torch" in found.versions
    assert not re.search(r"(^|[\s\"'])/\w", path.read_text("utf-8")), "no absolute paths"
    used = [m["file"] for page in pages() for m in MARK.finditer(page.read_text("utf-8"))]
    assert path.name in used


def test_there_are_results() -> None:
    assert len(FILES) > 10


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = Table([["what", "what", "{}"], ["±", "pair", "{:.1f} ± {:.1f}"]], [{"what": "a"}])
    table.rows.append({"what": "b", "pair": [1.25, 0.5], "kept": None})  # type: ignore[attr-defined]
    arguments = ["--cases", "int4 g128", "--json", "out.json", "--out", str(tmp_path)]
    result = measured("benchmarks.x", arguments, {"main": table, "empty": Table([], [])})
    result.write(tmp_path / "out.json")
    assert Result.read(tmp_path / "out.json") == result
    assert result.command == f'python -m benchmarks.x --cases "int4 g128" --out {tmp_path.name}'
    assert list(result.tables) == ["main"]
    assert result.tables["main"].markdown("b").splitlines() == [
        "| what | ± |",
        "| --- | ---: |",
        "| b | 1.2 ± 0.5 |",
    ]


def test_the_plot_is_that_of_the_result() -> None:
    shown = (ROOT / "docs" / "output-error.svg").read_text("utf-8")
    assert shown == draw(Result.read(FOLDER / "minilm.json").tables["output-error"])
