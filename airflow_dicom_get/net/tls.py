"""TLS towards a node."""

from __future__ import annotations

import ssl

from airflow_dicom_get.errors import InvalidOption, peer_text
from airflow_dicom_get.settings import Tls


def tls_context(tls: Tls, option: str = "tls") -> ssl.SSLContext:
    """A client context (PS3.15 B.12): TLS 1.2 or newer, the peer's certificate verified.

    Raises
    ------
    InvalidOption
        A file cannot be read, or the key does not fit.
    """
    try:
        context = ssl.create_default_context(cafile=tls.ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_3 if tls.min_version == "1.3" else ssl.TLSVersion.TLSv1_2
        context.check_hostname = tls.check_hostname
        if tls.cert:
            context.load_cert_chain(tls.cert, tls.key, tls.key_password)
    except (OSError, ValueError) as error:
        raise InvalidOption(
            f"{option}: the files of ca, cert or key cannot be used: {peer_text(error, 160)}.",
            hint="Give PEM files, and the passphrase if the key has one.",
            option=option,
        ) from error
    return context
