"""TLS towards a node."""

from __future__ import annotations

import ssl

from airflow_dicom_get.config.groups import Tls
from airflow_dicom_get.errors import ConnectFailed, InvalidOption, TlsFailed, peer_text


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
            hint="Give PEM files, and the passphrase if the key needs one.",
            option=option,
        ) from error
    return context


_OURS = "Ask the PACS admin which client certificates it accepts, and give ours with tls.cert and tls.key."
_VERIFICATION = {
    9: ("is not valid yet", "Check the clocks of this machine and of the PACS."),
    10: ("has expired", "Ask the PACS admin for a new certificate, and check the clock of this machine."),
    18: ("is self-signed and not trusted here", "Give the PACS's certificate, or its CA's, with tls.ca."),
    19: ("is signed by a CA that is not trusted here", "Give the CA of the PACS with tls.ca."),
    20: ("is signed by a CA that is not trusted here", "Give the CA of the PACS with tls.ca."),
    21: (
        "is signed by a CA that is not trusted here",
        "Give the CA of the PACS and the intermediate ones with tls.ca.",
    ),
    23: ("was revoked", "Ask the PACS admin for a new certificate."),
    62: (
        "is for another host name",
        "Give the name in the certificate with tls.server_name, or connect to the host that it names.",
    ),
    64: (
        "is for another IP address",
        "Give the name in the certificate with tls.server_name, or connect to the host that it names.",
    ),
}
"""What is wrong with the certificate of the peer, by OpenSSL's code (X509_V_ERR)."""
_REASONS = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": ("asks for a client certificate, and none was given", _OURS),
    "SSLV3_ALERT_HANDSHAKE_FAILURE": ("refused the handshake: no cipher in common, or no client certificate", _OURS),
    "SSLV3_ALERT_BAD_CERTIFICATE": ("refused our client certificate", _OURS),
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": ("does not support the type of our client certificate", _OURS),
    "SSLV3_ALERT_CERTIFICATE_REVOKED": ("says that our client certificate was revoked", _OURS),
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": ("says that our client certificate has expired", _OURS),
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": ("refused our client certificate", _OURS),
    "TLSV1_ALERT_UNKNOWN_CA": ("does not trust the CA of our client certificate", _OURS),
    "TLSV1_ALERT_ACCESS_DENIED": ("refused our client certificate", _OURS),
    **dict.fromkeys(
        ("TLSV1_ALERT_PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL", "WRONG_SSL_VERSION", "VERSION_TOO_LOW"),
        (
            "speaks no TLS version that is allowed here",
            "Ask the PACS admin to enable TLS 1.2 or 1.3; older versions are not secure.",
        ),
    ),
    **dict.fromkeys(
        ("WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"),
        ("does not speak TLS on this port", "Give the TLS port of the PACS, or switch TLS off."),
    ),
}
"""What went wrong, by OpenSSL's name for it."""


def tls_error(node: object, error: Exception) -> ConnectFailed:
    """The error of a TLS session that did not come about, in words."""
    facts = {"node": str(node), "tls_reason": getattr(error, "reason", None) or type(error).__name__}
    if isinstance(error, ssl.SSLCertVerificationError):
        what, hint = _VERIFICATION.get(
            error.verify_code, (f"cannot be verified: {peer_text(error.verify_message)}", "Check tls.ca.")
        )
        return TlsFailed(f"No TLS session with {node}: the certificate of the peer {what}.", hint=hint, **facts)
    known = _REASONS.get(facts["tls_reason"])
    if known is not None:
        return TlsFailed(f"No TLS session with {node}: the peer {known[0]}.", hint=known[1], **facts)
    hung_up = not isinstance(error, ssl.SSLError) or isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)
    what = "the peer closed the connection" if hung_up else peer_text(error, 120)
    return ConnectFailed(
        f"No TLS session with {node}: {what}.",
        hint="Check that this port speaks TLS, and whether the PACS asks for a client certificate.",
        **facts,
    )
