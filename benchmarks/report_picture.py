"""Quantize a model under two schemes, write the page that compares them, and take its picture.

    python -m benchmarks.report_picture /path/to/SmolLM2-135M docs/report-page.png

needs a Chromium (`apt-get install chromium`), and takes some minutes for a model of 135M weights.
Options that it does not know go to `calipers calibrate`, as `--eval-samples 8 --dtype float32`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

SCHEMES = ("NVFP4", "W4A16")
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


def calipers(*args: object) -> float:
    """Run the command; its seconds."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "calipers", *map(str, args)], check=True)
    return time.perf_counter() - started


def write_page(model: Path, folder: Path, more: list[str]) -> Path:
    page = folder / "report.html"
    made = [folder / f"{model.name}-{scheme}" for scheme in SCHEMES]
    for scheme, out in zip(SCHEMES, made, strict=True):
        given = () if scheme == "NVFP4" else ("--group-size", 64)
        calipers("calibrate", model, "--scheme", scheme, *given, *more, "--out", out)
    first, *others = made
    compared = [each for other in others for each in ("--compare", other)]
    seconds = calipers("report", first, *compared, "--out", page)
    print(f"page: {page.stat().st_size / 1e6:.2f} MB, written in {seconds:.1f} s")
    return page


def take_picture(page: Path, out: Path, height: int) -> None:
    """The top of the page in the light and the phone's in the dark, beside each other."""
    from PIL import Image

    views = ((1160, "light"), (390, "dark"))
    pictures = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = driver.chromium.launch(executable_path=chromium, args=list(FLAGS))
        for width, scheme in views:
            size = {"width": width, "height": 700}  # tables take a part of its height
            view = browser.new_page(viewport=size, color_scheme=scheme)
            view.goto(page.resolve().as_uri())
            path = Path(folder) / f"{scheme}.png"
            view.screenshot(path=path, full_page=True)
            whole = Image.open(path).convert("RGB")
            pictures.append(whole.crop((0, 0, width, height)))
        browser.close()
    width = sum(each.width for each in pictures) + 24
    both = Image.new("RGB", (width, height), "#c9ced6")
    at = 0
    for each in pictures:
        both.paste(each, (at, 0))
        at += each.width + 24
    # 128 colours are enough for the page, and less than half of the size
    both.quantize(128).save(out, optimize=True)
    print(f"picture: {out}, {out.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a transformers directory, or a page (.html)")
    parser.add_argument("out", type=Path, help="where to write the picture")
    parser.add_argument("--height", type=int, default=2150)
    given, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        page = given.model
        if page.suffix != ".html":
            page = write_page(given.model, Path(folder), more)
        take_picture(page, given.out, given.height)


if __name__ == "__main__":
    main()
