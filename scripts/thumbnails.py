"""The pictures that tell the shipped workflows apart in ComfyUI's template browser, where a card's picture is square.

Drawn, because the results of the large models cannot be made without them: the model, the task as a symbol (a film
strip, or a picture, with the picture it starts from), and a labelled symbol for each technique of the workflow.
"""

from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE, MARGIN = 512, 36
BACK, CARD, TEXT, SOFT = "#181b21", "#262b34", "#f2f4f7", "#aab4c3"
ROW, SYMBOL = 62, 34  # height of a technique's label; side of its symbol
Box = tuple[int, int, int, int]  # left, top, right, bottom
Draw = ImageDraw.ImageDraw


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def bolt(draw: Draw, box: Box, colour: str) -> None:
    left, top, right, bottom = box
    w, h = right - left, bottom - top
    points = ((0.6, 0), (0.15, 0.58), (0.45, 0.58), (0.35, 1), (0.85, 0.4), (0.52, 0.4))
    draw.polygon([(left + x * w, top + y * h) for x, y in points], fill=colour)


def eight(draw: Draw, box: Box, colour: str) -> None:
    draw.rounded_rectangle(box, 7, fill=colour)
    draw.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), "8", CARD, font(28), anchor="mm")


def layers(draw: Draw, box: Box, colour: str) -> None:
    """Blocks joined into one: three bars in a frame."""
    left, top, right, bottom = box
    draw.rounded_rectangle(box, 6, outline=colour, width=3)
    for i in range(3):
        y = top + 8 + i * (bottom - top - 10) // 3
        draw.rectangle((left + 8, y, right - 8, y + 4), fill=colour)


def reuse(draw: Draw, box: Box, colour: str) -> None:
    """An arrow that goes round."""
    draw.arc(box, 300, 230, fill=colour, width=5)
    x, y = box[2] - 8, box[1] + 5
    draw.polygon([(x - 9, y - 8), (x + 6, y + 1), (x - 9, y + 9)], fill=colour)


def holes(draw: Draw, box: Box, colour: str) -> None:
    """A grid of which some cells are computed."""
    cell = (box[2] - box[0]) // 4
    draw.rectangle(box, outline=colour, width=2)
    for i in (0, 4, 5, 9, 10, 12, 15):
        left, top = box[0] + i % 4 * cell, box[1] + i // 4 * cell
        draw.rectangle((left + 1, top + 1, left + cell, top + cell), fill=colour)


def two_cards(draw: Draw, box: Box, colour: str) -> None:
    left, top, right, bottom = box
    for y in (top + 1, (top + bottom) // 2 + 2):
        draw.rounded_rectangle((left, y, right, y + 13), 3, outline=colour, width=3)
        draw.ellipse((right - 12, y + 4, right - 7, y + 9), fill=colour)


def frames(draw: Draw, box: Box, colour: str) -> None:
    """A frame in strips, as the GPUs decode it."""
    draw.rectangle(box, outline=colour, width=3)
    for i in (1, 2):
        x = box[0] + i * (box[2] - box[0]) // 3
        draw.line((x, box[1], x, box[3]), fill=colour, width=3)


def letters(draw: Draw, box: Box, colour: str) -> None:
    draw.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), "T8", colour, font(30), anchor="mm")


def plus(draw: Draw, box: Box, colour: str) -> None:
    x, y = (box[0] + box[2]) // 2, (box[1] + box[3]) // 2
    draw.line((box[0] + 3, y, box[2] - 3, y), fill=colour, width=7)
    draw.line((x, box[1] + 3, x, box[3] - 3), fill=colour, width=7)


