"""Modes of C-FIND, and lists that do not agree with what C-GET sends."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, count, islice

from airflow_dicom_get.testing.misbehaving import archive, wire
from airflow_dicom_get.testing.misbehaving.archive import Instance, Row
from airflow_dicom_get.testing.misbehaving.behaviour import FIND, GET, Behaviour, Retrieval, Spoiler, mode
from airflow_dicom_get.testing.misbehaving.wire import GoneError, Message

_PENDING = 0xFF00
_AVAILABILITY = 0x00080056


class _AtFind(Behaviour):
    stages = frozenset({FIND})


def _pending(message: Message, row: Row, syntax: str) -> bytes:
    """A C-FIND-RSP with a row, to be sent as often as one likes."""
    fields: dict[int, wire.Value] = {
        wire.CLASS: message.elements.get(wire.CLASS, b""),
        wire.FIELD: wire.C_FIND | wire.RESPONSE,
        wire.RESPONDED_ID: message.number(wire.MESSAGE_ID),
        wire.DATA_SET_TYPE: wire.WITH_DATA_SET,
        wire.STATUS: _PENDING,
    }
    answer = wire.p_data(message.context, wire.COMMAND_BIT | wire.LAST_BIT, wire.command(fields))
    data = archive.encode_identifier(row, syntax)
    return answer + wire.p_data(message.context, wire.LAST_BIT, data)


def _ghost(instances: Sequence[Instance]) -> Instance:
    """An instance of the first series that is listed and not held."""
    return archive.another(instances[0], 903)


@mode("find_fails")
class FindFails(_AtFind):
    """Answers every C-FIND with the failure status ``param`` (0xC001)."""

    param = 0xC001

    def find(self, message: Message) -> None:
        self.respond(message, int(self.number))


@mode("find_silent")
class FindSilent(_AtFind):
    """Receives the C-FIND-RQ and never sends a byte again."""

    def find(self, message: Message) -> None:
        self.link.hold()


@mode("find_drops")
class FindDrops(_AtFind):
    """Closes the connection after the first row of a C-FIND."""

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        yield from islice(super().rows(level, query), 1)
        raise GoneError("dropped on purpose")


@mode("find_wrong_msgid")
class FindWrongMsgId(_AtFind):
    """Answers a C-FIND with a message ID that nobody sent."""

    def send_response(self, message: Message, fields: dict[int, wire.Value], data: bytes = b"") -> None:
        super().send_response(message, fields | {wire.RESPONDED_ID: message.number(wire.MESSAGE_ID) + 1000}, data)


@mode("find_garbage")
class FindGarbage(_AtFind):
    """Answers a C-FIND with rows of random bytes."""

    def find(self, message: Message) -> None:
        for salt in range(3):
            self.respond(message, _PENDING, archive.noise(salt)[:400])
        self.respond(message, 0x0000)


@mode("find_empty_rows")
class FindEmptyRows(_AtFind):
    """Answers a C-FIND with Pending responses that have no data set."""

    def find(self, message: Message) -> None:
        for _ in range(3):
            self.respond(message, _PENDING)
        self.respond(message, 0x0000)


@mode("find_lists_more")
class FindListsMore(_AtFind):
    """Lists one instance more than it sends."""

    def listing(self) -> Sequence[Instance]:
        held = super().listing()
        return [*held, _ghost(held)]


@mode("find_cut_at")
class FindCutAt(_AtFind):
    """Truncates every C-FIND at ``param`` rows (500) and says Success; the numbers of related instances are correct."""

    param = 500

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        return islice(iter(super().rows(level, query)), int(self.number))


@mode("nearline")
class Nearline(Behaviour):
    """Lists all instances as NEARLINE, and waits ``param`` seconds (1) before the first object of each C-GET."""

    stages = frozenset({FIND, GET})
    param = 1.0

    def describe(self, level: str, group: Sequence[Instance]) -> Row:
        return super().describe(level, group) | {_AVAILABILITY: "NEARLINE"}

    def before(self, retrieval: Retrieval) -> None:
        self.link.wait(self.number)


@mode("not_online")
class NotOnline(Spoiler):
    """Lists its last instance with the Instance Availability ``param`` (OFFLINE), and does not send it."""

    stages = frozenset({FIND, GET})
    param = "OFFLINE"

    def describe(self, level: str, group: Sequence[Instance]) -> Row:
        last = level == "IMAGE" and group[0] is self.site.instances[-1]
        return super().describe(level, group) | {_AVAILABILITY: str(self.param) if last else "ONLINE"}

    def strikes(self, retrieval: Retrieval, instance: Instance) -> bool:
        return instance is self.site.instances[-1]

    def spoil(self, retrieval: Retrieval, instance: Instance, context: int) -> None:
        retrieval.failed.append(instance.sop)


def _uncounted(row: Row) -> Row:
    return {tag: value for tag, value in row.items() if tag not in (0x00201206, 0x00201208, 0x00201209)}


class _Uncounted(_AtFind):
    """Gives no numbers of related series and instances."""

    def describe(self, level: str, group: Sequence[Instance]) -> Row:
        return _uncounted(super().describe(level, group))


@mode("find_cut_uncounted")
class FindCutUncounted(_Uncounted):
    """Cuts every C-FIND at ``param`` rows (100) and says Success, without numbers of related series and instances."""

    param = 100

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        return islice(iter(super().rows(level, query)), int(self.number))


@mode("find_cut_nothing_counted")
class FindCutNothingCounted(FindCutUncounted):
    """As ``find_cut_uncounted``, and gives no counters in a C-GET."""

    stages = frozenset({FIND, GET})

    def get_response(
        self, retrieval: Retrieval, status: int | None, counters: dict[int, wire.Value], failed: Sequence[str] = ()
    ) -> None:
        super().get_response(retrieval, status, {}, failed)


@mode("nothing_counted")
class NothingCounted(FindCutNothingCounted):
    """Gives no numbers of related series and instances, and no counters in a C-GET."""

    param = 10**9


@mode("find_no_images")
class FindNoImages(_Uncounted):
    """Lists its last series, and answers a C-FIND for the instances of it by nothing."""

    def rows(self, level: str, query: Row) -> Iterable[Row]:
        found = super().rows(level, query)
        last = self.listing()[-1].series
        return [row for row in found if level != "IMAGE" or query.get(0x0020000E) != last]


@mode("studies_cut")
class StudiesCut(_Uncounted):
    """Holds ``param`` studies (103) of one day, and cuts every C-FIND at 100 rows."""

    stages = frozenset({FIND, GET})
    param = 103

    def listing(self) -> Sequence[Instance]:
        held = self.site.instances
        return [*held, *archive.crowd(int(self.number) - 1, held[0].size)]

    def holdings(self) -> Sequence[Instance]:
        return self.listing()

    def rows(self, level: str, query: Row) -> Iterable[Row]:
        return islice(iter(super().rows(level, query)), 100)


@mode("studies_cut_alike")
class StudiesCutAlike(StudiesCut):
    """As ``studies_cut``, and all of its studies have the same time."""

    def listing(self) -> Sequence[Instance]:
        return [replace(instance, time="101112") for instance in super().listing()]


@mode("find_foreign_rows")
class FindForeignRows(_AtFind):
    """Adds two rows of a study that was not requested to the answer to every C-FIND."""

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        yield from super().rows(level, query)
        foreign = [archive.another(self.listing()[0], n, study=archive.FOREIGN_STUDY_UID) for n in (1, 2)]
        yield from archive.find(level, dict.fromkeys(query, ""), foreign, self.describe)


@mode("find_nested")
class FindNested(_AtFind):
    """Adds to every row of a C-FIND ``param`` sequences (500), each inside of the one before."""

    param = 500

    def send_response(self, message: Message, fields: dict[int, wire.Value], data: bytes = b"") -> None:
        nested = b""
        for _ in range(int(self.number) if data else 0):
            item = struct.pack("<HHI", 0xFFFE, 0xE000, len(nested)) + nested
            nested = struct.pack("<HHI", 0x0040, 0x0275, len(item)) + item
        super().send_response(message, fields, data + nested)


class _Archive(Behaviour):
    """Holds three more studies, of other patients, and sends them to whoever asks."""

    stages = frozenset({FIND, GET})

    def listing(self) -> Sequence[Instance]:
        held = self.site.instances
        return [*held, *archive.others(held[0].size)]

    def holdings(self) -> Sequence[Instance]:
        return self.listing()


_UIDS = frozenset({0x00080018, 0x0020000D, 0x0020000E})
_LEVEL = 0x00080052


@mode("find_prefix")
class FindPrefix(_Archive):
    """Holds three more studies, and matches accession numbers and patient IDs by prefix."""

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        prefixes = {t: v + "*" for t, v in query.items() if t in (0x00080050, 0x00100020) and v}
        yield from super().rows(level, query | prefixes)


@mode("find_ignores_keys")
class FindIgnoresKeys(_Archive):
    """Holds three more studies, and answers every C-FIND with everything at that level, with true values."""

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        yield from super().rows(level, dict.fromkeys(query, "") | {_LEVEL: level})


@mode("find_leaves_keys_out")
class FindLeavesKeysOut(_Archive):
    """Holds three more studies, ignores all keys but UIDs, and leaves them out of its answers."""

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        yield from super().rows(level, {t: v for t, v in query.items() if t in _UIDS or t == _LEVEL or not v})


@mode("find_empties_keys")
class FindEmptiesKeys(FindLeavesKeysOut):
    """Holds three more studies, ignores all keys but UIDs, and answers them with empty values."""

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        ignored = [tag for tag, value in query.items() if tag not in _UIDS and tag != _LEVEL and value]
        for row in super().rows(level, query):
            yield row | dict.fromkeys(ignored, "")


@mode("find_folds")
class FindFolds(_Archive):
    """Holds three more studies, and ignores case and leading zeros when it matches text."""

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        folded = {t: v.lstrip("0").upper() for t, v in query.items() if t not in _UIDS and t != _LEVEL}
        yield from super().rows(level, query | folded)


@mode("find_ignores_keys_of_many")
class FindIgnoresKeysOfMany(FindIgnoresKeys):
    """As ``find_ignores_keys``, with ``param`` more studies (1500) in place of three."""

    param = 1500

    def listing(self) -> Sequence[Instance]:
        held = self.site.instances
        return [*archive.crowd(int(self.number), held[0].size), *held]


@mode("find_hostile_studies")
class FindHostileStudies(_AtFind):
    """Adds a row to each answer for studies whose Study Instance UID is a path, and one whose UID is empty."""

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        for row in super().rows(level, query):
            yield row
            if level == "STUDY":
                yield row | {0x0020000D: "../../PWNED"}
                yield row | {0x0020000D: ""}


@mode("find_hostile_rows")
class FindHostileRows(_AtFind):
    """Adds rows of the requested study whose UIDs are paths, are empty, or contain control characters."""

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        for row in super().rows(level, query):
            yield row
            for uid in ("../../PWNED", "", "1.2\n\x1b[31mFAKELOGLINE", "1." + "2" * 98):
                if level != "STUDY":
                    yield row | {0x00080018 if level == "IMAGE" else 0x0020000E: uid}


@mode("find_duplicates")
class FindDuplicates(_AtFind):
    """Sends every row of a C-FIND twice."""

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        for row in super().rows(level, query):
            yield row
            yield row


@mode("find_row_per_instance")
class FindRowPerInstance(_AtFind):
    """Sends one row per instance at every level, as pynetdicom's qrscp does."""

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        yield from chain.from_iterable(archive.find(level, query, [i], self.describe) for i in self.listing())


