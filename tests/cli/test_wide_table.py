"""Tables that stay readable in a narrow window."""

from __future__ import annotations

import io

from rich.console import Console

from sagittal.cli.wide_table import print_wide


def printed(header: list[str], rows: list[list[str]], width: int, *, caption: str = "") -> list[str]:
    text = io.StringIO()
    print_wide(header, rows, title="Means", caption=caption, console=Console(file=text, width=width, color_system=None))
    return text.getvalue().splitlines()


def test_a_table_that_fits_is_one() -> None:
    lines = printed(["class", "Dice", "HD95 (mm)"], [["liver", "0.912", "3.4"]], 80, caption="of all")
    assert sum("class" in line for line in lines) == 1
    assert lines[0].strip() == "Means" and lines[-1].strip() == "of all"


def test_no_number_is_cut_and_no_line_is_longer_than_the_window() -> None:
    header = ["class", *(f"Volume error of kind {number} (mL)" for number in range(18))]
    rows = [[name, *(f"{place}.123456" for place in range(18))] for name in ("liver", "a long name of a class " * 3)]
    lines = printed(header, rows, 60)
    assert max(map(len, lines)) <= 60
    text = "\n".join(lines)
    assert all(text.count(f" {place}.123456 ") == 2 for place in range(18))
    assert "…" not in text
    assert sum("liver" in line for line in lines) > 1, "every part names its rows"
    assert sum("Means" in line for line in lines) == 1


def test_markup_in_names_is_text_and_lines_break_where_cells_say() -> None:
    lines = printed(["class", "[bold]A"], [["[red]x[/red]", "0.5\n[0.4, 0.6]"]], 40)
    text = "\n".join(lines)
    assert "[red]x[/red]" in text and "[bold]A" in text
    assert any("0.5" in line and "0.4" not in line for line in lines)


def test_a_window_too_narrow_for_a_column_still_shows_all_of_it() -> None:
    lines = printed(["class", "Dice"], [["liver", "0.123456789012345678"]], 24)
    assert max(map(len, lines)) <= 24
    assert "0.123456789012345678" in "".join(line.split("│")[2].strip() for line in lines if line.startswith("│"))


def test_title_and_caption_are_as_wide_as_the_window_not_as_the_table() -> None:
    caption = "a caption that is much longer than the table"
    lines = printed(["class", "Dice"], [["liver", "0.9"]], 60, caption=caption)
    assert lines[0] == "Means" and lines[-1] == caption
