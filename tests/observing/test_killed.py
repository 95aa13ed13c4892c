"""`observe` after SIGKILL: the same call goes on, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from calibration.tiny_models import tiny_llama, token_batches
from calipers import Statistics, StatisticsError, observe
from calipers.errors import CalipersError
from calipers.observing import passes

posix_only = pytest.mark.skipif(os.name != "posix", reason="forks, and sends SIGKILL")
BATCHES = 5

# One process that has imported everything forks one child after the other: each runs `observe` and
# kills itself at the n-th thing that it does, be that a batch or a step on the file system.
PARENT = """
import json, os, pathlib, shutil, signal, sys
import torch
torch.set_num_threads(1)
from loguru import logger
logger.remove()
from calibration.tiny_models import tiny_llama, token_batches
from calipers import observe

out, batches, kinds = pathlib.Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
model = tiny_llama()

def run(kill_at, data):
    events = 0
    def event(function):
        def wrapped(*args, **kwargs):
            nonlocal events
            events += 1
            if events == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return wrapped
    for name in ("mkdir", "rename", "replace", "fsync", "unlink"):
        setattr(os, name, event(getattr(os, name)))
    model.forward = event(model.forward)
    observe(model, data(), out, every=0, **kinds)
    return events

def child(kill_at, data):
    pid = os.fork()
    if not pid:
        try:
            events = run(kill_at, data)
            (out.parent / "events").write_text(str(events))
            os._exit(0)
        except BaseException as error:
            (out.parent / "error").write_text(repr(error))
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

lists, streams = (lambda: token_batches(batches)), (lambda: iter(token_batches(batches)))
assert child(0, lists) == 0, (out.parent / "error").read_text()
expected = out.read_bytes()
total = int((out.parent / "events").read_text())
found = {"total": total, "kills": 0, "forwards": []}
for data in (lists, streams)[: int(sys.argv[5])]:
    for kill_at in range(1, total + 1, int(sys.argv[4])):
        out.unlink()
        assert child(kill_at, data) == -signal.SIGKILL, kill_at
        found["kills"] += 1
        if data is lists or not out.exists():
            code = child(0, data)
            assert code == 0, (kill_at, (out.parent / "error").read_text())
        else:  # killed when all was done but for what is removed
            for part in out.parent.glob(".*.part"):
                shutil.rmtree(part)
        assert out.read_bytes() == expected, kill_at
        left = sorted(each.name for each in out.parent.iterdir())
        assert set(left) <= {"events", "error", out.name}, (kill_at, left)
