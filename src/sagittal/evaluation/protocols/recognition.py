"""Which class of a data set is the one that a protocol means: by its name, else by its value."""

from __future__ import annotations

from collections.abc import Mapping

from sagittal.evaluation.classes import ClassSet
from sagittal.plan.dataset import Label

Aliases = Mapping[str, tuple[str, ...]]
"""Name that a protocol uses -> plain names that mean the same."""


def plain(name: str) -> str:
    """Return a name without case, blanks and punctuation, with "tumor" and "edema" for both spellings."""
    letters = "".join(letter for letter in name.lower() if letter.isalnum())
    return letters.replace("tumour", "tumor").replace("oedema", "edema")


def by_name(classes: ClassSet, aliases: Aliases) -> dict[str, Label]:
    """Return the classes that a protocol knows, under its own names and in its order; others are left out."""
    given = {plain(label.name): label for label in classes.labels}
    found = {}
    for name, meanings in aliases.items():
        known = [given[meaning] for meaning in (plain(name), *meanings) if meaning in given]
        if known:
            found[name] = Label(name=name, values=known[0].values)
    return found


def has_only_values(classes: ClassSet) -> bool:
    """Tell whether the classes are named by their values: nothing declared any names."""
    return all(label.name == str(label.values[0]) and len(label.values) == 1 for label in classes.labels)


def described(classes: ClassSet) -> str:
    """Return names and values for a message."""
    return ", ".join(
        f"{label.name} ({'+'.join(map(str, label.values))})" if label.name != str(label.values[0]) else label.name
        for label in classes.labels
    )
