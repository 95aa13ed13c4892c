"""What saving must not do: touch the source, need what is not there, leave halves behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from calibration.tiny_models import tiny_llama
from calipers.calibration import calibrate
from calipers.checkpoint import save
from calipers.checkpoint.source import refuse_source
from calipers.errors import CheckpointError

TOKENIZER = {"tokenizer.json": "{}", "tokenizer.model": "spm", "custom.tiktoken": "a b"}
CARRIED = {
    "chat_template.jinja": "{{ messages }}",
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "modeling_tiny.py": "X = 1\n",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
}
NOT_CARRIED = {
    "model-00001-of-00002.safetensors": "w",
    "README.md": "#",
    "trainer_state.json": "{}",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    tiny_llama().save_pretrained(folder)
    (folder / "additional_chat_templates").mkdir()
    for name, text in {**TOKENIZER, **CARRIED, **NOT_CARRIED}.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def model(source):
    loaded = AutoModelForCausalLM.from_pretrained(source)
    calibrate(loaded, "W4A16", "memoryless_minmax")
    return loaded


def write(model, path, **options):
    return save(model, path, load_check=False, **options)


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


class TestSource:
    def test_every_place_that_would_harm_it_is_refused(self, model, source, tmp_path):
        link = tmp_path / "link"
        link.symlink_to(source)
        before = files(source)
        for place, how in [
            (source, "is the folder that the model was loaded from"),
            (link, "is the folder"),
            (source / ".." / source.name, "is the folder"),
            (source / "out", "lies inside the folder"),
            (link / "deep" / "out", "lies inside the folder"),
            (source.parent, "holds the folder"),
        ]:
            with pytest.raises(CheckpointError, match=how):
                write(model, place, force=True)
            assert files(source) == before

    def test_an_equal_file_system_entry_is_enough(self, tmp_path, monkeypatch):
        """Letter case, bind mounts: other words for one folder."""
        (tmp_path / "model").mkdir()
        monkeypatch.setattr(
            Path, "samefile", lambda self, other: str(self).lower() == str(other).lower()
        )
        with pytest.raises(CheckpointError, match="is the folder"):
            refuse_source(tmp_path / "MODEL", tmp_path / "model")

    def test_a_sibling_is_fine(self, source):
        refuse_source(source.parent / (source.name + "-W4A16"), source)


class TestCarriedFiles:
    def test_come_along(self, model, source, tmp_path):
        write(model, tmp_path / "out")
        for name in (*TOKENIZER, *CARRIED):
            assert (tmp_path / "out" / name).read_text() == (source / name).read_text(), name
        assert not files(tmp_path / "out") & set(NOT_CARRIED)

    def test_a_tokenizer_that_is_given_goes_first(self, model, tmp_path):
        class Own:
            def save_pretrained(self, folder):
                (Path(folder) / "tokenizer_config.json").write_text("own")
                (Path(folder) / "chat_template.jinja").write_text("own")

        write(model, tmp_path / "out", tokenizer=Own())
        out = tmp_path / "out"
        assert (out / "chat_template.jinja").read_text() == "own"
        assert not files(out) & set(TOKENIZER)
        assert files(out) >= set(CARRIED)

    def test_a_model_of_no_folder_has_none(self, tmp_path):
        model = tiny_llama()
        calibrate(model, "W4A16", "memoryless_minmax")
        write(model, tmp_path / "out")
        expected = {"config.json", "generation_config.json", "model.safetensors"}
        assert files(tmp_path / "out") == expected


def test_a_generation_config_that_transformers_loads_is_saved(source, tmp_path):
    """temperature without do_sample: half of all checkpoints have it."""
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    (copy / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9}))
    model = AutoModelForCausalLM.from_pretrained(copy)
    calibrate(model, "W4A16", "memoryless_minmax")
    with pytest.raises(ValueError, match="temperature"):
        model.generation_config.validate(strict=True)
    before = model.generation_config
    write(model, tmp_path / "out")
    assert model.generation_config is before
    saved = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (saved.temperature, saved.top_p) == (0.6, 0.9)


class TestFullDisk:
    @pytest.mark.parametrize("taken", [True, False])
    @pytest.mark.parametrize("where", ["weights", "carried", "tokenizer", "tokenizers"])
    def test_the_old_folder_stays(self, model, tmp_path, monkeypatch, where, taken):
        from safetensors import SafetensorError

        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        full = {
            "weights": SafetensorError("I/O error: No space left on device (os error 28)"),
            # so the tokenizers library tells it
            "tokenizers": Exception("No space left on device (os error 28)"),
        }.get(where, full)

        def fail(*args, **kwargs):
            raise full

        class Tokenizer:
            save_pretrained = staticmethod(fail)

        options = {}
        if where == "weights":
            monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
        elif where == "carried":
            monkeypatch.setattr(shutil, "copyfile", fail)
        else:
            options = {"tokenizer": Tokenizer()}
        out = tmp_path / "out"
        if taken:
            out.mkdir()
            (out / "old.txt").write_text("old")
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=r"out cannot be written: .*No space left"):
            write(model, out, force=True, **options)
        assert [p.name for p in tmp_path.rglob("*")] == (["out", "old.txt"] if taken else [])
        for name, value in model.state_dict().items():
            assert torch.equal(value, weights[name])

    @pytest.mark.skipif(sys.platform == "win32", reason="no limits")
    def test_a_limit_of_file_sizes(self, source, tmp_path):
        script = """
import resource, sys
from transformers import AutoModelForCausalLM
import calipers
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
calipers.calibrate(model, "W4A16", "memoryless_minmax")
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    calipers.save(model, sys.argv[2], force=True, load_check=False)
except calipers.errors.CheckpointError as error:
    print("refused:", error)
"""
        out = tmp_path / "out"
        out.mkdir()
        (out / "old.txt").write_text("old")
        child = subprocess.run(
            [sys.executable, "-c", script, str(source), str(out)], capture_output=True, text=True
        )
        assert f"refused: {out} cannot be written" in child.stdout, child.stderr[-2000:]
        assert [p.name for p in tmp_path.rglob("*")] == ["out", "old.txt"]


class TestUnwritablePlaces:
    @pytest.mark.parametrize("kind", ["file", "long", "proc"])
    def test_found_before_the_work(self, model, tmp_path, monkeypatch, kind):
        (tmp_path / "file").write_text("mine")
        places = {
            "file": tmp_path / "file" / "out",
            "long": tmp_path / ("n" * 250),
            "proc": Path("/proc/calipers/out"),
        }
        if kind == "proc" and sys.platform != "linux":
            pytest.skip("no /proc")

        def work(*args, **kwargs):
            raise AssertionError("written")

        module = sys.modules[save.__module__]
        monkeypatch.setattr(module, "write_checkpoint", work)
        monkeypatch.setattr(module, "refuse_unloadable", work)
        with pytest.raises(CheckpointError, match="cannot be written"):
            save(model, places[kind])
        assert [p.name for p in tmp_path.iterdir()] == ["file"]
