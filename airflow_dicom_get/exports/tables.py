"""Tables as files: CSV or Parquet, as the name of the file ends."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

from airflow_dicom_get.manifest.files import safe_cell

if TYPE_CHECKING:
    from pandas import DataFrame

CSV, PARQUET = ".csv", ".parquet"
TABLES = (CSV, PARQUET)
"""How the names of tables end."""


def encoded(frame: DataFrame, name: str) -> bytes:
    """A table as the file of this name has it. A text that a spreadsheet would take for a formula is quoted in CSV."""
    if name.lower().endswith(CSV):
        safe = frame.assign(
            **{column: frame[column].map(safe_cell) for column in frame.select_dtypes("string").columns}
        )
        return str(safe.to_csv(index=False, lineterminator="\n")).encode("utf-8", "backslashreplace")
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = BytesIO()
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
