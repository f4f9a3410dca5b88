"""A small Hugging Face hub on loopback: the files of one folder as one model, and which of them were asked for."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self


class Hub:
    """Serves `folder` as the model `them/theirs`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[str]()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_POST(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        self.asked.append(request.path)
        if "/resolve/" in request.path:
            file = self.folder / request.path.partition("/resolve/")[2].partition("/")[2]
            found = file.read_bytes() if file.is_file() else None
        else:
            found = json.dumps([] if "/tree/" in request.path else {"id": "them/theirs", "sha": "a" * 40}).encode()
        request.send_response(200 if found is not None else 404)
        request.send_header("Content-Length", str(len(found or b"")))
        request.send_header("X-Repo-Commit", "a" * 40)
        request.send_header("ETag", f'"{hashlib.sha256(found or b"").hexdigest()}"')
        if found is None:
            request.send_header("X-Error-Code", "EntryNotFound")
        request.end_headers()
        if body and found:
            request.wfile.write(found)
