"""`Lockstep`: all batches pass through a model block by block.

Every batch runs the model's own forward in a thread of its own, and exactly one thread runs at a
time. In front of a block a batch stops until all others stand there or have ended. What a block is
given (states, masks, position embeddings, caches) lies on the stacks of the threads, so that
nothing needs to be known about it, and a model is not traced.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from calipers._process import release_team
from calipers.errors import CalipersError

__all__ = ["Lockstep", "find_blocks"]

#: Makes a context for the turn of a batch, from its number.
Around: TypeAlias = Callable[[int], AbstractContextManager[object]]


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model by name, in the model's order.

    Blocks are the members of every ModuleList all of whose members have layers and can be called;
    lists inside of blocks are parts of these.
    """
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or name.startswith(inside or ("\0",)):
            continue
        members = {f"{name}.{key}" if name else key: each for key, each in module.named_children()}
        if members and all(map(_can_be_block, members.values())):
            found |= members
            inside = (*inside, f"{name}.")
    return found


def _can_be_block(module: nn.Module) -> bool:
    # A layer alone is none: compressed-tensors replaces its forward. torch's own forward raises.
    has_parts = any(True for child in module.children() for _ in child.parameters())
    return has_parts and type(module).forward is not nn.Module.forward


class _Stopped(BaseException):
    """Ends a thread whose batch is not needed any more; no handler of a model's own sees it."""


@dataclass
class _Call:
    """A call of a block that waits for its turn."""

    block: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    context: contextvars.Context


class _Runner:
    """One batch on its way through the model."""

    def __init__(self, number: int, run: Callable[[], None], lockstep: Lockstep) -> None:
        self.number = number
        #: The call that it waits with; None while it runs, and once it has ended.
        self.call: _Call | None = None
        self.error: BaseException | None = None
        self.ended = False
        self._answer: Any = None
        self._stop = False
        self._go, self._rests = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(
            target=self._live, args=(run, lockstep), name=f"calipers batch {number}", daemon=True
        )
        self._started = False

    def _live(self, run: Callable[[], None], lockstep: Lockstep) -> None:
        lockstep.local.runner = self
        try:
            with torch.no_grad():
                run()
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.call, self.ended = None, True
            self._rests.release()

    def resume(self, answer: Any = None) -> None:
        """Let it run until it stands in front of a block, or has ended; raises what it raised."""
        self._answer, self.call = answer, None
        del answer
        if self._started:
            self._go.release()
        else:
            self._started = True
            self._thread.start()
        self._rests.acquire()
        if self.error is not None:
            raise self.error

    def wait(self, call: _Call) -> Any:
        """Called by its own thread in front of a block: the block's answer, when it is there."""
        if self._stop:
            raise _Stopped
        self.call = call
        del call
        release_team()
        self._rests.release()
        self._go.acquire()
        answer, self._answer = self._answer, None
        if self._stop:
            raise _Stopped
        return answer

    def stop(self) -> None:
        """End it where it stands."""
        self._stop, self.call = True, None
        if self._started and not self.ended:
            self._go.release()
            self._thread.join()
        self.ended = True


class Lockstep:
    """Runs batches through a model block by block.

    Args:
        blocks: By name, in the order in which batches come to them.

    Attributes:
        local: What is known in the thread of a batch alone.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        self._blocks = dict(blocks)
        self._order = {name: place for place, name in enumerate(self._blocks)}
        self._done: set[str] = set()
        self._runners: list[_Runner] = []
        self._forwards: dict[str, Callable[..., Any]] = {}
        self.local = threading.local()

    @contextmanager
    def gates(self) -> Iterator[None]:
        """In the block, a batch stops in front of every block of the model; leaves no thread."""
        own = {name for name, each in self._blocks.items() if "forward" in each.__dict__}
        self._forwards = {name: each.forward for name, each in self._blocks.items()}
        try:
            for name, each in self._blocks.items():
                each.forward = self._gate(name, each.forward)
            yield
        finally:
            self.stop()
            self._runners.clear()
            for name, each in self._blocks.items():
                each.__dict__.pop("forward", None)
                if name in own:
                    each.forward = self._forwards[name]

    def _gate(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def gate(*args: Any, **kwargs: Any) -> Any:
            runner = getattr(self.local, "runner", None)
            if runner is None:
                return forward(*args, **kwargs)
            return runner.wait(_Call(name, args, kwargs, contextvars.copy_context()))

        return gate

    def start(self, runs: Sequence[Callable[[], None]], around: Around) -> None:
        """Start the batches one after the other; each stands in front of a block then, or ended.

        Args:
            runs: Each runs one batch through the model.
            around: Called with the number of a batch, for a context that its turn has.
        """
        self._runners = [_Runner(number, run, self) for number, run in enumerate(runs)]
        for runner in self._runners:
            with around(runner.number):
                runner.resume()

    def next_block(self) -> str | None:
        """The first block that a batch stands in front of; None where all batches have ended.

        Raises:
            CalipersError: A batch came back to a block that was left already.
        """
        waiting = [each.call.block for each in self._runners if each.call is not None]
        again = self._done.intersection(waiting)
        if again:
            raise CalipersError(
                f"{min(again)}: the model calls this block again after others, so that it cannot "
                "be run block by block; use memory='whole'"
            )
        return min(waiting, key=self._order.__getitem__, default=None)

    def run(self, block: str, around: Around, *, keep: bool, last: bool = False) -> None:
        """Run a block on all batches that stand in front of it.

        Args:
            block: Its name.
            around: See `start`.
            keep: Let each batch go on with the block's answer, to the next block; else the answer
                is forgotten and the batch stands where it stood.
            last: Whether what comes after the block is of no interest: of the batches that have
                passed it only the first goes on, to show whether the model comes back to a block.
        """
        first = next((each for each in self._runners if each.call is not None), None)
        for runner in self._runners:
            call = runner.call
            if call is None or call.block != block:
                continue
            with around(runner.number):
                answer = call.context.run(self._forwards[block], *call.args, **call.kwargs)
                del call
                if last and runner is not first:
                    runner.stop()
                elif keep:
                    runner.resume(answer)
                del answer
        if keep:
            self._done.add(block)

    def stop(self, *, but_first: bool = False) -> None:
        """End all batches where they stand, or all but the first one."""
        waiting = [each for each in self._runners if not each.ended]
        for runner in waiting[1:] if but_first else waiting:
            runner.stop()
