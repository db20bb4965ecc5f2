"""Where objects lie: a folder on this machine, or one behind an fsspec URL (memory://, s3://, gs://, hf://).

An object is there whole or not at all. Remote objects that are read by parts are copied to a bounded cache on this
machine (artifacts/cache.py) and checked on the way; one that does not fit there is read by ranges.
"""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
import stat
import tempfile
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from artifacts import cache
from artifacts.access import FULL, reading_from, writing_to
from artifacts.durable import appearing, check_inside, sweep, sync_folder
from artifacts.errors import PlaceError, WriteError
from artifacts.names import masked, secrets_in

T = TypeVar("T")

ATTEMPTS = 5
FIRST_WAIT = 0.2
"""Seconds before the second attempt of a failed remote call; doubles with each, plus up to as much at random."""

WRAPPERS = (
    "zip",
    "tar",
    "libarchive",
    "reference",
    "github",
    "git",
    "dir",
    "data",
    "generic",
    "jupyter",
    "dask",
)
"""Protocols of fsspec that wrap a file, another URL or a site: no folders of objects by themselves."""

OPEN_VIEWS = 128
"""Files held open per place: a big store has more objects than a process may open files."""

LARGEST_READ = 2**28
"""Bytes of an object that is read whole; larger ones are read by parts."""


class View(ABC):
    """The bytes of one object, read by parts."""

    @abstractmethod
    def __getitem__(self, part: slice) -> bytes:
        """The bytes start <= i < stop; fewer if the object ends before."""


class Reading(io.RawIOBase):
    """A view of `size` bytes as a file, so that what is hashed and what is parsed are the same bytes."""

    def __init__(self, view: View, size: int) -> None:
        super().__init__()
        self._view, self._size, self._at = view, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        part = (
            self._view[self._at : min(self._at + len(buffer), self._size)] if self._at < self._size else b""
        )
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


class Place(ABC):
    """A folder of objects, named by relative paths with slashes.

    `url` is its path or URL; `str(place)`, for messages and reports, is that without passwords.

    Whatever reads raises PlaceError if the object cannot be reached, whatever writes WriteError or PlaceError.
    """

    url: str

    def __init__(self, url: str) -> None:
        self.url = url
        self._views: OrderedDict[tuple[str, str], View] = OrderedDict()

    def __str__(self) -> str:
        return masked(self.url)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": OrderedDict()}  # open files do not travel to other processes

    def __truediv__(self, name: str) -> Place:
        return place(f"{self.url.rstrip('/')}/{name}")

    def exists(self, name: str) -> bool:
        return self.size(name) is not None

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes, or None if there is no such object."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Every object below this folder and its bytes."""

    def view(self, name: str, size: int, sha256: str) -> View:
        """Access to parts of the object that should have this size and checksum. Raises FileNotFoundError."""
        key = (name, sha256)
        view = self._views.pop(key, None) or self._view(name, size, sha256)
        self._views[key] = view
        if len(self._views) > OPEN_VIEWS:
            self._views.popitem(last=False)
        return view

    def reading(self, name: str, size: int, sha256: str) -> io.BufferedReader:
        """The same bytes as `view`, as a file. Raises FileNotFoundError."""
        return io.BufferedReader(Reading(self.view(name, size, sha256), size), 2**20)

    def distrust(self, name: str, sha256: str) -> bool:
        """Close the view; True where its bytes were a copy that is now dropped, so that reading again may help."""
        self._views.pop((name, sha256), None)
        return False

    @abstractmethod
    def _view(self, name: str, size: int, sha256: str) -> View: ...

    @abstractmethod
    def writing(self, name: str) -> AbstractContextManager[Path]:
        """A local file to fill; it becomes the object, durably, when the block ends well."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove the object if it is there."""

    def sweep(self) -> None:
        """Remove the partial files of processes that were killed."""
        return

    def write(self, name: str, data: bytes) -> None:
        with self.writing(name) as file:
            file.write_bytes(data)


Url = str | os.PathLike[str] | Place


def place(url: Url) -> Place:
    """The folder at a path or URL. Raises PlaceError if the URL's protocol needs a package that is not here."""
    if isinstance(url, Place):
        return url
    text = os.fspath(url).removeprefix("file://")
    if text.startswith("://"):
        raise PlaceError(f"{text} is no URL: it has no protocol", path=text)
    return RemotePlace(text) if "://" in text else LocalPlace(text)


