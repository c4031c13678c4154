"""Write the tables of the documentation that say what the code says.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->`` in a page under docs/; what is between is
made here, from the code, and a test holds that it is up to date. Where the code has no words for people, as for what
to do about an error, they stand here; a name without words fails.

Usage: doc_tables.py [--check]
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import supported  # noqa: E402

from airflow_dicom_get import errors, getscu  # noqa: E402
from airflow_dicom_get.cli.main import build_parser  # noqa: E402
from airflow_dicom_get.config.connection import connection_fields  # noqa: E402
from airflow_dicom_get.config.options import OPTIONS  # noqa: E402
from airflow_dicom_get.dicom import status, syntaxes  # noqa: E402
from airflow_dicom_get.engine import find, listing, resolve  # noqa: E402
from airflow_dicom_get.get_provider_info import get_provider_info  # noqa: E402
from airflow_dicom_get.manifest.schema import KINDS  # noqa: E402
from airflow_dicom_get.net import association  # noqa: E402
from airflow_dicom_get.vocabulary import CANCELLED, EXIT_CODES, REASONS, VERDICTS  # noqa: E402

BLOCK = re.compile(r"(<!-- table: ([a-z-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def rows(head: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, body)]) + "\n"


def code(text: object) -> str:
    return f"`{text}`"


# --- connections and configuration -----------------------------------------------------------------


def connections() -> str:
    """The extra fields of every connection type."""
    parts = []
    for kind in get_provider_info()["connection-types"]:
        body = []
        for key, field in kind["conn-fields"].items():
            schema = field["schema"]
            default = schema.get("default")
            shown = "" if default is None else code(str(default).lower() if isinstance(default, bool) else default)
            allowed = ", ".join(map(code, schema["enum"])) if schema.get("enum") else ""
            types = schema["type"]
            name = types if isinstance(types, str) else next(one for one in types if one != "null")
            text = " ".join(filter(None, [field.get("description", ""), f"One of {allowed}." if allowed else ""]))
            body.append((field["label"], code(key), name, shown, text))
        for key, one in connection_fields().items() if kind["connection-type"] == "dicom" else ():
            if key not in kind["conn-fields"]:
                shown = "" if one.default is None else code(f"{one.default:g}")
                body.append(("–", code(key), one.json_type, shown, one.doc))
        parts.append(f"Extra fields of the type `{kind['connection-type']}`, *{kind['hook-name']}*:\n")
        parts.append(rows(("in the form", "key in `extra`", "type", "default", ""), body))
    return "\n".join(parts)


def configuration() -> str:
    """The ``[dicom_get]`` section."""
    options = get_provider_info()["config"]["dicom_get"]["options"]
    return rows(
        ("option", "environment", "default", ""),
        (
            (
                code(name),
                code(f"AIRFLOW__DICOM_GET__{name.upper()}"),
                code(one["default"]) if one["default"] else "",
                one["description"].replace("``", "`"),
            )
            for name, one in options.items()
        ),
    )


# --- the shell -------------------------------------------------------------------------------------


def _verbs() -> dict[str, argparse.ArgumentParser]:
    parser = build_parser()
    (actions,) = (one for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    return dict(actions.choices)


def shell_options() -> str:
    """Which verb takes which option."""
    verbs = _verbs()
    found: dict[str, tuple[str, set[str]]] = {}
    for verb, parser in verbs.items():
        for action in parser._actions:
            if not action.option_strings or action.help == argparse.SUPPRESS or action.dest == "help":
                continue
            name = ", ".join(code(one) for one in action.option_strings)
            text = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
            found.setdefault(name, (text, set()))[1].add(verb)
    head = ("option", *(code(verb) for verb in verbs), "")
    return rows(head, ((name, *("×" if v in takers else "" for v in verbs), text)
                       for name, (text, takers) in found.items()))  # fmt: skip


# --- operators -------------------------------------------------------------------------------------


FOR_USERS = ("Operator", "Sensor", "EventTrigger")
"""What the names of classes end in that stand in DAGs."""


def _classes() -> Iterator[tuple[ast.ClassDef, bool]]:
    """The classes of operators, sensors and triggers with what they are made from, and whether each is for users."""
    for pattern in ("hooks/_task.py", "operators/*.py", "sensors/*.py", "triggers/*.py"):
        for path in sorted((ROOT / "airflow_dicom_get").glob(pattern)):
            for node in ast.parse(path.read_text("utf-8")).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    yield node, not path.name.startswith("_") and node.name.endswith(FOR_USERS)


def _lineage(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> list[ast.ClassDef]:
    """A class after those of ours that it is made from."""
    bases = [classes[one.id] for one in node.bases if isinstance(one, ast.Name) and one.id in classes]
    return [*(found for base in bases for found in _lineage(base, classes)), node]


def _parameters(node: ast.ClassDef) -> dict[str, str]:
    """The keyword-only parameters of a class, with their defaults as they are written."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            pairs = zip(item.args.kwonlyargs, item.args.kw_defaults, strict=True)
            return {arg.arg: "" if default is None else ast.unparse(default) for arg, default in pairs}
    return {}


