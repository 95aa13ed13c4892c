"""Several observers on one tensor: one pass, errors on held-out values, and the best of them."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    fake_quantize,
)
from torch import Tensor, nn

from calibration.test_offload import offloaded
from calibration.tiny_models import hidden_batches, picture, tiny_llama, tiny_moe, token_batches
from calipers import CalibrationReport, CalipersError, MissingDataError, attach, calibrate
from calipers.calibration import ModuleReport, ShadowReport
from calipers.calibration.held_out import TOKENS, Samples, is_held_out
from calipers.calibration.shadows import Shadows
from calipers.observers import Observer
from calipers.observers.hooks import Seen
from calipers.observers.input_moments import InputMoments
from observers.samples import logged

HESSIAN = "optimal:objective=hessian"


def qparams(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if "scale" in n or "zero_point" in n}


def linear(columns: int = 64, rows: int = 8, seed: int = 0, bias: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(columns, rows, bias=bias))


def inputs(count: int, columns: int = 64, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 5, columns, generator=generator) for _ in range(count)]


def seen_batches(batches: list[Any]) -> list[Any]:
    return [batch for number, batch in enumerate(batches) if number % 8 != 1]


def errors(report: CalibrationReport, name: str, base_name: str) -> dict[str, float | None]:
    return {row.observer: row.error for row in report[name].shadows[base_name]}


def chosen(report: CalibrationReport, name: str, base_name: str = "weight") -> str:
    (found,) = [row.observer for row in report[name].shadows[base_name] if row.chosen]
    return found


@pytest.mark.parametrize(
    ("scheme", "more"),
    [
        ("W4A16", {"shadow": ("memoryless_minmax", "imatrix_mse", HESSIAN)}),
        ("NVFP4", {"shadow": ("imatrix_mse",), "activation_shadow": ("nvfp4_headroom",)}),
        ("FP8", {"shadow": "memoryless_minmax", "activation_shadow": ("histogram", "mse")}),
        ("FP8", {"shadow": "memoryless_minmax", "observer": HESSIAN.partition(":")[0]}),
        (None, {"kv_cache": "FP8_HEAD", "activation_shadow": ("histogram",)}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_observer_gives_what_it_gives_alone(
    scheme: str | None, more: dict[str, Any], dtype: torch.dtype
) -> None:
    batches = token_batches(11)
    model, alone = tiny_llama().to(dtype), tiny_llama().to(dtype)
    report = calibrate(model, scheme, data=batches, **more)
    shadows = ("shadow", "activation_shadow")
    rest = {key: value for key, value in more.items() if key not in shadows}
    plain = calibrate(alone, scheme, data=seen_batches(batches), **rest)
    expected = qparams(alone)
    assert expected
    assert list(qparams(model)) == list(expected)
    for name, value in qparams(model).items():
        assert torch.equal(value, expected[name]), name
    assert (report.batches, report.held_out) == (11, 2)
    assert (plain.batches, plain.held_out) == (9, 0)
    for row, other in zip(report, plain, strict=True):
        assert (row.weight_observer, row.weight_error) == (
            other.weight_observer,
            other.weight_error,
        )
        assert row.tokens == other.tokens
        assert other.shadows == {}
        for rows in row.shadows.values():
            assert [each.chosen for each in rows] == [True] + [False] * (len(rows) - 1)
            assert {each.judged_by for each in rows} == {"held-out"}
            assert all(each.error is not None and 0 < each.error < 0.1 for each in rows)


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "W8A16"])
def test_errors_of_weights_are_those_of_plain_float64(scheme: str) -> None:
    model = linear(256, 128)
    batches = inputs(3, 256)
    report = calibrate(model, scheme, "memoryless_minmax", batches, shadow="optimal")
    own = errors(report, "0", "weight")
    held_out = batches[1].reshape(-1, 256).double()
    weight = model[0].weight.detach().double()
    for observer in ("memoryless_minmax", "optimal"):
        other = linear(256, 128)
        data = seen_batches(batches)
        calibrate(other, scheme, observer, data)
        rounded = fake_quantize(
            other[0].weight,
            other[0].weight_scale,
            getattr(other[0], "weight_zero_point", None),
            other[0].quantization_scheme.weights,
            getattr(other[0], "weight_global_scale", None),
        ).double()
        error = (held_out @ (weight - rounded).T).square().sum()
        expected = error / (held_out @ weight.T).square().sum()
        assert own[observer] == pytest.approx(float(expected), rel=1e-5)
    assert own["optimal"] != own["memoryless_minmax"]


def test_errors_of_static_inputs_are_those_of_plain_float64() -> None:
    batches = inputs(3)
    batches[2] *= 3
    report = calibrate(
        linear(),
        "FP8",
        "memoryless_minmax",
        batches,
        shadow="memoryless_mse",
        activation_shadow="memoryless_minmax",
    )
    held_out = batches[1].double()
    expected = {}
    for name, amax in (
        ("static_minmax", torch.stack([batches[0], batches[2]]).abs().max()),
        ("memoryless_minmax", batches[2].abs().max()),
    ):
        scale = amax / 448
        codes = (batches[1] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        rounded = (codes.float() * scale).double()
        expected[name] = float((rounded - held_out).square().sum() / held_out.square().sum())
    assert errors(report, "0", "input") == pytest.approx(expected, rel=1e-4)


def test_without_data_weights_are_judged_by_themselves() -> None:
    model = tiny_llama()
    report = calibrate(model, "W4A16", shadow="memoryless_mse", pick="best")
    assert (report.batches, report.held_out) == (0, 0)
    for row in report:
        rows = row.shadows["weight"]
        assert [each.observer for each in rows] == ["memoryless_minmax", "memoryless_mse"]
        assert {each.judged_by for each in rows} == {"weight"}
        (best,) = [each for each in rows if each.chosen]
        assert best is min(rows, key=lambda each: each.error)
        assert best.error == pytest.approx(row.weight_error**2)
        assert row.weight_observer == best.observer


def both_kinds() -> tuple[nn.Module, list[Tensor]]:
    """Two layers: in one the largest weights meet the largest inputs, in the other zeros."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"large": nn.Linear(128, 16), "idle": nn.Linear(128, 16)})
    batches = inputs(3, 128)
    for batch in batches:
        batch[..., 0] = 50 * batch[..., 0].sign()
        batch[..., 1] = 0
    with torch.no_grad():
        model["large"].weight[:, 0] = 1.0
        model["idle"].weight[:, 1] = 1.0

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = model

        def forward(self, x: Tensor) -> Tensor:
            return self.both["large"](x) + self.both["idle"](x)

    return Both(), batches


