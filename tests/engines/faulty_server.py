"""A real chat-completions server on a local port that does what a test's script says: answers, or fails in one of many ways."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, *, finish_reason="stop", usage=(10, 4, 3), message=None, **choice):
    """The body of a proper answer; usage: tokens of the prompt, of those from a cache, and sampled."""
    prompt, cached, sampled = usage
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "tiny",
        "choices": [
            {"index": 0, "finish_reason": finish_reason, "message": message or {"role": "assistant", "content": text}}
            | choice
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": sampled,
            "total_tokens": prompt + sampled,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
    }


class Answer:
    """One answer: a status, headers and a body, sent at some pace."""

    def __init__(self, body, status=200, headers=(), *, wait=0.0, pace=0.0, cut=None):
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.status, self.headers = status, dict(headers)
        self.wait, self.pace, self.cut = wait, pace, cut

    def send(self, handler):
        handler.server.stopped.wait(self.wait)
        handler.send_response(self.status)
        for name, value in ({"Content-Type": "application/json"} | self.headers).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(self.body)))
        handler.end_headers()
        if self.pace:
            for byte in self.body:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                if handler.server.stopped.wait(self.pace):
                    return
        else:
            handler.wfile.write(self.body[: self.cut])
        handler.wfile.flush()
        if self.cut is not None:
            handler.close_connection = True


class Drop:
    """Closes the connection without a word."""

    def send(self, handler):
        handler.close_connection = True


class Stall:
    """Says nothing until the server is stopped."""

    def send(self, handler):
        handler.server.stopped.wait(60)
        handler.close_connection = True


def refusal(status, message, headers=(), **error):
    return Answer({"error": {"message": message} | error}, status, headers)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.record("GET", self.path, None, self.headers)
        models = self.server.models
        if models is None:
            return self._send(Answer({"detail": "Not Found"}, 404))
        return self._send(Answer({"object": "list", "data": [{"id": m, "object": "model"} for m in models]}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = self.server.record("POST", self.path, body, self.headers)
        with self.server.counted():
            self._send(Drop() if self.server.stopped.is_set() else self.server.answer(body, number))

    def _send(self, answer):
        try:
            answer.send(self)
        except OSError:  # the client went away
            self.close_connection = True


class FaultyServer(ThreadingHTTPServer):
    """A server that is scripted.

    Args:
        script: What to answer: a function of the request's body and its number (from 0), or a list of answers of which the last
            goes on. An answer is a text, a body, or one of the classes of this module.
        models: Names that it lists; `None` to list nothing (404).

    Attributes:
        requests: (method, path, body, headers by lower-case name) of every request.
        most: Most requests for completions that were under way at once.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, script, models=("tiny",)):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.models = script, models
        self.requests, self.times, self.most, self._under_way = [], [], 0, 0
        self.lock, self.stopped = threading.Lock(), threading.Event()

    @property
    def base_url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def asked(self):
        """Bodies of the requests for completions."""
        return [body for method, _, body, _ in self.requests if method == "POST"]

    def record(self, method, path, body, headers):
        with self.lock:
            number = len(self.asked)
            self.requests.append((method, path, body, {k.lower(): v for k, v in headers.items()}))
            if method == "POST":
                self.times.append(time.monotonic())
            return number

    @contextmanager
    def counted(self):
        with self.lock:
            self._under_way += 1
            self.most = max(self.most, self._under_way)
        try:
            yield
        finally:
            with self.lock:
                self._under_way -= 1

    def answer(self, body, number):
        found = self.script(body, number) if callable(self.script) else self.script[min(number, len(self.script) - 1)]
        if isinstance(found, str):
            found = completion(found)
        return Answer(found) if isinstance(found, dict | bytes) else found


@contextmanager
def serving(script, **kwargs):
    """Runs a `FaultyServer` in a thread."""
    server = FaultyServer(script, **kwargs)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
