"""A server on loopback that speaks as the Hugging Face hub does of data sets.

`python tests/support/hub.py` prints its address and serves until its standard input ends.

As much of its protocol as it takes to write and read a repository: large files go to a store by
their hash, small ones into the commit, and a commit adds all of its files at once. `GET /log` gives
what was uploaded and committed. It refuses the first commit to a repository called `busy`.
"""

import base64
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0" * 40
blobs: dict[str, bytes] = {}  # by SHA-256
files: dict[str, dict[str, tuple[bytes, bool]]] = {}  # of each repository: content, whether large
log: list[str] = []


@contextmanager
def hub_server() -> Iterator[str]:
    """The address of a server that lives as long as the block."""
    words = [sys.executable, __file__]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.communicate()  # ends its input, and so the server


class Hub(BaseHTTPRequestHandler):
    """The hub's answers."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        match unquote(urlsplit(self.path).path).strip("/").split("/"):
            case ["log"]:
                self.answer(log)
            case ["api", "datasets", owner, name, *_] if f"{owner}/{name}" not in files:
                self.answer({"error": "Repository not found"}, 404, "RepoNotFound")
            case ["api", "datasets", owner, name, "tree", _, *inner]:
                self.answer(self.entries(f"{owner}/{name}", "/".join(inner)))
            case ["api", "datasets", owner, name, *_]:
                self.answer({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [], "tags": []})
            case ["datasets", owner, name, "resolve", _, *inner]:
                found = files.get(f"{owner}/{name}", {}).get("/".join(inner))
                if found is None:
                    self.answer({"error": "Entry not found"}, 404, "EntryNotFound")
                else:
                    self.answer(found[0], etag=hashlib.sha256(found[0]).hexdigest())
            case _:
                self.unknown()

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        body = self.body()
        match unquote(urlsplit(self.path).path).strip("/").split("/"):
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
                files.setdefault(repo, {})
                log.append(f"create {repo} {asked.get('visibility', asked.get('private'))}")
                self.answer({"url": f"{self.address}/datasets/{repo}"})
            case ["api", "validate-yaml"]:
                self.answer({"errors": [], "warnings": []})
            case ["api", "datasets", _, _, "preupload", _]:
                asked = json.loads(body)["files"]
                self.answer({"files": [self.preupload(each["path"]) for each in asked]})
            case ["datasets", _, _, "info", "lfs", "objects", "batch"]:
                asked = json.loads(body)["objects"]
                self.answer({"transfer": "basic", "objects": [self.upload(x) for x in asked]})
            case ["api", "datasets", owner, name, "commit", _]:
                self.commit(f"{owner}/{name}", [json.loads(line) for line in body.splitlines()])
            case ["api", "datasets", owner, name, "paths-info", _]:
                is_json = body.startswith(b"{")
                paths = json.loads(body)["paths"] if is_json else parse_qs(body.decode())["paths"]
                repo = files.get(f"{owner}/{name}", {})
                self.answer([described(path, *repo[path]) for path in paths if path in repo])
            case _:
                self.unknown()

    def do_PUT(self) -> None:
        content = self.body()
        blobs[self.path.rpartition("/")[2]] = content
        log.append(f"upload {len(content)}")
        self.answer({})

    def preupload(self, path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith(".arrow") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def upload(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in blobs:  # it is here already
            return asked
        return asked | {"actions": {"upload": {"href": f"{self.address}/blob/{asked['oid']}"}}}

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        if repo.endswith("/busy") and "refused" not in log:
            log.append("refused")
            self.answer({"error": "come again"}, 400)
            return
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[repo][value["path"]] = base64.b64decode(value["content"]), False
            elif line["key"] == "lfsFile":
                files[repo][value["path"]] = blobs[value["oid"]], True
        log.append(f"commit {len(lines) - 1} files")
        url = f"{self.address}/datasets/{repo}/commit/{COMMIT}"
        self.answer({"success": True, "commitOid": COMMIT, "commitUrl": url})

    def entries(self, repo: str, inner: str) -> list[dict[str, Any]]:
        prefix = f"{inner}/" if inner else ""
        paths = [path for path in files[repo] if path.startswith(prefix)]
        own = [path for path in paths if "/" not in path.removeprefix(prefix)]
        below = {path.removeprefix(prefix).split("/")[0] for path in set(paths) - set(own)}
        folders = [{"type": "directory", "path": prefix + each, "oid": COMMIT} for each in below]
        return folders + [described(path, *files[repo][path]) for path in own]

    @property
    def address(self) -> str:
        return f"http://{self.headers['Host']}"

    def unknown(self) -> None:
        print("unknown:", self.command, self.path, file=sys.stderr, flush=True)
        self.answer({"error": "not known here"}, 404)

    def answer(self, value: Any, status: int = 200, code: str = "", etag: str = "") -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        if code:
            self.send_header("X-Error-Code", code)
        if etag:
            self.send_header("ETag", f'"{etag}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def described(path: str, content: bytes, is_large: bool) -> dict[str, Any]:
    """A file as the hub tells of it."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if is_large:
        oid = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
    return entry


def serve() -> None:
    """Serve until the standard input ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve()
