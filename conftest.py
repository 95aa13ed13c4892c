"""Which modules of the package are searched for doctests: those whose peers are installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).parent
_SOURCE = _ROOT / "src"

# A test module that cannot be imported must stay an error, so import errors are not ignored at
# large: with --doctest-ignore-import-errors such a module would count as empty.
collect_ignore = [
    str(path)
    for peer in ("triton", "llmcompressor")
    if find_spec(peer) is None
    for path in _SOURCE.rglob("*.py")
    if peer in path.relative_to(_SOURCE).as_posix()
]
# Run by vLLM's own interpreter, which alone has vLLM.
collect_ignore += map(str, _ROOT.glob("tests/*/vllm_logprobs.py"))
collect_ignore += map(str, _ROOT.glob("tests/*/lent"))
