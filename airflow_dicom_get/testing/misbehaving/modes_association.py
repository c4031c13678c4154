"""Modes that act when an association begins or ends."""

from __future__ import annotations

import struct

from airflow_dicom_get.testing.misbehaving import wire
from airflow_dicom_get.testing.misbehaving.archive import Instance
from airflow_dicom_get.testing.misbehaving.behaviour import ASSOCIATE, GET, RELEASE, Behaviour, mode
from airflow_dicom_get.testing.misbehaving.wire import Answer, AssociateRequest, GoneError, Role

_ZEROS = bytes(1 << 16)


class _AtAssociate(Behaviour):
    stages = frozenset({ASSOCIATE})


@mode("connect_close")
class ConnectClose(_AtAssociate):
    """Reads the A-ASSOCIATE-RQ and closes the connection without answering."""

    def associate(self, request: AssociateRequest) -> bool:
        return False


@mode("assoc_silent")
class AssocSilent(_AtAssociate):
    """Reads the A-ASSOCIATE-RQ and never answers it."""

    def associate(self, request: AssociateRequest) -> bool:
        self.link.hold()
        return False


@mode("assoc_trickle")
class AssocTrickle(_AtAssociate):
    """Sends the A-ASSOCIATE-AC one byte at a time, with ``param`` seconds (0.5) after each."""

    param = 0.5

    def answer(self, accept: bytes) -> None:
        self.link.drip(accept, self.number)


@mode("assoc_abort")
class AssocAbort(_AtAssociate):
    """Answers the A-ASSOCIATE-RQ with an A-ABORT."""

    def associate(self, request: AssociateRequest) -> bool:
        self.link.send(wire.abort())
        return False


@mode("ac_huge")
class AcHuge(_AtAssociate):
    """Announces an A-ASSOCIATE-AC of 4 GiB less one byte and sends zeros for it."""

    def answer(self, accept: bytes) -> None:
        self.link.send(struct.pack(">BBI", wire.ASSOCIATE_AC, 0, 0xFFFFFFFF))
        self.link.flood(_ZEROS)


