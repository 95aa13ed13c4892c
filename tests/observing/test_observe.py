"""`observe`, and what is calibrated from it: the same as from the data, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import nn

from architectures import llama, qwen3_moe
from calibration.tiny_models import picture, tiny_llama, tiny_moe, token_batches
from calipers import Statistics, StatisticsError, attach, calibrate, observe
from calipers.calibration.report import ModuleReport
from calipers.errors import CalipersError, MissingDataError, SchemeError
from calipers.observers import HistogramObserver, StaticMinMaxObserver
from observers.samples import logged


def ids(count: int = 3, seed: int = 3, sequences: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shape = (sequences, 17)
    return [{"input_ids": torch.randint(0, 128, shape, generator=generator)} for _ in range(count)]


def bfloat16() -> Any:
    return llama().to(torch.bfloat16)


def without_samples(rows: list[ModuleReport]) -> list[ModuleReport]:
    """The records without what is measured on tokens, of which a file holds none."""
    weights = [{name: p for name, p in row.plots.items() if name == "weight"} for row in rows]
    return [
        replace(row, activation_measures={}, plots=plots)
        for row, plots in zip(rows, weights, strict=True)
    ]


def assert_same(by_data: Any, by_file: Any, reports: tuple[Any, Any]) -> None:
    expected, found = by_data.state_dict(), by_file.state_dict()
    assert found.keys() == expected.keys()
    different = [k for k in expected if not torch.equal(expected[k].float(), found[k].float())]
    assert different == []
    of_data, of_file = reports
    assert without_samples(of_file.modules) == without_samples(of_data.modules)
    assert of_file.left_alone == of_data.left_alone
    assert of_file.batches == of_data.batches
    assert of_file.coverage == of_data.coverage
    assert of_file.tokens_counted == of_data.tokens_counted


@pytest.fixture(scope="module")
def gathered() -> Statistics:
    return observe(bfloat16(), ids(), histograms=True, outputs=True, queries=True, products=32)


CASES: list[tuple[str | None, dict[str, Any]]] = [
    ("W4A16", {"observer_options": {"objective": "imatrix"}}),
    ("W4A16", {"observer": "imatrix_mse"}),
    ("W4A16", {"observer": "memoryless_minmax"}),
    ("NVFP4A16", {"observer": "nvfp4_expanded_imatrix"}),
    (
        "W4A16",
        {"scheme_options": {"group_size": 32}, "observer_options": {"objective": "hessian"}},
    ),
    (
        "W4A16",
        {"scheme_options": {"group_size": 32}},
    ),
    ("FP8", {}),
    ("FP8", {"activation_observer": "histogram"}),
    ("NVFP4", {"observer_options": {"objective": "imatrix"}}),
    ("W8A8", {}),
    ("FP8", {"kv_cache": "fp8"}),
    ("FP8", {"kv_cache": "int8-head", "activation_observer": "histogram"}),
    ("FP8", {"kv_cache": "int8", "activation_observer": "histogram"}),
    (None, {"kv_cache": "fp8-head"}),
]


@pytest.mark.parametrize(("scheme", "options"), CASES)
def test_any_scheme_is_what_the_data_gives(
    scheme: str | None, options: dict[str, Any], gathered: Statistics
) -> None:
    by_data, by_file = bfloat16(), bfloat16()
    reports = (
        calibrate(by_data, scheme, data=ids(), **options),
        calibrate(by_file, scheme, statistics=gathered, **options),
    )
    assert_same(by_data, by_file, reports)


def test_other_data_gives_other_scales(gathered: Statistics) -> None:
    by_data, by_file = bfloat16(), bfloat16()
    calibrate(by_data, "FP8", data=ids(seed=4))
    calibrate(by_file, "FP8", statistics=gathered)
    expected, found = by_data.state_dict(), by_file.state_dict()
    assert any(not torch.equal(expected[k].float(), found[k].float()) for k in expected)


def test_outputs_and_groups_of_activations(gathered: Statistics) -> None:
    model = bfloat16()
    args = {
        "output": QuantizationArgs(num_bits=8, strategy="tensor"),
        "input": QuantizationArgs(num_bits=8, strategy="group", group_size=48),
    }
    layer = model.model.layers[1].mlp.down_proj
    observers, fed = (
        {f"model.layers.1.mlp.down_proj.{n}": StaticMinMaxObserver(n, a) for n, a in args.items()}
        for _ in range(2)
    )
    inputs, outputs = (fed[f"model.layers.1.mlp.down_proj.{n}"] for n in ("input", "output"))

    def see(module: nn.Module, given: Any, output: torch.Tensor) -> None:
        inputs.observe(given[0])
        outputs.observe(output)

    layer.register_forward_hook(see)
    with torch.no_grad():
        for batch in ids():
            model(**batch)
    states = gathered.states_for(observers)
    for name, observer in fed.items():
        expected = observer.state()
        assert states[name].keys() == expected.keys()
        for entry, value in expected.items():
            assert torch.equal(states[name][entry], value), (name, entry)
            assert states[name][entry].dtype == value.dtype
        observers[name].load_state(states[name])
        assert torch.equal(observers[name].get_qparams()[0], observer.get_qparams()[0])


def test_experts_one_by_one() -> None:
    few = ids(2, sequences=1)
    options = {"enough_tokens": 8, "on_missing": "fallback"}
    found = observe(qwen3_moe(), few, histograms=True, products=32)
    experts = [each for name, each in found.modules.items() if ".experts." in name]
    assert len({each.tokens for each in experts}) > 1
    for scheme in ("W4A16", "FP8"):
        by_data, by_file = qwen3_moe(), qwen3_moe()
        sized = {"scheme_options": {"group_size": 32}} if scheme == "W4A16" else {}
        reports = (
            calibrate(by_data, scheme, data=few, **options, **sized),
            calibrate(by_file, scheme, statistics=found, **options, **sized),
        )
        assert reports[0].coverage
        assert_same(by_data, by_file, reports)


def test_padding_is_left_out_and_counted() -> None:
    batches = ids()
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, 9:] = 0
    found = observe(bfloat16(), batches)
    by_data, by_file = bfloat16(), bfloat16()
    reports = (
        calibrate(by_data, "FP8", "imatrix_mse", batches),
        calibrate(by_file, "FP8", "imatrix_mse", statistics=found),
    )
    assert_same(by_data, by_file, reports)
    assert reports[1].tokens_given == 3 * 34
    assert reports[1].tokens_counted == 3 * 26
    assert {each.tokens for each in found.modules.values()} == {3 * 26}


class ReadsItsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain, self.read = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.plain(hidden) @ self.read.weight


def test_layers_that_are_never_called() -> None:
    data = [torch.randn(3, 32, generator=torch.Generator().manual_seed(1))]
    found = observe(ReadsItsWeight(), data)
    report = calibrate(ReadsItsWeight(), "FP8", "memoryless_minmax", statistics=found)
    assert {each.name: each.reason for each in report.left_alone} == {"read": "never called"}
    assert [each.name for each in report.modules] == ["plain"]


def test_modules_without_data_are_missing_as_they_are_with_data() -> None:
    data = [torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))]
    found = observe(tiny_moe((0, 1)), data)
    unseen = [name for name, each in found.modules.items() if not each.tokens]
    assert sorted({name.split(".")[3] for name in unseen}) == ["2", "3"]
    with pytest.raises(MissingDataError, match=r"experts\.2\.up_proj"):
        calibrate(
            tiny_moe((0, 1)), "FP8", "memoryless_minmax", statistics=found, on_few_tokens="own"
        )
    report = calibrate(
        tiny_moe((0, 1)),
        "FP8",
        "memoryless_minmax",
        statistics=found,
        on_few_tokens="own",
        on_missing="skip",
    )
    assert sorted(report.skipped) == sorted(unseen)


def test_the_model_stays_as_it_is() -> None:
    model = llama()
    before = picture(model)
    observe(model, ids(1), kv=True, histograms=True)
    assert picture(model) == before


def test_a_head_is_included_by_name() -> None:
    found = observe(tiny_llama(), token_batches(), include="lm_head", ignore="re:.*down_proj")
    assert "lm_head" in found.modules
    assert "model.layers.0.mlp.down_proj" not in found.modules
    with pytest.raises(StatisticsError, match=r"left alone when it was made: .*down_proj\.weight"):
        calibrate(tiny_llama(), "W4A16", statistics=found)


@pytest.mark.parametrize(
    ("options", "scheme", "message"),
    [
        (
            {"activation_observer": "minmax"},
            "FP8",
            "minmax: statistics files hold extremes and histograms",
        ),
        (
            {"activation_observer": "histogram"},
            "FP8",
            r"holds no histogram of it, only extremes: observe with histograms=True \(--histog",
        ),
        ({"observer_options": {"objective": "hessian"}}, "W4A16", r"holds none: .*--products 128"),
        ({"kv_cache": "fp8"}, "FP8", r"no states k of attention: observe with kv=True \(--kv\)"),
    ],
)
def test_what_the_file_lacks_is_said(options: dict[str, Any], scheme: str, message: str) -> None:
    found = observe(llama(), ids(1))
    model = llama()
    before = picture(model)
    with pytest.raises(StatisticsError, match=message):
        calibrate(model, scheme, statistics=found, **options)
    assert picture(model) == before


def test_products_of_other_groups_are_refused(gathered: Statistics) -> None:
    options = {"objective": "hessian"}
    message = r"groups of 64 columns, and the file holds those of 32 columns: .*--products 64"
    with pytest.raises(StatisticsError, match=message):
        calibrate(
            bfloat16(),
            "W4A16",
            statistics=gathered,
            observer_options=options,
            scheme_options={"group_size": 64},
        )


@pytest.mark.parametrize("products", [None, 32])
def test_without_products_that_fit_the_default_is_imatrix(products: int | None) -> None:
    found = observe(llama(), ids(), products=products)
    by_default, by_name = llama(), llama()
    with logged("WARNING") as lines:
        reports = (
            calibrate(by_default, "W4A16", statistics=found),
            calibrate(
                by_name, "W4A16", statistics=found, observer_options={"objective": "imatrix"}
            ),
        )
    assert_same(by_default, by_name, reports)
    assert {row.objective for row in reports[0].modules} == {"imatrix"}
    (line,) = [each for each in lines if "no products of inputs" in each]
    assert f"{len(reports[0].modules)} of the weights" in line


def test_products_that_fit_give_hessian_by_default() -> None:
    data = ids(9)
    found = observe(llama(), data, products=128)
    by_data, by_file = llama(), llama()
    reports = calibrate(by_data, "W4A16", data=data), calibrate(by_file, "W4A16", statistics=found)
    assert_same(by_data, by_file, reports)
    assert {row.objective for row in reports[1].modules} == {"hessian"}


def test_products_of_whole_rows() -> None:
    found = observe(llama(), ids(), products=0)
    by_data, by_file = llama(), llama()
    options: dict[str, Any] = {"observer_options": {"objective": "hessian"}}
    reports = (
        calibrate(by_data, "W8A8", data=ids(), observer="optimal", **options),
        calibrate(by_file, "W8A8", statistics=found, observer="optimal", **options),
    )
    assert_same(by_data, by_file, reports)


def test_data_and_shadows_beside_statistics_are_refused(gathered: Statistics) -> None:
    with pytest.raises(CalipersError, match="there cannot be data"):
        calibrate(bfloat16(), data=ids(), statistics=gathered)
    with pytest.raises(CalipersError, match="shadows"):
        calibrate(bfloat16(), statistics=gathered, shadow="mse")
    with pytest.raises(CalipersError, match="all_experts"):
        calibrate(bfloat16(), statistics=gathered, all_experts=True)


def test_another_model_is_refused(gathered: Statistics) -> None:
    with pytest.raises(StatisticsError, match="other names, shapes, dtypes or values"):
        calibrate(llama(), "FP8", statistics=gathered)  # float32
    trained = bfloat16()
    with torch.no_grad():
        trained.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    message = r"weights of 1 of 16 modules are others: model\.layers\.0\.self_attn\.q_proj"
    with pytest.raises(StatisticsError, match=message):
        calibrate(trained, "FP8", statistics=gathered)
    normed = bfloat16()
    with torch.no_grad():
        normed.model.norm.weight.mul_(1.5)
    with pytest.raises(StatisticsError, match="of another model"):
        calibrate(normed, "FP8", statistics=gathered)
    longer = bfloat16()
    longer.config.rms_norm_eps = 1e-3
    with pytest.raises(StatisticsError, match=r"rms_norm_eps is 1e-06 there, 0\.001 here"):
        calibrate(longer, "FP8", statistics=gathered)
    with pytest.raises(StatisticsError, match="LlamaForCausalLM there, Qwen3MoeForCausalLM here"):
        calibrate(qwen3_moe(), "FP8", statistics=gathered)


def test_queries_that_cannot_be_watched() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(SchemeError, match="hooks the attention of transformers models"):
        observe(model, [torch.ones(2, 4)], queries=True)


@pytest.mark.parametrize("products", [-1, True])
def test_no_such_width(products: Any) -> None:
    with pytest.raises(CalipersError, match="products"):
        observe(llama(), ids(1), products=products)


def test_a_calibration_loads_them(gathered: Statistics) -> None:
    with attach(bfloat16(), "FP8", activation_observer="histogram") as calibration:
        calibration.load(gathered)
        assert calibration.batches == 3
        observer = calibration.observed[0].observers["input"]
        assert isinstance(observer, HistogramObserver)
        assert observer.counts is not None
        assert int(observer.counts.sum()) == 3 * 34 * 128
        calibration.freeze()
