"""A DataFrame as Airflow's XCom holds it: Parquet, in hexadecimal. Neither Airflow nor pandas is imported."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.errors import ManifestError

if TYPE_CHECKING:
    import pyarrow as pa
    from pandas import DataFrame


def table_in_xcom(value: Any) -> pa.Table | None:
    """The table of a DataFrame in an XCom, whatever its columns; None if the XCom holds something else.

    Parameters
    ----------
    value
        As it is stored, not deserialized by Airflow.

    Raises
    ------
    ManifestError
        It says that it is a DataFrame, and cannot be read.
    """
    if not isinstance(value, Mapping) or not str(value.get("__classname__", "")).endswith(".DataFrame"):
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(BytesIO(bytes.fromhex(value["__data__"])))
    except (KeyError, TypeError, ValueError, OSError, pa.ArrowException) as error:
        raise ManifestError("A task returned a DataFrame that cannot be read.", hint="", uri=None) from error


def bytes_in_xcom(frame: DataFrame) -> int:
    """How many bytes a DataFrame takes in XCom."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pandas(frame), buffer, compression="snappy")
    return 2 * int(buffer.tell())
