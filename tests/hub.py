"""A stand-in for the Hugging Face Hub on 127.0.0.1, and clients of it in processes of their own.

It answers what `huggingface_hub` asks when it downloads a snapshot, and remembers every request.
huggingface_hub reads its address from the environment when it is imported, hence the processes;
each of them dies at once if it talks to anything but this machine.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What runs before the code of a client. hf_xet, another transport, cannot be imported: it is not a
# dependency of speechrnt.
_PREAMBLE = """
import os, sys

def refuse(event, arguments):
    if event == "socket.connect":
        host = arguments[1][0]
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    if host != "127.0.0.1":
        print("tried to reach", host, file=sys.stderr, flush=True)
        os._exit(99)

sys.addaudithook(refuse)
sys.modules["hf_xet"] = None
"""


@dataclass
class Repository:
    """A model repository: its files, by branch, tag or commit."""

    revisions: Mapping[str, Mapping[str, bytes]]
    token: str | None = None
    """What a client must show; None for a public repository."""
    gated: bool = False
    """Whether to say that the repository exists, but has conditions."""

    def commit(self, revision: str) -> str | None:
        """Return the commit that `revision` stands for, None if there is none."""
        commits = {name: hashlib.sha1(name.encode()).hexdigest() for name in self.revisions}
        return commits.get(revision) or (revision if revision in commits.values() else None)

    def files(self, revision: str) -> Mapping[str, bytes]:
        commit = self.commit(revision)
        return next(f for name, f in self.revisions.items() if self.commit(name) == commit)


@dataclass
class Hub:
    """The server; a context manager."""

    repositories: Mapping[str, Repository]
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of each request so far."""
    cut: dict[str, int] = field(default_factory=dict)
    """How many more times to close the connection in the middle of a file of this name."""
    stall: set[str] = field(default_factory=set)
    """Names of files of which only the first half is sent until the server stops."""
    stalled: threading.Event = field(default_factory=threading.Event)
    """Set when the server has sent the half of a file that stalls."""

    def __enter__(self) -> "Hub":
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self})
        )
        self._server.daemon_threads = True
        self._stopped = threading.Event()
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def fetched(self) -> list[str]:
        """Return the names of the files whose content was asked for, in order."""
        paths = [path for method, path in self.requests if method == "GET" and "/resolve/" in path]
        return [path.split("/resolve/")[1].split("/", 1)[1] for path in paths]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        match = re.fullmatch(
            r"/api/models/(?P<id>[^/]+/[^/]+)(?P<tree>/tree|/revision|)(/(?P<revision>[^/]+))?"
            r"|/(?P<file_id>[^/]+/[^/]+)/resolve/(?P<file_revision>[^/]+)/(?P<file>.+)",
            path,
        )
        if match is None:
            self._fail(HTTPStatus.NOT_FOUND)
            return
        name = match["id"] or match["file_id"]
        repository = self.hub.repositories.get(name)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository is None or repository.token not in (None, token):
            gated = repository is not None and repository.gated
            # The hub does not say which of the two it is.
            self._fail(HTTPStatus.UNAUTHORIZED, "GatedRepo" if gated else "RepoNotFound")
            return
        commit = repository.commit(match["revision"] or match["file_revision"] or "main")
        if commit is None:
            self._fail(HTTPStatus.NOT_FOUND, "RevisionNotFound")
            return
        files = repository.files(commit)
        if match["file"]:
            self._send_file(match["file"], files, commit)
        elif match["tree"] == "/tree":
            entries = [
                {"type": "file", "path": file, "size": len(content), "oid": _etag(content)}
                for file, content in files.items()
            ]
            self._send_json(entries)
        else:
            siblings = [{"rfilename": file} for file in files]
            self._send_json({"id": name, "modelId": name, "sha": commit, "siblings": siblings})

    def _send_json(self, document: object) -> None:
        content = json.dumps(document).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _send_file(self, name: str, files: Mapping[str, bytes], commit: str) -> None:
        if name not in files:
            self._fail(HTTPStatus.NOT_FOUND, "EntryNotFound")
            return
        content = files[name]
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(span[1]) if span else 0
        self.send_response(HTTPStatus.PARTIAL_CONTENT if span else HTTPStatus.OK)
        self.send_header("ETag", f'"{_etag(content)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if span:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        half = (start + len(content)) // 2
        self.wfile.write(content[start:half])
        if name in self.hub.stall:
            self.hub.stalled.set()
            self.hub._stopped.wait()
        if name in self.hub.stall or self.hub.cut.get(name, 0) > 0:
            self.hub.cut[name] = self.hub.cut.get(name, 0) - 1
            self.close_connection = True
            return
        self.wfile.write(content[half:])

    def _fail(self, status: HTTPStatus, code: str = "") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def client_environment(url: str, home: Path, **variables: str) -> dict[str, str]:
    """Return the environment of a process that takes `url` for the hub and caches in `home`."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HF_") and not name.lower().endswith("_proxy")
    }
    return {
        **ours,
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "NO_PROXY": "*",
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def start_client(
    code: str, *arguments: str | Path, url: str, home: Path, **variables: str
) -> subprocess.Popen[str]:
    """Start Python on `code`, which finds `arguments` in sys.argv, with `url` for the hub."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", _PREAMBLE + code, *map(str, arguments)],
        env=client_environment(url, home, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
