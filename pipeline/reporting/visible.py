"""How a name that a stranger chose is shown: as what it is, and never as another."""

from __future__ import annotations


def visible(text: str) -> str:
    """Control characters and marks that turn the direction of text, as escapes."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