@Observer.register("test_shadows_quarter")
class Quarter(Observer):
    """A quarter of the range: ruins the largest values, and is finer for all others."""

    def get_min_max(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        return observed.amin(dim=(0, -1)) / 4, observed.amax(dim=(0, -1)) / 4


@pytest.mark.parametrize("order", [("memoryless_minmax", "test_shadows_quarter"), None])
def test_the_best_of_each_module_is_written(order: tuple[str, str] | None) -> None:
    """In one module the chosen one wins, in the other the shadow, whichever is chosen."""
    first, other = order or ("test_shadows_quarter", "memoryless_minmax")
    model, batches = both_kinds()
    report = calibrate(model, "W4A16", first, batches, shadow=other, pick="best")
    assert chosen(report, "both.large") == "memoryless_minmax"
    assert chosen(report, "both.idle") == "test_shadows_quarter"
    for observer, name in (("memoryless_minmax", "large"), ("test_shadows_quarter", "idle")):
        alone, _ = both_kinds()
        plain = calibrate(alone, "W4A16", observer)
        assert report[f"both.{name}"].weight_observer == observer
        assert report[f"both.{name}"].weight_error == plain[f"both.{name}"].weight_error
        for what in ("weight_scale", "weight_zero_point"):
            expected = getattr(alone.both[name], what)
            assert torch.equal(getattr(model.both[name], what), expected)
    # one scheme for all: layers that engines fuse must have the same
    recorded = {str(model.both[name].quantization_scheme.weights) for name in ("large", "idle")}
    assert len(recorded) == 1
    assert model.both["large"].quantization_scheme.weights.observer is None


def test_the_best_of_each_activation_is_written() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(64))
        model[0].bias.fill_(0)
    # grows in the last batch, which the held-out one does not show
    batches = [*inputs(2), inputs(1)[0] * 30]
    kwargs = {"activation_observer": "static_minmax", "activation_shadow": "test_shadows_first"}
    report = calibrate(model, int8_static(), None, batches, pick="best", **kwargs)
    assert chosen(report, "0", "input") == "test_shadows_first"
    assert report["0"].activation_observer == "test_shadows_first"
    expected = batches[0].abs().max() / 127.5
    assert model[0].input_scale.item() == pytest.approx(float(expected), rel=1e-6)
    own = errors(report, "0", "input")
    assert own["test_shadows_first"] < own["static_minmax"] / 10


