"""Write files so that they are there whole or not at all, and replace none that is not ours."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

_ORPHAN = re.compile(r"~(?P<host>[0-9a-f]{8})\.(?:\d+\.)?(?P<pid>\d+)")
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
    with whole(target) as temporary:
        temporary.write_bytes(text.encode("utf-8", errors="surrogatepass"))


def remove_orphans(folder: Path) -> int:
    """Remove temporary files that dead processes of this host left in a folder; return how many."""
    removed = 0
    for path in folder.iterdir():
        found = _ORPHAN.search(path.name)
        if not found or found.end() != len(path.name) or found["host"] != host():
            continue
        if not _alive(int(found["pid"])):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


@contextlib.contextmanager
def try_folder(folder: Path, name: str) -> Iterator[None]:
    """Make a folder and try to write there; a block that raises finds it gone again if still empty.

    Raises:
        ValueError: naming `name`, where the folder cannot be made or written.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
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
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


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
            raise ValueError(f"{name}: {path} is there and no file that prototok may replace")
    with contextlib.suppress(_Enough), try_folder(path.parent, name):
        raise _Enough


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
