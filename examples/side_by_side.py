"""What the examples share: one recipe run by llmcompressor twice, the second time with calipers.

Each run starts from the embedded demo model, saves a compressed checkpoint, loads it again with
transformers and measures its perplexity on text that was not calibrated with.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from llmcompressor import oneshot
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import calipers
from calipers.demo import CALIBRATION_TEXT, HELDOUT_TEXT, MODEL_PATH
from calipers.integrations.llmcompressor import install
from calipers.text import read_batches

Recipe = Callable[[], Any]


def run(title: str, recipe: Recipe, ours: Recipe | None = None, *, data: bool = True) -> None:
    """Print the perplexity of a recipe's result with llmcompressor's observers and with calipers.

    Args:
        title: What the recipe does.
        recipe: Makes the recipe.
        ours: Makes the recipe for calipers, where it names other observers; None takes the same.
        data: Whether the recipe gets calibration data.
    """
    options = argparse.ArgumentParser(description=title)
    options.add_argument("--out", type=Path, help="keep the checkpoints in this folder")
    options.add_argument("--samples", type=int, default=16, help="sequences to judge by")
    given = options.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    heldout = read_batches(HELDOUT_TEXT, tokenizer, sequence_length=128, samples=given.samples)
    batches = calibration_batches(tokenizer) if data else None
    float_model = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
    rows = [("float", calipers.perplexity(float_model, heldout), 0.0)]
    with TemporaryDirectory() as scratch:
        folder = given.out or Path(scratch)
        for name, make, installed in (
            ("llmcompressor", recipe, nullcontext),
            ("calipers", ours or recipe, lambda: install(replace=True)),
        ):
            start = time.perf_counter()
            with installed():
                quantize(make(), copy.deepcopy(batches), tokenizer, folder / name)
            seconds = time.perf_counter() - start
            loaded = AutoModelForCausalLM.from_pretrained(folder / name)
            rows.append((f"observers of {name}", calipers.perplexity(loaded, heldout), seconds))
    print(title)
    for name, judged, seconds in rows:
        print(f"  {name:26} perplexity {judged:8.3f}   {seconds:6.1f} s")


def calibration_batches(tokenizer: Any) -> DataLoader:
    """Batches in the form that `oneshot` hands to the model."""
    ids = torch.cat(read_batches(CALIBRATION_TEXT, tokenizer, sequence_length=128, samples=16))
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    return DataLoader(samples, batch_size=8)


def quantize(recipe: Any, batches: DataLoader | None, tokenizer: Any, folder: Path) -> None:
    """What every user of llmcompressor does; calipers does not show here."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
    oneshot(
        model=model, processor=tokenizer, recipe=recipe, dataset=batches, output_dir=str(folder)
    )
