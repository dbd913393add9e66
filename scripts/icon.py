#!/usr/bin/env python3
"""Draw the pack's icon and banner, docs/icon.svg and docs/banner.svg, and make PNGs of them with Chromium.

    python3 scripts/dev.py scripts/icon.py

A skein is a loosely coiled length of yarn: three strands wound to an S.
"""

import math
import subprocess
import tempfile
from pathlib import Path

from browser import MISSING, find
from PIL import Image

DOCS = Path(__file__).resolve().parent.parent / "docs"
BACKGROUND, YARN, WORDS = "#24305a", "#ffab4a", "#f4f1ea"
RADIUS, APART, THICK = 62, 38, 25  # of the middle strand's arcs; strands from each other; a strand
ENDS = {-1: 28, 0: 2, 1: -16}  # degrees past three o'clock at which each strand begins, counted against the clock
NAME, LINES = "Skein", ("HunyuanVideo and other diffusion models,", "faster in ComfyUI, on one GPU or several")


def strand(which: int) -> str:
    """The path of one strand around (0, 0): three quarters of an upper circle, then of a lower one."""
    upper, lower = RADIUS + which * APART, RADIUS - which * APART
    begin, end = math.radians(ENDS[which]), math.radians(ENDS[-which])
    first = upper * math.cos(begin), -RADIUS - upper * math.sin(begin)
    last = -lower * math.cos(end), RADIUS + lower * math.sin(end)
    return (
        f"M{first[0]:.1f} {first[1]:.1f}A{upper} {upper} 0 1 0 0 {which * APART}"
        f"A{lower} {lower} 0 1 1 {last[0]:.1f} {last[1]:.1f}"
    )


def mark(x: float, y: float, scale: float = 1) -> str:
    paths = "".join(f'<path d="{strand(which)}"/>' for which in ENDS)
    look = f'fill="none" stroke="{YARN}" stroke-width="{THICK}" stroke-linecap="round"'
    return f'<g transform="translate({x} {y}) scale({scale})" {look}>{paths}</g>'


def drawing(width: int, height: int, corner: int, inside: str) -> str:
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    tile = f'<rect width="{width}" height="{height}" rx="{corner}" fill="{BACKGROUND}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{tile}{inside}</svg>\n'


def icon() -> str:
    return drawing(400, 400, 80, mark(200, 200))


def banner() -> str:
    """21:9, as the registry shows it."""
    words = f'<text x="490" y="260" font-size="150" font-weight="700">{NAME}</text>'
    for number, line in enumerate(LINES):
        words += f'<text x="496" y="{340 + 50 * number}" font-size="32">{line}</text>'
    text = f'<g fill="{WORDS}" font-family="DejaVu Sans, Verdana, sans-serif">{words}</g>'
    return drawing(1260, 540, 0, mark(265, 270, 1.25) + text)


def rasterise(drawn: Path, width: int, height: int) -> None:
    """The SVG as a PNG beside it, of few colours, transparent where nothing is drawn."""
    chromium = find()
    if chromium is None:
        raise SystemExit(MISSING)
    with tempfile.TemporaryDirectory() as profile:
        page, taken = Path(profile) / "page.html", Path(profile) / "taken.png"
        page.write_text(f"<style>body{{margin:0}} svg{{display:block}}</style>{drawn.read_text()}")
        command = [chromium, "--headless", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={profile}/user"]
        command += ["--default-background-color=00000000", f"--window-size={width},{height + 200}"]
        command += [f"--screenshot={taken}", page.as_uri()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        picture = Image.open(taken).convert("RGBA").crop((0, 0, width, height))
    few = picture.quantize(64, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(drawn.with_suffix(".png"), optimize=True)


def main() -> None:
    for name, draw, width, height in (("icon", icon, 400, 400), ("banner", banner, 1260, 540)):
        path = DOCS / f"{name}.svg"
        path.write_text(draw())
        rasterise(path, width, height)
        print(f"{path} {path.with_suffix('.png').stat().st_size} bytes as a PNG")


if __name__ == "__main__":
    main()
