"""Marks: which cases the histories reached, counted by name.

The models mark what they did (``disk: torn page``), and a history what it saw. A case that no history reached was
not tested, whatever the tests say.
"""

from __future__ import annotations

from collections import Counter

reached: Counter[str] = Counter()
"""How often each case was reached, since the last ``clear``."""


def mark(name: str) -> None:
    """A case is reached."""
    reached[name] += 1
