"""What a command holds in memory does not grow with the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import architectures

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, glibc gives back")

MEGABYTE = 2**20
SHARD = 20 * MEGABYTE

CHILD = """
import json, resource, sys
from loguru import logger
logger.remove()
from calipers.streaming import quantize_checkpoint

start = 0

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def tell(stage, done, total):
    global start
    start = start or peak()

report = quantize_checkpoint(
    sys.argv[1], sys.argv[2], sys.argv[3], load_check=False, shard_bytes=int(sys.argv[4]),
    progress=tell,
)
print(json.dumps({"start": start, "more": peak() - start, "read": report.bytes_before}))
"""


def measure(source: Path, out: Path, scheme: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, source, out, scheme, str(SHARD)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def save_llama(folder: Path, layers: int) -> Path:
    sizes = {**architectures.GROUPED, "hidden_size": 1024, "intermediate_size": 4096}
    sizes["num_hidden_layers"] = layers
    with torch.device("meta"):
        config = architectures.transformers.LlamaConfig(**sizes)
        model = architectures.transformers.LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    model.save_pretrained(folder, max_shard_size="60MB")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4A16"])
def test_peak_memory_has_the_stated_bound(tmp_path: Path, scheme: str) -> None:
    few = measure(save_llama(tmp_path / "few", 4), tmp_path / "few out", scheme)
    many = measure(save_llama(tmp_path / "many", 16), tmp_path / "many out", scheme)
    assert many["read"] > 3.9 * few["read"] > 450 * MEGABYTE / 4
    unit = 4096 * 1024 * 2 * (2 if scheme == "NVFP4A16" else 1)  # gate and up share a scale
    bound = 2 * SHARD + 128 * MEGABYTE + 16 * unit
    assert many["more"] <= bound < many["read"]
