"""The server over whatever gives it lines: which associations misbehave, and the conversation of each."""

from __future__ import annotations

import traceback

from airflow_dicom_get.testing.misbehaving import wire
from airflow_dicom_get.testing.misbehaving.behaviour import Behaviour, Site, Stage
from airflow_dicom_get.testing.misbehaving.link import Link
from airflow_dicom_get.testing.misbehaving.wire import GoneError


class Scp:
    """A server without its network: :meth:`serve` holds one association, and may run in several threads.

    Parameters
    ----------
    site : Site
        What all its associations share.
    ill : type of Behaviour or None
        How the ill ones behave.
    heal_after : int or None
        So many associations are ill; None for all.
    bounds : tuple
        Seconds and bytes of an ill one in place of those of its behaviour.

    Attributes
    ----------
    faults : list of str
        Tracebacks of mistakes of the server itself; always empty, one hopes.
    """

    well: type[Behaviour] = Behaviour
    """How the others behave."""

    def __init__(
        self,
        site: Site,
        ill: type[Behaviour] | None = None,
        heal_after: int | None = None,
        bounds: tuple[float | None, int | None] = (None, None),
    ) -> None:
        self.site = site
        self.faults: list[str] = []
        self._ill, self._heal_after, self._bounds = ill, heal_after, bounds

    def serve(self, link: Link) -> None:
        """Hold one association to its end. The line is the caller's to close."""
        try:
            self._converse(link)
        except GoneError:
            pass
        except Exception:
            self.faults.append(traceback.format_exc())

    def behaviour(self, link: Link, stage: Stage) -> Behaviour:
        """How the server behaves on an association at this stage."""
        ill = self._ill
        if ill is None or stage not in ill.stages:
            return self.well(link, self.site)
        with self.site.lock:
            if not link.ill:
                if self._heal_after is not None and self.site.ill_associations >= self._heal_after:
                    return self.well(link, self.site)
                self.site.ill_associations += 1
                link.ill = True
                seconds, size = self._bounds
                whole = sum(i.size for i in self.site.instances)
                link.bound(seconds or ill.max_seconds, size or ill.max_bytes + whole)
        return ill(link, self.site)

    def _converse(self, link: Link) -> None:
        kind, body = link.read_pdu()
        if kind != wire.ASSOCIATE_RQ:
            return
        request = wire.parse_associate(body)
        link.peer_max_pdu = request.max_pdu
        if not self.behaviour(link, "associate").associate(request):
            return
        while True:
            message = link.read()
            if message is None:
                self.behaviour(link, "release").release()
                return
            field = message.number(wire.FIELD)
            if field == wire.C_ECHO:
                self.well(link, self.site).echo(message)
            elif field == wire.C_FIND:
                self.behaviour(link, "find").find(message)
            elif field == wire.C_GET:
                self.behaviour(link, "get").get(message)
            elif field & wire.RESPONSE or field == wire.C_CANCEL:
                continue  # late: an answer after the final response, a cancel of what has ended
            else:
                link.send(wire.abort())
                return