@mode("find_endless")
class FindEndless(_AtFind):
    """Answers a C-FIND for instances with an endless series of new instances."""

    def rows(self, level: str, query: Row) -> Iterable[Row]:
        found = super().rows(level, query)
        return self.endless(found, query) if level == "IMAGE" else found

    def endless(self, found: Iterable[Row], query: Row) -> Iterator[Row]:
        """The found rows and then made-up ones."""
        like = self.listing()[0]
        yield from found
        for number in count(1001):
            yield from archive.find("IMAGE", query, [archive.another(like, number)], self.describe)


@mode("find_claims")
class FindClaims(_AtFind):
    """Claims 2,000,000,000 related instances, and lists new ones endlessly, as fast as it can."""

    def describe(self, level: str, group: Sequence[Instance]) -> Row:
        row = super().describe(level, group)
        return row | {tag: "2000000000" for tag in (0x00201208, 0x00201209) if tag in row}

    def find(self, message: Message) -> None:
        syntax = self.syntax_of(message.context)
        query = archive.parse_identifier(message.data, syntax)
        if query.get(_LEVEL) != "IMAGE":
            super().find(message)
            return
        row = next(iter(self.rows("IMAGE", query)), None)
        if row is None:
            super().find(message)
            return
        mark = "7" * 12
        answer = _pending(message, row | {0x00080018: f"2.25.{mark}"}, syntax)
        for number in count(0, 100):
            self.link.send(*(answer.replace(mark.encode(), b"1%011d" % (number + n)) for n in range(100)))


