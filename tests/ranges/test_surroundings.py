"""What lies around a call (default dtype and device, autocast, inference mode) changes nothing."""

from __future__ import annotations

import ast
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

import calipers
from calipers.observers import Observer
from memoised import forget_tables

FORMATS = {
    "int4": {"num_bits": 4},
    "int4-asymmetric": {"num_bits": 4, "symmetric": False},
    "int8": {"num_bits": 8},
    "fp8": {"num_bits": 8, "type": "float"},
}
OBSERVERS = ("memoryless_minmax", "static_minmax", "minmax", "memoryless_mse", "mse", "optimal")
CONSTRUCTORS = {
    "tensor",
    "zeros",
    "ones",
    "arange",
    "linspace",
    "logspace",
    "full",
    "empty",
    "randint",
}


def qparams(name: str, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"objective": "mse"} if name == "optimal" else {}
    args = QuantizationArgs(strategy="group", group_size=32, **FORMATS[kind])
    x = torch.randn(
        8, 64, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu"
    )
    return Observer.load_from_registry(name, "weight", args, **options)(x)


@pytest.mark.parametrize("engine", ["eager", "native"])
@pytest.mark.parametrize("name", OBSERVERS)
def test_defaults_do_not_matter(name, engine, monkeypatch):
    monkeypatch.setenv("CALIPERS_ENGINE", engine)
    wanted = {kind: qparams(name, kind) for kind in FORMATS}
    forget_tables()
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        torch.set_default_dtype(dtype)
        torch.set_default_device("meta")
        try:
            found = {kind: qparams(name, kind) for kind in FORMATS}
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        for kind, pair in found.items():
            for one, two in zip(pair, wanted[kind], strict=True):
                assert one.dtype == two.dtype
                assert torch.equal(one, two), (kind, dtype)


@pytest.mark.parametrize("around", ["autocast", "inference", "none"])
def test_autocast_and_inference_mode_do_not_matter(around):
    wanted = qparams("optimal", "int4")
    contexts = {
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "inference": torch.inference_mode,
        "none": nullcontext,
    }
    with contexts[around]():
        found = qparams("optimal", "int4")
    assert torch.equal(found[0], wanted[0])
    assert not found[0].is_inference()


def test_every_helper_tensor_says_its_dtype_and_device():
    source = Path(calipers.__file__).parent
    bare = []
    for room in ("ranges", "observers", "calibration", "integrations"):
        for path in (source / room).rglob("*.py"):
            if path.name.endswith("kernels.py"):
                continue
            bare += [
                f"{path.name}:{node.lineno}"
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "torch"
                and node.func.attr in CONSTRUCTORS
                and not {"dtype", "device"} <= {each.arg for each in node.keywords}
            ]
    assert bare == []
