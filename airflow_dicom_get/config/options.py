"""The options: groups that verbs share, and one class for each verb that is made of them.

Each option is declared once, as a field of a group, with its type, default, unit, check and one sentence.
From these rows come the checks of the Python parameters (:meth:`Options.check`), the flags of the shell
(``config.shell``), the extra fields of the Airflow connection and the keys of the config file
(``config.connection``), and the table of the documentation (``config.reference``).
"""
# ruff: noqa: RUF009 - setting() makes dataclass fields, as dataclasses.field() does.

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, tzinfo
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, dataclass_transform

from airflow_dicom_get.config.checks import (
    AETitle,
    Bytes,
    Check,
    Choice,
    Flag,
    Group,
    Integer,
    Parsed,
    Setting,
    Text,
    invalid,
    reworded,
    setting,
    shown,
    shown_path,
)
from airflow_dicom_get.config.destination import (
    Destination,
    FilesystemDestination,
    ForwardDestination,
    S3Destination,
    check_folder,
    check_own,
    parse_destination,
)
from airflow_dicom_get.config.groups import (
    MAX_PDU_LENGTH,
    NODE,
    OPTIONAL_NODE,
    Deadlines,
    ForwardTarget,
    S3Config,
    Tls,
    UserIdentity,
    Window,
    parse_timezone,
)
from airflow_dicom_get.config.node import Node
from airflow_dicom_get.dicom.dictionary import Attribute, UnknownAttributeError, find_attribute
from airflow_dicom_get.dicom.uids import is_uid
from airflow_dicom_get.errors import InvalidOption
from airflow_dicom_get.vocabulary import ACCEPTABLE, Verdict


def _items(option: str, value: Any) -> list[str]:
    """A list of words: any iterable of texts, or one text with commas."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, Iterable) or isinstance(parts, Mapping | bytes):
        raise invalid(option, f"{shown(value)} is not a list", "Give a list of strings.")
    words = [part.strip() if isinstance(part, str) else part for part in parts]
    for word in words:
        if not isinstance(word, str) or not word:
            raise invalid(option, f"{shown(word)} cannot be an entry of a list", "Give a list of strings.")
    return list(dict.fromkeys(words))


def _parse_uids(option: str, value: Any) -> tuple[str, ...]:
    """UIDs, each given as such or by its keyword of PS3.6, as in CTImageStorage."""
    uids = []
    for word in _items(option, value):
        if not is_uid(word):
            from pydicom._uid_dict import UID_dictionary

            found = [uid for uid, entry in UID_dictionary.items() if entry[4] == word]
            if not found:
                raise invalid(
                    option,
                    f"{shown(word)} is neither a UID nor a UID keyword",
                    "Give 1 to 64 digits and dots, or a keyword.",
                )
            word = found[0]
        uids.append(word)
    if not uids:
        raise invalid(option, "is an empty list", "Leave the option out to allow all.")
    return tuple(uids)


def _parse_list_limit(option: str, value: Any) -> tuple[int, ...] | None:
    """The numbers of rows at which a PACS may cut its answers; none for 0: it never does."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    numbers = []
    for word in _items(option, [str(x) for x in value] if isinstance(value, list | tuple) else value):
        if not word.isascii() or not word.isdigit() or int(word) > _MOST_ROWS:
            raise invalid(option, f"{shown(word)} is not a number of rows", "Give 0, or numbers such as 100,1000.")
        numbers.append(int(word))
    if not numbers or (0 in numbers and len(numbers) > 1):
        what = "names 0, which is never, beside other numbers" if numbers else "is an empty list"
        raise invalid(option, what, "Give 0 alone for never, or the numbers alone.")
    return () if numbers == [0] else tuple(numbers)


_MOST_ROWS = 1_000_000

_NOT_TEXT = frozenset({"SQ", "OB", "OW", "OF", "OD", "OL", "OV", "OB or OW", "UN", "NONE"})


def parse_keywords(option: str, value: Any) -> tuple[str, ...]:
    """Keywords of attributes, each given as such or as a tag; one alone need not be a list."""
    return tuple(dict.fromkeys(attribute.keyword for _, attribute in _attributes(option, value)))


def _attributes(option: str, value: Any) -> Iterator[tuple[str, Attribute]]:
    # The comma in (gggg,eeee) separates nothing.
    for word in _items(option, re.split(r",(?![^(]*\))", value) if isinstance(value, str) else value):
        try:
            yield word, find_attribute(word)
        except UnknownAttributeError as error:
            raise invalid(option, f"{shown(word)} {error.what}", error.hint) from None