@mode("find_huge_rows")
class FindHugeRows(_AtFind):
    """Adds to every answer ``param`` rows (700) of 900,000 bytes."""

    param = 700

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        found = list(super().rows(level, query))
        yield from found
        for _ in range(int(self.number) if found else 0):
            yield found[0] | {0x00081030: "x" * 900_000}


@mode("find_long_texts")
class FindLongTexts(_AtFind):
    """Answers every C-FIND with texts of 3000 characters where 16 or 64 are allowed."""

    def describe(self, level: str, group: Sequence[Instance]) -> Row:
        row = super().describe(level, group)
        return row | {tag: "X" * 3000 for tag in (0x00081030, 0x00200010, 0x00080060, 0x00080054) if tag in row}


@mode("find_repeats")
class FindRepeats(_AtFind):
    """Answers a C-FIND by repeating its first row endlessly, with ``param`` seconds (0) after each."""

    param = 0.0

    def find(self, message: Message) -> None:
        syntax = self.syntax_of(message.context)
        query = archive.parse_identifier(message.data, syntax)
        row = next(iter(self.rows(query.get(0x00080052, ""), query)), {})
        answer = _pending(message, row, syntax)
        if not self.number:
            self.link.flood(answer * 64)
        while True:
            self.link.send(answer)
            self.link.wait(self.number)


