"""The hook of an S3 service: ``dicom_s3`` connections, and stock ``aws`` ones."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseHook

from airflow_dicom_get.config.checks import Choice, Flag, Parsed, Setting, invalid, reworded, setting, shown
from airflow_dicom_get.config.groups import S3Config
from airflow_dicom_get.config.node import password_in
from airflow_dicom_get.errors import DicomGetError, InvalidOption, peer_text
from airflow_dicom_get.hooks._connection import (
    TEST_SECONDS,
    Answer,
    check_unknown,
    extras_of,
    find_connection,
    of_connection,
    unreadable,
    within_limit,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow.sdk import Connection

    from airflow_dicom_get.storage.bucket import Bucket

FIELDS: Mapping[str, str] = {
    "region": "region",
    "session_token": "session_token",
    "profile": "profile",
    "ca_file": "ca_bundle",
    "sse": "sse",
    "kms_key_id": "kms_key_id",
    "storage_class": "storage_class",
    "max_concurrency": "max_concurrency",
}
"""Extra fields of a ``dicom_s3`` connection that are settings of :class:`~airflow_dicom_get.config.groups.S3Config`."""

_OWN = ("scheme", "bucket", "path_style")
_SCHEME = Choice("https", "http")
_PATH_STYLES = {"auto": None, "path": True, "virtual": False}
_PATH_STYLE = Choice(*_PATH_STYLES)
_AWS_NAMES = {
    "endpoint": "endpoint_url",
    "region": "region_name",
    "session_token": "aws_session_token",
    "profile": "profile_name",
    "ca_bundle": "verify",
}
_AWS_TYPE = "aws"
_PROVIDER = "apache-airflow-providers-amazon"
_ROLE = ("role_arn", "assume_role_method", "assume_role_kwargs")
_AWS_FIELDS = frozenset(
    {
        *("aws_access_key_id", "aws_secret_access_key", "aws_session_token", "config_kwargs", "endpoint_url"),
        *("external_id", "profile_name", "region_name", "role_arn", "service_config", "session_kwargs", "verify"),
    }
)
"""What an ``aws`` connection may say, besides what begins with ``assume_role``."""
_CLIENT_OPTIONS = frozenset({"client_cert", "proxies", "proxies_config", "signature_version"})
_PROBE = ".connection-test"


class DicomS3Hook(BaseHook):
    """Reach a bucket through a ``dicom_s3`` connection, or a stock ``aws`` one.

    In a ``@task`` function::

        hook = DicomS3Hook("archive")
        manifest = load_manifest(uri, hook.config)

    :param s3_conn_id: the connection: host and port = endpoint (blank: AWS), login and password = keys
    """

    conn_name_attr = "s3_conn_id"
    default_conn_name = "dicom_s3_default"
    conn_type = "dicom_s3"
    hook_name = "DICOM storage (S3)"

    def __init__(self, s3_conn_id: str = default_conn_name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.s3_conn_id = s3_conn_id
        self._read: tuple[S3Config, str | None] | None = None

    # --- the connection ----------------------------------------------------------------------------

    @property
    def config(self) -> S3Config:
        """How to reach the service, checked; it names no bucket.

        :raises InvalidOption: a field is missing or malformed; the message names connection and field
        """
        return self._settings()[0]

    @property
    def bucket(self) -> str | None:
        """The bucket that the connection names, which only the Test button uses."""
        return self._settings()[1]

    def get_bucket(self, name: str) -> Bucket:
        """A bucket of the service; nothing is opened yet."""
        from airflow_dicom_get.storage.bucket import Bucket

        return Bucket(name, self.config)

    def get_conn(self) -> Any:
        """A boto3 client of the service."""
        from airflow_dicom_get.storage.bucket import make_client

        return make_client(self.config)

    def _settings(self) -> tuple[S3Config, str | None]:
        if self._read is None:
            conn = find_connection(self.s3_conn_id, self.hook_name)
            try:
                self._read = self._parse(conn)
            except InvalidOption as error:
                raise of_connection(error, self.s3_conn_id) from None
        return self._read

    def _parse(self, conn: Connection) -> tuple[S3Config, str | None]:
        kind = (conn.conn_type or "").lower()
        extras = {
            key: value
            for key, value in extras_of(conn, '{"region": "eu-central-1"}').items()
            if value is not None and not (isinstance(value, str) and not value.strip())
        }
        if kind == self.conn_type:
            return self._parse_own(conn, extras)
        if kind == _AWS_TYPE:
            return self._parse_aws(conn, extras)
        raise invalid(
            "type",
            f"{shown(conn.conn_type)} is neither dicom_s3 nor aws",
            f"Use a connection of type {self.hook_name}.",
        )

    def _parse_own(self, conn: Connection, extras: Mapping[str, Any]) -> tuple[S3Config, str | None]:
        check_unknown(set(extras) - set(FIELDS) - set(_OWN), self.s3_conn_id, self.log)
        values = {FIELDS[key]: value for key, value in extras.items() if key in FIELDS}
        values["path_style"] = _PATH_STYLES[_PATH_STYLE("path_style", extras.get("path_style", "auto"))]
        scheme = _SCHEME("scheme", extras.get("scheme", "https"))
        values["endpoint"] = self._endpoint(conn, scheme)
        if scheme == "http" and values["endpoint"] is not None and "ca_file" in extras:
            raise invalid("ca_file", "is given, and scheme is http", "Set scheme to https, or clear it.")
        values["access_key"], values["secret_key"] = _blank(conn.login), _blank(conn.password)
        names = {
            "access_key": "login (access key)",
            "secret_key": "password (secret key)",
            "endpoint": "host",
            **{field: key for key, field in FIELDS.items()},
        }
        return self._checked(S3Config, {**values, "bucket": extras.get("bucket")}, names)

    def _endpoint(self, conn: Connection, scheme: str) -> str | None:
        host = (conn.host or "").strip().rstrip("/")
        if not host:
            return None
        if "@" in host:
            raise password_in("host", "Give the host alone. The keys are the fields Login and Password.")
        if "://" in host:
            raise invalid(
                "host",
                f"{shown(host)} contains a scheme",
                "Give the host name only, and http or https in the field scheme.",
            )
        if not conn.port:
            self.log.warning(
                "Connection %s: the port is blank, so that of %s is used; the Test button needs a saved port.",
                self.s3_conn_id,
                scheme,
            )
        if ":" in host and not host.startswith("["):
            if host.count(":") == 1:
                raise invalid("host", f"{shown(host)} contains a port", "Give it in the field Port.")
            host = f"[{host}]"
        return f"{scheme}://{host}:{conn.port}" if conn.port else f"{scheme}://{host}"

    def _parse_aws(self, conn: Connection, extras: Mapping[str, Any]) -> tuple[S3Config, str | None]:
        unknown = {key for key in extras if key not in _AWS_FIELDS and not key.startswith("assume_role")}
        check_unknown(unknown, self.s3_conn_id, self.log)
        service = _mapping(_mapping(extras, "service_config"), "s3")
        session = _mapping(extras, "session_kwargs")
        # The service's own endpoint wins, as in the amazon provider.
        values: dict[str, Any] = {
            "endpoint": service.get("endpoint_url", extras.get("endpoint_url")),
            "region": extras.get("region_name", session.get("region_name")),
            "ca_bundle": _verify(service.get("verify", extras.get("verify"))),
        }
        values["bucket"] = service.get("bucket_name")
        options = self._client_options(extras)
        kind = S3Config
        if options:
            kind, values["config_kwargs"] = _AwsConfig, options
        if any(key in extras for key in _ROLE):
            return self._checked(_AwsConfig, {**values, "provider_session": self._role()}, _AWS_NAMES)
        names = dict(_AWS_NAMES)
        if _blank(conn.login) or _blank(conn.password):
            keys = _blank(conn.login), _blank(conn.password)
            names |= {"access_key": "login (access key)", "secret_key": "password (secret key)"}
        else:
            found = extras if "aws_access_key_id" in extras or "aws_secret_access_key" in extras else session
            keys = found.get("aws_access_key_id"), found.get("aws_secret_access_key")
            names |= {"access_key": "aws_access_key_id", "secret_key": "aws_secret_access_key"}
        values["access_key"], values["secret_key"] = keys
        values["session_token"] = extras.get("aws_session_token", session.get("aws_session_token"))
        values["profile"] = extras.get("profile_name", session.get("profile_name"))
        return self._checked(kind, values, names)

    def _client_options(self, extras: Mapping[str, Any]) -> dict[str, Any]:
        """What of ``config_kwargs`` the connection has to say; the rest, as time-outs, is the engine's."""
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        given = _mapping(extras, "config_kwargs")
        options = {key: value for key, value in given.items() if key in _CLIENT_OPTIONS}
        if any("@" in str(address) for address in _mapping(given, "proxies").values()):
            raise password_in(
                "config_kwargs.proxies", "Give the proxy alone. One that asks for a login is named in HTTPS_PROXY."
            )
        style = _mapping(given, "s3").get("addressing_style")
        if style is not None:
            options["s3"] = {"addressing_style": style}
        ignored = {*(given.keys() - options.keys() - {"s3"}), *(_mapping(given, "s3").keys() - {"addressing_style"})}
        check_unknown((f"config_kwargs.{key}" for key in ignored), self.s3_conn_id, self.log)
        if options.get("signature_version") == "unsigned":
            options["signature_version"] = UNSIGNED
        try:
            Config(**options)
        except (BotoCoreError, TypeError, ValueError) as error:
            what = f"cannot be used: {peer_text(error, 160)}"
            raise invalid("config_kwargs", what, "Give what botocore's Config takes.") from None
        return options

    def _role(self) -> Any:
        """The session of the amazon provider, which takes roles and renews what it was lent."""
        try:
            from airflow.providers.amazon.aws.hooks.base_aws import AwsBaseHook
        except ImportError:
            raise invalid(
                "role_arn",
                "needs the amazon provider",
                f"Install {_PROVIDER} where the tasks run, or give keys instead of the role.",
            ) from None
        return AwsBaseHook(aws_conn_id=self.s3_conn_id, client_type="s3").get_session()

    def _checked(
        self, kind: type[S3Config], values: dict[str, Any], names: Mapping[str, str]
    ) -> tuple[S3Config, str | None]:
        """Check as the table of options does, with the names that the connection has for the settings."""
        given = {name: value for name, value in values.items() if value is not None}
        try:
            config = kind(**given)
        except InvalidOption as error:
            raise _renamed(error, names) from None
        if config.ca_bundle is not None:
            _check_file(names["ca_bundle"], config.ca_bundle)
        if config.access_key is None and config.profile is None and "provider_session" not in given:
            self.log.warning(
                "Connection %s has no keys, profile or role: boto3 uses the credentials that it finds on this machine.",
                self.s3_conn_id,
            )
        bucket, config = config.bucket, dataclasses.replace(config, bucket=None)
        return config, bucket

    # --- the Test button ---------------------------------------------------------------------------

    def test_connection(self) -> Answer:
        """Write a small object, read it, and list it. Never raises; takes at most ten seconds."""
        try:
            config, bucket = self._settings()
            if bucket is None:
                raise invalid("bucket", "is blank, so there is nothing to test", "Name a bucket to test with.")
        except Exception as error:
            return unreadable(error, self.s3_conn_id)
        answer = within_limit(lambda: _try(config, bucket), "dicom-s3-test")
        return answer or (
            False,
            f"{_where(config, bucket)}: no answer within {TEST_SECONDS:g} s. Check the address and the network.",
        )