def _parse_tags(option: str, value: Any) -> tuple[str, ...]:
    """Keywords of the attributes that become columns of the manifest."""
    keywords = []
    for word, attribute in _attributes(option, value):
        if attribute.vr in _NOT_TEXT or attribute.group in (0x0000, 0x0002):
            raise invalid(option, f"{shown(word)} has no text value in the data set", "Leave it out.")
        keywords.append(attribute.keyword)
    return tuple(dict.fromkeys(keywords))


def _parse_place(option: str, value: Any) -> Destination:
    return parse_destination(value, option)


def _parse_out_dir(option: str, value: Any) -> Destination:
    place = parse_destination(value, option)
    if not isinstance(place, FilesystemDestination):
        raise invalid(option, f"{shown(str(place))} is not a folder", "Give it as the destination.")
    return place


def _parse_file(option: str, value: Any) -> Path:
    if not isinstance(value, str | Path) or not str(value).strip() or not str(value).isprintable():
        raise invalid(option, f"{shown(value)} is not a valid name of a file", "Give a path.")
    return Path(value)


def _parse_transcript(option: str, value: Any) -> Any:
    """A file, or in Python a :class:`~airflow_dicom_get.net.transcript.Transcript`."""
    return value if callable(getattr(value, "begin", None)) else _parse_file(option, value)


def _parse_root(option: str, value: Any) -> Destination:
    root = parse_destination(value, option)
    if isinstance(root, ForwardDestination):
        raise invalid(option, "a DICOM node cannot hold manifests", "Give a folder.")
    return root


def check_acceptable(option: str, words: Iterable[Any]) -> None:
    """Refuse what is no verdict that may be accepted. Raises :class:`InvalidOption`."""
    for word in words:
        if word not in ACCEPTABLE:
            raise invalid(option, f"{shown(word)} is not allowed", f"Give some of {', '.join(ACCEPTABLE)}.")


def _parse_verdicts(option: str, value: Any) -> tuple[Verdict, ...]:
    words = _items(option, value)
    check_acceptable(option, words)
    return tuple(verdict for verdict in ACCEPTABLE if verdict in words)


def _parse_columns(option: str, value: Any) -> tuple[str, ...]:
    return tuple(_items(option, value))


def _parse_url(option: str, value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"https?://[!-~]+", value):
        raise invalid(option, f"{shown(value)} is not an address", "Give one that begins with https://.")
    return value


Backend = Literal["Filesystem", "S3", "Forward"]


T = TypeVar("T")
Spelling = Callable[[str], str]
"""How the caller writes the name of an option; used in messages."""


@dataclass_transform(frozen_default=True, kw_only_default=True, eq_default=False)
def option_group(cls: type[T]) -> type[T]:
    """A class that nobody makes objects of by itself: spared what makes, compares and shows them, for a quick start."""
    return dataclass(frozen=True, kw_only=True, init=False, eq=False, repr=False)(cls)


