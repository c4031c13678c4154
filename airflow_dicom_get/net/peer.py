"""A node as it is called: its address, the titles, TLS, and how an association with it is opened."""

from __future__ import annotations

import dataclasses
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.config.groups import MAX_PDU_LENGTH
from airflow_dicom_get.config.node import Node
from airflow_dicom_get.errors import AssociationAborted, Cancelled, ConnectFailed, DeadlineExceeded, DicomGetError
from airflow_dicom_get.net import transport
from airflow_dicom_get.net.acse import Proposal, encode_request
from airflow_dicom_get.net.association import Association, CancelToken, Remarks
from airflow_dicom_get.net.tls import tls_context, tls_error
from airflow_dicom_get.net.transcript import Transcript, transcript_of

if TYPE_CHECKING:
    from airflow_dicom_get.config.groups import Deadlines, ForwardTarget, UserIdentity
    from airflow_dicom_get.config.options import ConnectionOptions
    from airflow_dicom_get.net.transport import Transport


@dataclass(frozen=True, slots=True)
class Peer:
    """A node, and all that is needed to open an association with it."""

    node: Node
    calling: str
    called: str
    deadlines: Deadlines
    max_pdu_length: int = MAX_PDU_LENGTH
    tls: ssl.SSLContext | None = None
    server_name: str | None = None
    tls_option: str = "tls"
    """What the options of its TLS are called, for messages."""
    user_identity: UserIdentity | None = None
    transcript: Transcript | None = None
    """Is told what is said with the node."""
    remarks: Remarks = field(default_factory=Remarks, compare=False, repr=False)
    """What was said of the node."""

    @classmethod
    def of(cls, node: Node, options: ConnectionOptions) -> Peer:
        """The node, called as the options say.

        Raises
        ------
        InvalidOption
            The files of ``tls`` cannot be used.
        """
        return cls(
            node,
            options.calling_ae_title,
            node.ae_title or options.called_ae_title,
            options.deadlines,
            max_pdu_length=options.max_pdu_length,
            tls=tls_context(options.tls) if options.tls else None,
            server_name=options.tls.server_name if options.tls else None,
            user_identity=options.user_identity,
            transcript=transcript_of(options.transcript),
        )

    @classmethod
    def of_target(cls, node: Node, target: ForwardTarget, options: ConnectionOptions) -> Peer:
        """The node that is forwarded to, called as ``forward_target`` says, with the deadlines of the options.

        Raises as :meth:`of`.
        """
        return cls(
            node,
            target.calling_ae_title,
            node.ae_title or target.called_ae_title or "ANY-SCP",
            options.deadlines,
            max_pdu_length=target.max_pdu_length,
            tls=tls_context(target.tls, "forward_target.tls") if target.tls else None,
            server_name=target.tls.server_name if target.tls else None,
            tls_option="forward_target.tls",
            transcript=transcript_of(options.transcript),
        )

    def of_run(self) -> Peer:
        """The same node for one run, in which nothing was said of it yet."""
        return dataclasses.replace(self, remarks=Remarks())

    def __str__(self) -> str:
        return str(dataclasses.replace(self.node, ae_title=self.called))

    def open(
        self, proposals: Sequence[Proposal], cancel: CancelToken, storage_classes: Sequence[str] = ()
    ) -> Association:
        """Connect and negotiate.

        Parameters
        ----------
        proposals : sequence of Proposal
            Presentation contexts.
        cancel : CancelToken
            Ends the waits of the association.
        storage_classes : sequence of str
            SOP classes for which we are the SCP.

        Raises
        ------
        ConnectFailed, AssociationRejected, AssociationAborted, DeadlineExceeded, PeerProtocolError
        """
        facts: dict[str, Any] = {
            "storage_classes": storage_classes,
            "max_pdu_length": self.max_pdu_length,
            "user_identity": self.user_identity,
        }
        request = encode_request(self.calling, self.called, proposals, **facts)
        told = self.transcript.begin() if self.transcript is not None else None
        if told is not None:
            told.connecting(f"{self.node.host}:{self.node.port}", tls=self.tls is not None)
        try:
            line = _connect(self, cancel)
        except DicomGetError as error:
            if told is not None:
                told.not_connected(error)
            raise
        association = Association(line, self.node, self.max_pdu_length, self.deadlines, cancel)
        association.remarks = self.remarks
        if told is not None:
            association.told = told
            told.requested(self.calling, self.called, proposals, **facts)
        try:
            association.negotiate(request, proposals, f"calling {self.calling}, called {self.called}")
        except AssociationAborted as lost:
            association.abort()
            if self.tls is None or "source" in lost.facts:
                raise
            # In TLS 1.3 a peer looks at our certificate only after our side of the handshake has ended.
            cause = lost.__cause__ if isinstance(lost.__cause__, OSError) else EOFError()
            raise tls_error(self.node, cause, self.tls_option) from lost
        except BaseException:
            association.abort()
            raise
        return association


def _connect(peer: Peer, cancel: CancelToken) -> Transport:
    node, seconds = peer.node, peer.deadlines.connect

    def ended() -> bool:
        return cancel.reason is not None

    try:
        return transport.connect(node.host, node.port, seconds, peer.tls, peer.server_name, ended)
    except (transport.HandshakeError, TimeoutError) as failure:
        if ended():
            raise Cancelled(f"Cancelled: {cancel.reason}.", node=str(node)) from None
        what, hint = "answer", "Check the host, the port and the firewall."
        if isinstance(failure, transport.HandshakeError):
            what, hint = "finish the TLS handshake", "Check that this port speaks TLS."
            error = failure.__cause__
            if not isinstance(error, TimeoutError):
                cause = error if isinstance(error, OSError) else failure
                raise tls_error(node, cause, peer.tls_option, agreed=failure.agreed) from error
        raise DeadlineExceeded(
            f"{node} did not {what} within {seconds:g} s.",
            hint=hint,
            node=str(node),
            phase="connect",
            seconds=seconds,
        ) from None
    except OSError as error:
        raise ConnectFailed(
            f"No connection to {node}: {error.strerror or error}.",
            hint="Check the host and the port, and that the node is running.",
            node=str(node),
        ) from error
