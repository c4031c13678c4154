"""The verb ``export``: what is checked before anything is written, and the forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.config.checks import invalid, shown
from airflow_dicom_get.config.groups import S3Config
from airflow_dicom_get.config.options import ExportOptions
from airflow_dicom_get.exports import croissant, omop
from airflow_dicom_get.exports.cohort import Cohort, check_objects, check_proof, load_cohort
from airflow_dicom_get.exports.series import series_table
from airflow_dicom_get.exports.sha256sums import sha256sums
from airflow_dicom_get.exports.tables import TABLES, encoded
from airflow_dicom_get.exports.writing import Target
from airflow_dicom_get.vocabulary import noun

if TYPE_CHECKING:
    from airflow_dicom_get.sinks.objects import Named


@dataclass(frozen=True, slots=True)
class Form:
    """A form of export.

    Attributes
    ----------
    value : callable
        What ``to=None`` gives, out of a cohort and the options.
    contents : callable
        The files that are written, by name and the one named last: out of a cohort, the options and the target.
    takes, needs : sequence of str
        The options that are of this form, and those of them that must be given.
    suffixes : sequence of str
        How the name of the file ends; any if there are none.
    """

    value: Callable[[Cohort, ExportOptions], Any]
    contents: Callable[[Cohort, ExportOptions, Target], Sequence[tuple[str, bytes]]]
    takes: Sequence[str] = ()
    needs: Sequence[str] = ()
    suffixes: Sequence[str] = ()


FORMS: Mapping[str, Form] = {
    "sha256sums": Form(
        lambda cohort, options: sha256sums(cohort),
        lambda cohort, options, target: [(target.name, sha256sums(cohort).encode())],
    ),
    "series": Form(
        lambda cohort, options: series_table(cohort, options.columns),
        lambda cohort, options, target: [(target.name, encoded(series_table(cohort, options.columns), target.name))],
        takes=("columns",),
        suffixes=TABLES,
    ),
    "croissant": Form(
        croissant.metadata,
        croissant.contents,
        takes=("name", "licence", "citation", "description", "columns"),
        needs=("name",),
        suffixes=(".json", ".jsonld"),
    ),
    "omop": Form(
        omop.image_occurrence,
        omop.contents,
        takes=("mapping",),
        needs=("mapping",),
        suffixes=TABLES,
    ),
}
"""The forms, by their names."""
_OF_A_FORM = ("name", "licence", "citation", "description", "mapping", "columns")


def export(
    manifests: Any,
    form: str,
    to: str | Path | None = None,
    *,
    name: str | None = None,
    licence: str | None = None,
    citation: str | None = None,
    description: str | None = None,
    mapping: str | Path | None = None,
    accept: Sequence[str] = (),
    columns: Sequence[str] = (),
    check: bool = False,
    root: Named | Sequence[Named] | None = None,
    s3_config: S3Config | Mapping[str, Any] | None = None,
) -> Any:
    """Write manifests in a form that other tools read; of each instance the newest row counts.

    Nothing is written unless all of it is right: a file appears whole or not at all, and never in place of another.

    Parameters
    ----------
    manifests : manifest, reference or URI, or several of them
        What runs wrote, of any shape.
    form : {FORMS}
        What to write.
    to : str or Path
        The file to write, or ``s3://bucket/key``. By default nothing is written.
    name, licence, citation, description : str
        What ``croissant`` says of the data set; what is not given is left out.
    mapping : str or Path
        For ``omop``: a CSV file with the person, procedure and date of each study.
    accept : sequence of str
        Verdicts besides ``complete`` that may be exported. What is missing is then said in the export.
    columns : sequence of str
        For ``series`` and ``croissant``: columns of ``tags`` in the manifests to take along. They may name patients.
    check : bool
        Read every file first, and compare its digest with the manifest.
    root : path, address, or several of them
        Further folders or prefixes in which the files may lie, as for
        :func:`~airflow_dicom_get.verify.verify`.
    s3_config : S3Config or mapping
        How buckets are reached.

    Returns
    -------
    str, dict or DataFrame
        Without ``to`` what would be written; else ``form, to, files, verdict, studies, series, instances, bytes,
        missing``.

    Raises
    ------
    InvalidOption, ManifestError
        Invalid input.
    NotProven
        The verdict is neither ``complete`` nor accepted, or a file is not what its manifest says.
    SinkError
        The file cannot be written, or a bucket cannot be reached.
    """
    options = ExportOptions.of_arguments(locals())
    return write_export(options, manifests, form, to, check=check, root=root)


export.__doc__ = (export.__doc__ or "").replace("{FORMS}", "{" + ", ".join(f'"{name}"' for name in FORMS) + "}")


def write_export(
    options: ExportOptions,
    manifests: Any,
    form: str,
    to: Any = None,
    *,
    check: bool = False,
    root: Named | Sequence[Named] | None = None,
) -> Any:
    """As :func:`export`, with options that were checked already."""
    made = check_form(form, options)
    s3 = options.s3_config
    target = Target(to, made.suffixes, s3) if to is not None else None
    if target is not None:
        target.check_free(target.name)
    cohort = load_cohort(manifests, s3, root)
    check_proof(cohort, options.accept)
    cohort.check_columns(options.columns)
    if target is None:
        value = made.value(cohort, options)
        if check:
            check_objects(cohort, s3)
        return value
    contents = made.contents(cohort, options, target)
    target.check_free(*(name for name, _ in contents))
    if check:
        check_objects(cohort, s3)
    private = bool(options.columns) or options.mapping is not None
    return {"form": form, "to": str(target), "files": target.write(contents, private=private), **_numbers(cohort)}


def check_form(form: Any, options: ExportOptions) -> Form:
    """The form of a name, if the options are its own. Raises :class:`InvalidOption`."""
    if form not in FORMS:
        raise invalid("form", f"{shown(form)} is not allowed", f"Give one of {', '.join(FORMS)}.")
    made = FORMS[form]
    for option in _OF_A_FORM:
        given = getattr(options, option) not in (None, ())
        if given and option not in made.takes:
            others = [name for name, other in FORMS.items() if option in other.takes]
            raise invalid(
                option, f"does not belong to the form {form}", f"Leave it out, or take {' or '.join(others)}."
            )
        if not given and option in made.needs:
            raise invalid(option, f"is missing: the form {form} needs it", "Give it.")
    return made


def _numbers(cohort: Cohort) -> dict[str, Any]:
    held = cohort.held
    return {
        "verdict": cohort.verdict,
        "studies": int(held["study_instance_uid"].nunique()),
        "series": int(held[["study_instance_uid", "series_instance_uid"]].drop_duplicates().shape[0]),
        "instances": len(held),
        "bytes": int(held["bytes"].fillna(0).sum()),
        "missing": len(cohort.missing),
    }


def summary(written: Mapping[str, Any]) -> str:
    """What was written, as a line for people."""
    studies, series, instances = (written[name] for name in ("studies", "series", "instances"))
    text = (
        f"{written['verdict']}: {instances} {noun(instances, 'instance')} in {series} series of {studies} "
        f"{noun(studies, 'study', 'studies')}"
    )
    return text + (f", {written['missing']} missing" if written["missing"] else "")