@mode("ac_trunc")
class AcTrunc(_AtAssociate):
    """Sends an A-ASSOCIATE-AC whose items are cut off in the middle, in a PDU of the right length."""

    def answer(self, accept: bytes) -> None:
        body = accept[6:]
        self.link.send(wire.pdu(wire.ASSOCIATE_AC, body[: 68 + (len(body) - 68) * 2 // 3 | 1]))


@mode("ac_not_dicom")
class AcNotDicom(_AtAssociate):
    """Answers the A-ASSOCIATE-RQ as a web server would, and closes the connection."""

    def associate(self, request: AssociateRequest) -> bool:
        self.link.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        return False


@mode("ac_unknown_ctx")
class AcUnknownCtx(_AtAssociate):
    """Accepts storage contexts with IDs that were never proposed, and sends every object on them."""

    def negotiate(self, request: AssociateRequest) -> list[Answer]:
        proposed = {p.id for p in request.proposals}
        free = (i for i in range(255, 0, -2) if i not in proposed)
        answers = super().negotiate(request)
        return [a._replace(id=next(free, 254)) if a.abstract in self.storage_classes() else a for a in answers]

    def storage_classes(self) -> set[str]:
        """The storage classes of the archive."""
        return {i.sop_class for i in self.site.instances}


@mode("ac_other_ts")
class AcOtherTs(_AtAssociate):
    """Accepts each storage context with a transfer syntax that was not proposed in it, and sends on it."""

    def answers_sent(self, request: AssociateRequest) -> list[Answer]:
        return [self.other(a, request) for a in self.link.answers]

    def other(self, answer: Answer, request: AssociateRequest) -> Answer:
        """The answer with a syntax that its context does not list."""
        offered = next(p.syntaxes for p in request.proposals if p.id == answer.id)
        if answer.result or answer.abstract not in {i.sop_class for i in self.site.instances}:
            return answer
        wrong = wire.JPEG_2000 if wire.JPEG_2000 not in offered else wire.EXPLICIT_BE
        return answer._replace(syntaxes=(wrong,))


@mode("ac_two_ts")
class AcTwoTs(AcOtherTs):
    """Accepts each storage context with two transfer syntaxes at once, and sends on it."""

    def other(self, answer: Answer, request: AssociateRequest) -> Answer:
        changed = super().other(answer, request)
        return answer if changed is answer else answer._replace(syntaxes=answer.syntaxes + changed.syntaxes)


@mode("ac_small_pdu")
class AcSmallPdu(_AtAssociate):
    """Announces a maximum PDU length of 128 bytes; otherwise behaves correctly."""

    max_pdu = 128


@mode("ac_unlimited_pdu")
class AcUnlimitedPdu(_AtAssociate):
    """Announces a maximum PDU length of 0, which means no limit; otherwise behaves correctly."""

    max_pdu = 0


@mode("ac_hostile_text")
class AcHostileText(_AtAssociate):
    """Puts a patient's name, a line break and an escape into its implementation version name; otherwise correct."""

    version = b"HOSTILE\n\x1b[31mX"


@mode("norole")
class NoRole(Behaviour):
    """Answers no role selection item, but sends the objects anyway, as some archives do."""

    stages = frozenset({ASSOCIATE, GET})

    def roles(self, request: AssociateRequest) -> list[Role]:
        return []

    def context_for(self, instance: Instance) -> int | None:
        self.link.scp_classes |= {instance.sop_class}
        return super().context_for(instance)


@mode("role_refused")
class RoleRefused(_AtAssociate):
    """Rejects the SCP role for every class, so that every sub-operation fails: A702."""

    def roles(self, request: AssociateRequest) -> list[Role]:
        return [role._replace(scp=0) for role in request.roles]


@mode("wrong_called_ae")
class WrongCalledAe(_AtAssociate):
    """Rejects the association: called AE title not recognised, permanent (1/1/7)."""

    codes = (1, 1, 7)

    def associate(self, request: AssociateRequest) -> bool:
        self.link.send(wire.reject(*self.codes))
        return False


@mode("reject_local_limit")
class RejectLocalLimit(WrongCalledAe):
    """Rejects the association: local limit exceeded, transient (2/3/2)."""

    codes = (2, 3, 2)


@mode("reject_once_then_ok")
class RejectOnce(WrongCalledAe):
    """Rejects the first association for temporary congestion (2/3/1) and accepts later ones."""

    codes = (2, 3, 1)
    heal_after = 1


@mode("no_find")
class NoFind(_AtAssociate):
    """Rejects the C-FIND contexts; C-GET works."""

    refused_classes = wire.FIND


@mode("no_get")
class NoGet(_AtAssociate):
    """Rejects the C-GET contexts; C-FIND works."""

    refused_classes = wire.GET


@mode("no_storage")
class NoStorage(_AtAssociate):
    """Rejects every storage context; accepts C-FIND and C-GET."""

    def negotiate(self, request: AssociateRequest) -> list[Answer]:
        services = wire.FIND | wire.GET | {wire.VERIFICATION}
        return [a if a.abstract in services else a._replace(result=3) for a in super().negotiate(request)]


@mode("no_release_rp")
class NoReleaseRp(Behaviour):
    """Never answers an A-RELEASE-RQ and keeps the connection open."""

    stages = frozenset({RELEASE})

    def release(self) -> None:
        self.link.hold()


@mode("release_collision")
class ReleaseCollision(Behaviour):
    """Answers an A-RELEASE-RQ with an A-RELEASE-RQ, then waits for the response."""

    stages = frozenset({RELEASE})

    def release(self) -> None:
        self.link.send(wire.pdu(wire.RELEASE_RQ, bytes(4)))
        kind, _ = self.link.read_pdu()
        if kind != wire.RELEASE_RP:
            raise GoneError("the client did not answer the release")
        self.link.send(wire.pdu(wire.RELEASE_RP, bytes(4)))