def int8_static() -> QuantizationScheme:
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="tensor")
    return QuantizationScheme(targets=["Linear"], input_activations=args)


@Observer.register("test_shadows_first")
class FirstBatch(Observer):
    """The range of the first batch alone."""

    def get_min_max(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        own = getattr(self, "_own", None) or (
            observed.amin(dim=(0, -1)),
            observed.amax(dim=(0, -1)),
        )
        self._own = own
        return own


@pytest.mark.parametrize("pick", ["first", "best"])
def test_fused_layers_share_a_global_scale_and_an_observer(pick: str) -> None:
    model = tiny_llama(2)
    shadows = ("memoryless_minmax", "nvfp4_expanded_imatrix")
    report = calibrate(
        model,
        "NVFP4",
        data=token_batches(4),
        shadow=shadows,
        activation_shadow="nvfp4_headroom",
        pick=pick,
        # of so few tokens the products say little
        observer_options={"objective": "imatrix"},
    )
    winners = set()
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for parent, names in (
            ("self_attn", ("q_proj", "k_proj", "v_proj")),
            ("mlp", ("gate_proj", "up_proj")),
        ):
            full = [f"{prefix}.{parent}.{name}" for name in names]
            for base_name in ("weight", "input"):
                own = [getattr(model.get_submodule(n), f"{base_name}_global_scale") for n in full]
                assert all(torch.equal(each, own[0]) for each in own)
                (winner,) = {chosen(report, name, base_name) for name in full}
                labels = list(errors(report, full[0], base_name))
                sums = [sum(errors(report, n, base_name)[label] for n in full) for label in labels]
                expected = labels[sums.index(min(sums))] if pick == "best" else labels[0]
                assert winner == expected
                winners.add(winner)
    assert len(winners) > 2 or pick == "first"
    assert bool(model(**token_batches(1)[0]).logits.isfinite().all())


def test_one_pass_and_inputs_are_fed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear(64, 8)
    calls, fed = [], []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x: calls.append(1) or forward(x))
    observe = InputMoments.observe
    monkeypatch.setattr(
        InputMoments,
        "observe",
        lambda self, *args: (fed.append(self), observe(self, *args))[1],
    )
    scheme = "W4A16"
    options = {"group_size": 64}
    shadows = ("imatrix_mse", HESSIAN, "optimal:negative_scales=true")
    with attach(model, scheme, observer="optimal", shadow=shadows, scheme_options=options) as run:
        run.run(iter(inputs(10)))
        (own,) = run.observed
        moments = {id(each.moments) for each in own.tensors["weight"].observers}
        report = run.freeze()
    assert len(calls) == 10
    assert len(fed) == 8
    assert len(moments) == 1
    assert report["0"].tokens == 80
    assert len(report["0"].shadows["weight"]) == 4


def test_an_observer_that_takes_inputs_in_its_own_way_is_fed_by_itself() -> None:
    model = linear(64, 8)
    shadows = ("imatrix_mse", "test_shadows_own_way")
    kwargs = {"observer": "optimal", "shadow": shadows, "scheme_options": {"group_size": 64}}
    with attach(model, "W4A16", **kwargs) as run:
        run.run(inputs(3))
        first, second, third = run.observed[0].tensors["weight"].observers
        assert first.moments is second.moments
        assert third.moments is not first.moments
        assert first.num_input_tokens == third.num_input_tokens == 20
        assert third.calls == 2
        run.freeze()