# node -> its label and symbol, in the order in which they are drawn; the first of them are what a workflow is about
TECHNIQUES: dict[str, tuple[str, Callable[[Draw, Box, str], None]]] = {
    "SkeinSpeedUp": ("Speed Up", bolt),
    "SkeinContextParallel": ("all GPUs", two_cards),
    "SkeinSparseAttention": ("Sparse", holes),
    "LoraLoaderModelOnly": ("LoRA", plus),
    "SkeinAttention": ("Attention", bolt),
    "SkeinFP8Quantize": ("FP8", eight),
    "SkeinCompile": ("Compiled", layers),
    "SkeinFirstBlockCache": ("Cache", reuse),
    "SkeinFP8TextEncoder": ("FP8 text", letters),
    "SkeinVAEDecodeParallel": ("Decode", frames),
}
PARTICULAR = ("SkeinSpeedUp", "SkeinContextParallel", "SkeinSparseAttention", "LoraLoaderModelOnly")


def film(draw: Draw, box: Box, colour: str) -> None:
    left, top, right, bottom = box
    draw.rounded_rectangle(box, 10, fill=colour)
    for x in range(left + 10, right - 10, 22):
        for y in (top + 8, bottom - 18):
            draw.rectangle((x, y, x + 10, y + 10), fill=BACK)
    x, y = (left + right) // 2, (top + bottom) // 2
    draw.polygon([(x - 13, y - 18), (x - 13, y + 18), (x + 19, y)], fill=BACK)


def photo(draw: Draw, box: Box, colour: str) -> None:
    left, top, right, bottom = box
    draw.rounded_rectangle(box, 10, fill=colour)
    draw.ellipse((left + 18, top + 16, left + 38, top + 36), fill=BACK)
    low = bottom - 12
    draw.polygon([(left + 14, low), (left + 50, top + 44), (left + 78, low)], fill=BACK)
    draw.polygon([(left + 58, low), (right - 40, top + 26), (right - 12, low)], fill=BACK)


def task(draw: Draw, words: str, top: int, colour: str) -> None:
    """The task's symbols from left to right: "image to video" is a picture, an arrow and a film strip."""
    source, result = words.split(" to ")
    left = MARGIN
    if source == "image":
        photo(draw, (left, top, left + 130, top + 92), SOFT)
        draw.line((left + 144, top + 46, left + 176, top + 46), fill=SOFT, width=6)
        draw.polygon([(left + 172, top + 34), (left + 192, top + 46), (left + 172, top + 58)], fill=SOFT)
        left += 206
    (film if result == "video" else photo)(draw, (left, top, left + 130, top + 92), colour)


def label(draw: Draw, box: Box, node: str, colour: str) -> None:
    """A technique's symbol and name; what the workflow is about stands out."""
    text, symbol = TECHNIQUES[node]
    back, front, name = (colour, BACK, BACK) if node in PARTICULAR else (CARD, colour, TEXT)
    draw.rounded_rectangle(box, 10, fill=back)
    left, middle = box[0] + 14, (box[1] + box[3]) // 2
    symbol(draw, (left, middle - SYMBOL // 2, left + SYMBOL, middle + SYMBOL // 2), front)
    draw.text((box[0] + 62, middle), text, name, font(30), anchor="lm")


def draw_thumbnail(path: Path, model: str, words: str, note: str, nodes: set[str], colour: str) -> None:
    """model: its name. words: the task. note: what else is particular, at the right. nodes: those of the workflow."""
    image = Image.new("RGB", (SIDE, SIDE), BACK)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, SIDE, 14), fill=colour)
    size = 60
    while draw.textlength(model, font(size)) > SIDE - 2 * MARGIN:
        size -= 2
    draw.text((MARGIN, 40), model, TEXT, font(size))
    draw.text((MARGIN, 112), words, SOFT, font(34))
    task(draw, words, 168, colour)
    draw.text((SIDE - MARGIN, 214), note, colour, font(40), anchor="rm")
    present = [node for node in TECHNIQUES if node in nodes]
    width, first = (SIDE - 2 * MARGIN - 12) // 2, 284 if len(present) <= 4 else 274
    for i, node in enumerate(present):
        left, top = MARGIN + i % 2 * (width + 12), first + i // 2 * (ROW + 10)
        label(draw, (left, top, left + width, top + ROW), node, colour)
    image.save(path, quality=88)
