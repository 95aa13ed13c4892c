"""What `install` puts into llmcompressor's registry, and that nothing of it stays behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.registry.registry import _ALIAS_REGISTRY, _REGISTRY

from integrations.peer import NAMES, build

pytest.importorskip("llmcompressor")
from llmcompressor.observers import Observer as PeerObserver
from llmcompressor.pipelines.registry import CalibrationPipeline

from calipers.errors import IntegrationError
from calipers.integrations.llmcompressor import install, installation, uninstall
from calipers.observers import MemorylessMinMaxObserver, Observer

INT4 = QuantizationArgs(num_bits=4, strategy="group", group_size=16)


def snapshot() -> tuple[dict[str, Any], dict[str, str], Any]:
    return (
        dict(_REGISTRY[PeerObserver]),
        dict(_ALIAS_REGISTRY[PeerObserver]),
        CalibrationPipeline.__dict__["from_modifiers"],
    )


@pytest.fixture(autouse=True)
def _nothing_stays_behind() -> Iterator[None]:
    before = snapshot()
    yield
    uninstall()
    assert snapshot() == before


def is_ours(name: str) -> bool:
    return hasattr(build(name, INT4), "inner")


def test_without_replace_their_names_stay_theirs() -> None:
    before = snapshot()[0]
    installed = install()
    # What llmcompressor lacks keeps its name: "optimal", and what other tests registered.
    assert {f"calipers_{name}" for name in NAMES} | {"optimal", "histogram"} <= {*installed.names}
    assert not {*installed.names} & {*NAMES}
    assert {k: v for k, v in snapshot()[0].items() if k in before} == before
    for name in NAMES:
        assert is_ours(f"calipers_{name}")


def test_replace_serves_their_names_as_well() -> None:
    theirs = {name: type(build(name, INT4)) for name in NAMES if name != "fouroversix"}
    names = {*install(replace=True).names}
    assert {*NAMES, *(f"calipers_{name}" for name in NAMES)} <= names
    for name in NAMES:
        assert is_ours(name)
        assert is_ours(f"calipers_{name}")
    for name, cls in theirs.items():
        assert isinstance(build(name, INT4), cls)


@pytest.mark.parametrize("spelling", ["Memoryless_MSE", "memoryless-mse", "memoryless mse"])
def test_names_are_found_in_every_spelling(spelling: str) -> None:
    install(replace=True)
    assert is_ours(spelling)
    assert is_ours(f"CALIPERS-{spelling}")


def test_an_observer_of_ones_own_comes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_REGISTRY[Observer], "my-observer", MemorylessMinMaxObserver)
    assert "my_observer" in install().names
    assert is_ours("my_observer")
    assert not any("my_observer" in name for name in NAMES)


def test_installing_again_changes_nothing() -> None:
    install(replace=True)
    before = snapshot()[:2]
    install(replace=True)
    assert snapshot()[:2] == before


def test_installing_otherwise_does_as_asked() -> None:
    install(replace=True)
    install(replace=False)
    assert not is_ours("mse")
    assert is_ours("calipers_mse")
    install(replace=True)
    assert is_ours("mse")


def test_as_a_context_manager_it_brings_back_what_was_in_force() -> None:
    with install():
        with install(replace=True):
            assert is_ours("mse")
        assert not is_ours("mse")
        assert is_ours("calipers_mse")
    assert "calipers-mse" not in snapshot()[0]


def test_it_is_undone_when_the_work_inside_fails() -> None:
    with pytest.raises(RuntimeError, match="half way"), install(replace=True):
        raise RuntimeError("half way")
    assert not is_ours("mse")


def test_uninstalling_nothing_is_no_error() -> None:
    uninstall()
    uninstall()


def test_what_others_register_meanwhile_stays() -> None:
    install(replace=True)
    PeerObserver.register_value(MemorylessMinMaxObserver, name="of_others")
    try:
        uninstall()
        assert PeerObserver.get_value_from_registry("of_others") is MemorylessMinMaxObserver
    finally:
        del _REGISTRY[PeerObserver]["of-others"], _ALIAS_REGISTRY[PeerObserver]["of-others"]


def test_attached_observers_go_on_after_uninstall() -> None:
    value = torch.randn(8, 32)
    with install(replace=True):
        expected = build("memoryless_mse", INT4)(value).get_qparams()
        attached = build("memoryless_mse", INT4)
    found = attached(value).get_qparams()
    assert torch.equal(found["scale"], expected["scale"])
    assert not is_ours("memoryless_mse")


# -- never half installed ------------------------------------------------------------------------


def test_an_unknown_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot()
    monkeypatch.setattr(installation.importlib.metadata, "version", lambda _: "0.15.2")
    with pytest.raises(IntegrationError, match=r"llmcompressor 0\.15\.2: .* with .* 0\.14\.x"):
        install(replace=True)
    assert snapshot() == before


def test_a_changed_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot()
    monkeypatch.delattr(PeerObserver, "sync_activation_stats")
    with pytest.raises(IntegrationError, match=r"lacks .*Observer\.sync_activation_stats"):
        install(replace=True)
    assert snapshot() == before


def test_a_taken_name_is_refused() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_REGISTRY[PeerObserver], "calipers-mse", dict)
        before = snapshot()
        with pytest.raises(IntegrationError, match="holds 'calipers_mse' already, from builtins"):
            install(replace=True)
        assert snapshot() == before


def test_a_failure_on_the_way_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    before = snapshot()[:2]

    feed = installation._feed_data_to_our_observers
    errors = [OSError("on the way")]

    def fail_once() -> None:
        if errors:
            raise errors.pop()
        feed()

    monkeypatch.setattr(installation, "_feed_data_to_our_observers", fail_once)
    with pytest.raises(OSError, match="on the way"):
        install(replace=True)
    assert snapshot()[:2] == before
    assert not is_ours("mse")
    assert is_ours("calipers_mse")


def test_another_packages_observer_is_not_replaced() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_REGISTRY[PeerObserver], "mse", MemorylessMinMaxObserver)
        install(replace=True)
        assert PeerObserver.get_value_from_registry("mse") is MemorylessMinMaxObserver
        assert is_ours("calipers_mse")
        uninstall()


def test_a_missing_llmcompressor_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise installation.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installation.importlib.metadata, "version", missing)
    with pytest.raises(IntegrationError, match=r"not installed.* llmcompressor 0\.14\.x"):
        install()


@pytest.mark.slow
def test_llmcompressor_is_imported_by_install_alone() -> None:
    code = (
        "import sys, calipers\n"
        "from calipers.integrations.llmcompressor import install, uninstall\n"
        "uninstall()\n"
        "assert 'llmcompressor' not in sys.modules\n"
        "install()\n"
        "assert 'llmcompressor' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
