"""The native library: compiled from the sources beside this file, once for a machine."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

__all__ = ["compiler", "is_built", "library"]

_SOURCES = Path(__file__).parent
#: Seconds after which a compiler is given up.
_TIMEOUT = 300
#: Instructions by what torch itself makes use of on this processor.
_INSTRUCTIONS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "AVX2": ["-mavx2", "-mfma"],
}
_FLAGS = [
    "-std=c++17",
    "-O2",
    "-shared",
    "-fPIC",
    "-pthread",
    # One rounding for a product and its sum: faster, and nearer to the exact value.
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    # Vectors wider than the registers of the target are passed in memory, within one file.
    "-Wno-psabi",
]


@functools.lru_cache(maxsize=1)
def compiler() -> str | None:
    """The C++ compiler: that of the environment variable CXX, g++ or clang++; None without one."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def is_built() -> bool:
    """Whether the library is there already, so that it only has to be loaded."""
    return _target().exists()


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The library, compiled first where that has not been done.

    Raises:
        RuntimeError: There is no compiler, or it failed.
    """
    target = _target()
    if not target.exists():
        _build(target)
    return ctypes.CDLL(str(target))


def _build(target: Path) -> None:
    command = compiler()
    if command is None:
        raise RuntimeError("no C++ compiler was found (g++ or clang++)")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Under a name of its own first: others may be at it, or this may be interrupted.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        arguments = [command, *_flags(), "-o", str(made), str(_SOURCES / "kernels.cpp"), "-ldl"]
        done = subprocess.run(
            arguments, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{command} failed: {done.stderr.strip()[:1000]}")
        os.replace(made, target)


def _target() -> Path:
    return _cache() / f"kernels-{_fingerprint()}.so"


def _cache() -> Path:
    """CALIPERS_CACHE, else the user's cache folder, else one that the system gives to this user."""
    asked = os.environ.get("CALIPERS_CACHE")
    if asked:
        return Path(asked)
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "calipers"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return _private_folder()
    return folder if os.access(folder, os.W_OK) else _private_folder()


@functools.lru_cache(maxsize=1)
def _private_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="calipers-"))


@functools.lru_cache(maxsize=1)
def _flags() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    best = next((name for name in _INSTRUCTIONS if capability.startswith(name)), None)
    return [*_FLAGS, *_INSTRUCTIONS.get(best or "", [])]


@functools.lru_cache(maxsize=1)
def _fingerprint() -> str:
    """What the library depends on: its sources, the flags and the platform."""
    digest = hashlib.sha256(" ".join([*_flags(), platform.system(), platform.machine()]).encode())
    for source in sorted([*_SOURCES.glob("*.h"), *_SOURCES.glob("*.cpp")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
