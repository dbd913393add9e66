"""The cache's picture as pixels: the change of each model call, the threshold, and what was reused. What other
pictures share with it: the colours, and Canvas."""

import math

from PIL import Image, ImageDraw, ImageFont

from .runs import Run

GROUND, LINE, SOFT, TEXT = "#16181d", "#3a3f4a", "#9aa3b2", "#f2f4f7"
COMPUTED, REUSED, THRESHOLD = "#e08a1e", "#17a398", "#5b9bff"
TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
FLOOR = 0.001  # the smallest change that the logarithmic axis shows
WIDTH, HEIGHT = (256, 4096), (192, 4096)  # pixels: least and most
SMOOTH = 2  # drawn so many times larger, then made smaller


def draw_run(run: Run, width: int = 960, height: int = 480) -> Image.Image:
    """A run as an RGB picture. Raises ValueError if it has no calls, or the size is no picture's."""
    if not run.calls:
        raise ValueError("The run has no model calls to draw.")
    return _Drawing(run, width, height).finished()


class Canvas:
    """A picture while it is drawn, SMOOTH times larger. Sizes follow from the smaller side. Raises ValueError if the
    size, in pixels, is no picture's."""

    def __init__(self, width: int, height: int):
        for name, pixels, (least, most) in (("width", width, WIDTH), ("height", height, HEIGHT)):
            if not least <= pixels <= most:
                raise ValueError(f"The picture's {name} must be {least} to {most} pixels, not {pixels}.")
        self.size = width, height
        width, height = SMOOTH * width, SMOOTH * height
        self.image = Image.new("RGB", (width, height), GROUND)
        self.pen = ImageDraw.Draw(self.image)
        self.unit = min(width, height) / 100
        self.font = ImageFont.load_default(max(4.2 * self.unit, 6))
        self.left, self.right = 13 * self.unit, width - 5 * self.unit
        self.top, self.bottom = 22 * self.unit, height - 14 * self.unit

    def finished(self) -> Image.Image:
        return self.image.resize(self.size, Image.Resampling.LANCZOS)

    def draw_title(self, text: str, left: float) -> None:
        """On top, from `left` on, smaller where it has no room."""
        title, room = ImageFont.load_default(5 * self.unit), self.right - left
        if (length := self.pen.textlength(text, title)) > room:
            title = ImageFont.load_default(5 * self.unit * room / length)
        self.pen.text((left, 4.5 * self.unit), text, TEXT, title, anchor="lt")


class _Drawing(Canvas):
    def __init__(self, run: Run, width: int, height: int):
        super().__init__(width, height)
        self.run = run
        changes = [call.change for call in run.calls if call.change]
        levels = [] if run.share else [run.calls[0].threshold]
        self.low = max(0.7 * min([*changes, *(level or FLOOR for level in levels)], default=FLOOR), FLOOR)
        self.high = max(1.4 * max([*changes, *levels], default=FLOOR), 4 * self.low)
        self._draw_axes()
        self._draw_threshold()
        self._draw_calls()
        self.draw_title(run.summary(), self.left)
        self._draw_legend()

    def _x(self, index: int) -> float:
        margin = 4 * self.unit
        return self.left + margin + (self.right - self.left - 2 * margin) * index / max(len(self.run.calls) - 1, 1)

    def _y(self, change: float) -> float:
        part = math.log(max(change, self.low) / self.low) / math.log(self.high / self.low)
        return self.bottom - (self.bottom - self.top) * min(part, 1.0)

    def _line(self, *points: tuple[float, float], colour: str, thickness: float = 0.4) -> None:
        self.pen.line(points, fill=colour, width=max(round(thickness * self.unit), 1), joint="curve")

    def _draw_axes(self) -> None:
        for tick in TICKS:
            if self.low <= tick <= self.high:
                y = self._y(tick)
                self._line((self.left, y), (self.right, y), colour=LINE)
                self.pen.text((self.left - 2 * self.unit, y), f"{tick:g}", SOFT, self.font, anchor="rm")
        floor = self.bottom + 3 * self.unit
        self._line((self.left, floor), (self.right, floor), colour=LINE)
        step = max(math.ceil(len(self.run.calls) * 8 * self.unit / (self.right - self.left)), 1)
        for index in range(0, len(self.run.calls), step):
            self.pen.text((self._x(index), floor + 3 * self.unit), str(index + 1), SOFT, self.font, anchor="mt")

    def _draw_threshold(self) -> None:
        if self.run.share:  # one for each call
            places = [(self._x(index), self._y(call.threshold)) for index, call in enumerate(self.run.calls)]
            return self._line(*places, colour=THRESHOLD, thickness=0.6) if len(places) > 1 else None
        y, dash = self._y(self.run.calls[0].threshold), 2.5 * self.unit
        at = self.left
        while at < self.right:
            self._line((at, y), (min(at + dash, self.right), y), colour=THRESHOLD, thickness=0.6)
            at += 1.7 * dash

    def _draw_calls(self) -> None:
        known = [(self._x(i), self._y(c.change)) for i, c in enumerate(self.run.calls) if c.change is not None]
        if len(known) > 1:
            self._line(*known, colour=SOFT)
        for index, call in enumerate(self.run.calls):
            y = self.bottom + 3 * self.unit if call.change is None else self._y(call.change)
            self._draw_mark(self._x(index), y, call.reused, hollow=call.change is None)

    def _draw_mark(self, x: float, y: float, reused: bool, hollow: bool = False) -> None:
        """A diamond for what was reused, a disc for what was computed, a ring where nothing could be compared."""
        if reused:
            r = 2.1 * self.unit
            self.pen.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=REUSED)
        else:
            r = 1.6 * self.unit
            fill, width = (GROUND, max(round(0.7 * self.unit), 1)) if hollow else (COMPUTED, 0)
            self.pen.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline=COMPUTED, width=width)

    def _draw_legend(self) -> None:
        y, x = 15 * self.unit, self.left + 2 * self.unit
        for reused, name in ((False, "computed"), (True, "reused")):
            self._draw_mark(x, y, reused)
            self.pen.text((x + 3.5 * self.unit, y), name, SOFT, self.font, anchor="lm")
            x += 9 * self.unit + self.pen.textlength(name, self.font)
        text = "threshold" if self.run.share else f"threshold {self.run.calls[0].threshold:g}"
        self.pen.text((x, y), text, THRESHOLD, self.font, anchor="lm")
        x += 6 * self.unit + self.pen.textlength(text, self.font)
        self.pen.text((x, y), "relative change of each model call", SOFT, self.font, anchor="lm")