@mode("no_counts")
class NoCounts(_Uncounted):
    """Leaves the numbers of related series and instances out of its C-FIND answers."""


@mode("no_classes")
class NoClasses(_AtFind):
    """Leaves the SOP classes out of its C-FIND answers, as dcmqrscp and qrscp do."""

    def describe(self, level: str, group: Sequence[Instance]) -> Row:
        row = super().describe(level, group)
        return {tag: value for tag, value in row.items() if tag not in (0x00080016, 0x00080061, 0x00080062)}


@mode("counts_lie")
class CountsLie(_AtFind):
    """Returns a number of related instances that is ``param`` (1) larger than its list."""

    param = 1

    def describe(self, level: str, group: Sequence[Instance]) -> Row:
        row = super().describe(level, group)
        for tag in (0x00201208, 0x00201209):
            if tag in row:
                row[tag] = str(int(row[tag]) + int(self.number))
        return row


class _Changes(Behaviour):
    """The study is not the same before and after a C-GET."""

    stages = frozenset({FIND, GET})

    def present(self) -> Sequence[Instance]:
        """What is there now."""
        raise NotImplementedError

    def listing(self) -> Sequence[Instance]:
        return self.present()

    def holdings(self) -> Sequence[Instance]:
        return self.present()


@mode("list_grows")
class ListGrows(_Changes):
    """Starts without its last ``param`` instances (2) and adds one of them after each C-GET."""

    param = 2

    def present(self) -> Sequence[Instance]:
        late = max(0, int(self.number) - self.site.gets)
        return self.site.instances[: len(self.site.instances) - late]


@mode("list_grows_endless")
class ListGrowsEndless(_Changes):
    """Adds a new instance to the study after each C-GET, endlessly."""

    def present(self) -> Sequence[Instance]:
        held = self.site.instances
        return [*held, *(archive.another(held[0], 2000 + n) for n in range(self.site.gets))]


@mode("list_shrinks")
class ListShrinks(_Changes):
    """Lists its last ``param`` instances (1), sends the others, and no longer lists them after the first C-GET."""

    param = 1

    def present(self) -> Sequence[Instance]:
        return self.site.instances[: -int(self.number)]

    def listing(self) -> Sequence[Instance]:
        return self.present() if self.site.gets else self.site.instances


@mode("list_forgets")
class ListForgets(_Changes):
    """Lists its last instance until the first C-GET is over, which does not bring it, and sends it when it is asked."""

    def present(self) -> Sequence[Instance]:
        return self.site.instances

    def listing(self) -> Sequence[Instance]:
        return self.site.instances[:-1] if self.site.gets else self.site.instances

    def select(self, request: Row) -> list[Instance]:
        found = super().select(request)
        return found if self.site.gets else [x for x in found if x is not self.site.instances[-1]]


@mode("one_unknown_fails_list")
class OneUnknownFailsList(Behaviour):
    """Lists one instance that it does not hold, and answers a C-GET that names an unknown UID only with C000."""

    stages = frozenset({FIND, GET})

    def listing(self) -> Sequence[Instance]:
        held = super().listing()
        return [*held, _ghost(held)]

    def select(self, request: Row) -> list[Instance]:
        known = {uid for i in self.site.instances for uid in (i.study, i.series, i.sop)}
        if not known.issuperset(archive.asked_uids(request)[1]):
            raise archive.RefusedError(0xC000)
        return super().select(request)