@Observer.register("test_shadows_own_way")
class OwnWay(Observer.get_value_from_registry("imatrix_mse")):  # type: ignore[misc]
    calls = 0

    def observe_input(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        self.calls += 1
        super().observe_input(inputs, mask)


def test_one_batch_alone_is_judged_in_sample_and_the_report_says_so() -> None:
    model = linear()
    options = {"group_size": 64}
    report = calibrate(
        model, "W4A16", data=inputs(1), shadow="memoryless_minmax", scheme_options=options
    )
    assert (report.batches, report.held_out) == (1, 0)
    assert {row.judged_by for row in report["0"].shadows["weight"]} == {"in-sample"}
    assert "in-sample error" in str(report)
    alone = linear()
    calibrate(alone, "W4A16", data=inputs(1), scheme_options=options)
    assert torch.equal(model[0].weight_scale, alone[0].weight_scale)


@pytest.mark.parametrize(("batches", "told"), [(1, False), (2, True), (3, True), (4, False)])
def test_a_large_share_held_out_is_said(batches: int, told: bool) -> None:
    with logged("WARNING") as messages:
        calibrate(linear(), "FP8", data=inputs(batches), shadow="memoryless_minmax")
    expected = [f"1 of {batches} batches held out to judge observers by"] if told else []
    assert [each.partition(": they")[0] for each in messages] == expected


def test_batches_held_out() -> None:
    assert [n for n in range(30) if is_held_out(n)] == [1, 9, 17, 25]


@pytest.mark.parametrize("held_out", [1, 2, 3, 7, 16, 17, 40, 200])
def test_samples_are_few_and_evenly_spread(held_out: int) -> None:
    samples = Samples(["input"])
    for number in range(held_out * 8):
        samples.begin_batch(number)
        values = torch.arange(100.0) + 100 * number
        samples.see(Seen("input", values.reshape(4, 25, 1), 100, False))
        samples.see(Seen("output", values.reshape(4, 25, 1), 100, False))
        samples.end_batch()
    sample = samples.of("input")
    assert sample is not None
    assert sample.held_out
    assert TOKENS // 3 <= len(sample.tokens) <= TOKENS
    assert samples.of("output") is None
    batches = (sample.tokens[:, 0] / 100).floor().unique()
    assert len(batches) >= min(held_out, 8)
    gaps = batches.diff()
    assert len(gaps.unique()) <= 1
    assert batches.min() == 1
    assert batches.max() >= 0.8 * held_out * 8 - 8


def test_tokens_of_a_state_keep_their_heads() -> None:
    samples = Samples(["k"])
    samples.begin_batch(1)
    state = torch.arange(2 * 3 * 5 * 4.0).reshape(2, 3, 5, 4)  # batch, heads, tokens, head_dim
    samples.see(Seen("k", state, 10, False))
    samples.see(Seen("k", state[1], 5, False))  # tokens were left out: heads, tokens, head_dim
    samples.end_batch()
    sample = samples.of("k")
    assert sample is not None
    expected = [state[b, :, t] for b in range(2) for t in range(5)]
    expected += [state[1, :, t] for t in range(5)]
    assert torch.equal(sample.tokens, torch.stack(expected))


def test_a_batch_that_fails_leaves_no_sample() -> None:
    samples = Samples(["input"])
    samples.begin_batch(1)
    samples.see(Seen("input", torch.ones(3, 2), 3, False))
    samples.undo_batch()
    samples.end_batch()
    assert samples.of("input") is None
    samples.begin_batch(1)
    samples.see(Seen("input", torch.tensor([[1.0, math.nan], [1.0, 2.0]]), 2, False))
    samples.end_batch()
    assert samples.of("input").tokens.tolist() == [[1.0, 2.0]]  # type: ignore[union-attr]


def test_padding_judges_nobody() -> None:
    model = tiny_llama()
    batches = token_batches(3)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    seen: list[Tensor] = []
    name = "model.layers.0.mlp.gate_proj"
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    with attach(model, "W4A16", shadow="mse") as run:
        run.run([{**batch, "attention_mask": mask} for batch in batches])
        (own,) = [each for each in run.observed if each.name == name]
        assert torch.equal(own.samples.of("input").tokens, seen[1][mask.bool()])
        assert own.tokens == 2 * 13
    hook.remove()


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_models_are_judged_alike(where: str, tmp_path: Path) -> None:
    models = tiny_llama(), offloaded(tiny_llama(), where, tmp_path / "weights")
    shadows = {"shadow": ("memoryless_minmax", "imatrix_mse"), "activation_shadow": "histogram"}
    plain, report = (
        calibrate(each, "NVFP4", data=token_batches(3), pick="best", **shadows) for each in models
    )
    assert plain.modules == report.modules
    for name, value in qparams(models[0]).items():
        assert torch.equal(models[1].get_parameter(name).float(), value.float()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_kept_in_the_dtype_they_came_in(dtype: torch.dtype) -> None:
    with attach(linear(64, 8).to(dtype), "FP8", shadow="mse") as run:
        run.run([each.to(dtype) for each in inputs(2)])
        assert run.observed[0].samples.of("input").tokens.dtype == dtype


def test_a_failed_batch_counts_nowhere_and_the_next_takes_its_number() -> None:
    model = linear()
    options = {"group_size": 64}
    with attach(model, "W4A16", shadow="imatrix_mse", scheme_options=options) as run:
        good = inputs(3)
        for batch in (good[0], torch.ones(2, 5, 63), good[1], good[2]):
            try:
                run.run([batch])
            except RuntimeError:
                assert batch.shape[-1] == 63
        (own,) = run.observed
        assert run.batches == 3
        assert own.tokens == 20
        assert torch.equal(own.samples.of("input").tokens, good[1].reshape(-1, 64))
        assert run.freeze().held_out == 1


def test_failures_lose_nothing_and_detach_removes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, again = tiny_llama(), tiny_llama()
    kwargs = {
        "shadow": ("imatrix_mse", "test_shadows_hooks"),
        "activation_shadow": ("histogram",),
        "pick": "best",
    }
    run = attach(model, "FP8", observer="optimal", **kwargs)
    run.run(token_batches(4))
    tensors = [tensor for each in run.observed for tensor in each.tensors.values()]
    states = [copy.deepcopy(o.state()) for tensor in tensors for o in tensor.observers]
    with monkeypatch.context() as patched:
        count = iter(range(100))

        def fail(self: Observer) -> None:
            if next(count) == 20:
                raise RuntimeError("no")

        patched.setattr(Observer, "post_calculate_qparams", fail)
        with pytest.raises(RuntimeError, match="no"):
            run.freeze()
    after = [o.state() for tensor in tensors for o in tensor.observers]
    for mine, others in zip(states, after, strict=True):
        assert mine.keys() == others.keys()
        assert all(torch.equal(mine[key], others[key]) for key in mine)
    report = run.freeze()
    expected = calibrate(again, "FP8", data=token_batches(4), **kwargs)
    assert [row.shadows for row in report] == [row.shadows for row in expected]
    run.detach()
    assert not [module for module in model.modules() if isinstance(module, Observer)]
    other = tiny_llama()
    before = picture(other)
    run = attach(other, "FP8", **kwargs)
    run.run(token_batches(2))
    run.detach()
    assert picture(other) == before


@Observer.register("test_shadows_hooks")
class Hooks(Observer):
    """Sets hooks of its own."""

    def attach(self, module: nn.Module) -> None:
        self.handle = module.register_forward_hook(lambda *_: None)

    def detach(self, module: nn.Module) -> None:
        self.handle.remove()

    def get_min_max(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        return observed.amin(dim=(0, -1)), observed.amax(dim=(0, -1))


def test_modules_without_data_have_a_fallback_and_shadows_that_can() -> None:
    model = tiny_moe((0,))
    report = calibrate(
        model,
        "FP8",
        "imatrix_mse",
        hidden_batches(4),
        on_missing="fallback",
        shadow=("optimal", "memoryless_minmax"),
        activation_shadow="histogram",
        pick="best",
        on_few_tokens="own",
    )
    starved = report["layers.0.experts.1.up_proj"]
    rows = starved.shadows["weight"]
    assert [row.observer for row in rows] == ["imatrix_mse", "optimal", "memoryless_minmax"]
    assert [row.error is None for row in rows] == [False, True, False]
    assert {row.judged_by for row in rows} == {"weight"}
    assert [row.error for row in starved.shadows["input"]] == [None, None]
    assert "input" in starved.fallback


def test_experts_of_few_tokens_lend_shadows_what_the_first_is_lent() -> None:
    model, alone, batches = tiny_moe((0, 1)), tiny_moe((0, 1)), hidden_batches(4)  # of 4 experts
    options = {"on_missing": "fallback", "enough_tokens": 50}
    shadows = {"shadow": "optimal", "activation_shadow": "histogram", "pick": "best"}
    report = calibrate(model, "FP8", "imatrix_mse", batches, **shadows, **options)
    plain = calibrate(alone, "FP8", "optimal", seen_batches(batches), **options)
    winners = {}
    for row, other in zip(report, plain, strict=True):
        assert row.shared == other.shared > 0
        winners[row.name] = chosen(report, row.name)
        rows = row.shadows["weight"]
        assert all(each.error is not None for each in rows)
        if winners[row.name] == "optimal":
            scales = [each.get_submodule(row.name).weight_scale for each in (model, alone)]
            assert torch.equal(*scales)
        # ranges and counts of few values cannot be compared with those of a whole layer
        assert row.shadows["input"][1].error is None
        assert chosen(report, row.name, "input") == "static_minmax"
    assert "optimal" in winners.values()
    unseen = report["layers.0.experts.3.up_proj"]
    assert unseen.tokens == 0
    assert [row.judged_by for row in unseen.shadows["weight"]] == ["weight", "weight"]


def test_embeddings_have_no_inputs() -> None:
    model = tiny_llama()
    scheme = embedding_and_linear()
    report = calibrate(
        model, scheme, data=token_batches(3), shadow=("imatrix_mse", "memoryless_mse")
    )
    own = report["model.embed_tokens"].shadows["weight"]
    assert [row.observer for row in own] == ["memoryless_minmax", "memoryless_mse"]
    assert {row.judged_by for row in own} == {"weight"}
    rows = report["model.layers.0.mlp.up_proj"].shadows["weight"]
    assert [row.observer for row in rows] == ["optimal", "imatrix_mse", "memoryless_mse"]


def embedding_and_linear() -> QuantizationScheme:
    args = QuantizationArgs(num_bits=8, type="int", strategy="channel")
    return QuantizationScheme(targets=["Linear", "Embedding"], weights=args)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"shadow": "mze"}, "unknown observer 'mze'. Did you mean 'mse'"),
        ({"shadow": "mse:grit=3"}, r"shadow 'mse': unknown option 'grit' \(did you mean 'grid'"),
        ({"shadow": "mse:grid"}, "shadow 'mse:grid': expected key=value, got 'grid'"),
        ({"shadow": ("mse", "MSE")}, "shadow 'mse' is given twice"),
        ({"shadow": (3,)}, "shadow: expected names of observers, got 3"),
        ({"shadow": "optimal"}, "shadow 'optimal' would look at nothing: .*already"),
        ({"activation_shadow": "mse"}, "'mse' would look at nothing: the scheme quantizes no stat"),
        ({"pick": "best"}, "pick='best' needs other observers"),
        ({"pick": "worst", "shadow": "mse"}, "pick must be one of first, best"),
        (
            {"scheme": "FP8", "activation_shadow": "imatrix_mse"},
            "activation_shadow 'imatrix_mse' weighs a weight by its layer's inputs: it cannot",
        ),
        (
            {"scheme": "FP8", "activation_shadow": "static_minmax"},
            "activation_shadow 'static_minmax' would look at nothing: .* already",
        ),
        (
            {"scheme": None, "kv_cache": "FP8", "shadow": "mse"},
            "shadow 'mse' would look at nothing: the scheme quantizes no weights",
        ),
    ],
)
def test_nonsense_is_refused_before_any_work(kwargs: dict[str, Any], match: str) -> None:
    model = tiny_llama()
    before = picture(model)
    given = {"scheme": "W4A16", **kwargs}
    with pytest.raises(ValueError, match=match):
        calibrate(model, data=token_batches(2), **given)
    assert picture(model) == before


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        ("mse", ["mse"]),
        ("mse,imatrix-MSE", ["mse", "imatrix_mse"]),
        (
            "mse:norm=2,grid=10, optimal:objective=mse",
            ["mse:norm=2,grid=10", "optimal:objective=mse"],
        ),
        (["mse:grid=10", "minmax,memoryless_mse"], ["mse:grid=10", "minmax", "memoryless_mse"]),
        ((), []),
    ],
)
def test_names_stand_in_lists_or_between_commas(given: Any, labels: list[str]) -> None:
    read = Shadows.read(weight=given)
    assert [each.label for each in read.weight] == labels
    again = Shadows.read(weight=[each.label for each in read.weight])
    assert again == read
    assert bool(read) is bool(labels)


