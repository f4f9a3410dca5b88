"""A proxy on loopback in front of a real server: it passes requests on, and for some it fails as a schedule says."""

import asyncio
import contextlib
import json
import threading

REFUSAL = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
FAULTS = ("500", "silent", "cut", "stalled")
"""No request reaches the server; none, and nothing comes back until the client gives up; half of the answer comes and the
connection ends; half of it comes and then nothing until the client gives up."""


class FaultyProxy:
    """Each request for a text takes the next fault of that text's `schedule`, and passes when there is none left."""

    def __init__(self, port, schedule):
        """`port`: the server's on 127.0.0.1; `schedule`: (last message's text) -> faults in their order."""
        self.port, self.schedule, self.seen = port, schedule, {}
        """`seen`: text -> what was done with each of its requests: a fault, or `passed`."""
        self.loop, self.ready, self.tasks = asyncio.new_event_loop(), threading.Event(), set()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self.thread.start()
        assert self.ready.wait(10)
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.ended.set)
        self.thread.join(10)

    def _run(self):
        self.loop.run_until_complete(self._serve())
        self.loop.close()

    async def _serve(self):
        self.ended = asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        self.ready.set()
        await self.ended.wait()
        server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _connection(self, reader, writer):
        self.tasks.add(task := asyncio.current_task())
        try:
            # What the client has given up on meets a closed connection here.
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._request(reader, writer)
        finally:
            writer.close()
            self.tasks.discard(task)

    async def _request(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")[:-2]
        length = next(int(line.partition(":")[2]) for line in lines if line.lower().startswith("content-length:"))
        body = await reader.readexactly(length)
        text = json.loads(body)["messages"][-1]["content"]
        done = self.seen.setdefault(text, [])
        faults = self.schedule.get(text, ())
        fault = faults[len(done)] if len(done) < len(faults) else "passed"
        done.append(fault)
        if fault == "500":
            writer.write(REFUSAL)
        elif fault != "silent":
            # One request a connection, so that its end is the answer's end.
            kept = [line for line in lines if not line.lower().startswith("connection:")]
            await self._forward("\r\n".join([*kept, "Connection: close", "", ""]).encode("latin-1") + body, writer, fault)
        await writer.drain()
        if fault in ("silent", "stalled"):
            await reader.read()  # until the client closes it

    async def _forward(self, request, writer, fault):
        answers, asking = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            asking.write(request)
            if fault == "passed":
                while piece := await answers.read(1 << 16):
                    writer.write(piece)
                    await writer.drain()
            else:
                head = await answers.readuntil(b"\r\n\r\n")
                rest = await answers.read()
                assert len(rest) > 1, "an answer to be cut"
                writer.write(head + rest[: len(rest) // 2])
        finally:
            asking.close()
