"""Tables for documents and terminals, and their footnotes."""

from __future__ import annotations

from sagittal.report.text_table import Notes, TextTable


def test_markdown_has_a_row_for_each_row_and_numbers_its_notes() -> None:
    table = TextTable(
        "A title.", ("name", "size"), (("a|b", "1"), ("c", "20")), frozenset({"size"}), ("first", "second")
    )
    assert table.markdown().splitlines() == [
        "A title.",
        "",
        "| name | size |",
        "| --- | ---: |",
        r"| a\|b | 1 |",
        "| c | 20 |",
        "",
        "1. first",
        "2. second",
    ]


def test_a_table_without_notes_ends_with_its_last_row() -> None:
    assert TextTable("A title.", ("name",), (("a",),)).markdown().endswith("| a |")


def test_notes_are_numbered_in_the_order_of_their_first_use() -> None:
    notes = Notes()
    assert notes.refer(["one", "two"]) == "1, 2"
    assert notes.refer(["three", "one"]) == "3, 1"
    assert notes.refer([]) == ""
    assert notes.texts == ("one", "two", "three")
