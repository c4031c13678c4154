"""The words of results and manifests: verdicts, evidence, states, exactness, reasons.

Each word stands here once, with all that is said of it: its text for people, what to do about it, its
exit status, whether it may pass. Groups of words stand here too; nothing else makes one of its own.
A leaf module: it imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

# --- numbers ---------------------------------------------------------------------------------------


def noun(number: float, one: str, many: str = "") -> str:
    """The noun that fits a number: ``one`` for 1, else ``many``, by default ``one`` with an *s*."""
    return one if number == 1 else many or f"{one}s"


# --- verdicts --------------------------------------------------------------------------------------

Verdict = Literal["complete", "partial", "unverified", "empty", "failed", "cancelled"]

COMPLETE: Final = "complete"
PARTIAL: Final = "partial"
UNVERIFIED: Final = "unverified"
EMPTY: Final = "empty"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"

VERDICTS: Mapping[Verdict, str] = {
    COMPLETE: "all that the PACS lists is held and verified, and two lists in a row agree",
    FAILED: "nothing of the scope is held",
    PARTIAL: "some of the scope is held, some is not; `reason` says why",
    UNVERIFIED: "all that was sent is held, but no list of the PACS proves that it is all",
    EMPTY: "the query matched nothing",
    CANCELLED: "stopped by a signal or by `cancel()`",
}
"""What each verdict means, of a retrieval."""

STORE_VERDICTS: Mapping[Verdict, str] = {
    COMPLETE: "every instance that was to be stored is at the target",
    FAILED: "no instance is at the target",
    PARTIAL: "some instances are at the target, some are not; `reason` says why",
    UNVERIFIED: "every instance was sent; it is not certain that the target has them",
    EMPTY: "there was nothing to store",
    CANCELLED: VERDICTS[CANCELLED],
}
"""What each verdict means of a ``store``."""

VERIFY_VERDICTS: Mapping[Verdict, str] = {
    COMPLETE: "all that was compared is the same",
    FAILED: "nothing could be compared",
    PARTIAL: "there are differences",
    UNVERIFIED: "no difference was found, but not everything could be compared",
    EMPTY: "there was nothing to compare",
    CANCELLED: VERDICTS[CANCELLED],
}
"""What each verdict means of a ``verify``."""

WORST_FIRST: tuple[Verdict, ...] = (FAILED, CANCELLED, PARTIAL, UNVERIFIED, EMPTY, COMPLETE)

NOTHING_TO_MEND: frozenset[Verdict] = frozenset({COMPLETE, EMPTY})
"""Verdicts after which nobody has to look."""

MAY_PASS: frozenset[Verdict] = frozenset({PARTIAL, UNVERIFIED, FAILED, CANCELLED})
"""Verdicts that another run may better, where what they rest on is transient."""

ACCEPTABLE: tuple[Verdict, ...] = tuple(verdict for verdict in reversed(WORST_FIRST) if verdict != CANCELLED)
"""Verdicts that a user may take for a success."""

EXIT_CODES: Mapping[Verdict, int] = {COMPLETE: 0, FAILED: 1, PARTIAL: 3, UNVERIFIED: 4, EMPTY: 5, CANCELLED: 130}
"""Exit status of the shell by verdict. Bad usage or input is 2."""

_SIGTERM_EXIT = 143


def exit_code(verdict: Verdict, reason: str | None = None) -> int:
    """Exit status of the shell for a verdict; one that SIGTERM cancelled has its own."""
    return _SIGTERM_EXIT if verdict == CANCELLED and reason == "SIGTERM" else EXIT_CODES[verdict]


def accepted(whole: Verdict, parts: Iterable[Verdict], accept: Collection[str]) -> bool:
    """Whether a verdict may be taken for a success: the worst of several hides others that are not accepted."""
    return whole in accept and all(part in accept for part in parts if part != COMPLETE)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of some verdicts; ``empty`` of none."""
    return min(verdicts, key=WORST_FIRST.index, default=EMPTY)


# --- evidence --------------------------------------------------------------------------------------

Evidence = Literal["list+counts", "list", "none"]

