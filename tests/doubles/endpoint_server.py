"""A small OpenAI-compatible server on loopback that misbehaves as it is told."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class EndpointServer:
    """Answers `/v1/chat/completions`. Each request takes the next of `faults`, as long as there are some."""

    def __init__(self, answer=lambda body: f"echo {body['messages'][-1]['content']}"):
        self.answer, self.faults, self.delay_s, self.usage = answer, [], 0.0, True
        self.bodies, self.times, self.keys, self.served = [], [], [], []
        self.open = self.most_open = 0
        self.lock, self.ending = threading.Lock(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                server.handle(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.ending.set()
        self.http.shutdown()
        self.http.server_close()

    def handle(self, request):
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        with self.lock:
            self.bodies.append(body)
            self.times.append(time.monotonic())
            self.keys.append(request.headers.get("Authorization"))
            fault = self.faults.pop(0) if self.faults else None
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        try:
            # What the client has given up on meets a closed connection here.
            with contextlib.suppress(ConnectionError):
                self.ending.wait(self.delay_s)
                self.reply(request, body, fault)
        finally:
            with self.lock:
                self.open -= 1

    def reply(self, request, body, fault):
        if isinstance(fault, tuple):
            status, headers, text = fault
            self.send(request, status, text.encode(), headers)
        elif fault == "silent":
            self.ending.wait(5)
            request.close_connection = True
        elif fault == "dropped":
            request.close_connection = True
        elif fault == "not json":
            self.send(request, 200, b"<html>gateway</html>", {})
        elif fault == "no choice":
            self.send(request, 200, b'{"choices": []}', {})
        else:
            self.send_answer(request, body, cut=fault == "cut")

    def send_answer(self, request, body, *, cut):
        text = self.answer(body)
        said = {"model": f"{body['model']}-2026"}
        if self.usage:
            said["usage"] = {"prompt_tokens": 7, "completion_tokens": len(text), "total_tokens": 7 + len(text)}
        if not body.get("stream"):
            document = {**said, "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
            raw = json.dumps(document, ensure_ascii=False).encode()
            self.send(request, 200, raw[: len(raw) // 2] if cut else raw, {"Content-Length": str(len(raw))})
        else:
            pieces = [{"choices": [{"delta": {"content": character}, "finish_reason": None}]} for character in text]
            pieces += [{"choices": [{"delta": {}, "finish_reason": "stop"}]}, {**said, "choices": []}]
            events = [f"data: {json.dumps(piece, ensure_ascii=False)}\n\n" for piece in pieces] + ["data: [DONE]\n\n"]
            raw = "".join(events[: len(text) // 2] if cut else events).encode()
            self.send(request, 200, raw, {"Content-Type": "text/event-stream"})
        if not cut:
            self.served.append(body)

    def send(self, request, status, raw, headers):
        request.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(raw)
        request.close_connection = True
