"""The hubs that models come from, in small: Ollama's registry and Hugging Face's, on port 5000.

`python3 hub.py ENGINES` serves what `make engines` has made: `library/smollm2:135m` to
`ollama pull`, and `hub/SmolLM2-135M` to `hf download`. Runs in a container of its own, so it
needs the standard library only.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PORT = 5000
COMMIT = "1" * 40
MANIFEST = Path("ollama/models/manifests/registry.ollama.ai/library/smollm2/135m")


class Hub(BaseHTTPRequestHandler):
    """One request for a list, or for a file or a part of one."""

    protocol_version = "HTTP/1.1"
    engines: Path

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/manifests/" in path:
            self._file(self.engines / MANIFEST)
        elif (blob := path.rpartition("/blobs/sha256:")[2]) != path and self.command == "GET":
            # Ollama wants to be sent elsewhere for a file.
            self.send_response(307)
            self.send_header("Location", f"http://files:{PORT}/files/sha256:{blob}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif (blob := path.rpartition("/sha256:")[2]) != path:
            self._file(self.engines / "ollama/models/blobs" / f"sha256-{blob}")
        elif path.startswith("/api/models/") and "/tree/" in path:
            entries = sorted((self.engines / "smollm2").iterdir())
            self._json([
                {"type": "file", "path": e.name, "size": e.stat().st_size, "oid": _oid(e)}
                for e in entries
            ])  # fmt: skip
        elif path.startswith("/api/models/"):
            self._json({"id": "hub/SmolLM2-135M", "sha": COMMIT, "siblings": []})
        elif (name := path.rpartition(f"/resolve/{COMMIT}/")[2]) != path:
            self._file(self.engines / "smollm2" / name)
        else:
            self.send_error(404)

    def _json(self, said: object) -> None:
        body = json.dumps(said).encode()
        self._head(200, len(body), "application/json")
        self.wfile.write(body)

    def _file(self, file: Path) -> None:
        """A file, or the part that a download goes on with."""
        if not file.is_file():
            self.send_error(404)
            return
        size = file.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        begin = int(asked[1]) if asked else 0
        end = int(asked[2]) + 1 if asked and asked[2] else size
        self._head(206 if asked else 200, end - begin, "application/octet-stream", file)
        if self.command == "GET":
            with file.open("rb") as content:
                content.seek(begin)
                while begin < end and (part := content.read(min(1 << 20, end - begin))):
                    self.wfile.write(part)
                    begin += len(part)

    def _head(self, status: int, length: int, kind: str, file: Path | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.send_header("X-Repo-Commit", COMMIT)
        if file is not None:
            self.send_header("ETag", f'"{_oid(file)}"')
        self.end_headers()


def _oid(file: Path) -> str:
    """An identifier of a file's content; no client computes it again."""
    return hashlib.sha256(file.name.encode()).hexdigest()[:40]


if __name__ == "__main__":
    Hub.engines = Path(sys.argv[1])
    ThreadingHTTPServer(("", PORT), Hub).serve_forever()