EVIDENCE: Mapping[Evidence, str] = {
    "none": "the PACS gave no list",
    "list": "the PACS listed every instance",
    "list+counts": "the PACS listed every instance, and its counts agree with the list",
}
"""What a verdict rests on, the weakest first."""


def weakest(evidence: Iterable[Evidence]) -> Evidence:
    """The weakest of some evidence; ``none`` of none."""
    return min(evidence, key=tuple(EVIDENCE).index, default="none")


# --- states of an instance ---------------------------------------------------------------------------

State = Literal["stored", "forwarded", "held", "failed", "missing", "withdrawn", "unexpected", "conflict"]

STATES: Mapping[State, str] = {
    "stored": "written to the destination by this run",
    "forwarded": "stored at the other node by this run",
    "held": "at the destination before this run, and verified",
    "failed": "it was sent, but is not at the destination",
    "missing": "it is listed, but was not received",
    "withdrawn": "it was listed before, and no longer is",
    "unexpected": "it was sent and stored, but is not listed",
    "conflict": "the destination holds a different data set under its UIDs",
}

FETCHED: frozenset[State] = frozenset({"stored", "forwarded"})
"""Came in this run and is at the destination."""
HELD: frozenset[State] = FETCHED | {"held"}
"""Listed, and at the destination."""
NOT_HELD: frozenset[State] = frozenset({"failed", "missing", "conflict"})
"""Listed, and not at the destination as the source has it."""
TRIED_IN_VAIN: frozenset[State] = frozenset({"failed", "missing"})
"""Asked for, and may be asked for again."""
OUTSIDE_LIST: frozenset[State] = frozenset({"withdrawn", "unexpected"})
"""Not in the last list: reported, and no part of the scope."""
DONE: frozenset[State] = HELD | OUTSIDE_LIST | {"conflict"}
"""Not to be asked for again in this run."""
PRESENT: frozenset[State] = HELD | {"unexpected"}
"""There is an object of it at the destination."""
READABLE: frozenset[State] = PRESENT - {"forwarded"}
"""There is an object of it that can be read back."""
RECEIVED: frozenset[State] = FETCHED | {"unexpected"}
"""Bytes of it came in this run and were kept."""

# --- exactness -----------------------------------------------------------------------------------------

Exactness = Literal["as_listed", "as_received", "peer_choice", "converted"]

EXACTNESS: Mapping[Exactness, str] = {
    "as_listed": "received in the transfer syntax that the PACS lists for it",
    "as_received": "received compressed, or from a PACS known not to convert; the PACS lists no transfer syntax",
    "peer_choice": "received uncompressed, in an encoding that the PACS chose and may have converted to",
    "converted": "the PACS converted it: its transfer syntax is not the listed one, or its header says so",
}

MAYBE_CONVERTED: frozenset[Exactness] = frozenset({"peer_choice", "converted"})
"""What ``require_exact`` refuses."""

# --- reasons -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reason:
    """What a reason says, and what follows from it.

    Attributes
    ----------
    text : str
        What happened, of an instance or of a retrieval.
    advice : str
        What to do about it.
    transient : bool
        Whether running again can help.
    of : str
        ``row``: of an instance and, where it is the most frequent one, of the result; ``result``: of a whole
        retrieval alone; ``error``: of a retrieval that such an error ended.
    local : bool
        Decided here or at the destination, or said by the source beforehand: asking it in another way changes nothing.
    remark : bool
        Said of an instance that is held all the same.
    fatal : bool
        The instance took its association with it: it is not asked for in the first way again.
    """

    text: str
    advice: str = ""
    transient: bool = False
    of: Literal["row", "result", "error"] = "row"
    local: bool = False
    fatal: bool = False
    remark: bool = False


REASONS: Mapping[str, Reason] = {
    # The source
    "not_sent": Reason(
        "The PACS lists it, but did not send it on request, and reported no failure.",
        "Run again. If that does not help, ask the PACS admin whether the instance can be read there.",
        transient=True,
    ),
    "refused_by_source": Reason(
        "The PACS refuses the request even for this instance alone, or refuses C-GET altogether.",
        "Ask the PACS admin: often the file behind the entry is missing or damaged.",
    ),
    "class_refused": Reason(
        "The PACS accepted no presentation context for its SOP class.",
        "Ask the PACS admin to enable the SOP class for our AE title, with us in the SCP role.",
    ),
    "syntax_refused": Reason(
        "None of the transfer syntaxes offered fits, or `require_exact` refused an encoding that the PACS chose.",
        "Allow more `transfer_syntaxes`, or do not set `require_exact`.",
    ),
    "sub_operation_failed": Reason(
        "The PACS reported a failed sub-operation for it.",
        "If the error names the transfer syntax in which the PACS stores the instance, let the PACS accept that syntax "
        "from our AE title (dcmqrscp: an association profile, option -xf), and run again. Otherwise its log says why.",
        transient=True,
    ),
    "offline": Reason(
        "The PACS lists it as OFFLINE, and did not send it on request.",
        "Ask the PACS admin to bring it online, then run again.",
        local=True,
    ),
    "unavailable": Reason(
        "The PACS lists it as UNAVAILABLE, and did not send it on request.",
        "Ask the PACS admin which node holds it.",
        local=True,
    ),
    "association_lost": Reason(
        "The association ended before it was received, also on retries.",
        "Run again. If it is always the same instance, the PACS fails on it: ask the PACS admin.",
        transient=True,
        fatal=True,
    ),
    "deadline": Reason(
        "A deadline passed before it was received; the error names it.",
        "Run again; raise that deadline if the PACS needs longer.",
        transient=True,
        fatal=True,
    ),
    # What was sent and refused here
    "uid_mismatch": Reason(
        "Command, presentation context, data set and list name different instances or SOP classes.",
        "Ask the PACS admin: it may rewrite UIDs when it sends, or its index may be wrong.",
        local=True,
    ),
    "not_asked": Reason(
        "It was sent, but is outside the scope of the request. It was not stored.",
        "Nothing is missing. The PACS ignores keys of the request.",
    ),
    "foreign_study": Reason(
        "It was sent, but belongs to another study. It was not stored.",
        "Tell the PACS admin: its index mixes up studies.",
    ),
    "unparsable": Reason(
        "The header of its data set cannot be read in the transfer syntax in which it was sent.",
        "Ask the PACS admin to look at the file.",
        local=True,
    ),
    "empty_dataset": Reason("It was sent without a data set.", "Ask the PACS admin to look at the file.", local=True),
    "too_large": Reason(
        "It had not ended after 16 GiB or 6 hours, the most that is received of one instance. Nothing of it is kept.",
        "Ask the PACS admin to look at the file: it may have no end. A larger one has to be copied by other means.",
        local=True,
    ),
    "bad_uid": Reason(
        "One of its UIDs is malformed and cannot be used in a file name.",
        "It can only be corrected at the PACS.",
        local=True,
    ),
    # The destination
    "outside_root": Reason(
        "The manifest names it by a malformed UID, or by an address outside its own destination. It was not opened.",
        "If the place is right, name it as `root`. Otherwise find out who wrote the manifest.",
        local=True,
    ),
    "size_changed": Reason(
        "The object at the destination no longer has the recorded size or digest.",
        "Run again to fetch it again, and find out what else writes there.",
        transient=True,
    ),
    "unreadable": Reason(
        "The object at the destination cannot be read.",
        "Run again to fetch it again, and find out what became of the disk or the permissions there.",
        transient=True,
        local=True,
    ),
    "different_content": Reason(
        "A different data set is already stored under its UIDs. It was kept.",
        "Compare the two. To take what the PACS sends, move the stored one away and run again, or run once with "
        "`on_conflict` set to `replace` and without `resume`.",
        local=True,
    ),
    "replaced": Reason(
        "A different data set was stored under its UIDs. It was replaced, as `on_conflict` says.",
        "None needed.",
        remark=True,
    ),
    "destination_refused": Reason(
        "The node to store it at refused it.",
        "See `forward_error`. Nothing is converted: ask the admin of that node to accept its SOP class and transfer "
        "syntax.",
        local=True,
    ),
    "destination_full": Reason(
        "The destination is full.",
        "Free space and run again: what is held is not fetched again.",
        transient=True,
        local=True,
    ),
    "destination_error": Reason(
        "The destination failed to store it.",
        "See the error. Check permissions, mount, network and credentials of the destination, or the log of that node.",
        transient=True,
        local=True,
    ),
    # What ended the run
    "window": Reason(
        "The window in which the PACS may be used has closed.",
        "Run again when it opens; `resume_at` says when.",
        transient=True,
    ),
    "cancelled": Reason("The retrieval was cancelled before it was received.", "Run again.", transient=True),
    "strict_forward": Reason(
        "`strict_forward` stopped at an instance that the destination refused.",
        "Correct what the `forward_error` of that instance says, and run again.",
        transient=True,
    ),
    # Beside the list
    "gone_from_list": Reason(
        "The PACS listed it before, and no longer does. If it is held, it stays.",
        "None needed where it is `withdrawn`: studies are corrected, and instances are rejected or moved. Where it is "
        "`missing`, a manifest asks for it: ask the PACS admin what became of it, or retrieve the study by its UID.",
    ),
    "not_listed": Reason(
        "It was sent, but the PACS does not list it. It is stored.",
        "None needed, unless the verdict is `unverified`: then the list of the PACS may be truncated.",
    ),
    # Beside an instance that is held
    "truncated_dataset": Reason(
        "An element of its data set runs past the end or cannot be read, or it inflates without measure. It is stored "
        "as the PACS sent it.",
        "Ask the PACS admin to look at the file, which may be damaged there. Fetching it again brings the same bytes.",
        remark=True,
    ),
    "other_patient_id": Reason(
        "Its Patient ID is not the one that was asked for. It is stored as the PACS sent it.",
        "Ask the PACS admin whether the patients were merged. If they were not, the PACS mixes them up.",
        remark=True,
    ),
    # Of a whole retrieval
    "other_transfer_syntax": Reason(
        "It was sent again in another transfer syntax. The first is kept; the two were not compared.",
        "None needed where the PACS converts. If it holds both, ask its admin why.",
        remark=True,
    ),
    "still_growing": Reason(
        "The list of the PACS was still changing after the last round.", "Run again later.", transient=True, of="result"
    ),
    "no_list": Reason("The PACS gives no list of instances.", "Compare with the PACS by other means.", of="result"),
    "list_contradicted": Reason(
        "The PACS contradicts its own list.", "Compare with the PACS by other means.", of="result"
    ),
    "list_may_be_cut": Reason(
        "The list of the PACS has just as many rows as a PACS may cut it at, and nothing shows that it is whole.",
        "Set `list_limit` to 0 if the PACS never cuts its lists. If it does, narrow the query, or ask the PACS admin "
        "to raise that limit.",
        of="result",
    ),
    "list_not_repeated": Reason(
        "The second list could not be obtained.",
        "Run again: what is held is not fetched again.",
        transient=True,
        of="result",
    ),
    "not_found": Reason(
        "The PACS does not have something that is named: a study of a list, or a series or instance of the query.",
        "Check these accession numbers or UIDs. Everything else was retrieved.",
        of="result",
    ),
    "key_not_matched": Reason(
        "All rows of the PACS contradict the query: it writes a value in another way, or returned other studies.",
        "The errors name the key. Give its value as the PACS writes it, or use another key.",
        of="result",
    ),
    "unusable_files": Reason(
        "Some files are not DICOM instances that can be stored.", "Leave these files out, or correct them.", of="result"
    ),
    "nothing_asked": Reason(
        "There was nothing to retrieve or to store.",
        "Look at the result of the retrieval that wrote the manifest.",
        of="result",
    ),
    # Errors that ended it
    "connect_failed": Reason("No connection to the node could be made.", transient=True, of="error"),
    "tls_failed": Reason("No TLS session could be made.", of="error"),
    "association_rejected": Reason("The node rejected the association.", of="error"),
    "not_negotiated": Reason("The node does not offer the service.", of="error"),
    "get_not_offered": Reason("The PACS does not offer C-GET.", of="error"),
    "not_authorised": Reason("The PACS does not authorise our AE title.", of="error"),
    "peer_protocol_error": Reason("The node broke the protocol.", transient=True, of="error"),
    "too_much": Reason("The PACS sent more than the limit allows.", of="error"),
    "operation_failed": Reason("The PACS answered a request with a failure.", of="error"),
    "ledger_error": Reason("The ledger cannot be read.", of="error"),
    "invalid_query": Reason("The query is not valid.", of="error"),
    "invalid_option": Reason("An option is not valid.", of="error"),
    "manifest_error": Reason("The manifest cannot be read.", of="error"),
    "incomplete": Reason("The retrieval is not complete.", transient=True, of="error"),
    "error": Reason("Something unexpected happened.", of="error"),
}
"""The closed vocabulary of ``Result.reason``; those ``of`` rows are that of the manifest's column ``reason``."""