print(json.dumps(found))
"""


def killed(tmp_path: Path, kinds: dict[str, Any], step: int, ways: int) -> dict[str, Any]:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            PARENT,
            str(tmp_path / "stats.safetensors"),
            str(BATCHES),
            json.dumps(kinds),
            str(step),
            str(ways),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@posix_only
@pytest.mark.slow
def test_killed_here_and_there(tmp_path: Path) -> None:
    found = killed(tmp_path, {"histograms": True, "products": 32}, step=7, ways=1)
    assert found["total"] > 4 * BATCHES
    assert found["kills"] >= 6


@posix_only
@pytest.mark.slow
def test_killed_everywhere(tmp_path: Path) -> None:
    found = killed(tmp_path, {"histograms": True, "kv": True, "products": 0}, step=1, ways=2)
    assert found["kills"] > 50


class Stopped(Exception):
    """Ends a pass in the middle."""


def stopping(count: int, batches: list[Any]) -> Any:
    """A model that stops before the batch of this number, and how many it has run."""
    model, ran = tiny_llama(), []
    forward = model.forward

    def limited(*args: Any, **kwargs: Any) -> Any:
        if len(ran) == count:
            raise Stopped
        ran.append(kwargs)
        return forward(*args, **kwargs)

    model.forward = limited
    return model, ran


def test_batches_are_not_run_again(tmp_path: Path) -> None:
    out, batches = tmp_path / "stats.safetensors", token_batches(BATCHES)
    model, ran = stopping(4, batches)
    with pytest.raises(Stopped):
        observe(model, batches, out, every=0)
    assert len(ran) == 4
    model, ran = stopping(99, batches)
    told: list[tuple[str, int, int | None]] = []
    observe(model, batches, out, every=0, progress=lambda *each: told.append(each))
    # asked for the fifth batch, it keeps what the first four gave
    assert len(ran) == BATCHES - 4
    assert told == [("batches", done, BATCHES) for done in range(4, BATCHES + 1)]


def test_nothing_is_kept_before_it_is_time(tmp_path: Path) -> None:
    out, batches = tmp_path / "stats.safetensors", token_batches(BATCHES)
    model, _ = stopping(4, batches)
    with pytest.raises(Stopped):
        observe(model, batches, out)  # a minute is not over
    assert list(tmp_path.iterdir()) == []


def test_the_interval_counts_from_one_checkpoint_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, kept = [0.0], []
    monkeypatch.setattr(passes.time, "monotonic", lambda: clock[0])
    model = tiny_llama()
    model.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + 10))
    write = passes.Staging.write

    def counted(self: Any, key: str, *args: Any, **kwargs: Any) -> None:
        kept.append((key, clock[0]))
        write(self, key, *args, **kwargs)

    monkeypatch.setattr(passes.Staging, "write", counted)
    observe(model, token_batches(8), tmp_path / "stats.safetensors", every=25)
    assert kept == [("0", 30.0), ("1", 60.0), ("stats.safetensors", 80.0)]


def test_other_options_or_data_begin_anew(tmp_path: Path) -> None:
    out, batches = tmp_path / "stats.safetensors", token_batches(BATCHES)
    model, _ = stopping(4, batches)
    with pytest.raises(Stopped):
        observe(model, batches, out, every=0)
    model, ran = stopping(99, batches)
    other = token_batches(BATCHES, seed=5)
    found = observe(model, other, out, every=0)
    assert len(ran) == BATCHES
    assert found.states.keys() == observe(tiny_llama(), other).states.keys()
    assert os.listdir(tmp_path) == [out.name]


def test_other_batches_of_a_stream_are_refused(tmp_path: Path) -> None:
    out, batches = tmp_path / "stats.safetensors", token_batches(BATCHES)
    model, _ = stopping(4, batches)
    with pytest.raises(Stopped):
        observe(model, iter(batches), out, every=0)
    message = "holds statistics of 4 batches of other data: remove it to begin anew"
    with pytest.raises(CalipersError, match=message):
        observe(tiny_llama(), iter(token_batches(BATCHES, seed=5)), out, every=0)
    with pytest.raises(CalipersError, match=message):
        observe(tiny_llama(), iter(batches[:3]), out, every=0)
    found = observe(tiny_llama(), iter(batches), out, every=0)
    expected = observe(tiny_llama(), batches)
    assert found.manifest == expected.manifest


def test_a_file_that_is_there(tmp_path: Path) -> None:
    out, batches = tmp_path / "stats.safetensors", token_batches()
    observe(tiny_llama(), batches, out)
    before = out.stat().st_mtime_ns
    messages: list[str] = []
    sink = logger.add(lambda message: messages.append(str(message)), level="INFO")
    model, ran = stopping(0, batches)
    observe(model, batches, out)  # it is what would come out
    logger.remove(sink)
    assert ran == []
    assert out.stat().st_mtime_ns == before
    assert any("is there already, of the same model, data and options" in m for m in messages)
    for options in ({"histograms": True}, {"ignore": "re:.*up_proj"}, {"name": "text"}):
        with pytest.raises(CalipersError, match="exists: choose another place, or replace it"):
            observe(tiny_llama(), batches, out, **options)
    with pytest.raises(CalipersError, match="exists"):
        observe(tiny_llama(), token_batches(seed=5), out)
    observe(tiny_llama(), token_batches(seed=5), out, force=True)
    assert out.stat().st_mtime_ns > before


def test_an_unfinished_file_is_not_read_as_a_whole_one(tmp_path: Path) -> None:
    out, batches = tmp_path / "stats.safetensors", token_batches(BATCHES)
    model, _ = stopping(4, batches)
    with pytest.raises(Stopped):
        observe(model, batches, out, every=0)
    kept = max(tmp_path.rglob("scratch/*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    with pytest.raises(StatisticsError, match="interrupted after 4 batches"):
        Statistics.load(kept)
