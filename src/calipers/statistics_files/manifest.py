"""`Manifest`: what a statistics file says about itself, beside its numbers."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from pydantic import BaseModel, ConfigDict, NonNegativeInt

import calipers
from calipers.statistics_files.fingerprint import Fingerprint

__all__ = ["Data", "Manifest", "Module", "Options", "installed_versions"]

_LIBRARIES = ("torch", "transformers", "compressed-tensors")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Options(_Record):
    """What was gathered, and how.

    Attributes:
        products: Columns of a group whose products are summed, for the objective "hessian"; 0 for
            whole rows, None for no products.
        histograms: Whether values of activations are counted.
        outputs: Whether outputs of layers were watched.
        states: Which states of attention were watched: "", "kv" or "qkv".
        use_attention_mask: Whether padding was left out.
        all_experts: Whether every expert saw every token.
    """

    products: int | None = None
    histograms: bool = False
    outputs: bool = False
    states: str = ""
    use_attention_mask: bool = True
    all_experts: bool = False


class Data(_Record):
    """One pass over data.

    Attributes:
        name: What it was called; of an imatrix file its data sets.
        sha256: Digest of its batches in their order; of an imatrix file that of the file.
        batches: Batches, of an imatrix file chunks.
        tokens_given: Tokens of batches that carry a mask of them; of an imatrix file a chunk's
            times the chunks.
        tokens_counted: Those of them that counted.
    """

    name: str | None
    sha256: str
    batches: NonNegativeInt
    tokens_given: NonNegativeInt = 0
    tokens_counted: NonNegativeInt = 0


class Module(_Record):
    """What was seen of one module.

    Attributes:
        weight: The `weight_digest` of its weight; "" for attention, which has none of its own.
        stored_as: Its name in checkpoints, where transformers renames weights; None for its own.
        tokens: Tokens that passed through it.
        calls: How often it was called.
        outer_calls: How often the module around it was.
        unmasked: Whether it saw, in a batch with a mask, values that are not arranged by token.
    """

    weight: str
    stored_as: str | None = None
    tokens: NonNegativeInt = 0
    calls: NonNegativeInt = 0
    outer_calls: NonNegativeInt = 0
    unmasked: bool = False

    def plus(self, other: Module) -> Module:
        """What both saw together."""
        sums = {
            "tokens": self.tokens + other.tokens,
            "calls": self.calls + other.calls,
            "outer_calls": self.outer_calls + other.outer_calls,
            "unmasked": self.unmasked or other.unmasked,
        }
        return self.model_copy(update=sums)


class Manifest(_Record):
    """What a statistics file says about itself.

    Attributes:
        fingerprint: Of the model.
        options: What was gathered, and how.
        modules: The modules that were watched, by name.
        data: The passes over data behind the numbers, in the order in which they were merged.
        versions: Name of a library to the versions of it that took part.
        complete: False of what an interrupted `observe` goes on from.
    """

    fingerprint: Fingerprint
    options: Options
    modules: dict[str, Module]
    data: list[Data]
    versions: dict[str, list[str]]
    complete: bool = True

    @property
    def batches(self) -> int:
        """Batches of all passes."""
        return sum(each.batches for each in self.data)


def installed_versions() -> dict[str, list[str]]:
    """Versions of calipers and of what computes with it."""
    found = {"calipers": [calipers.__version__]}
    for library in _LIBRARIES:
        try:
            found[library] = [version(library)]
        except PackageNotFoundError:
            continue
    return found
