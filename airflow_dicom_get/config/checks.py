"""Checks of option values: each takes the option's name and a value, and returns the value to use.

Values come typed from Python and as text from the shell, a config file or a connection; both are
taken. What does not fit raises :class:`~airflow_dicom_get.errors.InvalidOption`, which names the
option as the caller wrote it.

A leaf module, so that every layer may declare its settings with :func:`setting`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from airflow_dicom_get.config.node import check_ae_title
from airflow_dicom_get.errors import InvalidOption

_PREDICATE = re.compile(
    r"(?:is|are|has|holds|contains|differs|adopts|takes|names|needs|does|selects|ends|starts|lies"
    r"|cannot|must|and|or|both|belong|rendered)\b"
)
"""How a text begins that goes on from its subject."""
_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def invalid(option: str, what: str, hint: str) -> InvalidOption:
    """An error that names the option, what is wrong with it, and the way out."""
    return InvalidOption(about(option, what), hint=hint, option=option)


def reworded(error: InvalidOption, change: Callable[[str], str]) -> InvalidOption:
    """The error with the options that it names as another caller writes them."""
    return InvalidOption(change(error.message), hint=change(error.hint), option=change(error.facts["option"]))


def about(subject: str, what: str) -> str:
    """A sentence on ``subject``: ``--to is missing.``, and ``--port: 'x' is not a port number.``."""
    return f"{subject}{' ' if _PREDICATE.match(what) else ': '}{what}."


def shown(value: object) -> str:
    """A value as an error message shows it: escaped and short."""
    text = ascii(value)
    return text if len(text) <= 64 else text[:63] + "…"


def shown_path(path: object) -> str:
    """A path or address as an error message shows it: escaped, and long enough to be found."""
    text = ascii(str(path))
    return text if len(text) <= 500 else text[:499] + "…"


class Check:
    """Base of the checks. ``None`` passes where ``optional`` is set."""

    json_type: ClassVar[str] = "string"

    def __init__(self, *, optional: bool = False) -> None:
        self.optional = optional

    def __call__(self, option: str, value: Any) -> Any:
        if value is None:
            if self.optional:
                return None
            raise invalid(option, "is missing", f"Give {self.describe()}.")
        return self.check(option, value)

    def check(self, option: str, value: Any) -> Any:
        raise NotImplementedError

    def describe(self) -> str:
        """What is allowed, as a noun phrase."""
        raise NotImplementedError

    def refuse(self, option: str, value: Any) -> InvalidOption:
        return invalid(option, f"{shown(value)} is not allowed", f"Give {self.describe()}.")


class Text(Check):
    """Text that is not blank and holds no control characters."""

    def check(self, option: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip() or not value.isprintable():
            raise self.refuse(option, value)
        return value

    def describe(self) -> str:
        return "text"


class Secret(Text):
    """Text that no message, table or rendering shows. A file name or PEM block may span lines."""

    def check(self, option: str, value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise invalid(option, "is not text", "Give text.")
        return value


class AETitle(Check):
    """An application entity title (PS3.5 6.2, VR AE)."""

    def check(self, option: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.refuse(option, value)
        return check_ae_title(value, option)

    def describe(self) -> str:
        return "1 to 16 printable ASCII characters"


class Flag(Check):
    """True or false."""

    json_type = "boolean"

    def check(self, option: str, value: Any) -> bool:
        if isinstance(value, bool):
            return value
        word = str(value).strip().lower() if isinstance(value, str | int) else ""
        if word in _TRUE:
            return True
        if word in _FALSE:
            return False
        raise self.refuse(option, value)

    def describe(self) -> str:
        return "true or false"


class Choice(Check):
    """One of a few words."""

    def __init__(self, *values: str, optional: bool = False) -> None:
        super().__init__(optional=optional)
        self.values = values

    def __call__(self, option: str, value: Any) -> Any:
        # The word "none" stands for None where text is all there is.
        if self.optional and isinstance(value, str) and value.lower() == "none" and "none" not in self.values:
            return None
        return super().__call__(option, value)

    def check(self, option: str, value: Any) -> str:
        if isinstance(value, str) and value in self.values:
            return value
        raise self.refuse(option, value)

    def describe(self) -> str:
        words = [*self.values, *(["none"] if self.optional and "none" not in self.values else [])]
        return " or ".join(words) if len(words) < 3 else ", ".join(words[:-1]) + " or " + words[-1]


class Integer(Check):
    """A whole number within bounds."""

    json_type = "integer"

    def __init__(self, low: int, high: int | None = None, *, optional: bool = False) -> None:
        super().__init__(optional=optional)
        self.low, self.high = low, high

    def check(self, option: str, value: Any) -> int:
        number = self.number(value)
        if number is None or number < self.low or (self.high is not None and number > self.high):
            raise self.refuse(option, value)
        return number

    def number(self, value: Any) -> int | None:
        if isinstance(value, bool):
            return None
        if isinstance(value, int):
            return value
        if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value.strip()):
            return int(value)
        return int(value) if isinstance(value, float) and value.is_integer() else None

    def describe(self) -> str:
        if self.high is None:
            return f"a whole number of at least {self.low}"
        return f"a whole number from {self.low} to {self.high}"


class Bytes(Integer):
    """A number of bytes; as text also with K, M, G (powers of 1000) or Ki, Mi, Gi (of 1024)."""

    json_type = "string"

    def number(self, value: Any) -> int | None:
        if isinstance(value, str):
            match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)([KMG]?I?)B?", value.strip().upper())
            return int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else None
        return super().number(value)

    def describe(self) -> str:
        return f"a number of bytes of at least {self.low}, such as 500K, 20M or 1.5G"


class Seconds(Check):
    """A length of time in seconds, above zero."""

    json_type = "number"

    def check(self, option: str, value: Any) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or number <= 0:
            raise self.refuse(option, value)
        return number

    def describe(self) -> str:
        return "a number of seconds above 0"


class Parsed(Check):
    """A value made by a function of the option's name and the value."""

    def __init__(self, parse: Callable[[str, Any], Any], what: str, *, optional: bool = False) -> None:
        super().__init__(optional=optional)
        self.parse, self.what = parse, what

    def check(self, option: str, value: Any) -> Any:
        return self.parse(option, value)

    def describe(self) -> str:
        return self.what


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """What an option is, beside its name and default: the row of the one table of options."""

    check: Check
    doc: str
    unit: str = ""
    shell: tuple[str, ...] = ()
    """Flags that set it, the usual one first; none where the shell does not have it."""
    off: tuple[str, ...] = ()
    """Flags that switch it off, for what is on by default."""
    off_doc: str = ""
    repeat: bool = False
    """Whether the flag may be given several times."""
    metavar: str = ""
    connection: str | None = None
    """The key of the connection's extra fields."""


