"""optimal: what each objective minimises, the data it needs, negative scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import calipers
from calibration.tiny_models import tiny_llama, token_batches
from calipers.errors import CalipersError, MissingDataError
from calipers.observers import Observer, OptimalObserver, options
from observers.samples import BY_NAME, assert_same, assert_same_state, differs, logged, sample

GROUP = QuantizationArgs(num_bits=4, strategy="group", group_size=8)
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"strategy": "tensor"},
    "channel": {"strategy": "channel"},
    "group": {"strategy": "group", "group_size": 8},
    "group-ragged": {"strategy": "group", "group_size": 10},
    "block": {"strategy": "block", "block_structure": [4, 8]},
}


def linear(cols: int = 24, rows: int = 6) -> nn.Linear:
    module = nn.Linear(cols, rows, bias=False)
    with torch.no_grad():
        module.weight.copy_(sample((rows, cols)))
    return module


def inputs(cols: int = 24, seed: int = 0) -> Tensor:
    """Columns of different size, correlated."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator) / cols**0.5 + torch.eye(cols)
    return torch.randn(200, cols, generator=generator) @ mix * torch.linspace(0.2, 3, cols)


def seen(module: nn.Module, args: QuantizationArgs = GROUP, **options: Any) -> OptimalObserver:
    """An observer that has seen inputs of its module."""
    observer = Observer.load_from_registry("optimal", "weight", args, module, **options)
    assert isinstance(observer, OptimalObserver)
    observer.observe_input(inputs(module.weight.shape[-1]))
    return observer


def rest(weight: Tensor, scale: Tensor, zero_point: Tensor, args: QuantizationArgs) -> Tensor:
    return (fake_quantize(weight, scale, zero_point, args) - weight).double()


def square_error(weight: Tensor, scale: Tensor, args: QuantizationArgs) -> float:
    """Of int4, also with short last groups."""
    rows, columns = args.block_structure or (1, args.group_size or weight.shape[-1])
    by_value = scale.reshape(-1, scale.shape[-1]).repeat_interleave(rows, 0)
    by_value = by_value.repeat_interleave(columns, -1)[: len(weight), : weight.shape[-1]]
    return float(((weight / by_value).round().clamp(-8, 7) * by_value - weight).square().sum())


# -- data ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "objective"), [(3, "hessian"), (4, "hessian"), (8, "imatrix")])
def test_by_default_the_objective_goes_by_the_bits(bits: int, objective: str) -> None:
    module, args = linear(), GROUP.model_copy(update={"num_bits": bits})
    observer, named = seen(module, args), seen(module, args, objective=objective)
    assert observer.objective == named.objective == objective
    assert (observer.input_products is not None) == (objective == "hessian")
    assert_same(observer(module.weight), named(module.weight))


def test_by_default_hessian_needs_two_tokens_a_column() -> None:
    module = linear()
    observer = Observer.load_from_registry("optimal", "weight", GROUP, module)
    observer.observe_input(inputs()[:15])
    imatrix = Observer.load_from_registry("optimal", "weight", GROUP, module, objective="imatrix")
    imatrix.observe_input(inputs()[:15])
    assert observer.objective == "imatrix"
    assert_same(observer(module.weight), imatrix(module.weight))
    observer.observe_input(inputs()[15:16])
    hessian = Observer.load_from_registry("optimal", "weight", GROUP, module, objective="hessian")
    hessian.observe_input(inputs()[:15])
    hessian.observe_input(inputs()[15:16])
    assert observer.objective == "hessian"
    assert_same(observer(module.weight), hessian(module.weight))
    assert differs(observer(module.weight), imatrix(module.weight))


def test_by_default_products_may_be_missing() -> None:
    module = linear()
    imatrix = seen(module, objective="imatrix")
    observer = Observer.load_from_registry("optimal", "weight", GROUP, module)
    observer.load_state(imatrix.state())
    assert observer.objective == "imatrix"
    assert_same(observer(module.weight), imatrix(module.weight))
    observer.observe_input(inputs(seed=1))
    assert observer.input_products is None
    assert observer.num_input_tokens == 400
    named = Observer.load_from_registry("optimal", "weight", GROUP, module, objective="hessian")
    with pytest.raises(ValueError, match="input_products"):
        named.load_state(imatrix.state())


