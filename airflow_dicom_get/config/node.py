"""The address of a DICOM node: ``[AE@]host:port``."""

from __future__ import annotations

from dataclasses import dataclass

from airflow_dicom_get.errors import InvalidOption


def check_ae_title(title: str, option: str) -> str:
    """Return the AE title without insignificant spaces (PS3.5 6.2, VR AE).

    Raises
    ------
    InvalidOption
        Blank, over 16 characters, not ASCII, or holding a backslash or a control character.
    """
    text = title.strip(" ")
    if not text:
        what = "is blank"
    elif len(text) > 16:
        what = f"has {len(text)} characters; at most 16 are allowed"
    elif not text.isascii() or not text.isprintable():
        what = "contains characters outside printable ASCII"
    elif "\\" in text:
        what = "contains a backslash"
    else:
        return text
    raise InvalidOption(
        f"{option}: the AE title {text[:32]!a} {what}.", hint="Give 1 to 16 printable ASCII characters.", option=option
    )


def password_in(option: str, hint: str) -> InvalidOption:
    """The error for an address that holds a user name or a password, which it does not show."""
    return InvalidOption(
        f"{option}: the address contains a user name or a password, which is not shown here.", hint=hint, option=option
    )


@dataclass(frozen=True, slots=True)
class Node:
    """A DICOM node: host, TCP port, and the AE title if the address holds one."""

    host: str
    port: int
    ae_title: str | None = None

    @classmethod
    def parse(cls, address: str, option: str = "addr") -> Node:
        """Parse ``[AE@]host:port``, split at the last ``@``; an IPv6 host stands in brackets.

        Raises
        ------
        InvalidOption
            The address is malformed; the message names ``option``.
        """

        def bad(what: str) -> InvalidOption:
            return InvalidOption(
                f"{option}: {address[:80]!a} {what}.",
                hint="Write [AE@]host:port, for example PACS@10.0.0.5:104.",
                option=option,
            )

        title, at, rest = address.rpartition("@")
        if ":" in title:
            raise password_in(
                option, "Write [AE@]host:port. An AE title with a colon is given as called_ae_title or login."
            )
        host, colon, port = rest.rpartition(":")
        if not colon:
            raise bad("has no port")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise bad("contains an IPv6 address without brackets")
        if not host or not host.isascii() or any(c.isspace() or c in "/@[]\\" for c in host):
            raise bad("has no valid host")
        if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
            raise bad("has no port between 1 and 65535")
        return cls(host, int(port), check_ae_title(title, option) if at else None)

    @property
    def endpoint(self) -> tuple[str, int]:
        """Host and port, to tell whether two addresses are of one node; the loopback addresses count as one host."""
        host = self.host.lower()
        return "localhost" if host in ("127.0.0.1", "::1") else host, self.port

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.ae_title}@{host}:{self.port}" if self.ae_title else f"{host}:{self.port}"
