"""A stand-in of the API that answers chats by a rule."""

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import orjson


class Stub:
    """A stand-in of the API.

    reply: the text for a chat's body; a status, with a message or without; None for a connection that is cut.
    asked, keys: of the chats so far.
    """

    def __init__(
        self, reply: Callable[[dict[str, Any]], str | int | tuple[int, str] | None], delay_s: float = 0.0
    ) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._send(200, {"object": "list", "data": [{"id": "stub", "object": "model"}]})

            def do_POST(self) -> None:
                body = orjson.loads(self.rfile.read(int(self.headers["content-length"])))
                stub.asked.append(body)
                stub.keys.add(self.headers["authorization"].removeprefix("Bearer "))
                time.sleep(delay_s)
                said = reply(body)
                if said is None:  # fewer bytes than were promised
                    self.send_response(200)
                    self.send_header("content-length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [')
                    self.close_connection = True
                elif isinstance(said, int | tuple):
                    status, message = said if isinstance(said, tuple) else (said, f"no, {said}")
                    self._send(status, {"error": {"message": message, "type": "x", "param": None, "code": None}})
                else:
                    answer = {"role": "assistant", "content": said}
                    choice = {"index": 0, "message": answer, "finish_reason": "stop"}
                    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
                    self._send(200, {"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage})

            def _send(self, status: int, fields: dict[str, Any]) -> None:
                data = orjson.dumps(fields)
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def __enter__(self) -> "Stub":
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def last_texts(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.asked]
