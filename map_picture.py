"""The map of sparse attention as pixels: how much of its attention each head of each layer has computed."""

from PIL import Image, ImageColor

from .picture import LINE, SOFT, Canvas
from .sparse_runs import SparseRun

# Of a density of 0 and of 1: --skein-none and --skein-all in web/style.css.
NONE, ALL = "#2b1a06", "#fbbf4e"
LEGEND = "part of attention computed"
DENSE = "no layer was sparse"


def colour_of(density: float) -> tuple[int, int, int]:
    """The colour of a density, 0 to 1: red, green and blue, 0 to 255."""
    none, full = ImageColor.getrgb(NONE)[:3], ImageColor.getrgb(ALL)[:3]
    red, green, blue = (round(low + density * (high - low)) for low, high in zip(none, full))
    return red, green, blue


def draw_map(run: SparseRun, width: int = 960, height: int = 480) -> Image.Image:
    """A run as an RGB picture: a row for each layer, a column for each head. Raises ValueError if the size, in pixels,
    is no picture's."""
    return _Map(run, width, height).finished()


class _Map(Canvas):
    def __init__(self, run: SparseRun, width: int, height: int):
        super().__init__(width, height)
        self.layers = run.layers
        self.heads = max((len(layer.density) for layer in run.layers), default=0)
        self.draw_title(run.summary(), 5 * self.unit)
        if not self.heads:
            middle = self.image.width / 2, (self.top + self.bottom) / 2
            self.pen.text(middle, DENSE, SOFT, self.font, anchor="mm")
            return
        longest = max(self.pen.textlength(layer.path, self.font) for layer in run.layers)
        self.left = min(longest + 7 * self.unit, self.image.width / 2)
        self._draw_legend()
        self._draw_cells()
        self._draw_layers()
        self._draw_heads()

    def _x(self, head: int) -> float:
        return self.left + (self.right - self.left) * head / self.heads

    def _y(self, layer: int) -> float:
        return self.top + (self.bottom - self.top) * layer / len(self.layers)

    def _draw_cells(self) -> None:
        for i, layer in enumerate(self.layers):
            for head, density in enumerate(layer.density):
                corners = (self._x(head), self._y(i), self._x(head + 1) - 1, self._y(i + 1) - 1)
                self.pen.rectangle([round(each) for each in corners], fill=colour_of(density))
        edge = (self.left - 2, self.top - 2, self.right + 1, self.bottom + 1)
        self.pen.rectangle([round(each) for each in edge], outline=LINE, width=2)  # none is as dark as the ground

    def _draw_layers(self) -> None:
        """Their names, as many as have room."""
        free = self.top
        for i, layer in enumerate(self.layers):
            y = (self._y(i) + self._y(i + 1)) / 2
            if y >= free:
                self.pen.text((self.left - 2 * self.unit, y), layer.path, SOFT, self.font, anchor="rm")
                free = y + 5 * self.unit

    def _draw_heads(self) -> None:
        y, free = self.bottom + 2 * self.unit, self.left
        for head in range(self.heads):
            x = (self._x(head) + self._x(head + 1)) / 2
            if x >= free:
                self.pen.text((x, y), str(head), SOFT, self.font, anchor="mt")
                free = x + 9 * self.unit
        self.pen.text(((self.left + self.right) / 2, y + 5 * self.unit), "head", SOFT, self.font, anchor="mt")

    def _draw_legend(self) -> None:
        """The colours from 0 % to 100 %."""
        x, y, height = 5 * self.unit, 15 * self.unit, 3 * self.unit
        for text in (LEGEND, "0 %"):
            self.pen.text((x, y), text, SOFT, self.font, anchor="lm")
            x += self.pen.textlength(text, self.font) + 2.5 * self.unit
        length = round(30 * self.unit)
        for step in range(length):
            line = [(x + step, y - height / 2), (x + step, y + height / 2)]
            self.pen.line(line, fill=colour_of(step / (length - 1)), width=1)
        self.pen.text((x + length + 2.5 * self.unit, y), "100 %", SOFT, self.font, anchor="lm")
