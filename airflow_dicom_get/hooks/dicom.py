"""The hook of a DICOM node: the connection's fields, and the verbs on them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseHook

from airflow_dicom_get.connections import with_connection
from airflow_dicom_get.errors import DicomGetError
from airflow_dicom_get.hooks._connection import (
    TEST_SECONDS,
    unreadable,
    within_limit,
)
from airflow_dicom_get.hooks._destinations import Destinations, resolve_destinations
from airflow_dicom_get.hooks._node_config import CONN_NAME, CONN_TYPE, NodeConfig, read_node_config, share, within

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pandas import DataFrame

    from airflow_dicom_get.config.node import Node
    from airflow_dicom_get.config.options import GetOptions
    from airflow_dicom_get.getscu import GetScu
    from airflow_dicom_get.result import EchoReport, Plan, Result
    from airflow_dicom_get.store import StoreScu


class DicomHook(BaseHook):
    """Talk to a DICOM node through a ``dicom`` connection.

    In a ``@task`` function::

        hook = DicomHook("pacs")
        result = hook.get_study({"StudyInstanceUID": uid}, destination="/data/dicom")

    :param dicom_conn_id: the ``dicom`` connection: host, port, login = called AE title, password = TLS key passphrase
    """

    conn_name_attr = "dicom_conn_id"
    default_conn_name = "dicom_default"
    conn_type = CONN_TYPE
    hook_name = CONN_NAME

    def __init__(self, dicom_conn_id: str = default_conn_name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dicom_conn_id = dicom_conn_id
        self._config: NodeConfig | None = None

    # --- the connection ----------------------------------------------------------------------------

    @property
    def config(self) -> NodeConfig:
        """The settings of the connection, checked; it is looked up once.

        :raises AirflowNotFoundException: the connection does not exist
        :raises InvalidOption: a field is missing or malformed; the message names connection and field
        """
        if self._config is None:
            self._config = read_node_config(self.dicom_conn_id)
        return self._config

    @property
    def node(self) -> Node:
        """The address of the node."""
        return self.config.node

    @property
    def query_model(self) -> str:
        """The connection's information model."""
        return self.config.query_model

    @property
    def timezone(self) -> str:
        """The time zone of the connection, for ``today``."""
        return self.config.timezone

    def options(
        self,
        *,
        seconds: float = math.inf,
        destinations: Destinations | None = None,
        s3_conn_id: str | None = None,
        **overrides: Any,
    ) -> GetOptions:
        """Return the options of a client, all checked.

        ``max_associations`` and ``bytes_per_second`` of the connection are limits for all tasks together, but tasks
        do not coordinate. So each task gets the share that belongs to its ``associations``, and a pool with as many
        slots as the PACS allows associations limits the tasks. The limits of a connection to forward to apply too.

        :param seconds: the longest that a retrieval may take, unless the connection sets less
        :param destinations: destination and manifest root, if already looked up
        :param s3_conn_id: the connection of a destination or root ``s3://…`` that names none
        :param overrides: options of ``GetScu`` that take precedence over the connection's
        """
        values = dict(overrides)
        if destinations is None and "destination" in values and "s3_config" not in values:
            root = values.pop("manifest_root", None)
            destinations = resolve_destinations(values["destination"], manifest_root=root, s3_conn_id=s3_conn_id)
        if destinations is not None:
            values |= destinations.options
        options = self.config.options(values)
        changes: dict[str, Any] = {"max_associations": options.associations}
        if options.bytes_per_second is not None and "bytes_per_second" not in overrides:
            changes["bytes_per_second"] = share(options)
        changes["deadlines"] = within(options.deadlines, seconds)
        if destinations is not None and destinations.destination.target is not None:
            target = destinations.destination.target
            changes |= target.limits_as_target(replace(options, **changes), overrides)
        return replace(options, **changes)

    def get_scu(self, **overrides: Any) -> GetScu:
        """Make a :class:`~airflow_dicom_get.GetScu` from the connection; see :meth:`options`."""
        from airflow_dicom_get.getscu import GetScu

        return GetScu.of(self.options(**overrides))

    def get_store_scu(self, *, associations: int = 1, seconds: float = math.inf, **overrides: Any) -> StoreScu:
        """Make a :class:`~airflow_dicom_get.store.StoreScu` that stores at the node of the connection.

        :param associations: how many to use, of those that the connection allows
        :param seconds: the longest that it may take, unless the connection sets less
        :param overrides: options of ``StoreScu`` that take precedence over the connection's
        """
        from airflow_dicom_get.store import StoreScu

        options = self.config.store_options({"associations": associations, **overrides})
        deadlines = within(options.deadlines, seconds)
        return StoreScu.of(replace(options, max_associations=associations, deadlines=deadlines))

    def get_conn(self) -> GetScu:
        """Return a client of the node; nothing is opened yet."""
        return self.get_scu()

    # --- the verbs ---------------------------------------------------------------------------------

    def echo(self) -> EchoReport:
        """Send a C-ECHO, and report what the node offers."""
        return self.get_conn().echo()

    def find(self, query: Mapping[str, Any], **kwargs: Any) -> Any:
        """Send a C-FIND, and return data sets of pydicom, which XCom does not take; see :meth:`find_df`.

        :param query: DICOM keywords and values
        :param kwargs: passed to :meth:`GetScu.find`, as ``level``
        """
        return self.get_conn().find(query, **{"query_model": self.query_model, **kwargs})

    def find_df(self, query: Mapping[str, Any], *, level: str = "STUDY", **kwargs: Any) -> DataFrame:
        """Send a C-FIND, and return a DataFrame of texts and dates, which a ``@task`` function may return.

        What it returns goes to XCom, which every viewer of the DAG can read: drop the columns that name patients.

        :param query: DICOM keywords and values
        :param level: ``STUDY``, ``SERIES`` or ``IMAGE``
        :param kwargs: passed to :meth:`GetScu.find`, as ``return_keys``
        :return: one row an answer, one column a keyword: text, and dates as ``datetime64``, a malformed one null
        """
        from airflow_dicom_get.engine.find import dates_of

        return dates_of(self.find(query, level=level, as_frame=True, **kwargs))

    def plan(self, query: Mapping[str, Any], **kwargs: Any) -> Plan:
        """List what a retrieval would fetch."""
        return self.get_conn().plan(query, **{"query_model": self.query_model, **kwargs})

    def get_study(
        self, query: Mapping[str, Any], destination: str, *, s3_conn_id: str | None = None, **overrides: Any
    ) -> Result:
        """Retrieve what the query selects. Check ``verdict``, or call ``raise_for_verdict()``.

        :param query: DICOM keywords and values
        :param destination: an absolute path, ``s3://[CONN_ID@]bucket/prefix``, ``dicom://CONN_ID`` or
            ``dicom://[AE@]host:port``
        :param s3_conn_id: the connection of a bucket whose address names none
        :param overrides: options of ``GetScu`` that take precedence over the connection's
        """
        root = overrides.pop("manifest_root", None)
        destinations = resolve_destinations(destination, manifest_root=root, s3_conn_id=s3_conn_id)
        result = self.get_scu(destinations=destinations, **overrides).get_study(query, query_model=self.query_model)
        if result.manifest_uri is not None:
            result.manifest_uri = with_connection(result.manifest_uri, destinations.manifest_conn_id)
        return result

    # --- the Test button ---------------------------------------------------------------------------

    def test_connection(self) -> tuple[bool, str]:
        """Send a C-ECHO; return what the node offers, or what to correct. Never raises; takes at most ten seconds."""
        try:
            scu = self._test_scu()
        except Exception as error:
            return unreadable(error, self.dicom_conn_id)
        answer = within_limit(lambda: self._test(scu), "dicom-test")
        if answer is not None:
            return answer
        scu.cancel("the connection test took too long")
        return (
            False,
            f"{self.node}: no answer within {TEST_SECONDS:g} s. Check the address, and that no firewall is in between.",
        )

    def _test_scu(self) -> GetScu:
        deadlines = self.options().deadlines
        short = replace(
            deadlines,
            connect=min(deadlines.connect, TEST_SECONDS / 2),
            acse=min(deadlines.acse, TEST_SECONDS * 0.7),
            operation=TEST_SECONDS * 0.9,
            release=1.0,
        )
        return self.get_scu(deadlines=short)

    def _test(self, scu: GetScu) -> tuple[bool, str]:
        try:
            report = scu.echo()
        except DicomGetError as error:
            return False, str(error)
        except Exception as error:
            return False, f"{self.node}: the test failed with {type(error).__name__}."
        model = self.query_model
        accepted = [name for name, yes in report.accepted.items() if yes]
        missing = [name for name in (f"C-FIND {model}", f"C-GET {model}") if not report.accepted.get(name)]
        offers = f"{report.node} answers in {report.round_trip_ms:.0f} ms and offers {', '.join(accepted)}"
        if accepted == ["C-ECHO", "C-STORE"]:
            return True, f"{offers}: can be forwarded to; cannot be retrieved from."
        if f"C-GET {model}" in missing:
            return False, f"{offers}, but not {' and '.join(missing)}: studies cannot be retrieved from it by C-GET."
        if missing:
            return (
                True,
                f"{offers}. Without C-FIND, no retrieval can be verified as complete, and only UIDs can be requested.",
            )
        return True, f"{offers}. (Tested from the API server; the workers need the same access to the PACS.)"
