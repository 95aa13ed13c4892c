"""The native library: compiled from the sources beside this file, once for a machine.

A library's name holds a digest of its content. One that was damaged does not fit its name: it is
never loaded, and is built anew. A library is written under another name and renamed, so that no
process sees half of one, and none that is in use is written over.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from calipers.engines.native.cache import cache_folder, distrust, folder_state

__all__ = ["BuildError", "compiler", "compiler_has_changed", "is_built", "library", "where"]

_SOURCES = Path(__file__).parent
#: Seconds after which a compiler is given up.
_TIMEOUT = 300
#: Seconds after which a trial of a new library is given up.
_TRIAL_TIMEOUT = 60
#: Hexadecimal digits of a digest in a name.
_DIGITS = 32
#: What the library must have.
_SYMBOLS = (
    "min_max",
    "search_grid",
    "sum_candidates",
    "project",
    "search_codes",
    "sum_coupled",
    "refine_rows",
)
#: Run by a process of its own: loading a file that is cut off kills the process.
_TRIAL = (
    "import ctypes, sys\n"
    "try:\n"
    "    library = ctypes.CDLL(sys.argv[1])\n"
    "    [getattr(library, name) for name in sys.argv[2:]]\n"
    "except (OSError, AttributeError) as error:\n"
    "    sys.exit(str(error))\n"
)
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


class BuildError(RuntimeError):
    """There is no compiler, or what it made cannot be used."""


@functools.lru_cache(maxsize=1)
def compiler() -> str | None:
    """The C++ compiler: that of the environment variable CXX, g++ or clang++; None without one."""
    return _find_compiler()


#: The compiler that failed last, as `_identity` tells it.
_failed_compiler: object = None


def compiler_has_changed() -> bool:
    """Whether another compiler than the one that failed is found by now, or the same was mended."""
    global _failed_compiler
    if _failed_compiler is None or _failed_compiler == _identity():
        return False
    _failed_compiler = None
    compiler.cache_clear()
    return True


def is_built() -> bool:
    """Whether the library is there already, so that it only has to be loaded."""
    return library.cache_info().currsize > 0 or _is_there(folder_state())


@functools.lru_cache(maxsize=4)
def _is_there(state: object) -> bool:
    """Whether a folder holds a sound library; looked up once for each state of the folder."""
    try:
        return len(_sound_libraries(cache_folder()[0])) > 0
    except OSError:
        return False


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The library, compiled first where that has not been done or it was damaged.

    Raises:
        BuildError: There is no compiler, it failed, or what it made cannot be loaded.
    """
    try:
        folder, _ = cache_folder()
        for found in _sound_libraries(folder):
            try:
                return ctypes.CDLL(str(found))
            except OSError:  # of another machine that shares the folder
                continue
        return ctypes.CDLL(str(_build()))
    except OSError as error:
        raise BuildError(str(error)) from error


def where() -> tuple[str, str | None]:
    """The folder of the library, and why it is not the usual one; for `calipers doctor`."""
    try:
        folder, problem = cache_folder(writable=not is_built())
    except OSError as error:
        return "none", str(error)
    return str(folder), problem


def _sound_libraries(folder: Path) -> list[Path]:
    """Libraries in a folder that are whole and nobody else's; damaged ones are removed."""
    sound = []
    for path in sorted(folder.glob(f"kernels-{_fingerprint()}-*.so")):
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode) or distrust(path) is not None:
            continue
        if _digest_once(path, found.st_size, found.st_mtime_ns) == path.stem.rpartition("-")[2]:
            sound.append(path)
        else:
            path.unlink(missing_ok=True)
    return sound


def _build() -> Path:
    global _failed_compiler
    command = compiler()
    if command is None:
        raise BuildError("no C++ compiler was found (g++ or clang++)")
    folder, _ = cache_folder(writable=True)
    # Under a name of its own first: others may be at it, or this may be interrupted.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "kernels.so"
        problem = _compile(command, made) or _problem_of(made)
        if problem is not None:
            _failed_compiler = _identity()
            raise BuildError(f"{command} {problem}")
        made.chmod(0o700)
        target = folder / f"kernels-{_fingerprint()}-{_digest(made)}.so"
        os.replace(made, target)
    return target


def _compile(command: str, made: Path) -> str | None:
    """Compile; returns what went wrong."""
    arguments = [command, *_flags(), "-o", str(made), str(_SOURCES / "kernels.cpp"), "-ldl"]
    try:
        done = subprocess.run(arguments, capture_output=True, timeout=_TIMEOUT, check=False)
    except OSError as error:
        return f"cannot be run: {error}"
    except subprocess.TimeoutExpired:
        return f"took longer than {_TIMEOUT} seconds"
    if done.returncode:
        return f"failed: {done.stderr.decode(errors='replace').strip()[:1000]}"
    return None


def _problem_of(made: Path) -> str | None:
    """What is wrong with a library that a compiler says it has made, by a trial."""
    if not made.is_file():
        return "ended without an error, but wrote no library"
    if not made.stat().st_size:
        return "ended without an error, but wrote an empty file"
    if not sys.executable:
        return None
    arguments = [sys.executable, "-I", "-S", "-c", _TRIAL, str(made), *_SYMBOLS]
    try:
        tried = subprocess.run(arguments, capture_output=True, timeout=_TRIAL_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"made a library that could not be tried: {error}"
    if tried.returncode:
        told = tried.stderr.decode(errors="replace").strip()[-300:]
        why = told or f"loading it ended with status {tried.returncode}"
        return f"made a library that cannot be loaded: {why}"
    return None


def _find_compiler() -> str | None:
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _identity() -> object:
    """What a compiler is found by, and its file."""
    found = _find_compiler()
    if found is None:
        return ()
    status = os.stat(found)
    return found, status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=8)
def _digest_once(path: Path, size: int, changed: int) -> str:
    """The digest of a file's content, taken once as long as size and time do not change."""
    return _digest(path)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:_DIGITS]


@functools.lru_cache(maxsize=1)
def _flags() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    best = next((name for name in _INSTRUCTIONS if capability.startswith(name)), None)
    return [*_FLAGS, *_INSTRUCTIONS.get(best or "", [])]


@functools.lru_cache(maxsize=1)
def _fingerprint() -> str:
    """Hash of what the library depends on: its sources, the flags and the platform."""
    digest = hashlib.sha256(" ".join([*_flags(), platform.system(), platform.machine()]).encode())
    for source in sorted([*_SOURCES.glob("*.h"), *_SOURCES.glob("*.cpp")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
