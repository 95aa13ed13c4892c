"""What llmcompressor's session tells of tokens: names, experts without any, and the loss mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import nn

from integrations.peer import build
from observers.samples import logged, sample

pytest.importorskip("llmcompressor")
from llmcompressor.core import active_session
from llmcompressor.modifiers.quantization.calibration import initialize_observer

from calipers.errors import MissingDataError
from calipers.integrations.llmcompressor import install, uninstall

INT4 = {"num_bits": 4, "strategy": "group", "group_size": 16}
INT8 = QuantizationArgs(num_bits=8)
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(2))


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    state = active_session().state
    install(replace=True)
    yield
    uninstall()
    state.model, state.loss_masks, state.current_batch_idx = None, None, -1


def expert(observer: str, *, session: bool = True, **options: Any) -> nn.Linear:
    """The second of two experts, as a recipe sets it up."""
    model = Experts()
    active_session().state.model = model if session else None
    weights = QuantizationArgs(**INT4, observer=observer, observer_kwargs=options)
    for each in model.experts:
        each.quantization_scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        initialize_observer(each, "weight")
    layer: nn.Linear = model.experts[1]
    layer.kept = [model]  # a list, so that it is no submodule
    return layer


@pytest.mark.parametrize(
    ("observer", "options"),
    [
        ("optimal", {}),
        ("optimal", {"objective": "hessian"}),
        ("calipers_imatrix_mse", {"strict": True}),
    ],
    ids=["optimal", "hessian", "strict"],
)
def test_an_expert_without_tokens_is_named(observer: str, options: dict[str, Any]) -> None:
    layer = expert(observer, **options)
    with pytest.raises(MissingDataError, match=r"^experts\.1: no token .*moe_calibrate_all_exp"):
        layer.weight_observer(layer.weight)


def test_without_a_session_the_class_is_named() -> None:
    layer = expert("optimal", session=False)
    with pytest.raises(MissingDataError, match=r"^Linear: no token"):
        layer.weight_observer(layer.weight)
    with pytest.raises(MissingDataError, match=r"^value\.weight: no token"):
        build("optimal", QuantizationArgs(**INT4))(layer.weight)


def test_other_errors_are_not_told_as_missing_tokens() -> None:
    layer = expert("optimal")
    layer(torch.ones(2, 32))
    with pytest.raises(ValueError, match=r"experts\.1\.weight: .*32 columns.*\(4, 16\)"):
        layer.weight_observer(torch.ones(4, 16))


def test_warnings_of_inputs_name_the_module() -> None:
    layer = expert("optimal")
    x = torch.ones(2, 32)
    x[0, 0] = torch.nan
    with logged("WARNING") as messages:
        layer(x)
    assert messages == ["inputs of experts.1: left out 1 NaN or Inf of 64 values"]


def test_a_module_that_joined_the_model_later_is_found_where_it_fails() -> None:
    layer = expert("optimal")
    model = layer.kept[0]
    late = nn.Linear(32, 32, bias=False)
    model.experts.append(late)
    late.quantization_scheme = layer.quantization_scheme
    initialize_observer(late, "weight")
    with pytest.raises(MissingDataError, match=r"^experts\.2: no token"):
        late.weight_observer(late.weight)


# -- the loss mask ---------------------------------------------------------------------------


def masked(masks: list[Any], index: int = 0) -> None:
    state = active_session().state
    state.loss_masks, state.current_batch_idx = masks, index


@pytest.mark.parametrize("name", ["static_minmax", "minmax", "mse", "histogram"])
def test_activations_under_a_loss_mask(name: str) -> None:
    value = sample((2, 3, 16))
    value[MASK == 0] = 1000
    expected = build(name, INT8, "input")(value[MASK == 1]).get_qparams()["scale"]
    for form in (value, value.flatten(0, 1)):
        masked([None, MASK], 1)
        assert torch.equal(build(name, INT8, "input")(form).get_qparams()["scale"], expected)
        masked([None, MASK], 0)
        assert not torch.equal(build(name, INT8, "input")(form).get_qparams()["scale"], expected)


def test_attention_states_under_a_loss_mask() -> None:
    value = sample((2, 4, 3, 8))
    value.transpose(1, 2)[MASK == 0] = 1000
    masked([MASK])
    observer = build("static_minmax", QuantizationArgs(num_bits=8, strategy="attn_head"), "k")
    observer(value)
    chosen = value.transpose(1, 2)[MASK == 1]
    assert torch.equal(observer.max_vals, chosen.amax((0, 2)).view(4, 1, 1))


@pytest.mark.parametrize("observer", ["optimal", "imatrix_mse"])
def test_inputs_of_weights_under_a_loss_mask(observer: str) -> None:
    layer = expert(observer)
    inner = layer.weight_observer.inner
    masked([MASK])
    layer(torch.ones(2, 3, 32))
    layer(torch.ones(6, 32))
    layer(torch.ones(5, 32))  # some tokens alone: which ones is not known
    assert inner.num_input_tokens == 4 + 4 + 5
    masked([torch.ones(2, 3)])
    layer(torch.ones(2, 3, 32))
    assert inner.num_input_tokens == 13 + 6