@pytest.mark.parametrize("objective", ["imatrix", "hessian"])
def test_missing_data_is_an_error_that_says_what_to_do(objective: str) -> None:
    module = linear()
    observer = Observer.load_from_registry("optimal", "weight", GROUP, module, objective=objective)
    assert observer.needs_data
    assert not observer.has_data
    with pytest.raises(MissingDataError, match=rf"Linear\.weight.*{objective}.*no input.*mse"):
        observer(module.weight)
    assert observer.get_qparams() == (None, None)
    observer.observe_input(inputs(16))
    with pytest.raises(MissingDataError, match=r"16 columns.*\(6, 24\)"):
        observer(module.weight)
    activation = Observer.load_from_registry("optimal", "input", BY_NAME["tensor-input"].args())
    with pytest.raises(MissingDataError, match="weights only"):
        activation(torch.ones(2, 3))


def test_mse_needs_no_data_and_sets_no_hook() -> None:
    module = linear()
    observer = Observer.load_from_registry("optimal", "weight", GROUP, module, objective="mse")
    assert not observer.needs_data
    assert observer.has_data
    observer.attach(module)
    assert not module._forward_pre_hooks
    alike = Observer.load_from_registry("optimal", "weight", GROUP, module, objective="imatrix")
    alike.observe_input(torch.ones(3, 24))
    assert_same(observer(module.weight), alike(module.weight))
    assert differs(observer(module.weight), seen(module)(module.weight))


def test_inputs_of_nothing_but_zeros_leave_the_range() -> None:
    module = linear()
    observer = Observer.load_from_registry("optimal", "weight", GROUP, module)
    observer.observe_input(torch.zeros(3, 24))
    plain = Observer.load_from_registry("memoryless_minmax", "weight", GROUP, module)
    assert_same(observer(module.weight), plain(module.weight))


# -- hessian ---------------------------------------------------------------------------------


