"""Whatever batches come in and however a model is wrapped, the scales are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from compressed_tensors.offload import offload_module, set_onload_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import BatchEncoding

from calibration.tiny_models import tiny_llama, token_batches
from calipers.calibration import attach, calibrate

Batches = list[dict[str, Tensor]]
CPU = torch.device("cpu")


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Without a length."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)


def ids(batches: Batches) -> list[Tensor]:
    return [each["input_ids"] for each in batches]


def rows(batches: Batches) -> datasets.Dataset:
    """A dataset of batches, as tensors."""
    return datasets.Dataset.from_dict(
        {"input_ids": [each.tolist() for each in ids(batches)]}
    ).with_format("torch")


KINDS: dict[str, Callable[[Batches], Any]] = {
    "mappings": list,
    "tuples": lambda batches: [(each,) for each in ids(batches)],
    "lists": lambda batches: [[each] for each in ids(batches)],
    "tensors": ids,
    "BatchEncoding": lambda batches: [BatchEncoding(each) for each in batches],
    "DataLoader": lambda batches: DataLoader(torch.cat(ids(batches)), batch_size=2),
    "iterable dataset": Stream,
    "DataLoader of an iterable dataset": lambda batches: DataLoader(
        Stream(batches), batch_size=None
    ),
    "generator": lambda batches: (each for each in batches),
    "map": lambda batches: map(dict, batches),
    "dataset": rows,
    "streamed dataset": lambda batches: rows(batches).to_iterable_dataset().with_format("torch"),
}


def outcome(model: nn.Module, data: Any, preset: str = "FP8") -> dict[str, Tensor]:
    """Scales and statistics of a calibration; the model may be a wrapper."""
    with attach(model, preset, observer="imatrix_mse") as calibration:
        calibration.run(data)
        return held(calibration)


def held(calibration: Any) -> dict[str, Tensor]:
    found = {
        f"{each.name}.{base_name}.{name}": value.clone()
        for each in calibration.observed
        for base_name, observer in each.observers.items()
        for name, value in observer.state().items()
        if isinstance(value, Tensor)
    }
    calibration.freeze()
    scales = calibration.model.state_dict()
    return found | {name: scales[name].clone() for name in scales if name.endswith("_scale")}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert sum(name.endswith("_scale") for name in found) >= 14
    for name, value in expected.items():
        assert torch.equal(found[name].float(), value.float()), name


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return outcome(tiny_llama(), token_batches())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_batches(kind: str, expected: dict[str, Tensor]) -> None:
    assert_same(outcome(tiny_llama(), KINDS[kind](token_batches())), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_one_call(kind: str, expected: dict[str, Tensor]) -> None:
    model = tiny_llama()
    told: list[tuple[int, int | None]] = []
    report = calibrate(
        model,
        "FP8",
        "imatrix_mse",
        KINDS[kind](token_batches()),
        progress=lambda stage, done, total: (
            told.append((done, total)) if stage == "batches" else None
        ),
    )
    assert report.batches == 2
    assert [done for done, _ in told] == [0, 1, 2]
    scales = model.state_dict()
    for name in expected:
        if name.endswith("_scale"):
            assert torch.equal(scales[name].float(), expected[name].float()), name


def test_several_passes(expected: dict[str, Tensor]) -> None:
    with attach(tiny_llama(), "FP8", observer="imatrix_mse") as calibration:
        for each in token_batches():
            calibration.run(iter([each]))
        assert_same(held(calibration), expected)


def compiled(model: nn.Module, _: Path) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def compiled_in_place(model: nn.Module, _: Path) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_after_running(model: nn.Module, _: Path) -> nn.Module:
    wrapper: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        wrapper(**token_batches(1)[0])
    return wrapper  # type: ignore[no-any-return]


def dispatched(model: nn.Module, _: Path) -> nn.Module:
    return pytest.importorskip("accelerate").dispatch_model(model, {"": "cpu"})  # type: ignore[no-any-return]


def from_accelerate(model: nn.Module, _: Path) -> nn.Module:
    """With hooks of accelerate, and handed over as the refusal of these advises."""
    from compressed_tensors.offload import from_accelerate as hand_over

    pytest.importorskip("accelerate").dispatch_model(model, {"": "cpu"}, force_hooks=True)
    hand_over(model)
    return model


def taken_back(model: nn.Module, _: Path) -> nn.Module:
    """Offloaded by accelerate, whose hooks are removed then."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device=CPU)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    return model


def offloaded(model: nn.Module, _: Path) -> nn.Module:
    set_onload_device(model, CPU)
    return model


def offloaded_to_disk(model: nn.Module, folder: Path) -> nn.Module:
    for module in model.modules():
        offload_module(module, CPU, "disk", offload_dir=str(folder))
    return model


@pytest.mark.parametrize("preset", ["FP8", "NVFP4"])
@pytest.mark.parametrize(
    "wrap",
    [
        compiled,
        compiled_in_place,
        compiled_after_running,
        nn.DataParallel,
        dispatched,
        from_accelerate,
        taken_back,
        offloaded,
        offloaded_to_disk,
    ],
)
def test_every_kind_of_model(wrap: Any, preset: str, tmp_path: Path) -> None:
    plain = outcome(tiny_llama(), token_batches(), preset)
    model = tiny_llama()
    wrapped = wrap(model) if wrap is nn.DataParallel else wrap(model, tmp_path)
    assert_same(outcome(wrapped, token_batches(), preset), plain)
