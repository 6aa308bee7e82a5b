"""URLs as they may be told: in messages, in files and in commands to give again."""

from __future__ import annotations

import re
from collections.abc import Sequence

URL = re.compile(r"([a-z][a-z0-9+.-]+)://(.*)", re.DOTALL)
"""Protocol and what follows."""
_SECRETS = re.compile(r"(?<=://)[^/?]*@")


def is_url(text: str) -> bool:
    """Whether a text is a URL rather than a path."""
    return URL.fullmatch(text) is not None


def without_secrets(url: str) -> str:
    """Return a URL without a name and password before its host, and without what follows a question mark."""
    return _SECRETS.sub("", url).partition("?")[0] if is_url(url) else url


def words_without_secrets(words: Sequence[str]) -> list[str]:
    """Return the words of a command with their URLs, also in `--store=URL`, as they may be told."""
    told = []
    for word in words:
        name, equals, value = word.partition("=")
        told.append(f"{name}={without_secrets(value)}" if word.startswith("-") and equals else without_secrets(word))
    return told
