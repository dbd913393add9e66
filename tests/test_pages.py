"""The pages that people read: their links lead somewhere, and the README's figures are among the benchmarks'."""

import re
from pathlib import Path

import pytest
from chart import rows_of

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("*/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("web/docs/*.md")),
]


def anchors(page):
    """Of its headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    targets = [each for each in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if not each.startswith("http")]
    for path, _, anchor in (target.partition("#") for target in targets):
        file = page.parent / path if path else page
        assert file.exists(), path
        assert not anchor or anchor in anchors(file), f"{path}#{anchor}"


def test_the_readmes_results_are_among_the_benchmarks():
    rows = rows_of((ROOT / "README.md").read_text())
    published = set(re.findall(r"\d+(?:\.\d+)?", (ROOT / "docs" / "BENCHMARKS.md").read_text()))
    assert len(rows) == 8
    assert all(row.seconds in published and (not row.times or row.times in published) for row in rows)
