"""TLS towards a node."""

from __future__ import annotations

import ssl

from airflow_dicom_get.config.checks import invalid
from airflow_dicom_get.config.groups import Tls
from airflow_dicom_get.errors import ConnectFailed, InvalidOption, TlsFailed, peer_text

CIPHERS = "@SECLEVEL=2:ECDHE+AESGCM:ECDHE+CHACHA20"
"""Those of RFC 9325 in TLS 1.2, which the profiles of PS3.15 B.12 and B.13 refer to: AEAD, and a key for each session.

In TLS 1.3 there are no others."""


def tls_context(tls: Tls, option: str = "tls") -> ssl.SSLContext:
    """A client context (PS3.15 B.12): TLS 1.2 or newer, :data:`CIPHERS`, the peer's certificate verified.

    Raises
    ------
    InvalidOption
        A file cannot be read, the key does not fit, or it needs a passphrase and there is none.
    """

    def passphrase() -> str:
        # Without a function OpenSSL would ask at the terminal.
        if tls.key_password is None:
            raise invalid(
                f"{option}.key",
                "is encrypted, and there is no passphrase",
                "Give it (key_password; in the config file tls_key_password, in a connection the password), or a key "
                "that is not encrypted.",
            )
        return tls.key_password

    try:
        context = ssl.create_default_context(cafile=tls.ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_3 if tls.min_version == "1.3" else ssl.TLSVersion.TLSv1_2
        context.set_ciphers(CIPHERS)
        context.check_hostname = tls.check_hostname
        if tls.cert:
            context.load_cert_chain(tls.cert, tls.key, passphrase)
    except InvalidOption:
        raise
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
    "SSLV3_ALERT_HANDSHAKE_FAILURE": ("refused the handshake, most likely for lack of a client certificate", _OURS),
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
_NO_CIPHER = (
    "offers no cipher suite that is allowed here",
    "Ask the PACS admin to enable TLS 1.3, or the cipher suites of BCP 195 in TLS 1.2: ECDHE with AES-GCM.",
)


def tls_error(node: object, error: Exception, option: str = "tls", *, agreed: bool = True) -> ConnectFailed:
    """The error of a TLS session that did not come about, in words.

    Parameters
    ----------
    option : str
        The name of the options by which the node is called.
    agreed : bool
        Whether the peer had chosen a cipher suite.
    """
    reason = getattr(error, "reason", None) or type(error).__name__
    facts = {"node": str(node), "tls_reason": reason}
    if isinstance(error, ssl.SSLCertVerificationError):
        what, hint = _VERIFICATION.get(
            error.verify_code, (f"cannot be verified: {peer_text(error.verify_message)}", "Check tls.ca.")
        )
        hint = hint.replace("tls.", f"{option}.")
        return TlsFailed(f"No TLS session with {node}: the certificate of the peer {what}.", hint=hint, **facts)
    known = _NO_CIPHER if not agreed and reason == "SSLV3_ALERT_HANDSHAKE_FAILURE" else _REASONS.get(reason)
    if known is not None:
        hint = known[1].replace("tls.", f"{option}.")
        return TlsFailed(f"No TLS session with {node}: the peer {known[0]}.", hint=hint, **facts)
    hung_up = not isinstance(error, ssl.SSLError) or isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)
    what = "the peer closed the connection" if hung_up else peer_text(error, 120)
    return ConnectFailed(
        f"No TLS session with {node}: {what}.",
        hint="Check that this port speaks TLS, and whether the PACS asks for a client certificate.",
        **facts,
    )
