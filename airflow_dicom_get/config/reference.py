"""The options as the documentation has them."""

from __future__ import annotations

from airflow_dicom_get.config.options import OPTIONS
from airflow_dicom_get.config.shell import shell_name


def markdown_table() -> str:
    """All options as a table in Markdown."""
    lines = [
        "| Python | shell | connection, config file | default | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in OPTIONS.values():
        shell = shell_name(row.name)
        typed = f"`{shell}`" if shell.startswith("--") else ""
        field = f"`{row.setting.connection}`" if row.setting.connection else ""
        default = row.default_text or ("false" if row.default is False else "")
        unit = f" ({row.setting.unit})" if row.setting.unit else ""
        lines.append(f"| `{row.name}` | {typed} | {field} | {default} | {row.setting.doc}{unit} |")
    return "\n".join(lines) + "\n"


def markdown_page() -> str:
    """The page ``docs/options.md``."""
    return f"""# Options

Each option is defined once, in `airflow_dicom_get/config/options.py`, and this page is generated from there:
`python -m airflow_dicom_get.config.reference > docs/options.md`.

The parts of a group, such as `tls.ca`, are given in Python as a dict or an object: `tls={{"ca": "ca.pem"}}`,
`deadlines=Deadlines(idle=30)`. Options on the command line take precedence over the config file, and the AE title in an
address over `called_ae_title`. Rates may be written as `500K`, `20M`, `1.5G` (powers of 1000) or `20Mi` (of 1024).

{markdown_table()}"""


if __name__ == "__main__":
    print(markdown_page(), end="")
