"""Addresses of nodes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_dicom_get.config.destination import parse_destination
from airflow_dicom_get.config.groups import S3Config
from airflow_dicom_get.config.node import Node, check_ae_title
from airflow_dicom_get.errors import InvalidOption

TITLES = st.text(
    st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters="\\:"), min_size=1, max_size=16
)


@pytest.mark.parametrize(
    ("address", "node"),
    [
        ("pacs:104", Node("pacs", 104)),
        ("PACS@10.0.0.5:11112", Node("10.0.0.5", 11112, "PACS")),
        ("[::1]:104", Node("::1", 104)),
        ("PACS@[fe80::1%eth0]:104", Node("fe80::1%eth0", 104, "PACS")),
        ("A@B@pacs:1", Node("pacs", 1, "A@B")),
        (" PACS @pacs:65535", Node("pacs", 65535, "PACS")),
    ],
)
def test_addresses(address: str, node: Node) -> None:
    assert Node.parse(address) == node


@given(st.sampled_from(("pacs", "10.0.0.5", "::1", "a.b-c.example")), st.integers(1, 65535), TITLES)
def test_what_is_written_is_read(host: str, port: int, title: str) -> None:
    if not title.strip(" "):
        return
    node = Node(host, port, title.strip(" "))
    assert Node.parse(str(node)) == node


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("pacs", "has no port"),
        ("", "has no port"),
        ("@pacs:104", "AE title '' is blank"),
        ("   @pacs:104", "is blank"),
        ("SEVENTEEN_LETTERS@pacs:104", "has 17 characters; at most 16 are allowed"),
        ("PACS\\1@pacs:104", "contains a backslash"),
        ("PÄCS@pacs:104", "outside printable ASCII"),
        ("PA\nCS@pacs:104", "outside printable ASCII"),
        ("pacs:0", "port between 1 and 65535"),
        ("pacs:65536", "port between 1 and 65535"),
        ("pacs:", "port between 1 and 65535"),
        ("pacs:1O4", "port between 1 and 65535"),
        ("pacs:-1", "port between 1 and 65535"),
        ("pacs:١٠٤", "port between 1 and 65535"),
        ("::1:104", "IPv6 address without brackets"),
        (":104", "has no valid host"),
        ("[]:104", "has no valid host"),
        ("pa cs:104", "has no valid host"),
        ("pacs/x:104", "has no valid host"),
        ("pacs\n:104", "has no valid host"),
    ],
)
def test_refused(address: str, what: str) -> None:
    with pytest.raises(InvalidOption, match=what) as caught:
        Node.parse(address, "--node")
    assert str(caught.value).startswith("--node: ")
    assert caught.value.option == "--node"  # type: ignore[attr-defined]
    assert "\n" not in str(caught.value)


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        node = Node.parse(text)
    except InvalidOption:
        return
    assert Node.parse(str(node)) == node


@given(st.text(max_size=20))
def test_any_text_is_an_ae_title_or_refused(text: str) -> None:
    try:
        title = check_ae_title(text, "x")
    except InvalidOption:
        return
    assert 1 <= len(title) <= 16
    assert title == title.strip(" ")
    assert title.isascii()


SECRET = "hunter2"


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (lambda text: Node.parse(text), f"me:{SECRET}@pacs:104"),
        (lambda text: Node.parse(text), f"dicom://me:{SECRET}@pacs:104"),
        (lambda text: Node.parse(text), f"me:{SECRET}@pacs"),
        (parse_destination, f"dicom://me:{SECRET}@pacs:104"),
        (parse_destination, f"s3://AKIA:{SECRET}@bucket/x"),
        (parse_destination, f"s3://AKIA%3A{SECRET}@bucket/x"),
        (lambda text: S3Config(endpoint=text), f"https://me:{SECRET}@h:9000"),
        (lambda text: S3Config(endpoint=text), f"me:{SECRET}@h:9000"),
        (lambda text: S3Config(endpoint=text), f"https://h:9000/me:{SECRET}@x\n"),
    ],
)  # fmt: skip
def test_a_password_in_an_address_is_refused_and_not_shown(check: Callable[[str], object], text: str) -> None:
    with pytest.raises(InvalidOption, match="a user name or a password, which is not shown") as caught:
        check(text)
    assert SECRET not in str(caught.value)
