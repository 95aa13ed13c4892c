"""`statistics_from_imatrix`: an imatrix file of llama.cpp as statistics of a model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from calipers._unwrap import unwrap, without_wrappers
from calipers.calibration.experts import separated_experts
from calipers.observing.plan import plan_statistics, renamed_modules
from calipers.statistics_files import Fingerprint, Module, Options, Statistics, weight_digest
from calipers.statistics_files.imatrix import read_imatrix

__all__ = ["statistics_from_imatrix"]


def statistics_from_imatrix(
    path: str | Path,
    model: nn.Module,
    *,
    ignore: str | Iterable[str] = (),
    include: str | Iterable[str] = (),
) -> Statistics:
    """Statistics of a model's inputs, from an imatrix file (GGUF) of llama.cpp.

    The file does not say which weights it is of: the model is taken on trust, but for names and
    widths of its layers. It holds sums for weights alone, as float32.

    Args:
        path: The file.
        model: A transformers model whose architecture the package gguf knows.
        ignore: Modules left alone, as in `observe`.
        include: As in `observe`.

    Returns:
        What the observers "optimal" (imatrix) and "imatrix_mse" need.

    Raises:
        StatisticsError: No package gguf, no such architecture, or a file that is not of this model.
    """
    model = unwrap(model)
    with without_wrappers(model), separated_experts(model):
        observed = plan_statistics(model, Options(), ignore, include).observed
        weights = {each.name: each.module.get_parameter("weight") for each in observed}
        stored = renamed_modules(model, weights)
        modules = {
            name: Module(weight=weight_digest(each), stored_as=stored.get(name))
            for name, each in weights.items()
        }
        columns = {name: each.shape[-1] for name, each in weights.items()}
        return read_imatrix(path, Fingerprint.of(model), modules, columns)
