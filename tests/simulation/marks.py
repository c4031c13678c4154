"""Marks: which cases the histories reached, counted by name.

The models mark what they did (``disk: torn page``), and a history what it saw. A case that no history reached was
not tested, whatever the tests say.
"""

from __future__ import annotations

from collections import Counter

reached: Counter[str] = Counter()
"""In how many histories each case was reached, since the last ``clear``."""
in_history: set[str] = set()
"""The cases that the history that is played has reached; cleared at its beginning."""


def mark(name: str) -> None:
    """A case is reached; it counts once for each history."""
    if name not in in_history:
        in_history.add(name)
        reached[name] += 1
