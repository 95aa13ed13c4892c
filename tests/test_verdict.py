"""`calipers.verdict`: a result in words, on each side of each band."""

from __future__ import annotations

import math

import pytest
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    preset_name_to_scheme,
)

from calipers.calibration import resolve_config
from calipers.verdict import _KINDS, kind_of, output_verdict, verdict

LEVELS = ("less than usual", "usual", "more than usual", "far more than usual")


def preset(name: str) -> QuantizationScheme:
    return preset_name_to_scheme(name, ["Linear"])


def weights(**args: object) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))


INT4_CHANNEL = weights(num_bits=4, strategy="channel")
#: A scheme of each kind of the table.
SCHEMES = {
    "w8a16": preset("W8A16"),
    "w8a8": preset("FP8"),
    "int4": preset("W4A16"),
    "int4 channel": INT4_CHANNEL,
    "int3": preset("W3A16"),
    "nvfp4": preset("NVFP4A16"),
    "nvfp4a4": preset("NVFP4"),
    "mxfp4a4": preset("MXFP4"),
}


def test_every_kind_has_a_scheme() -> None:
    assert {name: kind_of(scheme) for name, scheme in SCHEMES.items()} == {n: n for n in _KINDS}


@pytest.mark.parametrize("kind", _KINDS.values(), ids=_KINDS.keys())
def test_bands_grow(kind: object) -> None:
    for band in (kind.perplexity, kind.outputs):  # type: ignore[attr-defined]
        assert 0 <= band[0] < band[1] < band[2]


def level_of(text: str) -> str:
    """The level that a verdict speaks of: longest first, since "usual" is part of the others."""
    for level in ("far more than usual", "more than usual", "less than usual", "usual"):
        if f": {level} for " in text:
            return level
    raise AssertionError(text)


@pytest.mark.parametrize("name", SCHEMES)
def test_each_side_of_each_bound(name: str) -> None:
    scheme, kind = SCHEMES[name], _KINDS[name]
    for judge, bounds in ((verdict, kind.perplexity), (output_verdict, kind.outputs)):
        for number, bound in enumerate(bounds):
            below, above = judge(scheme, bound * 0.999, 0.0), judge(scheme, bound * 1.001, 0.0)
            if bound:
                assert level_of(below) == LEVELS[number]
                assert level_of(above) == LEVELS[number + 1]
            for text in (below, above):
                assert "\n" not in text
                assert text.endswith(".")


def test_the_figure_comes_first() -> None:
    assert verdict(preset("W4A16"), 0.05, 0.01).startswith("+5.0% perplexity: usual for int4")
    text = output_verdict(preset("W4A16"), 0.3, 0.002)
    assert text.startswith("output error 0.300 ± 0.002: less than usual for int4")
    assert output_verdict(preset("W4A16"), 0.3, None).startswith("output error 0.300: ")


# -- uncertainty -----------------------------------------------------------------------------


@pytest.mark.parametrize("change", [0.0199, -0.0199, 0.0])
def test_within_two_standard_errors_there_is_no_difference(change: float) -> None:
    text = verdict(preset("W4A16"), change, 0.01)
    assert text.startswith("no difference that this text shows: ")
    assert "within two standard errors (2.0%)" in text
    assert "Nothing to mend" in text


def test_a_difference_beyond_them_is_one() -> None:
    assert verdict(preset("W4A16"), 0.0201, 0.01).startswith("+2.0% perplexity: usual")
    assert verdict(preset("W4A16"), -0.0201, 0.01).startswith("-2.0% perplexity: better")


def test_too_little_text_is_no_good_news() -> None:
    """Within its uncertainty, but that reaches beyond what is usual."""
    text = verdict(preset("W4A16"), 0.3, 0.2)
    assert "too little text to tell" in text
    assert "Nothing to mend" not in text


def test_without_an_error_nothing_is_said_about_it() -> None:
    text = verdict(preset("W4A16"), 0.05, None)
    assert level_of(text) == "usual"
    assert "standard error" not in text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_broken(value: float) -> None:
    assert verdict(preset("W4A16"), value, value).startswith("broken: ")
    assert output_verdict(preset("W4A16"), value, None).startswith("broken: ")


# -- what to try -----------------------------------------------------------------------------

HESSIAN, OPTIMAL = "objective=hessian", "the observer `optimal`"
EIGHT = "8 bits for the modules"


@pytest.mark.parametrize(
    ("scheme", "change", "objective", "expected", "unexpected"),
    [
        (preset("W4A16"), 0.05, None, [OPTIMAL, "smaller groups"], [EIGHT, HESSIAN]),
        (preset("W4A16"), 0.05, "imatrix", [HESSIAN, "smaller groups"], [EIGHT]),
        (preset("W4A16"), 0.05, "hessian", ["smaller groups"], [HESSIAN]),
        (preset("W4A16"), 0.3, "hessian", ["more calibration data", EIGHT], [HESSIAN]),
        (preset("W4A16"), 0.9, None, ["calibration data of the kind", EIGHT], []),
        (INT4_CHANNEL, 0.1, None, ["groups of 128 weights or fewer"], ["smaller groups"]),
        (weights(num_bits=4, strategy="group", group_size=32), 0.1, None, [OPTIMAL], ["groups."]),
        (preset("NVFP4"), 0.05, None, ["activations of more bits"], ["groups"]),
        (preset("NVFP4A16"), 0.05, "hessian", ["Nothing to mend"], ["activations"]),
        (preset("FP8"), 0.5, None, ["`histogram`", "dynamic"], [EIGHT, HESSIAN]),
        (preset("W8A16"), 0.5, None, ["calibration data of the kind"], [EIGHT, HESSIAN]),
    ],
)
def test_next_steps_suit_the_scheme(
    scheme: QuantizationScheme,
    change: float,
    objective: str | None,
    expected: list[str],
    unexpected: list[str],
) -> None:
    text = verdict(scheme, change, 0.001, objective=objective)
    for each in expected:
        assert each in text
    for each in unexpected:
        assert each not in text


@pytest.mark.parametrize("name", ["W2A16", "W4A8", "W6A16", "W4A4"])
def test_what_was_not_measured_is_said(name: str) -> None:
    text = verdict(preset(name), 0.05, 0.001)
    assert "was not measured" in text
    assert " usual for int" not in text


def test_of_a_config_the_fewest_bits_count() -> None:
    mixed = QuantizationConfig(
        config_groups={
            "a": QuantizationScheme(targets=["re:.*o_proj"], weights=preset("W8A16").weights),
            "b": QuantizationScheme(targets=["Linear"], weights=preset("W4A16").weights),
        }
    )
    assert "int4 weights in groups" in verdict(mixed, 0.05, 0.001)
    assert verdict(resolve_config("W4A16"), 0.05, 0.001) == verdict(preset("W4A16"), 0.05, 0.001)
    assert verdict(resolve_config("UNQUANTIZED"), 0.0, 0.0).startswith("no difference")