class LocalPlace(Place):
    """A folder of this machine (or of a shared file system)."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.path = self.root = Path(url)

    def __truediv__(self, name: str) -> LocalPlace:
        """What lies below is written below the same root: no link leads out of it."""
        below = LocalPlace(f"{self.url.rstrip('/')}/{name}")
        below.root = self.root
        return below

    def __fspath__(self) -> str:
        return str(self.path)

    def read(self, name: str) -> bytes:
        file = self.path / name
        with reading_from(file), _no_way_through_a_file(), open(regular(file), "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            _bounded(str(file), size)
            return opened.read(LARGEST_READ)

    def size(self, name: str) -> int | None:
        file = self.path / name
        with reading_from(file):
            return file.stat().st_size if file.is_file() else None

    def sizes(self) -> dict[str, int]:
        sizes = {}
        with reading_from(self.path):
            for folder, _, names in os.walk(self.path, onerror=_not_listed):
                for name in names:
                    file = Path(folder, name)
                    size = _size(file)
                    if size is not None:
                        sizes[file.relative_to(self.path).as_posix()] = size
        return sizes

    def _view(self, name: str, size: int, sha256: str) -> View:
        return _File(self.path / name)

    def writing(self, name: str) -> AbstractContextManager[Path]:
        check_inside(self.root, self.path / name)
        return appearing(self.path / name)

    def remove(self, name: str) -> None:
        file = self.path / name
        check_inside(self.root, file)
        with writing_to(file), suppress(FileNotFoundError):
            file.unlink()
            sync_folder(file.parent)

    def sweep(self) -> None:
        for name in self.sizes():
            if name.endswith(".partial"):
                sweep(self.path / name)


def _bounded(name: str, size: int) -> None:
    """Raises PlaceError for an object that is too large to be read whole."""
    if size > LARGEST_READ:
        raise PlaceError(f"{name} has {size} bytes, which no record has; delete it", path=name)


def _size(file: Path) -> int | None:
    """None for a file that another process just renamed or removed, and for a link that leads nowhere."""
    try:
        return file.stat().st_size
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise


def regular(file: Path) -> int:
    """A file opened for reading, if it is one: a pipe would be waited for, a device read. Raises OSError."""
    handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return handle
    os.close(handle)
    code = errno.EISDIR if stat.S_ISDIR(mode) else errno.ENXIO
    raise OSError(code, "Is a directory" if code == errno.EISDIR else "it is not a regular file", str(file))


@contextmanager
def _no_way_through_a_file() -> Iterator[None]:
    """What would lie below a file is not there."""
    try:
        yield
    except NotADirectoryError as error:
        raise FileNotFoundError(*error.args, error.filename) from error


def _not_listed(error: OSError) -> None:
    """A folder that is not there holds nothing; one that may not be listed is no empty one."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