AVAILABILITIES: frozenset[str] = frozenset({"ONLINE", "NEARLINE", "OFFLINE", "UNAVAILABLE"})
"""What Instance Availability may say (PS3.3 C.4.23.1.1); any other text says nothing, and may be of a patient."""
NOT_AVAILABLE: Mapping[str, str] = {"OFFLINE": "offline", "UNAVAILABLE": "unavailable"}
"""Why an instance did not come that the source lists with this Instance Availability."""
NOT_BROUGHT: frozenset[str] = frozenset({"not_sent", "sub_operation_failed", "refused_by_source", "deadline"})
"""Reasons of instances that the source was asked for and did not bring: what it said of them beforehand tells why."""
DID_NOT_COME: frozenset[str] = frozenset({"not_sent", "sub_operation_failed", "refused_by_source"})
"""Reasons of instances for which the source ended a request without sending them."""

LOCAL_REASONS: frozenset[str] = frozenset(word for word, reason in REASONS.items() if reason.local)
"""Reasons that asking in another way does not change."""
REMARKS: frozenset[str] = frozenset(word for word, reason in REASONS.items() if reason.remark)
"""Reasons of instances that are held, and of which something is to be said: they count as warnings."""
FATAL_REASONS: frozenset[str] = frozenset(word for word, reason in REASONS.items() if reason.fatal)
"""Reasons of an instance that was asked for alone and took the association with it."""
SOURCE_REFUSED: frozenset[str] = frozenset({"class_refused", "refused_by_source"})
"""Reasons that asking one by one does not change."""
NOT_THE_DESTINATIONS: frozenset[str] = frozenset({"different_content", "cancelled", "deadline"})
"""Reasons of instances that were not kept, and that say nothing of the destination's health."""
NOT_OF_THE_QUERY: frozenset[str] = frozenset({"foreign_study", "not_asked"})
"""Reasons of what was sent, could be read, and is not meant by the query."""
NOT_COMPARED: frozenset[str] = frozenset({"destination_error", "destination_full", "deadline", "cancelled"})
"""Reasons of instances that a folder or a bucket could not take, nor compare with what is there."""
CONTENT_IN_DOUBT: frozenset[str] = frozenset({"size_changed", "unreadable", "different_content"})
"""Reasons of instances of which another object than the recorded one may lie at the destination."""
STOPS: frozenset[str] = frozenset({"window", "strict_forward", "destination_error", "destination_full"})
"""Reasons for which a run is ended in order, and which the instances not tried then have."""

STRAYS: Mapping[str, str] = {
    "foreign_study": "an object of another study was sent and refused",
    "not_asked": "an object outside what was asked for was sent and refused",
    "bad_uid": "an object with an invalid UID was sent and refused",
    "uid_mismatch": "an object whose data set contradicts its command was sent and refused",
    "unparsable": "an object whose data set cannot be read was sent and refused",
    "empty_dataset": "an object without a data set was sent and refused",
    "too_large": "an object without end was sent and given up",
}
"""What is said of objects that were refused and belong to no row of the manifest."""


def is_transient(reason: str | None) -> bool:
    """Whether an instance that is not held for this reason may be had by running again; without one it may."""
    return REASONS[reason].transient if reason is not None else True


def advice(reason: str | None) -> str:
    """What to do about a reason; empty for one of none, or of a word that is not ours (the name of a signal)."""
    known = REASONS.get(reason) if reason is not None else None
    return known.advice if known is not None else ""
