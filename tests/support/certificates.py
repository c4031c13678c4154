"""An authority that makes certificates."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa


@dataclass
class Pair:
    """A certificate and its key, in PEM files."""

    cert: Path
    key: Path
    name: Any
    private: Any


class Authority:
    """Makes certificates."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.own = self._make(name, None, authority=True)
        self.ca = str(self.own.cert)

    def issue(self, name: str, *, host: str = "127.0.0.1", days: tuple[int, int] = (-1, 30)) -> Pair:
        return self._make(name, self.own, host=host, days=days)

    def _make(
        self,
        name: str,
        issuer: Pair | None,
        *,
        host: str = "",
        days: tuple[int, int] = (-1, 30),
        authority: bool = False,
    ) -> Pair:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer.name if issuer else subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=days[0]))
            .not_valid_after(now + timedelta(days=days[1]))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        if authority:
            usage = dict.fromkeys(
                ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
                 "decipher_only"), False,
            )  # fmt: skip
            usage |= {"digital_signature": True, "key_cert_sign": True, "crl_sign": True}
            builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
        elif issuer is not None:
            identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.private.public_key())
            builder = builder.add_extension(identifier, critical=False)
        if host:
            alternative: x509.GeneralName
            try:
                alternative = x509.IPAddress(ipaddress.ip_address(host))
            except ValueError:
                alternative = x509.DNSName(host)
            builder = builder.add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
        cert = builder.sign(issuer.private if issuer else key, hashes.SHA256())
        pem = serialization.Encoding.PEM
        pair = Pair(self.folder / f"{name}.crt", self.folder / f"{name}.key", subject, key)
        pair.cert.write_bytes(cert.public_bytes(pem))
        plain = serialization.NoEncryption()
        pair.key.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, plain))
        return pair