def hessian_error(weight: Tensor, pair: tuple[Tensor, Tensor], args: QuantizationArgs) -> Tensor:
    """d'Hd of each row, with products of columns of one group (at most 24 here) alone."""
    width = weight.shape[1]
    if args.strategy == "group":
        width = args.group_size
    elif args.strategy == "block":
        width = args.block_structure[1]
    d = rest(weight, *pair, args)
    total = torch.zeros(weight.shape[0], dtype=torch.float64)
    for first in range(0, weight.shape[1], width):
        x = inputs(weight.shape[1])[:, first : first + width].double()
        total += (x @ d[:, first : first + width].T).square().sum(0)
    return total


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "group-ragged"])
def test_hessian_minimises_the_output_error(layout: str, symmetric: bool) -> None:
    args = QuantizationArgs(num_bits=3, symmetric=symmetric, **LAYOUTS[layout])
    module = linear(24, 40)
    with torch.no_grad():
        weight = module.weight.clone()
    found = seen(module, args, objective="hessian")(weight)
    plain = Observer.load_from_registry("memoryless_minmax", "weight", args, module)(weight)
    energy = seen(module, args)(weight)
    mine, others = (hessian_error(weight, pair, args) for pair in (found, plain))
    assert mine.sum() < others.sum()
    assert mine.sum() <= hessian_error(weight, energy, args).sum() * 1.001
    if layout in ("channel", "group"):
        assert (mine <= others * (1 + 1e-4)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hessian_of_the_identity_is_plain_squares(layout: str) -> None:
    """Inputs without correlation and of one size: the objective is that of mse."""
    args = QuantizationArgs(num_bits=4, **LAYOUTS[layout])
    module = linear()
    observer = Observer.load_from_registry("optimal", "weight", args, module, objective="hessian")
    observer.observe_input(torch.cat([torch.eye(24), -torch.eye(24)]) * 3)
    plain = Observer.load_from_registry("optimal", "weight", args, module, objective="mse")
    weight = module.weight.detach()
    found, expected = observer(weight)[0], plain(weight)[0]
    assert found.shape == expected.shape
    # Other candidates are tried, in groups not as many, so that another optimum may be found.
    error, best = square_error(weight, found, args), square_error(weight, expected, args)
    assert 0.99 * best < error < (1.08 if "group" in layout else 1.01) * best


def test_hessian_statistics_are_bounded_and_merge_exactly() -> None:
    module = linear()
    one = seen(module, objective="hessian")
    assert one.input_products.shape == (3, 1, 36)
    assert one.input_sketch.shape == (24, 25)
    left, right = (
        Observer.load_from_registry("optimal", "weight", GROUP, module, objective="hessian")
        for _ in range(2)
    )
    for batch in inputs()[:100].split(50):
        left.observe_input(batch)
    right.observe_input(inputs()[100:])
    left.merge(right)
    x = inputs().double()
    blocks = [x[:, i : i + 8].T @ x[:, i : i + 8] for i in (0, 8, 16)]
    row, column = torch.triu_indices(8, 8)
    expected = torch.stack([block[row, column] for block in blocks]).unsqueeze(1)
    torch.testing.assert_close(left.input_products, expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(left.input_sketch, one.input_sketch, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(left.input_sketch[:, -1], x.sum(0), rtol=1e-5, atol=1e-3)
    loaded = seen(module, objective="hessian")
    loaded.load_state(one.state())
    assert_same_state(loaded.state(), one.state())
    wide = QuantizationArgs(num_bits=4, strategy="channel")
    channel = seen(linear(1200, 4), wide, objective="hessian")
    assert channel.input_products.shape == (1, 3, 400 * 401 // 2)
    assert channel.input_sketch.shape == (1200, 32)


@pytest.mark.parametrize("layout", ["group", "channel"])
def test_hessian_lets_columns_make_up_for_each_other(layout: str) -> None:
    """Inputs that are not centred: the output's error is mostly that of its mean."""
    args = QuantizationArgs(num_bits=4, **LAYOUTS[layout])
    module = linear(24 if layout == "group" else 1200, 40)
    x = inputs(module.in_features).abs() + 1
    errors = {}
    for name in ("hessian", "without sketch", "imatrix"):
        objective = "imatrix" if name == "imatrix" else "hessian"
        observer = Observer.load_from_registry(
            "optimal", "weight", args, module, objective=objective
        )
        observer.observe_input(x)
        if name == "without sketch":
            observer.input_sketch.zero_()
        weight = module.weight.detach()
        left = rest(weight, *observer(weight), args).float()
        errors[name] = float((x @ left.T).square().sum())
    assert errors["hessian"] < 0.9 * errors["without sketch"], errors
    assert errors["hessian"] < 0.9 * errors["imatrix"], errors


def test_hessian_follows_g_idx() -> None:
    g_idx = torch.arange(24) % 3
    order = torch.argsort(g_idx, stable=True)
    module = linear()
    module.register_buffer("weight_g_idx", g_idx)
    ordered = linear()
    plain = Observer.load_from_registry("optimal", "weight", GROUP, ordered, objective="hessian")
    plain.observe_input(inputs()[:, order])
    observer = seen(module, objective="hessian")
    # The directions of a sketch are those of the columns as they stand.
    for each in (plain, observer):
        each.input_sketch.zero_()
    assert_same(observer(module.weight), plain(module.weight[:, order]))
    with pytest.raises(CalipersError, match=r"weight_g_idx.*\(6, 24\)"):
        seen(ordered, objective="hessian")(module.weight, g_idx)


@pytest.mark.parametrize("preset", ["NVFP4A16", "MXFP4A16", "FP8_BLOCK"])
def test_hessian_in_float_formats(preset: str) -> None:
    args = preset_name_to_scheme(preset, ["Linear"]).weights
    module = linear(64, 16).requires_grad_(False)
    observer = seen(module, args, objective="hessian")
    if args.strategy == "tensor_group":
        module.register_buffer("weight_global_scale", observer.get_global_scale(module.weight))
    scale, zero_point = observer(module.weight)
    plain = Observer.load_from_registry("memoryless_minmax", "weight", args, module)
    errors = []
    for s, z in ((scale, zero_point), plain(module.weight)):
        rounded = fake_quantize(
            module.weight, s, z, args, getattr(module, "weight_global_scale", None)
        )
        errors.append(float((inputs(64) @ (rounded - module.weight).T).square().sum()))
    assert errors[0] < errors[1] * 1.01


# -- negative scales -------------------------------------------------------------------------


def test_negative_scales_need_symmetric_integers() -> None:
    for args in (
        QuantizationArgs(num_bits=4, symmetric=False),
        QuantizationArgs(num_bits=8, type="float"),
    ):
        with pytest.raises(CalipersError, match="negative_scales=True needs symmetric integers"):
            Observer.load_from_registry("optimal", "weight", args, negative_scales=True)
    observer = seen(linear(), negative_scales=True)
    with pytest.raises(CalipersError, match="negative"):
        observer.get_min_max(sample((1, 6, 3, 8)))


@pytest.mark.parametrize("name", ["negative_scales", "signed"])
def test_negative_scales_go_through_a_checkpoint(name: str, tmp_path: Path) -> None:
    model = tiny_llama()
    batches = token_batches()
    options = {name: True}
    calipers.calibrate(model, "W4A16", "optimal", batches, observer_options=options)
    scales = [module.weight_scale for module in model.modules() if hasattr(module, "weight_scale")]
    assert any(bool((scale < 0).any()) for scale in scales)
    with torch.no_grad():
        expected = model(**batches[0]).logits
    calipers.save(model, tmp_path / "signed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "signed").eval()
    with torch.no_grad():
        found = loaded(**batches[0]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_signed_is_the_former_name_of_negative_scales() -> None:
    options._warn_once.cache_clear()
    with logged("WARNING") as lines:
        old, new = (seen(linear(), **{name: True}) for name in ("signed", "negative_scales"))
        seen(linear(), signed=True)
    assert old.options == new.options
    assert ["'signed' is called 'negative_scales' now" in line for line in lines] == [True]
    with pytest.raises(ValueError, match="'signed' is the former name of 'negative_scales'"):
        seen(linear(), signed=True, negative_scales=True)
    with pytest.raises(ValueError, match=r"valid options: negative_scales, objective$"):
        seen(linear(), singed=True)


# -- the rest --------------------------------------------------------------------------------


def test_optimal_range_gives_the_scale_back() -> None:
    value = BY_NAME["group"].value()
    observer = Observer.load_from_registry("optimal", GROUP, objective="mse")
    low, high = observer.get_min_max(value.reshape(1, 6, 3, 8))
    scale, zero_point = calculate_qparams(low, high, GROUP)
    expected, expected_zero = Observer.load_from_registry("optimal", GROUP, objective="mse")(value)
    torch.testing.assert_close(scale, expected, rtol=1e-6, atol=0)
    assert torch.equal(zero_point, expected_zero)


def test_global_scale_leaves_an_octave_above() -> None:
    case = BY_NAME["tensor_group"]
    observer = Observer.load_from_registry("optimal", "weight", case.args(), objective="mse")
    plain = Observer.load_from_registry("memoryless_minmax", "weight", case.args())
    value = case.value()
    assert torch.equal(observer.get_global_scale(value), plain.get_global_scale(value) / 2)


def test_calibrate_takes_it_by_default_where_there_is_data() -> None:
    for scheme, batches, objective in (
        ("W4A16", 32, "hessian"),
        ("W4A16", 1, "imatrix"),
        ("W8A16", 32, "imatrix"),
    ):
        report = calipers.calibrate(tiny_llama(), scheme, data=token_batches(batches))
        found = {(m.weight_observer, m.objective) for m in report.modules}
        assert found == {("optimal", objective)}
    report = calipers.calibrate(tiny_llama(), "NVFP4A16", data=token_batches())
    assert {m.weight_observer for m in report.modules} == {"optimal"}