def setting(default: Any, check: Check, doc: str, **more: Any) -> Any:
    """Declare a dataclass field that is an option; see :class:`Setting`."""
    secret = isinstance(check, Secret)
    metadata = {"setting": Setting(check, doc, **more)}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata, repr=not secret)
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


class Checked:
    """Base of dataclasses whose fields are settings: each value is checked when the object is made."""

    __slots__ = ()
    group: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            row: Setting = item.metadata["setting"]
            object.__setattr__(self, item.name, row.check(self.group + item.name, getattr(self, item.name)))


class Group(Check):
    """A group of settings: an object of the class, or a mapping that makes one."""

    json_type = "object"

    def __init__(self, cls: type[Any], *, optional: bool = False) -> None:
        super().__init__(optional=optional)
        self.cls = cls

    def check(self, option: str, value: Any) -> Any:
        if isinstance(value, self.cls):
            return value
        names = [item.name for item in dataclasses.fields(self.cls)]
        if not isinstance(value, Mapping):
            raise self.refuse(option, type(value).__name__)
        for key in value:
            if key not in names:
                raise invalid(option, f"has no part {shown(key)}", f"The parts are {', '.join(names)}.")
        return self.cls(**value)

    def describe(self) -> str:
        return f"a {self.cls.__name__}, or a dict of its fields"