_ANY = Parsed(lambda _, value: value, "a value", optional=True)


@dataclasses.dataclass(frozen=True, slots=True)
class _AwsConfig(S3Config):
    """What an ``aws`` connection can say beyond a bucket and its keys."""

    provider_session: Any = setting(  # noqa: RUF009 - it makes a dataclass field
        None, _ANY, "Session of the amazon provider, which lends credentials and renews them."
    )
    config_kwargs: Any = dataclasses.field(
        default=None, repr=False, metadata={"setting": Setting(_ANY, "Options of botocore's Config.")}
    )

    def session(self) -> Any:
        """See :meth:`S3Config.session`."""
        return S3Config.session(self) if self.provider_session is None else self.provider_session

    def client_options(self) -> dict[str, Any]:
        """See :meth:`S3Config.client_options`."""
        return dict(self.config_kwargs or {})


def _blank(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _mapping(extras: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = extras.get(key) or {}
    if not isinstance(value, dict):
        raise invalid(key, "is not a JSON object", "See the documentation of the amazon provider.")
    return value


def _verify(value: Any) -> str | None:
    """The file of trusted authorities, if ``verify`` names one."""
    if value is None:
        return None
    if isinstance(value, str) and value.strip().lower() not in ("true", "false"):
        return value
    if Flag().check("verify", value):
        return None
    raise invalid(
        "verify",
        "is false: any certificate would be accepted",
        "Give the PEM file of the certificate authorities to trust.",
    )


def _check_file(name: str, path: str) -> None:
    from pathlib import Path

    if not Path(path).is_absolute():
        raise invalid(name, f"{shown(path)} is not an absolute path", "Write an absolute path.")
    try:
        with Path(path).open("rb"):
            pass
    except OSError:
        raise invalid(name, f"{shown(path)} is not a readable file", "Check the path.") from None


def _renamed(error: InvalidOption, names: Mapping[str, str]) -> InvalidOption:
    def rename(text: str) -> str:
        return re.sub(r"\bs3_config\.(\w+)", lambda match: names.get(match[1], match[1]), text)

    return reworded(error, rename)


def _where(config: S3Config, bucket: str) -> str:
    return f"The bucket {bucket} at {config.endpoint or 'AWS'}"


def _try(config: S3Config, name: str) -> Answer:
    """One round trip: what a retrieval needs of a bucket, and no more."""
    from airflow_dicom_get.storage.bucket import Bucket

    where = _where(config, name)
    bucket, content = Bucket(name, config, attempts=1), b"Written by the connection test of airflow-dicom-get.\n"
    try:
        bucket.put(_PROBE, content)
        if bucket.get(_PROBE) != content:
            return False, f"{where} returns different bytes than were written."
        if not any(item.key == _PROBE for item in bucket.list(_PROBE)):
            return False, f"{where} does not list the object that was written."
    except DicomGetError as error:
        # The engine names the bucket alone, and its own setting.
        return False, f"{where}: {error}".replace("ca_bundle", "ca_file (of an aws connection: verify)")
    except Exception as error:
        return False, f"{where}: the test failed with {type(error).__name__}."
    stays = ""
    try:
        bucket.call("delete_object", _PROBE)
    except DicomGetError:  # retrievals delete nothing, and their user may lack the right
        stays = f" The object {_PROBE} stays there: deleting it is not permitted."
    return (
        True,
        f"{where} stores, returns and lists objects.{stays} (Tested from the API server.)",
    )
