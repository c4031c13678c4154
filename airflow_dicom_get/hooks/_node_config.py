"""What a ``dicom`` connection says of its node: address, options, and the limits that all tasks share."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, tzinfo
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.config.checks import invalid, shown
from airflow_dicom_get.config.connection import field_name, options_from_fields
from airflow_dicom_get.config.groups import MAX_PDU_LENGTH, ForwardTarget, Window
from airflow_dicom_get.config.node import Node, check_ae_title, password_in
from airflow_dicom_get.config.options import OPTIONS, CallOptions, GetOptions, StoreOptions, nested
from airflow_dicom_get.errors import InvalidOption
from airflow_dicom_get.hooks._connection import check_unknown, extras_of, find_connection, of_connection

if TYPE_CHECKING:
    from airflow.sdk import Connection

    from airflow_dicom_get.config.groups import Deadlines

CONN_TYPE = "dicom"
CONN_NAME = "DICOM (PACS)"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """A ``dicom`` connection, all of it checked."""

    conn_id: str
    own: CallOptions
    """The options of a client that the connection makes by itself."""
    values: Mapping[str, Any]
    """The options that the connection gives, by their names in :class:`~airflow_dicom_get.GetScu`."""

    @property
    def node(self) -> Node:
        """Its address."""
        return self.own.addr

    @property
    def query_model(self) -> str:
        """Its information model, which belongs to a call, not to a client."""
        return self.own.query_model

    @property
    def timezone(self) -> str:
        """The time zone of the node, for ``today``."""
        return str(self.values.get("timezone", OPTIONS["timezone"].default))

    def options(self, overrides: Mapping[str, Any]) -> GetOptions:
        """The options of a client, checked, with those that win over the connection's."""
        return GetOptions.check(self._with(self.values, overrides)) if overrides else self.own

    def store_options(self, overrides: Mapping[str, Any]) -> StoreOptions:
        """The options of a client that stores at this node: the connection's limits as a source are not its own."""
        return StoreOptions.check(self._with(StoreOptions.own(self.values), overrides))

    def _with(self, values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The connection's values with those that win over them; of its deadlines only the ones that are given."""
        deadlines = overrides.get("deadlines")
        if isinstance(deadlines, Mapping):
            overrides = {**overrides, "deadlines": {**values.get("deadlines", {}), **deadlines}}
        return {"addr": self.node, **values, **overrides}

    def forward_target(self) -> ForwardTarget:
        """How the node is called where instances are forwarded to it."""
        return ForwardTarget(
            calling_ae_title=self.own.calling_ae_title,
            max_pdu_length=min(self.own.max_pdu_length, MAX_PDU_LENGTH),
            tls=self.own.tls,
        )

    def limits_as_target(self, options: GetOptions, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Changes to the options of a source for the limits of this connection, where it is forwarded to.

        :param options: of the source, its own limits applied
        :param overrides: what the caller gave, which wins
        :raises InvalidOption: it uses more associations than this node admits, or their hours never overlap
        """
        own = self.own
        if options.associations > own.max_associations:
            raise invalid(
                "associations",
                f"{options.associations} is more than max_associations of the connection {self.conn_id}, "
                f"which is {own.max_associations}",
                "Lower it, or raise max_associations if the node allows more.",
            )
        changes: dict[str, Any] = {}
        if own.bytes_per_second is not None and "bytes_per_second" not in overrides:
            most = share(replace(own, associations=options.associations))
            changes["bytes_per_second"] = min(most, options.bytes_per_second or most)
        if "window" not in overrides:
            changes["window"], changes["timezone"] = both_windows(
                options.window, options.timezone, own.window, own.timezone, self.conn_id
            )
        return changes


def read_node_config(conn_id: str) -> NodeConfig:
    """Look up a connection, and check all of it: the form checks next to nothing.

    :raises AirflowNotFoundException: there is none of that name
    :raises InvalidOption: a field is missing or malformed; the message names connection and field
    """
    conn = find_connection(conn_id, CONN_NAME)
    try:
        return _parse(conn, conn_id)
    except InvalidOption as error:
        raise of_connection(error, conn_id) from None


def _parse(conn: Connection, conn_id: str) -> NodeConfig:
    if (conn.conn_type or "").lower() != CONN_TYPE:
        raise invalid("type", f"{shown(conn.conn_type)} is not dicom", "Name a connection of type DICOM.")
    node = _node(conn, conn_id)
    flat, unknown = options_from_fields(extras_of(conn, '{"calling_ae_title": "AIRFLOW"}'))
    check_unknown(unknown, conn_id, log)
    if conn.password:
        flat["tls.key_password"] = conn.password
    values = nested(flat, _field_name)
    own = CallOptions.check({"addr": node, **values}, _field_name)  # here the names of the fields are known
    return NodeConfig(conn_id, own, GetOptions.own(values))


def _field_name(name: str) -> str:
    return "password (TLS key passphrase)" if name == "tls.key_password" else field_name(name)


def _node(conn: Connection, conn_id: str) -> Node:
    host = (conn.host or "").strip()
    if not host:
        raise invalid("host", "is missing", "Give the name or address of the PACS.")
    if "@" in host:
        raise password_in("host", "Give the host alone. The called AE title is the field Login.")
    if not conn.port:
        raise invalid("port", "is missing", "Give the DICOM port of the PACS, often 104 or 11112.")
    title = None
    if (conn.login or "").strip():
        title = check_ae_title(str(conn.login), "login (called AE title)")
    else:
        log.warning(
            "Connection %s: login (called AE title) is blank, so %s is used; many PACS refuse that.",
            conn_id,
            OPTIONS["called_ae_title"].default,
        )
    address = f"[{host}]:{conn.port}" if ":" in host and not host.startswith("[") else f"{host}:{conn.port}"
    node = Node.parse(address, "host, port")
    return Node(node.host, node.port, title)


# --- limits that all tasks share -------------------------------------------------------------------


def within(deadlines: Deadlines, seconds: float) -> Deadlines:
    """The deadlines, with an end of the operation after so many seconds if not before."""
    if seconds == math.inf:
        return deadlines
    return replace(deadlines, operation=min(max(seconds, 0.001), deadlines.operation or math.inf))


def share(options: GetOptions) -> int:
    """What of a connection's ``bytes_per_second`` belongs to the associations of one task."""
    assert options.bytes_per_second is not None
    return max(options.bytes_per_second * options.associations // options.max_associations, 1000)


@dataclass(frozen=True, slots=True)
class BothWindows(Window):
    """The hours in which two nodes may be used, each in its own time zone."""

    other: Window = field(kw_only=True)
    other_zone: tzinfo = field(kw_only=True)

    def __str__(self) -> str:
        return f"{Window.__str__(self)} and {self.other}"

    def _around(self, moment: datetime, zone: tzinfo) -> list[tuple[datetime, datetime]]:
        spans = []
        for start, end in Window._around(self, moment, zone):
            for other_start, other_end in self.other._around(moment, self.other_zone):
                if max(start, other_start) < min(end, other_end):
                    spans.append((max(start, other_start), min(end, other_end)))
        return sorted(spans)


def both_windows(
    first: Window | None, first_zone: tzinfo, second: Window | None, second_zone: tzinfo, conn_id: str
) -> tuple[Window | None, tzinfo]:
    """The window that holds for both nodes, and the zone to read it in.

    :raises InvalidOption: they never overlap
    """
    if first is None or second is None:
        return (first, first_zone) if second is None else (second, second_zone)
    both = BothWindows(first.start, first.end, other=second, other_zone=second_zone)
    if not both._around(datetime.now(first_zone), first_zone):
        raise InvalidOption(
            f"window: {first} of the source and {second} of the connection {conn_id} never overlap.",
            hint="Correct one of them, or set outside_window='ignore'.",
            option="window",
        )
    return both, first_zone
