"""Channel: messages over a connected socket, neither end of which ever waits for the other to read.

A message is its kind and its length, then its payload. What the socket does not take at once is
kept and sent later, so two processes that both have much to say cannot stop each other.
"""

import select
import socket
import struct
from collections import deque

_HEADER = struct.Struct("<II")  # kind, bytes of payload
_READ_BYTES = 1 << 18
_BUFFER_BYTES = 4 << 20  # asked of the kernel, each way; it may give less

Message = tuple[int, bytes]  # kind, payload


class Channel:
    """One end of a stream socket, which it takes over."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._socket.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self._socket.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        self._unsent: deque[memoryview] = deque()
        self._received = bytearray()
        self.is_closed = False  # by the other end

    def fileno(self) -> int:
        """The socket's, to poll; negative after `close`."""
        return self._socket.fileno()

    def send(self, kind: int, payload: bytes) -> None:
        """Queue a message; `flush` and `wait` send it."""
        self._unsent.append(memoryview(_HEADER.pack(kind, len(payload)) + payload))

    def flush(self) -> None:
        """Send what the socket takes."""
        try:
            while self._unsent:
                sent = self._socket.send(self._unsent[0])
                if sent < len(self._unsent[0]):
                    self._unsent[0] = self._unsent[0][sent:]
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            self.is_closed = True
            self._unsent.clear()

    def flush_all(self, seconds: float) -> None:
        """Send everything, or as much as the other end takes in some seconds."""
        self.flush()
        while self._unsent and self._poll(select.POLLOUT, seconds):
            self.flush()

    def wait(self, seconds: float) -> None:
        """Until there is something to receive or room to send, but not for longer than this."""
        self._poll(select.POLLIN | (select.POLLOUT if self._unsent else 0), seconds)
        self.flush()

    def receive(self) -> list[Message]:
        """Every message that is wholly here."""
        try:
            while data := self._socket.recv(_READ_BYTES):
                self._received += data
            self.is_closed = True
        except BlockingIOError:
            pass
        except ConnectionResetError:  # closed with something unread; what it sent was read above
            self.is_closed = True
        messages = []
        start = 0
        while (payload := start + _HEADER.size) <= len(self._received):
            kind, length = _HEADER.unpack_from(self._received, start)
            if payload + length > len(self._received):
                break
            start = payload + length
            messages.append((kind, bytes(self._received[payload:start])))
        del self._received[:start]
        return messages

    def close(self) -> None:
        """The other end finds it closed."""
        self._socket.close()

    def _poll(self, events: int, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._socket, events)
        return bool(poll.poll(seconds * 1000))
