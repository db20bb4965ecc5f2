"""A real S3 server on loopback (moto), which fails on demand; places of every kind to run the same tests at."""

from __future__ import annotations

import os
import selectors
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from artifacts import cache, places
from artifacts.places import Place, place

FAULTS = ("503", "403", "drop", "cut", "short", "flip")
"""503 and 403 answers; the connection closed unanswered, or in the middle of the body; half a body that says it is
whole; a body with one byte changed."""

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_SESSION_TOKEN": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_MAX_ATTEMPTS": "1",  # no retries but ours
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}


@dataclass(frozen=True)
class Request:
    """`key` is the object's path in its bucket, empty for requests about the bucket."""

    method: str
    key: str
    ranged: bool


@dataclass
class _Fault:
    kind: str
    times: int
    when: Callable[[Request], bool]


class FaultyServer:
    """The WSGI application between the wire and moto: counts requests, and does to them what `fail` said."""

    def __init__(self, app: Any) -> None:
        self._app, self._lock = app, threading.Lock()
        self._faults: list[_Fault] = []
        self._requests: list[Request] = []
        self.url = ""

    def reset(self) -> None:
        with self._lock:
            self._faults, self._requests = [], []

    def fail(self, kind: str, times: int = 1, when: Callable[[Request], bool] = lambda request: True) -> None:
        """Have the next `times` requests of which `when` is true fail; cut, short and flip are for GETs."""
        assert kind in FAULTS
        with self._lock:
            self._faults.append(_Fault(kind, times, when))

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """An object, without a request."""
        from werkzeug.test import Client

        assert Client(self._app).put(f"/{bucket}/{key}", data=data, base_url=self.url).status_code == 200

    def heal(self) -> None:
        with self._lock:
            self._faults = []

    @property
    def requests(self) -> list[Request]:
        with self._lock:
            return list(self._requests)

    def gets(self, name: str = "") -> list[Request]:
        """GETs of objects whose key holds `name`."""
        return [found for found in self.requests if found.method == "GET" and found.key and name in found.key]

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        _, _, key = environ["PATH_INFO"].lstrip("/").partition("/")
        request = Request(environ["REQUEST_METHOD"], key, "HTTP_RANGE" in environ)
        kind = self._fault(request)
        if kind in ("503", "403"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            code = {"503": "InternalError", "403": "AccessDenied"}[kind]
            body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
            start_response(
                f"{kind} {code}", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
            )
            return [] if request.method == "HEAD" else [body]
        if kind == "drop":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError("injected")
        if kind in ("cut", "short", "flip"):
            return self._spoiled(kind, environ, start_response)
        answer: Iterable[bytes] = self._app(environ, start_response)
        return answer

    def _fault(self, request: Request) -> str:
        with self._lock:
            self._requests.append(request)
            for fault in self._faults:
                whole = fault.kind in ("503", "403", "drop") or (request.method == "GET" and request.key)
                if fault.times and whole and fault.when(request):
                    fault.times -= 1
                    return fault.kind
        return ""

    def _spoiled(
        self, kind: str, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterator[bytes]:
        said: list[Any] = []
        body = b"".join(self._app(environ, lambda status, headers, *_: said.extend((status, headers))))
        status, headers = said
        if kind == "flip":
            body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
        length = len(body)
        if kind in ("cut", "short"):
            body = body[: length // 2]
        if kind == "short":
            length = len(body)
        dropped = ("content-length", "content-range", "etag")
        kept = [
            (name, value)
            for name, value in headers
            if name.lower() not in dropped and not name.lower().startswith("x-amz-checksum")
        ]
        start_response(status, [*kept, ("Content-Length", str(length))])
        yield body
        if kind == "cut":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError("injected")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[FaultyServer]:
    """The environment leads s3fs here, in this process and in those that tests start."""
    import s3fs
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug import serving

    class Quiet(MotoRequestHandler):  # type: ignore[misc]
        def log(self, *_: object) -> None:
            pass

    class Unhurried(selectors.DefaultSelector):
        def select(self, timeout: float | None = None) -> Any:
            return super().select(0)

    server = FaultyServer(DomainDispatcherApplication(create_backend_app))
    listening = serving.make_server("127.0.0.1", 0, server, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{listening.server_port}"
    with pytest.MonkeyPatch.context() as patched:
        for name, value in ENVIRONMENT.items():
            patched.setenv(name, value)
        patched.setenv("AWS_ENDPOINT_URL", server.url)
        patched.delenv("AWS_PROFILE", raising=False)
        patched.setattr(s3fs.S3FileSystem, "retries", 1)
        # after each answer, werkzeug waits 10 ms for more of the question
        patched.setattr(
            serving, "selectors", SimpleNamespace(**vars(selectors) | {"DefaultSelector": Unhurried})
        )
        s3fs.S3FileSystem.clear_instance_cache()
        yield server
        s3fs.S3FileSystem.clear_instance_cache()
    listening.shutdown()
    thread.join()
    listening.server_close()


@pytest.fixture
def s3(s3_server: FaultyServer) -> FaultyServer:
    """The server, healthy, with no requests counted."""
    s3_server.reset()
    return s3_server


@pytest.fixture
def bucket(s3: FaultyServer) -> str:
    """The URL of a fresh bucket."""
    name = f"bucket-{uuid.uuid4().hex}"
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(name)
    s3.reset()
    return f"s3://{name}"


@pytest.fixture(params=["local", "memory", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder at each backend."""
    if request.param == "local":
        return str(tmp_path / "base")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    return str(request.getfixturevalue("bucket"))


@pytest.fixture(params=["memory", "s3"])
def remote(request: pytest.FixtureRequest) -> str:
    """An empty folder at each backend that is cached."""
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    return str(request.getfixturevalue("bucket"))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, of which this process has used nothing; and no waiting between attempts."""
    monkeypatch.setenv("E2KD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("E2KD_CACHE_GIB", raising=False)
    monkeypatch.setattr(cache, "_used", {})
    monkeypatch.setattr(cache, "_held", set())
    monkeypatch.setattr(places, "FIRST_WAIT", 0.001)
    return tmp_path / "cache/objects"


class RemoteTools:
    """What tests of several files use."""

    @staticmethod
    def objects(where: str | Place) -> dict[str, bytes]:
        """Every object and its bytes."""
        found = place(where)
        return {name: found.read(name) for name in sorted(found.sizes())}

    @staticmethod
    def cached(folder: Path) -> dict[str, bytes]:
        """What the cache keeps; every copy is what its name says."""
        found = {file.name: file.read_bytes() for file in sorted(folder.glob("*"))}
        assert all(sha256(data).hexdigest() == name for name, data in found.items())
        return found

    @staticmethod
    def changed(data: bytes, position: int) -> bytes:
        other = bytearray(data)
        other[position] ^= 1
        return bytes(other)


@pytest.fixture(scope="session")
def remote_tools() -> type[RemoteTools]:
    return RemoteTools


@pytest.fixture
def upload(request: pytest.FixtureRequest) -> Callable[[Path, str], str]:
    """Copy a local folder's files to a URL, quicker than a Place does; returns the URL."""

    def copy(folder: Path, url: str) -> str:
        protocol, _, root = url.rpartition("://")
        if not protocol:
            return str(shutil.copytree(folder, url))
        for file in folder.rglob("*"):
            if file.is_file():
                path = f"{root}/{file.relative_to(folder)}"
                if protocol == "s3":
                    request.getfixturevalue("s3").put(*path.split("/", 1), file.read_bytes())
                else:
                    fsspec.filesystem(protocol).pipe_file(path, file.read_bytes())
        return url

    return copy
