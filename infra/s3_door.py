"""The door of the stack's S3: refuses requests without a signature with 403, as Amazon's does; rclone serves behind it.

`python -m infra.s3_door PORT SOCKET COMMAND...` starts the command, which serves S3 at the socket; each ends with the
other. rclone refuses such requests, too, but as malformed (400), which tells nobody that credentials are missing.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path

from infra.servers import HOST

PIECE_BYTES = 256 * 1024
# A client that connects and says nothing holds a descriptor.
HEAD_S = 30.0
DISCARD_S = 10.0
UNSIGNED = "<Error><Code>AccessDenied</Code><Message>Sign requests with AWS4-HMAC-SHA256.</Message></Error>"


async def serve(port: int, socket: Path, command: Sequence[str]) -> int:
    """Answers on loopback until the command ends; returns its exit status. Raises OSError when the port is taken."""
    socket.unlink(missing_ok=True)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The client left, was silent, or came before rclone: it sees a closed connection. Cancelled with the last of
        # them, when rclone has ended.
        with closing(writer), suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await _answer(reader, writer, socket)

    door = await asyncio.start_server(answer, HOST, port, limit=PIECE_BYTES)
    server = await asyncio.create_subprocess_exec(*command)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.terminate)
    with closing(door):
        return await server.wait()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, socket: Path) -> None:
    """The first request of a connection decides; rclone checks the signature of each, and what follows comes from the
    same client."""
    try:
        async with asyncio.timeout(HEAD_S):
            head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        await _refuse(reader, writer, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "")
        return
    if not is_signed(head):
        await _refuse(reader, writer, HTTPStatus.FORBIDDEN, "" if head.startswith(b"HEAD ") else UNSIGNED)
        return
    inner_reader, inner_writer = await asyncio.open_unix_connection(socket, limit=PIECE_BYTES)
    with closing(inner_writer):
        inner_writer.write(head)
        upload = asyncio.create_task(_upload(reader, inner_writer))
        try:
            # It is rclone that ends a connection: after the last answer, or when the client was idle for a minute.
            await _pass_on(inner_reader, writer)
        finally:
            upload.cancel()


def is_signed(head: bytes) -> bool:
    """Whether a request bears a signature, in its headers or, as of a signed link, in its address."""
    request, *lines = head.lower().split(b"\r\n")
    headers = [line.partition(b":") for line in lines]
    return b"x-amz-signature=" in request or any(
        name == b"authorization" and value.lstrip().startswith(b"aws4-") for name, _, value in headers
    )


async def _refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, status: HTTPStatus, body: str) -> None:
    """Answer, and let the client send the rest: closed at once, the connection would break before that is read."""
    lines = (
        f"HTTP/1.1 {status} {status.phrase}", f"Date: {formatdate(usegmt=True)}", "Content-Type: application/xml",
        f"Content-Length: {len(body)}", "Connection: close", "", body,
    )  # fmt: skip
    writer.write("\r\n".join(lines).encode())
    await writer.drain()
    writer.write_eof()
    async with asyncio.timeout(DISCARD_S):
        while await reader.read(PIECE_BYTES):
            pass


async def _upload(reader: asyncio.StreamReader, inner_writer: asyncio.StreamWriter) -> None:
    try:
        await _pass_on(reader, inner_writer)
    except OSError:
        # The client is gone; rclone would wait for the rest.
        inner_writer.close()


async def _pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while piece := await source.read(PIECE_BYTES):
        sink.write(piece)
        await sink.drain()
    sink.write_eof()


if __name__ == "__main__":
    sys.exit(asyncio.run(serve(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])))
