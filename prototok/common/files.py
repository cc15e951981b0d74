"""Write files so that they are there whole or not at all, and replace none that is not ours."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import itertools
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

_TEMPORARY = re.compile(r"~(?P<host>[0-9a-f]{8})\.(?:\d+\.)?(?P<pid>\d+)\Z")
_HEAD = 1 << 16  # bytes of a file that tell whose it is
_numbers = itertools.count()


def flush(path: Path) -> None:
    """Ask the system to put a file or a folder's entries on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put(temporary: Path, target: Path) -> None:
    """Give a finished file its name: on the disk first, then renamed, then its folder flushed."""
    flush(temporary)
    os.replace(temporary, target)
    flush(target.parent)


@contextlib.contextmanager
def whole(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` to write to; it takes that name when the block ends well.

    A block that raises leaves nothing behind, and `target` as it was.
    """
    # Cut, as a name may be 255 bytes long and the target's own may be that already.
    name = target.name.encode()[:128].decode(errors="ignore")
    temporary = target.parent / f".{name}~{host()}.{next(_numbers)}.{os.getpid()}"
    try:
        yield temporary
        put(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(target: Path, text: str) -> None:
    """Write UTF-8 without translating line ends; the file is there whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole(target) as temporary:
        temporary.write_bytes(text.encode("utf-8", errors="surrogatepass"))


def remove_orphans(folder: Path) -> int:
    """Remove temporary files that dead processes of this host left in a folder; return how many."""
    removed = 0
    for path in folder.iterdir():
        found = _TEMPORARY.search(path.name)
        if not found or found["host"] != host():
            continue
        if not _alive(int(found["pid"])):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def is_temporary(path: Path) -> bool:
    """Return True for a name that `whole` gives to a file before it is whole."""
    return path.name.startswith(".") and bool(_TEMPORARY.search(path.name))


@contextlib.contextmanager
def try_folder(
    folder: Path, name: str, alone: bool = False, check: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Make a folder and try to write there; a block that raises finds it gone again if still empty.

    Args:
        folder: to make; so are its parents.
        name: of the argument, for messages.
        alone: keep every other process that asks for the same out of the folder for as long.
        check: raises where the folder may not be written to; called before that is tried.

    Raises:
        ValueError: naming `name`, where the folder cannot be made or written, or is taken.
    """
    made: list[Path] = []
    handle = None
    try:
        try:
            _make(folder, made)
            handle = _claim(folder, name) if alone else None
            check()
            with whole(folder / "trial") as probe:
                probe.write_bytes(bytes(1 << 16))
                flush(probe)  # some file systems say that they are full no sooner than here
                raise _Enough
        except _Enough:
            pass
        except OSError as error:
            raise ValueError(
                f"{name}: {folder} cannot be written ({error.strerror or error})"
            ) from None
        yield
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    finally:
        if handle is not None:
            os.close(handle)  # and with it the claim


def _make(folder: Path, made: list[Path]) -> None:
    """Make a folder and its parents; what was not there, and only that, is added to `made`."""
    if folder.exists():
        return
    if folder.parent != folder:
        _make(folder.parent, made)
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():
            raise
        return  # another process was faster
    made.append(folder)


def _claim(folder: Path, name: str) -> int:
    """Lock a folder, which leaves no file in it; the lock goes with the process that holds it."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = os.path.samestat(os.fstat(handle), os.stat(folder))
    except (BlockingIOError, FileNotFoundError):  # taken, or just removed by who had it
        free = False
    except OSError:
        return handle  # a file system that locks no folders, as NFS
    if not free:
        os.close(handle)
        raise ValueError(f"{name}: another process is writing to {folder}")
    return handle


class _Enough(Exception):
    """Ends the trial of a folder before its file gets a name."""


def try_file(path: Path, name: str, ours: Callable[[bytes], bool]) -> None:
    """Check before the work that a file can be written after it.

    Args:
        path: of the file.
        name: of the argument, for the message.
        ours: tells from the first 64 KiB of a file that is there whether it is one of ours, which
            may be replaced.

    Raises:
        ValueError: a folder or another program's file is in the way, or its folder cannot be
            written.
    """
    if path.is_dir():
        raise ValueError(f"{name}: {path} is a folder, not the name of a file")
    if path.exists():
        if not path.is_file():
            raise ValueError(f"{name}: {path} is not a regular file")
        with open(path, "rb") as file:
            head = file.read(_HEAD)
        if not ours(head):
            raise ValueError(
                f"{name}: {path} is there and no file that prototok may replace; name a new one"
            )
    with contextlib.suppress(_Enough), try_folder(path.parent, name):
        raise _Enough


def for_arrow(path: Path) -> str:
    """Return a path as pyarrow takes it for a file whatever its name.

    It reads a `~` at the beginning as a home, and what stands in front of a `:` as a protocol.
    """
    return str(path.absolute())


@functools.cache
def host() -> str:
    """Return a short name of this host that does not give it away."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