def test_a_shadow_that_needs_data_is_refused_without_any() -> None:
    with pytest.raises(MissingDataError, match="IMatrixMSEObserver weighs weights by their"):
        calibrate(tiny_llama(), "W4A16", shadow="imatrix_mse")
    with pytest.raises(CalipersError, match="pick must be one of"):
        attach(tiny_llama(), "W4A16", shadow="mse", pick="last")  # type: ignore[arg-type]


def shadow_rows(count: int, **changes: Any) -> list[ShadowReport]:
    rows = [ShadowReport(f"observer_{i}", 0.01 * 4**i, i == 0, "held-out") for i in range(count)]
    return [ShadowReport(**{**vars(row), **changes}) for row in rows]


def test_what_the_report_shows_of_shadows() -> None:
    one, two = shadow_rows(2), shadow_rows(2)
    two[0] = ShadowReport("observer_0", 0.09, False, "held-out")
    modules = [
        ModuleReport("a", "observer_0", 4, 0.1, shadows={"weight": one, "input": shadow_rows(1)}),
        ModuleReport("b", "observer_0", 4, 0.1, shadows={"weight": two}),
    ]
    report = CalibrationReport(modules, batches=9, held_out=1)
    lines = [line.split("  ") for line in str(report).splitlines()]
    cells = [[cell.strip() for cell in line if cell] for line in lines]
    assert ["observers", "tensors", "held-out error", "best", "chosen"] in cells
    assert ["observer_0", "weights", "0.03", "1 of 2", "1"] in cells
    assert ["observer_1", "weights", "0.04", "1 of 2", "0"] in cells
    assert ["observer_0", "activations", "0.01", "1 of 1", "1"] in cells
    assert "<th>held-out error</th>" in report._repr_html_()
    read = json.loads(json.dumps(report.to_dict()))
    assert read["held_out"] == 1
    assert read["modules"][0]["shadows"]["weight"][1] == {
        "observer": "observer_1",
        "error": 0.04,
        "chosen": False,
        "judged_by": "held-out",
    }
    assert {modules[0]: 1}[modules[0]] == 1


