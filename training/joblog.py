"""The output of a Ray job, line by line, over as many connections as that takes."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from training.say import ERROR_MARK, PROGRESS_MARK

POLL_S = 0.3
NUM_TAIL_LINES = 30
# Ray paints what it passes on.
COLOUR = re.compile("\x1b\\[[0-9;]*m")
# After so long without a line the API is asked for a sign of life, and given so long for it.
QUIET_S = 15.0
KNOCK_S = 10.0


class JobLog:
    """Passes each line on once.

    `num_lines` passed on so far; `tail`: the last of them; `causes`: what the workers named as the cause of a failure.
    """

    def __init__(self, client: Any, submission_id: str, on_line: Callable[[str], None]) -> None:
        self._client, self._submission_id, self._on_line = client, submission_id, on_line
        self.num_lines = 0
        self._heard = time.monotonic()
        self.tail: list[str] = []
        self.causes: list[str] = []

    def read(self, finished: Callable[[], bool]) -> None:
        """Read over one connection until the job ends or `finished`; raises what the connection does when it breaks.

        Raises OSError also when nobody is there any more: a machine that lost its power does not close a connection.
        """
        asyncio.run(self._read(finished))

    async def _read(self, finished: Callable[[], bool]) -> None:
        reading = asyncio.create_task(self._stream())
        while not reading.done() and not finished():
            await asyncio.wait([reading], timeout=POLL_S)
            if time.monotonic() - self._heard > QUIET_S:
                await self._knock()
        if finished():
            reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading

    async def _stream(self) -> None:
        # A new connection begins at the first line.
        known, number = self.num_lines, 0
        async for chunk in self._client.tail_job_logs(self._submission_id):
            for line in chunk.splitlines():
                number += 1
                if number > known:
                    self.num_lines = number
                    self._take(line)

    async def _knock(self) -> None:
        url = urlsplit(self._client.get_address())
        port = url.port or (443 if url.scheme == "https" else 80)
        _, writer = await asyncio.wait_for(asyncio.open_connection(url.hostname, port), KNOCK_S)
        writer.close()
        self._heard = time.monotonic()

    def _take(self, line: str) -> None:
        self._heard = time.monotonic()
        line = COLOUR.sub("", line)
        self.tail.append(line)
        del self.tail[:-NUM_TAIL_LINES]
        if ERROR_MARK in line and PROGRESS_MARK in line:
            self.causes.append(line.partition(ERROR_MARK)[2].strip())
        self._on_line(line)
