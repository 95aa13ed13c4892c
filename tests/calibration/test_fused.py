from __future__ import annotations

from calipers.calibration.fused import find_fused_groups


def test_siblings_share_and_others_stand_alone():
    names = [
        "l.0.attn.q_proj",
        "l.0.attn.k_proj",
        "l.0.attn.v_proj",
        "l.0.attn.o_proj",
        "l.0.mlp.gate_proj",
        "l.0.mlp.up_proj",
        "l.0.mlp.down_proj",
        "l.1.mlp.up_proj",
        "l.1.mlp.gate_proj",
        "moe.0.w1",
        "moe.0.w2",
        "moe.0.w3",
        "moe.1.w3",
        "l.2.q_a_proj",
        "l.2.kv_a_proj_with_mqa",
        "l.2.q_b_proj",
        "q_proj",
        "v_proj",
    ]
    assert find_fused_groups(names) == [
        ["l.0.attn.q_proj", "l.0.attn.k_proj", "l.0.attn.v_proj"],
        ["l.0.attn.o_proj"],
        ["l.0.mlp.gate_proj", "l.0.mlp.up_proj"],
        ["l.0.mlp.down_proj"],
        ["l.1.mlp.up_proj", "l.1.mlp.gate_proj"],
        ["moe.0.w1", "moe.0.w3"],
        ["moe.0.w2"],
        ["moe.1.w3"],
        ["l.2.q_a_proj", "l.2.kv_a_proj_with_mqa"],
        ["l.2.q_b_proj"],
        ["q_proj", "v_proj"],
    ]
