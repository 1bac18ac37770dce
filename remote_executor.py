#!/usr/bin/env python3
"""remote_executor: turns a host into a remote executor of scripts, by an HTTP/JSON API; one file, no dependency.

    python3 remote_executor.py run --addr=:2376

A task is a directed acyclic graph of steps; a step is one script. A pool runs the steps, each behind a small wrapper
that writes its pid and its result into the step's own directory, so that a step outlives the daemon that started it.

The file reads from top to bottom, a section uses only what stands above it:

    I    foundations       errors, time, options, threads, logging
    II   operating system  Windows API, own process, private files, network peers, system information, interpreters,
                           step processes, POSIX processes, Windows processes
    III  tasks             task model, submission, dependency plan, metrics, step directory, store, scheduler, runner,
                           recovery, janitor
    IV   HTTP              messages, request parser, routing, authentication, connections
    V    API               web pages, task API, operator API, profiling, API document
    VI   program           daemon, supervisors, service managers, command line

Words: a *task* is a graph of *steps*, each one script; its steps share a *workspace*, a directory of the task's own. A
*worker* is the thread of a running step, a *slot* its place in the pool. To *stop* a step ends its whole process tree
by force. A step that runs on without a daemon is *adopted* by the next one; it is *lost* when nobody can know how it
ended. What is damaged goes into *quarantine*, under another name. A *token* lets a client in; its *label* is the name
that the log gives it. A *wrapper* is the small shell that runs a step's script, and leaves its pid and its result on
disk.

Threads: `main` waits for signals; `listener` accepts connections; one `connection` a client, and two `reserve
connection` for when no more can be started; one `step` a running step; `store` commits, many changes at a time;
`timekeeper` enforces deadlines and limits of output; `sweeper` removes what has expired; `log` writes to standard
error. Under the service control manager of Windows `main` is its own, and another runs the daemon.
"""

from __future__ import annotations

import argparse
import bisect
import collections
import contextlib
import datetime
import email.utils
import errno
import functools
import gc
import graphlib
import heapq
import http
import io
import ipaddress
import itertools
import json
import logging
import logging.handlers
import os
import re
import select
import selectors
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from enum import Enum, IntEnum
from typing import Any, Callable, NamedTuple, Protocol, TextIO

__version__ = "1.0.0"

log = logging.getLogger("remote_executor")

# ======================================================================================================================
# I foundations / errors: what is refused, and as what
# ======================================================================================================================


class Code(IntEnum):
    """The `code` of an answer that is no refusal."""

    SUCCESS = 0
    IN_PROGRESS = 1001
    FAILED = 1002
    NOT_FOUND = 1003


class ApiError(Exception):
    """An answer that refuses: `status` is its HTTP status, `code` the code of its body, `headers` go with it."""

    status = 500
    code = 500
    headers: tuple[tuple[str, str], ...] = ()

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class NotFound(ApiError):
    status = 200  # clients of the original read the body; PowerShell's Invoke-RestMethod throws on a 4xx
    code = Code.NOT_FOUND


class Malformed(ApiError):
    status = code = 400


class Unauthorized(ApiError):
    status = code = 401
    headers = (("WWW-Authenticate", 'Bearer realm="remote_executor"'),)


class Forbidden(ApiError):
    status = code = 403


class NoRoute(ApiError):
    status = code = 404


class WrongMethod(ApiError):
    status = code = 405

    def __init__(self, message: str, methods: Sequence[str]) -> None:
        super().__init__(message)
        self.methods = methods
        self.headers = (("Allow", ", ".join(methods)),)


class Conflict(ApiError):
    status = code = 409


class TooLarge(ApiError):
    status = code = 413


class TooMany(ApiError):
    status = code = 429
    headers = (("Retry-After", "1"),)


class MustWait(TooMany):
    headers = (("Retry-After", "60"),)


class Unavailable(ApiError):
    status = code = 503


class StorageFull(ApiError):
    status = code = 507


class LaunchError(Exception):
    """A step could not start; the text is its reason."""


class StartupError(Exception):
    """The daemon cannot start; the text is the one line that says why."""


class NotInstalled(StartupError):
    """This host has no service of ours."""


class UsageError(Exception):
    """What was typed cannot be meant; the text is the one line that says what can."""


# ======================================================================================================================
# I foundations / time: a clock that never jumps, Go's durations, RFC 3339
# ======================================================================================================================

_SECOND_NS = 10**9


class Clock:
    """The daemon's time in nanoseconds since the epoch, which never jumps; any thread may ask.

    Every stored time is of this clock, so that timeouts and expiry do not care what happens to the wall clock.
    `offset_ns` is what the wall clock says beyond it; it is added where a time is shown.
    """

    def __init__(self, base_ns: int, offset_ns: int = 0) -> None:
        self.base_ns = base_ns  # what the monotonic clock, which starts anew with each boot, lacks
        self._offset_ns = offset_ns

    @classmethod
    def resume(cls, memory: Mapping[str, str], latest_ns: int) -> Clock:
        """The clock of an earlier daemon that left this memory, or a new one; `latest_ns` is the last stored time."""
        wall_ns, monotonic_ns = time.time_ns(), time.monotonic_ns()
        offset_ns = 0
        with contextlib.suppress(KeyError, ValueError):  # the first start, or a damaged memory
            offset_ns, base_ns = int(memory["clock_offset_ns"]), int(memory["clock_base_ns"])
            if memory["boot"] == boot_id():
                return cls(base_ns, offset_ns)
        return cls(max(latest_ns, wall_ns - offset_ns) - monotonic_ns, offset_ns)

    def memory(self) -> dict[str, str]:
        """What `resume` needs."""
        return {
            "boot": boot_id(),
            "clock_base_ns": str(self.base_ns),
            "clock_offset_ns": str(self.offset_ns()),
        }

    def now_ns(self) -> int:
        return time.monotonic_ns() + self.base_ns

    def monotonic_s(self, at_ns: int) -> float:
        """The moment as time.monotonic() will tell it."""
        return (at_ns - self.base_ns) / _SECOND_NS

    def offset_ns(self) -> int:
        """What to add to show a time. It changes only when the wall clock was set: a time shown stays what it was."""
        offset_ns = time.time_ns() - self.now_ns()
        if abs(offset_ns - self._offset_ns) > _SECOND_NS:
            self._offset_ns = offset_ns
        return self._offset_ns


@functools.lru_cache(maxsize=1)
def boot_id() -> str:
    """What this boot of the host has and no other; a date where the system has no such word."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
    booted_s = time.time() - time.monotonic()
    return f"about {round(booted_s / 600)}"  # the wall clock drifts, hence the coarse grain


_UNIT_NS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_DURATION_PART = re.compile(r"(?=\.?[0-9])([0-9]*)(?:\.([0-9]*))?(ns|us|µs|μs|ms|s|m|h)")
_MAX_NS = 2**63 - 1


def parse_duration(text: str) -> int:
    """The nanoseconds of a duration that is not negative, as Go's time.ParseDuration reads it; raises ValueError."""
    rest = text[1:] if text.startswith("+") else text
    total, end = 0, 0
    while part := _DURATION_PART.match(rest, end):
        whole, fraction, unit = part.groups()
        total += int(whole or 0) * _UNIT_NS[unit] + int(fraction or 0) * _UNIT_NS[unit] // 10 ** len(fraction or "")
        end = part.end()
    if rest != "0" and (not rest or end < len(rest) or total > _MAX_NS):
        raise ValueError(f"{text!r} is no duration; right would be 90s, 1h30m or 500ms")
    return total


def format_duration(ns: int) -> str:
    """A duration of 0 ns or more as Go's time.Duration prints it: 47h53m30.619752642s, 1.5ms, 0s."""
    if ns < 10**9:
        for unit, scale in (("ms", 10**6), ("µs", 10**3)):
            if ns >= scale:
                return _decimal(ns, scale) + unit
        return f"{ns}ns" if ns else "0s"
    seconds, rest = divmod(ns, 10**9)
    minutes, seconds = divmod(seconds, 60)
    text = f"{seconds}.{rest:09d}".rstrip("0").rstrip(".") if rest else str(seconds)
    if not minutes:
        return f"{text}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{text}s" if hours else f"{minutes}m{text}s"


def _decimal(value: int, scale: int) -> str:
    whole, rest = divmod(value, scale)
    return f"{whole}.{rest:0{len(str(scale)) - 1}d}".rstrip("0") if rest else str(whole)


@functools.lru_cache(maxsize=4096)
def format_time(seconds: int) -> str:
    """A moment, in whole seconds since the epoch, as RFC 3339 with the local offset."""
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat()


# ======================================================================================================================
# I foundations / options: the table of flags, how a value of each kind is read, the settings
# ======================================================================================================================


class Option(NamedTuple):
    """A flag: its name as the help shows it, the kind of its value, its default, what it is for."""

    name: str
    kind: str  # flag, address, path, duration, count, size or one of `choices`
    default: str
    help: str
    min: int = 0
    max: int = 2**63 - 1
    choices: tuple[str, ...] = ()

    @property
    def field(self) -> str:
        """Its attribute in Settings."""
        return self.name.replace("-", "_")


OPTIONS = (
    Option("addr", "address", ":2376", "host:port for execution."),
    Option("debug", "flag", "", "Enable debug messages"),
    Option("log_format", "choice", "text", "How the log is written: text or json.", choices=("text", "json")),
    Option("root", "path", "$TEMP/remote_executor", "Working root directory"),
    Option("key_expire", "duration", "48h", 'Set the database key expire time. Example: "key_expire=1h"', min=1),
    Option("exec_timeout", "duration", "24h", 'Set the exec command expire time. Example: "exec_timeout=30m"', min=1),
    Option("timeout", "duration", "30s", "Timeout for calling endpoints on the engine", min=1),
    Option("profile_timeout", "duration", "1m", "Longest time that a profile or trace may take.", min=1),
    Option("max-requests", "count", "0", "Maximum number of concurrent requests. 0 to disable."),
    Option("pool_size", "count", "30", "Set the size of the execution work pool.", min=1, max=10000),
    Option("max_body", "size", "16MiB", "Largest body of a request. Larger ones get 413.", min=1),
    Option("max_output", "size", "1GiB", "Largest output of a step, which is then stopped. 0 to disable."),
    Option("token_file", "path", "$ROOT/token", "File of the tokens that let clients in, one a line."),
    Option("require_token", "flag", "", "Ask for a token from clients on this host too."),
    Option("insecure", "flag", "", "Let everybody in without a token: whoever reaches the port runs code here."),
    Option("cors_origin", "list", "", "Origin of a web page that may call the API. Repeatable."),
    Option("tls_cert", "path", "", "Certificate of this host, in PEM: with it the port speaks HTTPS alone."),
    Option("tls_key", "path", "", "Private key of the certificate, where it is in a file of its own."),
    Option("tls_client_ca", "path", "", "Authority whose client certificates let in as tokens do, in PEM."),
    Option("max_connections", "count", "512", "Most connections at once, of which 64 from one address.", min=16),
    Option(
        "on_exit",
        "choice",
        "leave",
        "What an orderly exit does with running steps: leave, wait or stop.",
        choices=("leave", "wait", "stop"),
    ),
)


class Settings(NamedTuple):
    """The value of every option; durations in nanoseconds, sizes in bytes."""

    addr: str
    debug: bool
    log_format: str
    root: str
    key_expire: int
    exec_timeout: int
    timeout: int
    profile_timeout: int
    max_requests: int
    pool_size: int
    max_body: int
    max_output: int
    token_file: str
    require_token: bool
    insecure: bool
    cors_origin: tuple[str, ...]
    tls_cert: str
    tls_key: str
    tls_client_ca: str
    max_connections: int
    on_exit: str


def parse_address(text: str) -> tuple[str, int]:
    """Host, empty for every address, and port of host:port, [::1]:port or tcp://host:port; raises ValueError."""
    found = re.fullmatch(r"(?:tcp://)?(?:\[([0-9A-Fa-f:.]+(?:%\w+)?)\]|([^\s:/\[\]]*)):([0-9]{1,5})", text)
    if not found or int(found[3]) > 65535:
        raise ValueError(f"{text!r} is no address; right would be :2376, 127.0.0.1:2376 or [::1]:2376")
    return found[1] or found[2] or "", int(found[3])


_SIZE = re.compile(r"([0-9]{1,15}) ?(?:([KMGT])i?)?B?", re.IGNORECASE)


def _checked_text(option: Option, text: str) -> str:
    try:
        value = _value(option, text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if isinstance(value, int) and not option.min <= value <= option.max:
        most = f" to {option.max}" if option.max < 2**63 - 1 else " or more"
        least = "more than 0" if option.kind != "count" and option.min else f"{option.min}{most}"
        raise argparse.ArgumentTypeError(f"{text!r} is out of range; right would be {least}")
    return text


def _value(option: Option, text: str) -> Any:
    """The value of a flag; raises ValueError that says what would be right."""
    if option.kind == "duration":
        return parse_duration(text)
    if option.kind == "count" or option.kind == "size":
        found = _SIZE.fullmatch(text) if option.kind == "size" else re.fullmatch("([0-9]{1,15})()", text)
        if not found:
            right = "a size such as 16MiB or 1GiB" if option.kind == "size" else "a number such as 30"
            raise ValueError(f"{text!r} is no {option.kind}; right would be {right}")
        return int(found[1]) << 10 * " KMGT".index((found[2] or " ").upper())
    if option.kind == "choice" and text not in option.choices:
        raise ValueError(f"{text!r} is none of {', '.join(option.choices)}")
    if option.kind == "address":
        parse_address(text)
    if option.kind == "list" and not re.fullmatch(r"https?://[^/\s]+", text):
        raise ValueError(f"{text!r} is no origin; right would be https://example.org")
    if not text:
        raise ValueError("must not be empty")
    return text


def make_settings(given: Mapping[str, Any]) -> Settings:
    """The settings with what was given in place of the defaults; raises UsageError for what cannot be together."""
    settings = Settings(**{option.field: _setting(option, given) for option in OPTIONS})
    for name in ("tls_key", "tls_client_ca"):
        if getattr(settings, name) and not settings.tls_cert:
            raise UsageError(f"--{name} without --tls_cert; give the certificate of this host too")
    if settings.insecure and settings.require_token:
        raise UsageError("--insecure and --require_token exclude each other; give one of them")
    return settings


def _setting(option: Option, given: Mapping[str, Any]) -> Any:
    if option.kind == "flag":
        return given.get(option.field, False)
    if option.kind == "list":
        return tuple(_value(option, text) for text in given.get(option.field, ()))
    text = given.get(option.field, _default(option))
    return _value(option, text) if text or option.default else ""


def temporary_directory() -> str:
    return tempfile.gettempdir()


def _default(option: Option) -> str:
    return option.default.replace("$TEMP", temporary_directory())


MAX_POOL_SIZE = next(option.max for option in OPTIONS if option.name == "pool_size")

# ======================================================================================================================
# I foundations / threads: one that begins, or says that it cannot
# ======================================================================================================================

_THREAD_START_S = 1.0  # within which a thread begins, on a loaded host too


class DaemonThread(threading.Thread):
    """A daemon thread that begins, or `start` raises RuntimeError, and then its target never runs.

    Thread.start() waits for ever for one that memory failed in its first frames (CPython's issue 140746): seen in 2 of
    12 runs under `ulimit -v 150000`, each time of the thread that accepts connections.
    """

    def __init__(self, target: Callable[..., Any], name: str, args: tuple[Any, ...] = ()) -> None:
        super().__init__(target=target, name=name, args=args, daemon=True)
        self._started = _BoundedEvent()  # Thread's own, which `start` waits for
        self._claims = [True]  # one, for who comes first: the thread that begins, or `start` that gives it up

    def start(self) -> None:
        super().start()
        if self.ident is not None:
            return
        with contextlib.suppress(IndexError):  # it has begun after all
            self._claims.pop()
            raise RuntimeError("can't start new thread: it has not begun in time")

    def run(self) -> None:
        try:
            self._claims.pop()
        except IndexError:
            return
        super().run()


class _BoundedEvent(threading.Event):
    def wait(self, timeout: float | None = _THREAD_START_S) -> bool:
        return super().wait(timeout)


# ======================================================================================================================
# I foundations / logging: how a record is written, to a stream that nobody may read and to a file that rotates
# ======================================================================================================================


class LineFormatter(logging.Formatter):
    """Writes a record so that nothing in it ends its line, colours it or turns it round."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = _printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "\n".join(_printable(line) for line in super().formatException(ei).split("\n"))


def _printable(text: str) -> str:
    """The text with escapes in place of control characters and of others that do not show."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


class JsonLines(logging.Formatter):
    """An event as a JSON object in a line: its time, level, text and thread, and what it is about."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
        event = {"time": at, "level": record.levelname, "message": record.getMessage(), "thread": record.threadName}
        event.update(getattr(record, "log_fields", {}))
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event)  # in ASCII, which every collector and every locale takes


_MAX_UNWRITTEN = 2**20  # characters, some thousand lines
_FLUSH_S = 1.0
_STREAM_RETRY_S = 0.05
_LOG_STACK_BYTES = 512 * 1024  # it calls nothing deep; the usual 8 MB are what `ulimit -v` lacks first


class ErrorStream(logging.Handler):
    """The log on standard error, written by a thread of its own: nobody waits for whoever does not read there.

    What finds no room in `_MAX_UNWRITTEN` is dropped and counted; one line tells how many when the stream takes lines
    again.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        binary = getattr(stream, "buffer", None)
        # Not by the buffer: its lock, held by a write that never ends, would abort the end of the interpreter.
        self._file: Any = getattr(binary, "raw", binary) or stream
        self._encoding = stream.encoding or "utf-8"
        self._is_text = binary is None
        self._changed = threading.Condition()  # guards all below
        self._unwritten: collections.deque[str] = collections.deque()  # the first is being written
        self._size = 0  # characters in it
        self._dropped = 0
        self._is_stuck = False  # whether the last flush had to give up

    def start(self) -> None:
        """Writes lines from now on; for the thread that runs the daemon, before it starts others."""
        usual = threading.stack_size(_LOG_STACK_BYTES)
        try:
            DaemonThread(self._run, "log").start()
        finally:
            threading.stack_size(usual)

    def emit(self, record: logging.LogRecord) -> None:
        """Leaves a line to the thread; formatted here, for what it tells of may change."""
        try:
            line = self.format(record)
        except Exception:
            line = f"a line cannot be formatted: {logging.Formatter().formatException(sys.exc_info())}"
        with self._changed:
            if self._size + len(line) > _MAX_UNWRITTEN:
                self._dropped += 1
            else:
                self._unwritten.append(line)
                self._size += len(line)
                self._changed.notify_all()

    def flush(self) -> None:
        """Waits until all is written, unless the stream takes nothing for a second."""
        with self._changed:
            while self._unwritten and not self._is_stuck:
                left = len(self._unwritten)
                if not self._changed.wait_for(lambda left=left: len(self._unwritten) < left, _FLUSH_S):  # type: ignore[misc]
                    self._is_stuck = True

    def _run(self) -> None:
        while True:
            try:
                self._write_next()
            except Exception:
                with contextlib.suppress(MemoryError):
                    log.exception("a line of the log cannot be written")
                time.sleep(_STREAM_RETRY_S)

    def _write_next(self) -> None:
        """Writes the next line when there is one; what cannot be written counts as dropped."""
        with self._changed:
            self._changed.wait_for(lambda: self._unwritten)
            line = self._unwritten[0]
        is_written = self.write(line)
        with self._changed:
            self._unwritten.popleft()
            self._size -= len(line)
            self._dropped += not is_written
            self._is_stuck = self._is_stuck and not is_written
            if self._dropped and is_written and not self._unwritten:
                text = f"{self._dropped} lines of the log were dropped: nobody read standard error"
                record = log.makeRecord(log.name, logging.WARNING, "", 0, text, (), None)
                self._unwritten.append(self.format(record))
                self._size += len(self._unwritten[-1])
                self._dropped = 0
            self._changed.notify_all()

    def write(self, line: str) -> bool:
        """Writes a line now, however long that takes; False when it cannot be written."""
        try:
            if self._is_text:
                self._file.write(line + "\n")
                return True
            data = memoryview((line + os.linesep).encode(self._encoding, "backslashreplace"))
            while data:
                written = self._file.write(data)
                if written is None:  # whoever shares the stream made it non-blocking
                    time.sleep(_STREAM_RETRY_S)
                else:
                    data = data[written:]
        except (OSError, ValueError):  # it is closed, or nobody reads it any more
            return False
        return True


_ROTATION_PAUSE_S = 60.0  # after one that could not be


class LogFile(logging.handlers.RotatingFileHandler):
    """The log in a file, rotated; where it cannot be written, it goes on without."""

    def __init__(self, path: str) -> None:
        super().__init__(path, maxBytes=10 * 2**20, backupCount=5, encoding="utf-8", delay=True)
        self._resume_s = 0.0  # when it may be rotated again

    def shouldRollover(self, record: logging.LogRecord) -> int:
        return time.monotonic() >= self._resume_s and super().shouldRollover(record)

    def doRollover(self) -> None:
        """Rotates, unless somebody reads the file: Windows would not rename it, after all older ones had moved on."""
        if self.stream:
            self.stream.close()
            self.stream = None  # opened again for the next line
        try:
            os.rename(self.baseFilename, self.baseFilename + ".next")
            os.rename(self.baseFilename + ".next", self.baseFilename)
            super().doRollover()
        except OSError:
            self._resume_s = time.monotonic() + _ROTATION_PAUSE_S

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: standard error has the line too."""

    def restore(self) -> None:
        """Begins the file anew where it has been deleted."""
        if os.path.exists(self.baseFilename):
            return
        with self.lock or contextlib.nullcontext():
            if self.stream:
                self.stream.close()
                self.stream = None  # opened again for the next line
            with contextlib.suppress(OSError):  # it is there, or the root is gone too, which its watch tells
                os.mkdir(os.path.dirname(self.baseFilename))


# ======================================================================================================================
# II operating system / Windows API: constants, structures and prototypes
# ======================================================================================================================

ON_WINDOWS = sys.platform == "win32"
ON_LINUX = sys.platform.startswith("linux")


if ON_WINDOWS:
    import ctypes
    from ctypes import wintypes

    _library, _last_error, _error_of = (vars(ctypes)[name] for name in ("WinDLL", "get_last_error", "WinError"))

    def _declare(library: Any, name: str, result: Any, *arguments: Any) -> Any:
        """A function of a system library; a result of 0 raises OSError."""
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
        function.errcheck = _checked
        return function

    def _checked(result: Any, _function: Any, _arguments: Any) -> Any:
        if not result:
            raise _error_of(_last_error())
        return result

    def _checked_file(result: Any, _function: Any, _arguments: Any) -> Any:
        if result == INVALID_HANDLE_VALUE:
            raise _error_of(_last_error())
        return result

    _kernel32 = _library("kernel32", use_last_error=True)
    _HANDLE, _BOOL, _DWORD, _TEXT = wintypes.HANDLE, wintypes.BOOL, wintypes.DWORD, wintypes.LPCWSTR
    _TIME = ctypes.POINTER(wintypes.FILETIME)

    # Processes (Process and Thread Functions)
    SYNCHRONIZE = 0x0010_0000
    PROCESS_TERMINATE, PROCESS_DUP_HANDLE, PROCESS_SET_QUOTA = 0x0001, 0x0040, 0x0100
    PROCESS_SUSPEND_RESUME, PROCESS_QUERY_LIMITED_INFORMATION = 0x0800, 0x1000
    CREATE_SUSPENDED, CREATE_NO_WINDOW = 0x0000_0004, 0x0800_0000
    OpenProcess = _declare(_kernel32, "OpenProcess", _HANDLE, _DWORD, _BOOL, _DWORD)
    GetCurrentProcess = _declare(_kernel32, "GetCurrentProcess", _HANDLE)
    GetProcessTimes = _declare(_kernel32, "GetProcessTimes", _BOOL, _HANDLE, _TIME, _TIME, _TIME, _TIME)
    GetExitCodeProcess = _declare(_kernel32, "GetExitCodeProcess", _BOOL, _HANDLE, ctypes.POINTER(ctypes.c_int32))
    TerminateProcess = _declare(_kernel32, "TerminateProcess", _BOOL, _HANDLE, wintypes.UINT)
    NtResumeProcess = _library("ntdll").NtResumeProcess  # for Popen has closed the handle that ResumeThread takes
    NtResumeProcess.argtypes = (_HANDLE,)
    SetDllDirectoryW = _declare(_kernel32, "SetDllDirectoryW", _BOOL, _TEXT)
    GetProcessHandleCount = _declare(_kernel32, "GetProcessHandleCount", _BOOL, _HANDLE, ctypes.POINTER(_DWORD))

    class ProcessMemory(ctypes.Structure):
        """PROCESS_MEMORY_COUNTERS_EX."""

        _fields_ = [("Size", _DWORD), ("PageFaultCount", _DWORD)] + [
            (name, ctypes.c_size_t)
            for name in ("PeakWorkingSet", "WorkingSet", "PeakPagedPool", "PagedPool", "PeakNonPagedPool")
            + ("NonPagedPool", "Pagefile", "PeakPagefile", "Private")
        ]

    GetProcessMemoryInfo = _declare(
        _kernel32, "K32GetProcessMemoryInfo", _BOOL, _HANDLE, ctypes.POINTER(ProcessMemory), _DWORD
    )

    # Handles and waits (Synchronization Functions)
    DUPLICATE_SAME_ACCESS, WAIT_OBJECT_0, WAIT_FAILED = 2, 0, 0xFFFF_FFFF
    ERROR_MORE_DATA = 234
    CloseHandle = _declare(_kernel32, "CloseHandle", _BOOL, _HANDLE)
    GENERIC_READ, OPEN_EXISTING, INVALID_HANDLE_VALUE = 0x8000_0000, 3, ctypes.c_void_p(-1).value
    CreateFileW = _kernel32.CreateFileW
    CreateFileW.argtypes = (_TEXT, _DWORD, _DWORD, ctypes.c_void_p, _DWORD, _DWORD, _HANDLE)
    CreateFileW.restype, CreateFileW.errcheck = _HANDLE, _checked_file
    CreateEventW = _declare(_kernel32, "CreateEventW", _HANDLE, ctypes.c_void_p, _BOOL, _BOOL, _TEXT)
    SetEvent = _declare(_kernel32, "SetEvent", _BOOL, _HANDLE)
    WaitForMultipleObjects = _kernel32.WaitForMultipleObjects
    WaitForMultipleObjects.argtypes = (_DWORD, ctypes.POINTER(_HANDLE), _BOOL, _DWORD)
    WaitForMultipleObjects.restype = _DWORD
    DuplicateHandle = _declare(
        _kernel32, "DuplicateHandle", _BOOL, _HANDLE, _HANDLE, _HANDLE, ctypes.POINTER(_HANDLE), _DWORD, _BOOL, _DWORD
    )

    # Job Objects
    JOB_OBJECT_QUERY, JOB_OBJECT_ALL_ACCESS = 0x0004, 0x001F_003F
    JOB_OBJECT_BASIC_ACCOUNTING_INFORMATION, JOB_OBJECT_BASIC_PROCESS_ID_LIST = 1, 3  # of JOBOBJECTINFOCLASS
    JOB_OBJECT_EXTENDED_LIMIT_INFORMATION = 9
    JOB_OBJECT_LIMIT_DIE_ON_UNHANDLED_EXCEPTION, JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE = 0x0400, 0x2000

    class JobAccounting(ctypes.Structure):
        """JOBOBJECT_BASIC_ACCOUNTING_INFORMATION."""

        _fields_ = (
            *((name, ctypes.c_int64) for name in ("TotalUser", "TotalKernel", "PeriodUser", "PeriodKernel")),
            *((name, _DWORD) for name in ("PageFaults", "Processes", "ActiveProcesses", "TerminatedProcesses")),
        )

    class JobLimits(ctypes.Structure):
        """JOBOBJECT_EXTENDED_LIMIT_INFORMATION, with the basic limits and the IO_COUNTERS in it."""

        _fields_ = (
            ("PerProcessUserTimeLimit", ctypes.c_int64),
            ("PerJobUserTimeLimit", ctypes.c_int64),
            ("LimitFlags", _DWORD),
            ("MinimumWorkingSetSize", ctypes.c_size_t),
            ("MaximumWorkingSetSize", ctypes.c_size_t),
            ("ActiveProcessLimit", _DWORD),
            ("Affinity", ctypes.c_size_t),
            ("PriorityClass", _DWORD),
            ("SchedulingClass", _DWORD),
            ("IoInfo", ctypes.c_uint64 * 6),
            ("Memory", ctypes.c_size_t * 4),
        )

    CreateJobObjectW = _declare(_kernel32, "CreateJobObjectW", _HANDLE, ctypes.c_void_p, _TEXT)
    OpenJobObjectW = _declare(_kernel32, "OpenJobObjectW", _HANDLE, _DWORD, _BOOL, _TEXT)
    AssignProcessToJobObject = _declare(_kernel32, "AssignProcessToJobObject", _BOOL, _HANDLE, _HANDLE)
    TerminateJobObject = _declare(_kernel32, "TerminateJobObject", _BOOL, _HANDLE, wintypes.UINT)
    SetInformationJobObject = _declare(
        _kernel32, "SetInformationJobObject", _BOOL, _HANDLE, ctypes.c_int, ctypes.c_void_p, _DWORD
    )
    QueryInformationJobObject = _declare(
        _kernel32, "QueryInformationJobObject", _BOOL, _HANDLE, ctypes.c_int, ctypes.c_void_p, _DWORD, ctypes.c_void_p
    )

    # Access control (Security Functions, Security Descriptor Definition Language)
    _advapi32 = _library("advapi32", use_last_error=True)
    _VOID, _OUT = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
    TOKEN_QUERY, TOKEN_USER, SDDL_REVISION_1 = 0x0008, 1, 1
    OWNER_SECURITY_INFORMATION, DACL_SECURITY_INFORMATION = 0x0000_0001, 0x0000_0004
    PROTECTED_DACL_SECURITY_INFORMATION = 0x8000_0000  # it inherits nothing
    LocalFree = _kernel32.LocalFree
    LocalFree.argtypes = (_VOID,)
    OpenProcessToken = _declare(_advapi32, "OpenProcessToken", _BOOL, _HANDLE, _DWORD, ctypes.POINTER(_HANDLE))
    GetTokenInformation = _declare(
        _advapi32, "GetTokenInformation", _BOOL, _HANDLE, ctypes.c_int, _VOID, _DWORD, ctypes.POINTER(_DWORD)
    )
    ConvertSidToStringSidW = _declare(_advapi32, "ConvertSidToStringSidW", _BOOL, _VOID, ctypes.POINTER(_TEXT))
    ConvertStringSecurityDescriptorToSecurityDescriptorW = _declare(
        _advapi32, "ConvertStringSecurityDescriptorToSecurityDescriptorW", _BOOL, _TEXT, _DWORD, _OUT, _VOID
    )
    ConvertSecurityDescriptorToStringSecurityDescriptorW = _declare(
        _advapi32,
        "ConvertSecurityDescriptorToStringSecurityDescriptorW",
        *(_BOOL, _VOID, _DWORD, _DWORD, ctypes.POINTER(_TEXT), _VOID),
    )
    GetSecurityDescriptorOwner = _declare(
        _advapi32, "GetSecurityDescriptorOwner", _BOOL, _VOID, _OUT, ctypes.POINTER(_BOOL)
    )
    GetFileSecurityW = _declare(
        _advapi32, "GetFileSecurityW", _BOOL, _TEXT, _DWORD, _VOID, _DWORD, ctypes.POINTER(_DWORD)
    )
    SetFileSecurityW = _declare(_advapi32, "SetFileSecurityW", _BOOL, _TEXT, _DWORD, _VOID)

    # Processes of the host (Tool Help Functions)
    TH32CS_SNAPPROCESS = 2

    class ProcessEntry(ctypes.Structure):
        """PROCESSENTRY32W."""

        _fields_ = (
            ("Size", _DWORD),
            ("Usage", _DWORD),
            ("ProcessID", _DWORD),
            ("DefaultHeapID", ctypes.c_size_t),
            ("ModuleID", _DWORD),
            ("Threads", _DWORD),
            ("ParentProcessID", _DWORD),
            ("PriClassBase", ctypes.c_long),
            ("Flags", _DWORD),
            ("ExeFile", ctypes.c_wchar * 260),
        )

    CreateToolhelp32Snapshot = _declare(_kernel32, "CreateToolhelp32Snapshot", _HANDLE, _DWORD, _DWORD)
    Process32FirstW, Process32NextW = _kernel32.Process32FirstW, _kernel32.Process32NextW
    Process32FirstW.argtypes = Process32NextW.argtypes = (_HANDLE, ctypes.POINTER(ProcessEntry))

    # Services: the side of a service (Service Functions)
    SERVICE_WIN32_OWN_PROCESS = 0x10
    SERVICE_STOPPED, SERVICE_START_PENDING, SERVICE_STOP_PENDING, SERVICE_RUNNING = 1, 2, 3, 4
    SERVICE_CONTROL_STOP, SERVICE_CONTROL_INTERROGATE, SERVICE_CONTROL_PRESHUTDOWN = 1, 4, 15
    SERVICE_ACCEPT_STOP, SERVICE_ACCEPT_PRESHUTDOWN = 0x001, 0x100
    ERROR_CALL_NOT_IMPLEMENTED, ERROR_SERVICE_SPECIFIC_ERROR = 120, 1066
    ERROR_FAILED_SERVICE_CONTROLLER_CONNECT = 1063  # of a process that no service control manager started

    class ServiceStatus(ctypes.Structure):
        """SERVICE_STATUS_PROCESS; its first seven fields are SERVICE_STATUS."""

        _fields_ = (
            ("ServiceType", _DWORD),
            ("CurrentState", _DWORD),
            ("ControlsAccepted", _DWORD),
            ("Win32ExitCode", _DWORD),
            ("ServiceSpecificExitCode", _DWORD),
            ("CheckPoint", _DWORD),
            ("WaitHint", _DWORD),  # milliseconds
            ("ProcessId", _DWORD),
            ("ServiceFlags", _DWORD),
        )

    _function_type: Any = vars(ctypes)["WINFUNCTYPE"]
    ServiceMain = _function_type(None, _DWORD, ctypes.c_void_p)
    ServiceHandler = _function_type(_DWORD, _DWORD, _DWORD, ctypes.c_void_p, ctypes.c_void_p)

    class ServiceEntry(ctypes.Structure):
        """SERVICE_TABLE_ENTRYW."""

        _fields_ = (("ServiceName", _TEXT), ("ServiceProc", ServiceMain))

    _STATUS = ctypes.POINTER(ServiceStatus)
    StartServiceCtrlDispatcherW = _declare(
        _advapi32, "StartServiceCtrlDispatcherW", _BOOL, ctypes.POINTER(ServiceEntry)
    )
    RegisterServiceCtrlHandlerExW = _declare(
        _advapi32, "RegisterServiceCtrlHandlerExW", _HANDLE, _TEXT, ServiceHandler, ctypes.c_void_p
    )
    SetServiceStatus = _declare(_advapi32, "SetServiceStatus", _BOOL, _HANDLE, _STATUS)

    # Services: the side of who installs and controls them
    SC_MANAGER_CONNECT, SC_MANAGER_CREATE_SERVICE, SERVICE_ALL_ACCESS, SERVICE_QUERY_STATUS = 1, 2, 0xF01FF, 4
    SERVICE_AUTO_START, SERVICE_ERROR_NORMAL, SC_STATUS_PROCESS_INFO = 2, 1, 0
    SERVICE_CONFIG_DESCRIPTION, SERVICE_CONFIG_FAILURE_ACTIONS = 1, 2
    SERVICE_CONFIG_FAILURE_ACTIONS_FLAG, SERVICE_CONFIG_PRESHUTDOWN_INFO = 4, 7
    SC_ACTION_RESTART = 1
    ERROR_ACCESS_DENIED, ERROR_SERVICE_ALREADY_RUNNING, ERROR_SERVICE_DOES_NOT_EXIST = 5, 1056, 1060
    ERROR_SERVICE_NOT_ACTIVE, ERROR_SERVICE_EXISTS, ERROR_SERVICE_NEVER_STARTED = 1062, 1073, 1077

    class ServiceAction(ctypes.Structure):
        """SC_ACTION; the delay is in milliseconds."""

        _fields_ = (("Type", ctypes.c_int), ("Delay", _DWORD))

    class ServiceFailureActions(ctypes.Structure):
        """SERVICE_FAILURE_ACTIONSW; the reset period is in seconds."""

        _fields_ = (
            ("ResetPeriod", _DWORD),
            ("RebootMsg", _TEXT),
            ("Command", _TEXT),
            ("Actions", _DWORD),
            ("Action", ctypes.POINTER(ServiceAction)),
        )

    OpenSCManagerW = _declare(_advapi32, "OpenSCManagerW", _HANDLE, _TEXT, _TEXT, _DWORD)
    OpenServiceW = _declare(_advapi32, "OpenServiceW", _HANDLE, _HANDLE, _TEXT, _DWORD)
    CreateServiceW = _declare(
        _advapi32, "CreateServiceW", _HANDLE, _HANDLE, _TEXT, _TEXT, *[_DWORD] * 4, _TEXT, _TEXT, ctypes.c_void_p,
        _TEXT, _TEXT, _TEXT,
    )  # fmt: skip
    ChangeServiceConfig2W = _declare(_advapi32, "ChangeServiceConfig2W", _BOOL, _HANDLE, _DWORD, ctypes.c_void_p)
    StartServiceW = _declare(_advapi32, "StartServiceW", _BOOL, _HANDLE, _DWORD, ctypes.c_void_p)
    ControlService = _declare(_advapi32, "ControlService", _BOOL, _HANDLE, _DWORD, _STATUS)
    DeleteService = _declare(_advapi32, "DeleteService", _BOOL, _HANDLE)
    CloseServiceHandle = _declare(_advapi32, "CloseServiceHandle", _BOOL, _HANDLE)
    QueryServiceStatusEx = _declare(
        _advapi32, "QueryServiceStatusEx", _BOOL, _HANDLE, ctypes.c_int, _STATUS, _DWORD, ctypes.POINTER(_DWORD)
    )

    # Event log
    EVENTLOG_ERROR_TYPE = 1
    RegisterEventSourceW = _declare(_advapi32, "RegisterEventSourceW", _HANDLE, _TEXT, _TEXT)
    DeregisterEventSource = _declare(_advapi32, "DeregisterEventSource", _BOOL, _HANDLE)
    ReportEventW = _declare(
        _advapi32, "ReportEventW", _BOOL, _HANDLE, wintypes.WORD, wintypes.WORD, _DWORD, ctypes.c_void_p,
        wintypes.WORD, _DWORD, ctypes.POINTER(_TEXT), ctypes.c_void_p,
    )  # fmt: skip

# ======================================================================================================================
# II operating system / own process: descriptors, signals and environment of this process
# ======================================================================================================================

# What an OSError says when something of the process or of the host is used up, and may be free again in a moment.
# Winsock has numbers of its own for the sockets' share.
NO_DESCRIPTOR = frozenset({errno.EMFILE, errno.ENFILE})
NO_RESOURCE = NO_DESCRIPTOR | {errno.ENOMEM, errno.ENOBUFS, getattr(errno, "WSAENOBUFS", errno.ENOBUFS)}
_DESCRIPTORS_OF_AN_ANSWER = 4  # the file of an output, the two directories above it, and one of the database


class DescriptorReserve:
    """Descriptors held open, to be let go for what must not fail for want of one: a stop, an answer. Thread-safe."""

    def __init__(self, count: int = 8) -> None:
        self._count = count
        self._lock = threading.Lock()  # guards all below
        self._held: list[int] = []
        self._borrowers = 0
        self._probe = -1  # duplicated to learn whether others are free; never let go

    def fill(self) -> None:
        """Hold as many as there are free, at most `count`."""
        with self._lock, contextlib.suppress(OSError):  # what is missing is taken the next time
            if self._probe < 0:
                self._probe = os.open(os.devnull, os.O_RDONLY)
            while len(self._held) < self._count and not self._borrowers:
                self._held.append(os.open(os.devnull, os.O_RDONLY))

    def is_short(self) -> bool:
        """Whether it lacks some: all others are used, or they are lent."""
        self.fill()
        with self._lock:
            return len(self._held) < self._count

    @contextlib.contextmanager
    def lend(self) -> Iterator[None]:
        """Let them go for as long as the block lasts; several may borrow at once."""
        with self._lock:
            self._borrowers += 1
            while self._held:
                os.close(self._held.pop())
        try:
            yield
        finally:
            with self._lock:
                self._borrowers -= 1
            self.fill()

    @contextlib.contextmanager
    def lend_if_scarce(self) -> Iterator[None]:
        """Lend where hardly any other descriptor is free. Costs 2 µs where many are."""
        if self._is_scarce():
            with self.lend():
                yield
        else:
            yield

    def _is_scarce(self) -> bool:
        copies: list[int] = []
        try:
            for _ in range(_DESCRIPTORS_OF_AN_ANSWER):
                copies.append(os.dup(self._probe))
        except OSError:
            return True
        finally:
            for copy in copies:
                os.close(copy)
        return False


def set_inherited_fds_cloexec() -> None:
    """Keeps what whoever started us left open from our steps; what Python opens itself is closed at exec (PEP 446)."""
    if sys.platform != "win32":
        for name in os.listdir("/dev/fd"):
            with contextlib.suppress(OSError):
                if int(name) > 2:
                    os.set_inheritable(int(name), False)


def raise_fd_limit() -> str:
    """Raises the soft limit of open files to the hard one, for each step takes a few; the one that was."""
    if sys.platform == "win32":
        return ""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return "unlimited" if soft == resource.RLIM_INFINITY else str(soft)


def reset_inherited_signals() -> None:
    """Undo what whoever started us did to signals: steps inherit what is ignored or blocked (signal(7)).

    A handler that does nothing, in place of "ignored", becomes the default at exec: nohup protects us as before.
    """
    if sys.platform == "win32":
        return
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals():
        # Popen resets what CPython itself ignores.
        if signal.getsignal(number) is signal.SIG_IGN and number not in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL if number in _UNIGNORED else _do_nothing)
    _reset_library_signals()


def detach() -> None:
    """Leave the session and the group of whoever started this process."""
    if sys.platform != "win32":
        with contextlib.suppress(PermissionError):  # it leads a group of its own already
            os.setsid()


def _do_nothing(*_: Any) -> None:
    """Handle a signal."""


# Whoever ignores SIGCHLD gets no exit code of a child; the next three are harmless by default. With a handler, a write
# to a terminal in the background would be tried again for ever (termios(3), TOSTOP).
_UNIGNORED = {
    getattr(signal, name, None) for name in ("SIGCHLD", "SIGCONT", "SIGURG", "SIGWINCH", "SIGTTIN", "SIGTTOU")
}


def _reset_library_signals() -> None:
    """Set signals 32 and 33 to their defaults, which glibc's posix_spawn leaves ignored: only the kernel can.

    CPython 3.13.0, make and others start their children so.
    """
    call = {"x86_64": 13, "aarch64": 134, "riscv64": 134}.get(os.uname().machine)  # rt_sigaction(2)
    if not ON_LINUX or call is None or struct.calcsize("P") != 8:
        return
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        ignored = next((int(line.split()[1], 16) for line in file if line.startswith("SigIgn:")), 0)
    for number in (32, 33):
        if ignored >> (number - 1) & 1:
            import ctypes

            ctypes.CDLL(None).syscall(call, number, bytes(64), None, 8)  # a struct of zeros: SIG_DFL


def clean_pyinstaller_env() -> None:
    """Takes back what the launcher of a frozen program did to the environment: it is not for the steps.

    PyInstaller's manual, "Launching external programs from the frozen application".
    """
    if not getattr(sys, "frozen", False):
        return
    for name in [name for name in os.environ if name.startswith(("_PYI_", "_MEIPASS"))]:
        del os.environ[name]
    for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"):
        os.environ.pop(name, None)
        if (original := os.environ.pop(name + "_ORIG", None)) is not None:
            os.environ[name] = original
    if ON_WINDOWS:
        SetDllDirectoryW(None)


_FAILPOINT = os.environ.get("REMOTE_EXECUTOR_FAILPOINT")
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # the latter is TerminateProcess on Windows


def failpoint(name: str) -> None:
    """Kills this process where $REMOTE_EXECUTOR_FAILPOINT names the place: how the tests prove what a crash leaves."""
    if name == _FAILPOINT:
        os.kill(os.getpid(), _KILL)


# ======================================================================================================================
# II operating system / private files: the root, which is ours alone, and what steps may leave in it
# ======================================================================================================================


def private_umask() -> int:
    """Makes what this process creates its own user's alone; the umask that was, which steps get back."""
    return os.umask(0o077)


def private_directory(path: str) -> None:
    """Makes a directory that is ours alone; raises StartupError where it is a link, someone else's, or open to others.

    An empty one is closed to others. One that holds something may be meant for them, as /var/lib is.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        raise StartupError(f"--root: {path!a} is no UTF-8, as which answers show it; give another name") from None
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        if _is_link(os.lstat(path)):
            raise StartupError(f"--root: {path} is a link; give the directory itself")
        close = _close_windows_directory if ON_WINDOWS else _close_unix_directory
        close(path)
    except OSError as error:
        raise StartupError(f"--root: {path} cannot be used: {error.strerror or error}") from None


def _close_unix_directory(path: str) -> None:
    found = os.lstat(path)
    if found.st_uid != os.geteuid():
        raise StartupError(f"--root: {path} belongs to another user (uid {found.st_uid}); give one of your own")
    if found.st_mode & 0o077:
        if not os.listdir(path):
            os.chmod(path, 0o700)
        if os.listdir(path):  # looked at again, for they could write until now
            raise StartupError(f"--root: {path} is open to other users; `chmod 700` it or give one of your own")


def _close_windows_directory(path: str) -> None:
    """Lets the system, administrators and ourselves in alone, and so into all that is made there."""
    if len(path) > _MAX_ROOT_LENGTH:
        raise StartupError(f"--root: {path} is too long for cmd.exe; give one of {_MAX_ROOT_LENGTH} characters at most")
    if path.startswith("\\\\"):
        raise StartupError(f"--root: {path} is on a share, where cmd.exe cannot work; give a directory of this host")
    ourselves, owner = _own_sid(), _owner_sid(path)
    if owner not in (ourselves, "S-1-5-18", "S-1-5-32-544"):  # the system, and the administrators
        raise StartupError(f"--root: {path} belongs to another user ({owner}); give one of your own")
    rights = "".join(f"(A;OICI;FA;;;{who})" for who in ("SY", "BA", ourselves))
    is_new, ours = not os.listdir(path), ctypes.c_void_p()
    ConvertStringSecurityDescriptorToSecurityDescriptorW(f"D:P{rights}", SDDL_REVISION_1, ctypes.byref(ours), None)
    try:
        if is_new:
            SetFileSecurityW(path, DACL_SECURITY_INFORMATION | PROTECTED_DACL_SECURITY_INFORMATION, ours)
        others = (
            _granted_sids(_security_of(path, DACL_SECURITY_INFORMATION)) - _granted_sids(ours) - {"CO", "OW"}
        )  # its owner
    finally:
        LocalFree(ours)
    if others or (is_new and os.listdir(path)):  # they could write until now
        who = ", ".join(sorted(others)) or "one has just written there"
        told = f"--root: {path} is open to other users ({who}); give an empty directory,"
        raise StartupError(f"{told} which will be closed to them, or take their rights away by icacls")


_MAX_ROOT_LENGTH = 200  # so that a step's files stay below MAX_PATH, which cmd.exe cannot pass


def _granted_sids(descriptor: Any) -> set[str]:
    """Whom a security descriptor lets in, as Windows writes them in text (Security Descriptor String Format, MSDN)."""
    text = _TEXT()
    ConvertSecurityDescriptorToStringSecurityDescriptorW(
        descriptor, SDDL_REVISION_1, DACL_SECURITY_INFORMATION, ctypes.byref(text), None
    )
    try:
        entries = re.findall(r"\((\w+);[^()]*?;([^;()]+)(?:;\(.*?\))?\)", text.value or "")
        return {who for kind, who in entries if kind != "D"} or {"everyone"}  # without a list there is no limit
    finally:
        LocalFree(ctypes.cast(text, ctypes.c_void_p))


def _own_sid() -> str:
    """The user of this process, as Windows writes users in text."""
    token, user, size = _HANDLE(), ctypes.create_string_buffer(256), _DWORD()
    OpenProcessToken(GetCurrentProcess(), TOKEN_QUERY, ctypes.byref(token))
    try:
        GetTokenInformation(token, TOKEN_USER, user, len(user), ctypes.byref(size))
    finally:
        CloseHandle(token)
    return _sid_text(ctypes.c_void_p.from_buffer(user))  # what TOKEN_USER begins with


def _owner_sid(path: str) -> str:
    descriptor, owner = _security_of(path, OWNER_SECURITY_INFORMATION), ctypes.c_void_p()
    GetSecurityDescriptorOwner(descriptor, ctypes.byref(owner), ctypes.byref(_BOOL()))
    return _sid_text(owner)


def _security_of(path: str, kinds: int) -> Any:
    descriptor = ctypes.create_string_buffer(1 << 16)
    GetFileSecurityW(path, kinds, descriptor, len(descriptor), ctypes.byref(_DWORD()))
    return descriptor


def _sid_text(sid: Any) -> str:
    text = _TEXT()
    ConvertSidToStringSidW(sid, ctypes.byref(text))
    try:
        return str(text.value)
    finally:
        LocalFree(ctypes.cast(text, ctypes.c_void_p))


_DIRECTORY_LOCK_S = 2.0


def lock_directory(path: str) -> int | None:
    """The descriptor that holds an exclusive lock on a directory while the process lives, None where there is no such.

    It holds when the files in it are gone, and systemd-tmpfiles leaves alone what is locked so (tmpfiles.d(5)); for a
    moment it locks what it cleans itself, hence the patience. Raises StartupError when another daemon holds it.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    end_s = time.monotonic() + _DIRECTORY_LOCK_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > end_s:
                os.close(descriptor)
                raise StartupError(f"--root: {path} is in use by another daemon; give another root") from None
        except OSError:  # NFS locks only what can be written
            os.close(descriptor)
            return None
        time.sleep(0.05)


def lock_file(path: str) -> int:
    """The descriptor that holds an exclusive lock on the file while the process lives; raises StartupError if held."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StartupError(f"--root: {os.path.dirname(path)} is in use by another daemon; give another root") from None
    return descriptor


_RENAME_RETRY_S = 5.0


def rename(path: str, new: str) -> None:
    """Renames a file or directory, with patience: on Windows a virus scanner may hold it for a moment."""
    end_s = time.monotonic() + _RENAME_RETRY_S
    while True:
        try:
            return os.rename(path, new)
        except PermissionError:
            if not ON_WINDOWS or time.monotonic() > end_s:
                raise
        time.sleep(0.05)


_JUNCTION = 0xA000_0003  # IO_REPARSE_TAG_MOUNT_POINT


def _is_link(found: os.stat_result) -> bool:
    """Whether a file stands for another: a link, or a junction of Windows."""
    return stat.S_ISLNK(found.st_mode) or getattr(found, "st_reparse_tag", 0) == _JUNCTION


def links_in(place: str, names: Sequence[str]) -> list[str]:
    """Those of the names that stand for something else: for shutil.copytree, which follows junctions."""
    return [name for name in names if _is_link(os.lstat(os.path.join(place, name)))]


def is_real_directory(path: str) -> bool:
    """Whether there is a directory itself, no link to one."""
    with contextlib.suppress(OSError):
        found = os.lstat(path)
        return stat.S_ISDIR(found.st_mode) and not _is_link(found)
    return False


def is_open_to_others(path: str) -> bool:
    """Whether other users may read or write a file; on Windows its directory decides that."""
    return not ON_WINDOWS and os.stat(path).st_mode & 0o066 != 0


_HAS_DESCRIPTORS = os.open in os.supports_dir_fd  # of directories
_DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
_PLAIN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_REMOVAL_S = 10.0  # for one directory, before others have their turn


class SafeDirectory:
    """A directory of ours, of whose content steps may have made anything; any thread may call it.

    Nothing in it is reached through a link: each directory is opened from the one above it, so that no exchange for a
    link in between leads out of it (CWE-367). Windows has no such calls: there the names are looked at just before.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._top = -1  # its descriptor, for as long as the process lives

    def open(self) -> None:
        """Holds on to the directory itself, whatever becomes of its name; raises OSError."""
        if _HAS_DESCRIPTORS:
            self._top = os.open(self.path, _DIRECTORY)

    def read(self, *names: str) -> io.FileIO:
        """Opens a regular file; raises OSError, also for all else: a pipe would block, a device has no end."""
        with self._parent(names) as (name, parent):
            if parent is None and _is_link(os.lstat(name)):
                raise OSError(errno.ELOOP, "is a link", name)
            descriptor = os.open(name, os.O_RDONLY | _PLAIN, dir_fd=parent)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "is no regular file", names[-1])
        return open(descriptor, "rb", buffering=0)

    def make(
        self, *names: str, content: Mapping[str, bytes] = types.MappingProxyType({}), may_exist: bool = False
    ) -> None:
        """Makes a directory, which must not be there yet, with these files in it, which never may; raises OSError."""
        with self._parent(names) as (name, parent):
            try:
                os.mkdir(name, 0o700, dir_fd=parent)
            except FileExistsError:
                if not may_exist:
                    raise
            inner = os.open(name, _DIRECTORY, dir_fd=parent) if content and parent is not None else None
        try:
            for file, data in content.items():
                path = file if inner is not None else os.path.join(name, file)
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _PLAIN, 0o600, dir_fd=inner)
                with io.FileIO(descriptor, "w") as target:
                    target.write(data)
        finally:
            if inner is not None:
                os.close(inner)

    def remove_empty(self, *names: str) -> None:
        """Removes a directory; raises OSError where it is none, or not empty."""
        with self._parent(names) as (name, parent):
            os.rmdir(name, dir_fd=parent)

    def remove(self, *names: str) -> bool:
        """Removes a directory with all that is in it, but what is mounted there; False when something is left.

        Raises OSError where no descriptor is left to look with.
        """
        try:
            with self._parent(names) as (name, parent):
                return _remove_by_path(name) if parent is None else _remove(name, parent, _mount_of(parent))
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno in NO_DESCRIPTOR:
                raise
            return False

    @contextlib.contextmanager
    def _parent(self, names: Sequence[str]) -> Iterator[tuple[str, int | None]]:
        """The last name and its directory's descriptor; where there are none, the whole path and None."""
        if not _HAS_DESCRIPTORS:
            paths = itertools.accumulate(names, os.path.join, initial=self.path)
            if any(_is_link(os.lstat(path)) for path in itertools.islice(paths, len(names))):
                raise NotADirectoryError(errno.ENOTDIR, "is a link", self.path)
            yield os.path.join(self.path, *names), None
            return
        descriptor = os.open(self.path, _DIRECTORY) if self._top < 0 else self._top
        try:
            for name in names[:-1]:
                above, descriptor = descriptor, os.open(name, _DIRECTORY, dir_fd=descriptor)
                if above != self._top:
                    os.close(above)
            yield names[-1], descriptor
        finally:
            if descriptor != self._top:
                os.close(descriptor)


def _remove(name: str, parent: int, mount: str) -> bool:
    """Removes whatever has this name, links themselves; whether it is gone.

    Directories come up one level at a time, so that no depth needs a stack, a long path or many descriptors.
    """
    if _unlink(name, parent):
        return True
    top, end_s = _open_unlocked(name, parent, mount), time.monotonic() + _REMOVAL_S
    try:
        has_gone = True
        while has_gone and time.monotonic() < end_s:
            with os.scandir(top) as entries:
                has_gone = (
                    sum(_unlink(one.name, top) or _flatten_into_parent(one.name, top, mount) for one in entries) > 0
                )
        os.rmdir(name, dir_fd=parent)
    finally:
        os.close(top)
    return True


def _flatten_into_parent(name: str, top: int, mount: str) -> bool:
    """Removes a directory of `top` whose own directories are now in `top`; whether anything has changed."""
    has_changed = False
    with contextlib.suppress(OSError):
        inner = _open_unlocked(name, top, mount)
        try:
            with os.scandir(inner) as entries:
                for one in entries:
                    has_changed |= _unlink(one.name, inner) or _move(one.name, inner, top)
        finally:
            os.close(inner)
        os.rmdir(name, dir_fd=top)
        has_changed = True
    return has_changed


def _unlink(name: str, parent: int) -> bool:
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=parent)
        return True
    return False


def _move(name: str, source: int, target: int) -> bool:
    """Moves a directory, to a name that nobody knows before."""
    with contextlib.suppress(OSError):
        _unlock(name, source)
        os.rename(name, f".{os.urandom(16).hex()}", src_dir_fd=source, dst_dir_fd=target)
        return True
    return False


def _open_unlocked(name: str, parent: int, mount: str) -> int:
    """A directory that may be read and written from now on; raises OSError for a link and for what is mounted there."""
    with contextlib.suppress(PermissionError, NotImplementedError):
        _unlock(name, parent)
    descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
    if _mount_of(descriptor) != mount:
        os.close(descriptor)
        raise OSError(errno.EXDEV, "is mounted", name)
    return descriptor


def _unlock(name: str, parent: int) -> None:
    """Gives us all rights on a directory, from which a step may have taken them; follows no link."""
    if not ON_LINUX:
        return os.chmod(name, 0o700, dir_fd=parent, follow_symlinks=False)
    descriptor = os.open(name, os.O_PATH | _DIRECTORY, dir_fd=parent)  # needs no right to read it
    try:
        if os.fstat(descriptor).st_mode & 0o700 != 0o700:
            os.chmod(f"/proc/self/fd/{descriptor}", 0o700)
    finally:
        os.close(descriptor)
    return None


def _mount_of(descriptor: int) -> str:
    """What a directory has in common with all of its mount alone; st_dev is the same where one is mounted twice."""
    with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as file:
        return next((line for line in file if line.startswith("mnt_id")), "")
    return str(os.fstat(descriptor).st_dev)


def _remove_by_path(path: str) -> bool:
    """What `_remove` does, where there are no descriptors of directories."""

    def retry(action: Callable[..., Any], name: str, _: Any) -> None:
        with contextlib.suppress(OSError):
            os.chmod(name, stat.S_IWRITE)  # a step may have made it read-only
            action(name)

    path = rf"\\?\{path}" if ON_WINDOWS else path  # what steps make there may be deeper than MAX_PATH
    if _is_link(os.lstat(path)):
        os.unlink(path)
    else:
        shutil.rmtree(path, onerror=retry)
    return not os.path.lexists(path)


_TOKEN_NAME = "token"
_RESTART = "restart the daemon, with a --root that nobody cleans up"
_ROOT_ADVICE = {
    "": f"what is stored now is lost, and no task is accepted; {_RESTART}",
    "lock": "another daemon might start on this root; restart this one, which adopts what runs",
    "remote_executor.db": f"what is stored now is lost, and no task is accepted; {_RESTART}",
    "remote_executor.db-wal": f"what is stored now is lost, and no task is accepted; {_RESTART}",
    "tasks": f"the outputs and workspaces in it are lost; {_RESTART}",
    _TOKEN_NAME: "it lets nobody in any more; a restart of the daemon writes a new one",
}


class RootWatch:
    """Notices what of the root is gone; the daemon's thread looks, any other asks for the warning.

    Who cleans up /tmp removes files that are in use too, and what is written to them from then on is lost.
    """

    def __init__(self, root: str, has_token: bool) -> None:
        names = [*_ROOT_ADVICE] if has_token else [name for name in _ROOT_ADVICE if name != _TOKEN_NAME]
        self._paths = {name: os.path.join(root, name) if name else root for name in names}
        self._known: dict[str, tuple[int, int]] = {}  # by name, the file that was there first
        self._gone: tuple[str, ...] = ()

    def look(self) -> None:
        """Compares what is there with what was, and logs a change once."""
        gone = []
        for name, path in self._paths.items():
            if self._is_gone(name, path):
                gone.append(name)
                if not name:
                    break  # and with it all that was in it
        if gone and tuple(gone) != self._gone:
            log.error("%s", "; ".join(map(self._describe, gone)))
        elif self._gone and not gone:
            log.info("--root: all of %s is in place again", self._paths[""])
        self._gone = tuple(gone)

    def warning(self) -> str:
        """What is gone, and what to do; empty when nothing is."""
        return "; ".join(map(self._describe, self._gone))

    def _describe(self, name: str) -> str:
        return f"--root: {self._paths[name]} is gone: {_ROOT_ADVICE[name]}"

    def _is_gone(self, name: str, path: str) -> bool:
        try:
            status = os.lstat(path)
        except OSError as error:
            return name in self._known and error.errno in (errno.ENOENT, errno.ENOTDIR)  # any other tells nothing
        known = self._known.setdefault(name, (status.st_dev, status.st_ino))
        is_same = known == (status.st_dev, status.st_ino)
        return not is_same and name != _TOKEN_NAME  # which an editor may replace


# ======================================================================================================================
# II operating system / network peers: who on this host holds the other end of a connection
# ======================================================================================================================


def socket_timeout(seconds: float) -> bytes:
    """The value of the socket options SO_RCVTIMEO and SO_SNDTIMEO: a timeval, on Windows milliseconds."""
    if ON_WINDOWS:
        return struct.pack("I", max(1, int(seconds * 1000)))
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000) or int(seconds < 1))


class LocalPeers:
    """Who holds the other ends of the connections to one port of this host; any thread may ask.

    The kernel's tables cost milliseconds each, so one reading serves all who asked before it began.
    """

    def __init__(self, descriptors: DescriptorReserve) -> None:
        self._descriptors = descriptors
        self._lock = threading.Lock()  # guards all below
        self._read: dict[str, tuple[float, dict[tuple[str, str], int]]] = {}  # when, and the users by both ends

    def user(self, peer: tuple[str, int], ours: tuple[str, int]) -> int | None:
        """The user who holds the peer's end; None where the system does not tell.

        Raises LookupError where it should but has no such connection: there is no end to trust then; and OSError.
        """
        if not ON_LINUX:
            return None
        ends = _kernel_address(*peer), _kernel_address(*ours)
        tables = ("tcp6",) if ":" in peer[0] else ("tcp", "tcp6")  # the latter has IPv4 of IPv6's sockets
        for table in tables * 2:  # twice, for one that changes while it is read may lack a line
            asked_s = time.monotonic()
            with self._lock:
                begin_s, users = self._read.get(table, (0.0, {}))
                if begin_s <= asked_s:
                    begin_s = time.monotonic()
                    with self._descriptors.lend_if_scarce():
                        users = dict(_established(table, ours[1]))
                    self._read[table] = begin_s, users
            if ends in users:
                return users[ends]
        raise LookupError("this host does not know the client's end of the connection")


def _established(table: str, port: int) -> Iterator[tuple[tuple[str, str], int]]:
    """The ends of the connections to a port, the client's and ours, and its user (proc_net(5))."""
    mark, mapped = f":{port:04X} 01 ".encode(), _kernel_address("::ffff:0.0.0.0", 0)[:24]
    with contextlib.suppress(FileNotFoundError), open(f"/proc/net/{table}", "rb") as file:
        for line in file:
            fields = line.decode("ascii").split() if mark in line else ["0"] * 10
            if fields[9] != "0":  # the inode, which a socket that no process has lacks
                client, server = (one[len(mapped) :] if one.startswith(mapped) else one for one in fields[1:3])
                yield (client, server), int(fields[7])


def _kernel_address(host: str, port: int) -> str:
    """An address as the kernel's tables show it: 32-bit words as this host reads them, in hexadecimal."""
    with contextlib.suppress(OSError):
        packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
        return "".join(f"{word:08X}" for word in struct.unpack(f"={len(packed) // 4}I", packed)) + f":{port:04X}"
    return ""


def trusts_user(user: int | None) -> bool:
    """Whether this user may do what the daemon's own may."""
    return user is None or sys.platform == "win32" or user in (0, os.geteuid())


# ======================================================================================================================
# II operating system / system information: what the host is, what this process takes of it, what it lets run
# ======================================================================================================================


def system_program(name: str) -> str:
    """The path of a program that Windows brings."""
    return os.path.join(os.environ.get("SYSTEMROOT", r"C:\Windows"), "System32", name)


def fallback_encoding() -> str:
    """The encoding of a step's output that is not UTF-8: the console's code page where there is one."""
    return "oem" if ON_WINDOWS else "utf-8"


def environment_name(name: str) -> str:
    """The name of a variable as the environment of this host has it: Windows knows no case."""
    return name.upper() if ON_WINDOWS else name


def _stat_fields(pid: int | str) -> list[str]:
    """The fields of /proc/PID/stat from the state on (proc_pid_stat(5)); none when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].decode("ascii").split()
    except (OSError, ValueError):
        return []


def _ask_ps(*arguments: str) -> str:
    """What ps says, where there is no /proc."""
    command = ["/bin/ps", *arguments]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ).stdout.decode(errors="replace")


@functools.lru_cache(maxsize=1)
def boot_time_s() -> float:
    """When the host started, in seconds since the epoch."""
    with contextlib.suppress(OSError), open("/proc/stat", encoding="ascii") as file:
        for line in file:
            if line.startswith("btime "):
                return float(line.split()[1])
    return time.time() - time.monotonic()


def _creation_time(process: int) -> int:
    """When the process was created, in units of 100 ns since 1601."""
    times = [wintypes.FILETIME() for _ in range(4)]
    GetProcessTimes(process, *(ctypes.byref(one) for one in times))
    return int(times[0].dwHighDateTime) << 32 | int(times[0].dwLowDateTime)


_LOADED_S = time.time()
_EPOCH_OF_1601 = 116_444_736_000_000_000  # 1970, in the units of a FILETIME
_MAX_HANDLES = 16 * 1024 * 1024  # of a process (Pushing the Limits of Windows: Handles)


class ProcessStats(NamedTuple):
    """What this process takes of the host; None where the system does not tell."""

    cpu_s: float
    started_s: float  # since the epoch
    threads: int
    resident_bytes: int | None
    virtual_bytes: int | None
    open_files: int | None  # on Windows handles
    max_files: int | None


def process_stats() -> ProcessStats:
    """What the system tells now."""
    cpu_s = time.process_time()
    if ON_WINDOWS:
        process, memory, handles = GetCurrentProcess(), ProcessMemory(), wintypes.DWORD()
        GetProcessMemoryInfo(process, ctypes.byref(memory), ctypes.sizeof(memory))
        GetProcessHandleCount(process, ctypes.byref(handles))
        started_s = (_creation_time(process) - _EPOCH_OF_1601) / 10**7
        taken = memory.WorkingSet, memory.Private, handles.value, _MAX_HANDLES
        return ProcessStats(cpu_s, started_s, threading.active_count(), *taken)
    files = len(os.listdir("/dev/fd")) - 1, _max_files()  # the listing itself takes one
    if not ON_LINUX:
        sizes = _ask_ps("-o", "rss=,vsz=", "-p", str(os.getpid())).split()
        resident, virtual = (int(size) * 1024 for size in sizes) if len(sizes) == 2 else (None, None)
        return ProcessStats(cpu_s, _LOADED_S, threading.active_count(), resident, virtual, *files)
    fields = _stat_fields("self")
    started_s = boot_time_s() + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    resident, virtual = int(fields[21]) * os.sysconf("SC_PAGE_SIZE"), int(fields[20])
    return ProcessStats(cpu_s, started_s, int(fields[17]), resident, virtual, *files)


def _max_files() -> int | None:
    if sys.platform != "win32":
        import resource

        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return soft if soft != resource.RLIM_INFINITY else None
    return None


class Limit(NamedTuple):
    """How many of something this process may have, and what says so."""

    value: int
    name: str
    also: str = ""  # the flag beside --pool_size that could be lowered


class StepCapacity(NamedTuple):
    """How many steps can run at once, and the limit that allows no more; None where there is none."""

    steps: int
    limit: Limit | None


_UNLIMITED_STEPS = 2**63
_DESCRIPTORS_OF_A_STEP = 3  # a pidfd, and for the time of its start its output and the pipe that tells of the exec
_OWN_DESCRIPTORS = 64  # the database's, the log, the reserve, the listener
_PROCESSES_OF_A_STEP = 4  # a thread that waits, the wrapper, the script and one that it starts; more are not known
_OWN_THREADS = 32  # some connections among them


def step_capacity(descriptors: Limit | None, processes: Sequence[Limit], max_connections: int) -> StepCapacity:
    """How many steps can run at once under these limits, at least 1."""
    capacity = StepCapacity(_UNLIMITED_STEPS, None)
    if descriptors:
        connections = min(max_connections, descriptors.value // 4)
        free = descriptors.value - connections - min(_OWN_DESCRIPTORS, descriptors.value // 2)
        capacity = StepCapacity(free // _DESCRIPTORS_OF_A_STEP, descriptors)
    for limit in processes:
        steps = (limit.value - min(_OWN_THREADS, limit.value // 2)) // _PROCESSES_OF_A_STEP
        if steps < capacity.steps:
            capacity = StepCapacity(steps, limit)
    return capacity._replace(steps=max(1, capacity.steps))


def descriptor_limit() -> Limit | None:
    """How many descriptors this process may have; None where the system sets no limit."""
    count = _max_files()
    return (
        None
        if count is None
        else Limit(count, "the limit of open files (ulimit -n, LimitNOFILE)", " or --max_connections")
    )


def process_limits(cgroups: str = "/sys/fs/cgroup", own_cgroups: str = "/proc/self/cgroup") -> list[Limit]:
    """How many processes and threads there may be, by each limit that holds for this process."""
    if sys.platform == "win32":
        return []
    import resource

    limits = []
    soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if os.geteuid() and soft != resource.RLIM_INFINITY:
        limits.append(Limit(soft, "the limit of processes (ulimit -u, LimitNPROC)"))
    with contextlib.suppress(OSError), open(own_cgroups, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:  # cgroups(7): the number, the controllers, empty for version 2, and the path
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if controllers in ("", "pids"):
                limits += _pids_limits(os.path.join(cgroups, controllers), path)
    return limits


def _pids_limits(mount: str, path: str) -> Iterator[Limit]:
    """The limits of a cgroup and of all above it; in a container the upper ones cannot be seen."""
    names = path.strip("/").split("/")
    for depth in range(len(names), -1, -1):
        file = os.path.join(mount, *names[:depth], "pids.max")
        with contextlib.suppress(OSError, ValueError), open(file, encoding="ascii") as content:
            yield Limit(int(content.read()), f"{file} (TasksMax)")  # ValueError: "max"


class HostInfo(NamedTuple):
    """What the host is."""

    name: str
    system: str
    release: str
    machine: str


def host_info() -> HostInfo:
    if sys.platform == "win32":  # not by `platform`, which asks WMI
        found = sys.getwindowsversion()
        release = f"{found.major}.{found.minor}.{found.build}"
        machine = os.environ.get("PROCESSOR_ARCHITEW6432") or os.environ.get("PROCESSOR_ARCHITECTURE", "")
        return HostInfo(socket.gethostname(), "Windows", release, machine)
    system, name, release, _, machine = os.uname()
    return HostInfo(name, system, release, machine)


class Build(NamedTuple):
    """What runs here: the program, the commit that it is of, empty where nobody knows, its time, and its Python."""

    version: str
    commit: str
    built: str
    implementation: str
    python: str
    os: str
    arch: str


_COMMIT, _COMMITTED = "$Format:%H$", "$Format:%cI$"  # `git archive` fills these in


@functools.lru_cache(maxsize=1)
def build() -> Build:
    """Read from the file's place: the commit that is checked out there, the time when the file was written."""
    is_archived = not _COMMIT.startswith("$")
    commit, built = (_COMMIT, _COMMITTED) if is_archived else (_checked_out(), _written())
    system = "windows" if ON_WINDOWS else sys.platform
    python = sys.version.split()[0]
    return Build(__version__, commit, built, sys.implementation.name, python, system, host_info().machine)


def _checked_out() -> str:
    """The commit of a git checkout (gitrepository-layout(5))."""
    place = os.path.join(os.path.dirname(os.path.abspath(__file__)), ".git")
    found = ""
    with contextlib.suppress(OSError, ValueError):
        with open(os.path.join(place, "HEAD"), encoding="utf-8") as file:
            found = file.read().strip()
        if found.startswith("ref: "):
            name, found = found[5:], ""
            with contextlib.suppress(OSError), open(os.path.join(place, "packed-refs"), encoding="utf-8") as file:
                found = next((line.split()[0] for line in file if line.rstrip().endswith(f" {name}")), "")
            with open(os.path.join(place, name), encoding="utf-8") as file:  # where it is there, it is the later one
                found = file.read().strip()
    return found if re.fullmatch("[0-9a-f]{40,64}", found) else ""


def _written() -> str:
    """When the file was written, or the archive or the program that it is a part of."""
    for path in (__file__, os.path.dirname(__file__), sys.executable):
        with contextlib.suppress(OSError):
            return format_time(int(os.stat(path).st_mtime))
    return ""


def version_line() -> str:
    """What /version tells, in a line."""
    known = build()
    commit = f"commit {known.commit[:12]}, " if known.commit else ""
    python = f"{known.implementation} {known.python}, {known.os} {known.arch}"
    return f"remote_executor {known.version} ({commit}built {known.built}; {python})"


# ======================================================================================================================
# II operating system / interpreters: the command line that runs a script, and the bytes of its file
# ======================================================================================================================


class Interpreter(NamedTuple):
    """How scripts of a command type run: the first of `programs` that is on PATH, each with options, and `arguments`.

    {file} in the arguments is the script's path, {quoted} the same within single quotes of PowerShell.
    """

    programs: tuple[str, ...]
    suffix: str = ""
    arguments: tuple[str, ...] = ("{file}",)
    env: tuple[str, ...] = ()  # KEY=value, unless the task says otherwise


# Python writes to a file in the ANSI code page, unless told otherwise; console programs do in the OEM code page.
_PYTHON = (
    Interpreter(("python", "py -3"), ".py", env=("PYTHONIOENCODING=utf-8",))
    if ON_WINDOWS
    else Interpreter(("python3",), ".py")
)
_CMD = Interpreter(("cmd",), ".bat", ("/D", "/E:ON", "/V:OFF", "/S", "/C", 'CALL "{file}"'))
# Not -File: its exit code knows nothing of $LASTEXITCODE, which in turn knows nothing of a script that could not begin,
# for an error of its grammar or by a policy: `$?` does. An encoding without BOM, which Windows PowerShell would write
# to the output else; there is none to set where there is no console.
_POWERSHELL_SCRIPT = (
    "try { [Console]::OutputEncoding = New-Object System.Text.UTF8Encoding $false } catch { }; "
    "& {quoted}; if (-not ($? -or $LASTEXITCODE)) { exit 1 }; exit $LASTEXITCODE"
)
_POWERSHELL_ARGUMENTS = (
    "-NoLogo",
    "-NoProfile",
    "-NonInteractive",
    "-ExecutionPolicy",
    "Bypass",
    "-Command",
    _POWERSHELL_SCRIPT,
)
_PWSH = Interpreter(("pwsh",), ".ps1", _POWERSHELL_ARGUMENTS)
_POWERSHELL = Interpreter(("powershell" if ON_WINDOWS else "pwsh",), ".ps1", _POWERSHELL_ARGUMENTS)
INTERPRETERS: Mapping[str, Interpreter] = {
    "sh": Interpreter(("sh",), ".sh"),
    "shell": Interpreter(("sh",), ".sh"),
    **{name: Interpreter((name,), ".sh") for name in ("bash", "ash", "dash", "ksh", "zsh", "csh", "tcsh")},
    **{name: _PYTHON for name in ("python", "python3", "py", "py3")},
    **{name: Interpreter(("python2",), ".py") for name in ("python2", "py2")},
    **{name: _CMD for name in ("cmd", "bat")},
    **{name: _POWERSHELL for name in ("powershell", "ps", "ps1")},
    "pwsh": _PWSH,
}


def interpreter_command(command_type: str, file: str, workspace: str, path: str) -> list[str]:
    """Return the command line that runs the file; `path` is the PATH to search before the daemon's own.

    Raises LaunchError for a missing program.
    """
    interpreter = INTERPRETERS[command_type]
    if ON_WINDOWS:  # cmd reads the line, to which a letter of the root's, such as %, may mean something
        file = os.path.relpath(file, workspace)
        if interpreter.suffix == ".sh":  # the bash of Windows is a Linux's
            file = file.replace("\\", "/")
    places = {"{file}": file, "{quoted}": "'" + file.replace("'", "''") + "'"}
    arguments = [_PLACE.sub(lambda found: places[found[0]], argument) for argument in interpreter.arguments]
    programs = interpreter.programs if interpreter is not _CMD or ON_WINDOWS else ()
    own_path = os.environ.get("PATH", os.defpath)  # for a step that looks for its own programs elsewhere
    for directories, program in itertools.product(dict.fromkeys((path, own_path)), programs):
        name, *options = program.split()
        found = find_program(name, directories)
        if found:  # another batch file would not come back to the wrapper, unless it is called
            call = ["call"] if found.lower().endswith((".bat", ".cmd")) else []
            return [*call, found, *options, *arguments]
    if interpreter is _PYTHON and not getattr(sys, "frozen", False) and sys.executable:
        return [sys.executable, *arguments]
    raise LaunchError(f"{' or '.join(interpreter.programs)} is not on the PATH of this host")


_PLACE = re.compile(r"\{(?:file|quoted)\}")


def find_program(program: str, path: str) -> str | None:
    """Where the program is on this PATH; what was found is believed for some seconds, a step would pay for it else."""
    found = _found_program(program, path, int(time.monotonic() // _WHICH_CACHE_TTL_S))
    return found or _search(program, path)


_WHICH_CACHE_TTL_S = 10


@functools.lru_cache(maxsize=256)
def _found_program(program: str, path: str, _: int) -> str | None:
    return _search(program, path)


def _search(program: str, path: str) -> str | None:
    if not ON_WINDOWS:
        return shutil.which(program, path=path)
    if program == "cmd":
        return system_program("cmd.exe")
    # Not `shutil.which`, that begins in the current directory, and before Python 3.12 adds no suffix to a path. The
    # directory that is left out for it is where Windows keeps a `python` that opens its shop.
    suffixes = os.environ.get("PATHEXT", ".COM;.EXE;.BAT;.CMD").split(";")
    for directory in (part.strip('"') for part in path.split(os.pathsep)):
        is_shop = program == "python" and directory.rstrip("\\").lower().endswith("\\microsoft\\windowsapps")
        if os.path.isabs(directory) and not is_shop:
            for suffix in suffixes:
                file = os.path.join(directory, program + suffix)
                if os.path.isfile(file):
                    return file
    return None


def script_name(command_type: str) -> str:
    """The name of the script's file."""
    return "script" + INTERPRETERS[command_type].suffix


def script_environment(command_type: str) -> tuple[str, ...]:
    """What the interpreter needs in its environment, as KEY=value."""
    return INTERPRETERS[command_type].env


def encode_script(command_type: str, text: str) -> bytes:
    """The bytes of the script's file."""
    suffix = INTERPRETERS[command_type].suffix
    if suffix == ".ps1":
        return text.encode("utf-8-sig")  # without the mark Windows PowerShell takes it for the ANSI code page
    if suffix == ".bat":
        return _encode_batch(text, fallback_encoding())
    return text.encode()


def _encode_batch(text: str, encoding: str) -> bytes:
    """A batch file, which cmd reads in the code page of its console; in UTF-8 where that lacks a character."""
    lines = "\r\n".join(["@echo off", *re.split("\r?\n", text), ""])
    try:
        return lines.encode(encoding)
    except UnicodeEncodeError:
        return b"@chcp 65001 >nul\r\n" + lines.encode()


# ======================================================================================================================
# II operating system / step processes: the contract of a process tree, which two systems fulfil
# ======================================================================================================================

# A process tree is the process of a step, its wrapper before it, and whatever these have started and lost sight of.
# Nothing in a POSIX system keeps such a tree together: a process may leave its group and its session, lose its parent,
# change its environment. So membership is a matter of evidence, gathered anew by every scan of the process table:
#
#   1. the session of the wrapper, for as long as its number cannot have been given to another;
#   2. STEP_ENV_VAR in the environment that the process was started with, naming the step's directory;
#   3. the step's output as its standard output or error, where a process has been given another environment;
#   4. an orphan that has become our child, bears no mark that we can read (ssh-agent denies it), and is of an age at
#      which only this step can have started it;
#   5. the children of members, all that is in a session of a member, and what was a member before.
#
# No evidence is a path among the arguments: an operator's `du` has it too. A daemon of ours is never a member, nor is
# the walk over children led through it: it says so by DAEMON_ENV_VAR. A pid, a group and a session may come back as
# another's: a process is its pid and its start time, compared before every signal; the wrapper is left a zombie until
# `release`, so that its numbers stay ours. What a scan saw in the middle of an exec, when a process has no environment,
# says nothing of it: that scan does not count.
#
# To stop a tree is to signal first what is known without looking, to look then, and to end when three whole scans in
# succession have found nothing.

STEP_ENV_VAR = "REMOTE_EXECUTOR_STEP"  # in the environment of each process of a step; its value is the step's directory
DAEMON_ENV_VAR = "REMOTE_EXECUTOR_DAEMON"  # in that of a daemon which a step has started, in its place
GRACE_S = 5.0  # between asking a tree to end and ending it
_FOREVER_S = 86400.0
_POLL_S = 0.02  # between looks at a process that no descriptor stands for
_SWEEP_S = 10.0


class ProcessTree(Protocol):
    """One step's wrapper and all that it started. `wake` is for any thread, the rest for the one that owns the tree."""

    pid: int  # of the wrapper; 0 where unknown

    def wait(self, deadline_s: float | None) -> bool:
        """Wait for the wrapper's end, until time.monotonic() is `deadline_s` or a `wake`; whether it has ended."""

    def wake(self) -> None:
        """Make `wait` return, and have `stop` ask again whether it should hurry."""

    def exit_code(self) -> int | None:
        """Return the code of an ended wrapper that is our child and ended by itself.

        None when it was killed by a signal or is no child of ours: its result file may know more. Without one the step
        is lost, and what it left running must be stopped first.
        """

    def stop(self, is_hurried: Callable[[], bool]) -> None:
        """End the tree: ask every member, grant the whole tree GRACE_S, end by force what is left.

        The grace ends as soon as `is_hurried` says so, which is asked at every `wake` and at least every 50 ms.
        """

    def close(self) -> None:
        """Give back the descriptors; idempotent."""


class StepProcesses(Protocol):
    """Starts, adopts and collects process trees; any thread may call it."""

    initial_files: Mapping[str, bytes]  # what a step's directory holds beside the script before `start`, of mode 0600

    def start(self, command: Sequence[str], step_dir: str, cwd: str, env: Mapping[str, str]) -> ProcessTree:
        """Start the command behind the wrapper, its output into the step's file; `env` is added to the daemon's own.

        Raises OSError, after which nothing runs: `is_scarcity` tells whether to try again.
        """

    def adopt(self, step_dir: str) -> ProcessTree | None:
        """Return the tree of a step that an earlier daemon started, None when its wrapper has ended.

        Raises OSError where that cannot be known for now, for want of a descriptor.
        """

    def remains(self, step_dirs: Sequence[str]) -> ProcessTree:
        """Return a tree of what steps whose wrappers have ended left running: `wait` is True at once."""

    def may_have_started(self, step_dir: str) -> bool:
        """Tell by the step's files whether its script may have run; raises OSError where they cannot be read."""

    def release(self, tree: ProcessTree) -> None:
        """Give back what the tree holds; it has ended, or runs on without us."""

    def reap(self) -> None:
        """Collect orphans of steps that have ended; for one thread, now and then."""


_SCARCE = {errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
# ERROR_NOT_ENOUGH_MEMORY, _DISK_FULL, _NO_SYSTEM_RESOURCES, _COMMITMENT_LIMIT, _NOT_ENOUGH_QUOTA (System Error Codes)
_SCARCE_ON_WINDOWS = {8, 112, 1450, 1455, 1816}


def is_scarcity(error: OSError) -> bool:
    """Tell an error that says "not now" (descriptors, processes, memory, disk) from one that will not pass."""
    return error.errno in _SCARCE or getattr(error, "winerror", None) in _SCARCE_ON_WINDOWS


# ======================================================================================================================
# II operating system / POSIX processes: trees found in the process table, behind a wrapper of shell builtins
# ======================================================================================================================

# Left alone is what cannot be caught, is the shell's own, or ends nothing by default; and a fault, of which a trap
# would make an endless loop. The real-time signals stand last: zsh, which knows none, stops there.
_UNTRAPPED = {"KILL", "STOP", "CHLD", "CONT", "TSTP", "TTIN", "TTOU", "WINCH", "URG", "INFO"}
_FAULTS = {"SEGV", "BUS", "ILL", "FPE"}


def _trapped_signals() -> list[int]:
    """Return the signals that end a process unless it catches them, and that it can catch."""
    kept = {getattr(signal, f"SIG{name}", None) for name in _UNTRAPPED | _FAULTS}
    return sorted(int(number) for number in set(signal.valid_signals()) - kept)


# $0 is the step's directory, $1 and $2 the umask and the limit of open files that the daemon was started with: no
# variable has a name here, for the step's environment may hold any. Every word is a builtin.
# The file `pid` is there already, empty. The pid is appended first: no pid, no run. `begun` follows when the subshell
# is about to become the script: a wrapper that could not fork, with whatever code its shell ends then, has begun
# nothing; nor has one that could not write that, and is killed for it, lest it writes a result.
# `trap :` and not `trap ''`: children get the default handlers, the wrapper survives a signal to its group and tells
# the result. Its own stderr is nowhere: a shell says "Killed" there, and would say it in the step's output if it did
# the redirection of 2 itself and not in the subshell.
# `set -C`: what is there already, a link perhaps, is not written to. A result that finds no room goes into `pid`, which
# has a block on the disk, by the descriptor that was opened before the script could put something else there.
_WRAPPER = (
    'exec 9>>"$0/pid"; echo "$$ wrapper" >&9 || exit 125; umask $1; ulimit -Sn $2; shift 2; '
    f"trap : {' '.join(map(str, _trapped_signals()))}; "
    '(echo begun >&9 || { kill -9 $$; exit; }; exec "$@" 2>&1 9>&-); set -- $?; '
    'umask 077; set -C; echo $1 >"$0/rc" || echo "ended $1" >&9; exit $1'
)
# A shell drops names that are none of its own, and sets, resets or minds these. Their values travel in a file of the
# step's directory, for everybody on the host may read a command line, and the environment is made of it after the
# wrapper's shell. What an interpreter ignores when it starts must be as by default in the script.
_ORDINARY_NAME = re.compile(
    r"(?!(?:_|A__z|BASH\w*|COLUMNS|COMP_\w*|COPROC|CPUTYPE|DIRSTACK|E?[UG]ID|ENV|EPOCH\w*|ERRNO|FUNCNAME|GROUPS|HIST\w*"
    r"|IFS|KSH\w*|LINENO|LINES|MACHTYPE|OLDPWD|OPT\w+|OSTYPE|PATHSEP|PGRP|PIPESTATUS|POSIXLY_CORRECT|PPID|PS[1-4]|PWD"
    r"|RANDOM|REPLY|SECONDS|SHELLOPTS|SHLVL|SRANDOM|TMOUT|TTY|USERNAME|USER_ID|VENDOR|ZSH\w*|signals)\Z)"
    r"[A-Za-z_][A-Za-z0-9_]*"
)
_EXEC_WITH_ENVIRONMENT = """\
import _signal, os, sys
with open(sys.argv[1], "rb") as file:
    pairs = [entry.split(b"=", 1) for entry in file.read().split(b"\\0")]
os.unlink(sys.argv[1])
for name in ("SIGPIPE", "SIGXFSZ", "SIGXFZ"):
    if hasattr(_signal, name):
        _signal.signal(getattr(_signal, name), _signal.SIG_DFL)
os.execve(sys.argv[2], sys.argv[2:], dict(pairs))
"""


class ProcessInfo(NamedTuple):
    """A process as a scan saw it; the start time tells it from a later one with the same pid."""

    pid: int
    parent: int
    group: int
    session: int
    start: str


class _Marks(NamedTuple):
    """What a process says of itself: the step that it is of, by directory, empty for none; whether it is a daemon."""

    step_dir: bytes
    is_daemon: bool
    is_fresh: bool = False  # it has not yet become what it will be


_NO_MARKS = _Marks(b"", False, True)


class _Lifetimes:
    """When the steps ran whose orphans become children of this process; thread-safe.

    A time is one of the process table, in clock ticks since the boot.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below
        self._spans: dict[bytes, tuple[int, float]] = {}  # from its start to its end, by the step's directory
        self._may_own = False

    def open(self) -> None:
        """Called before the first step: whatever becomes a child of ours from now on comes from a step.

        Unless it is so with every orphan of a container, or whoever became this process by exec had children.
        """
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            return
        self._may_own = os.getpid() != 1

    def begin(self, step_dir: bytes) -> None:
        with self._lock:
            self._may_own = self._may_own and len(self._spans) < _SPANS_LIMIT
            if self._may_own:
                self._spans[step_dir] = (_clock_ticks(), float("inf"))

    def end(self, step_dir: bytes) -> None:
        with self._lock:
            if step_dir in self._spans:
                self._spans[step_dir] = (self._spans[step_dir][0], _clock_ticks() + 1)

    def forget_ended(self, before: int) -> None:
        """Forget steps that ended before a time at which we had no orphan."""
        with self._lock:
            for step_dir in [name for name, (_, end) in self._spans.items() if end < before]:
                del self._spans[step_dir]

    def can_only_be_of(self, step_dirs: frozenset[bytes], start: int) -> bool:
        """Whether an orphan that started then can be of none but these steps."""
        with self._lock:
            suspects = {name for name, (begin, end) in self._spans.items() if begin <= start <= end}
        return self._may_own and bool(suspects) and suspects <= step_dirs


class _ProcessTable:
    """The live processes of the host and the marks that they bear; any thread may look.

    A look costs milliseconds and two descriptors, so one at a time is taken, and serves all who asked before it began:
    a task of many steps is stopped at the cost of one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below; who asks waits for the look of another
        self._begin_s = 0.0  # of the last look
        self._seen: list[tuple[ProcessInfo, _Marks]] = []
        self._unclear: list[ProcessInfo] = []
        self._strangers: dict[tuple[int, str], _Marks] = {}  # no exec gives a stranger the mark of a step

    def look(self) -> tuple[list[tuple[ProcessInfo, _Marks]], list[ProcessInfo]]:
        """Return the processes, and those of them of which it is not clear yet what they are. Raises OSError."""
        asked_s = time.monotonic()
        with self._lock:
            if self._begin_s <= asked_s:
                self._begin_s = time.monotonic()
                self._take()
            return self._seen, self._unclear

    def _take(self) -> None:
        self._seen = []
        unclear: list[ProcessInfo] = []
        strangers: dict[tuple[int, str], _Marks] = {}
        for one in _scan_processes():
            key = (one.pid, one.start)
            marks = self._strangers.get(key) or _read_marks(one.pid)
            if marks is not None and not marks.step_dir and not marks.is_fresh:
                strangers[key] = marks
            if marks is None or (key not in self._strangers and _start_time(one.pid) != one.start):
                unclear.append(one)  # it execs, or is gone before it could be looked at, and maybe forked
            self._seen.append((one, marks or _NO_MARKS))
        self._strangers = strangers
        trusted = {pid for pid, _ in strangers} - _possible_reapers({one.pid: one.parent for one, _ in self._seen})
        self._unclear = [one for one in unclear if one.parent not in trusted]  # a stranger's child is none of ours


def _possible_reapers(parents: Mapping[int, int]) -> set[int]:
    """Return the processes whose children may be a step's orphans: this one, those above it, and the first of all."""
    reapers = {1}
    pid = os.getpid()
    while pid and pid not in reapers:
        reapers.add(pid)
        pid = parents.get(pid, 0)
    return reapers


class _Shared(NamedTuple):
    """What the trees of this process have in common."""

    table: _ProcessTable
    lifetimes: _Lifetimes
    reserve: DescriptorReserve


class PosixTree(ProcessTree):
    """Processes of steps, found in the process table; where it has a wrapper, that is in a session of its own.

    A process that is no member is never signalled: before every signal the start time is compared.
    """

    def __init__(
        self,
        step_dirs: Iterable[str],
        pid: int,
        child: subprocess.Popen[bytes] | None,
        wake_pipe: tuple[int, int],
        shared: _Shared,
    ) -> None:
        self.pid = pid
        self.step_dirs = frozenset(os.fsencode(path) for path in step_dirs)
        self._child = child  # None when an earlier daemon started it
        self._shared = shared
        self._ended = not pid
        self._start = _start_time(pid) if pid and not child else ""
        self._wake_out, self._wake_in = wake_pipe  # -1 where there was no descriptor left for it
        self._is_woken = False
        self._pidfd = _open_pidfd(pid) if pid else -1
        self._members: set[tuple[int, str]] = set()  # processes that are or were of the tree
        self._denied: set[tuple[int, str]] = set()  # members that we may not signal
        self._scan_incomplete = False  # whether it may have missed one
        self._closing = threading.Lock()  # guards _wake_in: a closed descriptor's number may be another's

    def wait(self, deadline_s: float | None) -> bool:
        while not self._ended and (self._pidfd >= 0 or not self._has_ended()):
            left_s = _FOREVER_S if deadline_s is None else deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            if self._pause(min(left_s, _FOREVER_S)):
                return self._has_ended()
        return True

    def wake(self) -> None:
        self._is_woken = True
        with self._closing:
            if self._wake_in >= 0:
                os.write(self._wake_in, b"w")

    def exit_code(self) -> int | None:
        if self._child is None:
            return None
        if not _KEEP_ZOMBIES:
            code = self._child.poll()
            return None if code is None or code < 0 else code
        with contextlib.suppress(ChildProcessError):  # whoever ignores SIGCHLD has none to wait for
            status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if status is not None and status.si_code == os.CLD_EXITED:
                return status.si_status
        return None

    def stop(self, is_hurried: Callable[[], bool]) -> None:
        if self._owns_session():  # the number of the group, too; this needs no descriptor
            _signal_group(self.pid, signal.SIGTERM)
            _signal_group(self.pid, signal.SIGCONT)
        with self._shared.reserve.lend():
            self._ask_other_groups()
            has_ended = self._await_end(is_hurried)
            self._kill_all(1 if has_ended else 0)

    def close(self) -> None:
        with self._closing:
            for descriptor in (self._pidfd, self._wake_in, self._wake_out):
                if descriptor >= 0:
                    os.close(descriptor)
            self._pidfd = -1
            self._wake_in = -1
            self._wake_out = -1

    def reap(self) -> None:
        """Collect the wrapper if it has ended and is our child: its numbers may be another's from now on."""
        if self._child is not None:
            self._child.poll()

    def _pause(self, seconds: float) -> bool:
        """Wait so long at most, for a `wake` or the wrapper's end; whether it was a wake."""
        poller = select.poll()
        if self._wake_out >= 0:
            poller.register(self._wake_out, select.POLLIN)
        if self._pidfd >= 0 and not self._ended:
            poller.register(self._pidfd, select.POLLIN)
        if self._wake_out < 0 or (self._pidfd < 0 and not self._ended):
            seconds = min(seconds, _POLL_S)
        ready = [number for number, _ in poller.poll(seconds * 1000 + 0.999)]
        if self._pidfd in ready:
            self._ended = True
        elif self._wake_out in ready:
            os.read(self._wake_out, 4096)
            return True
        elif self._wake_out < 0 and self._is_woken:
            self._is_woken = False
            return True
        return False

    def _has_ended(self) -> bool:
        """Whether the wrapper has ended. It stays a zombie until `release`: its pid, group and session stay ours."""
        if not self._ended:
            if self._child is None:
                self._ended = self._has_vanished()
            elif _KEEP_ZOMBIES:
                try:
                    status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                    self._ended = status is not None
                except ChildProcessError:
                    self._ended = True
            else:
                self._ended = self._child.poll() is not None
        return self._ended

    def _has_vanished(self) -> bool:
        """Whether an adopted wrapper is gone; one that cannot be looked at is not."""
        with contextlib.suppress(OSError):
            start = _start_time(self.pid)
            return not start or start != self._start
        return False

    def _owns_session(self) -> bool:
        """Whether the number of the session is certain to be ours."""
        if not self.pid:
            return False
        return not self._has_ended() or (self._child is not None and _KEEP_ZOMBIES and self._child.returncode is None)

    # -- the stages of a stop

    def _ask_other_groups(self) -> None:
        """Send SIGTERM to the members that the signal to the wrapper's group did not reach, once to each."""
        asked_group = self.pid if self._owns_session() else 0
        asked: set[tuple[int, str]] = set()
        for _ in range(_ASKING_SCANS):
            for one in self._scan():
                if one.group != asked_group and (one.pid, one.start) not in asked:
                    asked.add((one.pid, one.start))
                    self._signal(one, signal.SIGTERM)
                    self._signal(one, signal.SIGCONT)
            if not self._scan_incomplete:
                break

    def _await_end(self, is_hurried: Callable[[], bool]) -> bool:
        """Return when a whole scan has found nothing, True then, or when the grace is over."""
        end_s = time.monotonic() + GRACE_S
        unsure_s = end_s
        pause_s = 0.001
        while time.monotonic() < end_s and not is_hurried():
            is_quiet = self._has_ended() and not any(map(_is_running, self._members - self._denied))
            if is_quiet and not self._scan():
                if not self._scan_incomplete:
                    return True
                unsure_s = min(unsure_s, time.monotonic() + _UNSURE_S)  # of a host too busy for a whole scan
            else:
                unsure_s = end_s
            if time.monotonic() >= unsure_s:
                break
            self._pause(pause_s)
            pause_s = min(2 * pause_s, _POLL_S)
        return False

    def _kill_all(self, quiet: int) -> None:
        """Send SIGKILL to whatever is left, until three scans have found nothing; `quiet` of them have."""
        begin_s = time.monotonic()
        last_s = begin_s  # when a member was seen
        while quiet < 3 and time.monotonic() < min(begin_s + _SWEEP_S, last_s + _UNSURE_S):
            if self._owns_session():
                _signal_group(self.pid, signal.SIGKILL)
            members = self._scan()
            for one in members:
                self._signal(one, signal.SIGKILL)
            if members:
                quiet = 0
                last_s = time.monotonic()
            elif not self._scan_incomplete:
                quiet += 1

    def _signal(self, one: ProcessInfo, number: int) -> None:
        """Signal a member that is still the process which was seen."""
        try:
            if _start_time(one.pid) == one.start:
                os.kill(one.pid, number)
        except PermissionError:
            self._denied.add((one.pid, one.start))  # it has become another user's, by sudo: waiting does not help
        except OSError:  # it is gone, or no descriptor is left to look: the next scan tells
            pass

    # -- membership

    def _scan(self) -> list[ProcessInfo]:
        """Return the live members that we may signal."""
        try:
            seen, unclear = self._shared.table.look()
        except OSError:  # no descriptor or memory to look with
            self._scan_incomplete = True
            time.sleep(_POLL_S)
            return []
        step_dirs = {one.pid: marks.step_dir for one, marks in seen}
        owners = {step_dirs.get(one.parent, b"") for one in unclear}
        self._scan_incomplete = bool(owners & {b"", *self.step_dirs})  # what another step starts is not ours
        others = [(one, marks) for one, marks in seen if one.pid != os.getpid() and not marks.is_daemon]
        found = {one for one, marks in others if self._is_member(one, marks)}
        outside = _own_sessions()
        while True:
            parents = {one.pid for one in found}
            sessions = {one.session for one in found} - outside
            more = {one for one, _ in others if one.parent in parents or one.session in sessions} - found
            if not more:
                break
            found |= more
        self._members.update((one.pid, one.start) for one in found)
        return [one for one in found if (one.pid, one.start) not in self._denied]

    def _is_member(self, one: ProcessInfo, marks: _Marks) -> bool:
        """Whether there is evidence of the process itself, whatever others are."""
        if (one.pid, one.start) in self._members or (self._owns_session() and one.session == self.pid):
            return True
        if marks.step_dir or marks.is_fresh:
            return marks.step_dir in self.step_dirs
        is_orphan = ON_LINUX and one.parent == os.getpid()
        return is_orphan and self._shared.lifetimes.can_only_be_of(self.step_dirs, int(one.start))


_KEEP_ZOMBIES = hasattr(os, "waitid")  # not on every Mac
_UNSURE_S = 1.0  # of scans that find nothing, but miss some process of a busy host
_SPANS_LIMIT = 10_000  # ended steps are kept for as long as there is an orphan, which may be for ever
_EXEC_LOOKS = 10
_ASKING_SCANS = 3  # more would ask what members start to clean up
_KERNEL_THREAD = 0x0020_0000  # PF_KTHREAD of include/linux/sched.h


def _open_pidfd(pid: int) -> int:
    """Open a descriptor that becomes readable at the process's end; -1 where there is none (pidfd_open(2))."""
    opener: Callable[[int], int] | None = getattr(os, "pidfd_open", None)
    with contextlib.suppress(OSError):
        return opener(pid) if opener else -1
    return -1


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(group, number)


def _own_sessions() -> set[int]:
    """Return the numbers that are no step's: of this process, and of those outside of its container."""
    return {0, os.getsid(0), os.getpgrp()}


def _clock_ticks() -> int:
    """Return the time as the process table has it (proc_pid_stat(5), starttime)."""
    if not ON_LINUX:
        return 0
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def _read_proc(pid: int | str, name: str) -> bytes | None:
    """Return a file of the process in /proc; empty when the process is gone, None when it denies to show it.

    Raises OSError where there is no descriptor or memory to look with.
    """
    try:
        with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:
            return file.readall()
    except PermissionError:
        return None
    except OSError as error:
        if error.errno in _SCARCE:
            raise
        return b""


def _stat_of(pid: int | str) -> list[bytes]:
    """Return the fields of /proc/PID/stat from the state on (proc_pid_stat(5)); none when there is no such process."""
    return (_read_proc(pid, "stat") or b"").rpartition(b")")[2].split()


def _start_time(pid: int) -> str:
    """Return when the process started, in the system's words; empty when it is gone or a zombie. Raises OSError."""
    if ON_LINUX:
        fields = _stat_of(pid)
        return fields[19].decode("ascii") if fields and fields[0] not in (b"Z", b"X") else ""
    return _ask_ps("-o", "lstart=", "-p", str(pid)).strip()


def _is_running(process: tuple[int, str]) -> bool:
    """Whether the process with this pid and start time lives; one that cannot be looked at does."""
    with contextlib.suppress(OSError):
        return _start_time(process[0]) == process[1]
    return True


def _scan_processes() -> Iterator[ProcessInfo]:
    """Yield every live process of the host but the kernel's. Raises OSError."""
    if ON_LINUX:
        seen: set[str] = set()
        while fresh := [name for name in os.listdir("/proc") if name.isdigit() and name not in seen]:
            seen.update(fresh)  # what they fork meanwhile, the next listing has
            for name in fresh:
                fields = _stat_of(name)
                if fields and fields[0] not in (b"Z", b"X") and not int(fields[6]) & _KERNEL_THREAD:
                    parent, group, session = map(int, fields[1:4])
                    yield ProcessInfo(int(name), parent, group, session, fields[19].decode("ascii"))
        return
    for line in _ask_ps("-axo", "pid=,ppid=,pgid=,lstart=").splitlines():
        pid, ppid, pgid, start = line.split(None, 3)
        yield ProcessInfo(int(pid), int(ppid), int(pgid), int(pgid), start.strip())


def _read_marks(pid: int) -> _Marks | None:
    """Return the marks of a process; None in the middle of an exec or an exit. Raises OSError.

    A process without a mark is of the step whose output it holds.
    """
    if not ON_LINUX:
        words = _ask_ps("-Eww", "-o", "command=", "-p", str(pid)).split()
        variables = dict(os.fsencode(word).partition(b"=")[::2] for word in reversed(words))
        return _Marks(variables.get(STEP_ENV_VAR.encode(), b""), DAEMON_ENV_VAR.encode() in variables)
    environ = _read_proc(pid, "environ")
    if environ == b"" and _is_between_programs(pid):
        return None
    if environ and environ == _own_environ():
        return _NO_MARKS  # a wrapper before its exec; never one of a tree that is being stopped
    variables = dict(entry.partition(b"=")[::2] for entry in reversed((environ or b"").split(b"\0")))
    step_dir = variables.get(STEP_ENV_VAR.encode(), b"")
    is_daemon = DAEMON_ENV_VAR.encode() in variables
    for number in () if step_dir or is_daemon else (1, 2):
        with contextlib.suppress(OSError):  # it is gone, or denies that
            holder, _, name = os.readlink(f"/proc/{pid}/fd/{number}".encode()).rpartition(b"/")
            if name == b"output":
                step_dir = holder
    return _Marks(step_dir, is_daemon)


@functools.lru_cache(maxsize=1)
def _own_environ() -> bytes | None:
    return _read_proc("self", "environ")


def _is_between_programs(pid: int) -> bool:
    """Whether a process that shows an empty environment has none yet, or none any more."""
    fields = _stat_of(pid)
    return not fields or fields[48] == b"0"  # env_end


class PosixProcesses(StepProcesses):
    """Starts, adopts and collects trees; any thread may call it."""

    initial_files = types.MappingProxyType({"pid": b""})

    def __init__(self, umask: int, descriptors: str, reserve: DescriptorReserve) -> None:
        self._limits = f"{umask:03o}", descriptors
        self._lifetimes = _Lifetimes()
        self._shared = _Shared(_ProcessTable(), self._lifetimes, reserve)
        self._starting = threading.Lock()  # guards _is_reaper
        self._is_reaper = False  # until the first step starts: ctypes takes memory that an idle daemon need not
        own = {name: value for name, value in os.environb.items() if not name.startswith(b"REMOTE_EXECUTOR_")}
        self._environment = {**_user_environment(), **own}
        self._null = os.open(os.devnull, os.O_RDWR)
        self._children: set[int] = set()  # wrappers, until `release`
        self._orphans: set[int] = set()  # zombies that were not among them at the last look

    def start(self, command: Sequence[str], step_dir: str, cwd: str, env: Mapping[str, str]) -> PosixTree:
        self._become_reaper()
        wake_pipe = os.pipe()  # all that a running tree needs first: afterwards nothing may fail
        try:
            child = self._spawn(command, step_dir, cwd, env)
        except OSError:
            for descriptor in wake_pipe:
                os.close(descriptor)
            raise
        self._children.add(child.pid)
        return PosixTree((step_dir,), child.pid, child, wake_pipe, self._shared)

    def adopt(self, step_dir: str) -> PosixTree | None:
        lines = _read_pid_file(step_dir)
        words = lines[0].split() if lines else []
        pid = int(words[0]) if words and words[0].isdigit() else 0
        if not pid:  # its wrapper has not come to write it, or the script has removed it
            pid = _find_wrapper(os.fsencode(step_dir))
        if not pid or not _is_wrapper(pid, os.fsencode(step_dir)):
            return None
        return PosixTree((step_dir,), pid, None, _open_pipe(), self._shared)

    def remains(self, step_dirs: Sequence[str]) -> PosixTree:
        return PosixTree(step_dirs, 0, None, _open_pipe(), self._shared)

    def may_have_started(self, step_dir: str) -> bool:
        """Tell by the file `pid`: it was there, empty, before the wrapper, which never removes it.

        The wrapper of version 1.0.0 made it itself, and wrote its pid alone into it before the script ran.
        """
        lines = _read_pid_file(step_dir)
        if lines is None or os.path.lexists(os.path.join(step_dir, "rc")):
            return True
        is_wrapper_alone = re.fullmatch(rb"[0-9]+ wrapper\s*", lines[0]) is not None if lines else True
        return not is_wrapper_alone or len(lines) > 1

    def release(self, tree: ProcessTree) -> None:
        if isinstance(tree, PosixTree):
            tree.reap()
            self._children.discard(tree.pid)
            if tree.pid:
                for step_dir in tree.step_dirs:
                    self._lifetimes.end(step_dir)
        tree.close()

    def reap(self) -> None:
        """Collect orphans of steps that have ended; for one thread.

        Only what was a zombie at the last look too: a child that Popen has not yet told of is no orphan.
        """
        if not ON_LINUX:
            return
        now = _clock_ticks()
        if not _has_orphan():
            self._lifetimes.forget_ended(now)
        if not _has_zombie_child():
            return
        own = str(os.getpid()).encode()
        pids = (int(name) for name in os.listdir("/proc") if name.isdigit() and _stat_of(name)[:2] == [b"Z", own])
        zombies = set(pids) - self._children
        for pid in zombies & self._orphans:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        self._orphans = zombies

    def _become_reaper(self) -> None:
        """Orphans of steps become children of this process, where a stop finds them (prctl(2))."""
        with self._starting:
            if self._is_reaper or not ON_LINUX:
                return
            import ctypes

            self._lifetimes.open()
            ctypes.CDLL(None, use_errno=True).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
            self._is_reaper = True

    def _spawn(
        self, command: Sequence[str], step_dir: str, cwd: str, env: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start the wrapper. Raises OSError, and leaves no file but an empty `pid` then."""
        file = os.path.join(step_dir, "output")
        with contextlib.suppress(FileExistsError):  # StepDirectory has made it
            os.close(os.open(os.path.join(step_dir, "pid"), _NEW_FILE, 0o600))
        output = os.open(file, _NEW_FILE | os.O_APPEND, 0o600)
        mark = os.fsencode(step_dir)
        self._lifetimes.begin(mark)
        try:
            environment, words = self._environment_for(command, step_dir, {**env, STEP_ENV_VAR: step_dir})
            return subprocess.Popen(
                ["/bin/sh", "-c", _WRAPPER, step_dir, *self._limits, *words],
                stdin=self._null,
                stdout=output,
                stderr=self._null,
                cwd=cwd,
                env=environment,
                start_new_session=True,
                close_fds=False,  # all are closed at exec already, `keep_descriptors` saw to it
            )
        except (OSError, ValueError, MemoryError, subprocess.SubprocessError) as error:
            self._lifetimes.end(mark)
            for name in ("output", "environment"):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(step_dir, name))
            raise _as_os_error(error) from error
        finally:
            os.close(output)

    def _environment_for(
        self, command: Sequence[str], step_dir: str, env: Mapping[str, str]
    ) -> tuple[dict[bytes, bytes], list[str]]:
        """Return the wrapper's environment, and the words of the command that sees exactly `env` beside our own."""
        added = {_env_bytes(name): _env_bytes(value) for name, value in env.items()}
        environment = {**self._environment, **added}
        odd = [name for name in env if not _ORDINARY_NAME.fullmatch(name)]
        if not odd:
            return environment, [*command]
        if getattr(sys, "frozen", False) or not sys.executable:
            return environment, ["/usr/bin/env", "--", *(f"{name}={env[name]}" for name in odd), *command]
        entries = b"\0".join(name + b"=" + value for name, value in environment.items())
        if entries.count(b"\0") >= len(environment):
            raise ValueError("embedded null byte")
        file = os.path.join(step_dir, "environment")
        with open(os.open(file, _NEW_FILE, 0o600), "wb") as target:
            target.write(entries)
        kept = (STEP_ENV_VAR.encode(), b"LD_LIBRARY_PATH")  # the latter may be what our Python needs to start
        clean = {name: environment[name] for name in kept if name in environment}
        return clean, [sys.executable, "-I", "-S", "-c", _EXEC_WITH_ENVIRONMENT, file, *command]


_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL  # which follows no link that another step has put there


def _as_os_error(error: Exception) -> OSError:
    """Return what Popen raises as an error of the system."""
    if isinstance(error, OSError):
        return error
    number = {MemoryError: errno.ENOMEM, ValueError: errno.EINVAL}.get(type(error), errno.EIO)
    return OSError(number, str(error) or os.strerror(number))


def _open_pipe() -> tuple[int, int]:
    """Open a pipe for wake-ups; without a descriptor there is none, and the tree looks often."""
    with contextlib.suppress(OSError):
        return os.pipe()
    return -1, -1


def _read_pid_file(step_dir: str) -> list[bytes] | None:
    """Return the lines of a step's file `pid`; None when it is gone. Raises OSError where it cannot be read now."""
    try:
        with SafeDirectory(step_dir).read("pid") as file:
            return file.read(4096).splitlines()
    except OSError as error:
        if is_scarcity(error):
            raise
        return None


def _is_wrapper(pid: int, step_dir: bytes) -> bool:
    """Whether the process is the wrapper of a step: it leads a session, and bears the step's mark."""
    if not ON_LINUX:
        return (marks := _read_marks(pid)) is not None and marks.step_dir == step_dir
    fields = _stat_of(pid)
    if not fields or fields[0] in (b"Z", b"X") or int(fields[3]) != pid:
        return False
    return STEP_ENV_VAR.encode() + b"=" + step_dir in (_read_proc(pid, "environ") or b"").split(b"\0")


def _find_wrapper(step_dir: bytes) -> int:
    """Return the pid of a step's wrapper that has not told it; 0 where none runs."""
    for _ in range(_EXEC_LOOKS if ON_LINUX else 0):
        leaders = [one.pid for one in _scan_processes() if one.session == one.pid]
        for pid in leaders:
            if _is_wrapper(pid, step_dir):
                words = (_read_proc(pid, "cmdline") or b"").split(b"\0")
                if words[1:2] == [b"-c"] and step_dir in words[3:5]:  # not what it started in a session of its own
                    return pid
        if not any(_read_proc(pid, "environ") == b"" and _is_between_programs(pid) for pid in leaders):
            break
        time.sleep(_POLL_S)  # one of them is about to become something
    return 0


def _user_environment() -> dict[bytes, bytes]:
    """Return what a login sets, and a service manager may not (systemd.exec(5), User=)."""
    import pwd

    try:
        user = pwd.getpwuid(os.getuid())
    except KeyError:  # a container's user need not be in the database
        return {}
    entries = {"HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name, "SHELL": user.pw_shell}
    return {name.encode(): os.fsencode(value) for name, value in entries.items() if value}


def _env_bytes(text: str) -> bytes:
    """Text of an environment as UTF-8, whatever the locale; what came as other bytes goes as these."""
    return text.encode("utf-8", "surrogateescape")


def _has_zombie_child() -> bool:
    with contextlib.suppress(ChildProcessError):
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return False


def _has_orphan() -> bool:
    """Whether a process of a step has become our child: the kernel gives it to the first thread, which starts none."""
    with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children", "rb") as file:
        return bool(file.read().split())
    return True


# ======================================================================================================================
# II operating system / Windows processes: trees in Job Objects, behind a batch file
# ======================================================================================================================

# `%*` is the command line. The wrapper's own standard error is nowhere: what cmd says when it cannot write the result
# is no output of the step. A result that is there before is not the wrapper's: another process made it and may hold it,
# so it is tried again for seconds. The redirection stands before `echo`, or the last digit would be a handle's number.
# Paths are relative to the workspace, where the wrapper stays: so no letter of the root's, such as %, is a word of
# cmd's language. What the lines below `held` set in the environment, no process of the step sees.
_BATCH_WRAPPER = """\
@%* 2>&1\r
@if exist "{result}" goto held\r
@>"{result}" echo %errorlevel%& exit %errorlevel%\r
:held\r
@echo off\r
set code=%errorlevel%\r
set tries=5\r
:again\r
>"{result}" echo %code%\r
set written=\r
set /p written=<"{result}"\r
if "%written%"=="%code%" exit %code%\r
set /a tries-=1 >nul\r
if %tries%==0 exit %code%\r
"{ping}" -n 2 127.0.0.1 >nul\r
goto again\r
"""
# The exit code of what a stop ends, as a signed number; no script ends with it by itself. Bit 29 is of applications
# (MSDN, "GetLastError"); what the system and its runtimes use begins with 0xC0, 0x80 or 0xE0 (C++, .NET).
_ENDED_BY_STOP = -0x1FAD_ADAE  # 0xE0525252
_SPAWNS = 3  # attempts
# What is read again while the step runs: cmd opens a batch file for each of its lines, a later daemon reads the pid.
# The wrapper holds them, so that nobody else can without sharing them. A script may change or delete itself.
_HELD_FILES = {"pid": 0x01, "run.bat": 0x01, "script.bat": 0x07}  # FILE_SHARE_READ, and with WRITE and DELETE
_OWN_PROCESS_LOOK_S = 0.5  # until a step's own process is looked for; most steps are over by then
_OPTION = re.compile(r"[-/][A-Za-z0-9:]+|Bypass|call")


class _WrapperRecord(NamedTuple):
    """The step's file `pid`, which the daemon writes while the wrapper is suspended: at first what the wrapper is.

    A second line follows when the wrapper can be adopted, and may run.
    """

    pid: int
    created: int  # which tells the wrapper from a later process with the same pid
    job_name: str
    may_have_started: bool = False
    is_batch: bool = False  # the step is a batch file that the wrapper itself runs

    @classmethod
    def read(cls, step_dir: str) -> _WrapperRecord | None:
        """Return what stands there; None where there is no file, or not the whole first line. Raises OSError."""
        try:
            with open(os.path.join(step_dir, "pid"), encoding="ascii") as file:
                first, end, second = file.read(200).partition("\n")
            pid, created, job_name = first.split(" ")
            record = cls(int(pid), int(created), job_name, "\n" in second, "batch" in second)
        except (FileNotFoundError, ValueError):
            return None
        return record if end else None


def _wait_for(handles: Sequence[int], seconds: float) -> int | None:
    """Return the index of the first handle that is signalled; None when the time is over."""
    found = WaitForMultipleObjects(len(handles), (_HANDLE * len(handles))(*handles), False, int(seconds * 1000 + 0.999))
    if found == WAIT_FAILED:
        raise _error_of(_last_error())
    return found - WAIT_OBJECT_0 if found < WAIT_OBJECT_0 + len(handles) else None


def _is_signalled(handle: int) -> bool:
    return _wait_for((handle,), 0) == 0


def _duplicate(handle: int, process: int, access: int = 0, is_inherited: bool = False) -> int:
    """Give a process a handle of what `handle` stands for, with the same access or less; return its number there."""
    copy = _HANDLE()
    options = 0 if access else DUPLICATE_SAME_ACCESS
    DuplicateHandle(GetCurrentProcess(), handle, process, ctypes.byref(copy), access, is_inherited, options)
    return copy.value or 0


def _hand_job(job: int, process: int) -> None:
    """Have a process hold its job, whose name lasts as long as a handle is open somewhere.

    Its children inherit the handle, with which nothing can be done to the job, where they inherit any.
    """
    _duplicate(job, process, JOB_OBJECT_QUERY, is_inherited=True)


def _hold_file(path: str, process: int, share: int) -> None:
    """Have a process hold a file: until its end nobody can open that without sharing it, or in a way not in `share`."""
    with contextlib.suppress(OSError):  # somebody holds it already, or there is none
        file = CreateFileW(path, GENERIC_READ, share, None, OPEN_EXISTING, 0, None)
        try:
            _duplicate(file, process)
        finally:
            CloseHandle(file)


def _limit_job(job: int, flags: int) -> None:
    limits = JobLimits(LimitFlags=flags | JOB_OBJECT_LIMIT_DIE_ON_UNHANDLED_EXCEPTION)  # without a dialog box
    SetInformationJobObject(job, JOB_OBJECT_EXTENDED_LIMIT_INFORMATION, ctypes.byref(limits), ctypes.sizeof(limits))


def _count_active(job: int) -> int:
    """Return how many processes of a job have not ended."""
    accounting = JobAccounting()
    size = ctypes.sizeof(accounting)
    QueryInformationJobObject(job, JOB_OBJECT_BASIC_ACCOUNTING_INFORMATION, ctypes.byref(accounting), size, None)
    return int(accounting.ActiveProcesses)


def _list_members(job: int) -> list[int]:
    """Return the pids of the processes of a job that have not ended (JOBOBJECT_BASIC_PROCESS_ID_LIST)."""
    room = 64
    while True:
        table = (ctypes.c_size_t * (1 + room))()
        heads = ctypes.cast(table, ctypes.POINTER(wintypes.DWORD))  # how many there are, how many of them in the list
        begin = 2 * ctypes.sizeof(wintypes.DWORD) // ctypes.sizeof(ctypes.c_size_t)
        try:
            size = ctypes.sizeof(table)
            QueryInformationJobObject(job, JOB_OBJECT_BASIC_PROCESS_ID_LIST, table, size, None)
            return list(table[begin : begin + heads[1]])
        except OSError as error:
            if getattr(error, "winerror", 0) != ERROR_MORE_DATA:
                raise
        room = 2 * max(room, heads[0])


def _end_job(job: int) -> None:
    """End all processes of a job; return when they have ended, at the latest after some seconds."""
    end_s = time.monotonic() + _SWEEP_S
    while _count_active(job) and time.monotonic() < end_s:
        with contextlib.suppress(OSError):
            TerminateJobObject(job, _ENDED_BY_STOP & 0xFFFF_FFFF)
        time.sleep(_POLL_S)


def list_processes() -> Iterator[tuple[int, int, str]]:
    """Yield pid, parent's pid and lower-case file name of the host's processes."""
    entry = ProcessEntry(Size=ctypes.sizeof(ProcessEntry))
    snapshot = CreateToolhelp32Snapshot(TH32CS_SNAPPROCESS, 0)
    try:
        more = Process32FirstW(snapshot, ctypes.byref(entry))
        while more:
            yield entry.ProcessID, entry.ParentProcessID, entry.ExeFile.lower()
            more = Process32NextW(snapshot, ctypes.byref(entry))
    finally:
        CloseHandle(snapshot)


def _open_child(parent: int, job: int) -> int:
    """Open the process that a member of a job has started, the host of their console aside; return 0 without one."""
    members = {*_list_members(job)} - {parent}
    for pid, parent_pid, name in list_processes() if members else ():
        if parent_pid == parent and pid in members and name != "conhost.exe":
            with contextlib.suppress(OSError):  # it has ended meanwhile
                handle: int = OpenProcess(SYNCHRONIZE | PROCESS_QUERY_LIMITED_INFORMATION, False, pid)
                return handle
    return 0


def _open_process(pid: int) -> int:
    control = PROCESS_TERMINATE | PROCESS_DUP_HANDLE | PROCESS_SET_QUOTA | PROCESS_SUSPEND_RESUME
    handle: int = OpenProcess(SYNCHRONIZE | PROCESS_QUERY_LIMITED_INFORMATION | control, False, pid)
    return handle


def _open_wrapper(record: _WrapperRecord) -> int:
    """Open the wrapper that the record names; return 0 when it has ended."""
    with contextlib.suppress(OSError):
        process = _open_process(record.pid)
        if _creation_time(process) == record.created and not _is_signalled(process):
            return process
        CloseHandle(process)
    return 0


def _end_process(process: int) -> None:
    """End a process and close the handle; return when it has ended, at the latest after some seconds."""
    try:
        TerminateProcess(process, _ENDED_BY_STOP & 0xFFFF_FFFF)
        _wait_for((process,), _SWEEP_S)
    except OSError:  # it is ending already
        pass
    finally:
        CloseHandle(process)


def _quote_word(word: str) -> str:
    """Return a word of a line that cmd reads: within quotes, unless it is an option, none of whose letters is cmd's."""
    return word if _OPTION.fullmatch(word) else f'"{word}"'


class WindowsTree:
    """One step's wrapper and what it started, in a Job Object. `wake` is for any thread, the rest for one.

    The step is over when its own process is, which the wrapper has started and waits for. A wrapper that somebody
    killed, or that took a Ctrl-C, leaves no result and may end before that process: then the tree waits for the latter.
    """

    def __init__(
        self, record: _WrapperRecord, step_dir: str, wrapper: int, job: int, child: subprocess.Popen[bytes] | None
    ) -> None:
        self.pid = record.pid
        self._result = os.path.join(step_dir, "rc")
        self._is_batch = record.is_batch
        self._wrapper = wrapper
        self._own = 0  # the step's own process, once it is known
        self._look_s = _OWN_PROCESS_LOOK_S
        self._job = job
        self._child = child  # None when an earlier daemon started it
        self._woken = CreateEventW(None, False, False, None)
        self._closing = threading.Lock()  # guards _woken: a closed handle's number may be another's

    def wait(self, deadline_s: float | None) -> bool:
        """Wait for the step's end until time.monotonic() is `deadline_s`, or a `wake`; return whether it has ended."""
        while not self._has_ended():
            left_s = _FOREVER_S if deadline_s is None else deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            awaited = self._own if self._own and _is_signalled(self._wrapper) else self._wrapper
            signalled = _wait_for((awaited, self._woken), min(left_s, self._look_s, _FOREVER_S))
            if signalled == 1:
                return self._has_ended()
            if signalled is None:
                self.find_own_process()
        return True

    def wake(self) -> None:
        """Make `wait` return."""
        with self._closing:
            if self._woken:
                SetEvent(self._woken)

    def exit_code(self) -> int | None:
        """Return the code of an ended step, signed, as cmd and PowerShell show it.

        The wrapper hands on that of the step's process. Where the wrapper was killed, it is asked of that process; None
        when that is not known either, or when a stop ended it.
        """
        told_by = self._wrapper if self._has_result() else self._own
        if not told_by or not _is_signalled(told_by):
            return None
        code = ctypes.c_int32()
        GetExitCodeProcess(told_by, ctypes.byref(code))
        return None if code.value == _ENDED_BY_STOP else code.value

    def stop(self, is_hurried: Callable[[], bool]) -> None:
        """End all processes of the job, also those that the wrapper has left.

        At once, so far: `is_hurried` is for the time when they are asked first.
        """
        _end_job(self._job)

    def close(self) -> None:
        """Give back the handles."""
        with self._closing:
            if self._woken:
                for handle in (self._wrapper, self._own, self._job, self._woken):
                    if handle:
                        CloseHandle(handle)
            self._woken = 0
        if self._child:
            self._child.poll()

    def find_own_process(self) -> bool:
        """Look for the step's own process, each time after a longer pause; return whether it is known."""
        self._look_s *= 2
        if self._is_batch:  # the wrapper runs the step itself, and its children are the step's
            self._look_s = _FOREVER_S
        elif not self._own:
            self._own = _open_child(self.pid, self._job)
        if self._own:
            self._look_s = _FOREVER_S
        return self._own != 0

    def keep_job(self) -> int:
        """Have what an ended step left running hold its job, for later daemons; return a handle of it.

        Return 0 where nothing is left, or where the wrapper still runs and holds the job itself.
        """
        if not self._has_ended() or not _count_active(self._job):
            return 0
        for pid in _list_members(self._job):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                process = _open_process(pid)
                try:
                    _hand_job(self._job, process)
                finally:
                    CloseHandle(process)
        return _duplicate(self._job, GetCurrentProcess())

    def _has_result(self) -> bool:
        """Whether the wrapper came to its last line, whatever others do with the file, and however full the disk is."""
        return os.path.exists(self._result)

    def _has_ended(self) -> bool:
        if not _is_signalled(self._wrapper):
            return False
        if self._has_result():
            return True
        return not self.find_own_process() or _is_signalled(self._own)


class WindowsRemains:
    """What steps whose wrappers have ended left running in their jobs."""

    pid = 0

    def __init__(self, step_dirs: Sequence[str]) -> None:
        self._step_dirs = step_dirs

    def wait(self, deadline_s: float | None) -> bool:
        """Return True: the steps have ended."""
        return True

    def wake(self) -> None:
        """Do nothing: nobody waits."""

    def exit_code(self) -> int | None:
        """Return None: the steps have told theirs."""
        return None

    def stop(self, is_hurried: Callable[[], bool]) -> None:
        """End all processes of the jobs, at once."""
        for step_dir in self._step_dirs:
            try:
                record = _WrapperRecord.read(step_dir)
                if record is None:
                    continue
                job = OpenJobObjectW(JOB_OBJECT_ALL_ACCESS, False, record.job_name)
            except OSError:  # nothing is left in it, or another process holds its name back
                continue
            try:
                _end_job(job)
            finally:
                CloseHandle(job)

    def close(self) -> None:
        """Do nothing: no handle is held between calls."""


class WindowsProcesses:
    """Starts and adopts trees; any thread may call it, but for `reap`."""

    def __init__(self, umask: int, descriptors: str, reserve: object) -> None:
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("REMOTE_EXECUTOR_")}
        self._null = os.open(os.devnull, os.O_RDWR)
        self.initial_files: Mapping[str, bytes] = {}  # of a step's directory; its wrapper needs none
        self._left_jobs: collections.deque[int] = collections.deque()  # of ended steps, with processes in them

    def start(self, command: Sequence[str], step_dir: str, cwd: str, env: Mapping[str, str]) -> WindowsTree:
        """Start the command behind the wrapper, its output into the step's file; `env` is added to the daemon's own.

        The wrapper is suspended until it is in its job and its pid is on disk. Raises OSError.
        """
        directory = os.path.relpath(step_dir, cwd)
        wrapper = _BATCH_WRAPPER.format(result=os.path.join(directory, "rc"), ping=system_program("ping.exe"))
        with open(os.path.join(step_dir, "run.bat"), "w", encoding="ascii", newline="") as file:
            file.write(wrapper)
        environment = {**self._environment, **env, STEP_ENV_VAR: step_dir}
        environment.pop("ERRORLEVEL", None)  # it would hide cmd's own, which the wrapper tells
        line = " ".join(_quote_word(word) for word in (os.path.join(directory, "run.bat"), *command))
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT  # to read as well: so nobody can open it and let nobody read it
        output = os.open(os.path.join(step_dir, "output"), flags, 0o600)
        try:
            child = self._spawn(line, output, cwd, environment)
        except ValueError as error:  # such as a NUL
            raise OSError(errno.EINVAL, str(error)) from error
        finally:
            os.close(output)
        try:
            return self._launch(child, step_dir, is_batch=command[0] == "call")
        except OSError:
            child.kill()
            raise

    def _spawn(self, line: str, output: int, cwd: str, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a suspended cmd, with patience: a virus scanner, or a busy host, may refuse it at first."""
        shell, left = system_program("cmd.exe"), _SPAWNS
        while True:
            left -= 1
            try:
                return subprocess.Popen(
                    f'"{shell}" /D /E:ON /V:OFF /S /C "{line}"',
                    executable=shell,
                    stdin=self._null,
                    stdout=output,
                    stderr=self._null,
                    cwd=cwd,
                    env=environment,
                    creationflags=CREATE_SUSPENDED | CREATE_NO_WINDOW,
                )
            except OSError:
                if not left:
                    raise
            time.sleep(_POLL_S)

    def _launch(self, child: subprocess.Popen[bytes], step_dir: str, is_batch: bool) -> WindowsTree:
        """Put a suspended child into a job, which would end it if this process died now, then let it run.

        Once the child holds the job itself, that survives this process, and the child can be adopted: only then
        is it noted that it may have started.
        """
        name = f"Global\\remote_executor-{os.urandom(16).hex()}"  # nobody can have made one of that name
        job, process = CreateJobObjectW(None, name), _open_process(child.pid)
        record = _WrapperRecord(child.pid, _creation_time(process), name, True, is_batch)
        tree = WindowsTree(record, step_dir, process, job, child)
        try:
            _limit_job(job, JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE)
            AssignProcessToJobObject(job, process)
            with open(os.path.join(step_dir, "pid"), "w", encoding="ascii") as file:
                file.write(f"{record.pid} {record.created} {name}\n")
                file.flush()
                _hand_job(job, process)
                file.write("started batch\n" if is_batch else "started\n")
            for file_name, share in _HELD_FILES.items():
                _hold_file(os.path.join(step_dir, file_name), process, share)
            _limit_job(job, 0)
            NtResumeProcess(process)
        except OSError:
            tree.close()
            raise
        return tree

    def adopt(self, step_dir: str) -> WindowsTree | None:
        """Return the live tree of a step that an earlier daemon started; None when its wrapper is gone.

        A wrapper that the earlier daemon had not made ready to run is ended: the step can start anew.
        """
        with contextlib.suppress(OSError):
            record = _WrapperRecord.read(step_dir)
            wrapper = _open_wrapper(record) if record else 0
            if record and wrapper:
                return self._adopt(record, wrapper, step_dir)
        return None

    def _adopt(self, record: _WrapperRecord, wrapper: int, step_dir: str) -> WindowsTree | None:
        """Take over a live wrapper, or end one that has never run. Raises OSError."""
        if not self.may_have_started(step_dir):
            _end_process(wrapper)
            return None
        try:
            job = OpenJobObjectW(JOB_OBJECT_ALL_ACCESS, False, record.job_name)
        except OSError:
            CloseHandle(wrapper)
            raise
        tree = WindowsTree(record, step_dir, wrapper, job, None)
        _limit_job(job, 0)
        NtResumeProcess(wrapper)  # if the daemon died before it did
        return tree

    def remains(self, step_dirs: Sequence[str]) -> WindowsRemains:
        """Return what these steps, whose wrappers have ended, left running in their jobs."""
        return WindowsRemains(step_dirs)

    def may_have_started(self, step_dir: str) -> bool:
        """Return whether anything of the step may have run: the daemon notes it first."""
        if os.path.exists(os.path.join(step_dir, "rc")):
            return True
        try:
            record = _WrapperRecord.read(step_dir)
        except OSError:  # another process holds it: nobody can tell
            return True
        return record is not None and record.may_have_started

    def release(self, tree: ProcessTree) -> None:
        """Give back what the tree holds; it has ended, or runs on without us.

        The job of a step that left processes stays open, for `remains` to find it by its name.
        """
        try:
            job = tree.keep_job() if isinstance(tree, WindowsTree) else 0
            if job:
                self._left_jobs.append(job)
        finally:
            tree.close()

    def reap(self) -> None:
        """Close the jobs in which nothing is left; for one thread."""
        for _ in range(len(self._left_jobs)):
            job = self._left_jobs.popleft()
            if _count_active(job):
                self._left_jobs.append(job)
            else:
                CloseHandle(job)


if sys.platform == "win32":
    Processes = WindowsProcesses
else:
    Processes = PosixProcesses

# ======================================================================================================================
# III tasks / task model: states, messages and how the ends of steps become the end of their task
# ======================================================================================================================


class State(IntEnum):
    """Where a task or a step stands. Stored, never renumbered."""

    ENDED = 0
    RUNNING = 1
    PENDING = 2
    ERROR = 255


STATE_NAMES = {State.ENDED: "Stop", State.RUNNING: "Running", State.PENDING: "Pending", State.ERROR: "System Error"}
NO_TASK = "task does not exist, no data"
TASK_SUCCEEDED = "all steps executed successfully"
WAITING = "waiting for a free worker"
STEP_PENDING = "The current step only proceeds if the previous step succeeds."
STEP_RUNNING = "The step is running"
STEP_SUCCEEDED = "execution succeed"
STOPPED = "artificial force termination"
TIMED_OUT = "forced termination by timeout"
OUTPUT_EXCEEDED = "output limit exceeded"
LOST = "lost: it ended without a result, as when it is killed or the host restarts"
FORCED_CODE = 255  # of a step that could not start, was stopped, timed out or was lost


def name_steps(steps: Iterable[tuple[int, str]]) -> str:
    return "; ".join(f"Step: {index}, Name: {name}" for index, name in steps)


def summarize(steps: Iterable[tuple[int, str, int]]) -> tuple[int, str]:
    """Return code and message of an ended task, from index, name and code of its steps."""
    failed = [(index, name, code) for index, name, code in steps if code]
    if not failed:
        return 0, TASK_SUCCEEDED
    names = name_steps((index, name) for index, name, _ in failed)
    return sum(code for _, _, code in failed), f"execution failed: [{names}]"


def failure_text(index: int, name: str, code: int, reason: str) -> str:
    """How a failed step is told, in its own message and in its task's."""
    return f"Step: {index}, Name: {name}, Exit Code: {code}" + (f": {reason}" if reason else "")


def step_message(index: int, name: str, state: int, code: int, reason: str) -> str:
    """The `msg` of a step."""
    if state == State.PENDING:
        return STEP_PENDING
    if state == State.RUNNING:
        return STEP_RUNNING
    return failure_text(index, name, code, reason) if code else STEP_SUCCEEDED


class StepSpec(NamedTuple):
    """A step as submitted; `depends_on` are indexes of steps, `timeout_ns` is 0 for the default.

    A later field has a default, which leaves the fingerprint of a submission as it was.
    """

    name: str
    command_type: str
    content: str
    env: tuple[str, ...]
    depends_on: tuple[int, ...]
    timeout_ns: int


class TaskSpec(NamedTuple):
    """A task as submitted; `fingerprint` tells one submission from another, `timeout_ns` is 0 for none."""

    id: str
    steps: tuple[StepSpec, ...]
    env: tuple[str, ...]
    timeout_ns: int
    fingerprint: str


# ======================================================================================================================
# III tasks / submission: JSON to frozen specs; an error says where
# ======================================================================================================================

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)  # Windows opens these as devices
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_TRUTH = {"1": True, "t": True, "true": True, "0": False, "f": False, "false": False}
_NAME_LIMIT = 128
Pairs = Sequence[tuple[str, str]]


def parse_json(body: bytes) -> Any:
    """The value of a body; raises Malformed."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise Malformed("the body is not JSON: nested too deeply") from None
    except ValueError as error:
        raise Malformed(f"the body is not JSON: {error}") from None
    return value


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def parse_submission(body: bytes, query: Pairs, command_types: Iterable[str]) -> TaskSpec:
    """What a POST asks for; raises Malformed with the place of the first error, such as [2].timeout."""
    given = _query_values(query)
    task_id = _task_id(given["id"][1])
    parallel = _parse_bool(*given["ansync"])
    timeout_ns = _parse_timeout(*given["timeout"])
    task_env = _parse_environment("env_vars", [value for name, value in query if name == "env_vars"])
    items = parse_json(body)
    if not isinstance(items, list) or not items:
        raise Malformed("the body must be a JSON array of one step or more")
    known = tuple(command_types)
    drafts = [_parse_step(index, item, f"{task_id}-{index}", known) for index, item in enumerate(items)]
    steps = _with_dependencies(drafts, [_needed_names(index, item) for index, item in enumerate(items)], parallel)
    names = [item.get("name") or None for item in items]  # as given: a default holds the id, which may be random
    fingerprint = _fingerprint([parallel, timeout_ns, task_env, names, [_identify_step(step) for step in steps]])
    return TaskSpec(task_id, steps, task_env, timeout_ns, fingerprint)


def _fingerprint(submission: Any) -> str:
    import hashlib  # here, because OpenSSL takes half a megabyte that an idle daemon need not

    return hashlib.sha256(json.dumps(submission).encode()).hexdigest()


def _identify_step(step: StepSpec) -> list[Any]:
    """Return what of a step the fingerprint is made of: the fields of 1.0, and later ones unless at their default.

    So a field that is added to StepSpec changes the fingerprint of no submission that lacks it.
    """
    first = ["", step.command_type, step.content, step.env, step.depends_on, step.timeout_ns]
    defaults = StepSpec._field_defaults
    later = {name: getattr(step, name) for name in StepSpec._fields[len(first) :]}
    given = {name: value for name, value in later.items() if value != defaults[name]}
    return [*first, given] if given else first


def _query_values(query: Pairs) -> dict[str, tuple[str, str]]:
    """The single values of a submission's query, each with the name it was given by: `async` is `ansync`."""
    spelled = {"id": "id", "timeout": "timeout", "time_out": "timeout", "ansync": "ansync", "async": "ansync"}
    given = {field: (field, "") for field in spelled.values()}
    for name, value in query:
        field = spelled.get(name)
        if field and given[field][1] not in ("", value):
            raise Malformed(f"{name}: given twice, as {given[field][1]!r} and as {value!r}")
        if field:
            given[field] = name, value
    return given


def _task_id(text: str) -> str:
    if not text:
        import uuid

        return str(uuid.uuid4())
    if not _ID.fullmatch(text) or text.endswith(".") or _DEVICE.fullmatch(text):
        raise Malformed(
            f"id: {text!r} is no id; right would be 1 to 64 of A-Z a-z 0-9 . _ -, the first a letter or a digit, "
            "the last no dot, and no name of a Windows device"
        )
    return text


def _parse_bool(where: str, text: str) -> bool:
    if text and text.lower() not in _TRUTH:
        raise Malformed(f"{where}: {text!r} is no truth value; right would be true or false")
    return _TRUTH[text.lower()] if text else False


def _parse_timeout(where: str, value: Any) -> int:
    if value is None or value == "":
        return 0
    if not isinstance(value, str):
        raise Malformed(f"{where}: must be a string, a duration such as 90s, 1h30m or 500ms")
    try:
        timeout_ns = parse_duration(value)
    except ValueError as error:
        raise Malformed(f"{where}: {error}") from None
    if not timeout_ns:
        raise Malformed(f"{where}: must be more than 0")
    return timeout_ns


def _require_str(where: str, value: Any) -> str:
    """A string that can be written to a file or an environment."""
    if not isinstance(value, str):
        raise Malformed(f"{where}: must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Malformed(f"{where}: holds half of a surrogate pair, which no text has") from None
    return value


def _parse_environment(where: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise Malformed(f"{where}: must be a list of KEY=value")
    for index, entry in enumerate(value):
        text = _require_str(f"{where}[{index}]", entry)
        if text.find("=") < 1 or "\0" in text:
            raise Malformed(f"{where}[{index}]: {text!r} is no KEY=value")
    return tuple(value)


def _parse_step(index: int, item: Any, default_name: str, known: tuple[str, ...]) -> StepSpec:
    """The step of one element, what it depends on left out."""
    where = f"[{index}]"
    if not isinstance(item, dict):
        raise Malformed(f"{where}: a step must be a JSON object")
    for field, key in (("CommandType", "command_type"), ("CommandContent", "command_content")):
        if item.get(key) in (None, ""):
            tag = f"Error:Field validation for '{field}' failed on the 'required' tag"
            raise Malformed(f"{where}: Key: 'PostStruct.{field}' {tag}")
    command_type = _require_str(f"{where}.command_type", item["command_type"])
    if command_type not in known:
        raise Malformed(f"{where}.command_type: {command_type!r} is unknown; known are {', '.join(known)}")
    name = default_name if item.get("name") in (None, "") else _require_str(f"{where}.name", item["name"])
    if len(name) > _NAME_LIMIT or _CONTROL.search(name):
        raise Malformed(f"{where}.name: must have at most {_NAME_LIMIT} characters and no control characters")
    content = _require_str(f"{where}.command_content", item["command_content"])
    env = _parse_environment(f"{where}.env_vars", item.get("env_vars"))
    return StepSpec(name, command_type, content, env, (), _parse_timeout(f"{where}.timeout", item.get("timeout")))


def _needed_names(index: int, item: dict[str, Any]) -> tuple[str, list[str]]:
    """The path of a step's dependencies and the names in it."""
    given = {key: item[key] for key in ("depets_on", "depends_on") if item.get(key)}
    for key, names in given.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise Malformed(f"[{index}].{key}: must be a list of names of steps")
    if len(given) == 2 and given["depets_on"] != given["depends_on"]:
        raise Malformed(f"[{index}].depends_on: differs from depets_on, which is the same field; give one of them")
    for key, names in given.items():
        return f"[{index}].{key}", names
    return f"[{index}].depets_on", []


def _with_dependencies(
    drafts: list[StepSpec], needed: list[tuple[str, list[str]]], parallel: bool
) -> tuple[StepSpec, ...]:
    """The steps with what they depend on; raises Malformed for what cannot be, cycles with the names in them."""
    indexes: dict[str, int] = {}
    for index, step in enumerate(drafts):
        if indexes.setdefault(step.name, index) != index:
            raise Malformed(f"[{index}].name: {step.name!r} is the name of [{indexes[step.name]}] already")
    steps = []
    for index, (step, (where, names)) in enumerate(zip(drafts, needed)):
        needs = [_needed(where, name, index, indexes, parallel) for name in names]
        if not parallel and index:
            needs.append(index - 1)
        steps.append(step._replace(depends_on=tuple(dict.fromkeys(needs))))
    try:
        graphlib.TopologicalSorter({index: step.depends_on for index, step in enumerate(steps)}).prepare()
    except graphlib.CycleError as error:
        ring = " -> ".join(steps[index].name for index in reversed(error.args[1]))
        raise Malformed(f"depets_on: the steps wait for each other: {ring}") from None
    return tuple(steps)


def _needed(where: str, name: str, index: int, indexes: Mapping[str, int], parallel: bool) -> int:
    need = indexes.get(name)
    if need is None:
        raise Malformed(f"{where}: {name!r} is the name of no step")
    if need == index:
        raise Malformed(f"{where}: {name!r} is the step itself")
    if need > index and not parallel:
        raise Malformed(f"{where}: {name!r} comes later; steps run in the order given, unless ansync=true")
    return need


# ======================================================================================================================
# III tasks / dependency plan: which step may run next
# ======================================================================================================================


class Plan:
    """The dependency graph of one task, by the indexes of its steps; not for several threads at once."""

    def __init__(self, depends_on: Sequence[Sequence[int]]) -> None:
        self._sorter: graphlib.TopologicalSorter[int] = graphlib.TopologicalSorter(dict(enumerate(depends_on)))
        self._sorter.prepare()
        self._dependents: dict[int, list[int]] = {}
        for index, needed in enumerate(depends_on):
            for dependency in needed:
                self._dependents.setdefault(dependency, []).append(index)

    def ready(self) -> list[int]:
        """Hand out, once each and in order, the steps of which all that they depend on has succeeded."""
        return sorted(self._sorter.get_ready())

    def succeed(self, index: int) -> None:
        """Note that a step which was handed out has succeeded; raises ValueError for any other."""
        self._sorter.done(index)

    def dependents(self, index: int) -> Sequence[int]:
        """Return the steps that depend on this one directly."""
        return self._dependents.get(index, ())


# ======================================================================================================================
# III tasks / metrics: counts, histograms and spans of what the daemon does, in the text format of Prometheus
# ======================================================================================================================

_STEP_BOUNDS_S = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60, 300, 1800, 3600, 21600, 86400)
_QUEUE_BOUNDS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60, 300, 1800, 3600)
_REQUEST_BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}  # whatever else a client makes up is "other"
METRIC_PREFIX = "remote_executor_"  # how the names of our own metrics begin


class Family(NamedTuple):
    """A metric: its name, type and help, and its samples, each a suffix of the name, labels and a value."""

    name: str
    kind: str
    help: str
    samples: Sequence[tuple[str, Pairs, float]]


def single(name: str, kind: str, text: str, value: float | None, labels: Pairs = ()) -> Family:
    """A metric of one sample, of none where the value is None."""
    return Family(name, kind, text, [("", labels, value)] if value is not None else [])


def exposition(families: Iterable[Family]) -> str:
    """The metrics in the text format 0.0.4 of Prometheus (Exposition formats)."""
    lines = []
    for family in families:
        if family.samples:
            lines += [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}"]
        for suffix, labels, value in family.samples:
            pairs = ",".join(f'{name}="{text.translate(_LABEL_ESCAPES)}"' for name, text in labels)
            lines.append(f"{family.name}{suffix}{{{pairs}}} {value}" if pairs else f"{family.name}{suffix} {value}")
    return "\n".join([*lines, ""])


_LABEL_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class Histogram:
    """How many values lie below each bound; whoever shares one guards it."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def samples(self, labels: Pairs = ()) -> list[tuple[str, Pairs, float]]:
        totals = itertools.accumulate(self._counts)
        bounds = [*map(str, self._bounds), "+Inf"]
        found: list[tuple[str, Pairs, float]]
        found = [("_bucket", (*labels, ("le", bound)), total) for bound, total in zip(bounds, totals)]
        return [*found, ("_sum", labels, self._sum), ("_count", labels, sum(self._counts))]


def histogram_metric(name: str, text: str, histograms: Mapping[Pairs, Histogram]) -> Family:
    """A metric of histograms, each with its labels."""
    return Family(
        name, "histogram", text, [one for labels, found in histograms.items() for one in found.samples(labels)]
    )


_MAX_SPANS = 100_000  # in a trace, which then holds the first of them


class Span(NamedTuple):
    """A piece of work in a thread; `begin_s` is of time.perf_counter()."""

    name: str
    category: str
    begin_s: float
    seconds: float
    thread: int
    thread_name: str
    about: Mapping[str, Any]


def _ended_span(name: str, category: str, seconds: float, about: Mapping[str, Any]) -> Span:
    """What this thread did until now."""
    begin_s, thread = time.perf_counter() - seconds, threading.current_thread().name
    return Span(name, category, begin_s, seconds, threading.get_native_id(), thread, about)


def trace_events(spans: Sequence[Span]) -> dict[str, Any]:
    """The spans in the Trace Event Format, which Perfetto and chrome://tracing read."""
    pid, begin_s = os.getpid(), min((span.begin_s for span in spans), default=0.0)
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": pid, "tid": thread, "args": {"name": name}}
        for thread, name in {span.thread: span.thread_name for span in spans}.items()
    ]
    for span in spans:
        times = {"ts": (span.begin_s - begin_s) * 1e6, "dur": span.seconds * 1e6}
        where = {"name": span.name, "cat": span.category, "ph": "X", "pid": pid, "tid": span.thread}
        events.append({**where, **times, "args": span.about})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


class Observer:
    """What is told of the daemon's work, from any thread; does nothing with it."""

    def commit(self, seconds: float, changes: int) -> None:
        """The store has committed."""

    def step_started(self, task_id: str, step_index: int, waited_s: float) -> None:
        """A step has started, so long after it was ready."""

    def step_ended(self, task_id: str, step_index: int, result: str, seconds: float, output_bytes: int) -> None:
        """A step has ended: succeeded, failed, or forced."""

    def request(self, method: str, template: str, status: int, seconds: float) -> None:
        """A request has been answered; the template is empty where no route has its path."""


class Telemetry(Observer):
    """Counts what the daemon does; any thread may tell it and ask it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below, for some hundred nanoseconds at a time
        self._steps = dict.fromkeys(("succeeded", "failed", "forced"), 0)
        self._step_seconds = Histogram(_STEP_BOUNDS_S)
        self._queue_seconds = Histogram(_QUEUE_BOUNDS_S)
        self._output_bytes = 0
        self._commit_seconds = Histogram(_REQUEST_BOUNDS_S)
        self._changes = 0
        self._requests: dict[tuple[str, str, int], int] = {}
        self._request_seconds: dict[tuple[str, str], Histogram] = {}
        self._running: dict[tuple[str, int], Span] = {}  # steps, with no end yet
        self._spans: list[Span] | None = None  # while a trace is taken

    def commit(self, seconds: float, changes: int) -> None:
        with self._lock:
            self._commit_seconds.add(seconds)
            self._changes += changes
            self._trace("commit", "store", seconds, {"changes": changes})

    def step_started(self, task_id: str, idx: int, waited_s: float) -> None:
        span = _ended_span(f"{task_id} step {idx}", "step", 0.0, {"waited_s": waited_s})
        with self._lock:
            self._queue_seconds.add(waited_s)
            self._running[task_id, idx] = span

    def step_ended(self, task_id: str, idx: int, result: str, seconds: float, output_bytes: int) -> None:
        with self._lock:
            self._steps[result] += 1
            self._step_seconds.add(seconds)
            self._output_bytes += output_bytes
            begun = self._running.pop((task_id, idx), None)
            about = {**(begun.about if begun else {}), "result": result, "output_bytes": output_bytes}
            self._trace(f"{task_id} step {idx}", "step", seconds, about)

    def request(self, method: str, template: str, status: int, seconds: float) -> None:
        method = method if method in _METHODS else "other"
        key = template, method
        with self._lock:
            self._requests[template, method, status] = self._requests.get((template, method, status), 0) + 1
            if key not in self._request_seconds:
                self._request_seconds[key] = Histogram(_REQUEST_BOUNDS_S)
            self._request_seconds[key].add(seconds)
            if self._spans is not None:
                self._trace(f"{method} {template}", "request", seconds, {"status": status})

    def _trace(self, name: str, category: str, seconds: float, about: Mapping[str, Any]) -> None:
        """This thread has done a piece of work; the lock is held."""
        if self._spans is not None and len(self._spans) < _MAX_SPANS:
            self._spans.append(_ended_span(name, category, seconds, about))

    def trace(self, seconds: float) -> list[Span]:
        """What ends in the time to come, and the steps that run on then; for one thread at a time."""
        with self._lock:
            self._spans = []
        time.sleep(seconds)
        now_s = time.perf_counter()
        with self._lock:
            spans, self._spans = self._spans, None
            running = [one._replace(seconds=now_s - one.begin_s) for one in self._running.values()]
        return spans + [one._replace(about={**one.about, "result": "still running"}) for one in running]

    def families(self) -> list[Family]:
        """What was counted since the daemon's start."""
        with self._lock:
            steps = [("", (("result", result),), count) for result, count in self._steps.items()]
            requests = [
                ("", (*_route_labels(template, method), ("status", str(status))), count)
                for (template, method, status), count in self._requests.items()
            ]
            spans = {_route_labels(*key): found for key, found in self._request_seconds.items()}
            return [
                Family(METRIC_PREFIX + "steps_ended_total", "counter", "Steps that ended, by result.", steps),
                histogram_metric(
                    METRIC_PREFIX + "step_duration_seconds", "How long steps ran.", {(): self._step_seconds}
                ),
                histogram_metric(
                    METRIC_PREFIX + "step_queue_seconds", "How long ready steps waited.", {(): self._queue_seconds}
                ),
                single(
                    METRIC_PREFIX + "step_output_bytes_total", "counter", "What ended steps wrote.", self._output_bytes
                ),
                Family(METRIC_PREFIX + "http_requests_total", "counter", "Requests answered.", requests),
                histogram_metric(
                    METRIC_PREFIX + "http_request_duration_seconds",
                    "From a request's first byte to its answer's last.",
                    spans,
                ),
                histogram_metric(
                    METRIC_PREFIX + "store_commit_duration_seconds",
                    "How long commits took.",
                    {(): self._commit_seconds},
                ),
                single(METRIC_PREFIX + "store_changes_total", "counter", "Changes in these commits.", self._changes),
            ]


def _route_labels(template: str, method: str) -> Pairs:
    return ("route", template or "none"), ("method", method)


def process_families(figures: ProcessStats) -> list[Family]:
    """The process and its Python, by the names of the official clients of Prometheus."""
    cycles = [((("generation", str(number)),), found) for number, found in enumerate(gc.get_stats())]
    return [
        single("process_cpu_seconds_total", "counter", "User and system CPU time.", figures.cpu_s),
        single("process_resident_memory_bytes", "gauge", "Resident memory.", figures.resident_bytes),
        single("process_virtual_memory_bytes", "gauge", "Virtual memory.", figures.virtual_bytes),
        single("process_open_fds", "gauge", "Open file descriptors, on Windows handles.", figures.open_files),
        single("process_max_fds", "gauge", "The most of them.", figures.max_files),
        single("process_threads", "gauge", "Threads.", figures.threads),
        single("process_start_time_seconds", "gauge", "When it started, since the epoch.", figures.started_s),
        *(
            Family(f"python_gc_{name}_total", "counter", text, [("", labels, found[key]) for labels, found in cycles])
            for name, key, text in (
                ("collections", "collections", "Runs of the garbage collector."),
                ("objects_collected", "collected", "Objects that it freed."),
                ("objects_uncollectable", "uncollectable", "Objects that it could not free."),
            )
        ),
    ]


# ======================================================================================================================
# III tasks / step directory: a step's script, its output, its pid and its result
# ======================================================================================================================

_BLOCK_BYTES = 1 << 17
_RESULT = re.compile(rb"(-?[0-9]{1,10})\s*\n")  # no longer, for a step may write there too
_LATE_RESULT = re.compile(rb"^ended (-?[0-9]{1,10})\n", re.MULTILINE)


class StepDirectory:
    """The files of one step; any thread may read them, one prepares.

    A step runs as the daemon's own user, so it may have put anything in their place.
    """

    def __init__(self, tasks: SafeDirectory, task_number: int, step_index: int) -> None:
        self._tasks = tasks
        self._names = (str(task_number), str(step_index))
        self.path = os.path.join(tasks.path, *self._names)

    def prepare(self, name: str, content: bytes, others: Mapping[str, bytes]) -> str:
        """Make the directory with the script and these other files alone in it; return the script's path.

        Raises OSError; then a later call begins anew.
        """
        files = {name: content, **others}
        try:
            self._tasks.make(*self._names, content=files)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):  # a parallel step did
                self._tasks.make(self._names[0])
            self._tasks.make(*self._names, content=files)
        except FileExistsError:  # an earlier attempt made it, which did not start the step; or another step of the task
            has_gone = self._tasks.remove(*self._names)  # unless a crash left a process of Windows suspended in it
            self._tasks.make(*self._names, content=files, may_exist=not has_gone)
        return os.path.join(self.path, name)

    def exit_code(self) -> int | None:
        """Return the result that the wrapper left, None while there is none. Only a whole line counts.

        A wrapper that found no room for a file of its own has told it at the end of its pid file.
        Raises OSError where that cannot be known now.
        """
        found = _RESULT.fullmatch(self._head("rc")) or _LATE_RESULT.search(self._head("pid"))
        return int(found[1]) if found else None

    def _head(self, name: str) -> bytes:
        """Return the first bytes of a file, none where it is missing or no file."""
        try:
            with self._tasks.read(*self._names, name) as file:
                return file.read(256)
        except OSError as error:
            if is_scarcity(error):
                raise
            return b""

    def output_bytes(self) -> int:
        """Return how much the step has written."""
        with contextlib.suppress(OSError):  # it has not begun, or has removed it
            return os.lstat(os.path.join(self.path, "output")).st_size
        return 0

    def read_output(self) -> Iterator[bytes]:
        """Yield what the step has written so far, in blocks; nothing where its output is no file any more."""
        try:
            file = self._tasks.read(*self._names, "output")
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            return
        with file:
            left = os.fstat(file.fileno()).st_size
            while left > 0 and (block := file.read(min(left, _BLOCK_BYTES))):
                left -= len(block)
                yield block


# ======================================================================================================================
# III tasks / store: sqlite; every statement, one place that writes
# ======================================================================================================================

# The store is the truth: what it has committed is what is, also for reads. Whoever changes something puts a change into
# the queue, in the same critical section in which memory changes, so that the order in the database is the order in
# memory; one thread takes all that waits and commits it in one transaction. Three kinds of changes:
#
# - Somebody waits for it, and it may be refused (a submission, a stop): an error goes to whoever waits.
# - It tells of what has happened (the end of a step): it is tried again until it is stored, and no later one of its
#   kind overtakes it.
# - It must survive a loss of power: the commit that has one is synced (`PRAGMA synchronous = FULL`).
#
# Whatever a change raises ends that change alone: its waiter gets the error, the log a line, the thread goes on.
#
# The schema has a history: `_MIGRATIONS[n]` leads from version n to n + 1, and `user_version` says where a database
# stands. A migration that has been released is never edited; comments may be.

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE task (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- order of acceptance, and the name of its directory
    id TEXT NOT NULL UNIQUE,
    digest TEXT NOT NULL,                   -- of the submission, to know it again
    count INTEGER NOT NULL,
    timeout_ns INTEGER NOT NULL,
    accepted_ns INTEGER NOT NULL,
    ended_ns INTEGER,
    state INTEGER NOT NULL DEFAULT 2,
    code INTEGER NOT NULL DEFAULT 0,
    message TEXT NOT NULL DEFAULT '',       -- of an ended task
    stop TEXT NOT NULL DEFAULT ''           -- why it is to be stopped
);
CREATE INDEX task_ended ON task (ended_ns, seq);
CREATE TABLE step (
    task INTEGER NOT NULL,
    idx INTEGER NOT NULL,
    name TEXT NOT NULL,
    needs TEXT NOT NULL,                    -- JSON, indexes
    timeout_ns INTEGER NOT NULL,
    state INTEGER NOT NULL DEFAULT 2,
    code INTEGER NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT '',
    stop TEXT NOT NULL DEFAULT '',          -- why it is to be stopped
    started_ns INTEGER,
    ended_ns INTEGER,
    PRIMARY KEY (task, idx)
) WITHOUT ROWID;
CREATE INDEX step_running ON step (task, idx) WHERE state = 1;
CREATE TABLE script (                       -- of a task that has not ended
    task INTEGER NOT NULL,
    idx INTEGER NOT NULL,
    command_type TEXT NOT NULL,
    env TEXT NOT NULL,                      -- JSON, KEY=value; the task's, then the step's
    content TEXT NOT NULL,
    PRIMARY KEY (task, idx)
);
"""


def _create_tables(db: sqlite3.Connection) -> None:
    """Make the tables of version 1.0.0."""
    for statement in _SCHEMA.split(";\n")[:-1]:
        db.execute(statement)


def _mend_ended_tasks(db: sqlite3.Connection) -> None:
    """Set right what 1.0.0 could store of ended tasks: a step that runs for ever, a wrong sum, scripts kept."""
    db.execute(
        "UPDATE step SET state = 0, code = ?, reason = ? WHERE state = 1 "
        "AND task IN (SELECT seq FROM task WHERE ended_ns IS NOT NULL)",
        (FORCED_CODE, LOST),
    )
    wrong = db.execute(
        "SELECT seq FROM task WHERE ended_ns IS NOT NULL AND state = 0 "
        "AND code != (SELECT total(code) FROM step WHERE task = seq)"
    ).fetchall()
    for (number,) in wrong:
        steps = db.execute("SELECT idx, name, code FROM step WHERE task = ? ORDER BY idx", (number,))
        db.execute("UPDATE task SET code = ?, message = ? WHERE seq = ?", (*summarize(steps), number))
    db.execute("DELETE FROM script WHERE task NOT IN (SELECT seq FROM task WHERE ended_ns IS NULL)")


_MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (_create_tables, _mend_ended_tasks)
_BATCH = 500
_RETRY_S = 0.5
_GROUP_COMMIT_DELAY_S = 0.003  # that a change waits for others when nobody waits for it
_READER_TIMEOUT_S = 5.0  # for a connection to read by, where no more can be opened
_IDLE_READERS = 8  # connections that are kept for reads to come
_RESERVE_SUFFIX = ".reserve"
_RESERVE_BYTES = 256 * 1024  # -shm takes 32 KiB, -wal what the start and the first commits write
_TASK = "SELECT seq, id, count, state, code, message, accepted_ns, ended_ns FROM task"
_STEP = "SELECT idx, name, needs, state, code, reason, started_ns, ended_ns FROM step"
_UNFINISHED_TASK = "seq, id, timeout_ns, accepted_ns, stop, count"
_UNFINISHED_STEP = "idx, name, needs, timeout_ns, state, code, started_ns, stop"
_INDEX = re.compile("0|[1-9][0-9]{0,8}")


class Accepted(NamedTuple):
    """A task as the answer to its submission tells it; `is_new` is False when it was there before."""

    task_number: int
    id: str
    step_count: int
    accepted_ns: int
    is_new: bool


class TaskRow(NamedTuple):
    """A task; `message` is set when it has ended."""

    task_number: int
    id: str
    step_count: int
    state: int
    code: int
    message: str
    accepted_ns: int
    ended_ns: int | None


class StepRow(NamedTuple):
    """A step; `depends_on` is JSON, a list of indexes."""

    step_index: int
    name: str
    depends_on: str
    state: int
    code: int
    reason: str
    started_ns: int | None
    ended_ns: int | None


class UnfinishedStep(NamedTuple):
    """What the scheduler needs of a step whose task has not ended; `stop` is why it is to be stopped."""

    step_index: int
    name: str
    depends_on: tuple[int, ...]
    timeout_ns: int
    state: int
    code: int
    started_ns: int | None
    stop: str


class UnfinishedTask(NamedTuple):
    """A task that has not ended; `stop` is why it is to be stopped."""

    task_number: int
    id: str
    timeout_ns: int
    accepted_ns: int
    stop: str
    steps: list[UnfinishedStep]


class Script(NamedTuple):
    """What a step runs; `env` is the task's entries, then the step's."""

    command_type: str
    content: str
    env: list[str]


class StepEnd(NamedTuple):
    """How a step ended."""

    step_index: int
    code: int
    reason: str


class TaskEnd(NamedTuple):
    """How a task ended: the sum of its steps' codes, and its message."""

    code: int
    message: str


class _Change(NamedTuple):
    """A change of the database in the queue; `future` is done when it is committed or has failed."""

    apply: Callable[[sqlite3.Connection], Any]
    future: Future[Any]
    is_durable: bool  # it must survive a loss of power
    retry_until_stored: bool  # it tells of something that has happened
    has_waiter: bool


class Store:
    """The database; any thread may call it. One thread of its own writes, all waiting changes in one transaction.

    Raises StorageFull and Unavailable where a change is not kept, and Conflict.
    """

    def __init__(self, path: str, on_commit: Callable[[float, int], None]) -> None:
        self._path = path
        self._on_commit = on_commit  # told of each commit: seconds, changes
        self._queue: list[_Change] = []
        self._is_closing = False
        self._queue_changed = threading.Condition()  # guards _queue and _is_closing
        self._readers: list[sqlite3.Connection] = []
        self._reader_returned = threading.Condition()  # guards _readers
        self._writer: sqlite3.Connection  # from `start` on; the writing thread's
        self._file: tuple[int, int] = (0, 0)  # device and inode of the database
        self._start_warning = ""
        self._trouble = ""  # why nothing can be written now
        self.quarantine_suffix = ""  # the ending of the names of what was put aside at the start
        self._thread = DaemonThread(target=self._write, name="store")

    def start(self) -> None:
        """Open the database, or make it, and put a damaged one aside; raises StartupError."""
        try:
            try:
                self._open_all()
            except sqlite3.OperationalError:
                if not self._free_reserve():
                    raise
                log.error("the disk of %s is full: what was kept free for a start is used now", self._path)
                self._open_all()
            self._file = self._identify()
        except (sqlite3.Error, OSError) as error:
            raise StartupError(f"--root: {self._path} cannot be used: {error}") from None
        self._fill_reserve()
        self._thread.start()

    def _open_all(self) -> None:
        try:
            self._writer = self._open()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter of a message that quotes the file
            if isinstance(error, sqlite3.OperationalError) and "decode" not in str(error):
                raise  # not of the file: it is locked, or cannot be opened
            self._quarantine(error)
            self._writer = self._open()
        self._readers.append(self._connect())

    def _fill_reserve(self) -> None:
        """Keep room on the disk for the files that SQLite needs beside the database (SQLite: Write-Ahead Logging)."""
        path = self._path + _RESERVE_SUFFIX
        if os.path.exists(path):
            return
        try:
            with open(path, "wb") as file:
                file.write(os.urandom(_RESERVE_BYTES))  # which no file system folds
        except OSError:
            self._free_reserve()  # a part of it helps nobody

    def _free_reserve(self) -> bool:
        """Give the room back; return whether there was any."""
        try:
            os.unlink(self._path + _RESERVE_SUFFIX)
        except OSError:
            return False
        return True

    def _open(self) -> sqlite3.Connection:
        """Return a connection to a database that is sound and of this version, made where there was none."""
        is_new = not os.path.exists(self._path)
        connection = self._connect()
        with contextlib.ExitStack() as undo:
            undo.callback(connection.close)
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > len(_MIGRATIONS):
                raise StartupError(f"--root: {self._path} was made by a later version of this program; use that one")
            if not is_new and (damage := _check_integrity(connection, version)):
                raise sqlite3.DatabaseError(damage)
            connection.execute("PRAGMA journal_mode = WAL")
            for number in range(version, len(_MIGRATIONS)):
                _migrate(connection, number)
            undo.pop_all()
        return connection

    def _quarantine(self, error: Exception) -> None:
        """Rename a damaged database, with all that belongs to it; a person may want to look at it."""
        self.quarantine_suffix = f".corrupt-{time.strftime('%Y%m%dT%H%M%S')}"
        name = self._path + self.quarantine_suffix
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):  # not every database has all three
                rename(self._path + suffix, name + suffix)
        self._start_warning = f"the database was damaged ({error}); it is kept as {name}, and a new one was begun"
        log.error("%s", self._start_warning)

    def stop(self) -> None:
        """Commit what waits, and close."""
        with self._queue_changed:
            self._is_closing = True
            self._queue_changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        with self._reader_returned:
            while self._readers:
                self._readers.pop().close()

    def is_alive(self) -> bool:
        """Return whether the thread that writes runs."""
        return self._thread.is_alive()

    def is_in_place(self) -> bool:
        """Return whether the database is still the file of that name, which somebody may have removed."""
        try:
            return self._identify() == self._file
        except FileNotFoundError:
            return False
        except OSError:  # nobody knows
            return True

    def check_in_place(self) -> None:
        """Raise Unavailable where what is stored from now on would be lost."""
        if not self.is_in_place():
            raise Unavailable(f"the database {self._path} was removed from under the daemon, which must be restarted")

    def _identify(self) -> tuple[int, int]:
        found = os.stat(self._path)
        return found.st_dev, found.st_ino

    def warning(self) -> str:
        """Return what the operator should know of it now."""
        return "; ".join(text for text in (self._start_warning, self._trouble) if text)

    # -- changes

    def save_metadata(self, metadata: Mapping[str, str]) -> None:
        """Keep facts about the daemon; returns at once."""
        rows = list(metadata.items())
        self._record(lambda db: db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows))

    def accept(self, task_number: int, spec: TaskSpec, now_ns: int) -> Future[Accepted]:
        """Add a task, or find the one that the same submission made; fails with Conflict if another has its id."""
        return self._ask(lambda db: _accept(db, task_number, spec, now_ns), is_durable=True)

    def begin(self, task_number: int, step_index: int, now_ns: int) -> Future[None]:
        """A step is about to start, and its files are made. Only what is known to have begun may run."""

        def apply(db: sqlite3.Connection) -> None:
            where = (task_number, step_index)
            db.execute("UPDATE step SET state = 1, started_ns = ? WHERE task = ? AND idx = ?", (now_ns, *where))
            db.execute("UPDATE task SET state = 1 WHERE seq = ? AND state = 2", (task_number,))

        return self._ask(apply, is_durable=True)

    def requeue(self, task_number: int, step_index: int, task_state: State) -> None:
        """A step that was about to start waits again."""

        def apply(db: sqlite3.Connection) -> None:
            where = (task_number, step_index)
            db.execute("UPDATE step SET state = 2, started_ns = NULL WHERE task = ? AND idx = ?", where)
            db.execute("UPDATE task SET state = ? WHERE seq = ?", (task_state, task_number))

        self._record(apply)

    def record_stop(self, task_number: int, step_index: int | None, reason: str) -> Future[None]:
        """The task, or a step of it, is to be stopped."""

        def apply(db: sqlite3.Connection) -> None:
            if step_index is None:
                db.execute("UPDATE task SET stop = ? WHERE seq = ?", (reason, task_number))
            else:
                where = (task_number, step_index)
                db.execute("UPDATE step SET stop = ? WHERE task = ? AND idx = ?", (reason, *where))

        return self._ask(apply, is_durable=True)

    def end(self, task_number: int, ends: Sequence[StepEnd], task_end: TaskEnd | None, now_ns: int) -> None:
        """Steps have ended, and with them their task where `task_end` is given."""
        rows = [(end.code, end.reason, now_ns, task_number, end.step_index) for end in ends]

        def apply(db: sqlite3.Connection) -> None:
            db.executemany(
                "UPDATE step SET state = 0, code = ?, reason = ?, ended_ns = ? WHERE task = ? AND idx = ?", rows
            )
            if task_end:
                _end_task(db, task_number, State.ENDED, task_end, now_ns)

        self._record(apply, is_durable=True)

    def fail(self, task_number: int, message: str, now_ns: int) -> None:
        """A task cannot be taken up: it ends with a system error, and what runs of it is lost."""

        def apply(db: sqlite3.Connection) -> None:
            lost = (FORCED_CODE, LOST, now_ns, task_number)
            db.execute(
                "UPDATE step SET state = 0, code = ?, reason = ?, ended_ns = ? WHERE task = ? AND state = 1", lost
            )
            _end_task(db, task_number, State.ERROR, TaskEnd(FORCED_CODE, message), now_ns)

        self._record(apply, is_durable=True)

    def expire(self, ended_before_ns: int) -> list[int]:
        """Forget some tasks that ended before; return which."""

        def apply(db: sqlite3.Connection) -> list[int]:
            rows = db.execute(
                "SELECT seq FROM task WHERE ended_ns < ? ORDER BY ended_ns LIMIT ?", (ended_before_ns, _BATCH)
            )
            numbers = rows.fetchall()
            for table, column in (("step", "task"), ("script", "task"), ("task", "seq")):
                db.executemany(f"DELETE FROM {table} WHERE {column} = ?", numbers)
            return [number for (number,) in numbers]

        if not self._read("SELECT 1 FROM task WHERE ended_ns < ? LIMIT 1", (ended_before_ns,)):
            return []
        expired: list[int] = self._ask(apply).result()
        return expired

    # -- reads

    def metadata(self) -> dict[str, str]:
        """Return what `save_metadata` kept."""
        return dict(self._read("SELECT key, value FROM meta"))

    def latest_ns(self) -> int:
        """Return the latest time that is stored."""
        rows = self._read("SELECT max(ifnull(max(accepted_ns), 0), ifnull(max(ended_ns), 0)) FROM task")
        return int(rows[0][0] or 0)

    def last_task_number(self) -> int:
        """Return the highest number that a task ever had."""
        kept = self._read("SELECT max(seq) FROM task")
        given = self._read("SELECT max(seq) FROM sqlite_sequence WHERE name = 'task'")
        return max(int(kept[0][0] or 0), int(given[0][0] or 0))

    def task_numbers(self, sort: str = "st") -> list[int]:
        """Return all tasks by acceptance (st), end (et) or expiry (rt)."""
        order = {"st": "accepted_ns", "et": "ended_ns", "rt": "ended_ns IS NULL, ended_ns"}[sort]
        return [number for (number,) in self._read(f"SELECT seq FROM task ORDER BY {order}, seq")]

    def tasks(self, task_numbers: Sequence[int]) -> Iterator[list[TaskRow]]:
        """Yield these tasks in this order, in blocks; what has expired meanwhile is left out."""
        for begin in range(0, len(task_numbers), _BATCH):
            block = task_numbers[begin : begin + _BATCH]
            rows = self._read(f"{_TASK} WHERE seq IN ({','.join(map(str, block))})")
            by_number = {row[0]: TaskRow(*row) for row in rows}
            yield [by_number[number] for number in block if number in by_number]

    def task(self, task_id: str) -> TaskRow:
        """Return a task; raises NotFound."""
        rows = self._read(f"{_TASK} WHERE id = ?", (task_id,))
        if not rows:
            raise NotFound(NO_TASK)
        return TaskRow._make(rows[0])

    def steps(self, task_number: int) -> list[StepRow]:
        """Return the steps of a task, in order."""
        return [StepRow._make(row) for row in self._read(f"{_STEP} WHERE task = ? ORDER BY idx", (task_number,))]

    def step(self, task_number: int, key: str) -> StepRow:
        """Return a step by its index or its name; raises NotFound."""
        rows = []
        if _INDEX.fullmatch(key):
            rows = self._read(f"{_STEP} WHERE task = ? AND idx = ?", (task_number, int(key)))
        if not rows:
            rows = self._read(f"{_STEP} WHERE task = ? AND name = ?", (task_number, key))
        if not rows:
            raise NotFound(NO_TASK)
        return StepRow._make(rows[0])

    def running_steps(self) -> dict[int, list[tuple[int, str]]]:
        """Return index and name of the running steps, by task."""
        running: dict[int, list[tuple[int, str]]] = {}
        rows = self._read("SELECT task, idx, name FROM step WHERE state = 1 ORDER BY task, idx")
        for task_number, step_index, name in rows:
            running.setdefault(task_number, []).append((step_index, name))
        return running

    def script(self, task_number: int, step_index: int) -> Script:
        """Return what the step runs; raises LookupError when its task has ended."""
        where = (task_number, step_index)
        rows = self._read("SELECT command_type, content, env FROM script WHERE task = ? AND idx = ?", where)
        if not rows:
            raise LookupError(f"no script of step {step_index} of task number {task_number}")
        command_type, content, env = rows[0]
        return Script(command_type, content, json.loads(env))

    def counts(self) -> dict[int, int]:
        """Return how many tasks there are, by state."""
        return dict(self._read("SELECT state, count(*) FROM task GROUP BY state"))

    def oldest_ns(self) -> int | None:
        """Return when the oldest task was accepted."""
        rows = self._read("SELECT accepted_ns FROM task ORDER BY seq LIMIT 1")
        return int(rows[0][0]) if rows else None

    def size_bytes(self) -> int:
        """Return what the database takes on disk."""
        total = 0
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):  # it comes and goes
                total += os.stat(self._path + suffix).st_size
        return total

    def unfinished_task_numbers(self) -> list[int]:
        """Return the tasks that have not ended, in order of acceptance."""
        return [number for (number,) in self._read("SELECT seq FROM task WHERE ended_ns IS NULL ORDER BY seq")]

    def unfinished_task(self, task_number: int) -> UnfinishedTask:
        """Return a task that has not ended; raises ValueError where what is stored makes no sense."""
        *task, count = self._read(f"SELECT {_UNFINISHED_TASK} FROM task WHERE seq = ?", (task_number,))[0]
        rows = self._read(f"SELECT {_UNFINISHED_STEP} FROM step WHERE task = ? ORDER BY idx", (task_number,))
        steps = [
            UnfinishedStep(index, name, tuple(json.loads(depends_on)), *rest) for index, name, depends_on, *rest in rows
        ]
        known = range(count)
        if [step.step_index for step in steps] != list(known):
            raise ValueError("its steps are incomplete")
        if any(index not in known for step in steps for index in step.depends_on):
            raise ValueError("a step depends on one that there is not")
        return UnfinishedTask._make((*task, steps))

    def _read(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            connection = self._borrow_reader()
            try:
                return _fetch(connection, statement, values)
            finally:
                self._return_reader(connection)
        except sqlite3.Error as error:
            raise _storage_error(error) from error

    def _borrow_reader(self) -> sqlite3.Connection:
        """Return a connection that nobody reads by; waits for one where no descriptor is left for another."""
        with self._reader_returned:
            if self._readers:
                return self._readers.pop()
        try:
            return self._connect()
        except sqlite3.OperationalError:
            with self._reader_returned:
                if not self._reader_returned.wait_for(lambda: self._readers, _READER_TIMEOUT_S):
                    raise
                return self._readers.pop()

    def _return_reader(self, connection: sqlite3.Connection) -> None:
        with self._reader_returned:
            if len(self._readers) < _IDLE_READERS:
                self._readers.append(connection)
                self._reader_returned.notify()
                return
        connection.close()

    def _connect(self) -> sqlite3.Connection:
        """Return a connection that has all its files open."""
        connection = sqlite3.connect(self._path, timeout=5, isolation_level=None, check_same_thread=False)
        with contextlib.ExitStack() as undo:  # Windows renames no file that is open
            undo.callback(connection.close)
            connection.execute("PRAGMA cache_size = -1024")
            undo.pop_all()
        return connection

    # -- the writing thread

    def _ask(self, apply: Callable[[sqlite3.Connection], Any], is_durable: bool = False) -> Future[Any]:
        """Queue a change that somebody waits for, and that may fail."""
        change = _Change(apply, Future(), is_durable, retry_until_stored=False, has_waiter=True)
        self._enqueue(change)
        return change.future

    def _record(self, apply: Callable[[sqlite3.Connection], Any], is_durable: bool = False) -> None:
        """Queue a change that tells of what has happened; it is tried again until it is stored."""
        self._enqueue(_Change(apply, Future(), is_durable, retry_until_stored=True, has_waiter=False))

    def _enqueue(self, change: _Change) -> None:
        with self._queue_changed:
            if not self._is_closing:
                self._queue.append(change)
                if change.has_waiter or len(self._queue) == 1:
                    self._queue_changed.notify()
                return
        change.future.set_exception(Unavailable("the daemon is ending; send the request again to the next one"))

    def _write(self) -> None:
        """Commit what is queued until the store is closed; no exception ends this thread."""
        batch: list[_Change] = []
        is_last = False
        while not is_last:
            is_last = self._take_queue(batch)
            try:
                batch = self._commit(batch) if batch else []
            except Exception as error:
                log.exception("the store failed: %d changes are not stored", len(batch))
                _fail_all(batch, error)
                batch = []
        _fail_all(batch, Unavailable("the daemon ended before this could be stored"))
        self._writer.close()

    def _take_queue(self, batch: list[_Change]) -> bool:
        """Wait for changes, and add them to those to be tried again; return whether they are the last ones."""
        with self._queue_changed:
            if not self._queue and not self._is_closing:
                self._queue_changed.wait(_RETRY_S if batch else None)
            if not self._is_closing and not any(change.has_waiter for change in self._queue):
                self._queue_changed.wait(_GROUP_COMMIT_DELAY_S)  # the end of a step goes with the begin of the next
            batch += self._queue
            self._queue = []
            return self._is_closing

    def _commit(self, batch: list[_Change]) -> list[_Change]:
        """Commit the changes together, else one by one; return those to be tried again."""
        begin_s = time.perf_counter()
        error = self._try_commit(batch)
        self._on_commit(time.perf_counter() - begin_s, len(batch))
        if error is None:
            self._note_trouble("")
            return []
        if len(batch) > 1:
            unsaved: list[_Change] = []
            for change in batch:  # once one fails that is tried again, those of its kind must not overtake it
                unsaved += [change] if unsaved and change.retry_until_stored else self._commit([change])
            return unsaved
        if batch[0].retry_until_stored and _is_transient(error):
            self._note_trouble(f"cannot write to {self._path}, trying again: {error}")
            return batch
        _fail_all(batch, error)
        return []

    def _try_commit(self, batch: list[_Change]) -> Exception | None:
        """Commit the changes, the one place that writes; return the error that undid all of them, or None."""
        connection = self._writer
        results: list[tuple[_Change, Any, ApiError | None]] = []
        try:
            level = "FULL" if any(change.is_durable for change in batch) else "NORMAL"
            connection.execute(f"PRAGMA synchronous = {level}")
            connection.execute("BEGIN IMMEDIATE")
            for change in batch:
                try:
                    results.append((change, change.apply(connection), None))
                except ApiError as error:  # refused before it changed anything
                    results.append((change, None, error))
            connection.execute("COMMIT")
        except Exception as error:
            if len(batch) == 1 and not isinstance(error, sqlite3.OperationalError):
                log.exception("a change of the database failed")
            with contextlib.suppress(sqlite3.Error):  # there may be no transaction
                connection.execute("ROLLBACK")
            return error
        if any(change.is_durable and not change.has_waiter for change in batch):  # the end of a step
            failpoint("stored")
        for change, result, error_response in results:
            if error_response:
                change.future.set_exception(error_response)
            else:
                change.future.set_result(result)
        return None

    def _note_trouble(self, trouble: str) -> None:
        """Log once when nothing can be written, and once when it can again."""
        if trouble and not self._trouble:
            log.error("%s", trouble)
        if self._trouble and not trouble:
            log.info("%s can be written again", self._path)
        self._trouble = trouble


def _fail_all(changes: Iterable[_Change], error: Exception) -> None:
    """Tell whoever waits for these changes that they are not stored."""
    for change in changes:
        if not change.future.done():
            change.future.set_exception(_storage_error(error))


def _is_transient(error: Exception) -> bool:
    """Return whether a change may succeed later: the disk is full, say, and not the change at fault."""
    return isinstance(error, (sqlite3.OperationalError, MemoryError)) or type(error) is sqlite3.DatabaseError


def _storage_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if "full" in str(error):
        return StorageFull(f"the disk of the root is full; make room, or give another --root ({error})")
    return Unavailable(f"the store cannot be used now, try again ({error})")


def _fetch(connection: sqlite3.Connection, statement: str, values: Sequence[Any]) -> list[Any]:
    try:
        return connection.execute(statement, values).fetchall()
    except sqlite3.OperationalError as error:
        if "decode" not in str(error):
            raise
        connection.text_factory = functools.partial(str, encoding="utf-8", errors="replace")  # a damaged text
        return connection.execute(statement, values).fetchall()


def _check_integrity(db: sqlite3.Connection, version: int) -> str:
    """Return what is wrong with a database that was there before; empty when nothing is.

    Sound is what SQLite finds sound and has the columns of its version; how the schema is worded does not matter.
    """
    if not version:
        return "it is empty"
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as model:
        for migrate in _MIGRATIONS[:version]:
            migrate(model)
        if missing := sorted(_columns(model) - _columns(db)):
            return f"it lacks {', '.join(missing)}"
    report: str = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    return "" if report == "ok" else report.replace("\n", " ")


def _columns(db: sqlite3.Connection) -> set[str]:
    """Return the names of the columns and indexes of a database."""
    columns = set()
    for kind, name in db.execute("SELECT type, name FROM sqlite_master WHERE name NOT LIKE 'sqlite%'").fetchall():
        if kind == "index":
            columns.add(f"index {name}")
        for row in db.execute(f"PRAGMA table_info('{name}')"):
            columns.add(f"{name}.{row[1]}")
    return columns


def _migrate(db: sqlite3.Connection, version: int) -> None:
    """Lead a database from this version to the next, whole or not at all."""
    db.execute("BEGIN IMMEDIATE")
    try:
        _MIGRATIONS[version](db)
        db.execute(f"PRAGMA user_version = {version + 1}")
        db.execute("COMMIT")
    except sqlite3.Error:
        db.execute("ROLLBACK")
        raise


def _accept(db: sqlite3.Connection, task_number: int, spec: TaskSpec, now_ns: int) -> Accepted:
    known = db.execute("SELECT seq, count, accepted_ns, digest FROM task WHERE id = ?", (spec.id,)).fetchone()
    if known:
        number, step_count, accepted_ns, fingerprint = known
        if fingerprint != spec.fingerprint:
            raise Conflict(f"id: {spec.id!r} is the id of a task that was submitted otherwise; use another id")
        return Accepted(number, spec.id, step_count, accepted_ns, False)
    db.execute(
        "INSERT INTO task (seq, id, digest, count, timeout_ns, accepted_ns) VALUES (?, ?, ?, ?, ?, ?)",
        (task_number, spec.id, spec.fingerprint, len(spec.steps), spec.timeout_ns, now_ns),
    )
    steps = []
    scripts = []
    for index, step in enumerate(spec.steps):
        steps.append((task_number, index, step.name, json.dumps(step.depends_on), step.timeout_ns))
        scripts.append((task_number, index, step.command_type, json.dumps(spec.env + step.env), step.content))
    db.executemany("INSERT INTO step (task, idx, name, needs, timeout_ns) VALUES (?, ?, ?, ?, ?)", steps)
    db.executemany("INSERT INTO script VALUES (?, ?, ?, ?, ?)", scripts)
    return Accepted(task_number, spec.id, len(spec.steps), now_ns, True)


def _end_task(db: sqlite3.Connection, task_number: int, state: State, end: TaskEnd, now_ns: int) -> None:
    values = (state, end.code, end.message, now_ns, task_number)
    db.execute("UPDATE task SET state = ?, code = ?, message = ?, ended_ns = ? WHERE seq = ?", values)
    db.execute("DELETE FROM script WHERE task = ?", (task_number,))


# ======================================================================================================================
# III tasks / scheduler: the pool, and the one place where a step or a task changes its phase
# ======================================================================================================================


# An unfinished task and its steps live in memory; everything else is a row. A step moves so:
#
#     BLOCKED --> READY <--> STARTING --> RUNNING --> ENDED
#
# BLOCKED waits for other steps, READY for a slot of the pool, in the order in which steps became ready. STARTING has a
# slot; its files are made, then its begin is stored; RUNNING has a process tree. ENDED has a code; each of the others
# leads there too, when it is stopped or cannot start. SKIPPED, which BLOCKED alone becomes, depends on a step that
# failed: it never runs, and is shown as pending for ever. STARTING and RUNNING go back to READY where the host lacks
# what a start needs: a process, a descriptor, memory, room on the disk; nothing of the step's own has run then.
#
# Who moves it: `submit` and the end of other steps make it READY; `_dispatch` gives it a slot; its runner, the thread
# that has it from then on, moves it to RUNNING and ENDED or back to READY; a stop ends what is not in a runner's hands,
# and else asks its runner to. A stop that comes while the runner finds the step ended is not lost: `finish` refuses to
# end a step that is to be stopped until its tree has been.
#
# `_move` is the one site that changes a phase, and refuses a move that is not in `_MOVES`. Its record is queued for the
# store in the same critical section, so the database has all moves in the order of memory, a task's end behind its
# steps' ends. Nothing calls out under the lock: threads are started, trees woken and files removed after it.
#
# What a crash leaves at each edge, by the names of the failpoints:
#
#     accepted  the task is stored, none of its steps has begun: the next daemon queues them
#     begun     the step is stored as running, with all its files, but has no process: they say so, it is queued again
#     spawned   the process runs: it is adopted
#     ended     the process has left its result: it is read
#     stored    the end is in the database, what depends on it was not started: it is queued
#
# A task ends with its last step, with the sum of the codes; one that was stopped also waits until nothing is left of
# what its ended steps had started.


class Phase(Enum):
    """Where a step of an unfinished task stands."""

    BLOCKED = "blocked"
    READY = "ready"
    STARTING = "starting"
    RUNNING = "running"
    ENDED = "ended"
    SKIPPED = "skipped"


_MOVES: Mapping[Phase, frozenset[Phase]] = {
    Phase.BLOCKED: frozenset({Phase.READY, Phase.ENDED, Phase.SKIPPED}),
    Phase.READY: frozenset({Phase.STARTING, Phase.ENDED}),
    Phase.STARTING: frozenset({Phase.READY, Phase.RUNNING, Phase.ENDED}),
    Phase.RUNNING: frozenset({Phase.READY, Phase.ENDED}),
    Phase.ENDED: frozenset(),
    Phase.SKIPPED: frozenset(),
}
_FINAL = (Phase.ENDED, Phase.SKIPPED)
_START_RETRY_S = 0.5  # between two tries where the host lacks what a start needs
_SCARCITY_S = 5.0  # without a start that failed, and the host lacks nothing any more


class PoolStats(NamedTuple):
    """The pool: its size, the steps that run, the steps that are ready and wait."""

    size: int
    running: int
    waiting: int


class IllegalMove(Exception):
    """A step was to move where no step moves to."""


class Step:
    """A step of an unfinished task. Guarded by the scheduler's lock, but for `tree`, its runner's."""

    __slots__ = (
        *("attempt", "code", "index", "name", "phase", "ready_s", "started_ns", "stop_count", "stop_reason"),
        *("task", "timeout_ns", "tree"),
    )

    def __init__(self, task: Task, index: int, spec: StepSpec | UnfinishedStep) -> None:
        self.task = task
        self.index = index
        self.name = spec.name
        self.timeout_ns = spec.timeout_ns
        self.phase = Phase.BLOCKED
        self.code = 0
        self.ready_s = 0.0  # when it became ready, by time.monotonic()
        self.attempt = 0  # how often it was given a slot
        self.started_ns = 0  # 0: it never began
        self.stop_reason = ""  # why it is to be stopped
        self.stop_count = 0  # how often that was asked for
        self.tree: ProcessTree | None = None

    def __str__(self) -> str:
        return f"task {self.task.id} step {self.index}"

    @property
    def log_fields(self) -> dict[str, Any]:
        """What a line of the log about it says beside its text."""
        return {"log_fields": {"task": self.task.id, "step": self.index}}


class Task:
    """A task that has not ended. Guarded by the scheduler's lock."""

    def __init__(self, task_id: str, specs: Sequence[StepSpec | UnfinishedStep], timeout_ns: int) -> None:
        self.id = task_id
        self.number = 0  # from its acceptance on
        self.timeout_ns = timeout_ns
        self.steps = [Step(self, index, spec) for index, spec in enumerate(specs)]
        self.plan = Plan([spec.depends_on for spec in specs])
        self.unfinished = len(specs)  # steps that are in no final phase
        self.stop_reason = ""  # why all of it is stopped
        self.stop_count = 0
        self.is_cleaning = False  # what its ended steps left is being stopped

    def __str__(self) -> str:
        return f"task {self.id}"

    def ended_steps(self) -> list[Step]:
        """Return the steps that have run and may have left processes behind."""
        return [step for step in self.steps if step.phase is Phase.ENDED and step.started_ns]


class _AfterLock(NamedTuple):
    """What is to be done once the lock is released."""

    assigned: list[Step]
    cleanups: list[Task]
    ended: list[Task]


class Scheduler:
    """Decides which step runs when, and knows how it stands; any thread may call it.

    At most `size` steps run at once, or as many as the host can run, in the order in which they became ready. Each has
    a thread while it runs, which takes the next one when it is done.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        size: int,
        capacity: int,
        task_has_ended: Callable[[int], None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._capacity = capacity  # how many steps this host can run at once
        self._task_has_ended = task_has_ended  # told the number; without the lock
        self._run_step: Callable[[Step], None]  # from `start` on
        self._clean_up: Callable[[Task], None]
        self.attention = threading.Event()  # set when there is a deadline that may be the next
        self._lock = threading.Lock()  # guards all below, and what tasks and steps hold
        self._size = size
        self._slots = min(size, capacity)
        self._last_number = 0
        self._tasks: dict[int, Task] = {}
        self._ready: collections.OrderedDict[Step, None] = collections.OrderedDict()
        self._active: set[Step] = set()  # STARTING and RUNNING: each has a slot
        self._unattended: collections.deque[Step | Task] = collections.deque()  # no thread could be started for them
        self._cleanups: list[Task] = []  # to be handed to a thread after the lock
        self._ended: list[Task] = []  # to be told of after the lock
        self._deadlines: list[tuple[int, int]] = []  # of tasks, a heap
        self._workers: set[threading.Thread] = set()
        self._is_paused = True  # no step starts, as until `start`
        self.is_leaving = False  # runners leave what they watch
        self.scarcity = ""  # what the host lacks to start steps
        self._retry_s = 0.0  # when the next step may be tried then
        self._lacked_s = 0.0  # when the last start failed for it

    # -- the daemon's

    def start(self, run_step: Callable[[Step], None], clean_up: Callable[[Task], None]) -> None:
        """Start what is ready, and go on with what was restored."""
        self._run_step = run_step
        self._clean_up = clean_up
        with self._lock:
            self._is_paused = False
            adopted = [step for step in self._active if step.phase is Phase.RUNNING]
            after = self._dispatch()
            self._unattended.extend(adopted)
        self._carry_out(after)
        self.retry()

    def reserve_task_numbers(self, last: int) -> None:
        """Give no new task this number or a lower one."""
        with self._lock:
            self._last_number = max(self._last_number, last)

    def pause(self) -> int:
        """Start no more steps; return how many run."""
        with self._lock:
            self._is_paused = True
            return len(self._active)

    def stop_running(self) -> None:
        """Stop by force what runs."""
        with self._lock:
            trees = self._request_stops(list(self._active), STOPPED)
        _wake(trees)

    def stop(self) -> None:
        """End every worker; steps that run still run on without a daemon."""
        with self._lock:
            self._is_paused = True
            self.is_leaving = True
            trees = [step.tree for step in self._active if step.tree]
            workers = [*self._workers]
        _wake(trees)
        end_s = time.monotonic() + 1.5
        for worker in workers:
            if worker.is_alive():
                worker.join(max(0, end_s - time.monotonic()))

    # -- submissions

    def submit(self, spec: TaskSpec) -> Accepted:
        """Take a task; return when it is stored. Raises Conflict, StorageFull, Unavailable.

        It is known here before anybody can see it in the store, so that a stop finds it.
        """
        self._store.check_in_place()
        task = Task(spec.id, spec.steps, spec.timeout_ns)
        now_ns = self._clock.now_ns()
        with self._lock:
            if self._is_paused:
                raise Unavailable("the daemon is ending; send the task again to the next one")
            self._last_number += 1
            task.number = self._last_number
            self._tasks[task.number] = task
            stored = self._store.accept(task.number, spec, now_ns)
        is_new = False
        try:
            accepted = stored.result()
            is_new = accepted.is_new
        finally:
            if not is_new:
                with self._lock:
                    del self._tasks[task.number]
        failpoint("accepted")
        if is_new:
            self._release(task, now_ns)
        return accepted

    def _release(self, task: Task, accepted_ns: int) -> None:
        """Let the steps of a task run that has been accepted."""
        with self._lock:
            self._set_deadline(task, accepted_ns)
            if task.number in self._tasks:  # not stopped already
                self._end_steps(task, [])
            after = self._dispatch()
        self._carry_out(after)

    def restore(self, found: UnfinishedTask) -> list[Step]:
        """Take up a task as it is stored; return its steps that had begun, for `attach`, `finish` or `requeue`.

        Raises ValueError where what is stored makes no sense. Nothing starts before `start`.
        """
        task = Task(found.id, found.steps, found.timeout_ns)
        task.number = found.task_number
        task.stop_reason = found.stop
        with self._lock:
            self._restore_ended_steps(task, found.steps)
            ready = self._replay_plan(task)
            begun = [step for step in ready if found.steps[step.index].state == State.RUNNING]
            if len(begun) != sum(row.state == State.RUNNING for row in found.steps):
                raise ValueError("a step runs before what it depends on has succeeded")
            self._tasks[task.number] = task
            for step in ready:
                self._make_ready(step)
            for step in begun:
                self._move(step, Phase.STARTING)
            self._set_deadline(task, found.accepted_ns)
            after = self._settle_restored(task)
            self._unattended.extend(after.cleanups)
        self._carry_out(after._replace(cleanups=[]))
        return begun

    def _restore_ended_steps(self, task: Task, rows: Sequence[UnfinishedStep]) -> None:
        """Take up how steps have ended, and skip what depends on those that failed; the lock is held."""
        for step, row in zip(task.steps, rows):
            step.stop_reason = task.stop_reason or row.stop
            step.started_ns = row.started_ns or 0
            if row.state == State.ENDED:
                self._move(step, Phase.ENDED)
                step.code = row.code
        for step in task.steps:
            if step.code:
                self._skip_dependents(step)

    def _replay_plan(self, task: Task) -> list[Step]:
        """Walk the plan as far as steps have succeeded; return those that may run now. The lock is held."""
        ready = []
        while indexes := task.plan.ready():
            for index in indexes:
                step = task.steps[index]
                if step.phase is Phase.BLOCKED:
                    ready.append(step)
                elif step.phase is Phase.ENDED and not step.code:
                    task.plan.succeed(index)
        return ready

    def _settle_restored(self, task: Task) -> _AfterLock:
        """End what is to be stopped and has not begun, and the task where nothing is left; the lock is held."""
        waiting = (Phase.BLOCKED, Phase.READY) if not task.stop_reason else (Phase.READY,)
        stopped = [step for step in task.steps if step.stop_reason and step.phase in waiting]
        if task.stop_reason:
            self._queue_cleanup(task)
        self._end_steps(task, [(step, FORCED_CODE, step.stop_reason) for step in stopped])
        return self._dispatch()

    # -- stops

    def stop_task(self, task_number: int, reason: str = STOPPED) -> None:
        """Stop all steps of a task by force, and what ended ones left; return when that is recorded.

        Raises NotFound if it has ended.
        """
        with self._lock:
            task = self._tasks.get(task_number)
            if task is None:
                raise NotFound("the task has ended already")
            task.stop_reason = task.stop_reason or reason
            task.stop_count += 1
            stored = self._store.record_stop(task_number, None, task.stop_reason)
            trees = self._request_stops([step for step in self._active if step.task is task], reason)
            self._queue_cleanup(task)
            ready = [step for step in task.steps if step.phase is Phase.READY]
            self._end_steps(task, [(step, FORCED_CODE, task.stop_reason) for step in ready])
            after = self._dispatch()
        _wake(trees)
        self._carry_out(after)
        _await_stop(task, stored)

    def stop_step(self, task_number: int, step_index: int) -> None:
        """Stop a step by force; return when that is recorded. Raises NotFound if it has ended, or never will run."""
        with self._lock:
            task = self._tasks.get(task_number)
            if task is None or task.steps[step_index].phase in _FINAL:
                raise NotFound("the step has ended already")
            step = task.steps[step_index]
            stored = self._store.record_stop(task_number, step_index, step.stop_reason or STOPPED)
            trees: list[ProcessTree] = []
            if step in self._active:
                trees = self._request_stops([step], STOPPED)
            else:
                self._end_steps(task, [(step, FORCED_CODE, STOPPED)])
            after = self._dispatch()
        _wake(trees)
        self._carry_out(after)
        _await_stop(step, stored)

    def request_stop(self, step: Step, reason: str) -> None:
        """Have the runner of a step stop it."""
        with self._lock:
            trees = self._request_stops([step], reason) if step in self._active else []
        _wake(trees)

    def _request_stops(self, steps: Iterable[Step], reason: str) -> list[ProcessTree]:
        """Note that these active steps are to be stopped; return the trees to wake. The lock is held."""
        trees = []
        for step in steps:
            if reason == STOPPED or not step.stop_reason:  # a deadline does not cut the grace of a stop
                step.stop_count += 1
            step.stop_reason = step.stop_reason or reason
            if step.tree:
                trees.append(step.tree)
        return trees

    def _queue_cleanup(self, task: Task) -> None:
        """Have stopped what the task's ended steps left running; the lock is held."""
        if not task.is_cleaning and task.ended_steps():
            task.is_cleaning = True
            self._cleanups.append(task)

    def finish_cleanup(self, task: Task) -> None:
        """Nothing is left of what the task's ended steps had started."""
        with self._lock:
            task.is_cleaning = False
            self._end_steps(task, [])
            after = self._dispatch()
        self._carry_out(after)

    # -- for runners

    def begin(self, step: Step) -> Future[None]:
        """The files of a step are made; return what is done when its begin is stored, before which it must not run."""
        with self._lock:
            step.started_ns = self._clock.now_ns()
            return self._store.begin(step.task.number, step.index, step.started_ns)

    def attach(self, step: Step, tree: ProcessTree) -> None:
        """The step runs, as this tree."""
        with self._lock:
            self._move(step, Phase.RUNNING)
            step.tree = tree
            self._retry_s = 0.0
            has_recovered = self.scarcity and (not self._ready or time.monotonic() - self._lacked_s > _SCARCITY_S)
            if has_recovered:
                self.scarcity = ""
            after = self._dispatch()
        if has_recovered:
            log.info("steps start again")
        self._carry_out(after)

    def put_back(self, step: Step) -> None:
        """Queue a step again that had begun by the record, and of which nothing has run."""
        with self._lock:
            self._put_back(step)
            after = self._dispatch()
        self._carry_out(after)

    def requeue(self, step: Step, lack: str) -> None:
        """Put a step that could not be started back to the head of the queue: the host lacks something for now."""
        with self._lock:
            self._lacked_s = time.monotonic()
            self._retry_s = self._lacked_s + _START_RETRY_S
            is_new = not self.scarcity
            self.scarcity = f"steps wait, they cannot be started now: {lack}"
            self._put_back(step)
            if step in self._ready:
                self._ready.move_to_end(step, last=False)
            after = self._dispatch()
        if is_new:
            log.error("%s: %s", step, self.scarcity, extra=step.log_fields)
        self._carry_out(after)

    def _put_back(self, step: Step) -> None:
        """Make a step ready again, or end it where it is to be stopped; the lock is held."""
        self._move(step, Phase.READY)
        if step.started_ns:
            step.started_ns = 0
            has_begun = any(one.started_ns for one in step.task.steps)
            self._store.requeue(step.task.number, step.index, State.RUNNING if has_begun else State.PENDING)
        if step.stop_reason:
            self._end_steps(step.task, [(step, FORCED_CODE, step.stop_reason)])

    def finish(self, step: Step, code: int, reason: str = "", tree_has_ended: bool = False) -> bool:
        """End a step; return False, having done nothing, where it is to be stopped and its tree has not been."""
        with self._lock:
            if step.stop_reason and not tree_has_ended:
                return False
            if step.stop_reason:
                code, reason = FORCED_CODE, step.stop_reason
            self._end_steps(step.task, [(step, code, reason)])
            self._retry_s = 0.0  # what it took is free
            after = self._take_after_lock()
        self._carry_out(after)
        return True

    # -- for the API and the janitor

    def pool(self) -> PoolStats:
        with self._lock:
            return PoolStats(self._size, len(self._active), len(self._ready))

    def resize(self, size: int) -> PoolStats:
        """Set the size of the pool: more steps start at once, or running ones end before others start."""
        with self._lock:
            self._size = size
            self._slots = min(size, self._capacity)
            after = self._dispatch()
            stats = PoolStats(self._size, len(self._active), len(self._ready))
        self._carry_out(after)
        return stats

    def running_steps(self) -> list[Step]:
        """Return the steps that have a process tree and are not being stopped."""
        with self._lock:
            return [step for step in self._active if step.tree and not step.stop_reason]

    def overdue_tasks(self) -> list[int]:
        """Take the tasks whose time is over, by number; some of them may have ended."""
        now_ns = self._clock.now_ns()
        numbers = []
        with self._lock:
            while self._deadlines and self._deadlines[0][0] <= now_ns:
                numbers.append(heapq.heappop(self._deadlines)[1])
        return numbers

    def next_deadline_ns(self) -> int | None:
        """Return when the next task's time is over."""
        with self._lock:
            return self._deadlines[0][0] if self._deadlines else None

    def retry(self) -> None:
        """Try again what the host lacked something for."""
        with self._lock:
            unattended = [*self._unattended]
            self._unattended.clear()
            after = self._dispatch()
        for work in unattended:
            self._start_worker(work)
        self._carry_out(after)

    # -- moves; the lock is held

    def _move(self, step: Step, phase: Phase) -> None:
        """Change the phase of a step, the one site that does."""
        if phase not in _MOVES[step.phase]:
            raise IllegalMove(f"{step}: from {step.phase.value} to {phase.value}")
        if step.phase is Phase.READY:
            del self._ready[step]
        if phase is Phase.READY:
            self._ready[step] = None
        if phase is Phase.STARTING:
            self._active.add(step)
        elif phase is not Phase.RUNNING:
            self._active.discard(step)
        if phase in _FINAL:
            step.task.unfinished -= 1
        step.phase = phase

    def _make_ready(self, step: Step) -> None:
        step.ready_s = time.monotonic()
        self._move(step, Phase.READY)

    def _end_steps(self, task: Task, ends: Sequence[tuple[Step, int, str]]) -> None:
        """End steps, make ready what waited for them, and end the task with the last; all in one record.

        The steps of a stopped task that become ready end at once.
        """
        records: list[StepEnd] = []
        while True:
            for step, code, reason in ends:
                self._move(step, Phase.ENDED)
                step.code = code
                records.append(StepEnd(step.index, code, reason))
                if code:
                    self._skip_dependents(step)
                else:
                    task.plan.succeed(step.index)
            fresh = [task.steps[index] for index in task.plan.ready() if task.steps[index].phase is Phase.BLOCKED]
            for step in fresh:
                self._make_ready(step)
            if not fresh or not task.stop_reason:
                break
            ends = [(step, FORCED_CODE, task.stop_reason) for step in fresh]
        is_over = not task.unfinished and not task.is_cleaning
        if is_over:
            del self._tasks[task.number]
            self._ended.append(task)
        if records or is_over:
            task_end = TaskEnd(*summarize((one.index, one.name, one.code) for one in task.steps)) if is_over else None
            self._store.end(task.number, records, task_end, self._clock.now_ns())

    def _skip_dependents(self, step: Step) -> None:
        """A step has failed: what depends on it, directly or not, never runs."""
        steps, plan = step.task.steps, step.task.plan
        pending = [*plan.dependents(step.index)]
        while pending:
            dependent = steps[pending.pop()]
            if dependent.phase is Phase.BLOCKED:
                self._move(dependent, Phase.SKIPPED)
                pending += plan.dependents(dependent.index)

    def _next_ready_step(self) -> Step | None:
        """Give a slot to the step that is ready longest; None where there is none, or no slot."""
        if self._is_paused or not self._ready or len(self._active) >= self._slots:
            return None
        if self.scarcity:  # one at a time is tried then
            if time.monotonic() < self._retry_s:
                return None
            self._retry_s = time.monotonic() + _START_RETRY_S
        step = next(iter(self._ready))
        self._move(step, Phase.STARTING)
        step.attempt += 1
        return step

    def _dispatch(self) -> _AfterLock:
        """Give free slots to steps that are ready."""
        assigned = []
        while step := self._next_ready_step():
            assigned.append(step)
        return self._take_after_lock(assigned)

    def _take_after_lock(self, assigned: Sequence[Step] = ()) -> _AfterLock:
        after = _AfterLock([*assigned], self._cleanups, self._ended)
        self._cleanups = []
        self._ended = []
        return after

    def _set_deadline(self, task: Task, accepted_ns: int) -> None:
        if task.timeout_ns:
            heapq.heappush(self._deadlines, (accepted_ns + task.timeout_ns, task.number))
            self.attention.set()

    # -- workers; without the lock

    def _carry_out(self, after: _AfterLock) -> None:
        """Do what must not be done under the lock."""
        for task in after.ended:
            self._task_has_ended(task.number)
        for step in after.assigned:
            self._start_worker(step)
        for task in after.cleanups:
            self._start_worker(task)

    def _start_worker(self, work: Step | Task) -> None:
        """Start a thread for a step that has a slot, or for the clean-up of a task."""
        worker = DaemonThread(target=self._work, args=(work,), name="step")
        with self._lock:
            self._workers.add(worker)
        try:
            worker.start()
        except (RuntimeError, MemoryError) as error:
            with self._lock:
                self._workers.discard(worker)
            if isinstance(work, Step) and work.phase is Phase.STARTING:
                return self.requeue(work, f"no thread can be started ({error})")
            with self._lock:
                self._unattended.append(work)

    def _work(self, first: Step | Task) -> None:
        """The thread of one step after another."""
        work: Step | Task | None = first
        while work is not None:
            self._run(work)
            with self._lock:
                work = self._next_ready_step()
                if work is None:
                    self._workers.discard(threading.current_thread())
                after = self._dispatch()
            self._carry_out(after)

    def _run(self, work: Step | Task) -> None:
        """Run a step or a clean-up to its end; whatever is raised is logged, and tried again while it is ours."""
        attempt = work.attempt if isinstance(work, Step) else 0
        while not self.is_leaving:
            try:
                if isinstance(work, Task):
                    self._clean_up(work)
                elif work in self._active and work.attempt == attempt:
                    self._run_step(work)
                return
            except Exception as error:
                if isinstance(error, OSError) and is_scarcity(error):
                    log.error("%s: cannot be looked after for now: %s", work, error)
                else:
                    log.exception("%s: the daemon failed, and will try again", work)
            time.sleep(_START_RETRY_S)


def _wake(trees: Iterable[ProcessTree]) -> None:
    for tree in trees:
        tree.wake()


def _await_stop(stopped: Step | Task, stored: Future[None]) -> None:
    """Wait until a stop is recorded. Where it cannot be, the stop matters more: the end will tell of it."""
    try:
        stored.result()
    except (StorageFull, Unavailable) as error:
        log.error("%s: cannot store a stop: %s", stopped, error)


# ======================================================================================================================
# III tasks / runner: launch, watch and result of one step
# ======================================================================================================================

_EXCESS = 1.25  # by how much a step that is stopped for its output may exceed the limit before it is killed
_EARLY_LOOK_BYTES = 1 << 30  # a limit of output below this is looked at as soon as a step starts


class NotStarted(Exception):
    """A step could not be started for now; the text says what the host lacks."""


class Runner:
    """Runs steps, each by a thread of the scheduler's; any thread may call it."""

    def __init__(
        self,
        store: Store,
        scheduler: Scheduler,
        processes: Processes,
        clock: Clock,
        files: SafeDirectory,
        settings: Settings,
        observer: Observer,
    ) -> None:
        self._store = store
        self._scheduler = scheduler
        self._processes = processes
        self._clock = clock
        self._files = files
        self._settings = settings
        self._observer = observer
        self._path = os.environ.get("PATH", os.defpath)

    def directory(self, step: Step) -> StepDirectory:
        """Return the directory of a step."""
        return StepDirectory(self._files, step.task.number, step.index)

    def run(self, step: Step) -> None:
        """Run a step, or go on with an adopted one, until it has ended, waits again, or is left to run on."""
        try:
            if step.tree is None and not self._launch(step):
                return
            self._watch(step)
        except NotStarted as error:
            self._close_tree(step)
            return self._scheduler.requeue(step, str(error))
        except LaunchError as error:
            self._finish(step, FORCED_CODE, str(error))
        if step.phase is Phase.ENDED or self._scheduler.is_leaving:
            self._close_tree(step)

    def clean_up(self, task: Task) -> None:
        """Stop what the ended steps of a stopped task have left running."""
        tree = self._processes.remains([self.directory(step).path for step in task.ended_steps()])
        try:
            tree.stop(lambda: task.stop_count > 1)
        finally:
            self._processes.release(tree)
        self._scheduler.finish_cleanup(task)

    def remove_empty_workspace(self, task_number: int) -> None:
        """Remove the workspace of an ended task if nothing is in it."""
        with contextlib.suppress(OSError):  # it is not empty, or was never made
            self._files.remove_empty(str(task_number), "workspace")

    # -- launch

    def _launch(self, step: Step) -> bool:
        """Start the step's process; False where it ended before that, or the daemon ends.

        Raises LaunchError, and NotStarted where it can be tried again.
        """
        directory = self.directory(step)
        try:
            script = self._store.script(step.task.number, step.index)
            content = encode_script(script.command_type, script.content)
            file = directory.prepare(script_name(script.command_type), content, self._processes.initial_files)
            workspace = self._make_workspace(step)
            env = self._environment_of(step, (*script_environment(script.command_type), *script.env), workspace)
            command = interpreter_command(script.command_type, file, workspace, env.get("PATH", self._path))
            self._scheduler.begin(step).result()  # only what is known to have begun may run
            if step.stop_reason:
                self._finish(step, FORCED_CODE)
            if step.phase is Phase.ENDED or self._scheduler.is_leaving:
                return False
            failpoint("begun")
            tree = self._processes.start(command, directory.path, workspace, env)
            failpoint("spawned")
        except (StorageFull, Unavailable) as error:
            raise NotStarted(str(error)) from error
        except (OSError, LookupError, ValueError, MemoryError) as error:
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and is_scarcity(error)):
                raise NotStarted(str(error)) from error
            raise LaunchError(f"could not start: {error}") from error
        self._scheduler.attach(step, tree)
        if 0 < self._settings.max_output < _EARLY_LOOK_BYTES:
            self._scheduler.attention.set()
        self._observer.step_started(step.task.id, step.index, time.monotonic() - step.ready_s)
        log.debug("%s: started, pid %d", step, tree.pid, extra=step.log_fields)
        return True

    def _make_workspace(self, step: Step) -> str:
        """Return the task's workspace, made where no step has made it, or one has removed it."""
        workspace = os.path.join(self._files.path, str(step.task.number), "workspace")
        if not is_real_directory(workspace):
            with contextlib.suppress(FileExistsError):  # a parallel step did
                self._files.make(str(step.task.number), "workspace")
        if not is_real_directory(workspace):
            raise LaunchError("could not start: an earlier step has put something else in place of the workspace")
        return workspace

    def _environment_of(self, step: Step, entries: Sequence[str], workspace: str) -> dict[str, str]:
        """Return what the step's environment has beyond the daemon's."""
        env = {}
        for entry in entries:
            name, _, value = entry.partition("=")
            env[environment_name(name)] = value
        env["TASK_ID"] = step.task.id
        env["TASK_STEP_ID"] = str(step.index)
        env["TASK_STEP_NAME"] = step.name
        env["TASK_WORKSPACE"] = workspace
        return env

    # -- watch

    def _watch(self, step: Step) -> None:
        """Wait for the step's end, stopping it on timeout or request, and tell how it ended.

        Returns without that when the daemon ends first; raises NotStarted where nothing of it has run.
        """
        assert step.tree
        timeout_ns = step.timeout_ns or self._settings.exec_timeout
        deadline_s = self._clock.monotonic_s(step.started_ns + timeout_ns)
        has_ended = False
        while not (has_ended or step.stop_reason or self._scheduler.is_leaving):
            has_ended = step.tree.wait(deadline_s)
            if not has_ended and time.monotonic() >= deadline_s:
                self._scheduler.request_stop(step, TIMED_OUT)
        if step.stop_reason:
            self._stop(step)
            self._finish(step, FORCED_CODE, tree_has_ended=True)
        elif has_ended:
            self._tell_end(step)

    def _tell_end(self, step: Step) -> None:
        """End a step whose wrapper has ended by itself; a stop that comes now still reaches its tree."""
        code = self._exit_code(step)
        if code is None:  # its wrapper was killed: what it ran may run on
            self._stop(step)
            self._finish(step, FORCED_CODE, LOST, tree_has_ended=True)
        elif not self._finish(step, code):
            self._stop(step)
            self._finish(step, FORCED_CODE, tree_has_ended=True)

    def _exit_code(self, step: Step) -> int | None:
        """Return the code of the step's own process, None where nobody knows; raises NotStarted if it never began."""
        assert step.tree
        directory = self.directory(step)
        code = step.tree.exit_code()
        if code is None:
            code = directory.exit_code()
        if code != 0 and not step.stop_reason and not self._processes.may_have_started(directory.path):
            raise NotStarted("no process could be started, or nothing written to its directory")
        return code

    def _stop(self, step: Step) -> None:
        """End the step's tree: asked first, killed when the grace is over."""
        assert step.tree
        log.info("%s: %s", step, step.stop_reason or LOST, extra=step.log_fields)
        directory = self.directory(step)
        most_bytes = self._settings.max_output * _EXCESS

        def is_hurried() -> bool:
            is_excessive = step.stop_reason == OUTPUT_EXCEEDED and directory.output_bytes() > most_bytes
            return step.stop_count > 1 or is_excessive

        step.tree.stop(is_hurried)

    def _finish(self, step: Step, code: int, reason: str = "", tree_has_ended: bool = False) -> bool:
        """End the step; False, having done nothing, where it is to be stopped and its tree has not been."""
        failpoint("ended")
        seconds = (self._clock.now_ns() - step.started_ns) / _SECOND_NS if step.started_ns else 0.0
        output_bytes = self.directory(step).output_bytes()
        tree_has_ended = tree_has_ended or step.tree is None
        if not self._scheduler.finish(step, code, reason, tree_has_ended):
            return False
        reason = step.stop_reason or reason
        result = "forced" if reason else "failed" if step.code else "succeeded"
        self._observer.step_ended(step.task.id, step.index, result, seconds, output_bytes)
        log.debug("%s: ended with code %d %s", step, step.code, reason, extra=step.log_fields)
        return True

    def _close_tree(self, step: Step) -> None:
        tree = step.tree
        step.tree = None
        if tree:
            self._processes.release(tree)


# ======================================================================================================================
# III tasks / recovery: what an earlier daemon left
# ======================================================================================================================

_TASK_NUMBER = re.compile("[1-9][0-9]{0,17}")


class Recovery:
    """Takes up the tasks that an earlier daemon left; for the daemon's start, before anything runs."""

    def __init__(
        self,
        store: Store,
        scheduler: Scheduler,
        processes: Processes,
        clock: Clock,
        files: SafeDirectory,
        runner: Runner,
    ) -> None:
        self._store = store
        self._scheduler = scheduler
        self._processes = processes
        self._clock = clock
        self._files = files
        self._runner = runner

    def run(self) -> list[str]:
        """Restore every unfinished task; return the names of directories that belong to no task."""
        place = self._files.path
        if self._store.quarantine_suffix and os.path.isdir(place):
            _move_or_copy(place, place + self._store.quarantine_suffix)  # it belongs to the database put aside
        os.makedirs(place, exist_ok=True)
        self._files.open()
        self._scheduler.reserve_task_numbers(self._store.last_task_number())
        known = {str(number) for number in self._store.task_numbers()}
        strays = [self._rename_for_removal(name) for name in os.listdir(place) if name not in known]
        for number in self._store.unfinished_task_numbers():
            try:
                self._restore(self._store.unfinished_task(number))
            except (ValueError, TypeError) as error:
                log.error("task number %d cannot be taken up: %s", number, error)
                self._store.fail(number, f"lost: what was stored of it is damaged: {error}", self._clock.now_ns())
        return strays

    def _rename_for_removal(self, name: str) -> str:
        """Rename a stray directory, for a new task may get its number before it is removed; return its name now."""
        gone = f"{name.partition('.')[0][:20]}.gone-{time.time_ns()}"
        try:
            os.rename(os.path.join(self._files.path, name), os.path.join(self._files.path, gone))
        except OSError:  # it is a mount, or a process works in it, which Windows lets nobody move
            if _TASK_NUMBER.fullmatch(name):
                self._scheduler.reserve_task_numbers(int(name))
            return name
        return gone

    def _restore(self, found: UnfinishedTask) -> None:
        for step in self._scheduler.restore(found):
            self._settle(step)

    def _settle(self, step: Step) -> None:
        """Find out what became of a step that had begun."""
        directory = self._runner.directory(step)
        tree = self._processes.adopt(directory.path)
        code = None if tree else directory.exit_code()
        if tree:
            log.info("%s: still runs, pid %d", step, tree.pid, extra=step.log_fields)
            self._scheduler.attach(step, tree)
        elif code is not None and not step.stop_reason:
            self._scheduler.finish(step, code)
        elif code is not None or self._processes.may_have_started(directory.path):
            # It was stopped or killed, and may have left something: its runner ends that before anything follows.
            self._scheduler.attach(step, self._processes.remains([directory.path]))
        else:
            self._scheduler.put_back(step)


def _move_or_copy(place: str, target: str) -> None:
    """Move a directory; where that cannot be, copy its content."""
    try:
        return rename(place, target)
    except OSError:  # it is a mount, or a process works in it, which Windows lets nobody move
        log.warning("%s cannot be moved: its content is copied", place)
    try:
        shutil.copytree(place, target, symlinks=True, ignore=links_in)
    except shutil.Error as error:
        log.error("not all of %s could be copied to %s: %s", place, target, error)


# ======================================================================================================================
# III tasks / janitor: deadlines, limits of output, expiry, removal
# ======================================================================================================================

_TICK_S = 0.5  # between looks at outputs and at what has expired
_LEAST_TICK_S = 0.01
_FASTEST_WRITER_BYTES_PER_S = 2 * 10**9  # a step may fill its limit that fast


class Janitor:
    """Enforces deadlines and limits of output, forgets what has expired, removes its files; by threads of its own."""

    def __init__(
        self,
        store: Store,
        scheduler: Scheduler,
        processes: Processes,
        clock: Clock,
        files: SafeDirectory,
        settings: Settings,
    ) -> None:
        self._store = store
        self._scheduler = scheduler
        self._processes = processes
        self._clock = clock
        self._files = files
        self._settings = settings
        self._pending_removals: collections.deque[str] = collections.deque()  # names of directories; the sweeper's
        self._stopping = threading.Event()
        self._background_threads = [
            DaemonThread(target=self._run_periodically, args=args, name=name)
            for name, args in (
                ("timekeeper", (self._enforce, scheduler.attention)),
                ("sweeper", (self._sweep, self._stopping)),
            )
        ]

    def start(self, strays: Iterable[str]) -> None:
        """Begin; these directories are removed first."""
        self._pending_removals.extend(strays)
        for thread in self._background_threads:
            thread.start()

    def stop(self) -> None:
        """End the threads, within a moment."""
        self._stopping.set()
        self._scheduler.attention.set()
        for thread in self._background_threads:
            if thread.is_alive():
                thread.join(1.5)

    def is_alive(self) -> bool:
        """Return whether its threads run."""
        return all(thread.is_alive() for thread in self._background_threads)

    def _run_periodically(self, action: Callable[[], float], alarm: threading.Event) -> None:
        """Act again and again, after the pause that the action asks for or at the alarm."""
        while not self._stopping.is_set():
            pause_s = _TICK_S
            try:
                pause_s = action()
            except Exception:
                log.exception("%s: will try again", threading.current_thread().name)
            if alarm.wait(pause_s) and alarm is not self._stopping:
                alarm.clear()

    def _enforce(self) -> float:
        """Stop what is overdue and what writes too much, start what waited; return the pause until the next look."""
        for number in self._scheduler.overdue_tasks():
            with contextlib.suppress(NotFound):  # it has ended
                self._scheduler.stop_task(number, TIMED_OUT)
        self._scheduler.retry()
        pause_s = self._check_outputs()
        deadline_ns = self._scheduler.next_deadline_ns()
        if deadline_ns is not None:
            pause_s = min(pause_s, (deadline_ns - self._clock.now_ns()) / _SECOND_NS)
        return max(0.0, pause_s)

    def _check_outputs(self) -> float:
        """Stop the steps that write too much; return how soon another one may."""
        limit = self._settings.max_output
        pause_s = _TICK_S
        for step in self._scheduler.running_steps() if limit else ():
            written = StepDirectory(self._files, step.task.number, step.index).output_bytes()
            if written > limit:
                self._scheduler.request_stop(step, OUTPUT_EXCEEDED)
            else:
                pause_s = min(pause_s, (limit - written) / _FASTEST_WRITER_BYTES_PER_S)
        return max(_LEAST_TICK_S, pause_s)

    def _sweep(self) -> float:
        """Forget what has expired, and remove its files; return the pause until the next look."""
        with contextlib.suppress(OSError):  # no descriptor to look with: the next time
            self._processes.reap()
        expired = self._store.expire(self._clock.now_ns() - self._settings.key_expire)
        self._pending_removals.extend(str(number) for number in expired)
        for _ in range(len(self._pending_removals)):
            name = self._pending_removals.popleft()
            if not self._remove(name):
                self._pending_removals.append(name)  # held by a process or a virus scanner, or mounted: later
            if self._stopping.is_set():
                break
        return 0 if len(expired) == _BATCH else _TICK_S

    def _remove(self, name: str) -> bool:
        try:
            return self._files.remove(name)
        except OSError:  # no descriptor to look with
            return False


# ======================================================================================================================
# IV HTTP / messages: requests and responses
# ======================================================================================================================

JSON_TYPE = ("Content-Type", "application/json; charset=utf-8")
TEXT_TYPE = ("Content-Type", "text/plain; charset=utf-8")
METRICS_TYPE = ("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False)


def to_json(value: Any) -> str:
    """Return JSON as every response has it: compact, non-ASCII text as itself."""
    return _ENCODER.encode(value)


Headers = tuple[tuple[str, str], ...]
# The two ends of a connection, the client's and ours: an address and a port each.
Endpoints = tuple[tuple[str, int], tuple[str, int]]


class Client(NamedTuple):
    """The other end of a connection. `certificate` is the name in the client certificate, which TLS has verified."""

    endpoints: Endpoints = (("", 0), ("", 0))
    scheme: str = "http"
    certificate: str = ""


class Request(NamedTuple):
    """A parsed request: `segments` and `query` are decoded, header names are in lower case."""

    method: str
    segments: tuple[str, ...]
    query: tuple[tuple[str, str], ...]
    headers: Mapping[str, str]
    host: str  # and port, as the client calls us
    is_http_10: bool
    body_bytes: int | None  # as declared; None if chunked
    client: Client = Client()
    body: bytes = b""
    label: str = ""  # the client's name in the log; empty for a stranger on a public route
    params: Mapping[str, str] = types.MappingProxyType({})

    @property
    def peer(self) -> str:
        """The client's address."""
        return self.client.endpoints[0][0]

    @property
    def base_url(self) -> str:
        return f"{self.client.scheme}://{self.host}"

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for `100 Continue` before it sends the body."""
        return not self.is_http_10 and "expect" in self.headers and self.body_bytes != 0


class Response(NamedTuple):
    """A response. A body of several blocks is streamed; `audit` describes a change in the log, beside its path."""

    status: int = 200
    headers: Headers = ()
    body: bytes | Iterable[bytes] = b""
    audit: str = ""


_NO_DATA = object()


def json_response(
    data: Any = _NO_DATA,
    code: int = Code.SUCCESS,
    message: str = "success",
    status: int = 200,
    headers: Headers = (),
    audit: str = "",
) -> Response:
    """Return a response with the JSON envelope; `data` is left out if there is none."""
    envelope = {"code": int(code), "message": message}
    if data is not _NO_DATA:
        envelope["data"] = data
    return Response(status, (JSON_TYPE, *headers), to_json(envelope).encode(), audit)


def error_response(error: ApiError) -> Response:
    """Return the response that an error stands for."""
    return json_response(
        code=error.code,
        message=error.message,
        status=error.status,
        headers=error.headers,
    )


# ======================================================================================================================
# IV HTTP / request parser: what a client sends, read strictly and in time
# ======================================================================================================================

# What a client may try here, and what prevents it:
#
#     request smuggling (CWE-444)   A proxy before us must never see the border between two requests elsewhere. So what
#                                   RFC 9112 lets a server repair is refused: bare CR or LF, folded lines, a space
#                                   before the colon, both body lengths or one twice, any coding but chunked.
#     an ambiguous Host             The access rules trust it: it comes once, without user, path or control character.
#     leaving a path                The path is split into segments, then each is decoded, once: %2f separates nothing,
#                                   %252e%252e is no parent directory.
#     exhausting memory             Head, fields, lines of chunks and bodies are bounded, a body by its declared length
#                                   before a byte of it is read.
#     exhausting time (slowloris)   One deadline for the head and one for the body, not a timeout for each read: a byte
#                                   now and then gains nothing.
#
# The order of the checks: size and line ends while the head comes in, so that garbage ends early; request line; fields;
# Host and target; the body's length. Only then is the client authorized, and then the body read. After an error it is
# unknown where the next request begins, so the connection ends with the response.

# Some precedents: Apache, gunicorn and Tomcat 8 KB a line or head, node.js 16 KB, nginx 4 buffers of 8 KB. Here a
# query may hold many `env_vars`.
_MAX_HEAD_BYTES = 32 * 1024
_MAX_FIELDS = 100  # as Apache, gunicorn and CPython's http.client have it
# What a client must reach once --timeout is over. More than the 500 of Apache's mod_reqtimeout or the 240 of Kestrel,
# as a client that waits holds a thread here.
_MIN_BODY_BYTES_PER_S = 64 * 1024
_MAX_CHUNK_LINE_BYTES = 256  # a size of 12 digits; extensions are used by nobody
_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([\x21-\x7e]+) HTTP/1\.([01])")
_FIELD_LINE = re.compile(rf"({_TOKEN}):([\t\x20-\x7e\x80-\xff]*)")
_BARE_CR_LF_OR_NUL = re.compile(rb"(?<!\r)\n|\r[^\n]|\0")
_AUTHORITY = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~-]+)(?::[0-9]{1,5})?")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,12})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
_SINGLE_FIELDS = {"host", "content-length", "transfer-encoding", "authorization", "origin", "expect"}


class ConnectionEnded(Exception):
    """The client has closed or reset the connection, or is too slow."""


class RequestReader:
    """Reads a client's bytes before an absolute deadline; for the connection's thread.

    `set_timeout` limits each recv() of the socket to so many seconds.
    """

    def __init__(self, sock: socket.socket, set_timeout: Callable[[float], None]) -> None:
        self._sock = sock
        self._set_timeout = set_timeout
        self._timeout_s = float("inf")  # as last set
        self._deadline_s = 0.0
        self._buffer = bytearray()
        self._scanned = 0  # bytes of the buffer that neither end the head nor are wrong in it

    def set_deadline(self, timeout_s: float) -> None:
        """Require all that is read from now on to arrive within `timeout_s`."""
        self._deadline_s = time.monotonic() + timeout_s

    def extend_deadline(self, seconds: float) -> None:
        """Put the deadline off by `seconds`."""
        self._deadline_s += seconds

    def wait(self) -> None:
        """Wait for the first byte of a request. Raise ConnectionEnded if there is none in time."""
        if not self._buffer:
            self._receive()

    def read_head(self) -> list[str]:
        """Return the lines of a head, without the empty last one. Raise Malformed or ConnectionEnded."""
        self._scanned = 0
        while True:
            unread = max(0, self._scanned - 3)  # the end may have begun in the last three bytes
            end = self._buffer.find(b"\r\n\r\n", unread)
            if end >= 0:
                break
            self._check_head(len(self._buffer))
            self._scanned = len(self._buffer)
            self._receive()
        self._check_head(end + 4)
        head = self._take(end + 4).decode("latin-1")
        return head[:-4].split("\r\n")

    def read_line(self) -> bytes:
        """Return the bytes before a CRLF, which is dropped. Raise Malformed or ConnectionEnded."""
        while True:
            end = self._buffer.find(b"\r\n", 0, _MAX_CHUNK_LINE_BYTES)
            if end >= 0:
                break
            if len(self._buffer) >= _MAX_CHUNK_LINE_BYTES:
                raise Malformed(f"line of the chunked body longer than {_MAX_CHUNK_LINE_BYTES} bytes")
            self._receive()
        return self._take(end + 2)[:-2]

    def read_exactly(self, count: int) -> bytes:
        """Return `count` bytes. Raise ConnectionEnded."""
        while len(self._buffer) < count:
            self._receive()
        return self._take(count)

    def has_buffered(self, count: int) -> bool:
        """Return whether `count` bytes were received that nobody has read."""
        return len(self._buffer) >= count

    def drain(self, timeout_s: float) -> None:
        """Read and drop what comes, until the client closes or `timeout_s` is over."""
        self.set_deadline(timeout_s)
        with contextlib.suppress(ConnectionEnded):  # which is what this waits for
            while True:
                self._buffer.clear()
                self._receive()

    def _check_head(self, end: int) -> None:
        """Raise Malformed if the head up to `end` is too large, or has a line end that is not CRLF."""
        if end > _MAX_HEAD_BYTES:
            raise Malformed(f"request head larger than {_MAX_HEAD_BYTES // 1024} KB")
        begin = max(0, self._scanned - 1)  # whose last byte may be the CR of a CRLF
        if _BARE_CR_LF_OR_NUL.search(self._buffer, begin, end):
            raise Malformed("bare CR, bare LF or NUL in the request head")

    def _take(self, count: int) -> bytes:
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def _receive(self) -> None:
        """Add to the buffer what the client has sent. Raise ConnectionEnded at the end or the deadline."""
        left_s = self._deadline_s - time.monotonic()
        try:
            # Setting costs a system call, so a timeout that is up to a second too short for this deadline is kept.
            if left_s < self._timeout_s or left_s > self._timeout_s + 1:
                self._timeout_s = max(left_s, 0.001)
                self._set_timeout(self._timeout_s)
            data = self._sock.recv(1 << 16)
        except OSError as error:
            raise ConnectionEnded(str(error)) from None
        if not data:
            raise ConnectionEnded("the client has closed the connection")
        if left_s <= 0:
            raise ConnectionEnded("the client is too slow")
        self._buffer += data


def read_head(reader: RequestReader, timeout_s: float, client: Client) -> Request:
    """Return the next request, without its body (RFC 9112, read strictly).

    Raise Malformed, after which nothing more can be read from the connection, or ConnectionEnded.
    """
    reader.set_deadline(timeout_s)
    request_line, *field_lines = reader.read_head()
    match = _REQUEST_LINE.fullmatch(request_line)
    if not match:
        raise Malformed("malformed request line: expected for example GET /version HTTP/1.1")
    method, target, minor_version = match.groups()
    fields = _parse_fields(field_lines)
    path, query, host = _split_target(target, fields)
    is_http_10 = minor_version == "0"
    body_bytes = _body_bytes(fields, is_http_10)
    segments = tuple(_unquote(segment) for segment in path.split("/")[1:])
    parameters = urllib.parse.parse_qsl(query, keep_blank_values=True, errors="replace")
    return Request(method, segments, tuple(parameters), fields, host, is_http_10, body_bytes, client)


def read_body(
    reader: RequestReader,
    request: Request,
    timeout_s: float,
    max_bytes: int,
    send_continue: Callable[[], None],
) -> bytes:
    """Return the body of a request whose head was read; `send_continue` is called if the client waits for it.

    Raise TooLarge or Malformed, after which nothing more can be read from the connection, or ConnectionEnded.
    """
    size = request.body_bytes
    if size == 0:
        return b""
    if size is not None and size > max_bytes:
        raise TooLarge(f"request body has {size} bytes; at most {max_bytes} are allowed (--max_body)")
    if request.expects_continue and not reader.has_buffered(size or 1):
        send_continue()
    reader.set_deadline(timeout_s)
    if size is None:
        return _read_chunks(reader, max_bytes)
    reader.extend_deadline(size / _MIN_BODY_BYTES_PER_S)
    return reader.read_exactly(size)


def _parse_fields(lines: Sequence[str]) -> dict[str, str]:
    """Return header fields by their names in lower case, repeated ones joined by commas. Raise Malformed."""
    if len(lines) > _MAX_FIELDS:
        raise Malformed(f"more than {_MAX_FIELDS} header fields")
    fields: dict[str, str] = {}
    for line in lines:
        match = _FIELD_LINE.fullmatch(line)
        if not match:
            raise Malformed("malformed header field: expected `Name: value`")
        name = match[1].lower()
        value = match[2].strip(" \t")
        if name not in fields:
            fields[name] = value
        elif name in _SINGLE_FIELDS:
            raise Malformed(f"duplicate {match[1]} header")
        else:
            fields[name] += f", {value}"
    return fields


def _split_target(target: str, fields: Mapping[str, str]) -> tuple[str, str, str]:
    """Return path, query and host. The host of an absolute target replaces Host (RFC 9112, 3.2.2). Raise Malformed."""
    if "host" not in fields:
        raise Malformed("missing Host header")
    host = fields["host"]
    if host and not _AUTHORITY.fullmatch(host):
        raise Malformed("malformed Host header: expected host or host:port")
    if "#" in target or _BAD_ESCAPE.search(target):
        raise Malformed("malformed request target: it has a fragment or a bad escape")
    if target.startswith("/"):  # not for urlsplit: //version would have a host
        path, _, query = target.partition("?")
        return path, query, host
    try:
        url = urllib.parse.urlsplit(target)
    except ValueError:
        raise Malformed("malformed request target: its host is invalid") from None
    if url.scheme not in ("http", "https"):
        raise Malformed("malformed request target: expected a path or an http URL")
    if not _AUTHORITY.fullmatch(url.netloc):
        raise Malformed("malformed request target: expected host or host:port in the URL")
    return url.path or "/", url.query, url.netloc


def _body_bytes(fields: Mapping[str, str], is_http_10: bool) -> int | None:
    """Return the declared size of the body, None for chunks. Raise Malformed (RFC 9112, 6.3)."""
    length = fields.get("content-length", "0")
    coding = fields.get("transfer-encoding")
    if coding is not None and "content-length" in fields:
        raise Malformed("both Content-Length and Transfer-Encoding: send only one of them")
    if not re.fullmatch("[0-9]{1,18}", length):
        raise Malformed("invalid Content-Length: expected a number of bytes")
    if coding is not None and is_http_10:
        raise Malformed("Transfer-Encoding is not allowed in HTTP/1.0: send Content-Length")
    if coding is not None and coding.lower() != "chunked":
        raise Malformed("unsupported Transfer-Encoding: only chunked is supported")
    if fields.get("expect", "100-continue").lower() != "100-continue":
        raise Malformed("unsupported Expect: only 100-continue is supported")
    if coding is not None:
        return None
    return int(length)


def _unquote(segment: str) -> str:
    if "%" not in segment:
        return segment
    return urllib.parse.unquote(segment, errors="replace")


def _read_chunks(reader: RequestReader, max_bytes: int) -> bytes:
    """Return a chunked body (RFC 9112, 7.1). Its trailer is read as strictly as the head, and dropped."""
    body = bytearray()
    while size := _read_chunk_size(reader):
        if len(body) + size > max_bytes:
            raise TooLarge(f"request body has more than {max_bytes} bytes, the most allowed (--max_body)")
        reader.extend_deadline(size / _MIN_BODY_BYTES_PER_S)
        body += reader.read_exactly(size)
        if reader.read_exactly(2) != b"\r\n":
            raise Malformed("malformed chunk: expected CRLF after its data")
    trailer: list[str] = []
    while len(trailer) <= _MAX_FIELDS and (line := reader.read_line()):
        trailer.append(line.decode("latin-1"))
    _parse_fields(trailer)
    return bytes(body)


def _read_chunk_size(reader: RequestReader) -> int:
    match = _CHUNK_SIZE.fullmatch(reader.read_line())
    if not match:
        raise Malformed("malformed chunk size: expected a hexadecimal number")
    return int(match[1], 16)


# ======================================================================================================================
# IV HTTP / routing: which handler answers a method on a path
# ======================================================================================================================


class Route(NamedTuple):
    """The handler of a method on a path; {names} in the template are parameters.

    `answer`, `query` and `body` are names in the API document, `errors` the statuses that only some routes have.
    """

    method: str
    template: str
    handle: Callable[[Request], Response]
    summary: str
    answer: str
    query: tuple[str, ...] = ()
    body: str = ""
    errors: tuple[int, ...] = ()
    is_limited: bool = False  # by --max-requests
    is_public: bool = False  # open to clients without credentials


_Segments = tuple[str, ...]
_Methods = dict[str, Route]  # the routes of a path


class Router:
    """Finds the route of a request."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = tuple(routes)
        self._fixed: dict[_Segments, _Methods] = {}
        self._variable: dict[_Segments, _Methods] = {}  # whose templates have parameters
        for route in self.routes:
            segments = tuple(route.template.split("/")[1:])
            table = self._variable if "{" in route.template else self._fixed
            table.setdefault(segments, {})[route.method] = route

    def match(self, request: Request) -> tuple[Route, dict[str, str]]:
        """Return the route of a request and its parameters. Raise NoRoute or WrongMethod."""
        methods, params = self._match_path(request.segments)
        route = methods.get(request.method)
        if route is None:
            allowed = ", ".join(methods)
            raise WrongMethod(f"method {request.method} not allowed here; allowed: {allowed}", [*methods])
        return route, params

    def methods(self, request: Request) -> list[str]:
        """Return the methods of the request's path. Raise NoRoute."""
        methods, _ = self._match_path(request.segments)
        return [*methods]

    def _match_path(self, segments: _Segments) -> tuple[_Methods, dict[str, str]]:
        """Return the routes of a path by method, and its parameters. Raise NoRoute."""
        if segments in self._fixed:
            return self._fixed[segments], {}
        for template, methods in self._variable.items():
            params = _match_template(template, segments)
            if params is not None:
                return methods, params
        path = "/".join(segments)
        raise NoRoute(f"not found: /{path}")


def _match_template(template: _Segments, segments: _Segments) -> dict[str, str] | None:
    """Return the parameters of a path, None if the template is not its."""
    if len(template) != len(segments):
        return None
    params: dict[str, str] = {}
    for expected, segment in zip(template, segments):
        if expected.startswith("{"):
            params[expected[1:-1]] = segment
        elif expected != segment:
            return None
    return params


# ======================================================================================================================
# IV HTTP / authentication: who may call what
# ======================================================================================================================

# A task runs code as the daemon's user, so whoever is let in owns the host. Who may try, in the order of the checks:
#
#     a page in a user's browser    It would come from this host and its user. But the browser sends Origin and
#       (CSRF)                      Sec-Fetch-Site with it, which no page can forge (Fetch standard). Checked first,
#                                   under --insecure and on public routes too.
#     a client that guesses tokens  A token that was sent decides: a wrong one is never anonymous access. Compared in
#                                   constant time; ten wrong ones a minute from an address, or an IPv6 /64.
#     a client on another host      It needs a token, or a certificate of --tls_client_ca.
#     a page by DNS rebinding       Its name has come to mean this host, so for the browser it calls its own origin; but
#                                   Host still has that name. Without a token, Host must be a name of this host, with
#                                   our port or none.
#     a stranger through a proxy    The proxy connects from this host, but adds Forwarded, Via or the like.
#     another user of this host     The kernel knows the user at the other end of a local TCP connection (Linux; other
#                                   systems do not say, there all users of the host are let in).
#
# A client that no check lets in may call public routes alone, and does not learn which others exist: it is refused
# before a 404 or 405 could tell them apart.

_OCTET = "(?:25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])"
# Names, not addresses: ipaddress would take spellings such as [0:0::1], which no browser sends.
_LOCAL_HOST = re.compile(rf"(?:localhost|127(?:\.{_OCTET}){{3}}|\[::1\])(?::([0-9]+))?", re.IGNORECASE)
_PROXY_FIELDS = ("forwarded", "x-forwarded", "x-real-ip", "via")  # beginnings of the fields that a proxy adds
_WRONG_TOKENS_WINDOW_S = 60.0
_MAX_WRONG_TOKENS = 10  # of a client in that time: a typing error is no attack, 2**256 tokens are out of reach
_MAX_REMEMBERED_CLIENTS = 10_000  # that sent wrong tokens: a few megabytes


class Authenticator:
    """Authenticates requests. Thread-safe. An invalid token is an error, never anonymous access."""

    def __init__(self, settings: Settings, root: str, descriptors: DescriptorReserve) -> None:
        self._settings = settings
        self._path = os.path.normpath(settings.token_file.replace("$ROOT", root))
        self._peers = LocalPeers(descriptors)
        # Whether the client is our own user; each entry is written by its connection's thread alone.
        self._trusted: dict[Endpoints, bool] = {}
        self._lock = threading.Lock()  # guards all below
        self._file_version: tuple[int, ...] = ()  # of the token file, when it was read
        self._tokens: dict[bytes, str] = {}  # the label of each
        self._wrong_tokens: dict[str, list[float]] = {}  # when a client sent them, by rate_limit_key
        self._has_warned = False  # that a token was sent in clear text

    def start(self) -> None:
        """Load the tokens; make one at the root's first start. Raise StartupError if the file cannot be used."""
        try:
            if self._settings.token_file.startswith("$ROOT"):
                self._create_token()
            self._load()
        except UnicodeError:
            raise StartupError(f"--token_file: {self._path} is not UTF-8 text") from None
        except OSError as error:
            raise StartupError(f"--token_file: {self._path} cannot be used: {error.strerror}") from None
        if is_open_to_others(self._path):
            log.warning("--token_file: other users of this host can read or change %s; `chmod 600` it", self._path)
        if self._settings.insecure:
            log.warning("--insecure: anyone who reaches the port can run code on this host, as the daemon's user")

    def _create_token(self) -> None:
        """Make the root's token file, unless it exists. Raise OSError."""
        if os.path.exists(self._path):
            return
        import secrets  # here, because OpenSSL takes half a megabyte that an idle daemon need not

        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32) + "\n")
        log.info("clients on other hosts need the token in %s", self._path)

    def authorize(self, request: Request, is_public: bool) -> str:
        """Return the client's label for the log, empty for a stranger on a public route.

        Raise Forbidden, Unauthorized, TooMany or Unavailable.
        """
        self._check_browser(request)
        if self._settings.insecure:
            return "anybody"
        try:
            return self._identify(request)
        except ApiError:
            if is_public:
                return ""
            raise

    def cors_headers(self, request: Request) -> Headers:
        """Return the headers that let a page of an allowed origin read the response (Fetch standard, CORS protocol)."""
        origin = request.headers.get("origin", "")
        if origin not in self._settings.cors_origin:
            return ()
        return (
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Expose-Headers", "X-Task-ID, X-Task-STATE"),
            ("Vary", "Origin"),
        )

    def is_preflight(self, request: Request) -> bool:
        """Return whether a page of an allowed origin asks what it may do; this needs no credentials."""
        origin = request.headers.get("origin", "")
        return request.method == "OPTIONS" and origin in self._settings.cors_origin

    def release(self, endpoints: Endpoints) -> None:
        """Forget a connection that has ended; another may soon have its port."""
        self._trusted.pop(endpoints, None)

    def _check_browser(self, request: Request) -> None:
        """Raise Forbidden if a page sent the request that is neither ours nor of an allowed origin."""
        origin = request.headers.get("origin")
        if origin is not None and origin in self._settings.cors_origin:
            return
        if origin is not None and origin != request.base_url:
            raise Forbidden(f"pages of the origin {origin!r} may not call this; --cors_origin allows one")
        if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise Forbidden("pages of other sites may not call this; --cors_origin allows one")

    def _identify(self, request: Request) -> str:
        """Return the client's label. Raise Unauthorized, Forbidden, TooMany or Unavailable for a stranger."""
        authorization = request.headers.get("authorization")
        if authorization is not None:
            return self._check_token(request, authorization)
        if request.client.certificate:
            return f"certificate {request.client.certificate}"
        self._check_local(request)
        return "local"

    def _check_token(self, request: Request, authorization: str) -> str:
        """Return the label of the token in an Authorization header. Raise Unauthorized or TooMany."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer":
            token = ""
        client = rate_limit_key(request.peer)
        now_s = time.monotonic()
        with self._lock:
            earlier = self._wrong_tokens.get(client, ())
            recent = [at_s for at_s in earlier if now_s - at_s < _WRONG_TOKENS_WINDOW_S]
            if len(recent) >= _MAX_WRONG_TOKENS:
                raise MustWait("too many wrong tokens from this address; wait a minute")
            self._reload()
            label = self._find_label(token.strip(" ").encode("latin-1"))
            if label:
                self._warn_if_plaintext(request)
                return label
            if len(self._wrong_tokens) >= _MAX_REMEMBERED_CLIENTS:
                self._wrong_tokens.clear()
            self._wrong_tokens[client] = [*recent, now_s]
        fields = {"peer": request.peer}
        log.warning("%s: sent a wrong token", request.peer, extra={"log_fields": fields})
        raise Unauthorized(f"wrong token; {self._token_hint(request)}")

    def _find_label(self, token: bytes) -> str:
        """Return the label of a token, empty if it is wrong; the lock is held. Compares with all, in constant time."""
        import secrets  # here, because OpenSSL takes half a megabyte that an idle daemon need not

        match = ""
        for valid, label in self._tokens.items():
            if secrets.compare_digest(valid, token):
                match = match or label
        return match

    def _warn_if_plaintext(self, request: Request) -> None:
        """Warn once that others on the network can read a token; the lock is held."""
        if self._has_warned or request.client.scheme != "http" or is_loopback(request.peer):
            return
        self._has_warned = True
        log.warning("%s sent its token over plain HTTP, where the network can read it; see --tls_cert", request.peer)

    def _token_hint(self, request: Request) -> str:
        """Return how to send a token; only a client on this host learns the whole path of the file."""
        path = self._path if is_loopback(request.peer) else os.path.basename(self._path)
        return f"send `Authorization: Bearer ...` with a token from the daemon's file {path} (--token_file)"

    def _reload(self) -> None:
        """Load the tokens again if the file has changed; the lock is held. If it cannot be read the last ones hold."""
        try:
            self._load()
        except FileNotFoundError:
            if self._tokens:
                log.warning("--token_file: %s is gone, so no token is valid any more", self._path)
            self._tokens = {}
            self._file_version = ()
        except (OSError, UnicodeError) as error:
            log.warning("--token_file: %s cannot be read, the tokens read last stay valid: %s", self._path, error)

    def _load(self) -> None:
        """Load the tokens if the file has changed: one a line, its label as a comment. Raise OSError, UnicodeError."""
        status = os.stat(self._path)
        file_version = (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
        if self._file_version == file_version:
            return
        tokens: dict[bytes, str] = {}
        with open(self._path, encoding="utf-8-sig") as file:  # Windows' editors begin it with a byte order mark
            for number, line in enumerate(file, 1):
                token, *comment = re.split(r"(?:^|\s)#", line, maxsplit=1)
                label = "".join(comment).strip()
                if token.strip():
                    tokens[token.strip().encode()] = label or f"token of line {number}"
        self._tokens = tokens
        self._file_version = file_version

    def _check_local(self, request: Request) -> None:
        """Raise Unauthorized, Forbidden or Unavailable unless a request without a token is of our own user here."""
        if not is_loopback(request.peer):
            raise Unauthorized(self._token_hint(request))
        if not _is_local_host(request):
            problem = f"host name {request.host!r} needs a token; without one use localhost"
            raise Forbidden(f"{problem}; {self._token_hint(request)}")
        if self._settings.require_token:
            raise Unauthorized(f"a token is required (--require_token); {self._token_hint(request)}")
        if any(name.replace("_", "-").startswith(_PROXY_FIELDS) for name in request.headers):
            raise Unauthorized(f"a request forwarded by a proxy needs a token; {self._token_hint(request)}")
        if not self._is_trusted(request.client.endpoints):
            raise Unauthorized(f"another user of this host needs a token; {self._token_hint(request)}")

    def _is_trusted(self, endpoints: Endpoints) -> bool:
        """Return whether the client is of root or the daemon's user, looked up once a connection. Raise Unavailable."""
        if endpoints not in self._trusted:
            self._trusted[endpoints] = self._is_of_trusted_user(endpoints)
        return self._trusted[endpoints]

    def _is_of_trusted_user(self, endpoints: Endpoints) -> bool:
        try:
            user = self._peers.user(*endpoints)
        except LookupError:  # the client has closed its end already
            return False
        except OSError as error:
            if error.errno in NO_RESOURCE:
                raise Unavailable("no file descriptor left to look up the client's user; try again") from None
            log.warning("a client's user cannot be looked up, so it needs a token: %s", error)
            return False
        return trusts_user(user)


def _is_local_host(request: Request) -> bool:
    """Return whether the client calls us by a name of this host, and by the port that it has reached."""
    match = _LOCAL_HOST.fullmatch(request.host)
    if not match:
        return False
    own_port = request.client.endpoints[1][1]
    return not match[1] or int(match[1]) == own_port


@functools.lru_cache(maxsize=1024)  # asked for several times a request
def _parse_ip(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Parse an address; one that is mapped into IPv6, as a dual-stack socket shows it, as IPv4. Raise ValueError."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
        return ip.ipv4_mapped
    return ip


def is_loopback(address: str) -> bool:
    """Return whether an address is of this host's loopback interface. Raise ValueError."""
    return _parse_ip(address).is_loopback


def rate_limit_key(address: str) -> str:
    """Return the addresses that one client may use: its IPv4 address or IPv6 /64 (RFC 6177). Raise ValueError."""
    ip = _parse_ip(address)
    if isinstance(ip, ipaddress.IPv4Address) or ip.is_loopback:
        return str(ip)
    network = ipaddress.IPv6Network((int(ip), 64), strict=False)
    return str(network.network_address)


# ======================================================================================================================
# IV HTTP / connections: the port, TLS, and one thread for each client
# ======================================================================================================================

# A connection has a thread, and its thread does one thing after another, read downwards:
#
#     handle -> _handle_requests -> _handle_one_request -> read_head, authorize, read_body, dispatch, send_response,
#     log_request; `_keeps_alive` alone decides whether another request may follow
#
# What holds a connection's time, and with it a thread:
#
#     TLS handshake, first byte, head     --timeout each
#     body                                --timeout, and a second for each 64 KB
#     handler                             as long as it takes: only profiles take long
#     response                            --timeout, and a second for each 64 KB; a streamed one earns it as it goes
#     idle between requests               60 s: nginx 75 s, Apache and node.js 5 s; an idle thread costs little, and a
#                                         poll each minute should find its connection again
#     lingering close                     5 s, as nginx: a close with unread input is a reset, which may destroy a
#                                         response on its way (RFC 9112, 9.6)
#
# An attacker wants all connections, threads or descriptors, so that nobody can stop what runs:
#
#     many from one address    at most 64 each, an IPv6 /64 counting as one; but on this host all clients share one
#     many from many           the last 8 of --max_connections serve stops (PUT) alone, with 3 s and one response each
#     no thread can start      two threads stand ready; up to 8 connections wait for them, silent ones give way
#     no descriptor is left    a reserve is lent to `accept`, 4 of it, and to responses
#     memory fails anywhere    the listener starts again; nothing that it calls may end it

_KEEP_ALIVE_TIMEOUT_S = 60.0
_BACKLOG = 1024  # gunicorn 2048, nginx 511; the kernel may hold it lower (somaxconn)
_LINGER_S = 5.0
_MAX_PER_ADDRESS = 64
_RESERVED_CONNECTIONS = 8
_RESERVED_TIMEOUT_S = 3.0
_RESERVE_THREADS = 2
_MAX_PENDING_CONNECTIONS = 8
_RESERVE_DESCRIPTORS = 4  # of 8, for connections: the others are for what their responses open
_ACCEPT_RETRY_S = 0.05
_MAX_RESTART_PAUSE_S = 5.0
_REFILL_INTERVAL_S = 10.0
_WARNING_INTERVAL_S = 60.0
_REFUSED_BODY_BYTES = 64 * 1024  # read of a refused request, to keep its connection
_REASONS = {status.value: status.phrase for status in http.HTTPStatus}


class Tls:
    """The certificates that the port shows and trusts. `load` is for the daemon's thread, `wrap` for the listener's."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._context: Any = None  # an ssl.SSLContext: its module takes memory that a daemon without TLS need not

    def load(self) -> None:
        """Load the certificates for connections to come. Raise StartupError; then those loaded before stay."""
        import ssl

        cert = self._settings.tls_cert
        key = self._settings.tls_key or cert
        authority = self._settings.tls_client_ca
        paths = {"--tls_cert": cert, "--tls_key": key}
        if authority:
            paths["--tls_client_ca"] = authority
        subject = ""
        try:
            for flag, path in paths.items():
                subject = f"{flag}: {path}"
                with open(path, "rb"):  # errors of ssl name no file
                    pass
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.options |= ssl.OP_NO_RENEGOTIATION
            subject = f"--tls_cert: {cert} with the key in {key}"
            context.load_cert_chain(
                cert, self._settings.tls_key or None, password=""
            )  # else OpenSSL asks on the terminal
            if authority:
                subject = f"--tls_client_ca: {authority}"
                context.load_verify_locations(authority)
                context.verify_mode = ssl.CERT_OPTIONAL  # a token will do too
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", "") or error
            raise StartupError(f"{subject} cannot be used: {reason}") from None
        self._context = context

    def wrap(self, sock: socket.socket) -> socket.socket:
        """Return the connection with TLS; its own thread does the handshake. Raise OSError."""
        wrapped: socket.socket = self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        return wrapped


def certificate_name(certificate: Mapping[str, Any] | None) -> str:
    """Return the name of a client by its certificate, as ssl.getpeercert gives it; empty if there is none."""
    if not certificate:
        return ""
    names = dict(itertools.chain.from_iterable(certificate.get("subject", ())))
    return str(names.get("commonName") or f"number {certificate.get('serialNumber')}")


class PendingConnections:
    """Connections for which no thread could be started, waiting for one of the reserve. Thread-safe.

    Only one whose client has sent something gets a thread; silent ones give way to others, and time out.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._changed = threading.Condition()  # guards all below
        self._pending: dict[socket.socket, tuple[Any, float]] = {}  # address and time of arrival; the oldest first
        self._is_closed = False

    def add(self, sock: socket.socket, address: Any) -> socket.socket | None:
        """Add a connection. Return the one that must be closed for it, perhaps itself; None if there is room."""
        with self._changed:
            surplus = None
            if len(self._pending) >= self._limit:
                readable = _readable(self._pending)
                silent = (other for other in self._pending if other not in readable)
                surplus = next(silent, sock)
                self._pending.pop(surplus, None)
            if surplus is not sock:
                self._pending[sock] = (address, time.monotonic())
            self._changed.notify_all()
            return surplus

    def take(self) -> tuple[socket.socket, Any] | None:
        """Wait for a connection whose client has sent something or timed out. Return None after `close`."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._is_closed)
                if self._is_closed:
                    return None
                readable = _readable(self._pending)
                expired_s = time.monotonic() - _RESERVED_TIMEOUT_S
                for sock, (address, arrived_s) in self._pending.items():
                    if sock in readable or arrived_s < expired_s:
                        del self._pending[sock]
                        return sock, address
            time.sleep(_ACCEPT_RETRY_S)

    def close(self) -> None:
        """Make `take` return None."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


def _readable(socks: Iterable[socket.socket]) -> set[Any]:
    """Return those from which data, or an end, can be read now."""
    selector_class = getattr(selectors, "PollSelector", selectors.SelectSelector)  # neither takes a descriptor
    with selector_class() as selector:
        for sock in socks:
            selector.register(sock, selectors.EVENT_READ)
        return {key.fileobj for key, _ in selector.select(0)}


class Server(socketserver.ThreadingTCPServer):
    """The listening socket and its connections; `open`, `start` and `stop` are for the daemon's thread."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = _BACKLOG
    allow_reuse_address = not hasattr(socket, "SO_EXCLUSIVEADDRUSE")  # on Windows it would share the port

    def __init__(
        self,
        settings: Settings,
        router: Router,
        authenticator: Authenticator,
        telemetry: Telemetry,
        tls: Tls | None,
        descriptors: DescriptorReserve,
    ) -> None:
        self.authenticator = authenticator
        self.descriptors = descriptors
        self.scheme = "https" if tls else "http"
        self.timeout_s = settings.timeout / _SECOND_NS
        self.max_body_bytes = settings.max_body
        self.authority = ""
        self.is_stopping = False
        self._settings = settings
        self._router = router
        self._telemetry = telemetry
        self._tls = tls
        self._lock = threading.Lock()  # guards the four below
        self._connections: dict[socket.socket, str] = {}  # the client of each, as rate_limit_key has it
        self._reserved: set[socket.socket] = set()  # those of them that are among the last, which are for stops
        self._on_reserve: set[socket.socket] = set()  # those of them that hold a thread or descriptor of the reserve
        self._in_flight: set[socket.socket] = set()  # those of them with a request that --max-requests counts
        self._thread = DaemonThread(self._listen, "listener")
        self._pending = PendingConnections(_MAX_PENDING_CONNECTIONS)
        self._reserve_threads: list[threading.Thread] = []  # never shrinks
        self._refilled_s = -_REFILL_INTERVAL_S  # when that was last tried
        self._warned_s = -_WARNING_INTERVAL_S  # when a lack of threads was last logged; the listener's
        self._host, port = parse_address(settings.addr)
        self.address_family = socket.AF_INET
        if ":" in self._host or (not self._host and socket.has_ipv6):
            self.address_family = socket.AF_INET6
        super().__init__((self._host, port), Connection, bind_and_activate=False)

    def open(self) -> None:
        """Bind the port. Raise StartupError."""
        try:
            self._bind()
        except OSError as error:
            self.server_close()
            reason = error.strerror or error
            raise StartupError(
                f"--addr: {self._settings.addr} cannot be used: {reason}; port 0 takes a free one"
            ) from None
        host = self._host or "localhost"
        if ":" in host:
            host = f"[{host}]"
        self.authority = f"{host}:{self.server_address[1]}"

    def _bind(self) -> None:
        try:
            self.server_bind()
        except OSError as error:
            is_every_address = not self._host and self.address_family == socket.AF_INET6
            if not is_every_address or error.errno == errno.EADDRINUSE:
                raise
            self.socket.close()  # a host whose IPv6 is switched off
            self.address_family = socket.AF_INET
            self.socket = socket.socket(self.address_family, self.socket_type)
            self.server_bind()
        self.server_activate()

    def server_bind(self) -> None:
        """Bind the socket, alone on Windows too; of every address, to IPv4 and IPv6. Raise OSError."""
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        if self.address_family == socket.AF_INET6 and not self.server_address[0]:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def server_activate(self) -> None:
        """Listen. An accept never waits: a client may be gone by then, which BSD does not report."""
        super().server_activate()
        self.socket.setblocking(False)

    def start(self) -> None:
        """Start to accept connections."""
        self._thread.start()
        self.fill_reserve()

    def fill_reserve(self) -> None:
        """Start the missing threads of the reserve, if that is possible now; for the daemon's thread."""
        now_s = time.monotonic()
        if now_s - self._refilled_s < _REFILL_INTERVAL_S:  # a failure may take a second
            return
        self._refilled_s = now_s
        with contextlib.suppress(RuntimeError, MemoryError):  # tried again the next time
            while len(self._reserve_threads) < _RESERVE_THREADS:
                thread = DaemonThread(self._serve_pending, "reserve connection")
                thread.start()
                self._reserve_threads.append(thread)

    def _listen(self) -> None:
        """Accept connections until `stop`, whatever fails: memory may run out anywhere."""
        pause_s = _ACCEPT_RETRY_S
        while not self.is_stopping:
            begin_s = time.monotonic()
            try:
                self.serve_forever(0.1)
            except Exception:
                with contextlib.suppress(MemoryError):  # then there is no line, but a listener
                    log.exception("the listener failed; it starts again")
            if time.monotonic() - begin_s > 2 * _MAX_RESTART_PAUSE_S:
                pause_s = _ACCEPT_RETRY_S
            if not self.is_stopping:
                time.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_RESTART_PAUSE_S)

    def is_alive(self) -> bool:
        """Return whether connections are accepted."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Accept no more; let the responses in flight end within a moment, close the other connections."""
        self.is_stopping = True
        if self._thread.is_alive():
            self.shutdown()
        self.server_close()
        with self._lock:
            connections = [*self._connections]
        for sock in connections:
            with contextlib.suppress(OSError):  # the client has closed it
                socket.socket.shutdown(sock, socket.SHUT_RD)  # SSLSocket.shutdown would go on in clear text
        self._pending.close()

    def get_request(self) -> tuple[Any, Any]:
        """Return the next connection and its address. Raise OSError if there is none, after a pause for resources."""
        try:
            sock, address, uses_reserve = self._accept()
        except OSError as error:
            if error.errno in NO_RESOURCE:
                time.sleep(_ACCEPT_RETRY_S)  # the client waits in the backlog
            raise
        if not address or not address[0]:  # reset before it was accepted: macOS and Wine give no address then
            sock.close()
            raise ConnectionAbortedError(errno.ECONNABORTED, "the client has gone")
        sock.setblocking(True)
        if self._tls:
            sock = self._tls.wrap(sock)
        if uses_reserve:
            with self._lock:
                self._on_reserve.add(sock)
        return sock, address

    def _accept(self) -> tuple[socket.socket, Any, bool]:
        """Return the next connection, its address, and whether its descriptor is of the reserve. Raise OSError."""
        if not self.descriptors.is_short():
            try:
                sock, address = super().get_request()
                return sock, address, False
            except OSError as error:
                if error.errno not in NO_DESCRIPTOR:
                    raise
        with self._lock:
            borrowers = len(self._on_reserve)
        if borrowers >= _RESERVE_DESCRIPTORS:
            raise OSError(errno.EMFILE, "the connections have their share of the reserve")
        with self.descriptors.lend():
            sock, address = super().get_request()
            return sock, address, True

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own, or reject it if there are too many."""
        client = rate_limit_key(client_address[0])
        if not self._add_connection(request, client):
            self._reject_connection(request)
            return
        try:
            DaemonThread(self.process_request_thread, "connection", (request, client_address)).start()
        except (RuntimeError, MemoryError) as error:
            self._queue_for_reserve(request, client_address, error)

    def _add_connection(self, sock: socket.socket, client: str) -> bool:
        """Add a connection. Return False if there are too many, or too many of its client."""
        max_connections = self._settings.max_connections
        with self._lock:
            others = [*self._connections.values()]
            if len(others) >= max_connections:
                return False
            if others.count(client) >= _MAX_PER_ADDRESS and not is_loopback(client):
                return False
            self._connections[sock] = client
            if len(others) >= max_connections - _RESERVED_CONNECTIONS:
                self._reserved.add(sock)
        return True

    def _queue_for_reserve(self, sock: socket.socket, address: Any, error: BaseException) -> None:
        """Leave a connection to the threads of the reserve; reject one if too many wait for them."""
        with self._lock:
            self._on_reserve.add(sock)
        threads = len(self._reserve_threads)
        surplus = self._pending.add(sock, address) if threads else sock
        if surplus:
            self._reject_connection(surplus)
        now_s = time.monotonic()
        if now_s - self._warned_s >= _WARNING_INTERVAL_S:
            self._warned_s = now_s
            log.warning("no thread can be started for a connection (%s): %d in reserve serve all", error, threads)

    def _serve_pending(self) -> None:
        """Serve connections for which no thread could be started, one after another."""
        while True:
            try:
                pending = self._pending.take()
                if pending is None:
                    return
                self.process_request_thread(*pending)
            except Exception:
                with contextlib.suppress(MemoryError):  # then there is no line, but a thread
                    log.exception("a reserve connection failed")

    def _reject_connection(self, sock: socket.socket) -> None:
        """Close a connection, with a response if that needs no waiting."""
        self._forget_connection(sock)
        response = error_response(Unavailable("too many connections; try again"))
        body = response.body if isinstance(response.body, bytes) else b""
        head = (
            f"HTTP/1.1 503 {_REASONS[503]}\r\n"
            f"Content-Type: {JSON_TYPE[1]}\r\n"
            "Connection: close\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        with contextlib.suppress(OSError):  # the client has gone, or would have to be waited for
            sock.setblocking(False)
            if not self._tls:
                sock.send(head.encode() + body)
                sock.shutdown(socket.SHUT_WR)
                sock.recv(_REFUSED_BODY_BYTES)  # a close with unread bytes would reset the connection
        super().shutdown_request(sock)

    def is_reserved(self, sock: socket.socket) -> bool:
        """Return whether a connection is one of the last, which are for stops."""
        with self._lock:
            return sock in self._reserved

    def is_scarce(self, sock: socket.socket) -> bool:
        """Return whether a connection holds what others wait for: it gets little time, and one response."""
        with self._lock:
            return sock in self._reserved or sock in self._on_reserve

    def _forget_connection(self, sock: socket.socket) -> None:
        with self._lock:
            self._connections.pop(sock, None)
            self._reserved.discard(sock)
            self._on_reserve.discard(sock)
            self._in_flight.discard(sock)

    def authorize(self, request: Request, is_reserved: bool) -> tuple[Route | None, Request]:
        """Return the route, None for a CORS preflight, and the request with its parameters and the client's label.

        Raise ApiError. A stranger gets the same for every path, so as not to learn which there are.
        """
        route: Route | None = None
        try:
            route, params = self._router.match(request)
        except (NoRoute, WrongMethod) as error:
            path_exists = isinstance(error, WrongMethod)
            if not path_exists or not self.authenticator.is_preflight(request):
                self.authenticator.authorize(request, is_public=False)
                raise
        else:
            label = self.authenticator.authorize(request, route.is_public)
            request = request._replace(params=params, label=label)
        if is_reserved and request.method != "PUT":
            raise Unavailable("too many connections; the last ones are reserved for stops (PUT)")
        return route, request

    def dispatch(self, sock: socket.socket, route: Route | None, request: Request) -> Response:
        """Return the response to an authorized request, whatever fails. It is in flight until `release`."""
        try:
            if route is None:
                return self._preflight_response(request)
            if route.is_limited:
                self._add_in_flight(sock)
            response = route.handle(request)
            if request.method in ("POST", "PUT"):
                self._log_change(request, response)
            return response
        except ApiError as error:
            return error_response(error)
        except Exception:
            log.exception("%s %s failed", request.method, _path(request))
            return error_response(ApiError("internal error; see the daemon's log"))

    def _preflight_response(self, request: Request) -> Response:
        methods = ", ".join(self._router.methods(request))
        return Response(
            204,
            (
                ("Access-Control-Allow-Methods", methods),
                ("Access-Control-Allow-Headers", "Authorization, Content-Type"),
            ),
        )

    def _add_in_flight(self, sock: socket.socket) -> None:
        """Count a request in. Raise TooMany."""
        limit = self._settings.max_requests
        with self._lock:
            if limit and len(self._in_flight) >= limit:
                raise TooMany(f"{limit} requests are in flight, the most that --max-requests allows; try again")
            self._in_flight.add(sock)

    def release(self, sock: socket.socket) -> None:
        """Count the request of a connection out, if it was counted in."""
        with self._lock:
            self._in_flight.discard(sock)

    def _log_change(self, request: Request, response: Response) -> None:
        """Log what was changed, and by whom; for a submission the new task too."""
        fields = _log_fields(request)
        fields["label"] = request.label
        task = dict(response.headers).get("X-Task-ID")
        if task:
            fields["task"] = task
        action = f"{request.method} {_path(request)}"
        if response.audit:
            action += f": {response.audit}"
        log.info("%s (%s): %s", request.peer, request.label, action, extra={"log_fields": fields})

    def log_request(
        self,
        request: Request,
        route: Route | None,
        response: Response,
        seconds: float,
        sent: int,
    ) -> None:
        """Count and log a request that was answered, or whose response broke off; `sent` is in bytes."""
        template = route.template if route else ""
        self._telemetry.request(request.method, template, response.status, seconds)
        if not log.isEnabledFor(logging.DEBUG):
            return
        fields = _log_fields(request)
        fields.update(status=response.status, bytes=sent, seconds=seconds)
        log.debug(
            '%s "%s %s" %d %d B %.1f ms',
            request.peer,
            request.method,
            _path(request),
            response.status,
            sent,
            seconds * 1000,
            extra={"log_fields": fields},
        )

    def log_bad_request(self, error: ApiError, seconds: float) -> None:
        """Count a request whose head was malformed."""
        self._telemetry.request("", "", error.status, seconds)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        self._forget_connection(request)
        if self._tls:
            with contextlib.suppress(OSError, ValueError):  # it may have broken, or never begun
                request.settimeout(0)
                request.unwrap()  # says that nothing was cut off, and waits for no answer
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log that a response broke off. Never raises: that would end the listener."""
        client = client_address[0] if client_address else "a client"
        with contextlib.suppress(MemoryError):  # then there is no line, but a listener
            log.error("connection of %s: the response broke off", client, exc_info=True)


def _path(request: Request) -> str:
    return "".join("/" + segment for segment in request.segments)


def _log_fields(request: Request) -> dict[str, Any]:
    """Return the fields of a log line about a request, with the task and the step in its path."""
    fields = {"peer": request.peer, "method": request.method, "path": _path(request)}
    if request.segments[:3] == ("api", "v1", "task"):
        fields.update(zip(("task", "step"), request.segments[3:5]))
    return fields


@functools.lru_cache(maxsize=2)  # the same for all responses of a second
def _http_date(seconds: int) -> str:
    return email.utils.formatdate(seconds, usegmt=True)


class Connection(socketserver.BaseRequestHandler):
    """One client's connection, in a thread of its own."""

    server: Server
    _is_reserved = False
    _is_scarce = False
    _timeout_s = 0.0  # of a request, and again of its response
    _send_deadline_s = 0.0

    def handle(self) -> None:
        """Serve the connection until the client or the daemon ends it."""
        try:
            host, port = self.client_address[:2]
            own_host, own_port = self.request.getsockname()[:2]
            client_end = (str(_parse_ip(host)), port)
            own_end = (str(_parse_ip(own_host)), own_port)
        except (OSError, TypeError, ValueError) as error:  # it was reset: macOS knows no address of it any more
            log.debug("a connection has gone: %s", error)
            return
        try:
            self._handle_requests(Client((client_end, own_end), self.server.scheme))
        except (OSError, ConnectionEnded) as error:
            log.debug("connection of %s: %s", client_end[0], error)
        finally:
            self.server.authenticator.release((client_end, own_end))

    def _handle_requests(self, client: Client) -> None:
        """Handle requests until the client or the daemon ends the connection. Raise ConnectionEnded or OSError."""
        client = self._set_up(client)
        reader = RequestReader(self.request, self._set_recv_timeout)
        reader.set_deadline(self._timeout_s)
        reader.wait()
        while self._handle_one_request(reader, client):
            reader.set_deadline(_KEEP_ALIVE_TIMEOUT_S)
            reader.wait()

    def _set_up(self, client: Client) -> Client:
        """Set time limits and do the TLS handshake. Return the client with its certificate's name. Raise OSError."""
        server = self.server
        self._is_reserved = server.is_reserved(self.request)
        self._is_scarce = server.is_scarce(self.request)
        self._timeout_s = server.timeout_s
        if self._is_scarce:
            self._timeout_s = min(server.timeout_s, _RESERVED_TIMEOUT_S)
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if server.scheme == "http":
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, socket_timeout(self._timeout_s))
            return client
        self.request.settimeout(self._timeout_s)
        self.request.do_handshake()
        return client._replace(certificate=certificate_name(self.request.getpeercert()))

    def _set_recv_timeout(self, seconds: float) -> None:
        """Limit each recv: by the kernel, which costs least, but TLS may need several reads of it for one."""
        if self.server.scheme == "https":
            self.request.settimeout(seconds)
        else:
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, socket_timeout(seconds))

    def _handle_one_request(self, reader: RequestReader, client: Client) -> bool:
        """Read a request and send its response. Return whether another may follow. Raise ConnectionEnded or OSError."""
        server = self.server
        begin_s = time.perf_counter()
        try:
            request = read_head(reader, self._timeout_s, client)
        except ApiError as error:
            self._send_response(None, error_response(error), is_kept=False)
            server.log_bad_request(error, time.perf_counter() - begin_s)
            self._linger_and_close(reader)
            return False

        route: Route | None = None
        refusal: ApiError | None = None
        try:
            route, request = server.authorize(request, self._is_reserved)
        except ApiError as error:
            refusal = error
        is_body_read = False
        try:
            request = self._read_body(reader, request, refusal)
            is_body_read = True
        except ApiError as error:
            refusal = error

        with server.descriptors.lend_if_scarce():
            response = error_response(refusal) if refusal else server.dispatch(self.request, route, request)
            cors_headers = server.authenticator.cors_headers(request)
            response = response._replace(headers=response.headers + cors_headers)
            is_kept = self._keeps_alive(request, response, is_body_read)
            sent = 0
            try:
                sent = self._send_response(request, response, is_kept)
            finally:
                server.release(self.request)
                server.log_request(request, route, response, time.perf_counter() - begin_s, sent)
        if not is_body_read:
            self._linger_and_close(reader)
        return is_kept

    def _read_body(self, reader: RequestReader, request: Request, refusal: ApiError | None) -> Request:
        """Return the request with its body; a refused one keeps its connection if it is short and on its way.

        Raise the refusal, or another ApiError, if the body was not read to its end; ConnectionEnded; OSError.
        """
        max_bytes = self.server.max_body_bytes
        if refusal:
            max_bytes = min(max_bytes, _REFUSED_BODY_BYTES)
            if request.expects_continue or (request.body_bytes or 0) > max_bytes:
                raise refusal
        try:
            body = read_body(reader, request, self._timeout_s, max_bytes, self._send_continue)
        except TooLarge as error:
            raise refusal or error from None
        return request._replace(body=body)

    def _keeps_alive(self, request: Request, response: Response, is_body_read: bool) -> bool:
        """Return whether another request may follow this response (RFC 9112, 9.3)."""
        if not is_body_read:  # so it is unknown where the next one begins
            return False
        if self._is_scarce or self.server.is_stopping:
            return False
        if request.is_http_10 and not isinstance(response.body, bytes):  # only its end shows the end of the body
            return False
        connection = request.headers.get("connection", "")
        options = {option.strip().lower() for option in connection.split(",")}
        if request.is_http_10:
            return "keep-alive" in options
        return "close" not in options

    def _linger_and_close(self, reader: RequestReader) -> None:
        """Lingering close: shut down writes and drain input, so that a reset does not destroy the response."""
        socket.socket.shutdown(self.request, socket.SHUT_WR)
        reader.drain(min(_LINGER_S, self._timeout_s))

    def _send_continue(self) -> None:
        self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _send_response(self, request: Request | None, response: Response, is_kept: bool) -> int:
        """Send a response; `request` is None if its head was malformed. Return the bytes of the body.

        Raise ConnectionEnded or OSError.
        """
        self._send_deadline_s = time.monotonic() + self._timeout_s
        is_http_10 = request is None or request.is_http_10
        is_chunked = not is_http_10 and not isinstance(response.body, bytes)
        lines = [
            f"HTTP/1.1 {response.status} {_REASONS[response.status]}",
            f"Date: {_http_date(int(time.time()))}",
        ]
        lines += [f"{name}: {value}" for name, value in response.headers]
        if is_chunked:
            lines.append("Transfer-Encoding: chunked")
        elif isinstance(response.body, bytes) and response.status != 204:
            lines.append(f"Content-Length: {len(response.body)}")
        if not is_kept:
            lines.append("Connection: close")
        elif is_http_10:
            lines.append("Connection: keep-alive")
        head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
        if not isinstance(response.body, bytes):
            return self._send_blocks(head, response.body, is_chunked)
        if request is not None and request.method == "HEAD":
            self._send_bytes(head)
        else:
            self._send_bytes(head + response.body)
        return len(response.body)

    def _send_blocks(self, head: bytes, blocks: Iterable[bytes], is_chunked: bool) -> int:
        """Send the head with the first block, then the others as they come. Return the bytes of the body."""
        sent = 0
        for block in blocks:
            if not block:  # as a chunk it would be the last
                continue
            data = b"%x\r\n%b\r\n" % (len(block), block) if is_chunked else block
            self._send_bytes(head + data)
            head = b""
            sent += len(block)
        end = b"0\r\n\r\n" if is_chunked else b""
        self._send_bytes(head + end)
        return sent

    def _send_bytes(self, data: bytes) -> None:
        """Send all of `data`, within the time for the response up to here. Raise ConnectionEnded or OSError."""
        self._send_deadline_s += len(data) / _MIN_BODY_BYTES_PER_S
        rest = memoryview(data)
        while rest:
            left_s = self._send_deadline_s - time.monotonic()
            if left_s <= 0:
                raise ConnectionEnded("the client reads too slowly")
            if self.server.scheme == "https":
                self.request.settimeout(left_s)
            count = self.request.send(rest)
            rest = rest[count:]


# ======================================================================================================================
# V API / web pages: what a browser shows
# ======================================================================================================================

API_STYLE = r"""
:root { color-scheme: light dark; --back: #fff; --text: #1b1f24; --soft: #57606a; --line: #d0d7de; --box: #f6f8fa;
  --link: #0550ae; --get: #0550ae; --post: #116329; --put: #953800; --bad: #b42318; }
@media (prefers-color-scheme: dark) {
  :root { --back: #0d1117; --text: #e6edf3; --soft: #9aa4af; --line: #3d444d; --box: #161b22;
    --link: #79b8ff; --get: #79b8ff; --post: #7ee787; --put: #ffa657; --bad: #ff8b82; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
h3 { font-size: .9rem; margin: 1rem 0 .25rem; color: var(--soft); }
p { margin: .25rem 0; }
a { color: var(--link); }
code, pre, textarea, .path { font: .875rem/1.5 ui-monospace, monospace; }
pre { margin: .25rem 0; padding: .5rem .75rem; max-height: 30rem; overflow: auto; background: var(--box);
  border: 1px solid var(--line); border-radius: .375rem; white-space: pre-wrap; }
input, textarea, select, button { font-size: 1rem; padding: .4rem .6rem; max-width: 100%; color: inherit;
  background: var(--back); border: 1px solid var(--soft); border-radius: .375rem; }
textarea { width: 100%; min-height: 9rem; }
label textarea { min-height: 3.5rem; }
select { display: block; margin: .5rem 0; }
button { background: var(--box); cursor: pointer; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 1px; }
form.token { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin: 1rem 0; }
label { display: grid; grid-template-columns: 9rem 1fr; gap: .25rem .75rem; align-items: center; margin: .5rem 0; }
form.token label { display: contents; }
label small { grid-column: 2; }
small, .soft { color: var(--soft); }
details { border: 1px solid var(--line); border-radius: .375rem; margin: .5rem 0; }
summary { padding: .5rem .75rem; cursor: pointer; }
summary .path { font-weight: 600; }
summary small { display: inline-block; }
.body { padding: 0 .75rem .75rem; border-top: 1px solid var(--line); }
.method { display: inline-block; min-width: 3.5rem; font-weight: 700; }
.get, .head { color: var(--get); } .post { color: var(--post); } .put { color: var(--put); }
.bad { color: var(--bad); }
@media (max-width: 40rem) { label { grid-template-columns: 1fr; } label small { grid-column: 1; } }
"""
API_SCRIPT = r"""
"use strict";
const MOST_SHOWN = 100000;
const TOKEN = "remote_executor token";
const content = document.getElementById("content");
const note = document.getElementById("note");
const field = document.getElementById("token");
let description = null;

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function resolve(thing) {
  if (!thing || !thing.$ref) return thing;
  return thing.$ref.split("/").slice(1).reduce((place, name) => place[name], description);
}

// A schema in the words of TypeScript, its descriptions as comments.
function words(schema, indent = "") {
  const found = resolve(schema) || {}, deeper = indent + "  ";
  if (found.oneOf) return found.oneOf.map((one) => words(one, indent)).join("\n" + indent + "or ");
  if (found.anyOf) return found.anyOf.map((one) => words(one, indent)).join(" | ");
  if ("const" in found) return JSON.stringify(found.const);
  if (found.enum) return found.enum.map((one) => JSON.stringify(one)).join(" | ");
  if (found.items) return "[" + words(found.items, indent) + ", ...]";
  if (!found.properties) return [].concat(found.type || "any").join(" | ");
  const lines = Object.entries(found.properties).map(([name, one]) => {
    const optional = (found.required || []).includes(name) ? "" : "?", about = (resolve(one) || {}).description;
    return deeper + name + optional + ": " + words(one, deeper) + (about ? "  // " + about : "");
  });
  return ["{", ...lines, indent + "}"].join("\n");
}

function headers() {
  return field.value ? { Authorization: "Bearer " + field.value } : {};
}

// Not by JSON.parse, which rounds the nanoseconds.
function pretty(text) {
  let indent = "\n";
  return text.replace(/"(?:[^"\\]|\\.)*"|\[\]|{}|[{}[\],:]/g, (token) => {
    if (token === "{" || token === "[") return token + (indent += "  ");
    if (token === "}" || token === "]") return (indent = indent.slice(0, -2)) + token;
    return token === "," ? token + indent : token === ":" ? ": " : token;
  });
}

function showInputs(operation, inputs) {
  return (operation.parameters || []).map(resolve).map((one) => {
    const many = resolve(one.schema).type === "array", input = make(many ? "textarea" : "input", { name: one.name });
    if (one.required) { input.required = true; input.value = one.example; }
    else input.placeholder = [].concat(one.example).join("\n");
    inputs.push([one, input, many]);
    return make("label", {}, make("code", {}, one.name), input,
      make("small", {}, one.description + (many ? "; one a line" : one.required ? "" : "; optional")));
  });
}

function showBody(operation) {
  const body = resolve(operation.requestBody);
  if (!body) return [null, []];
  const media = Object.values(body.content)[0];
  const examples = Object.entries(media.examples || { "": { value: media.example } });
  const area = make("textarea", { "aria-label": "Body", spellcheck: "false" });
  const choice = make("select", { "aria-label": "Example" }, ...examples.map(([name]) => make("option", {}, name)));
  const fill = () => {
    const value = examples[choice.selectedIndex][1].value;
    area.value = typeof value === "string" ? value : JSON.stringify(value, null, 2);
  };
  choice.addEventListener("change", fill);
  fill();
  return [area, [make("h3", {}, "Body"), make("pre", { tabindex: "0" }, words(media.schema)), choice, area]];
}

function showAnswers(operation) {
  return Object.entries(operation.responses).map(([status, one]) => {
    const answer = resolve(one), parts = [];
    for (const [type, media] of Object.entries(answer.content || {})) {
      parts.push(make("p", { class: "soft" }, type), make("pre", { tabindex: "0" }, words(media.schema)));
      for (const [name, example] of Object.entries(media.examples || {}))
        parts.push(make("p", { class: "soft" }, "Example: " + name),
          make("pre", { tabindex: "0" }, JSON.stringify(example.value, null, 2)));
    }
    return make("details", {}, make("summary", {}, make("code", {}, status), " ", answer.description),
      make("div", { class: "body" }, ...parts));
  });
}

function target(path, inputs) {
  const query = new URLSearchParams();
  for (const [one, input, many] of inputs) {
    if (one.in === "path") path = path.replace("{" + one.name + "}", encodeURIComponent(input.value));
    else for (const value of many ? input.value.split("\n") : [input.value]) if (value) query.append(one.name, value);
  }
  return String(query) ? path + "?" + query : path;
}

async function send(url, request, result, begin) {
  const answer = await fetch(url, request);
  const data = new Uint8Array(await answer.arrayBuffer());
  const type = answer.headers.get("Content-Type") || "", isText = /json|text/.test(type) || !data.length;
  const took = Math.round(performance.now() - begin);
  const line = `${answer.status} ${answer.statusText}, ${data.length} bytes, ${took} ms`;
  const head = [...answer.headers].map(([name, value]) => `${name}: ${value}`).join("\n");
  const save = make("a", { href: URL.createObjectURL(new Blob([data], { type })), download: "answer" }, "Save");
  result.replaceChildren(make("p", answer.ok ? {} : { class: "bad" }, line, " ", save),
    make("pre", { tabindex: "0", "aria-label": "Headers" }, head));
  if (isText && data.length) {
    const raw = new TextDecoder().decode(data), text = type.includes("json") ? pretty(raw) : raw;
    const cut = text.length > MOST_SHOWN;
    result.append(make("pre", { tabindex: "0", "aria-label": "Body of the answer" },
      text.slice(0, MOST_SHOWN) + (cut ? "\n(and more)" : "")));
  }
}

function showOperation(path, method, operation, place) {
  const inputs = [], fields = showInputs(operation, inputs), [area, body] = showBody(operation);
  const button = make("button", {}, "Send"), result = make("div", { "aria-live": "polite" });
  const form = make("form", {}, ...fields, ...body, make("p", {}, button), result);
  let running = null;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) return running.abort();
    running = new AbortController();
    button.textContent = "Cancel";
    result.replaceChildren("waiting for the answer");
    const request = { method: method.toUpperCase(), headers: headers(), signal: running.signal };
    if (area) request.body = area.value;
    try { await send(target(path, inputs), request, result, performance.now()); }
    catch (error) { result.replaceChildren(make("p", { class: "bad" }, "no answer: " + error.message)); }
    running = null;
    button.textContent = "Send";
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  place.append(form, make("h3", {}, "Answers"), ...showAnswers(operation));
}

function show() {
  const sections = new Map();
  for (const [path, operations] of Object.entries(description.paths))
    for (const [method, operation] of Object.entries(operations)) {
      const body = make("div", { class: "body" });
      const box = make("details", { id: operation.operationId }, make("summary", {},
        make("span", { class: "method " + method }, method.toUpperCase()), make("span", { class: "path" }, path), " ",
        make("small", {}, operation.summary)), body);
      box.addEventListener("toggle", () => showOperation(path, method, operation, body), { once: true });
      const tag = operation.tags[0];
      if (!sections.has(tag)) sections.set(tag, make("section", {}, make("h2", {}, tag)));
      sections.get(tag).append(box);
    }
  content.replaceChildren(...sections.values());
  document.getElementById("version").textContent = description.info.version;
  document.getElementById("about").textContent = description.info.description;
  const chosen = document.getElementById(location.hash.slice(1));
  if (chosen) { chosen.open = true; chosen.scrollIntoView(); }
}

async function load() {
  note.textContent = "";
  try {
    const answer = await fetch("/swagger/doc.json", { headers: headers() }), found = await answer.json();
    if (answer.ok) { description = found; show(); return; }
    note.textContent = answer.status + ": " + found.message;
  } catch (error) { note.textContent = "no document: " + error.message; }
  field.focus();
}

field.value = sessionStorage.getItem(TOKEN) || "";
document.getElementById("use").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, field.value);
  load();
});
load();
"""
API_PAGE = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>remote_executor</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>remote_executor <span id="version" class="soft"></span></h1>
<p id="about" class="soft"></p>
<form id="use" class="token">
<label for="token">Token</label>
<input id="token" type="password" autocomplete="off" spellcheck="false" aria-describedby="kept">
<button>Use</button>
<small id="kept">kept in this tab alone; none is needed on the host itself</small>
</form>
<p id="note" class="bad" role="alert"></p>
</header>
<main id="content"></main>
<noscript><p>This page needs JavaScript; the document itself is <a href="/swagger/doc.json">doc.json</a>.</p></noscript>
<script>{script}</script>
</body>
</html>
"""
PROFILES_PAGE = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>profiles of remote_executor</title>
<style>{style}</style>
</head>
<body>
<h1>Profiles</h1>
<p class="soft">One that takes time at once. <code>?seconds=5</code> says how long, <code>?debug=1</code> asks for text;
without it they are for <code>go tool pprof</code> and speedscope, the trace is for Perfetto.</p>
<dl>
{rows}
</dl>
</body>
</html>
"""


def profiles_page(rows: Iterable[tuple[str, str]]) -> str:
    """The index of profiles, each a name and what it shows."""
    shown = "\n".join(f'<dt><a href="{name}">{name.partition("?")[0]}</a></dt><dd>{about}</dd>' for name, about in rows)
    return PROFILES_PAGE.replace("{rows}", shown)


def page_response(page: str, style: str, script: str) -> Response:
    """A page of this style and script alone: it loads nothing, and speaks with this daemon alone (CSP Level 3)."""
    allowed = f"style-src {_source(style)}; script-src {_source(script)}; connect-src 'self'; img-src data:"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    headers = (
        ("Content-Type", "text/html; charset=utf-8"),
        ("Content-Security-Policy", policy),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
    )
    return Response(200, headers, page.replace("{style}", style).replace("{script}", script).encode())


def _source(text: str) -> str:
    """How a policy names an inline style or script: by its digest."""
    import base64
    import hashlib

    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# ======================================================================================================================
# V API / task API: tasks, steps, consoles and the pool
# ======================================================================================================================

_LONG_LINE_BYTES = 1 << 20  # beyond this a line is answered piece by piece


class Api:
    """Answers the routes of tasks and of the pool; any thread may call it."""

    def __init__(
        self, store: Store, scheduler: Scheduler, clock: Clock, files: SafeDirectory, key_expire_ns: int
    ) -> None:
        self._store = store
        self._scheduler = scheduler
        self._clock = clock
        self._files = files
        self._key_expire_ns = key_expire_ns

    def routes(self) -> list[Route]:
        tasks, pool = "/api/v1/task", "/api/v1/pool"
        task, step = tasks + "/{task}", tasks + "/{task}/{step}"
        return [
            Route("GET", tasks, self.list_tasks, "Lists all tasks", "TaskList", ("sort",), is_limited=True),
            Route(
                "POST",
                tasks,
                self.submit_task,
                "Submits a task",
                "Accepted",
                ("ansync", "async", "id", "timeout", "env_vars"),
                "Submission",
                errors=(409, 507),
                is_limited=True,
            ),
            Route("GET", task, self.show_task, "Shows a task, step by step", "TaskDetail", is_limited=True),
            Route("PUT", task, self.stop_task, "Stops a task by force", "Stopped"),
            Route("PUT", step, self.stop_step, "Stops a step by force", "Stopped"),
            Route("GET", step + "/console", self.show_console, "Shows what a step wrote", "Console", is_limited=True),
            Route("GET", pool, self.show_pool, "Shows the pool", "Pool", is_limited=True),
            Route(
                "POST", pool, self.resize_pool, "Sets the size of the pool", "Pool", body="PoolSize", is_limited=True
            ),
        ]

    def list_tasks(self, request: Request) -> Response:
        sorts = [value for name, value in request.query if name == "sort"] or ["st"]
        if sorts not in (["st"], ["et"], ["rt"]):
            raise Malformed("sort parameter error")
        numbers = self._store.task_numbers(sorts[0])
        return Response(headers=(JSON_TYPE,), body=self._task_list(numbers, request.base_url))

    def submit_task(self, request: Request) -> Response:
        accepted = self._scheduler.submit(parse_submission(request.body, request.query, INTERPRETERS))
        audit = f"task {accepted.id}, steps: {accepted.step_count}" + ("" if accepted.is_new else ", sent before")
        data = {
            "count": accepted.step_count,
            "id": accepted.id,
            "url": f"{request.base_url}/api/v1/task/{accepted.id}",
            "timestamp": accepted.accepted_ns + self._clock.offset_ns(),
        }
        return json_response(data, headers=(("X-Task-ID", accepted.id),), audit=audit)

    def show_task(self, request: Request) -> Response:
        task = self._store.task(request.params["task"])
        rows = self._store.steps(task.task_number)
        if task.ended_ns is None:
            code, message = Code.IN_PROGRESS, f"in progress: [{_running_text(rows)}]"
        elif task.state == State.ERROR:
            code, message = Code.FAILED, task.message
        elif failed := [row for row in rows if row.code]:
            texts = (failure_text(row.step_index, row.name, row.code, row.reason) for row in failed)
            code, message = Code.FAILED, f"execution failed: [{'; '.join(texts)}]"
        else:
            code, message = Code.SUCCESS, "success"
        url = f"{request.base_url}/api/v1/task/{task.id}"
        now = self._now()
        data = [self._step_json(task, row, rows, url, now) for row in rows]
        return json_response(data, code, message, headers=(("X-Task-STATE", STATE_NAMES[State(task.state)]),))

    def stop_task(self, request: Request) -> Response:
        self._scheduler.stop_task(self._store.task(request.params["task"]).task_number)
        return json_response()

    def stop_step(self, request: Request) -> Response:
        task = self._store.task(request.params["task"])
        step = self._store.step(task.task_number, request.params["step"])
        self._scheduler.stop_step(task.task_number, step.step_index)
        return json_response()

    def show_console(self, request: Request) -> Response:
        task = self._store.task(request.params["task"])
        step = self._store.step(task.task_number, request.params["step"])
        if step.state == State.PENDING:
            if task.ended_ns is not None:
                raise NotFound(NO_TASK)
            return json_response([], Code.IN_PROGRESS, "pending")
        if step.state == State.RUNNING:
            code, message = Code.IN_PROGRESS, "in progress"
        elif step.code:
            why = step.reason or failure_text(step.step_index, step.name, step.code, "")
            code, message = Code.FAILED, f"exit code: {step.code}; {why}"
        else:
            code, message = Code.SUCCESS, "succeed"
        output = StepDirectory(self._files, task.task_number, step.step_index).read_output()
        lines = encode_lines(output, fallback_encoding())
        head = f'{{"code":{int(code)},"message":{to_json(message)},"data":['.encode()
        return Response(headers=(JSON_TYPE,), body=itertools.chain([head], lines, [b"]}"]))

    def show_pool(self, _: Request) -> Response:
        return json_response(self._scheduler.pool()._asdict())

    def resize_pool(self, request: Request) -> Response:
        body = parse_json(request.body)
        size = body.get("size") if isinstance(body, dict) else None
        if type(size) is not int or not 1 <= size <= MAX_POOL_SIZE:
            raise Malformed(f'the body must be {{"size": n}}, n from 1 to {MAX_POOL_SIZE}')
        return json_response(self._scheduler.resize(size)._asdict(), audit=f"size {size}")

    def _task_list(self, task_numbers: Sequence[int], base_url: str) -> Iterator[bytes]:
        """The answer of the list, block by block."""
        running, total = self._store.running_steps(), 0
        yield b'{"code":0,"message":"success","data":{"running":%d,"tasks":[' % len(running)
        for rows in self._store.tasks(task_numbers):
            if rows:
                now = self._now()
                block = [self._task_json(row, running.get(row.task_number, ()), base_url, now) for row in rows]
                yield (b"," if total else b"") + to_json(block)[1:-1].encode()
                total += len(rows)
        yield b'],"total":%d}}' % total

    def _task_json(
        self, task: TaskRow, running: Sequence[tuple[int, str]], base_url: str, now: tuple[int, int]
    ) -> dict[str, Any]:
        message = task.message
        if task.ended_ns is None:
            message = f"currently executing: [{name_steps(running)}]" if running else WAITING
        return {
            "id": task.id,
            "url": f"{base_url}/api/v1/task/{task.id}",
            "state": task.state,
            "code": task.code,
            "count": task.step_count,
            "msg": message,
            "times": self._times(now, task.accepted_ns, task.ended_ns, task.ended_ns),
        }

    def _step_json(
        self, task: TaskRow, row: StepRow, rows: Sequence[StepRow], url: str, now: tuple[int, int]
    ) -> dict[str, Any]:
        needs = [rows[idx].name for idx in json.loads(row.depends_on)]
        return {
            "step": row.step_index,
            "url": f"{url}/{row.step_index}/console",
            "name": row.name,
            "state": row.state,
            "code": row.code,
            "msg": step_message(row.step_index, row.name, row.state, row.code, row.reason),
            **({"depets_on": needs} if needs else {}),
            "times": self._times(now, row.started_ns, row.ended_ns, row.ended_ns or task.ended_ns),
        }

    def _now(self) -> tuple[int, int]:
        """The moment of an answer, and what to add to show a time."""
        return self._clock.now_ns(), self._clock.offset_ns()

    def _times(
        self, now: tuple[int, int], begin_ns: int | None, end_ns: int | None, kept_ns: int | None
    ) -> dict[str, str]:
        """Begin and end where there are, and the time left before the record, kept since then, expires."""
        now_ns, offset_ns = now
        times = {}
        if begin_ns is not None:
            times["st"] = format_time((begin_ns + offset_ns) // _SECOND_NS)
        if end_ns is not None:
            times["et"] = format_time((end_ns + offset_ns) // _SECOND_NS)
        left_ns = self._key_expire_ns - (now_ns - kept_ns) if kept_ns is not None else self._key_expire_ns
        times["rt"] = format_duration(left_ns) if left_ns > 0 else "0s"
        return times


def _running_text(rows: Sequence[StepRow]) -> str:
    return name_steps((row.step_index, row.name) for row in rows if row.state == State.RUNNING) or WAITING


def encode_lines(blocks: Iterable[bytes], fallback: str) -> Iterator[bytes]:
    """The lines of an output as elements of a JSON array, in pieces; memory stays flat whatever the output is.

    A line ends in LF or CRLF. It is UTF-8, else of the fallback encoding with replacement marks.
    """
    rest, comma, is_open = b"", b"", False  # is_open: of a long line the first pieces have been given out
    for block in blocks:
        whole, newline, rest = (rest + block).rpartition(b"\n")
        if newline:
            lines = _decode_lines(whole, fallback)
            if is_open:
                yield to_json(lines.pop(0))[1:].encode()
                is_open = False
            if lines:
                yield comma + to_json(lines)[1:-1].encode()
            comma = b","
        if len(rest) > _LONG_LINE_BYTES:
            cut = _utf8_split_point(rest)
            yield (b"" if is_open else comma + b'"') + to_json(_decode(rest[:cut], fallback))[1:-1].encode()
            rest, comma, is_open = rest[cut:], b",", True
    if is_open:
        yield to_json(_decode(rest, fallback))[1:].encode()
    elif rest:
        yield comma + to_json(_decode(rest, fallback)).encode()


def _decode_lines(data: bytes, fallback: str) -> list[str]:
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError:
        lines = [_decode(line, fallback) for line in data.split(b"\n")]
    return [line[:-1] if line.endswith("\r") else line for line in lines]


def _decode(line: bytes, fallback: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line.decode(fallback, "replace")


def _utf8_split_point(line: bytes) -> int:
    """Where a long line may be cut: not within a character, nor before a CR that may belong to the line's end."""
    cut = len(line) - line.endswith(b"\r")
    for back in range(1, 4):
        redirect_to_page = line[cut - back]
        if redirect_to_page >= 0xC0:
            return cut - back if back < (2 if redirect_to_page < 0xE0 else 3 if redirect_to_page < 0xF0 else 4) else cut
        if redirect_to_page < 0x80:
            break
    return cut


# ======================================================================================================================
# V API / operator API: what the daemon tells of itself
# ======================================================================================================================

_POOL_HELP = ("The most steps that run at once.", "Steps that run.", "Steps that are ready and wait.")


class OperatorApi:
    """Answers the routes that tell of the daemon itself; any thread may call it."""

    def __init__(
        self,
        store: Store,
        scheduler: Scheduler,
        clock: Clock,
        telemetry: Telemetry,
        root: str,
        warnings: Sequence[Callable[[], str]],
    ) -> None:
        self._store = store
        self._scheduler = scheduler
        self._clock = clock
        self._telemetry = telemetry
        self._root = root
        self._warnings = warnings  # each tells what the operator should know now, or nothing

    def routes(self) -> list[Route]:
        return [
            Route("GET", "/version", self.show_version, "Tells what runs", "Version"),
            Route("GET", "/healthyz", self.show_health, "Tells that the daemon lives", "Health", is_public=True),
            Route("GET", "/heartbeat", self.heartbeat, "Answers", "Empty", is_public=True),
            Route("HEAD", "/heartbeat", self.heartbeat, "Answers", "Empty", is_public=True),
            Route("GET", "/metrics", self.show_metrics, "Figures for Prometheus", "Metrics"),
            Route("GET", "/api/v1/state", self.show_state, "Shows host, process and work", "State", is_limited=True),
        ]

    def show_version(self, _: Request) -> Response:
        known = build()
        python = {
            "implementation": known.implementation,
            "version": known.python,
            "os": known.os,
            "arch": known.arch,
        }
        return json_response(
            {"version": known.version, "python": python, "commit": known.commit or None, "built": known.built}
        )

    def show_health(self, request: Request) -> Response:
        """The envelope, and its data beside it too, where clients of the original look."""
        health = {"server": request.host, "client": request.peer, "state": "Running", "timestamp": time.time_ns()}
        data = health
        if request.label:
            warning = "; ".join(filter(None, (warn() for warn in self._warnings)))
            if warning:
                data = {**health, "warning": warning}
        envelope = {"code": 0, "message": "success", "data": data, **health}
        return Response(headers=(JSON_TYPE,), body=to_json(envelope).encode())

    def heartbeat(self, _: Request) -> Response:
        return Response()

    def show_metrics(self, _: Request) -> Response:
        families = [*self._families(), *self._telemetry.families(), *process_families(process_stats())]
        return Response(headers=(METRICS_TYPE,), body=exposition(families).encode())

    def _families(self) -> list[Family]:
        """What there is now."""
        counts = self._store.counts()
        tasks = [("", (("state", name),), counts.get(state, 0)) for state, name in STATE_NAMES.items()]
        known = tuple((name, value) for name, value in build()._asdict().items())
        return [
            single(METRIC_PREFIX + "build_info", "gauge", "The program and its Python; always 1.", 1, known),
            Family(METRIC_PREFIX + "tasks", "gauge", "Tasks kept, by state.", tasks),
            *(
                single(f"{METRIC_PREFIX}pool_{name}", "gauge", text, value)
                for (name, value), text in zip(self._scheduler.pool()._asdict().items(), _POOL_HELP)
            ),
            single(
                METRIC_PREFIX + "store_size_bytes",
                "gauge",
                "What the database takes on disk.",
                self._store.size_bytes(),
            ),
        ]

    def show_state(self, _: Request) -> Response:
        counts, oldest_ns = self._store.counts(), self._store.oldest_ns()
        host, disk = host_info(), shutil.disk_usage(self._root)
        oldest = None if oldest_ns is None else format_time((oldest_ns + self._clock.offset_ns()) // _SECOND_NS)
        return json_response(
            {
                "host": {**host._asdict(), "boot_time": format_time(int(boot_time_s()))},
                "process": self._process_json(),
                "pool": self._scheduler.pool()._asdict(),
                "tasks": {name: counts.get(state, 0) for state, name in STATE_NAMES.items()},
                "store": {"bytes": self._store.size_bytes(), "records": sum(counts.values()), "oldest": oldest},
                "root": {"path": self._root, "disk_free_bytes": disk.free, "disk_total_bytes": disk.total},
            }
        )

    def _process_json(self) -> dict[str, Any]:
        figures, known = process_stats(), build()
        return {
            "pid": os.getpid(),
            "uptime_s": round(max(0.0, time.time() - figures.started_s), 3),
            "cpu_s": round(figures.cpu_s, 3),
            "rss_bytes": figures.resident_bytes,
            "threads": figures.threads,
            "open_files": figures.open_files,
            "python": f"{known.implementation} {known.python}",
        }


# ======================================================================================================================
# V API / profiling: stacks, waits and memory of the daemon, in the formats of Go's tools
# ======================================================================================================================


class Frame(NamedTuple):
    """A place in the program: the whole name of a function, its file and line, and the address of its code object."""

    function: str
    file: str
    line: int
    address: int


class Profile:
    """Stacks with values; for one thread."""

    def __init__(self, kinds: Sequence[tuple[str, str]], note: str, seconds: float = 0.0) -> None:
        self._kinds = kinds  # the name and the unit of each value
        self._note = note
        self._seconds = seconds
        self._samples: dict[tuple[str, tuple[Frame, ...]], Sequence[int]] = {}  # by a thread's name and its stack

    def add(self, thread: str, stack: tuple[Frame, ...], values: Sequence[int]) -> None:
        """Adds the values to those of the same stack, which begins with the innermost frame."""
        known = self._samples.get((thread, stack), (0,) * len(values))
        self._samples[thread, stack] = [one + other for one, other in zip(known, values)]

    def text(self) -> str:
        """The stacks for people, the largest value first."""
        kinds = ", ".join(f"{name} ({unit})" for name, unit in self._kinds)
        lines = [f"{self._note}", f"values: {kinds}", ""]
        for (thread, stack), values in sorted(self._samples.items(), key=lambda item: item[1][-1], reverse=True):
            lines.append(f"{' '.join(map(str, values))} @ {thread}")
            lines += [f"#\t{frame.function}\t{frame.file}:{frame.line}" for frame in stack] + [""]
        return "\n".join(lines) + "\n"

    def encode(self) -> bytes:
        """The gzipped profile.proto of pprof (github.com/google/pprof/proto/profile.proto)."""
        import gzip

        words: dict[str, int] = {"": 0}
        locations: dict[Frame, int] = {}
        functions: dict[tuple[str, str], int] = {}

        def word(text: str) -> int:
            return words.setdefault(text, len(words))

        kinds = [_field(1, word(name)) + _field(2, word(unit)) for name, unit in self._kinds]
        parts = [_field(1, kind) for kind in kinds]
        for (thread, stack), values in self._samples.items():
            places = b"".join(_varint(locations.setdefault(frame, len(locations) + 1)) for frame in stack)
            label = _field(3, _field(1, word("thread")) + _field(2, word(thread))) if thread else b""
            parts.append(_field(2, _field(1, places) + _field(2, b"".join(map(_varint, values))) + label))
        known = b"".join(_field(number, 1) for number in (7, 8, 9))  # it has functions, files and lines: look for none
        parts.append(_field(3, _field(1, 1) + _field(3, 2**63 - 1) + _field(5, word(sys.executable)) + known))
        for frame, number in locations.items():
            function = functions.setdefault((frame.function, frame.file), len(functions) + 1)
            line = _field(4, _field(1, function) + _field(2, frame.line))
            parts.append(_field(4, _field(1, number) + _field(2, 1) + _field(3, frame.address) + line))
        for (name, file), number in functions.items():
            parts.append(_field(5, _field(1, number) + _field(2, word(name)) + _field(4, word(file))))
        parts += [_field(9, time.time_ns()), _field(10, int(self._seconds * _SECOND_NS)), _field(11, kinds[-1])]
        parts += [_field(12, _PERIOD_NS), _field(13, word(self._note)), _field(14, word(self._kinds[-1][0]))]
        return gzip.compress(b"".join(parts + [_field(6, text.encode()) for text in words]), 6)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _field(number: int, value: int | bytes) -> bytes:
    """A field of a protocol buffer: a number, or bytes with their length (Protocol Buffers, Encoding)."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


_PERIOD_NS = 10**7
_LEAST_PAUSE = 24  # times what a look took of the CPU: looking takes 4 % of one at the most
_HEAP_DEPTH = 16  # frames of an allocation's stack
_SAMPLED = (("samples", "count"), ("wall", "nanoseconds"))
_Key = tuple[str, tuple[tuple[int, int], ...]]  # a thread's name, and the code and line of each frame


class Sampler:
    """Looks at the stacks of all threads but its own, and counts them; for the thread that made it."""

    def __init__(self, counts: Callable[[int, types.FrameType], bool] = lambda _, __: True) -> None:
        self._counts = counts  # whether a stack is to be counted, by its thread and innermost frame
        self._own = threading.get_ident()
        self._names: dict[int, str] = {}
        self._codes: dict[int, types.CodeType] = {}  # by id: code is dear to hash
        self._seen: dict[_Key, list[int]] = {}

    def run(self, seconds: float) -> None:
        """Looks 100 times a second, less often where there are so many threads that it would cost too much."""
        last_ns = time.perf_counter_ns()
        end_ns = last_ns + int(seconds * _SECOND_NS)
        pause_ns = _PERIOD_NS
        while last_ns < end_ns:
            time.sleep(min(pause_ns, end_ns - last_ns) / _SECOND_NS)
            now_ns, before_ns = time.perf_counter_ns(), time.thread_time_ns()
            self.look(now_ns - last_ns)
            last_ns, cost_ns = now_ns, time.thread_time_ns() - before_ns
            pause_ns = max(_PERIOD_NS - cost_ns, cost_ns * _LEAST_PAUSE)

    def look(self, since_ns: int = 0) -> None:
        """Counts every stack once, with the time since the last look."""
        for thread, frame in sys._current_frames().items():
            if thread != self._own and self._counts(thread, frame):
                values = self._seen.setdefault(self._key(thread, frame), [0, 0])
                values[0] += 1
                values[1] += since_ns

    def _key(self, thread: int, innermost: types.FrameType) -> _Key:
        if thread not in self._names:
            self._names.update(thread_names())
        stack, frame = [], innermost
        while frame:
            code = frame.f_code
            self._codes[id(code)] = code
            stack.append((id(code), frame.f_lineno or 0))
            frame = frame.f_back  # type: ignore[assignment]
        return self._names.get(thread, "not Python's"), tuple(stack)

    def stacks(self) -> Iterator[tuple[str, tuple[Frame, ...], list[int]]]:
        """Each stack that was seen: the thread's name, the frames, how often and for how many nanoseconds."""
        for (thread, stack), values in self._seen.items():
            yield thread, tuple(_frame(self._codes[code], line) for code, line in stack), values


def thread_names() -> dict[int, str]:
    return {thread.ident: thread.name for thread in threading.enumerate() if thread.ident}


def _frame(code: types.CodeType, line: int) -> Frame:
    module = os.path.basename(code.co_filename).partition(".")[0]
    return Frame(f"{module}.{getattr(code, 'co_qualname', code.co_name)}", code.co_filename, line, id(code))


def profile_time(seconds: float) -> Profile:
    """Where all threads are, whether they run or wait."""
    sampler, profile = Sampler(), Profile(_SAMPLED, "Python stacks of all threads, running or waiting.", seconds)
    sampler.run(seconds)
    for found in sampler.stacks():
        profile.add(*found)
    return profile


def profile_waits(seconds: float, is_mutex: bool) -> Profile:
    """Where threads wait for each other, as far as looking tells; CPython keeps no account of its locks.

    A thread waits when two looks in turn find it at the same instruction: of a `with` on a bare name or an acquire(),
    which is a lock, or within `threading`, which is a condition, an event or a join.
    """
    last: dict[int, tuple[int, int]] = {}

    def counts(thread: int, frame: types.FrameType) -> bool:
        place = id(frame), frame.f_lasti
        stays, last[thread] = last.get(thread) == place, place
        return stays and (_takes_lock(frame) if is_mutex else frame.f_code.co_filename == _THREADING)

    note = "waits for locks" if is_mutex else "waits in threading, for conditions, events and joins"
    kinds = (("waits_sampled", "count"), ("wait", "nanoseconds"))
    sampler, profile = Sampler(counts), Profile(kinds, f"Sampled {note}; those under 10 ms are seldom seen.", seconds)
    sampler.run(seconds)
    for found in sampler.stacks():
        profile.add(*found)
    return profile


def _takes_lock(frame: types.FrameType) -> bool:
    import linecache

    code = frame.f_code
    line = linecache.getline(code.co_filename, frame.f_lineno or 0, frame.f_globals)
    return code.co_filename != _THREADING and bool(_LOCKING.search(line))


_THREADING = threading.Thread.run.__code__.co_filename  # its __file__ may be of a zip, as in the embeddable package
_LOCKING = re.compile(r"^\s*with [\w.]+:|\.acquire\(")


def profile_threads(entries_only: bool) -> Profile:
    """The threads there are: by their stacks, or by what each was started to run."""
    about = "what they were started to run; CPython keeps no stack of a thread's start" if entries_only else "stacks"
    sampler, profile = Sampler(), Profile((("threads", "count"),), f"Live threads, by {about}.")
    sampler.look()
    for thread, stack, values in sampler.stacks():
        entry = tuple(frame for frame in stack if frame.file != _THREADING)[-1:] if entries_only else stack
        profile.add(thread, entry, values[:1])
    return profile


def profile_memory(seconds: float) -> Profile:
    """What is allocated in the time to come and still there at its end; traced for that long alone."""
    import tracemalloc

    is_ours = not tracemalloc.is_tracing()  # else Python was started so
    if is_ours:
        tracemalloc.start(_HEAP_DEPTH)
    try:
        time.sleep(seconds)
        found = tracemalloc.take_snapshot().statistics("traceback")
    finally:
        if is_ours:
            tracemalloc.stop()
    kinds = (("inuse_objects", "count"), ("inuse_space", "bytes"))
    note = "Allocated while traced, and not freed; tracemalloc knows nothing of what is freed."
    profile = Profile(kinds, note, seconds)
    for one in found:
        stack = [
            Frame(f"{os.path.basename(at.filename)}:{at.lineno}", at.filename, at.lineno, 0) for at in one.traceback
        ]
        profile.add("", tuple(reversed(stack)), (one.count, one.size))
    return profile


def stacks_text() -> str:
    """The stack of every thread, for people, the innermost frame first."""
    lines, threads = [], {thread.ident: thread for thread in threading.enumerate()}
    for ident, innermost in sys._current_frames().items():
        thread, frame = threads.get(ident), innermost
        kind = "not Python's" if thread is None else f"{thread.name}, {'daemon' if thread.daemon else 'no daemon'}"
        lines.append(f"thread {ident} [{kind}]:")
        while frame:
            found = _frame(frame.f_code, frame.f_lineno or 0)
            lines += [found.function, f"\t{found.file}:{found.line}"]
            frame = frame.f_back  # type: ignore[assignment]
        lines.append("")
    return "\n".join(lines)


def symbols_text(asked: str) -> str:
    """The functions at the addresses of a profile, by the symbol protocol of pprof."""
    wanted = [int(word, 16) for word in re.findall("0x([0-9A-Fa-f]{1,16})", asked)]
    codes = [one.__code__ for one in gc.get_objects() if isinstance(one, types.FunctionType)] if wanted else []
    names: dict[int, str] = {}
    while codes:
        code = codes.pop()
        if id(code) not in names:
            names[id(code)] = _frame(code, 0).function
            codes += [one for one in code.co_consts if isinstance(one, types.CodeType)]
    return "".join(["num_symbols: 1\n", *(f"{one:#x} {names[one]}\n" for one in wanted if one in names)])


class ProfileApi:
    """Answers the routes of pprof with what is true of a Python process; any thread may call it."""

    def __init__(self, telemetry: Telemetry, most_ns: int) -> None:
        self._telemetry = telemetry
        self._most_s = most_ns / _SECOND_NS
        self._busy = threading.Lock()  # held while something is taken that takes time

    def routes(self) -> list[Route]:
        def timed(name: str, take: Callable[[float], Profile], usual_s: float) -> Route:
            handle = functools.partial(self._take, take=take, usual_s=usual_s)
            query = ("seconds", "debug")
            return Route("GET", _PPROF + name, handle, _PROFILES[name], "Profile", query, errors=(409,))

        symbol, threads, created = _PPROF + "symbol", self.show_threads, self.show_thread_entries
        return [
            Route("GET", _PPROF, self.show_index, "Lists the profiles", "Page"),
            Route("GET", _PPROF + "cmdline", self.show_command, _PROFILES["cmdline"], "Text"),
            timed("profile", profile_time, _USUAL_S),
            Route("GET", _PPROF + "goroutine", threads, _PROFILES["goroutine"], "Profile", ("debug",)),
            timed("heap", profile_memory, _SHORT_S),
            timed("allocs", profile_memory, _SHORT_S),
            Route("GET", _PPROF + "threadcreate", created, _PROFILES["threadcreate"], "Profile", ("debug",)),
            timed("block", functools.partial(profile_waits, is_mutex=False), _SHORT_S),
            timed("mutex", functools.partial(profile_waits, is_mutex=True), _SHORT_S),
            Route("GET", _PPROF + "trace", self.trace, _PROFILES["trace"], "Trace", ("seconds",), errors=(409,)),
            Route("GET", symbol, self.show_symbols, _PROFILES["symbol"], "Text"),
            Route("POST", symbol, self.show_symbols, _PROFILES["symbol"], "Text", body="Addresses"),
        ]

    def show_index(self, _: Request) -> Response:
        rows = (
            (f"{name}?debug={debug}" if (debug := _SHOWN_AS.get(name)) else name, about)
            for name, about in _PROFILES.items()
        )
        return page_response(profiles_page(rows), API_STYLE, "")

    def show_command(self, _: Request) -> Response:
        words = getattr(sys, "orig_argv", None) or [sys.executable, *sys.argv]
        return Response(headers=(TEXT_TYPE,), body="\0".join(words).encode(errors="replace"))

    def show_threads(self, request: Request) -> Response:
        if _debug(request) == 2:
            return Response(headers=(TEXT_TYPE,), body=stacks_text().encode())
        return _profile_response(request, profile_threads(entries_only=False))

    def show_thread_entries(self, request: Request) -> Response:
        return _profile_response(request, profile_threads(entries_only=True))

    def trace(self, request: Request) -> Response:
        seconds = self._seconds(request, 1.0)
        with self._exclusive():
            events = trace_events(self._telemetry.trace(seconds))
        return Response(headers=(JSON_TYPE,), body=to_json(events).encode())

    def show_symbols(self, request: Request) -> Response:
        asked = request.body.decode("latin-1") if request.method == "POST" else "".join(map("".join, request.query))
        return Response(headers=(TEXT_TYPE,), body=symbols_text(asked).encode())

    def _take(self, request: Request, take: Callable[[float], Profile], usual_s: float) -> Response:
        seconds = self._seconds(request, usual_s)
        _debug(request)  # refused before the time is spent
        with self._exclusive():
            profile = take(seconds)
        return _profile_response(request, profile)

    def _seconds(self, request: Request, usual_s: float) -> float:
        text = _last(request, "seconds", f"{min(usual_s, self._most_s):.9f}")
        seconds = float(text) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) else 0.0
        if not 0 < seconds <= self._most_s:
            right = f"right would be more than 0, up to {self._most_s:g} (--profile_timeout)"
            raise Malformed(f"seconds: {text!r} is out of range; {right}")
        return seconds

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise Conflict("another profile or trace is being taken; wait for its end")
        try:
            yield
        finally:
            self._busy.release()


_PPROF = "/debug/pprof/"
_USUAL_S, _SHORT_S = 30.0, 5.0  # how long a profile takes where nothing is said; the first is that of Go
_PROFILES = {
    "profile": "Where all threads are, sampled at 100 Hz",
    "goroutine": "The stacks of all threads now",
    "heap": "What is allocated in some seconds and kept",
    "allocs": "The same as heap",
    "threadcreate": "The threads by what they were started to run",
    "block": "Where threads wait for conditions, events and each other's end, sampled",
    "mutex": "Where threads wait for locks, sampled",
    "trace": "The steps, requests and commits of some seconds",
    "cmdline": "The command line",
    "symbol": "The functions at addresses of a profile",
}
_SHOWN_AS = {"goroutine": "2", "threadcreate": "1", "block": "1", "mutex": "1", "heap": "1"}


def _last(request: Request, name: str, default: str) -> str:
    """A value of the query."""
    return next((value for key, value in reversed(request.query) if key == name), default)


def _debug(request: Request) -> int:
    text = _last(request, "debug", "0")
    if text not in ("0", "1", "2"):
        raise Malformed(f"debug: {text!r} is none of 0, 1 and 2")
    return int(text)


def _profile_response(request: Request, profile: Profile) -> Response:
    if _debug(request):
        return Response(headers=(TEXT_TYPE,), body=profile.text().encode())
    return Response(headers=(("Content-Type", "application/octet-stream"),), body=profile.encode())


# ======================================================================================================================
# V API / API document: OpenAPI, derived from the routes
# ======================================================================================================================

Json = dict[str, Any]
_REFUSALS = {  # by status: when it happens, and an example; the first are for every route
    400: (
        "The request is malformed.",
        "[0]: Key: 'PostStruct.CommandType' Error:Field validation for 'CommandType' failed on the 'required' tag",
    ),
    401: ("It needs a token, or the token is wrong.", "send `Authorization: Bearer ...` with a token of the daemon"),
    403: (
        "It comes from a page of another origin.",
        "pages of other sites may not call this; --cors_origin allows one",
    ),
    413: ("The body is too large.", "the body has 16777217 bytes; at most 16777216 are taken (--max_body)"),
    429: ("Too many at once; wait.", "8 requests are in work, the most that --max-requests allows; try again"),
    500: ("The daemon failed.", "the daemon failed; its log says how"),
    503: ("Not now.", "the daemon is ending; send the task again to the next one"),
    409: (
        "It is in conflict with another.",
        "id: 'a' is the id of a task that was submitted otherwise; use another id",
    ),
    507: ("The disk is full.", "the disk of the root is full; make room, or give another --root"),
}
_ANY_ROUTE = (400, 401, 403, 413, 429, 500, 503)
_REFUSAL_HEADERS = {401: "WWW-Authenticate", 429: "Retry-After"}


def api_document(routes: Iterable[Route]) -> Json:
    """The OpenAPI 3.1 document of these routes."""
    paths: dict[str, Json] = {}
    for route in routes:
        paths.setdefault(route.template, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "remote_executor",
            "version": __version__,
            "description": "Runs scripts on this host: tasks of steps, in order, in parallel or as a graph. The `code` "
            "of an answer is 0 for success, 1001 in progress, 1002 execution failed, 1003 not found, expired or "
            "destroyed, else the status of a refusal: 404 for a path that no route has, 405 for a method that a path "
            "does not have, and those below.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"token": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "description": "See --token_file."}},
            "parameters": _parameters(),
            "requestBodies": _bodies(),
            "responses": {**_answers(), **{f"Refused{status}": _refused(status) for status in _REFUSALS}},
            "schemas": _schemas(),
        },
    }


def _operation(route: Route) -> Json:
    names = [*re.findall(r"{(\w+)}", route.template), *route.query]
    statuses = [*_ANY_ROUTE, *route.errors]
    success = "302" if route.answer == "Redirect" else "200"
    found: Json = {
        "operationId": re.sub(r"\W+", "_", route.method.lower() + route.template.replace("}", "")),
        "summary": route.summary,
        "tags": [_tag(route.template)],
        "responses": {success: _ref("responses", route.answer)},
    }
    if names:
        found["parameters"] = [_ref("parameters", name) for name in names]
    if route.body:
        found["requestBody"] = _ref("requestBodies", route.body)
    if route.is_public:
        found["security"] = [{}]
    found["responses"].update({str(status): _ref("responses", f"Refused{status}") for status in sorted(statuses)})
    return found


def _tag(template: str) -> str:
    areas = (("/api/v1/task", "tasks"), ("/api/v1/pool", "pool"), ("/debug/", "profiles"), ("/swagger", "document"))
    return next((tag for prefix, tag in areas if template.startswith(prefix)), "daemon")


def _ref(kind: str, name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}


def _schema(name: str) -> Json:
    return _ref("schemas", name)


def _object(fields: Json, *optional: str) -> Json:
    """An object of these fields and no others, all but the optional ones required."""
    required = [name for name in fields if name not in optional]
    return {"type": "object", "required": required, "properties": fields, "additionalProperties": False}


def _array(of: Json, **more: Any) -> Json:
    return {"type": "array", "items": of, **more}


def _string(about: str, **more: Any) -> Json:
    return {"type": "string", "description": about, **more}


def _whole(about: str, least: int = 0, **more: Any) -> Json:
    return {"type": "integer", "description": about, "minimum": least, **more}


def _envelope(codes: Sequence[int], data: Json | None = None) -> Json:
    code = {"const": codes[0]} if len(codes) == 1 else {"enum": [*codes]}
    fields = {"code": {"type": "integer", **code}, "message": {"type": "string"}}
    return _object({**fields, "data": data} if data else fields)


def _answer(
    about: str, schema: Json, examples: Mapping[str, Any] = types.MappingProxyType({}), header: str = ""
) -> Json:
    """An answer of JSON."""
    content: Json = {"schema": schema}
    if examples:
        content["examples"] = {name: {"value": value} for name, value in examples.items()}
    found: Json = {"description": about, "content": {"application/json": content}}
    if header:
        found["headers"] = {header: {"schema": {"type": "string"}}}
    return found


def _refused(status: int) -> Json:
    about, message = _REFUSALS[status]
    example = {"code": status, "message": message}
    return _answer(about, _envelope([status]), {"refused": example}, _REFUSAL_HEADERS.get(status, ""))


def _parameters() -> Json:
    """What stands in paths and queries."""
    truth = {"type": "string", "pattern": "^([1tT0fF]|[tT][rR][uU][eE]|[fF][aA][lL][sS][eE])?$"}
    path: dict[str, tuple[str, Json, Any]] = {
        "task": ("Id of the task", {"type": "string", "minLength": 1}, "release-1"),
        "step": ("Index of the step, or its name", {"type": "string", "minLength": 1}, "0"),
    }
    query: dict[str, tuple[str, Json, Any]] = {
        "sort": ("By begin (st), end (et) or expiry (rt)", {"enum": ["st", "et", "rt"], "default": "st"}, "st"),
        "ansync": ("true: only `depets_on` orders the steps", truth, "true"),
        "async": ("The same as `ansync`", truth, "true"),
        "id": ("Id of the task; sent again, the same submission runs once", {"pattern": _ID_WORD}, "release-1"),
        "timeout": ("Of the whole task, from its acceptance", _schema("Duration"), "1h30m"),
        "seconds": ("For how long; at most --profile_timeout", _SECONDS, "5"),
        "debug": ("1: as text; 2: of threads the whole stacks", {"enum": ["0", "1", "2"], "default": "0"}, "1"),
        "env_vars": ("KEY=value for all steps; may stand several times", _array(_schema("Variable")), ["target=linux"]),
    }
    found: Json = {}
    for place, words in (("path", path), ("query", query)):
        for name, (about, schema, example) in words.items():
            schema = schema if "$ref" in schema or "type" in schema else {"type": "string", **schema}
            found[name] = {"name": name, "in": place, "description": about, "schema": schema, "example": example}
            if place == "path":
                found[name]["required"] = True
    return found


_SECONDS: Json = {"type": "number", "exclusiveMinimum": 0}
_ID_WORD = r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9_-])?)?$"  # empty is as absent


def _bodies() -> Json:
    def body(name: str, examples: Json) -> Json:
        values = {name: {"value": value} for name, value in examples.items()}
        return {"required": True, "content": {"application/json": {"schema": _schema(name), "examples": values}}}

    build_it = {"command_type": "sh", "command_content": 'echo "build $target"', "env_vars": ["target=linux"]}
    graph = [
        {"name": "fetch", "command_type": "sh", "command_content": "echo 42 >answer"},
        {"name": "left", "command_type": "sh", "command_content": "cat answer", "depets_on": ["fetch"]},
        {"name": "right", "command_type": "python", "command_content": "print(7)", "depets_on": ["fetch"]},
    ]
    steps = {"one after another": [build_it, {**build_it, "timeout": "90s"}], "a graph, with ansync=true": graph}
    return {
        "Submission": body("Submission", steps),
        "PoolSize": body("PoolSize", {"eight": {"size": 8}}),
        "Addresses": {
            "content": {"text/plain": {"schema": {"type": "string"}, "example": "0x7f0000000000+0x7f0000000010"}}
        },
    }


def _schemas() -> Json:
    """What bodies and answers are made of."""
    return {**_submitted(), **_shown(), **_figures(), "NotFound": _envelope([Code.NOT_FOUND])}


def _submitted() -> Json:
    """The schemas of bodies; an optional field may be null or empty too."""
    names = _array({"type": "string"}, description="Names of the steps that must succeed first")
    optional = {"type": ["array", "null"]}
    duration = {"anyOf": [_schema("Duration"), {"type": "null"}], "description": "Default --exec_timeout"}
    step = {
        "command_type": {"type": "string", "enum": [*INTERPRETERS]},
        "command_content": _string("The script", minLength=1),
        "name": {**_string("Default <task id>-<index>", maxLength=_NAME_LIMIT), "type": ["string", "null"]},
        "env_vars": {**_array(_schema("Variable")), **optional},
        "depets_on": {**names, **optional},
        "depends_on": {**names, **optional, "description": "The same as `depets_on`"},
        "timeout": duration,
    }
    required = ["command_type", "command_content"]
    size = _whole("Steps that run at once", 1, maximum=MAX_POOL_SIZE)
    return {
        "Duration": _string("As Go writes it", pattern=_DURATION_WORD, examples=["90s", "1h30m", "500ms"]),
        "Variable": _string("KEY=value", pattern="^[^=\\x00]+=[^\\x00]*$"),
        "SubmittedStep": {"type": "object", "required": required, "properties": step},
        "Submission": _array(_schema("SubmittedStep"), minItems=1),
        "PoolSize": {"type": "object", "required": ["size"], "properties": {"size": size}},
    }


def _shown() -> Json:
    """The schemas of tasks, steps and the pool."""
    names = _array({"type": "string"}, description="Names of the steps that must succeed first")
    times = {
        "st": _string("Begin", format="date-time"),
        "et": _string("End", format="date-time"),
        "rt": _string("Time left before the record expires, as Go prints a duration"),
    }
    state = {"type": "integer", "enum": [*State], "description": "0 ended, 1 running, 2 pending, 255 system error"}
    code = {"type": "integer", "description": "0 success; a task's is the sum of its steps'"}
    url, message = _string("Where it is shown", format="uri"), {"type": "string"}
    task = {"id": _string("Id"), "url": url, "state": state, "code": code, "count": _whole("Steps", 1), "msg": message}
    row = {"step": _whole("Index"), "url": url, "name": _string("Name"), "state": state, "code": code, "msg": message}
    return {
        "Times": _object(times, "st", "et"),
        "Task": _object({**task, "times": _schema("Times")}),
        "Step": _object({**row, "depets_on": names, "times": _schema("Times")}, "depets_on"),
        "Pool": _object(
            {
                "size": _whole("The most steps that run at once", 1),
                "running": _whole("Steps that run"),
                "waiting": _whole("Steps that are ready and wait"),
            }
        ),
    }


_DURATION_WORD = (
    r"^((?=.*[1-9])\+?(([0-9]+(\.[0-9]*)?|\.[0-9]+)(ns|us|\u00b5s|\u03bcs|ms|s|m|h))+)?$"  # empty as absent
)


def _figures() -> Json:
    """The schemas of what the daemon tells of itself."""
    unknown = {"type": ["integer", "null"], "minimum": 0}
    moment = {"format": "date-time"}
    python = {name: _string(name) for name in ("implementation", "version", "os", "arch")}
    commit = {"type": ["string", "null"], "description": "The git commit, null where nobody knows it"}
    number = {"type": "number", "minimum": 0}
    process = {
        "pid": _whole("Process id", 1),
        "uptime_s": {**number, "description": "Seconds since its start"},
        "cpu_s": {**number, "description": "Seconds of user and system CPU time"},
        "rss_bytes": {**unknown, "description": "Resident memory"},
        "threads": _whole("Threads", 1),
        "open_files": {**unknown, "description": "File descriptors, on Windows handles"},
        "python": _string("Implementation and version"),
    }
    host = {name: _string(name) for name in HostInfo._fields}
    oldest = {"type": ["string", "null"], **moment, "description": "When the oldest kept task was accepted"}
    store = {"bytes": _whole("Size of the database"), "records": _whole("Tasks kept"), "oldest": oldest}
    disk = {"path": _string("The root"), "disk_free_bytes": _whole("Free there"), "disk_total_bytes": _whole("In all")}
    return {
        "Version": _object(
            {
                "version": _string("Of the program"),
                "python": _object(python),
                "commit": commit,
                "built": _string("When"),
            }
        ),
        "State": _object(
            {
                "host": _object({**host, "boot_time": _string("When it started", **moment)}),
                "process": _object(process),
                "pool": _schema("Pool"),
                "tasks": _object({name: _whole("Tasks in this state") for name in STATE_NAMES.values()}),
                "store": _object(store),
                "root": _object(disk),
            }
        ),
        "Health": _object(
            {
                "server": _string("What the client calls the daemon"),
                "client": _string("The client's address"),
                "state": {"const": "Running"},
                "timestamp": _whole("Nanoseconds since the epoch"),
                "warning": _string("What the operator should know"),
            },
            "warning",
        ),
    }


def _answers() -> Json:
    """What a request that is not refused is answered."""
    pool, gone = {"size": 30, "running": 1, "waiting": 0}, {"code": 1003, "message": NO_TASK}
    submitted = {"count": 4, "id": "release-1", "url": _EXAMPLE_URL + "release-1", "timestamp": 1668649373430555500}
    counts = {"count": _whole("Steps", 1), "timestamp": _whole("Nanoseconds since the epoch")}
    accepted = _object({**dict.fromkeys(("id", "url"), {"type": "string"}), **counts})
    tasks = _object({"running": _whole("Running tasks"), "tasks": _array(_schema("Task")), "total": _whole("Tasks")})
    health = _schemas()["Health"]["properties"]
    beside = {name: schema for name, schema in health.items() if name != "warning"}
    states = (Code.SUCCESS, Code.IN_PROGRESS, Code.FAILED)

    def kept(data: Json) -> Json:
        return {"oneOf": [_envelope(states, data), _schema("NotFound")]}

    return {
        "TaskList": _answer("All tasks", _envelope([0], tasks), _list_examples()),
        "Accepted": _answer("It is stored", _envelope([0], accepted), {"stored": _success(submitted)}, "X-Task-ID"),
        "TaskDetail": _answer(
            "The task", kept(_array(_schema("Step"))), {**_task_examples(), "gone": gone}, "X-Task-STATE"
        ),
        "Stopped": _answer(
            "The stop is recorded",
            {"oneOf": [_envelope([0]), _schema("NotFound")]},
            {"stopped": {"code": 0, "message": "success"}, "gone": gone},
        ),
        "Console": _answer("Its lines so far", kept(_array({"type": "string"})), {**_console_examples(), "gone": gone}),
        "Pool": _answer("The pool", _envelope([0], _schema("Pool")), {"pool": _success(pool)}),
        "Version": _answer("What runs", _envelope([0], _schema("Version"))),
        "State": _answer("What it takes", _envelope([0], _schema("State"))),
        "Health": _answer("It lives", _object({**_envelope([0], _schema("Health"))["properties"], **beside})),
        "Document": _answer("This document", {"type": "object"}),
        "Empty": {"description": "Nothing else"},
        "Redirect": {"description": "To the page", "headers": {"Location": {"schema": {"type": "string"}}}},
        "Metrics": _plain("Text format 0.0.4 of Prometheus"),
        "Page": _plain("A page", "text/html"),
        "Text": _plain("Text"),
        "Profile": {
            "description": "A gzipped profile.proto, for `go tool pprof` and speedscope; text where `debug` is set",
            "content": {kind: {"schema": {"type": "string"}} for kind in ("application/octet-stream", "text/plain")},
        },
        "Trace": _answer(
            "In the Trace Event Format, which Perfetto opens",
            _object({"traceEvents": _array({"type": "object"}), "displayTimeUnit": {"const": "ms"}}),
        ),
    }


_EXAMPLE_URL = "http://localhost:2376/api/v1/task/"


def _list_examples() -> Json:
    times = {"st": "2022-11-17T17:17:58+08:00", "et": "2022-11-17T17:17:58+08:00", "rt": "47h53m30.619752642s"}
    task = {"id": "release-1", "url": _EXAMPLE_URL + "release-1", "state": 0, "code": 510, "count": 4}
    task.update(msg="execution failed: [Step: 0, Name: step0; Step: 2, Name: step2]", times=times)
    none = {"running": 0, "tasks": [], "total": 0}
    return {"one task": _success({"running": 0, "tasks": [task], "total": 1}), "none": _success(none)}


def _task_examples() -> Json:
    def step(idx: int, state: int, code: int, message: str, **times: str) -> Json:
        shown = {"step": idx, "url": f"{_EXAMPLE_URL}a/{idx}/console", "name": f"a-{idx}", "state": state, "code": code}
        needs = {"depets_on": [f"a-{idx - 1}"]} if idx else {}
        return {**shown, "msg": message, **needs, "times": {**times, "rt": "47h59m57.433539558s"}}

    begin, end = "2022-11-18T16:20:53+08:00", "2022-11-18T16:20:56+08:00"
    first = step(0, 0, 0, STEP_SUCCEEDED, st=begin, et=end)
    runs, waits = step(0, 1, 0, STEP_RUNNING, st=begin), step(1, 2, 0, STEP_PENDING)
    failed = step(1, 0, 2, failure_text(1, "a-1", 2, ""), st=end, et=end)
    failure = f"execution failed: [{failed['msg']}]"
    return {
        "success": _success([first, step(1, 0, 0, STEP_SUCCEEDED, st=end, et=end)]),
        "in progress": {"code": 1001, "message": "in progress: [Step: 0, Name: a-0]", "data": [runs, waits]},
        "failed": {"code": 1002, "message": failure, "data": [first, failed]},
    }


def _console_examples() -> Json:
    reason = failure_text(0, "a-0", 2, "")
    return {
        "success": {"code": 0, "message": "succeed", "data": ["build linux", "  done"]},
        "in progress": {"code": 1001, "message": "in progress", "data": ["build linux"]},
        "waiting": {"code": 1001, "message": "pending", "data": []},
        "failed": {"code": 1002, "message": f"exit code: 2; {reason}", "data": ["no route to host"]},
    }


def _success(data: Any) -> Json:
    return {"code": 0, "message": "success", "data": data}


def _plain(about: str, kind: str = "text/plain") -> Json:
    """An answer that is no JSON."""
    return {"description": about, "content": {kind: {"schema": {"type": "string"}}}}


class DocumentApi:
    """Answers the document of all routes, and the page that shows it; any thread may call it."""

    def __init__(self, others: Sequence[Route]) -> None:
        self._others = others

    def routes(self) -> list[Route]:
        document, page = self.show_document, self.show_page
        return [
            Route("GET", "/openapi.json", document, "Shows this document", "Document"),
            Route("GET", "/swagger/doc.json", document, "Shows this document", "Document"),
            Route("GET", "/swagger/index.html", page, "Shows this document as a page", "Page", is_public=True),
            Route("GET", "/swagger/", self.redirect_to_page, "Leads to the page", "Redirect", is_public=True),
            Route("GET", "/swagger", self.redirect_to_page, "Leads to the page", "Redirect", is_public=True),
        ]

    def show_document(self, _: Request) -> Response:
        return Response(headers=(JSON_TYPE,), body=to_json(api_document([*self._others, *self.routes()])).encode())

    def show_page(self, _: Request) -> Response:
        return page_response(API_PAGE, API_STYLE, API_SCRIPT)

    def redirect_to_page(self, _: Request) -> Response:
        return Response(302, (("Location", "/swagger/index.html"),))


# ======================================================================================================================
# VI program / daemon: wiring, start, stop, signals
# ======================================================================================================================

_EXIT_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
_POLL_INTERVAL_S = 0.5


class Supervisor:
    """What started the daemon and watches it: here, nobody. Told by the thread that runs the daemon."""

    def ready(self, url: str) -> None:
        """The daemon serves."""

    def watch(self, is_healthy: Callable[[], bool]) -> None:
        """Asked for twice a second while the daemon serves; `is_healthy` asks whether all of it still works."""

    def stopping(self) -> None:
        """The daemon is ending; told again while that takes long."""


class Daemon:
    """The whole of it; for the thread that runs it, but `end` is for any."""

    def __init__(self, settings: Settings, supervisor: Supervisor) -> None:
        self._settings = settings
        self._supervisor = supervisor
        above, name = os.path.split(os.path.abspath(settings.root))
        self._root = os.path.join(os.path.realpath(above), name)  # the root itself must be no link
        self._shutdown_requests = 0  # how often the end was asked for
        self._exit_code = 0
        # A byte wakes `run`; a signal writes one too. No Event: set() would hang in a signal handler that interrupts
        # wait(), and on Windows no signal interrupts it.
        self._waker: socket.socket | None = None
        self._woken: socket.socket | None = None
        self._is_healthy: Callable[[], bool] = lambda: True  # until there is more to ask
        self._tls = Tls(settings) if settings.tls_cert else None
        self._must_reload_certificates = False  # whether the certificates are to be read again
        self._reserve = DescriptorReserve()
        self._watches: list[Callable[[], None]] = [self._reserve.fill]  # what is done twice a second
        self._error_stream: ErrorStream | None = None
        self._log_file: LogFile | None = None

    def run(self) -> int:
        """Serves until the end is asked for; the exit code. Raises StartupError."""
        self._configure_log()
        try:
            with contextlib.ExitStack() as closing:
                self._serve(closing)
            log.info("ended")
        finally:
            if self._error_stream:
                self._error_stream.flush()  # what is printed next, such as why it ends, comes behind it
        return self._exit_code

    def _serve(self, closing: contextlib.ExitStack) -> None:
        woken, self._waker = socket.socketpair()
        self._woken = woken  # kept: a signal writes to the other one until `closing` is closed
        woken.settimeout(_POLL_INTERVAL_S)
        self._waker.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            self._install_signal_handlers(closing, self._waker.fileno())
        try:
            url = self._start(closing)
        except (ApiError, OSError) as error:  # of the store and of the root's files
            raise StartupError(f"--root: {self._root} cannot be used: {error}") from error
        self._print_ready(url)
        log.info("%s listens on %s", version_line(), url)
        self._supervisor.ready(url)
        while not self._shutdown_requests:
            with contextlib.suppress(socket.timeout):
                woken.recv(4096)
            for watch in self._watches:
                try:
                    watch()
                except Exception:
                    with contextlib.suppress(MemoryError):
                        log.exception("the daemon goes on")
        self._supervisor.stopping()

    def _print_ready(self, url: str) -> None:
        """Prints that the port is open, by a thread: nobody need read it."""
        if not sys.stdout:
            return
        written: list[bool] = []
        stream = ErrorStream(sys.stdout)
        printer = DaemonThread(lambda: written.append(stream.write(f"listening on {url}")), "ready line")
        printer.start()
        printer.join(_FLUSH_S)
        if written != [True]:
            log.warning("standard output cannot be written")

    def _look_after_certificates(self) -> None:
        if self._must_reload_certificates:
            self._reload_certificates()

    def _check_threads(self) -> None:
        """Ends a daemon of which a part is dead: its next start takes all up again, as after a crash."""
        if not self._is_healthy() and not self._shutdown_requests:
            log.critical(
                "a thread of the daemon has ended, so it ends too, with 1; what runs is adopted at the next start"
            )
            self._exit_code = 1
            self._count_shutdown_request()

    def _ping_supervisor(self) -> None:
        self._supervisor.watch(self._is_healthy)

    def _install_signal_handlers(self, closing: contextlib.ExitStack, waker: int) -> None:
        """Until `closing` is closed; from then on no signal disturbs the end of the process, which is near."""
        reset_inherited_signals()
        deeds = {number: self._count_shutdown_request for number in _EXIT_SIGNALS}
        if self._tls and hasattr(signal, "SIGHUP"):  # without certificates it means what it always means
            deeds[signal.SIGHUP] = self.reload_certificates
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        closing.callback(signal.set_wakeup_fd, -1)
        closing.callback(_ignore_signals, deeds)
        for number, deed in deeds.items():
            signal.signal(number, lambda *_, deed=deed: deed())

    def _count_shutdown_request(self) -> None:
        """What a signal does: its byte is in the socket already."""
        self._shutdown_requests += 1

    def request_shutdown(self) -> None:
        """Ends the daemon in order; asked for again, without waiting for steps."""
        self._count_shutdown_request()
        if self._waker:
            with contextlib.suppress(BlockingIOError):  # there are bytes enough
                self._waker.send(b"\0")

    def reload_certificates(self) -> None:
        """Has the certificates read again."""
        self._must_reload_certificates = True

    def _reload_certificates(self) -> None:
        self._must_reload_certificates = False
        try:
            if self._tls:
                self._tls.load()
            log.info("the certificates were read again")
        except StartupError as error:
            log.error("the certificates read before hold: %s", error)

    def _start(self, closing: contextlib.ExitStack) -> str:
        """Opens the root, takes up the work, opens the port; its URL. `closing` undoes it, the last first."""
        umask, settings = private_umask(), self._settings
        if self._tls:
            self._tls.load()
        self._open_root(closing)
        set_inherited_fds_cloexec()
        clean_pyinstaller_env()
        descriptors = raise_fd_limit()
        self._reserve.fill()
        capacity = step_capacity(descriptor_limit(), process_limits(), settings.max_connections)
        telemetry = Telemetry()
        store = Store(os.path.join(self._root, "remote_executor.db"), telemetry.commit)
        store.start()
        closing.callback(store.stop)
        clock = Clock.resume(store.metadata(), store.latest_ns())
        store.save_metadata(clock.memory())
        files = SafeDirectory(os.path.join(self._root, "tasks"))
        processes = Processes(umask, descriptors, self._reserve)
        scheduler = Scheduler(
            store,
            clock,
            settings.pool_size,
            capacity.steps,
            lambda number: runner.remove_empty_workspace(number),
        )
        runner = Runner(store, scheduler, processes, clock, files, settings, telemetry)
        recovery = Recovery(store, scheduler, processes, clock, files, runner)
        janitor = Janitor(store, scheduler, processes, clock, files, settings)
        root_watch = RootWatch(self._root, has_token=settings.token_file.startswith("$ROOT"))
        warnings: list[Callable[[], str]] = [
            store.warning,
            lambda: "--insecure: everybody is let in" if settings.insecure else "",
            functools.partial(_capacity_warning, capacity, scheduler),
            lambda: scheduler.scarcity,
            root_watch.warning,
        ]
        routes = [
            *Api(store, scheduler, clock, files, settings.key_expire).routes(),
            *OperatorApi(store, scheduler, clock, telemetry, self._root, warnings).routes(),
            *ProfileApi(telemetry, settings.profile_timeout).routes(),
        ]
        router = Router([*routes, *DocumentApi(routes).routes()])
        access = Authenticator(settings, self._root, self._reserve)
        server = Server(settings, router, access, telemetry, self._tls, self._reserve)
        closing.callback(server.stop)
        server.open()
        access.start()
        closing.callback(janitor.stop)
        closing.callback(self._end_steps, scheduler)
        strays = recovery.run()
        scheduler.start(runner.run, runner.clean_up)
        janitor.start(strays)
        server.start()
        self._watch_over(scheduler, store, janitor, server, root_watch)
        if told := _capacity_warning(capacity, scheduler):
            log.warning("%s", told)
        return f"{server.scheme}://{server.authority}"

    def _open_root(self, closing: contextlib.ExitStack) -> None:
        """Makes the root this daemon's alone, and the log a file in it."""
        private_directory(self._root)
        closing.callback(os.close, lock_file(os.path.join(self._root, "lock")))
        directory = lock_directory(self._root)
        if directory is not None:
            closing.callback(os.close, directory)
        self._log_to(os.path.join(self._root, "logs"))

    def _watch_over(
        self, scheduler: Scheduler, store: Store, janitor: Janitor, server: Server, root_watch: RootWatch
    ) -> None:
        """Has all of it looked after from now on."""

        def is_healthy() -> bool:
            """Whether the threads live and the scheduler's lock can be taken; what lacks for a moment is no illness."""
            scheduler.pool()
            return store.is_alive() and janitor.is_alive() and server.is_alive()

        self._is_healthy = is_healthy
        root_watch.look()
        self._watches += [
            self._look_after_certificates,
            root_watch.look,
            server.fill_reserve,
            self._check_threads,
            self._ping_supervisor,
        ]
        if self._log_file:
            self._watches.append(self._log_file.restore)

    def _end_steps(self, scheduler: Scheduler) -> None:
        """Does with the running steps what --on_exit says."""
        scheduler.pause()
        if self._settings.on_exit == "stop":
            scheduler.stop_running()
        if self._settings.on_exit != "leave":
            while scheduler.pool().running and self._shutdown_requests < 2:
                self._supervisor.stopping()
                time.sleep(_POLL_INTERVAL_S / 10)
        running = scheduler.pool().running
        if running and self._settings.on_exit != "stop":
            log.warning(
                "%d %s; the next start adopts them", running, "step runs on" if running == 1 else "steps run on"
            )
        scheduler.stop()

    def _configure_log(self) -> None:
        log.setLevel(logging.DEBUG if self._settings.debug else logging.INFO)
        log.propagate = False
        threading.excepthook = _log_end_of_thread
        if sys.stderr:  # a Windows service has none
            self._error_stream = ErrorStream(sys.stderr)
            self._error_stream.start()
            self._log_by(self._error_stream)

    def _log_to(self, directory: str) -> None:
        with contextlib.suppress(OSError):  # it is there, or there is no room: then the file's lines are lost
            os.mkdir(directory)
        self._log_file = LogFile(os.path.join(directory, "remote_executor.log"))
        self._log_by(self._log_file)

    def _log_by(self, handler: logging.Handler) -> None:
        is_json = self._settings.log_format == "json"
        handler.setFormatter(JsonLines() if is_json else LineFormatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)


def _capacity_warning(capacity: StepCapacity, scheduler: Scheduler) -> str:
    """That the pool is larger than the limits of this host let it be, and what to do; empty when it is not."""
    size = scheduler.pool().size
    steps, limit = capacity
    if not limit or size <= steps:
        return ""
    return (
        f"--pool_size: {size} steps at once are too many here: {limit.name} is {limit.value}, which lets "
        f"{steps} run; raise that limit, or lower --pool_size{limit.also}"
    )


def _log_end_of_thread(ended: Any) -> None:
    """Tells of a thread that an exception ended, as `threading.excepthook`, which writes to standard error itself."""
    name = ended.thread.name if ended.thread else "unknown"
    with contextlib.suppress(MemoryError):
        log.critical("the thread %s has ended", name, exc_info=(ended.exc_type, ended.exc_value, ended.exc_traceback))


def _ignore_signals(numbers: Iterable[int]) -> None:
    """Has these signals do nothing; one that came just before is no error, as which CPython tells it."""
    hook = sys.unraisablehook

    def tell_all_but_signals(failed: Any) -> None:
        if not isinstance(failed.exc_value, OSError) or "race condition" not in str(failed.exc_value):
            hook(failed)

    sys.unraisablehook = tell_all_but_signals
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


# ======================================================================================================================
# VI program / supervisors: what starts the daemon and watches it
# ======================================================================================================================

SERVICE = "remote_executor"  # its name for every service manager
_START_S = 60.0  # that a service manager waits for, of the start and of each stage of the end


class SystemdSupervisor(Supervisor):
    """systemd, told over its socket (sd_notify(3), sd_watchdog_enabled(3)); silent where systemd is not there."""

    def __init__(self, address: str, watchdog_us: int) -> None:
        self._address = address
        self._beat_s = watchdog_us / 2e6  # half of what it waits for; 0 for never
        self._beaten_s = 0.0  # when the last beat was
        self._link: socket.socket | None = None  # kept, for a beat that lacks a descriptor would end the daemon

    @classmethod
    def of_environment(cls) -> SystemdSupervisor:
        """As the environment says; its words are taken out of it, for they are not meant for the steps."""
        address, watchdog, pid = (
            os.environ.pop(name, "") for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
        )
        is_meant = watchdog.isdigit() and pid in ("", str(os.getpid()))
        return cls(re.sub("^@", "\0", address), int(watchdog) if is_meant else 0)

    def ready(self, url: str) -> None:
        self._notify(f"READY=1\nSTATUS=listening on {url}")

    def watch(self, is_healthy: Callable[[], bool]) -> None:
        now_s = time.monotonic()
        if not self._beat_s or now_s - self._beaten_s < self._beat_s - _POLL_INTERVAL_S:
            return
        if is_healthy() and self._notify("WATCHDOG=1"):
            self._beaten_s = now_s

    def stopping(self) -> None:
        self._notify(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={int(_START_S * 1e6)}")

    def _notify(self, words: str) -> bool:
        """Whether systemd has taken it, or is not there."""
        if self._address:
            try:
                if not self._link:
                    self._link = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                    self._link.setblocking(False)
                self._link.sendto(words.encode(), self._address)
            except OSError:  # its queue is full, perhaps: it is told the next time
                return False
        return True


class WindowsSupervisor(Supervisor):
    """The service control manager, whose own threads call `_serve` and `_control` (Service Functions, MSDN)."""

    def __init__(self, settings: Settings) -> None:
        self._daemon = Daemon(settings, self)
        self._main = ServiceMain(self._serve)  # kept here, because the system keeps no reference
        self._handler = ServiceHandler(self._control)
        self._handle = 0
        self._status = ServiceStatus(ServiceType=SERVICE_WIN32_OWN_PROCESS)
        self._exit_code = 0

    def run(self) -> int | None:
        """Serves as a service; the exit code, None when no service control manager has started this process."""
        if not _started_by_scm():
            return None
        table = (ServiceEntry * 2)(ServiceEntry(SERVICE, self._main))
        try:
            StartServiceCtrlDispatcherW(table)
        except OSError as error:
            if getattr(error, "winerror", 0) == ERROR_FAILED_SERVICE_CONTROLLER_CONNECT:
                return None
            raise StartupError(f"the service control manager does not answer: {error}") from None
        return self._exit_code

    def ready(self, url: str) -> None:
        self._report(SERVICE_RUNNING)

    def stopping(self) -> None:
        self._report(SERVICE_STOP_PENDING)

    def _serve(self, _count: int, _arguments: int) -> None:
        """The service's own thread. A crash ends the process while it still counts as running: it is started again."""
        self._handle = RegisterServiceCtrlHandlerExW(SERVICE, self._handler, None)
        self._report(SERVICE_START_PENDING)
        try:
            self._exit_code = self._daemon.run()
        except StartupError as error:
            print_error(str(error))
            self._exit_code = 1
        except Exception:
            log.exception("the daemon failed")
            os._exit(1)
        self._report(SERVICE_STOPPED)

    def _control(self, control: int, _type: int, _data: int, _context: int) -> int:
        if control in (SERVICE_CONTROL_STOP, SERVICE_CONTROL_PRESHUTDOWN):
            self._report(SERVICE_STOP_PENDING)
            self._daemon.request_shutdown()
        elif control != SERVICE_CONTROL_INTERROGATE:  # the manager has the status already
            return int(ERROR_CALL_NOT_IMPLEMENTED)
        return 0

    def _report(self, state: int) -> None:
        status, is_pending = self._status, state in (SERVICE_START_PENDING, SERVICE_STOP_PENDING)
        status.CheckPoint = status.CheckPoint + 1 if is_pending else 0
        status.WaitHint = int(_START_S * 1000) if is_pending else 0
        status.ControlsAccepted = SERVICE_ACCEPT_STOP | SERVICE_ACCEPT_PRESHUTDOWN if state == SERVICE_RUNNING else 0
        status.Win32ExitCode = ERROR_SERVICE_SPECIFIC_ERROR if self._exit_code else 0
        status.ServiceSpecificExitCode = self._exit_code
        status.CurrentState = state
        with contextlib.suppress(OSError):  # the manager is gone; the daemon is not its child
            SetServiceStatus(self._handle, ctypes.byref(status))


def _started_by_scm() -> bool:
    """Whether the service control manager started this process, or its launcher, as an exe and a venv have one.

    It knows for certain, but may take ten seconds to say no.
    """
    table = {pid: (parent, name) for pid, parent, name in list_processes()}
    nobody = (0, "")
    parent = table.get(table.get(os.getpid(), nobody)[0], nobody)
    return "services.exe" in (parent[1], table.get(parent[0], nobody)[1])


def supervised_run(settings: Settings) -> int:
    """Runs the daemon for whatever has started it; the exit code. Raises StartupError."""
    if not ON_WINDOWS:
        return Daemon(settings, SystemdSupervisor.of_environment()).run()
    code = WindowsSupervisor(settings).run()
    return Daemon(settings, Supervisor()).run() if code is None else code


def print_error(text: str) -> None:
    """Tells a person a line: on standard error, in the event log of Windows where there is none."""
    if sys.stderr:
        print(f"{SERVICE}: {text}", file=sys.stderr)
    elif ON_WINDOWS:
        with contextlib.suppress(OSError):
            source = RegisterEventSourceW(None, SERVICE)
            ReportEventW(source, EVENTLOG_ERROR_TYPE, 0, 0, None, 1, 0, ctypes.byref(_TEXT(text)), None)
            DeregisterEventSource(source)


def own_command() -> list[str]:
    """The words that run this program, as a frozen one, a zipapp or a file."""
    if getattr(sys, "frozen", False):
        return [sys.executable]
    path = os.path.abspath(__file__)
    while not os.path.isfile(path):  # within a zipapp
        path = os.path.dirname(path)
    # The python.exe of a virtual environment of Windows only starts another, which is not the service's process.
    return [getattr(sys, "_base_executable", sys.executable) if ON_WINDOWS else sys.executable, path]


def leave_step() -> None:
    """Begin again without the mark of the step that has started this daemon, whose stop would end it and its steps.

    The kernel shows the environment that a program began with, whatever it makes of it (proc_pid_environ(5)). A signal
    to the step's group must not reach the daemon either.
    """
    if ON_WINDOWS or STEP_ENV_VAR not in os.environ:
        return
    environment = {**os.environ, DAEMON_ENV_VAR: "1"}
    del environment[STEP_ENV_VAR]
    detach()
    command = [*own_command(), *sys.argv[1:]]
    with contextlib.suppress(OSError):  # the program has been replaced meanwhile: better with the mark than not at all
        os.execve(command[0], command, environment)


# ======================================================================================================================
# VI program / service managers: systemd, launchd, Windows' services
# ======================================================================================================================

_SERVICE_TITLE = "Remote executor"


class Services:
    """This host's service manager, as far as it concerns this program. Raises StartupError."""

    default_root = "/var/lib/remote_executor"

    def install(self, command: Sequence[str]) -> str:
        """Makes the command a service that starts with the host; tells what was written."""
        raise NotImplementedError

    def uninstall(self) -> str:
        """Stops the service and removes it; tells what was removed."""
        raise NotImplementedError

    def start(self) -> str:
        raise NotImplementedError

    def stop(self) -> str:
        raise NotImplementedError

    def status(self) -> tuple[int, str]:
        """The exit code by the convention of init scripts (LSB), 0 running, 3 not running, 4 not installed; a line."""
        raise NotImplementedError


class UnixServices(Services):
    """A service manager that reads a file; with $DESTDIR the file goes below it, and the manager is not called."""

    path = ""  # of the file

    def __init__(self, staging: str) -> None:
        self._staging = staging
        self._file = staging + self.path

    def install(self, command: Sequence[str]) -> str:
        self._check()
        try:
            os.makedirs(os.path.dirname(self._file), exist_ok=True)
            with open(self._file, "wb") as file:
                os.fchmod(file.fileno(), 0o644)
                file.write(self.content(command))
            self._installed()
        except OSError as error:
            raise StartupError(f"service: {error.filename} cannot be written: {error.strerror}") from None
        return f"wrote {self._file}"

    def uninstall(self) -> str:
        self._check()
        if not os.path.exists(self._file):
            raise NotInstalled(f"service: {self._file} is not there; nothing is installed")
        self._leave()
        os.unlink(self._file)
        self._installed()
        return f"removed {self._file}"

    def content(self, command: Sequence[str]) -> bytes:
        """The file that has the manager run the command."""
        raise NotImplementedError

    def _check(self) -> None:
        if os.geteuid() and not self._staging:
            raise StartupError("service: needs the rights of root; run it by sudo")

    def _installed(self) -> None:
        """The file has changed."""

    def _leave(self) -> None:
        """The file is about to go."""

    def _call(self, *command: str) -> str:
        """What a command of the manager printed; raises StartupError with it where the command fails."""
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except OSError as error:
            raise StartupError(f"service: {command[0]} cannot be run: {error.strerror}") from None
        said = " ".join(done.stdout.decode(errors="replace").split())
        if done.returncode:
            raise StartupError(f"service: `{' '.join(command)}` failed: {said}")
        return said


class SystemdServices(UnixServices):
    """systemd, by a unit file (systemd.service(5))."""

    path = f"/etc/systemd/system/{SERVICE}.service"

    def content(self, command: Sequence[str]) -> bytes:
        # The launcher of a frozen program is the process that systemd watches, and tells it nothing.
        kind = "exec" if getattr(sys, "frozen", False) else "notify\nWatchdogSec=60"
        return _UNIT.format(kind=kind, command=" ".join(_quote_unit_word(word) for word in command)).encode()

    def start(self) -> str:
        self._check()
        self._call("systemctl", "start", SERVICE)
        return self.status()[1]

    def stop(self) -> str:
        self._check()
        self._call("systemctl", "stop", SERVICE)
        return self.status()[1]

    def status(self) -> tuple[int, str]:
        if not os.path.exists(self._file):
            return 4, "not installed"
        shown = self._call("systemctl", "show", "--property=ActiveState,SubState,MainPID", SERVICE).split()
        facts = dict(fact.split("=", 1) for fact in shown)
        if facts.get("ActiveState") != "active":
            return 3, f"not running ({facts.get('ActiveState')}, {facts.get('SubState')}); see journalctl -u {SERVICE}"
        return 0, f"running, pid {facts.get('MainPID')}"

    def _installed(self) -> None:
        is_there = os.path.exists(self._file)
        if not self._staging:
            self._call("systemctl", "daemon-reload")
            if is_there:
                self._call("systemctl", "enable", SERVICE)
            return
        place, name = os.path.split(self._file)
        link = os.path.join(place, "multi-user.target.wants", name)  # which `enable` makes
        with contextlib.suppress(FileNotFoundError):
            os.unlink(link)
        if is_there:
            os.makedirs(os.path.dirname(link), exist_ok=True)
            os.symlink(f"../{name}", link)

    def _leave(self) -> None:
        if not self._staging:
            self._call("systemctl", "disable", "--now", SERVICE)


# KillMode: the steps are to outlive a restart of the daemon. OOMPolicy: one that takes too much memory does not end it.
_UNIT = f"""\
[Unit]
Description={_SERVICE_TITLE}
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
Type={{kind}}
ExecStart={{command}}
KillMode=process
OOMPolicy=continue
Restart=on-failure
RestartSec=5
LimitNOFILE=65536
TasksMax=infinity

[Install]
WantedBy=multi-user.target
"""


def _quote_unit_word(word: str) -> str:
    """A word of a command line of a unit file (systemd.service(5), systemd.syntax(7))."""
    word = word.replace("\\", r"\\").replace('"', r"\"").replace("%", "%%").replace("$", "$$")
    return word if re.fullmatch(r"[\w./:=@+,$%-]+", word) else f'"{word}"'


class LaunchdServices(UnixServices):
    """launchd of a Mac, by a property list (launchd.plist(5))."""

    default_root = "/var/db/remote_executor"
    path = f"/Library/LaunchDaemons/{SERVICE}.plist"

    def content(self, command: Sequence[str]) -> bytes:
        import plistlib

        return plistlib.dumps(
            {
                "Label": SERVICE,
                "ProgramArguments": list(command),
                "RunAtLoad": True,
                "KeepAlive": {"SuccessfulExit": False},
                "AbandonProcessGroup": True,  # the steps are to outlive a restart of the daemon
                "SoftResourceLimits": {"NumberOfFiles": 65536},
            },
            sort_keys=False,
        )

    def start(self) -> str:
        self._check()
        self._call("launchctl", "bootstrap", "system", self._file)
        return self.status()[1]

    def stop(self) -> str:
        self._check()
        self._call("launchctl", "bootout", f"system/{SERVICE}")
        return self.status()[1]

    def status(self) -> tuple[int, str]:
        if not os.path.exists(self._file):
            return 4, "not installed"
        try:
            found = re.search(r"\bpid = ([0-9]+)", self._call("launchctl", "print", f"system/{SERVICE}"))
        except StartupError:
            found = None
        return (0, f"running, pid {found[1]}") if found else (3, "not running")

    def _leave(self) -> None:
        if not self._staging and not self.status()[0]:
            self.stop()


class WindowsServices(Services):
    """The service control manager (Service Functions, MSDN)."""

    default_root = os.path.join(os.environ.get("PROGRAMDATA", r"C:\ProgramData"), "remote_executor")

    def install(self, command: Sequence[str]) -> str:
        line = subprocess.list2cmdline(command)
        with self._manager(SC_MANAGER_CONNECT | SC_MANAGER_CREATE_SERVICE) as manager:
            kinds = (SERVICE_ALL_ACCESS, SERVICE_WIN32_OWN_PROCESS, SERVICE_AUTO_START, SERVICE_ERROR_NORMAL)
            service = CreateServiceW(manager, SERVICE, _SERVICE_TITLE, *kinds, line, *[None] * 5)
            try:
                self._configure(service)
            except OSError:
                DeleteService(service)
                raise
            finally:
                CloseServiceHandle(service)
        return f"installed the service {SERVICE}: {line}"

    def uninstall(self) -> str:
        with self._service(SERVICE_ALL_ACCESS) as service:
            if self._query(service).CurrentState != SERVICE_STOPPED:
                self._stop(service)
            DeleteService(service)
        return f"removed the service {SERVICE}"

    def start(self) -> str:
        with self._service(SERVICE_ALL_ACCESS) as service:
            StartServiceW(service, 0, None)
            self._await(service, SERVICE_START_PENDING)
            code, line = self._describe(self._query(service))
        if code:
            raise StartupError(f"service: it did not start: {line}")
        return line

    def stop(self) -> str:
        with self._service(SERVICE_ALL_ACCESS) as service:
            self._stop(service)
            return self._describe(self._query(service))[1]

    def status(self) -> tuple[int, str]:
        try:
            with self._service(SERVICE_QUERY_STATUS) as service:
                return self._describe(self._query(service))
        except NotInstalled:
            return 4, "not installed"

    def _configure(self, service: int) -> None:
        """Tells what it is, has it started again after a crash, and gives it time when the host shuts down."""
        delays_ms = (1_000, 5_000, 30_000)
        actions = (ServiceAction * 3)(*(ServiceAction(SC_ACTION_RESTART, delay_ms) for delay_ms in delays_ms))
        failure = ServiceFailureActions(3600, None, None, len(actions), actions)
        for kind, value in (
            (SERVICE_CONFIG_DESCRIPTION, _TEXT("Runs scripts on this host, by an HTTP/JSON API.")),
            (SERVICE_CONFIG_FAILURE_ACTIONS, failure),
            (SERVICE_CONFIG_PRESHUTDOWN_INFO, _DWORD(int(_START_S * 1000))),
        ):
            ChangeServiceConfig2W(service, kind, ctypes.byref(value))
        with contextlib.suppress(OSError):  # Wine knows no such
            is_wide = _BOOL(True)  # after a start that failed too
            ChangeServiceConfig2W(service, SERVICE_CONFIG_FAILURE_ACTIONS_FLAG, ctypes.byref(is_wide))

    def _stop(self, service: int) -> None:
        ControlService(service, SERVICE_CONTROL_STOP, ctypes.byref(ServiceStatus()))
        self._await(service, SERVICE_STOP_PENDING)

    def _await(self, service: int, pending: int) -> None:
        """Waits while the service is on its way, as long as it goes on."""
        end_s, checkpoint = time.monotonic() + _START_S, -1
        while (status := self._query(service)).CurrentState == pending and time.monotonic() < end_s:
            if status.CheckPoint != checkpoint:
                end_s, checkpoint = time.monotonic() + _START_S, status.CheckPoint
            time.sleep(_POLL_S)

    def _describe(self, status: Any) -> tuple[int, str]:
        state = int(status.CurrentState)
        if state == SERVICE_RUNNING:
            return 0, f"running, pid {status.ProcessId}"
        code = status.ServiceSpecificExitCode or status.Win32ExitCode % ERROR_SERVICE_NEVER_STARTED
        words = {SERVICE_STOPPED: "not running", SERVICE_START_PENDING: "starting", SERVICE_STOP_PENDING: "stopping"}
        why = f" (exit code {code}; see the log in its root, and the event log)" if code else ""
        return 3, words.get(state, f"state {state}") + why

    def _query(self, service: int) -> Any:
        status, needed = ServiceStatus(), _DWORD()
        size = ctypes.sizeof(status)
        QueryServiceStatusEx(service, SC_STATUS_PROCESS_INFO, ctypes.byref(status), size, ctypes.byref(needed))
        return status

    @contextlib.contextmanager
    def _manager(self, access: int) -> Iterator[int]:
        """A handle of the manager; what it refuses is told in a line."""
        told = {
            ERROR_ACCESS_DENIED: "needs the rights of an administrator; use a prompt that was run as administrator",
            ERROR_SERVICE_EXISTS: "is installed already; `service uninstall` removes it",
            ERROR_SERVICE_ALREADY_RUNNING: "runs already",
            ERROR_SERVICE_NOT_ACTIVE: "does not run",
        }
        manager = 0
        try:
            manager = OpenSCManagerW(None, None, access)
            yield manager
        except OSError as error:
            code = getattr(error, "winerror", 0)
            if code == ERROR_SERVICE_DOES_NOT_EXIST:
                raise NotInstalled("service: is not installed; `service install` installs it") from None
            raise StartupError(f"service: {told.get(code, str(error))}") from None
        finally:
            if manager:
                CloseServiceHandle(manager)

    @contextlib.contextmanager
    def _service(self, access: int) -> Iterator[int]:
        """A handle of the service."""
        with self._manager(SC_MANAGER_CONNECT) as manager:
            service = OpenServiceW(manager, SERVICE, access)
            try:
                yield service
            finally:
                CloseServiceHandle(service)


def host_services() -> Services:
    """The service manager of this host."""
    if ON_WINDOWS:
        return WindowsServices()
    return (LaunchdServices if sys.platform == "darwin" else SystemdServices)(os.environ.get("DESTDIR", ""))


# ======================================================================================================================
# VI program / command line: flags, commands, main
# ======================================================================================================================

_PROGRAM = SERVICE
_SUMMARY = "Turns this host into a remote executor of scripts, by an HTTP/JSON API."
_COMMANDS = (
    ("help [<command>...]", "Show help."),
    ("run", "Run server"),
    ("service install|uninstall|start|stop|status", "Make it a service of this host, with the flags given to install."),
)
_SWITCHES = (
    ("help", "Show context-sensitive help (also try --help-long and --help-man)."),
    ("version", "Show application version."),
)


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of ending the program."""

    def error(self, message: str) -> Any:
        raise UsageError(message)


def parse_command_line(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The command with its words, and the flags that were given, by field, as text; raises UsageError."""
    parser = _Parser(prog=_PROGRAM, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", default=[])
    parser.add_argument("-h", "--help", dest="help", action="store_true")
    for name in ("help_long", "help_man", "version"):
        parser.add_argument(f"--{name}", dest=name, action="store_true")
    for name in ("help", "version"):
        parser.add_argument(f"--no_{name}", dest=name, action="store_false")
    for option in OPTIONS:
        if option.kind == "flag":
            parser.add_argument(f"--{option.field}", dest=option.field, action="store_true")
            parser.add_argument(f"--no_{option.field}", dest=option.field, action="store_false")
        else:
            action = "append" if option.kind == "list" else "store"
            checked = functools.partial(_checked_text, option)
            parser.add_argument(f"--{option.field}", dest=option.field, type=checked, action=action)
    given = vars(parser.parse_intermixed_args([_normalize_flag(word) for word in arguments]))
    return given.pop("words"), given


def _normalize_flag(word: str) -> str:
    """A flag with `_` between its words, as the table of options has it in its fields."""
    flag, equals, value = word.partition("=")
    return flag[:2] + flag[2:].replace("-", "_") + equals + value if flag.startswith("--") else word


def _flag_rows() -> Iterator[tuple[str, str]]:
    """Each flag as the help shows it, and what it is for."""
    yield "-h, --[no-]help", _SWITCHES[0][1]
    for option in OPTIONS:
        if option.kind == "flag":
            yield f"    --[no-]{option.name}", option.help
        else:
            default = _default(option)
            quoted = f'"{default}"' if option.kind in ("address", "path") else default
            yield f"    --{option.name}={quoted}", option.help
    yield "    --[no-]version", _SWITCHES[1][1]


def help_text(words: Sequence[str] = (), is_long: bool = False) -> str:
    """The help, of one command where it is named; raises UsageError."""
    commands = [row for row in _COMMANDS if not words or row[0].split()[0] == words[0]]
    if not commands:
        raise UsageError(
            f"unknown command {words[0]!r}; commands are {', '.join(row[0].split()[0] for row in _COMMANDS)}"
        )
    usage = f"usage: {_PROGRAM} {commands[0][0].split()[0] + ' ' if words else ''}[<flags>]"
    lines = [usage if words else usage + " <command> [<args> ...]", "", _SUMMARY, "", "Flags:"]
    for flag, text in _flag_rows():
        lines += [f"  {flag:<24}{text}"] if len(flag) < 23 else [f"  {flag}  ", " " * 26 + text]
    if not words or is_long:
        lines += ["", "Commands:"]
        for command, text in commands:
            lines += [command, f"    {text}", ""]
    return "\n".join(lines).rstrip() + "\n"


def manual_text() -> str:
    """The manual page, in the language of man(7)."""
    lines = [
        f'.TH {_PROGRAM} 1 "" "{__version__}"',
        ".SH NAME",
        f"{_PROGRAM} \\- {_SUMMARY[0].lower()}{_SUMMARY[1:-1]}",
    ]
    lines += [".SH SYNOPSIS", f".B {_PROGRAM}", "[<flags>] <command> [<args> ...]", ".SH OPTIONS"]
    for flag, text in _flag_rows():
        lines += [".TP", ".B " + flag.strip().replace("-", r"\-"), text]
    lines.append(".SH COMMANDS")
    for command, text in _COMMANDS:
        lines += [".TP", f".B {command}", text]
    return "\n".join(lines) + "\n"


def service_command(words: Sequence[str], given: Mapping[str, Any]) -> int:
    """Makes the daemon a service of this host, or controls it; the exit code. Raises UsageError and StartupError."""
    deed, services = words[0] if len(words) == 1 else "", host_services()
    if deed == "install":
        root = os.path.abspath(given.get("root", services.default_root))
        print(services.install([*own_command(), "run", *_to_argv({**given, "root": root})]))
        program = (subprocess.list2cmdline if ON_WINDOWS else shlex.join)(own_command())
        print(f"next: {program} service start; clients on other hosts need the token it will write in {root}")
        return 0
    if given:
        raise UsageError("only service install takes flags")
    if deed == "status":
        code, line = services.status()
        print(line)
        return code
    deeds = {"uninstall": services.uninstall, "start": services.start, "stop": services.stop}
    if deed not in deeds:
        raise UsageError(f"service takes one of install, {', '.join(deeds)} and status")
    print(deeds[deed]())
    return 0


def _to_argv(given: Mapping[str, Any]) -> Iterator[str]:
    """The flags that give this, paths made absolute."""
    for option in OPTIONS:
        value = given.get(option.field)
        if option.kind == "flag" and value is not None:
            yield f"--{'' if value else 'no-'}{option.name}"
        elif value is not None:
            for text in value if option.kind == "list" else [value]:
                yield f"--{option.name}={os.path.abspath(text) if option.kind == 'path' else text}"


def run_command(arguments: Sequence[str]) -> int:
    """Does what the command line says; the exit code. Raises UsageError and StartupError."""
    words, given = parse_command_line(arguments)
    if given.get("version"):
        print(version_line())
    elif given.get("help_man"):
        print(manual_text(), end="")
    elif given.get("help") or given.get("help_long") or not words or words[0] == "help":
        print(help_text(words[1:] if words[:1] == ["help"] else words, "help_long" in given), end="")
    elif words == ["run"]:
        settings = make_settings(given)
        leave_step()
        return supervised_run(settings)
    elif words[:1] == ["service"]:
        return service_command(words[1:], given)
    else:
        help_text(words)
        raise UsageError(f"{words[0]} takes no {words[1]!r}; see {_PROGRAM} help {words[0]}")
    return 0


def main() -> int:
    """The program; its exit code: 0, 1 when the daemon cannot start, 2 for a wrong command line."""
    try:
        return run_command(sys.argv[1:])
    except UsageError as error:
        print_error(f"{error}; see {_PROGRAM} help")
        return 2
    except StartupError as error:
        print_error(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
