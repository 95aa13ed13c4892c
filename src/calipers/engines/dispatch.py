"""Engines: what evaluates the candidates of a search, chosen by device and by what is installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Literal, TypeVar, cast, get_args

import torch
from loguru import logger

from calipers.engines.kernels import Kernel, Problem
from calipers.engines.native.abi import library
from calipers.engines.native.build import compiler, compiler_has_changed, is_built
from calipers.errors import CalipersError
from calipers.memory import UnreadableError

__all__ = ["Engine", "attempt", "choose_engine", "explain_engines", "give_up_engine", "run"]

Code = TypeVar("Code")
Found = TypeVar("Found")
Engine = Literal["eager", "native", "triton"]

ENVIRONMENT = "CALIPERS_ENGINE"
#: Values searched in a process before the native library is compiled for the machine, which takes
#: some two seconds; eager takes half a second for so many.
WORTH_BUILDING = 2**24

#: Oldest compute capability that Triton compiles for.
OLDEST_GPU = (7, 5)

#: Values searched by this process so far.
_searched = 0
#: Why an engine that failed in this process is not tried again.
_failures: dict[str, str] = {}


def choose_engine(device: torch.device, asked: str | None = None, values: int = 0) -> Engine:
    """The engine to search with.

    Args:
        device: Where the values are.
        asked: An engine by name; None takes the environment variable CALIPERS_ENGINE, and where
            that is not set the fastest one that works.
        values: Number of values to be searched.

    Returns:
        "triton" on a CUDA device and "native" on the CPU, where they work; the latter once enough
        was searched to make compiling it pay, or at once where that was done before. An engine
        asked for by name is taken however little there is to search. "eager" otherwise, with one
        warning where another one was asked for and does not work.

    Raises:
        CalipersError: An engine that there is not.
    """
    asked = asked or os.environ.get(ENVIRONMENT) or None
    if asked is not None and asked not in get_args(Engine):
        raise CalipersError(
            f"engine must be one of {', '.join(get_args(Engine))}, got {asked!r} "
            f"(by argument or {ENVIRONMENT})"
        )
    if asked == "eager":
        return "eager"
    if asked is not None:
        problem = _PROBLEMS[asked](device)
        if problem is not None:
            _warn_once(problem)
        return "eager" if problem else cast(Engine, asked)
    if device.type == "cuda":
        return "eager" if triton_problem(device) else "triton"
    if native_problem(device):
        return "eager"
    global _searched
    _searched += values
    return "native" if _searched >= WORTH_BUILDING or is_built() else "eager"


def native_problem(device: torch.device) -> str | None:
    """Why the native engine cannot be used there; None where it can."""
    if device.type != "cpu":
        return f"the native engine works on the CPU, not on {device.type}"
    if "native" in _failures:
        if not compiler_has_changed():
            return _failures["native"]
        del _failures["native"]
    if not is_built() and compiler() is None:
        return "the native engine needs a C++ compiler (g++ or clang++), and none was found"
    return None


def triton_problem(device: torch.device) -> str | None:
    """Why the Triton engine cannot be used there; None where it can.

    With TRITON_INTERPRET=1 in the environment Triton runs kernels by numpy, slowly and on every
    device, which is how they are tested where there is no GPU.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"the triton engine works on CUDA devices, not on {device.type}"
    if "triton" in _failures:
        return _failures["triton"]
    if importlib.util.find_spec("triton") is None:
        return "the triton engine needs the package triton, which is not installed"
    if device.type == "cuda" and not interpreted and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_GPU:
            return (
                f"the triton engine needs compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]}, "
                f"and {device} has {capability[0]}.{capability[1]}"
            )
    return None


_PROBLEMS = {"native": native_problem, "triton": triton_problem}


def run(
    kernel: Kernel[Code],
    reference: Code,
    search: Callable[[Code], Found],
    problem: Problem,
    engine: str | None = None,
) -> Found:
    """Search by an engine's code or by the reference: the one place that chooses.

    Args:
        kernel: What the search needs.
        reference: What does the kernel's work by plain torch operations.
        search: Called with the code of the engine or with the reference, or with both one after
            the other where the engine fails.
        problem: What is searched.
        engine: An engine by name, see `choose_engine`.

    Raises:
        Exception: Whatever the search raises with the reference.
    """
    chosen = choose_engine(problem.device, engine, problem.work)
    if chosen not in kernel.modules:
        return search(reference)

    def by_engine() -> Found:
        module = importlib.import_module(kernel.modules[chosen])
        known = module.supports(problem)
        return search(getattr(module, kernel.name) if known else reference)

    return attempt(chosen, by_engine, lambda: search(reference))


def attempt(engine: Engine, search: Callable[[], Found], reference: Callable[[], Found]) -> Found:
    """Search by an engine, and by the reference where the engine fails.

    An engine that failed is given up, but not for what is no fault of its own: values that it
    cannot read where they lie, and what the reference fails at as well.

    Raises:
        Exception: Whatever the reference raises.
    """
    try:
        return search()
    except torch.OutOfMemoryError:  # the reference needs more
        raise
    except UnreadableError:
        failure = None
    except Exception as error:  # whatever a compiler may raise
        failure = error
    found = reference()
    if failure is not None:
        give_up_engine(engine, failure)
    return found


def give_up_engine(engine: str, error: Exception) -> None:
    """Do not try an engine again in this process, and say so once."""
    _failures[engine] = f"the {engine} engine failed: {type(error).__name__}: {error}"
    _warn_once(_failures[engine])


def explain_engines(*, trial: bool = False) -> list[tuple[str, bool, str]]:
    """Name of each engine, whether it can be used on this machine, and why or why not.

    Args:
        trial: Load the native library, which is compiled first where it is not there, instead of
            taking for granted that a compiler works.
    """
    if trial and native_problem(torch.device("cpu")) is None:
        try:
            library()
        except Exception as error:  # whatever a compiler may raise
            give_up_engine("native", error)
    no_native = native_problem(torch.device("cpu"))
    if torch.cuda.is_available():
        no_triton = triton_problem(torch.device("cuda", torch.cuda.current_device()))
    else:
        no_triton = "the triton engine needs a CUDA device, and torch sees none"
    return [
        ("eager", True, "plain torch operations, on every device: the reference"),
        ("native", no_native is None, no_native or f"C++ by {compiler()}, on the CPU"),
        ("triton", no_triton is None, no_triton or "Triton kernels, on CUDA devices"),
    ]


@functools.cache
def _warn_once(problem: str) -> None:
    logger.warning("{}; the eager engine takes over", problem)