@option_group
class Options:
    """Base of the groups of options, and of the options of a verb, which are made of groups.

    Made by :meth:`check`, changed by :func:`dataclasses.replace`, and passed on whole: who needs some of the
    options asks for the group that has them.
    """

    title: ClassVar[str] = ""
    """What the group is about, as ``--help`` has it."""

    @classmethod
    def check(cls, values: Mapping[str, Any], spelling: Spelling = str) -> Self:
        """Check all options, alone and against each other, before any traffic.

        Parameters
        ----------
        values : mapping
            Options by name; what is left out takes its default.
        spelling : callable
            Turns the name of an option into what the user typed, for the messages.

        Raises
        ------
        InvalidOption
            An option is not known, malformed, missing, or contradicts another.
        """
        rows: dict[str, Setting] = {item.name: item.metadata["setting"] for item in dataclasses.fields(cls)}
        for name in values:
            if name not in rows:
                raise _unknown(name, rows)
        given = dict.fromkeys(_required(cls)) | dict(values)
        checked: dict[str, Any] = {}
        for name, value in given.items():
            try:
                checked[name] = rows[name].check(spelling(name), value)
            except InvalidOption as error:
                raise _respelled(error, spelling) from None
        return cls(**checked).agreed(spelling)

    @classmethod
    def of_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        """Check the options among the arguments of a function, its ``locals()`` where it begins.

        ``None`` for a group of settings that has defaults of its own, as ``deadlines``, is these.
        """
        made = {item.name for item in dataclasses.fields(cls) if item.default_factory is not dataclasses.MISSING}
        own = cls.own(arguments)
        return cls.check({name: value for name, value in own.items() if value is not None or name not in made})

    @classmethod
    def own(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Of some values by name, those that are options of this class."""
        names = {item.name for item in dataclasses.fields(cls)}
        return {name: value for name, value in values.items() if name in names}

    def values(self, group: type[Options]) -> dict[str, Any]:
        """The options of one group, by name."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(group)}

    def agreed(self, spelling: Spelling) -> Self:
        """Hold the options against each other; each group adds what it knows of its own.

        Raises
        ------
        InvalidOption
            Two of them contradict each other, or one names a file or folder that cannot be used.
        """
        return self


def _required(cls: type[Options]) -> list[str]:
    missing = dataclasses.MISSING
    return [x.name for x in dataclasses.fields(cls) if x.default is missing and x.default_factory is missing]


# --- groups ----------------------------------------------------------------------------------------


@option_group
class ConnectionOptions(Options):
    """How a node is called: titles, TLS, deadlines."""

    title = "connection"

    calling_ae_title: str = setting(
        "GET-SCU",
        AETitle(),
        "Our AE title.",
        shell=("--calling-ae", "--calling-ae-title"),
        metavar="AE",
        connection="calling_ae_title",
    )
    called_ae_title: str = setting(
        "ANY-SCP",
        AETitle(),
        "AE title of the source; one in its address takes precedence.",
        shell=("--called-ae", "--called-ae-title"),
        metavar="AE",
    )
    max_pdu_length: int = setting(
        MAX_PDU_LENGTH,
        Integer(4096, 4194304),
        "Largest P-DATA PDU to accept.",
        unit="bytes",
        shell=("--max-pdu", "--max-pdu-length"),
        connection="max_pdu_length",
    )
    verbose: bool = setting(False, Flag(), "Log every instance and message.", shell=("--verbose",))
    tls: Tls | None = setting(
        None, Group(Tls, optional=True), "TLS for the source.", shell=("--tls",), connection="use_tls"
    )
    user_identity: UserIdentity | None = setting(
        None, Group(UserIdentity, optional=True), "User identity for the source."
    )
    transcript: Any = setting(
        None,
        Parsed(_parse_transcript, "a file", optional=True),
        "File to append what is said with nodes to, a JSON object a line, without patient data.",
        shell=("--transcript",),
        metavar="FILE",
    )
    deadlines: Deadlines = setting(Deadlines, Group(Deadlines), "Deadlines of each kind of wait.")

    def agreed(self, spelling: Spelling) -> Self:
        """See :meth:`Options.agreed`."""
        _check_tls_files(self.tls, "tls", spelling)
        if isinstance(self.transcript, Path):
            if self.transcript.is_dir():
                raise invalid(spelling("transcript"), f"{shown_path(self.transcript)} is a folder", "Give a file.")
            check_folder(self.transcript.parent, spelling("transcript"))
            check_own(self.transcript, spelling("transcript"))
        return super().agreed(spelling)


@option_group
class NodeOptions(ConnectionOptions):
    """A node, and how it is called."""

    addr: Node = setting(dataclasses.MISSING, NODE, "Address of the source, [AE@]host:port.")

    @property
    def called(self) -> str:
        """The AE title to call: the one in the address, else the separate option."""
        return self.addr.ae_title or self.called_ae_title


@option_group
class AdmissionOptions(Options):
    """What a node admits."""

    title = "limits of the node"

    max_associations: int = setting(
        2,
        Integer(1, 64),
        "Number of parallel associations that the source allows, for all tasks together.",
        shell=("--max-associations",),
        connection="max_associations",
    )


@option_group
class LimitOptions(AdmissionOptions):
    """What the admin of a source asks of its guests."""

    title = "limits of the source"

    bytes_per_second: int | None = setting(
        None,
        Bytes(1000, optional=True),
        "Most bytes per second that a run takes from the source, over all its associations.",
        unit="bytes/s",
        shell=("--rate", "--bytes-per-second"),
        metavar="RATE",
        connection="bytes_per_second",
    )
    window: Window | None = setting(
        None,
        Parsed(Window.parse, "a time window such as 22:00-06:00", optional=True),
        "Hours in which the source may be used, such as 22:00-06:00.",
        shell=("--window",),
        metavar="HH:MM-HH:MM",
        connection="window",
    )


@option_group
class ListOptions(Options):
    """What is known of the lists of a source."""

    title = "limits of the source"

    list_limit: tuple[int, ...] | None = setting(
        None,
        Parsed(_parse_list_limit, "0, or numbers such as 100,1000", optional=True),
        "Rows at which the source cuts its C-FIND answers; 0: never. Default: not known, so round numbers.",
        shell=("--list-limit",),
        metavar="N,…",
        connection="list_limit",
    )


@option_group
class ScopeOptions(ListOptions):
    """What a query may mean."""

    title = "query"

    timezone: tzinfo = setting(
        UTC,
        Parsed(parse_timezone, "an IANA time zone name"),
        "Time zone of the window and of relative dates.",
        shell=("--timezone",),
        metavar="NAME",
        connection="timezone",
    )
    max_studies: int = setting(
        100,
        Integer(1),
        "Most studies that a query may match; a query that matches more is refused.",
        shell=("--max-studies",),
    )


@option_group
class ModelOptions(Options):
    """What belongs to a query, and in Python to the call that makes it."""

    title = "query"

    query_model: Literal["StudyRoot", "PatientRoot"] = setting(
        "StudyRoot",
        Choice("StudyRoot", "PatientRoot"),
        "Query/retrieve information model.",
        shell=("--model", "--query-model"),
        connection="query_model",
    )


@option_group
class BucketOptions(Options):
    """How buckets are reached."""

    title = "buckets"

    s3_config: S3Config | None = setting(
        None, Group(S3Config, optional=True), "Bucket for the instances, and how to reach it."
    )

    def agreed(self, spelling: Spelling) -> Self:
        """See :meth:`Options.agreed`."""
        if self.s3_config is not None:
            _check_file(self.s3_config.ca_bundle, spelling("s3_config.ca_bundle"))
        return super().agreed(spelling)


@option_group
class RootOptions(BucketOptions):
    """Where manifests and ledgers lie."""

    title = "manifests"

    manifest_root: FilesystemDestination | S3Destination | None = setting(
        None,
        Parsed(_parse_root, "a folder, or s3://bucket/prefix", optional=True),
        "Folder or prefix for manifests and ledgers. Default: _manifests in the destination.",
        shell=("--state", "--manifest-root"),
        metavar="DIR",
    )

    def agreed(self, spelling: Spelling) -> Self:
        """See :meth:`Options.agreed`."""
        if isinstance(self.manifest_root, FilesystemDestination):
            check_folder(self.manifest_root.path, spelling("manifest_root"))
        elif self.manifest_root is not None:
            _check_names_no_connection(self.manifest_root, spelling("manifest_root"))
        return super().agreed(spelling)


@option_group
class PlaceOptions(RootOptions):
    """Where instances are, or go to."""

    title = "destination"

    destination: Destination | None = setting(
        None,
        Parsed(_parse_place, "a path, s3://bucket/prefix or dicom://[AE@]host:port", optional=True),
        "Where the instances go: a path, s3://bucket/prefix or dicom://[AE@]host:port.",
        shell=("--to", "--destination"),
        metavar="DEST",
    )
    forward_target: ForwardTarget | None = setting(
        None, Group(ForwardTarget, optional=True), "Node to forward every instance to."
    )

    def agreed(self, spelling: Spelling) -> Self:
        """See :meth:`Options.agreed`."""
        if self.destination is not None:
            _check_names_no_connection(self.destination, spelling("destination"))
        if self.forward_target is not None:
            if not isinstance(self.destination, ForwardDestination):
                raise invalid(spelling("forward_target"), "needs a DICOM node as destination", "Leave it out.")
            _check_tls_files(self.forward_target.tls, "forward_target.tls", spelling)
        return super().agreed(spelling)


@option_group
class HeldOptions(Options):
    """What counts as held, and by which proof."""

    title = "what is held"

    resume: bool = setting(
        True,
        Flag(),
        "Skip what is already held and verified.",
        off=("--no-resume",),
        off_doc="Fetch everything again, also what is held.",
    )
    verify_held: Literal["size", "digest"] = setting(
        "size", Choice("size", "digest"), "How to verify an instance that is held.", shell=("--verify-held",)
    )
    checksum: Literal["sha256"] | None = setting(
        "sha256",
        Choice("sha256", optional=True),
        "Digest to compute of each object as it is received.",
        shell=("--checksum",),
    )

    def agreed(self, spelling: Spelling) -> Self:
        """See :meth:`Options.agreed`."""
        if self.verify_held == "digest" and self.checksum is None:
            raise invalid(
                spelling("verify_held"),
                f"digest needs a checksum, but {spelling('checksum')} is none",
                f"Set {spelling('checksum')} to sha256, or verify by size.",
            )
        return super().agreed(spelling)


@dataclass(frozen=True, kw_only=True)
class WritingOptions(NodeOptions, HeldOptions):
    """How instances are written to a folder or a bucket."""

    title = "writing"

    store_with_file_meta: bool = setting(
        True,
        Flag(),
        "Write DICOM files with preamble and file meta information, rather than bare data sets.",
        off=("--no-file-meta", "--no-store-with-file-meta"),
        off_doc="Write bare data sets, without preamble and file meta information.",
    )
    on_conflict: Literal["keep", "replace"] = setting(
        "keep",
        Choice("keep", "replace"),
        "Whether a different, whole instance at the destination is kept or replaced.",
        shell=("--on-conflict",),
    )
    adopt: bool = setting(
        False, Flag(), "Adopt files under their final names that no ledger knows.", shell=("--adopt",)
    )
    durable: bool = setting(
        True,
        Flag(),
        "Confirm an instance only when it is synced to disk.",
        off=("--no-durable",),
        off_doc="Do not sync to disk: a power cut may lose confirmed instances.",
    )
    ack: Literal["taken", "durable"] = setting(
        "taken",
        Choice("taken", "durable"),
        "When to acknowledge an instance to the source: when it is taken, or when it is durable.",
        shell=("--ack",),
    )

    def agreed(self, spelling: Spelling) -> Self:
        """See :meth:`Options.agreed`."""
        if self.ack == "durable" and not self.durable:
            raise invalid(
                spelling("ack"),
                f"durable waits for the sync that {spelling('durable')} switches off",
                "Omit one of the two.",
            )
        if self.adopt and not self.resume:
            raise invalid(
                spelling("adopt"),
                f"takes files as held, and {spelling('resume')} says that nothing held is skipped",
                "Omit one of the two.",
            )
        return super().agreed(spelling)


@option_group
class TrustOptions(Options):
    """What counts as held at a node."""

    title = "storing at a node"

    trust_destination: bool = setting(
        False,
        Flag(),
        "Count as held what the target lists, even if no record shows that we sent it.",
        shell=("--trust-destination",),
    )


@dataclass(frozen=True, kw_only=True)
class ForwardingOptions(NodeOptions, HeldOptions, TrustOptions):
    """How instances are stored at another node."""

    title = "storing at a node"

    strict_forward: bool = setting(
        False,
        Flag(),
        "Stop at the first instance that the target refuses.",
        shell=("--strict-forward",),
    )


# --- verbs -----------------------------------------------------------------------------------------


@option_group
class EchoOptions(NodeOptions, AdmissionOptions):
    """The options of ``echo``."""


@option_group
class FindOptions(NodeOptions, ScopeOptions, ModelOptions):
    """The options of ``find``."""


@option_group
class TransferOptions(ForwardingOptions, AdmissionOptions, RootOptions):
    """What ``get`` and ``store`` have in common."""

    title = "transfer"

    associations: int = setting(1, Integer(1, 64), "Number of parallel associations to use.", shell=("--associations",))
    retries: int = setting(
        5, Integer(0, 100), "Retries in a row without progress after a transient failure.", shell=("--retries",)
    )

    def agreed(self, spelling: Spelling) -> Self:
        """See :meth:`Options.agreed`."""
        if self.associations > self.max_associations:
            most = spelling("max_associations")
            raise invalid(
                spelling("associations"),
                f"{self.associations} is more than {most}, which is {self.max_associations}",
                f"Lower it, or raise {most} if the source allows more.",
            )
        return super().agreed(spelling)


@dataclass(frozen=True, kw_only=True)
class StoreOptions(TransferOptions):
    """The options of :class:`~airflow_dicom_get.store.StoreScu`."""


@dataclass(frozen=True, kw_only=True)
class GetOptions(TransferOptions, WritingOptions, PlaceOptions, LimitOptions, ScopeOptions):
    """The options of :class:`~airflow_dicom_get.GetScu`."""

    title = "retrieval"

    profile: Path | None = setting(
        None,
        Parsed(_parse_file, "a file", optional=True),
        "What is known of the source beforehand: a file that echo --study wrote.",
        shell=("--profile",),
        metavar="FILE",
    )
    storage_backend: Backend = setting(
        "Filesystem", Choice("Filesystem", "S3", "Forward"), "Kind of destination (long form)."
    )
    out_dir: FilesystemDestination | None = setting(
        None, Parsed(_parse_out_dir, "a folder", optional=True), "Folder for the instances (long form)."
    )
    require_exact: bool = setting(
        False, Flag(), "Refuse instances that the source may have converted.", shell=("--require-exact",)
    )
    tags: tuple[str, ...] = setting(
        (),
        Parsed(_parse_tags, "a list of DICOM keywords"),
        "Attributes to add as columns of the manifest.",
        shell=("--tags", "--tag"),
        repeat=True,
        metavar="KEYWORD",
    )
    transfer_syntaxes: tuple[str, ...] | None = setting(
        None,
        Parsed(_parse_uids, "a list of UIDs", optional=True),
        "Transfer syntaxes to accept. Default: all.",
        shell=("--transfer-syntaxes",),
        repeat=True,
        metavar="UID",
    )
    sop_classes: tuple[str, ...] | None = setting(
        None,
        Parsed(_parse_uids, "a list of UIDs", optional=True),
        "SOP classes to fetch. Default: all.",
        shell=("--sop-classes",),
        repeat=True,
        metavar="UID",
    )

    def agreed(self, spelling: Spelling) -> Self:
        """See :meth:`Options.agreed`: the short form and the long forms of the destination become one, too."""
        _check_file(self.profile, spelling("profile"))
        destination = _destination(self, spelling)
        made = self if destination is self.destination else dataclasses.replace(self, destination=destination)
        return super(GetOptions, made).agreed(spelling)


@dataclass(frozen=True, kw_only=True)
class CallOptions(GetOptions, ModelOptions):
    """The options of a client and of its calls together, as the shell and a connection give them."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(ConnectionOptions, PlaceOptions, TrustOptions, ModelOptions, ListOptions):
    """The options of :func:`~airflow_dicom_get.verify.verify`."""

    addr: Node | None = setting(None, OPTIONAL_NODE, "Address of a PACS to compare with, [AE@]host:port.")

    def agreed(self, spelling: Spelling) -> Self:
        """See :meth:`Options.agreed`."""
        if not isinstance(self.destination, ForwardDestination):
            _check_for_no_node(self, ("trust_destination",), spelling)
        return super().agreed(spelling)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(BucketOptions):
    """The options of :func:`~airflow_dicom_get.exports.verb.export`."""

    title = "export"

    name: str | None = setting(
        None, Text(optional=True), "Name of the data set, for croissant.", shell=("--name",), metavar="TEXT"
    )
    licence: str | None = setting(
        None,
        Parsed(_parse_url, "an address that begins with https://", optional=True),
        "Address of its licence, for croissant.",
        shell=("--licence", "--license"),
        metavar="URL",
    )
    citation: str | None = setting(
        None, Text(optional=True), "How to cite it, for croissant.", shell=("--citation",), metavar="TEXT"
    )
    description: str | None = setting(
        None, Text(optional=True), "What it is, for croissant.", shell=("--description",), metavar="TEXT"
    )
    mapping: Path | None = setting(
        None,
        Parsed(_parse_file, "a CSV file", optional=True),
        "Persons, procedures and dates of the studies, for omop.",
        shell=("--mapping",),
        metavar="CSV",
    )
    accept: tuple[Verdict, ...] = setting(
        (),
        Parsed(_parse_verdicts, f"a list of {', '.join(ACCEPTABLE)}"),
        "Verdicts besides complete that may be exported; what is missing is then said in the export.",
        shell=("--accept",),
        repeat=True,
        metavar="VERDICT",
    )
    columns: tuple[str, ...] = setting(
        (),
        Parsed(_parse_columns, "a list of columns"),
        "Columns of tags in the manifest to take along, for series and croissant; they may name patients.",
        shell=("--columns", "--column"),
        repeat=True,
        metavar="NAME",
    )


# --- the table -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Option:
    """A row of the table. Parts of a group carry the group's name: ``deadlines.connect``."""

    name: str
    default: Any
    setting: Setting

    @property
    def check(self) -> Check:
        return self.setting.check

    @property
    def part_of(self) -> str | None:
        group, dot, _ = self.name.rpartition(".")
        return group if dot else None

    @property
    def default_text(self) -> str:
        """The default as help and documentation show it; empty where there is none to show."""
        default = self.default
        if default is None or default == () or self.name == "addr":
            return ""
        if isinstance(default, bool):
            return "true" if default else ""
        return f"{default:g}" if isinstance(default, float) else str(default)


GROUPS: tuple[type[Options], ...] = (
    ModelOptions, ScopeOptions, PlaceOptions, RootOptions, BucketOptions, HeldOptions, WritingOptions,
    ForwardingOptions, TrustOptions, GetOptions, TransferOptions, AdmissionOptions, LimitOptions, ListOptions,
    NodeOptions, ConnectionOptions, ExportOptions,
)  # fmt: skip
"""The classes that declare options, in the order of ``--help`` and the documentation."""


def declared(group: type[Options]) -> Iterable[Option]:
    """The rows of the options that a group declares itself, each followed by its parts."""
    for item in dataclasses.fields(group):
        if item.name in group.__annotations__:
            default = None if item.default is dataclasses.MISSING else item.default
            yield from _with_parts(Option(item.name, default, item.metadata["setting"]))


def _with_parts(row: Option) -> Iterable[Option]:
    """A row, followed by those of its parts if it is a group."""
    yield row
    for item in dataclasses.fields(row.check.cls) if isinstance(row.check, Group) else ():
        setting = item.metadata["setting"]
        if row.part_of is not None:  # TLS of a node other than the source
            shell, off = (
                tuple(flag.replace("--tls", row.setting.shell[0], 1) for flag in flags)
                for flags in (setting.shell, setting.off)
            )
            setting = dataclasses.replace(setting, shell=shell, off=off, connection=None)
        yield from _with_parts(Option(f"{row.name}.{item.name}", item.default, setting))


OPTIONS: Mapping[str, Option] = {row.name: row for group in GROUPS for row in declared(group)}
"""The table: every option by its name, in the order of the documentation."""


_PART_NAME = re.compile(r"\b(?:s3_config|forward_target|tls|user_identity|deadlines)\.(?:tls\.)?\w+")


def _respelled(error: InvalidOption, spelling: Spelling) -> InvalidOption:
    """Write the parts of a group, which the group names as Python does, as the user typed them."""

    return reworded(error, lambda text: _PART_NAME.sub(lambda match: spelling(match[0]), text))


def _unknown(name: str, names: Iterable[str]) -> InvalidOption:
    from difflib import get_close_matches

    close = get_close_matches(name, list(names), n=1)
    return invalid(name[:64], "is not an option", f"Did you mean {close[0]}?" if close else "See the table of options.")


def _destination(options: GetOptions, spelling: Spelling) -> Destination | None:
    """Bring the short form and the three long forms down to one destination."""
    destination, out_dir = options.destination, options.out_dir
    backend, s3, target = options.storage_backend, options.s3_config, options.forward_target
    kind = _KINDS[type(destination)] if destination is not None else backend
    if destination is not None:
        if out_dir is not None:
            raise invalid(
                spelling("out_dir"), f"is given together with {spelling('destination')}", "Give one of the two."
            )
        if backend not in (kind, "Filesystem"):
            raise invalid(
                spelling("storage_backend"),
                f"{backend} does not fit {spelling('destination')} {destination}",
                "Give one of the two.",
            )
        named = s3 is not None and (s3.bucket is not None or s3.prefix is not None)
        if named or (target is not None and target.addr is not None):
            group = "s3_config" if s3 is not None else "forward_target"
            raise invalid(
                spelling(group), f"names a destination in addition to {spelling('destination')}", "Give one of the two."
            )
    reaches_root = isinstance(options.manifest_root, S3Destination) and s3 is not None and s3.bucket is None
    for group, value, its_kind in (
        ("out_dir", out_dir, "Filesystem"),
        ("s3_config", None if reaches_root else s3, "S3"),
        ("forward_target", target, "Forward"),
    ):
        if value is not None and its_kind != kind:
            raise invalid(
                spelling(group),
                f"does not fit a destination of kind {kind}",
                f"Leave it out, or give {spelling('storage_backend')} {its_kind}.",
            )
    if destination is not None:
        form = "destination"
    elif kind == "S3":
        form = "s3_config"
        if s3 is None or s3.bucket is None:
            raise invalid(spelling(form), "names no bucket", "Give s3_config={'bucket': …}.")
        destination = S3Destination(s3.bucket, s3.prefix or "")
    elif kind == "Forward":
        form = "forward_target"
        if target is None or target.addr is None:
            raise invalid(spelling(form), "names no address", "Give forward_target={'addr': …}.")
        destination = ForwardDestination(target.addr)
    else:
        form = "out_dir"
        destination = out_dir
    _check_destination(options, destination, spelling, form)
    return destination


_KINDS: Mapping[type[Any], Backend] = {
    FilesystemDestination: "Filesystem",
    S3Destination: "S3",
    ForwardDestination: "Forward",
}


def _check_destination(options: GetOptions, destination: Destination | None, spelling: Spelling, form: str) -> None:
    """What fits this destination; ``form`` is the option that names it."""
    if isinstance(destination, FilesystemDestination):
        check_folder(destination.path, spelling(form))
    elif destination is not None:
        _check_names_no_connection(destination, spelling(form))
    if isinstance(destination, ForwardDestination):
        assert destination.node is not None
        if options.addr.endpoint == destination.node.endpoint:
            raise invalid(spelling(form), f"{destination} is the source", "Give another node.")
        for name, given in (
            ("adopt", options.adopt),
            ("on_conflict", options.on_conflict == "replace"),
            ("store_with_file_meta", not options.store_with_file_meta),
        ):
            if given:
                raise invalid(spelling(name), "has no effect for a DICOM node as destination", "Leave it out.")
        return
    _check_for_no_node(options, ("strict_forward", "trust_destination"), spelling)


def _check_for_no_node(options: Options, names: Iterable[str], spelling: Spelling) -> None:
    """Refuse what only a node as destination heeds."""
    for name in names:
        if getattr(options, name):
            raise invalid(spelling(name), "needs a DICOM node as destination", "Leave it out.")


def _check_names_no_connection(place: Destination, option: str) -> None:
    if isinstance(place, FilesystemDestination) or place.conn_id is None:
        return
    form = "s3://bucket/prefix" if isinstance(place, S3Destination) else "dicom://[AE@]host:port"
    raise invalid(option, f"{place} names a connection of Airflow", f"Write {form}.")


def _check_file(path: str | Path | None, option: str) -> None:
    if path is not None and not (os.path.isfile(path) and os.access(path, os.R_OK)):
        raise invalid(option, f"{shown_path(path)} is not a readable file", "Check the path.")


def _check_tls_files(tls: Tls | None, option: str, spelling: Spelling) -> None:
    for part in ("ca", "cert", "key") if tls is not None else ():
        _check_file(getattr(tls, part), spelling(f"{option}.{part}"))


def nested(flat: Mapping[str, Any], spelling: Spelling = str) -> dict[str, Any]:
    """Turn options by their names in the table into the values that :meth:`Options.check` takes.

    TLS is a switch here. Whatever of it differs from its default is refused without the switch: whoever asks for
    TLS must not end up on a plain line.

    Raises
    ------
    InvalidOption
        TLS is set up, and not switched on.
    """
    on: dict[str, Any] = {
        name: {} for name in _SWITCHES if flat.get(name) is not None and Flag().check(spelling(name), flat[name])
    }
    values: dict[str, Any] = {}
    for name, value in (*on.items(), *(item for item in flat.items() if item[0] not in _SWITCHES)):
        *groups, part = name.split(".")
        switch = ".".join(groups)
        if switch in _SWITCHES and switch not in on:
            if OPTIONS[name].check(spelling(name), value) != OPTIONS[name].default:
                raise invalid(
                    spelling(name),
                    f"is given without {spelling(switch)}",
                    f"Switch TLS on with {spelling(switch)}, or leave it out.",
                )
            continue
        place = values
        for group in groups:
            place = place.setdefault(group, {})
        place[part] = value
    return values


_SWITCHES = ("tls", "forward_target.tls")
"""Groups that the shell and a connection switch on; in Python whoever gives one has switched it on."""
