"""A scripted OpenAI-style endpoint on a real socket: what the terminal commands talk to in tests."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class Endpoint:
    """Answers chat with an echo of the last message, word by word, and completions with `max_tokens` pieces.

    Prompts steer it: "refuse" gives a 400, "break" an error inside the stream, "cut" a stream without an end, and
    "slow" words that never end.
    """

    def __init__(self, piece_seconds: float = 0.0) -> None:
        self.piece_seconds = piece_seconds
        self.bodies: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.num_disconnects = 0
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                endpoint.authorizations.append(self.headers.get("Authorization"))
                self.reply(200, {"object": "list", "data": [{"id": "tiny"}, {"id": "other"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.bodies.append(body)
                with endpoint._lock:
                    endpoint._at_once += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint._at_once)
                try:
                    self.answer(body)
                except (BrokenPipeError, ConnectionResetError):
                    endpoint.num_disconnects += 1
                finally:
                    with endpoint._lock:
                        endpoint._at_once -= 1

            def answer(self, body: dict[str, Any]) -> None:
                chat = "messages" in body
                question = body["messages"][-1]["content"] if chat else body["prompt"]
                if question == "refuse":
                    return self.reply(400, {"error": {"message": "no such luck", "type": "invalid_request_error"}})
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                words = [f"{word} " for word in question.split()] if chat else ["x"] * body["max_tokens"]
                if question == "slow":
                    words = ["tick "] * 10_000
                for word in words:
                    self.event({"choices": [{"index": 0, "delta": {"content": word}, "text": word}]})
                    time.sleep(0.01 if question == "slow" else endpoint.piece_seconds)
                if question == "break":
                    self.event({"error": {"message": "the replica is gone"}})
                elif question != "cut":
                    self.event({"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "stop"}]})
                    usage = {"prompt_tokens": len(question), "completion_tokens": len(words)}
                    self.event({"choices": [], "usage": usage})
                    self.wfile.write(b"data: [DONE]\n\n")
                return None

            def event(self, payload: dict[str, Any]) -> None:
                self.wfile.write(f"data: {json.dumps(payload)}\n\n".encode())
                self.wfile.flush()

            def reply(self, status: int, payload: dict[str, Any]) -> None:
                data = json.dumps(payload).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
