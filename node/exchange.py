"""One request to the control API and its answer, without any I/O: HTTP/1.1 as bytes in and out."""

from __future__ import annotations

from typing import Final

import h11

MAX_LINE: Final = 1 << 20
"""Bytes of an error, or of one line of a stream."""


class BrokenExchange(Exception):
    """What came back is no whole answer."""


class Exchange:
    """A request to be sent (`request`) and the answer as it comes in (`receive`)."""

    def __init__(self, method: str, path: str, body: str | None = None) -> None:
        self._http = h11.Connection(h11.CLIENT)
        payload = b"" if body is None else body.encode()
        headers = [("host", "meshd"), ("connection", "close")]
        if body is not None:
            headers += [
                ("content-type", "application/json"),
                ("content-length", str(len(payload))),
            ]
        self.request: bytes = b"".join(
            self._http.send(event) or b""
            for event in (
                h11.Request(method=method, target=path, headers=headers),
                *((h11.Data(data=payload),) if payload else ()),
                h11.EndOfMessage(),
            )
        )
        """The bytes to send."""
        self.status = 0
        """The answer's status; 0 before it is known."""
        self.ended = False
        """Whether the answer is complete."""

    def receive(self, data: bytes) -> bytes:
        """Take what came in (nothing: the daemon hung up) and return the body's part of it.

        Raises BrokenExchange if it is not HTTP, or ends before the answer is complete.
        """
        body = b""
        try:
            self._http.receive_data(data)
            while not self.ended:
                event = self._http.next_event()
                match event:
                    case h11.NEED_DATA:
                        break
                    case h11.Response():
                        self.status = event.status_code
                    case h11.Data():
                        body += bytes(event.data)
                    case h11.EndOfMessage():
                        self.ended = True
                    case h11.ConnectionClosed():
                        raise BrokenExchange("it hung up before it had answered")
                    case _:
                        pass  # an informational response
        except h11.RemoteProtocolError as error:
            raise BrokenExchange(str(error)) from error
        return body


class Lines:
    """Cuts a stream of bytes into lines; those without content are left out."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the lines that *data* completes; raises BrokenExchange for an endless one."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE:
            raise BrokenExchange(f"a line of more than {MAX_LINE} bytes")
        return [line for line in lines if line.strip()]
