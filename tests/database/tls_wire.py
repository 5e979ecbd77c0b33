"""A port that speaks TLS in front of a PostgreSQL that does not."""

from __future__ import annotations

import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import cycle

import trustme

_SSL_REQUEST = bytes.fromhex("00000008 04d2162f")
_READY_FOR_QUERY = b"Z\0\0\0\5"


class TlsWire:
    """Carries bytes between a TCP port and a PostgreSQL's unix socket, encrypted on the client's side.

    A reply of the server leaves whole and in one piece, so that the client finds several records at a time: of each
    of `sizes` by turns, or of what TLS has room for in one, 16 KB. Nobody gets in without TLS.
    """

    def __init__(self, server: str, authority: trustme.CA, sizes: Sequence[int]) -> None:
        self._server, self._sizes = server, sizes
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(self._context)
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._cuts_past: int | None = None
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._start(self._accept)

    def cut_within_reply(self, longer_than: int) -> None:
        """Leave everybody in the midst of the next reply that has more bytes than this."""
        self._cuts_past = longer_than

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        self._leave_all()
        for thread in self._threads[1:]:
            thread.join()
        for one in self._sockets:
            one.close()

    def _start(self, work: Callable[..., None], *arguments: socket.socket) -> None:
        thread = threading.Thread(target=work, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                self._sockets += client, server
                server.connect(self._server)
                self._start(self._carry, client, server)

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):  # as an SSLError is
            if client.recv(8, socket.MSG_WAITALL) == _SSL_REQUEST:
                client.sendall(b"S")
                self._carry_encrypted(_Tls(self._context, client), server)
        _leave(client)
        _leave(server)

    def _carry_encrypted(self, tls: _Tls, server: socket.socket) -> None:
        reply = b""
        server.sendall(tls.take())  # what came along with the end of the handshake
        while True:
            ready, _, _ = select.select([tls.client, server], [], [])
            if tls.client in ready:
                tls.receive()
                server.sendall(tls.take())
            if server in ready:
                some = server.recv(2**20)
                reply += some
                if not some or reply[-6:-1] == _READY_FOR_QUERY:
                    self._answer(tls, reply)
                    reply = b""
                if not some:
                    return

    def _answer(self, tls: _Tls, reply: bytes) -> None:
        records = tls.records(reply, self._sizes)
        if not self._is_to_be_cut(reply):
            tls.client.sendall(records)
            return
        tls.client.sendall(records[: len(records) // 2])
        self._leave_all()

    def _is_to_be_cut(self, reply: bytes) -> bool:
        with self._lock:
            if self._cuts_past is None or len(reply) <= self._cuts_past:
                return False
            self._cuts_past = None
            self.cuts += 1
            return True

    def _leave_all(self) -> None:
        for one in list(self._sockets):
            _leave(one)


class _Tls:
    """The server's end of TLS, on a socket that blocks."""

    def __init__(self, context: ssl.SSLContext, client: socket.socket) -> None:
        self.client = client
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        while not self._shake_hands():
            self.receive()

    def receive(self) -> None:
        """Wait for something from the client."""
        some = self.client.recv(2**16)
        if not some:
            raise ConnectionResetError("the client has left")
        self._incoming.write(some)

    def take(self) -> bytes:
        """Return what has come in whole records, maybe nothing."""
        return b"".join(self._parts())

    def records(self, text: bytes, sizes: Sequence[int]) -> bytes:
        """Return `text` as it travels, in records of `sizes` by turns."""
        start, turns = 0, cycle(sizes)
        while start < len(text):
            start += self._tls.write(text[start : start + next(turns)])
        return self._outgoing.read()

    def _shake_hands(self) -> bool:
        """Go on as far as what has come lets; say whether that was the end of it."""
        is_done = False
        with suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()
            is_done = True
        self.client.sendall(self._outgoing.read())
        return is_done

    def _parts(self) -> Iterator[bytes]:
        with suppress(ssl.SSLWantReadError):
            while some := self._tls.read(2**16):
                yield some


def _leave(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
