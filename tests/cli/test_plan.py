"""`calipers plan`, and `calipers calibrate` with the file that it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from calipers.cli.plan import read_size
from calipers.errors import CalipersError
from cli.conftest import Calipers, error_of, succeeded


def test_from_a_model_to_a_mixed_checkpoint(
    calipers: Calipers, llama: Path, texts: Path, tmp_path: Path
) -> None:
    scheme, out = tmp_path / "scheme.yaml", tmp_path / "out"
    text = ["--data", texts / "text.txt", "--samples", 4, "--sequence-length", 16]
    given = ["--candidates", "W4A16,W8A16", "--group-size", 32, "--bits", 7, *text]
    result = succeeded(calipers("plan", llama, *given, "--out", scheme, "--json"))
    # float32: scales of 32 bits
    assert 5 < result["bits"] <= 7
    assert {each["scheme"] for each in result["units"]} == {"W4A16", "W8A16"}
    assert scheme.read_text(encoding="utf-8").startswith("# A plan of calipers")
    assert "exists" in error_of(calipers("plan", llama, *given, "--out", scheme))
    judged = ["--eval", texts / "text.txt"]
    made = succeeded(
        calipers("calibrate", llama, "--scheme", scheme, *text, *judged, "--out", out, "--json")
    )
    bits = {row["name"]: row["weight_bits"] for row in made["calibration"]["modules"]}
    assert bits == {
        name: int(each["scheme"][1]) for each in result["units"] for name in each["modules"]
    }
    (read,) = succeeded(calipers("evaluate", out, *judged, "--sequence-length", 16, "--json"))[
        "models"
    ]
    assert read["perplexity"]["value"] == pytest.approx(made["perplexity_after"], rel=1e-4)


def test_a_candidate_that_does_not_fit_is_left_out(
    calipers: Calipers, narrow: Path, texts: Path
) -> None:
    given = ["--data", texts / "text.txt", "--samples", 2, "--sequence-length", 16]
    given += ["--candidates", "W4A16,NVFP4A16", "--bytes", "1MB", "--sensitivity", "residual"]
    told = error_of(calipers("plan", narrow, *given))
    assert "bytes (--bytes): expected" in told
    given[given.index("--bytes") : given.index("--bytes") + 2] = ["--bits", 4.5]
    shown = calipers("plan", narrow, *given)
    assert shown.exit_code == 0, shown.output
    assert "group_size 128 does not divide 192 columns" in " ".join(shown.stdout.split())


def test_what_is_refused_before_the_model_is_read(calipers: Calipers, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert "one of --bits and --bytes" in error_of(calipers("plan", nowhere))
    unknown = calipers("plan", nowhere, "--bits", 5, "--candidates", "W4A61")
    assert "unknown scheme 'W4A61'" in error_of(unknown)
    assert "expected a size such as" in error_of(calipers("plan", nowhere, "--bytes", "9 apples"))


def test_sizes() -> None:
    assert read_size("90MB") == 90e6
    assert read_size("1.5 gb") == 1.5e9
    assert read_size("123") == 123
    with pytest.raises(CalipersError, match="expected a size"):
        read_size("-3MB")