def _described(node: ast.ClassDef) -> dict[str, str]:
    text = ast.get_docstring(node) or ""
    found = re.findall(r"^:param (\w+): (.*?)(?=^:|\Z)", text, re.DOTALL | re.MULTILINE)
    return {name: " ".join(doc.split()).replace("``", "`") for name, doc in found}


def operators() -> str:
    """The parameters of what DAGs are made of, read from its source: no Airflow is needed for it."""
    classes = {node.name: node for node, _ in _classes()}
    written = {"DicomHook.default_conn_name": "'dicom_default'"}
    parts = []
    for node, public in _classes():
        if not public:
            continue
        parameters: dict[str, str] = {}
        described: dict[str, str] = {}
        for one in _lineage(node, classes):
            parameters |= _parameters(one)
            described |= _described(one)
        body = []
        for name, doc in described.items():
            if name not in parameters:
                continue
            default = written.get(parameters[name], parameters[name])
            text = doc.replace(" (templated)", "")
            body.append((code(name), code(default) if default else "", "yes" if text != doc else "", text))
        parts.append(f"### Parameters of {node.name}\n")
        parts.append(rows(("parameter", "default", "templated", ""), body))
    return "\n".join(parts)


# --- what is proven --------------------------------------------------------------------------------


def verdicts() -> str:
    """Verdicts and exit statuses."""
    return rows(
        ("verdict", "means", "exit status"),
        (
            (code(name), VERDICTS[name], f"{number}; 143 for SIGTERM" if name == CANCELLED else number)
            for name, number in EXIT_CODES.items()
        ),
    )


_COLUMNS = {
    "study_instance_uid": "Study Instance UID",
    "series_instance_uid": "Series Instance UID",
    "sop_instance_uid": "SOP Instance UID; the three together are the key",
    "sop_class_uid": "SOP Class UID; of the C-STORE request once the instance was received",
    "transfer_syntax_uid": "transfer syntax of the presentation context in which it was received",
    "modality": "Modality (0008,0060)",
    "series_number": "Series Number",
    "instance_number": "Instance Number",
    "state": "`stored` or `forwarded` now, `held` before; `failed`, `missing`, `conflict`; `withdrawn`, `unexpected`",
    "reason": "why it is not held, or a remark on one that is, as one of the [words below](#reasons); otherwise null",
    "exactness": "what is known about a conversion by the PACS, see [below](#exactness)",
    "dimse_status": "the status with which its C-STORE request was answered",
    "error": "the same as `reason` in a sentence, without patient data",
    "uri": "where the object is",
    "bytes": "size of the object at `uri`",
    "sha256": "digest of the object, as `sha256sum` prints it; of the data set as sent, for another node",
    "dataset_offset": "where the data set begins in the object: the length of preamble and file meta information",
    "dataset_bytes": "length of the data set",
    "forwarded_to": "the node at which it was stored",
    "forward_status": "`ok`, `warning` or `error`, from the status of that node",
    "forward_error": "that status in words",
    "source": "the node from which it was received",
    "destination": "where the retrieval wrote to",
    "availability": "Instance Availability (0008,0056) as the PACS lists it: `ONLINE`, `NEARLINE`, `OFFLINE`, "
    "`UNAVAILABLE`; null if it does not",
    "attempt": "round of the retrieval in which its state was decided; 0 if it was held before",
    "association": "number of the association over which it was received",
    "received_at": "when it was complete, in UTC",
    "duration_ms": "from its first byte to its last",
}


