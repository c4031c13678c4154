"""A server that accepts connections and says nothing."""

from __future__ import annotations

import socket
import threading
from typing import Self


class SilentPacs:
    """On a loopback port; ``most`` is how many connections it held at once."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.open = self.most = 0
        self._mutex = threading.Lock()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._hold, args=(connection,), daemon=True).start()

    def _hold(self, connection: socket.socket) -> None:
        with self._mutex:
            self.open += 1
            self.most = max(self.most, self.open)
        with connection:
            while connection.recv(65536):
                pass
        with self._mutex:
            self.open -= 1