@pytest.mark.parametrize("observers", [2, 6, 7, 30])
def test_one_screen_holds_a_report_with_shadows(observers: int) -> None:
    names = (f"part_{i}.layers.{layer}.name" for i in range(12) for layer in range(3))
    rows = shadow_rows(observers)
    modules = [ModuleReport(n, "optimal", 4, 0.1, shadows={"weight": rows}) for n in names]
    lines = str(CalibrationReport(modules, batches=3)).splitlines()
    assert len(lines) <= 23
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("observer_1 ") for line in lines)


def test_errors_that_are_missing_nan_or_zero() -> None:
    nan = [ShadowReport("a", math.nan, True, "weight"), ShadowReport("b", None, False, "weight")]
    zero = [ShadowReport("a", 0.0, True, "in-sample"), ShadowReport("b", 0.5, False, "in-sample")]
    report = CalibrationReport(
        [ModuleReport("x", shadows={"weight": nan}), ModuleReport("y", shadows={"weight": zero})]
    )
    text = str(report)
    assert ["b", "weights", "0.5", "0", "of", "1", "0"] in [
        row.split() for row in text.splitlines()
    ]
    assert "observers  tensors  error " in text


def test_pandas_has_the_shadows() -> None:
    pandas = pytest.importorskip("pandas")
    model = linear()
    report = calibrate(model, "FP8_DYNAMIC", shadow="mse")
    frame = report.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert [row.observer for row in frame.loc["0"]["shadows"]["weight"]] == [
        "memoryless_minmax",
        "mse",
    ]
