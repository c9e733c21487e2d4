"""Serve the part of Weights & Biases' protocol that a run needs.

The server can fail in several ways.
"""

import json
import os
import signal
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import lightning.pytorch as L

KEY = "0123456789" * 4


class WandbServer:
    """Listen on this machine while the block lasts.

    Attributes:
        address: of the server.
        behaviour: ``"answers"``, ``"hangs"`` (takes a request and never answers), ``"dies"`` (stops listening), or a
            status that refuses everything.
        afterwards: the behaviour once the first run has begun; ``None`` changes nothing.
        history: rows of numbers by run id, as they are on the server: each at its line, in the last version.
        asked: how many requests there were.
    """

    def __init__(self, behaviour: str | int = "answers", afterwards: str | int | None = None) -> None:
        self.behaviour, self.afterwards = behaviour, afterwards
        self.history: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        self.asked = 0
        self._over = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                owner.asked += 1
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if owner.behaviour == "dies":
                    threading.Thread(target=owner.die, daemon=True).start()
                if owner.behaviour in ("hangs", "dies"):
                    owner._over.wait()
                    self.close_connection = True
                    return
                refused = isinstance(owner.behaviour, int)
                answer = b"" if refused else json.dumps(owner.answer(self.path, content)).encode()
                self.send_response(int(owner.behaviour) if refused else 200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)
                if owner.afterwards is not None and b"UpsertBucket" in content:
                    owner.behaviour = owner.afterwards

            do_GET = do_PUT = do_POST

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # a client that was killed

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "WandbServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.die()

    def die(self) -> None:
        """Stop listening; clients that wait for an answer get none."""
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def rows(self, run: str) -> list[dict[str, Any]]:
        """Return the rows of a run in their order on the server."""
        return [row for _, row in sorted(self.history[run].items())]

    def answer(self, path: str, content: bytes) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            run = path.split("/")[-2]
            part = json.loads(content).get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            for number, line in enumerate(part["content"], part["offset"]):
                self.history[run][number] = json.loads(line)
            return {}
        if not path.endswith("/graphql"):
            return {}  # an upload
        asked = json.loads(content)
        name, values = asked.get("operationName"), asked.get("variables", {})
        project = {"id": "p", "name": "ars2", "entity": {"id": "e", "name": "me"}}
        run = {"id": "r", "name": values.get("name"), "displayName": "shown", "config": "{}", "project": project}
        if name == "UpsertBucket":
            return {"data": {"upsertBucket": {"bucket": run, "inserted": True}}}
        if name == "RunResumeStatus":
            rows = self.rows(values["name"])
            if not rows:
                return {"data": {"model": {**project, "bucket": None}}}
            counts = {"historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0}
            tails = {"historyTail": json.dumps([json.dumps(rows[-1])]), "eventsTail": "[]", "summaryMetrics": "{}"}
            return {"data": {"model": {**project, "bucket": {**run, **counts, **tails, "wandbConfig": '{"t": {}}'}}}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.address}/upload/{file}"} for file in values["files"]]
            return {"data": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}}
        return {"data": None, "errors": [{"message": f"this server knows no {name}"}]}


class KillService(L.Callback):
    """Kill the process of W&B in the second epoch."""

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            names = {int(child): Path(f"/proc/{child}/cmdline").read_text() for child in children}
            (service,) = [child for child, name in names.items() if "wandb-core" in name]
            os.kill(service, signal.SIGKILL)
            os.waitpid(service, 0)