def manifest_columns() -> str:
    """The columns of the manifest."""
    return rows(("column", "type", ""), ((code(n), kind, _COLUMNS[n]) for n, kind in KINDS.items()))


# --- troubleshooting -------------------------------------------------------------------------------


def exactness() -> str:
    """What the values of the manifest's column ``exactness`` mean."""
    from airflow_dicom_get.vocabulary import EXACTNESS

    rows = [f"| `{word}` | {text} |" for word, text in EXACTNESS.items()]
    return "\n".join(["| value | meaning |", "| --- | --- |", *rows])


def reasons() -> str:
    """Every word of the column ``reason``."""
    return rows(
        ("reason", "means", "another try", "what to do"),
        (
            (code(word), reason.text, "helps" if reason.transient else "", reason.advice)
            for word, reason in REASONS.items()
            if reason.of == "row"
        ),
    )


_ERRORS = {
    "InvalidOption": "Correct the option that the message names. Nothing was sent.",
    "InvalidQuery": "Correct the key that the message names, or narrow the query. Nothing was fetched.",
    "PeerError": "See the classes below it.",
    "ConnectFailed": "Check host, port and firewall from the machine that runs the task, and that the PACS is running.",
    "TlsFailed": "The message says what is wrong with which certificate; see [TLS](deployment.md#tls).",
    "AssociationRejected": "Have our AE title registered at the PACS, or correct the called AE title. "
    "*Local limit exceeded*: use fewer associations, or wait.",
    "AssociationAborted": "Check the log of the PACS. It is transient: the next try resumes.",
    "DeadlineExceeded": "If the PACS needs longer, raise the deadline that the message names.",
    "NotNegotiated": "The PACS does not offer the service; without C-FIND only UIDs can be retrieved.",
    "GetNotOffered": "Ask the PACS admin to enable C-GET, or see "
    "[where C-GET is not offered](pacs.md#where-c-get-is-not-offered).",
    "NotAuthorised": "Ask the PACS admin to allow C-GET for our AE title.",
    "PeerProtocolError": "The peer broke the protocol, or is not a DICOM node. Check its log; report it to its vendor.",
    "TooMuch": "The PACS sent far more than it lists. Report it to its vendor, with the message.",
    "ListTooLong": "Narrow the query, and report it to the vendor of the PACS.",
    "OperationFailed": "The message has the status; see [statuses](conformance.md#c-get-responses).",
    "SinkError": "Check permissions, mount and network of the destination.",
    "DestinationFull": "Free space, and run again.",
    "DestinationSlow": "Run again. If it happens often, the destination is too slow for this PACS: check its load, "
    "or retrieve into a local folder, and `store` from there.",
    "ForwardLost": "The node to forward to is unreachable or too slow. Check it, and run again.",
    "ForwardLate": "As for `ForwardLost`; a response that still arrives counts.",
    "S3Error": "The message says which request failed and what to check; see [buckets](deployment.md#buckets).",
    "LedgerError": "A newer version wrote the ledger, or the file is damaged. Use that version, or move the file "
    "away: what it recorded is then fetched again, unless `adopt` is set.",
    "ManifestError": "Check the address; a manifest whose digest differs from its reference has been changed.",
    "Cancelled": "Run again; what is held is not fetched again.",
    "NotProven": "Retrieve what is missing, or export it with `accept`; `verify` says what is not as recorded.",
    "IncompleteRetrieval": "Raised by `raise_for_verdict()` and the operators; the manifest has the reasons.",
}


def error_classes() -> str:
    """Every error, with what to do about it."""
    found: list[type[Any]] = [
        one
        for one in vars(errors).values()
        if inspect.isclass(one) and issubclass(one, errors.DicomGetError) and one is not errors.DicomGetError
    ]
    body = []
    for one in found:
        if one.__name__ not in _ERRORS:
            raise KeyError(f"doc_tables.py does not say what to do about the error {one.__name__}")
        doc = " ".join((inspect.getdoc(one) or "").split("\n\n")[0].split()).replace("``", "`")
        doc = re.sub(r":\w+:`(?:~[\w.]+\.)?([^`]+)`", r"`\1`", doc)
        again = "depends" if isinstance(vars(one).get("transient"), property) else "helps" if one.transient else ""
        body.append((code(one.__name__), doc, again, _ERRORS[one.__name__]))
    return rows(("error", "means", "another try", "what to do"), body)


