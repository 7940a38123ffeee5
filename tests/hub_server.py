"""A server in the place of the Hugging Face hub, as far as its client asks one for data sets and tokenizers.

It serves the directories below a root, counts what it is asked, can break off, and can move to another commit.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse


class Hub(ThreadingHTTPServer):
    """Context of a running server. `root/ORG/NAME/` is the repository ORG/NAME, a data set or a model."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.commit = root, "a" * 40
        # "GET /path" of all requests so far.
        self.requests: list[str] = []
        # Of a file, no byte after this one is sent, that many times.
        self.breaks_after, self.breaks = 0, 0
        # After this many files it sends no more.
        self.down_after_files: int | None = None
        # Repositories that need a licence.
        self.gated: set[str] = set()

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_HUB_OFFLINE": "0"}

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path).strip("/")
        self.server.requests.append(f"{self.command} /{path}")
        parts = path.split("/")
        if parts[0] == "api":
            repo, rest = "/".join(parts[2:4]), parts[4:]
        elif parts[0] == "datasets":
            repo, rest = "/".join(parts[1:3]), parts[3:]
        else:
            repo, rest = "/".join(parts[:2]), parts[2:]
        directory = self.server.root / repo
        if repo in self.server.gated:
            self._answer(403, b"gated", {"X-Error-Code": "GatedRepo", "X-Error-Message": "this is a gated repo"})
        elif not directory.is_dir():
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["resolve"]:
            self._file(directory / "/".join(rest[2:]))
        elif rest[:1] == ["tree"]:
            self._json(self._entries(directory, directory / "/".join(rest[2:])))
        elif rest[:1] == ["paths-info"]:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            wanted = json.loads(body)["paths"] if body.startswith("{") else [unquote(v[6:]) for v in body.split("&")]
            self._json(
                [e for path in wanted for e in self._entries(directory, directory) if e["path"] == path.strip("/")]
            )
        else:
            siblings = [{"rfilename": entry["path"]} for entry in self._entries(directory, directory)]
            commit = rest[1] if rest[:1] == ["revision"] and rest[1] != "main" else self.server.commit
            info = {"id": repo, "sha": commit, "siblings": siblings, "private": False, "gated": False}
            self._json(info | {"downloads": 0, "tags": [], "cardData": {}})

    do_HEAD = do_POST = do_GET

    def _entries(self, root: Path, directory: Path) -> list[dict]:
        return [
            {
                "type": "file" if path.is_file() else "directory",
                "path": str(path.relative_to(root)),
                "size": path.stat().st_size if path.is_file() else 0,
                "oid": hashlib.sha1(path.read_bytes() if path.is_file() else b"").hexdigest(),
            }
            for path in sorted(directory.rglob("*"))
        ]

    def _file(self, path: Path) -> None:
        if not path.is_file():
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.server.commit})
        content = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self.server.commit}
        start, status = 0, 200
        if requested := self.headers.get("Range"):
            first, _, last = requested.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or len(content) - 1), len(content) - 1) + 1
            headers["Content-Range"], status = f"bytes {start}-{stop - 1}/{len(content)}", 206
            content = content[start:stop]
        if self.command == "GET" and self.server.down_after_files is not None:
            if not self.server.down_after_files:
                return self._answer(403, b"down", {})
            self.server.down_after_files -= 1
        if self.server.breaks and self.command == "GET" and start + len(content) > self.server.breaks_after:
            self.server.breaks -= 1
            # Of which the hub's own client does not ask again.
            return self._answer(403, b"broken", {})
        self._answer(status, content, headers)

    def _json(self, content: object) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass
