"""A TCP relay on loopback whose wire can be cut, mended and slowed."""

from __future__ import annotations

import contextlib
import socket
import threading
import time


class Wire:
    """Relays to `target` (host, port). `rate`: bytes a second each way of each connection; 0 for no
    limit.
    """

    def __init__(self, target: tuple[str, int], rate: float = 0.0) -> None:
        self.rate = rate
        self.cut = False
        self.carried = 0
        self._target = target
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def sever(self) -> None:
        """Cut: every connection breaks and no new one is relayed."""
        self.cut = True
        for one in list(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.sever()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.cut:
                near.close()
                continue
            try:
                far = socket.create_connection(self._target, timeout=5)
                far.settimeout(None)
            except OSError:
                near.close()
                continue
            self._open |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._relay, args=(source, sink), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 14):
                if self.rate:
                    time.sleep(len(data) / self.rate)
                sink.sendall(data)
                self.carried += len(data)
        for one in (source, sink):
            self._open.discard(one)
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
                one.close()
