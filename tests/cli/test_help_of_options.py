"""Every option of every verb says in `--help` what it does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cyclopts import App

from sagittal.cli import app


def _verbs(parent: App, name: str = "sagittal") -> Iterator[tuple[str, App]]:
    for word in parent:
        if not word.startswith("-"):
            yield f"{name} {word}", parent[word]
            yield from _verbs(parent[word], f"{name} {word}")


VERBS = dict(_verbs(app))


def test_all_verbs_are_looked_at() -> None:
    assert {"sagittal train", "sagittal doctor", "sagittal datasets convert"} <= VERBS.keys()


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_a_help_text(verb: str) -> None:
    if VERBS[verb].default_command is None:
        return
    options = VERBS[verb].assemble_argument_collection(parse_docstring=True)
    silent = [option.name for option in options if option.show and not option.parameter.help]
    assert len(options) > 0 and not silent