# --- the conformance statement ---------------------------------------------------------------------


def _name(uid: str) -> str:
    from pydicom.uid import UID

    return str(UID(uid).name)


_FAMILIES = {
    "image": syntaxes._IMAGE_FAMILY,
    "video": syntaxes._VIDEO_FAMILY,
    "document": syntaxes._DOCUMENT_FAMILY,
}


def transfer_syntaxes() -> str:
    """The transfer syntaxes that each family of SOP classes is proposed in, in the order of proposal."""
    order = list(dict.fromkeys(uid for family in _FAMILIES.values() for uid in family))
    order.sort(key=_FAMILIES["video"].index)
    return rows(
        ("transfer syntax", "UID", *_FAMILIES),
        ((_name(uid), code(uid), *("×" if uid in family else "" for family in _FAMILIES.values())) for uid in order),
    )


def sop_classes() -> str:
    """Every storage class of the dictionary with its family."""
    by_family = {family: name for name, family in _FAMILIES.items()}
    return rows(
        ("SOP class", "UID", "family"),
        (
            (_name(uid), code(uid), by_family[syntaxes.candidates(uid)])
            for uid in sorted(syntaxes.all_storage_classes(), key=lambda uid: [int(part) for part in uid.split(".")])
        ),
    )


def modalities() -> str:
    """The classes that are proposed where the PACS tells a modality and no class."""
    return rows(
        ("Modality", "SOP classes"),
        (
            (code(modality), "; ".join(_name(syntaxes._ROOT + tail).removesuffix(" Storage") for tail in tails) or "–")
            for modality, tails in syntaxes._BY_MODALITY.items()
        ),
    )


_SENT = {
    status.SUCCESS: "the destination has taken the instance",
    status.OUT_OF_RESOURCES: "the destination is full or fails, or the node to forward to is out of resources",
    status.MISMATCH: "UIDs of command, context, data set and list disagree, a UID is invalid, or `require_exact` "
    "refused the encoding",
    status.CANNOT_UNDERSTAND: "the header of the data set cannot be read, or there is no data set",
    status.DUPLICATE_OTHER_CONTENT: "another data set is stored under this UID",
    status.CLASS_NOT_SUPPORTED: "the request came on a presentation context that is not for storage; when "
    "forwarding, also: the destination does not accept the SOP class in this transfer syntax",
    status.NOT_AUTHORISED: "the instance belongs to another study, or was not requested",
}


def store_statuses_sent() -> str:
    """What a C-STORE sub-operation is answered."""
    return rows(("status", "sent when"), ((f"{number:04X}H", text) for number, text in _SENT.items()))


def store_statuses_received() -> str:
    """What the response of a node that is forwarded to means, and what the source is then told."""
    known = (0x0000, 0xB000, 0xB006, 0xB007, 0x0001, 0x0107, 0x0111, 0x0116, 0x0213, 0xA700,
             0x0110, 0x0117, 0x0122, 0x0124, 0x0210, 0x0211, 0x0212, 0xA900, 0xC000)  # fmt: skip
    means = {
        "ok": "stored",
        "warning": "stored, with a warning",
        "duplicate": "stored, if the node has confirmed this data set before; else not stored, and not retried",
        "busy": "not stored; retried",
        "refused": "not stored; not retried",
    }
    ranges = {0xA700: "A7xxH", 0xA900: "A9xxH", 0xC000: "CxxxH"}
    body = []
    for number in known:
        shown = status.describe_store(number)
        if number in ranges:
            shown = shown.replace(f"{number:04X}H", ranges[number])
        told = f"{status.store_status_for_source(number):04X}H"
        if number in (0xA900, 0xC000):
            told = "the same"
        body.append((shown, means[status.store_outcome(number)], told))
    return rows(("C-STORE response of the destination", "means", "the source gets"), body)


def get_statuses() -> str:
    """The final statuses of a C-GET that have names."""
    known = (0x0000, 0xB000, 0xA701, 0xA702, 0xA900, 0xC000, 0xFE00, 0x0122, 0x0124, 0x0210, 0x0211, 0x0212)
    return rows(("status", ""), ((f"{n:04X}H", status.describe(n).partition(" (")[2].rstrip(")")) for n in known))


