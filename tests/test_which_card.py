"""README's table of cards and sizes is what Skein would do now."""

from pack import ROOT
from skein.bench import which_card


def test_readme_has_the_table_as_it_is_estimated_now():
    rows = which_card.all_rows()
    assert which_card.table(rows) in (ROOT / "README.md").read_text(), which_card.table(rows)
    largest = {row["card_gib"]: row for row in rows[: len(which_card.CARDS)]}
    assert largest[16]["slices"] > 1 == largest[24]["slices"] and largest[24]["off_card_gb"] > 0