class RemotePlace(Place):
    """A folder behind an fsspec URL. Calls that fail are repeated with growing pauses."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._process, self._system = -1, None
        self._known: dict[str, int] = {}
        _ = self.system  # an unknown protocol is an error now

    @property
    def system(self) -> Any:
        """The fsspec file system: one per process, since its connections do not survive a fork."""
        if self._system is None or self._process != os.getpid():
            import fsspec

            protocol = self.url.split("://", 1)[0]
            if protocol in WRAPPERS:
                raise PlaceError(
                    f"cannot open {self}: {protocol}:// is no folder of objects; use a folder, s3://, gs:// or hf://",
                    path=self,
                )
            forked = self._system is not None
            try:
                self._system = fsspec.filesystem(
                    protocol,
                    use_listings_cache=False,
                    **({"skip_instance_cache": True} if forked else {}),
                )
            # TypeError: a protocol that needs a host
            except (ImportError, ValueError, TypeError) as error:
                raise PlaceError(f"cannot open {self}: {self._told(error)}", path=self) from None
            self._process = os.getpid()
        return self._system

    def read(self, name: str) -> bytes:
        # mostly known by a listing: asking for each of a thousand row lists would take a minute
        size = self._known.get(name, 0) or self.size(name)
        if size is None:
            raise FileNotFoundError(f"{self}/{name}")
        _bounded(f"{self}/{name}", size)
        return self._call(name, lambda path: self.system.cat_file(path))

    def size(self, name: str) -> int | None:
        self._known.pop(name, None)
        try:
            info = self._call(name, lambda path: self.system.info(path))
        except FileNotFoundError:
            return None
        if info["type"] != "file":
            return None
        self._known[name] = int(info["size"])
        return self._known[name]

    def sizes(self) -> dict[str, int]:
        try:
            objects = self._call("", lambda path: self.system.find(path, detail=True))
        except FileNotFoundError:
            return {}
        root = self.system._strip_protocol(self.url).rstrip("/") + "/"
        self._known = {path.removeprefix(root): int(about["size"]) for path, about in objects.items()}
        return dict(self._known)

    def _view(self, name: str, size: int, sha256: str) -> View:
        def fetch(file: Path) -> None:
            self._call(name, lambda path: self.system.get_file(path, str(file)))

        copy = cache.kept(sha256, size, fetch)
        return _File(copy) if copy else _Ranges(self, name)

    def distrust(self, name: str, sha256: str) -> bool:
        super().distrust(name, sha256)
        return cache.forget(sha256)

    def part(self, name: str, start: int, stop: int) -> bytes:
        return self._call(name, lambda path: self.system.cat_file(path, start=start, end=stop))

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        with _scratch() as folder:
            file = Path(folder, "object")
            with writing_to(file):
                file.touch()
                yield file
                self._call(name, lambda path: self._put(file, path))

    def remove(self, name: str) -> None:
        try:
            self._call(name, lambda path: self.system.rm_file(path))
        except FileNotFoundError:
            return

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_system": None, "_process": -1}

    def _put(self, file: Path, path: str) -> None:
        # S3 and GCS have no folders, and looking for them needs rights
        if not self.url.startswith(("s3://", "gs://")):
            self.system.makedirs(self.system._parent(path), exist_ok=True)
        if self.system.protocol[0] == "file":
            self._put_here(file, Path(path))
        else:
            self.system.put_file(str(file), path)
        arrived = int(self.system.info(path)["size"])
        if arrived != file.stat().st_size:
            self.system.rm_file(path)
            raise OSError(f"{arrived} of {file.stat().st_size} bytes arrived")

    def _put_here(self, file: Path, path: Path) -> None:
        """On a disk of this machine (`local://`): fsspec would write through links."""
        check_inside(Path(self.system._strip_protocol(self.url)), path)
        with appearing(path) as partial:
            shutil.copyfile(file, partial)

    def _told(self, error: Exception) -> str:
        """What a library says, without the secrets of the URL, which it may have cut in pieces."""
        said = str(error)
        for secret in secrets_in(self.url):
            said = said.replace(secret, "***")
        return said

    def _call(self, name: str, call: Callable[[str], T]) -> T:
        """Repeat a failing call; what cannot be mended by waiting is raised at once."""
        path = self.system._strip_protocol(f"{self.url.rstrip('/')}/{name}".rstrip("/"))
        wait = FIRST_WAIT
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call(path)
            except FileNotFoundError:
                raise
            except PermissionError as error:
                raise PlaceError(
                    f"no access to {self}/{name} ({self._told(error)}); check the credentials",
                    path=f"{self}/{name}",
                ) from None
            # each protocol has its own
            except Exception as error:
                # the disk of this machine
                if isinstance(error, OSError) and error.errno in FULL:
                    raise
                if attempt == ATTEMPTS:
                    raise PlaceError(
                        f"{self}/{name} failed {ATTEMPTS} times ({type(error).__name__}: {self._told(error)}); "
                        "check the address and the network, then run the same command again",
                        path=f"{self}/{name}",
                    ) from error
            time.sleep(wait * (1 + random.random()))
            wait *= 2
        raise AssertionError


def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for an object until it is sent. Raises WriteError if this machine has no place for one."""
    try:
        return tempfile.TemporaryDirectory(prefix="e2kd-")
    except OSError as error:
        raise WriteError(
            f"no folder for temporary files can be written ({error.strerror}); set TMPDIR to one that can",
            errno=error.errno,
        ) from error


class _File(View):
    """A local file, held open. Not mapped into memory: touching a mapped file that became shorter kills the process."""

    def __init__(self, file: Path) -> None:
        with reading_from(file), _no_way_through_a_file():
            self._handle = regular(file)
        self._file = file

    def __getitem__(self, part: slice) -> bytes:
        try:
            return os.pread(self._handle, part.stop - part.start, part.start)
        except OSError as error:
            raise PlaceError(f"cannot read {self._file}: {error.strerror}", path=self._file) from error

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)


class _Ranges(View):
    """A remote object, asked for by ranges."""

    def __init__(self, where: RemotePlace, name: str) -> None:
        self._where, self._name = where, name

    def __getitem__(self, part: slice) -> bytes:
        return self._where.part(self._name, part.start, part.stop)
