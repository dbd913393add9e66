"""Draw docs/speed.png, the README's first picture, from the README's table of results.

    python3 scripts/dev.py scripts/chart.py

The rows are those below the heading "## Results": what runs, seconds a step, how many times as fast as ComfyUI (empty
where ComfyUI was not measured in the same run), and whether the result is exact.
"""

from dataclasses import dataclass
from itertools import dropwhile, takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README, PICTURE = ROOT / "README.md", ROOT / "docs" / "speed.png"
COLOURS = {"": "#9aa0a6", "exact": "#1a73e8", "approximate": "#12977c"}
MEANINGS = {"exact": "exact: the same result, to rounding", "approximate": "approximate: the result changes"}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    label: str
    seconds: str
    times: str
    result: str


def rows_of(text: str) -> list[Row]:
    """The rows of the first table below "## Results"."""
    below = text.partition("\n## Results\n")[2].splitlines()
    table = takewhile(_in_table, dropwhile(lambda line: not _in_table(line), below))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return [Row(*row) for row in cells[2:]]


def _in_table(line: str) -> bool:
    return line.startswith("| ")


def draw(rows: list[Row], path: Path) -> None:
    """One bar a row, in the order of the table; the text can be read at a width of 600 pixels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 17})
    figure, axis = pyplot.subplots(figsize=(12, 0.62 * len(rows) + 1.6), layout="constrained")
    seconds = [float(row.seconds) for row in rows]
    axis.barh(range(len(rows)), seconds, color=[COLOURS[row.result] for row in rows], height=0.72)
    for place, row in enumerate(rows):
        said = f"{row.seconds} s" + (f"  ({row.times}x)" if row.result and row.times else "")
        axis.text(seconds[place] + 0.3, place, said, va="center", weight="bold")
    axis.set_yticks(range(len(rows)), [row.label for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.15 * max(seconds))
    axis.xaxis.set_visible(False)
    axis.tick_params(left=False)
    axis.spines[:].set_visible(False)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[result]) for result in MEANINGS]
    figure.legend(handles, MEANINGS.values(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("Seconds for one step of HunyuanVideo 13B, 1280 x 720, 129 frames, H100", weight="bold")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    draw(rows_of(README.read_text()), PICTURE)