def find_keys() -> str:
    """The keys of each level that are asked for, beside what the query says."""
    from pydicom.datadict import keyword_for_tag

    listed = {
        "STUDY": resolve._STUDY_KEYS,
        "SERIES": listing._SERIES_KEYS,
        "IMAGE": listing._IMAGE_KEYS,
    }
    return rows(
        ("level", "for the list of a retrieval", "by the verb `find`"),
        (
            (
                level,
                ", ".join(code(keyword_for_tag(tag)) for tag in tags),
                ", ".join(map(code, find._RETURNED[level])),
            )
            for level, tags in listed.items()
        ),
    )


def rejections() -> str:
    """The reasons of an A-ASSOCIATE-RJ."""
    sources = {1: "service user", 2: "service provider (ACSE)", 3: "service provider (presentation)"}
    return rows(
        ("source", "reason", "means", "hint"),
        (
            (f"{source}: {sources[source]}", reason, text, association._REJECT_HINT.get((source, reason), ""))
            for (source, reason), text in association._REJECTED.items()
        ),
    )


_AE = ("calling_ae_title", "called_ae_title", "forward_target.calling_ae_title", "max_pdu_length",
       "forward_target.max_pdu_length", "associations", "max_associations", "user_identity", "tls",
       "tls.min_version")  # fmt: skip


def ae_parameters() -> str:
    """Configurable parameters of the application entities."""
    names = (*_AE, *(name for name in OPTIONS if name.startswith("deadlines.")))
    body = []
    for name in names:
        row = OPTIONS[name]
        default = f"{row.default:g}" if isinstance(row.default, float) else row.default or "none"
        unit = f" {row.setting.unit}" if row.setting.unit and row.default is not None else ""
        body.append((code(name), f"{default}{unit}", row.setting.doc))
    return rows(("parameter", "default", ""), body)


# --- GetScu for those who come from elsewhere --------------------------------------------------------


def getscu_parameters() -> str:
    """The keyword parameters of ``GetScu`` and their defaults, in one block of code."""
    signature = inspect.signature(getscu.GetScu.__init__)
    body = [
        f"    {name}={repr(parameter.default).replace(chr(39), chr(34))},"
        for name, parameter in signature.parameters.items()
        if name not in ("self", "addr")
    ]
    head = ["```python", "from airflow_dicom_get import GetScu", "", "GetScu("]
    return "\n".join([*head, '    "PACS@10.0.0.5:104",', *body, ")", "```"]) + "\n"


# --- what is supported ---------------------------------------------------------------------------------


def tested() -> str:
    """What passed on which Airflow and Python."""
    results: dict[tuple[str, str], dict[str, str]] = {}
    for row in supported.load():
        left_out = f", {row['skipped']} left out" if row.get("skipped") else ""
        failed = f", **{row['failed']} failed**" if row.get("failed") else ""
        shown = f"{row['passed']} passed{failed}{left_out} ({row['date']})"
        results.setdefault((row["airflow"], row["python"]), {})[row["check"]] = shown
    body = [(*place, *(found.get(check, "–") for check in supported.CHECKS)) for place, found in results.items()]
    return rows(("Airflow", "Python", *supported.CHECKS.values()), body)


TABLES: dict[str, Callable[[], str]] = {
    "connections": connections,
    "configuration": configuration,
    "shell-options": shell_options,
    "operators": operators,
    "verdicts": verdicts,
    "manifest-columns": manifest_columns,
    "reasons": reasons,
    "exactness": exactness,
    "errors": error_classes,
    "transfer-syntaxes": transfer_syntaxes,
    "sop-classes": sop_classes,
    "modalities": modalities,
    "store-statuses-sent": store_statuses_sent,
    "store-statuses-received": store_statuses_received,
    "get-statuses": get_statuses,
    "find-keys": find_keys,
    "rejections": rejections,
    "ae-parameters": ae_parameters,
    "getscu-parameters": getscu_parameters,
    "tested": tested,
}


def page_with_tables(text: str) -> str:
    """The page with every table in it generated again."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{TABLES[block[2]]()}\n{block[4]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="Write nothing; fail if a page is not up to date.")
    check = parser.parse_args().check
    stale = []
    for path in sorted((ROOT / "docs").glob("*.md")):
        old = path.read_text("utf-8")
        new = page_with_tables(old)
        if new != old:
            stale.append(path)
            if not check:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'is not up to date' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
