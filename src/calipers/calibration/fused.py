"""`find_fused_groups`: sibling layers that inference engines fuse into one matrix.

vLLM keeps one global scale for a fused NVFP4 layer (qkv_proj, gate_up_proj, ...), so the members
must be quantized with the same one.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["find_fused_groups"]

_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


def find_fused_groups(names: Iterable[str]) -> list[list[str]]:
    """Split module names into groups that share their global scales.

    Args:
        names: Full names of modules, "model.layers.0.self_attn.q_proj".

    Returns:
        Every name once, in groups in the order of their first members; members are siblings
        under one parent. A group may lack members; a module that is never fused stands alone.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        family = next((family[0] for family in _FUSED if leaf in family), leaf)
        groups.setdefault((parent, family), []).append(name)
    return list(groups.values())
