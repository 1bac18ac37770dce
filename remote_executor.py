#!/usr/bin/env python3
"""remote_executor: a daemon that runs scripts on its host for clients of an HTTP/JSON API; one file, no dependencies.

    python3 remote_executor.py run --addr=:2376

A task is a directed acyclic graph of steps; a step is one script. A pool runs the steps, each behind a small wrapper
that writes its pid and its result into the step's own directory, so that a step outlives the daemon that started it.

The file reads from top to bottom, a section uses only what stands above it:

    I    foundations       errors, time, options, threads, logging
    II   operating system  Windows API, macOS processes, own process, private files, network peers, system information,
                           interpreters, step processes, POSIX processes, Windows processes
    III  tasks             task model, submission, dependency plan, metrics, step directory, store, scheduler, runner,
                           recovery, janitor
    IV   HTTP              messages, request parser, routing, authentication, connections
    V    API               web pages, schemas, task API, follow API, workspace API, operator API, profiling,
                           API document
    VI   program           daemon, supervisors, service managers, self test, client, client output, client commands,
                           command line

Glossary: a *task* is a graph of *steps*, each one script; its steps share a *workspace*, the task's own directory. A
*worker* is the thread of a running step, a *slot* its share of the pool. To *stop* a step is to kill its whole process
tree. A step that outlives its daemon is *adopted* by the next one; it is *lost* when its result cannot be known.
Damaged files are renamed into *quarantine*. A *token* authenticates a client; its *label* is the client's name in the
log. The *wrapper* is the small shell that runs a step's script and leaves its pid and its result on disk.

Threads: `main` waits for signals and makes periodic checks; `listener` accepts connections; one `connection` per
client, and two `reserve connection` for when no more can be started; one `step` per running step; `store` commits, many
changes at a time; `timekeeper` enforces deadlines and output limits; `sweeper` removes what has expired; `output watch`
looks at files that are followed; `log` writes to standard error. Under the service control manager of Windows `main`
belongs to the manager, and another thread runs the daemon.
"""

from __future__ import annotations

import argparse
import array
import binascii
import bisect
import codecs
import collections
import concurrent.futures
import contextlib
import datetime
import email.utils
import errno
import functools
import gc
import graphlib
import heapq
import html
import http.client
import http.server
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
from enum import Enum, IntEnum, unique
from typing import Any, Callable, NamedTuple, Protocol, TextIO, Union

__version__ = "1.0.0"

log = logging.getLogger("remote_executor")

# ======================================================================================================================
# I foundations / errors: which response or exit each becomes
# ======================================================================================================================


@(unique)  # needs Python 3.9 or later: an older one stops at this line, for its parentheses are of 3.9 (PEP 614)
class Code(IntEnum):
    """The `code` of a response that is not an error."""

    SUCCESS = 0
    IN_PROGRESS = 1001
    FAILED = 1002
    NOT_FOUND = 1003


class ApiError(Exception):
    """An error response: its HTTP `status`, the `code` of its body, and `headers` of its own."""

    status = 500
    code = 500
    headers: tuple[tuple[str, str], ...] = ()

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class NotFound(ApiError):
    status = 200  # clients of the original read the body; PowerShell's Invoke-RestMethod throws on a 4xx
    code = Code.NOT_FOUND


class BadRequest(ApiError):
    status = code = 400


class Unauthorized(ApiError):
    status = code = 401
    headers = (("WWW-Authenticate", 'Bearer realm="remote_executor"'),)


class Forbidden(ApiError):
    status = code = 403


class PathNotFound(ApiError):
    status = code = 404


class MethodNotAllowed(ApiError):
    status = code = 405

    def __init__(self, message: str, methods: Sequence[str]) -> None:
        super().__init__(message)
        self.methods = methods
        self.headers = (("Allow", ", ".join(methods)),)


class Conflict(ApiError):
    status = code = 409


class ContentTooLarge(ApiError):
    status = code = 413


class UnsupportedMediaType(ApiError):
    status = code = 415


class RangeNotSatisfiable(ApiError):
    status = code = 416

    def __init__(self, message: str, total_bytes: int) -> None:
        super().__init__(message)
        self.headers = (("Content-Range", f"bytes */{total_bytes}"),)


class TooManyRequests(ApiError):
    status = code = 429
    headers = (("Retry-After", "1"),)


class AuthRateLimited(TooManyRequests):
    headers = (("Retry-After", "60"),)


class Unavailable(ApiError):
    status = code = 503


class TooManyHeld(Unavailable):
    headers = (("Retry-After", "5"),)


class StorageFull(ApiError):
    status = code = 507


class LaunchError(Exception):
    """A step could not start; the text is the reason that its record shows."""


class StartupError(Exception):
    """The daemon or a command cannot do its work; the text is the one line that the user sees."""


class NotInstalled(StartupError):
    """This program is not installed as a service of this host."""


class UsageError(Exception):
    """The command line is wrong; the text is the one line that the user sees."""


# ======================================================================================================================
# I foundations / time: a clock that never jumps, Go's durations, RFC 3339
# ======================================================================================================================

_SECOND_NS = 10**9
_INT64_MAX = 2**63 - 1


def _find_sleep_clocks() -> tuple[int, int] | None:
    """Return the clock that stands still while the host sleeps, as time.monotonic() does, and the one that goes on.

    clock_gettime(3) of a Mac, where time.monotonic() is mach_absolute_time(); clock_gettime(2) of Linux. None where
    there are no two: on Windows time.monotonic() goes on.
    """
    for awake, always in (("CLOCK_UPTIME_RAW", "CLOCK_MONOTONIC_RAW"), ("CLOCK_MONOTONIC", "CLOCK_BOOTTIME")):
        if hasattr(time, awake) and hasattr(time, always):
            return getattr(time, awake), getattr(time, always)
    return None


_SLEEP_CLOCKS = _find_sleep_clocks()
_SLEEP_PRECISION_NS = 10**7


def _slept_ns() -> int:
    """Return how long the host has slept since it started, to which a constant may have been added."""
    if _SLEEP_CLOCKS is None:
        return 0
    awake_clock, always_clock = _SLEEP_CLOCKS
    while True:
        before_ns = time.clock_gettime_ns(awake_clock)
        always_ns = time.clock_gettime_ns(always_clock)
        after_ns = time.clock_gettime_ns(awake_clock)
        if after_ns - before_ns < _SLEEP_PRECISION_NS:  # else this thread had to wait between them
            return always_ns - after_ns


_Sleep = tuple[int, int]  # the time of the Clock at which the host woke, and how long it had slept by then, in all
_MAX_SLEEPS = 1000  # a closed laptop wakes some times an hour; what is older is shown as if it had been after them


class WallTimes(NamedTuple):
    """What the wall clock showed at times of the Clock: how far it is set ahead, and how long the host had slept."""

    offset_ns: int
    sleeps: tuple[_Sleep, ...]

    def at(self, moment_ns: int) -> int:
        last_woken_ns, last_slept_ns = self.sleeps[-1]
        if moment_ns >= last_woken_ns:  # nearly always, and three times as fast
            return moment_ns + self.offset_ns + last_slept_ns
        following = bisect.bisect_right(self.sleeps, (moment_ns, _INT64_MAX))
        slept_ns = self.sleeps[max(0, following - 1)][1]
        return moment_ns + self.offset_ns + slept_ns


class Clock:
    """The daemon's clock, in nanoseconds since the epoch; setting the host's clock does not move it. Thread-safe.

    Every stored time is of this clock, so that a change of the wall clock affects neither timeouts nor expiry. It
    stands still while the host sleeps, as time.monotonic() does: a step that may take two hours has not used them up
    when a lid was shut for eight. The sleeps are kept, for a time is shown as the wall clock had it: see WallTimes.
    """

    def __init__(self, base_ns: int, offset_ns: int = 0, boot: str = "", sleeps: Sequence[_Sleep] = ()) -> None:
        self._base_ns = base_ns  # to be added to the monotonic clock, which starts anew with each boot
        self._boot = boot
        self._lock = threading.Lock()  # guards all below
        self._offset_ns = offset_ns
        self._sleeps = tuple(sleeps) or ((0, 0),)  # in the order of time
        self._kernel_slept_ns = _slept_ns()  # when the last of them was noted

    @classmethod
    def resume(cls, metadata: Mapping[str, str], latest_ns: int, boot: str = "") -> Clock:
        """Return the clock of the daemon that stored `metadata`, or a new one that is not behind `latest_ns`.

        `boot` identifies this boot of the host.
        """
        offset_ns = 0
        sleeps: list[_Sleep] = []
        with contextlib.suppress(KeyError, ValueError, TypeError):  # the first start, or damaged metadata
            base_ns = int(metadata["clock_base_ns"])
            offset_ns = int(metadata["clock_offset_ns"])
            kernel_slept_ns, *pairs = json.loads(metadata.get("clock_sleeps", "[null]"))  # 1.0 stored none
            sleeps = [(int(woken_ns), int(slept_ns)) for woken_ns, slept_ns in pairs]
            if metadata["boot"] == boot:
                clock = cls(base_ns, offset_ns, boot, sleeps)
                if kernel_slept_ns is not None:
                    clock._kernel_slept_ns = int(kernel_slept_ns)
                return clock
        wall_ns = time.time_ns() - offset_ns
        if sleeps:
            wall_ns -= sleeps[-1][1]
        return cls(max(latest_ns, wall_ns) - time.monotonic_ns(), offset_ns, boot, sleeps)

    def metadata(self) -> dict[str, str]:
        """Return what `resume` needs."""
        wall_times = self.wall_times()
        return {
            "boot": self._boot,
            "clock_base_ns": str(self._base_ns),
            "clock_offset_ns": str(wall_times.offset_ns),
            "clock_sleeps": json.dumps([self._kernel_slept_ns, *wall_times.sleeps]),
        }

    def now_ns(self) -> int:
        self.sleeps()
        return time.monotonic_ns() + self._base_ns

    def monotonic_s(self, at_ns: int) -> float:
        """Return what time.monotonic() is at that time."""
        return (at_ns - self._base_ns) / _SECOND_NS

    def sleeps(self) -> tuple[_Sleep, ...]:
        """Return the sleeps of the host; each that has ended before a time is there when that time is asked for."""
        kernel_slept_ns = _slept_ns()
        if kernel_slept_ns - self._kernel_slept_ns < _SECOND_NS:  # nearly always, and without the lock
            return self._sleeps
        with self._lock:
            slept_ns = kernel_slept_ns - self._kernel_slept_ns
            if slept_ns >= _SECOND_NS:
                sleep = (time.monotonic_ns() + self._base_ns, self._sleeps[-1][1] + slept_ns)
                self._sleeps = (*self._sleeps, sleep)[-_MAX_SLEEPS:]
                self._kernel_slept_ns = kernel_slept_ns
            return self._sleeps

    def offset_ns(self) -> int:
        """Return how far the wall clock is set ahead of this one, sleep aside."""
        return self.wall_times().offset_ns

    def wall_times(self) -> WallTimes:
        """Return how to show times.

        The offset changes only when the wall clock was set by more than a second: a time that was shown does not
        flicker.
        """
        sleeps = self.sleeps()
        offset_ns = time.time_ns() - self.now_ns() - sleeps[-1][1]
        if abs(offset_ns - self._offset_ns) > _SECOND_NS:
            self._offset_ns = offset_ns
        return WallTimes(self._offset_ns, sleeps)


UNIT_NS = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,  # U+00B5, the micro sign
    "μs": 10**3,  # U+03BC, the Greek letter
    "ms": 10**6,
    "s": _SECOND_NS,
    "m": 60 * _SECOND_NS,
    "h": 3600 * _SECOND_NS,
    "d": 24 * 3600 * _SECOND_NS,  # which Go has not: a day is taken, but never shown
}
_DURATION_PART = re.compile(rf"(?=\.?[0-9])([0-9]*)(?:\.([0-9]*))?({'|'.join(UNIT_NS)})")


def parse_duration(text: str) -> int:
    """Parse a duration that is not negative as Go's time.ParseDuration does, or with days; return nanoseconds.

    Raise ValueError.
    """
    unsigned = text[1:] if text.startswith("+") else text
    total_ns = 0
    end = 0
    while part := _DURATION_PART.match(unsigned, end):
        whole, fraction, unit = part.groups()
        unit_ns = UNIT_NS[unit]
        total_ns += int(whole or 0) * unit_ns
        if fraction:
            total_ns += int(fraction) * unit_ns // 10 ** len(fraction)
        end = part.end()
    is_complete = unsigned == "0" or 0 < end == len(unsigned)
    if not is_complete or total_ns > _INT64_MAX:
        raise ValueError(f"invalid duration {text!r}: expected for example 90s, 1h30m or 500ms")
    return total_ns


def _format_decimal(value: int, scale: int) -> str:
    """Return value / scale, of which scale is a power of ten, exactly and without trailing zeros."""
    whole, rest = divmod(value, scale)
    if not rest:
        return str(whole)
    digits = len(str(scale)) - 1
    return f"{whole}.{rest:0{digits}d}".rstrip("0")


def format_duration(ns: int) -> str:
    """Return a duration of 0 ns or more as Go's time.Duration prints it: 47h53m30.619752642s, 1.5ms, 0s."""
    if ns == 0:
        return "0s"
    if ns < UNIT_NS["us"]:
        return f"{ns}ns"
    if ns < UNIT_NS["ms"]:
        return _format_decimal(ns, UNIT_NS["us"]) + "µs"
    if ns < _SECOND_NS:
        return _format_decimal(ns, UNIT_NS["ms"]) + "ms"
    minutes, rest_ns = divmod(ns, UNIT_NS["m"])
    seconds = _format_decimal(rest_ns, _SECOND_NS)
    if not minutes:
        return f"{seconds}s"
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes}m{seconds}s"
    return f"{hours}h{minutes}m{seconds}s"


_RFC_3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,9})\d*)?(?:([Zz])|([+ -]\d\d:\d\d))", re.ASCII
)


def parse_time(text: str) -> int:
    """Return the nanoseconds since the epoch of a time of RFC 3339. Raise ValueError.

    A space stands for the + that it was before it came in a URL.
    """
    match = _RFC_3339.fullmatch(text)
    try:
        if not match:
            raise ValueError
        date, clock, fraction, is_utc, offset = match.groups()
        zone = "+00:00" if is_utc else offset.replace(" ", "+")
        seconds = int(datetime.datetime.fromisoformat(f"{date}T{clock}{zone}").timestamp())
    except (ValueError, OverflowError):
        raise ValueError(f"invalid time {text!r}: expected for example 2022-11-18T16:14:23+08:00") from None
    return seconds * _SECOND_NS + int((fraction or "").ljust(9, "0"))


@functools.lru_cache(maxsize=4096)
def format_time(seconds: int) -> str:
    """Return a time, in whole seconds since the epoch, as RFC 3339 with the local offset."""
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat()


# ======================================================================================================================
# I foundations / options: the table of flags, how values are parsed, the settings
# ======================================================================================================================

MAX_POOL_SIZE = 10000


class Option(NamedTuple):
    """A flag: its name as the help shows it, the kind of its value, its default, its help, and what bounds it."""

    name: str
    kind: str  # flag, address, path, duration, count, size, choice, or of a list origin or network
    default: str
    help: str
    min: int = 0
    max: int = _INT64_MAX
    choices: tuple[str, ...] = ()

    @property
    def is_list(self) -> bool:
        return self.kind in ("origin", "network")

    @property
    def field(self) -> str:
        """The name of its attribute in Settings."""
        return self.name.replace("-", "_")


OPTIONS = (
    Option("addr", "address", ":2376", "host:port for execution."),
    Option("debug", "flag", "", "Enable debug messages"),
    Option("log_format", "choice", "text", "Log format: text or json.", choices=("text", "json")),
    Option("root", "path", "$TEMP/remote_executor", "Working root directory"),
    Option("key_expire", "duration", "48h", 'Set the database key expire time. Example: "key_expire=1h"', min=1),
    Option("exec_timeout", "duration", "24h", 'Set the exec command expire time. Example: "exec_timeout=30m"', min=1),
    Option("timeout", "duration", "30s", "Timeout for calling endpoints on the engine", min=1),
    Option("idle_timeout", "duration", "60s", "Maximum pause between two requests of a connection.", min=1),
    Option("profile_timeout", "duration", "1m", "Maximum duration of a profile or trace.", min=1),
    Option("max-requests", "count", "0", "Maximum number of concurrent requests. 0 to disable."),
    Option("pool_size", "count", "30", "Set the size of the execution work pool.", min=1, max=MAX_POOL_SIZE),
    Option("max_body", "size", "16MiB", "Maximum size of a request body. Larger ones get 413.", min=1),
    Option("max_output", "size", "1GiB", "Maximum output of a step, which is stopped beyond it. 0 to disable."),
    Option("token_file", "path", "$ROOT/token", "File of access tokens, one per line."),
    Option("require_token", "flag", "", "Require a token from clients on this host too."),
    Option("insecure", "flag", "", "Disable authentication: anyone who reaches the port can run code."),
    Option("cors_origin", "origin", "", "Origin whose web pages may call the API. Repeatable."),
    Option("trusted_proxy", "network", "", "Proxy whose Forwarded and X-Forwarded-* are believed. Repeatable."),
    Option("tls_cert", "path", "", "PEM file of this host's certificate. The port then speaks HTTPS only."),
    Option("tls_key", "path", "", "PEM file of the private key, unless it is in --tls_cert."),
    Option("tls_client_ca", "path", "", "PEM file of the CA whose client certificates are accepted like tokens."),
    Option("max_connections", "count", "512", "Maximum number of connections, at most 64 from one address.", min=16),
    Option(
        "on_exit",
        "choice",
        "leave",
        "What a graceful shutdown does with running steps: leave, wait or stop.",
        choices=("leave", "wait", "stop"),
    ),
)


Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


class Settings(NamedTuple):
    """The value of every option; durations in nanoseconds, sizes in bytes."""

    addr: str
    debug: bool
    log_format: str
    root: str
    key_expire: int
    exec_timeout: int
    timeout: int
    idle_timeout: int
    profile_timeout: int
    max_requests: int
    pool_size: int
    max_body: int
    max_output: int
    token_file: str
    require_token: bool
    insecure: bool
    cors_origin: tuple[str, ...]
    trusted_proxy: tuple[Network, ...]
    tls_cert: str
    tls_key: str
    tls_client_ca: str
    max_connections: int
    on_exit: str
    given: frozenset[str] = frozenset()  # the fields that were not left at their defaults


# Stricter than urllib.parse.urlsplit, which takes user@host, a path, and on Python 3.9 a port such as 2_376.
_ADDRESS = re.compile(r"(?:tcp://)?(?:\[([0-9A-Fa-f:.]+(?:%\w+)?)\]|([^\s:/\[\]]*)):([0-9]{1,5})")
_COUNT = re.compile("[0-9]{1,15}")
_SIZE = re.compile(r"([0-9]{1,15}) ?(?:([KMGT])i?)?B?", re.IGNORECASE)
# A scheme and a host (RFC 6454, 6.2), of whatever has pages: chrome-extension://..., tauri://localhost.
_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s]+")


def parse_address(text: str) -> tuple[str, int]:
    """Split host:port, [::1]:port or tcp://host:port; the host is empty for every address. Raise ValueError."""
    match = _ADDRESS.fullmatch(text)
    if not match or int(match[3]) > 65535:
        raise ValueError(f"invalid address {text!r}: expected for example :2376, 127.0.0.1:2376 or [::1]:2376")
    host = match[1] or match[2]
    return host, int(match[3])


def _parse_count(text: str) -> int:
    if not _COUNT.fullmatch(text):
        raise ValueError(f"invalid number {text!r}: expected for example 30")
    return int(text)


def _parse_size(text: str) -> int:
    """Return the bytes of a size; each prefix is a power of 1024, with or without `i`. Raise ValueError."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise ValueError(f"invalid size {text!r}: expected for example 16MiB or 1GiB")
    prefix = match[2] or " "
    exponent = " KMGT".index(prefix.upper())
    return int(match[1]) << 10 * exponent


def _parse_network(text: str) -> Network:
    """Return the network of this text, of an address that address alone. Raise ValueError."""
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        raise ValueError(f"invalid network {text!r}: expected for example 127.0.0.1, 10.0.0.0/8 or fd00::/8") from None


def _parse_value(option: Option, text: str) -> Any:
    """Return an int for a duration (ns), a count or a size (bytes), a Network, else the text. Raise ValueError."""
    if option.kind == "duration":
        return parse_duration(text)
    if option.kind == "count":
        return _parse_count(text)
    if option.kind == "size":
        return _parse_size(text)
    if option.kind == "choice" and text not in option.choices:
        raise ValueError(f"invalid choice {text!r}: expected one of {', '.join(option.choices)}")
    if option.kind == "network":
        return _parse_network(text)
    if option.kind == "origin" and not _ORIGIN.fullmatch(text):
        raise ValueError(f"invalid origin {text!r}: expected for example https://example.org")
    if option.kind == "address":
        parse_address(text)
    if not text:
        raise ValueError("must not be empty")
    return text


def _describe_range(option: Option) -> str:
    if option.kind != "count" and option.min:
        return "more than 0"
    if option.max < _INT64_MAX:
        return f"{option.min} to {option.max}"
    return f"{option.min} or more"


def check_argument(option: Option, text: str) -> str:
    """Return the text when it is a value of the option; raise argparse.ArgumentTypeError."""
    try:
        value = _parse_value(option, text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if isinstance(value, int) and not option.min <= value <= option.max:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range: expected {_describe_range(option)}")
    return text


def default_text(option: Option) -> str:
    """Return the default of an option as one would type it."""
    return option.default.replace("$TEMP", tempfile.gettempdir())


def default_root() -> str:
    """Return the root of a daemon that is given none."""
    return next(default_text(option) for option in OPTIONS if option.name == "root")


ENV_PREFIX = "REMOTE_EXECUTOR_"  # of the environment variables that stand for flags; steps see none that begins so
_SWITCHES = {"1": True, "true": True, "0": False, "false": False}


def variable_name(option: Option) -> str:
    """Return the name of the environment variable that gives an option."""
    return ENV_PREFIX + option.field.upper()


def _parse_variable(option: Option, text: str) -> Any:
    """Return a variable's value as the command line's parser would. Raise argparse.ArgumentTypeError."""
    if option.kind == "list":
        return [check_argument(option, word) for word in text.split()]
    if option.kind != "flag":
        return check_argument(option, text)
    if text.lower() not in _SWITCHES:
        raise argparse.ArgumentTypeError(f"invalid value {text!r}: expected true or false")
    return _SWITCHES[text.lower()]


def environment_flags(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the flags that an environment gives, as typed, by field; empty ones are as absent. Raise UsageError."""
    flags = {}
    for option in OPTIONS:
        name = variable_name(option)
        text = environ.get(name, "")
        try:
            if text:
                flags[option.field] = _parse_variable(option, text)
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{name}: {error}") from None
    return flags


def _setting(option: Option, flags: Mapping[str, Any]) -> Any:
    if option.kind == "flag":
        return flags.get(option.field, False)
    if option.is_list:
        texts = flags.get(option.field, ())
        return tuple(_parse_value(option, text) for text in texts)
    text = flags.get(option.field, default_text(option))
    if not text and not option.default:
        return ""
    return _parse_value(option, text)


def make_settings(flags: Mapping[str, Any]) -> Settings:
    """Return the settings: flags as typed, by field, over the defaults. Raise UsageError for those that conflict."""
    values = {option.field: _setting(option, flags) for option in OPTIONS}
    settings = Settings(**values, given=frozenset(flags))
    for name in ("tls_key", "tls_client_ca"):
        if values[name] and not settings.tls_cert:
            raise UsageError(f"--{name} needs --tls_cert, the certificate of this host")
    if settings.insecure and settings.require_token:
        raise UsageError("--insecure and --require_token exclude each other; use one of them")
    return settings


# ======================================================================================================================
# I foundations / threads: a start that never hangs
# ======================================================================================================================

_THREAD_START_S = 1.0  # enough for a thread to begin on a loaded host too


class DaemonThread(threading.Thread):
    """A daemon thread whose `start` never hangs: either it begins, or RuntimeError is raised and its target never runs.

    Thread.start() waits for ever for a thread that ran out of memory in its first frames (CPython issue 140746): seen
    in 2 of 12 runs under `ulimit -v 150000`, each time with the thread that accepts connections.
    """

    def __init__(
        self,
        target: Callable[..., Any],
        name: str,
        args: tuple[Any, ...] = (),
    ) -> None:
        super().__init__(target=target, name=name, args=args, daemon=True)
        self._started = _BoundedEvent()  # Thread's own attribute, which its `start` waits for
        # Popped, which is atomic, by whoever comes first: the thread that begins, or `start` that gives it up.
        self._claims = [True]

    def start(self) -> None:
        super().start()
        if self.ident is not None:
            return
        with contextlib.suppress(IndexError):  # it has begun after all
            self._claims.pop()
            raise RuntimeError(f"can't start new thread: it did not begin within {_THREAD_START_S} s")

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
# I foundations / logging: formatters, a stream that nobody may read, a file that rotates
# ======================================================================================================================


def _escape_unprintable(text: str) -> str:
    """Return the text with control characters, and all else that does not show, escaped."""
    if text.isprintable():
        return text
    escaped = []
    for character in text:
        if not character.isprintable():
            character = character.encode("unicode_escape").decode()
        escaped.append(character)
    return "".join(escaped)


class LineFormatter(logging.Formatter):
    """Formatter of lines of text: nothing in a record can end its line, colour it or reverse its direction."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = _escape_unprintable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        lines = super().formatException(ei).split("\n")
        return "\n".join(map(_escape_unprintable, lines))


class JournalFormatter(LineFormatter):
    """Formatter for systemd's journal: a line begins with its priority (sd-daemon(3)), the journal adds the time."""

    def format(self, record: logging.LogRecord) -> str:
        priority = _SYSLOG_PRIORITIES.get(record.levelno, 6)
        lines = super().format(record).split("\n")
        return "\n".join(f"<{priority}>{line}" for line in lines)


_SYSLOG_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.DEBUG: 7}


def is_journal(stream: TextIO) -> bool:
    """Return whether a stream is systemd's journal (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # it is closed, or none of the system
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class JsonFormatter(logging.Formatter):
    """Formatter of JSON Lines: an object of time, level, message, thread, the record's log_fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        created = datetime.datetime.fromtimestamp(record.created).astimezone()
        event = {
            "time": created.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "message": record.getMessage(),
            "thread": record.threadName,
        }
        event.update(getattr(record, "log_fields", {}))
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event)  # in ASCII, which every collector and every locale takes


_MAX_UNWRITTEN = 2**20  # characters, some thousand lines
_FLUSH_S = 1.0
_STREAM_RETRY_S = 0.05
_LOG_STACK_BYTES = 512 * 1024  # it calls nothing deep; the usual 8 MB are what `ulimit -v` lacks first


class QueuedStreamHandler(logging.Handler):
    """Handler that writes the log to a stream in a thread of its own: no thread that logs waits for a slow reader.

    At most `_MAX_UNWRITTEN` characters wait to be written. Lines beyond are dropped, and one line says how many when
    the stream takes lines again.
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
        self._is_stuck = False  # the last flush had to give up

    def start(self) -> None:
        """Start the thread that writes. Call it in the daemon's main thread, before others are started."""
        usual_bytes = threading.stack_size(_LOG_STACK_BYTES)
        try:
            DaemonThread(self._run, "log").start()
        finally:
            threading.stack_size(usual_bytes)

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line; it is formatted here, since what its arguments refer to may change."""
        try:
            line = self.format(record)
        except Exception:
            line = f"a log record cannot be formatted: {logging.Formatter().formatException(sys.exc_info())}"
        with self._changed:
            if self._size + len(line) > _MAX_UNWRITTEN:
                self._dropped += 1
            else:
                self._append(line)
                self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all is written, or the stream takes nothing for a second."""
        with self._changed:
            while self._unwritten and not self._is_stuck:
                is_shorter = functools.partial(self._is_shorter_than, len(self._unwritten))
                if not self._changed.wait_for(is_shorter, _FLUSH_S):
                    self._is_stuck = True

    def write(self, line: str) -> bool:
        """Write a line now, however long that takes. Return False when it cannot be written."""
        try:
            if self._is_text:
                self._file.write(line + "\n")
                return True
            encoded = (line + os.linesep).encode(self._encoding, "backslashreplace")
            data = memoryview(encoded)
            while data:
                count = self._file.write(data)
                if count is None:  # full, and made non-blocking by another process that shares the stream
                    time.sleep(_STREAM_RETRY_S)
                else:
                    data = data[count:]
        except (OSError, ValueError):  # it is closed, or nobody reads it any more
            return False
        return True

    def _run(self) -> None:
        while True:
            try:
                self._write_next()
            except Exception:
                with contextlib.suppress(MemoryError):  # of logging; the thread has to go on
                    log.exception("a line of the log cannot be written")
                time.sleep(_STREAM_RETRY_S)

    def _write_next(self) -> None:
        """Wait for a line and write it; one that cannot be written counts as dropped."""
        with self._changed:
            self._changed.wait_for(lambda: self._unwritten)
            line = self._unwritten[0]
        is_written = self.write(line)
        with self._changed:
            self._unwritten.popleft()
            self._size -= len(line)
            if is_written:
                self._is_stuck = False
            else:
                self._dropped += 1
            if self._dropped and is_written and not self._unwritten:
                self._append(self._drop_notice())
                self._dropped = 0
            self._changed.notify_all()

    def _append(self, line: str) -> None:
        self._unwritten.append(line)
        self._size += len(line)

    def _is_shorter_than(self, count: int) -> bool:
        return len(self._unwritten) < count

    def _drop_notice(self) -> str:
        text = f"{self._dropped} lines of the log were dropped: nobody read standard error"
        record = logging.makeLogRecord({"levelname": "WARNING", "msg": text})
        return self.format(record)


_LOG_FILE_BYTES = 10 * 2**20
_LOG_FILE_BACKUPS = 5
_ROTATION_RETRY_S = 60.0


class LogFile(logging.handlers.RotatingFileHandler):
    """Handler that writes the log to a file and rotates it; while it cannot be written, the daemon goes on without."""

    def __init__(self, path: str) -> None:
        super().__init__(
            path,
            maxBytes=_LOG_FILE_BYTES,
            backupCount=_LOG_FILE_BACKUPS,
            encoding="utf-8",
            delay=True,
        )
        self._rotate_after_s = 0.0  # of time.monotonic()
        self._has_warned = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, into a new file where the last one was deleted, or renamed as logrotate(8) does."""
        self._close_if_moved()
        super().emit(record)

    def reopen(self) -> None:
        """Have the next line open the file again."""
        with self.lock or contextlib.nullcontext():
            self._close_stream()

    def shouldRollover(self, record: logging.LogRecord) -> int:
        if time.monotonic() < self._rotate_after_s:
            return False
        return super().shouldRollover(record)

    def doRollover(self) -> None:
        """Rotate, unless somebody reads the file: Windows would refuse to rename it after all older ones had moved."""
        self._close_stream()
        try:
            os.rename(self.baseFilename, self.baseFilename + ".next")
            os.rename(self.baseFilename + ".next", self.baseFilename)
            super().doRollover()
        except OSError:
            self._rotate_after_s = time.monotonic() + _ROTATION_RETRY_S

    def handleError(self, record: logging.LogRecord) -> None:
        """Warn once that the file cannot be written; standard error has the record too."""
        if self._has_warned:
            return
        self._has_warned = True  # before the warning, which comes back here
        with contextlib.suppress(MemoryError):  # of logging, from whichever thread logs
            log.warning("the log file %s cannot be written: %s", self.baseFilename, sys.exc_info()[1])

    def _close_if_moved(self) -> None:
        """Close the file, and make its directory, where its name is another file's or no more."""
        if not self.stream:
            return
        with contextlib.suppress(OSError):  # it is gone
            if os.path.samestat(os.stat(self.baseFilename), os.fstat(self.stream.fileno())):
                return
        self._close_stream()
        with contextlib.suppress(OSError):  # it is there, or the root is gone too, which its watch tells
            os.mkdir(os.path.dirname(self.baseFilename))

    def _close_stream(self) -> None:
        """Close the file; the next record opens it again."""
        if self.stream:
            self.stream.close()
            self.stream = None


# ======================================================================================================================
# II operating system / Windows API: constants, structures and prototypes
# ======================================================================================================================

ON_WINDOWS = sys.platform == "win32"
ON_LINUX = sys.platform.startswith("linux")
ON_MAC = sys.platform == "darwin"


if ON_WINDOWS:
    import ctypes
    from ctypes import wintypes

    # By name, for elsewhere ctypes has none of them, which a type checker there would report.
    _WinDLL = vars(ctypes)["WinDLL"]
    _get_last_error = vars(ctypes)["get_last_error"]
    _WinError = vars(ctypes)["WinError"]

    def _declare(library: Any, name: str, result: Any, *arguments: Any) -> Any:
        """Return a function of a system library, with its types set; its result 0 raises OSError."""
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
        function.errcheck = _raise_on_zero
        return function

    def _raise_on_zero(result: Any, _function: Any, _arguments: Any) -> Any:
        if not result:
            raise _WinError(_get_last_error())
        return result

    def _raise_on_invalid_handle(result: Any, _function: Any, _arguments: Any) -> Any:
        if result == INVALID_HANDLE_VALUE:
            raise _WinError(_get_last_error())
        return result

    _kernel32 = _WinDLL("kernel32", use_last_error=True)
    _HANDLE = wintypes.HANDLE
    _BOOL = wintypes.BOOL
    _DWORD = wintypes.DWORD
    _WORD = wintypes.WORD
    _INT = ctypes.c_int
    _UINT = wintypes.UINT
    _TEXT = wintypes.LPCWSTR
    _VOID = ctypes.c_void_p
    _HANDLE_OUT = ctypes.POINTER(_HANDLE)
    _BOOL_OUT = ctypes.POINTER(_BOOL)
    _DWORD_OUT = ctypes.POINTER(_DWORD)
    _TEXT_OUT = ctypes.POINTER(_TEXT)
    _VOID_OUT = ctypes.POINTER(_VOID)
    _TIME_OUT = ctypes.POINTER(wintypes.FILETIME)

    # Processes (Process and Thread Functions)
    SYNCHRONIZE = 0x0010_0000
    PROCESS_TERMINATE = 0x0001
    STILL_ACTIVE = 259  # the exit code of a process that has not ended
    PROCESS_DUP_HANDLE = 0x0040
    PROCESS_SET_QUOTA = 0x0100
    PROCESS_SUSPEND_RESUME = 0x0800
    PROCESS_QUERY_LIMITED_INFORMATION = 0x1000
    CREATE_SUSPENDED = 0x0000_0004
    CREATE_NO_WINDOW = 0x0800_0000
    OpenProcess = _declare(_kernel32, "OpenProcess", _HANDLE, _DWORD, _BOOL, _DWORD)
    GetCurrentProcess = _declare(_kernel32, "GetCurrentProcess", _HANDLE)
    GetProcessTimes = _declare(_kernel32, "GetProcessTimes", _BOOL, _HANDLE, _TIME_OUT, _TIME_OUT, _TIME_OUT, _TIME_OUT)
    GetExitCodeProcess = _declare(_kernel32, "GetExitCodeProcess", _BOOL, _HANDLE, _DWORD_OUT)
    TerminateProcess = _declare(_kernel32, "TerminateProcess", _BOOL, _HANDLE, _UINT)
    ENABLE_VIRTUAL_TERMINAL_PROCESSING = 0x0004
    GetConsoleMode = _declare(_kernel32, "GetConsoleMode", _BOOL, _HANDLE, _DWORD_OUT)
    SetConsoleMode = _declare(_kernel32, "SetConsoleMode", _BOOL, _HANDLE, _DWORD)
    NtResumeProcess = _WinDLL("ntdll").NtResumeProcess  # ResumeThread needs a handle that Popen has closed
    NtResumeProcess.argtypes = (_HANDLE,)
    SEM_FAILCRITICALERRORS = 0x0001
    SEM_NOGPFAULTERRORBOX = 0x0002
    SetErrorMode = _kernel32.SetErrorMode
    SetErrorMode.argtypes = (_UINT,)
    SetErrorMode.restype = _UINT
    SetDllDirectoryW = _declare(_kernel32, "SetDllDirectoryW", _BOOL, _TEXT)
    GetProcessHandleCount = _declare(_kernel32, "GetProcessHandleCount", _BOOL, _HANDLE, _DWORD_OUT)

    class ProcessMemory(ctypes.Structure):
        """PROCESS_MEMORY_COUNTERS_EX."""

        _fields_ = (
            ("Size", _DWORD),
            ("PageFaultCount", _DWORD),
            ("PeakWorkingSet", ctypes.c_size_t),
            ("WorkingSet", ctypes.c_size_t),
            ("PeakPagedPool", ctypes.c_size_t),
            ("PagedPool", ctypes.c_size_t),
            ("PeakNonPagedPool", ctypes.c_size_t),
            ("NonPagedPool", ctypes.c_size_t),
            ("Pagefile", ctypes.c_size_t),
            ("PeakPagefile", ctypes.c_size_t),
            ("Private", ctypes.c_size_t),
        )

    GetProcessMemoryInfo = _declare(
        _kernel32, "K32GetProcessMemoryInfo", _BOOL, _HANDLE, ctypes.POINTER(ProcessMemory), _DWORD
    )

    # Handles and waits (Synchronization Functions)
    DUPLICATE_SAME_ACCESS = 2
    WAIT_OBJECT_0 = 0
    WAIT_FAILED = 0xFFFF_FFFF
    ERROR_MORE_DATA = 234
    CloseHandle = _declare(_kernel32, "CloseHandle", _BOOL, _HANDLE)
    GENERIC_READ = 0x8000_0000
    OPEN_EXISTING = 3
    FILE_SHARE_ALL = 0x07  # FILE_SHARE_READ, WRITE and DELETE, the last of which os.open leaves out
    INVALID_HANDLE_VALUE = ctypes.c_void_p(-1).value
    CreateFileW = _kernel32.CreateFileW
    CreateFileW.argtypes = (_TEXT, _DWORD, _DWORD, _VOID, _DWORD, _DWORD, _HANDLE)
    CreateFileW.restype = _HANDLE
    CreateFileW.errcheck = _raise_on_invalid_handle
    CreateEventW = _declare(_kernel32, "CreateEventW", _HANDLE, _VOID, _BOOL, _BOOL, _TEXT)
    SetEvent = _declare(_kernel32, "SetEvent", _BOOL, _HANDLE)
    WaitForMultipleObjects = _kernel32.WaitForMultipleObjects
    WaitForMultipleObjects.argtypes = (_DWORD, _HANDLE_OUT, _BOOL, _DWORD)
    WaitForMultipleObjects.restype = _DWORD
    DuplicateHandle = _declare(
        _kernel32, "DuplicateHandle", _BOOL, _HANDLE, _HANDLE, _HANDLE, _HANDLE_OUT, _DWORD, _BOOL, _DWORD
    )

    # Job Objects
    JOB_OBJECT_QUERY = 0x0004
    JOB_OBJECT_ALL_ACCESS = 0x001F_003F
    # JOBOBJECTINFOCLASS
    JOB_OBJECT_BASIC_ACCOUNTING_INFORMATION = 1
    JOB_OBJECT_BASIC_PROCESS_ID_LIST = 3
    JOB_OBJECT_EXTENDED_LIMIT_INFORMATION = 9
    JOB_OBJECT_LIMIT_DIE_ON_UNHANDLED_EXCEPTION = 0x0400
    JOB_OBJECT_LIMIT_SILENT_BREAKAWAY_OK = 0x1000
    JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE = 0x2000

    class JobAccounting(ctypes.Structure):
        """JOBOBJECT_BASIC_ACCOUNTING_INFORMATION."""

        _fields_ = (
            ("TotalUser", ctypes.c_int64),
            ("TotalKernel", ctypes.c_int64),
            ("PeriodUser", ctypes.c_int64),
            ("PeriodKernel", ctypes.c_int64),
            ("PageFaults", _DWORD),
            ("Processes", _DWORD),
            ("ActiveProcesses", _DWORD),
            ("TerminatedProcesses", _DWORD),
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

    CreateJobObjectW = _declare(_kernel32, "CreateJobObjectW", _HANDLE, _VOID, _TEXT)
    OpenJobObjectW = _declare(_kernel32, "OpenJobObjectW", _HANDLE, _DWORD, _BOOL, _TEXT)
    AssignProcessToJobObject = _declare(_kernel32, "AssignProcessToJobObject", _BOOL, _HANDLE, _HANDLE)
    TerminateJobObject = _declare(_kernel32, "TerminateJobObject", _BOOL, _HANDLE, _UINT)
    SetInformationJobObject = _declare(_kernel32, "SetInformationJobObject", _BOOL, _HANDLE, _INT, _VOID, _DWORD)
    QueryInformationJobObject = _declare(
        _kernel32, "QueryInformationJobObject", _BOOL, _HANDLE, _INT, _VOID, _DWORD, _VOID
    )

    # Access control (Security Functions, Security Descriptor Definition Language)
    _advapi32 = _WinDLL("advapi32", use_last_error=True)
    TOKEN_QUERY = 0x0008
    TOKEN_USER = 1
    SDDL_REVISION_1 = 1
    OWNER_SECURITY_INFORMATION = 0x0000_0001
    DACL_SECURITY_INFORMATION = 0x0000_0004
    PROTECTED_DACL_SECURITY_INFORMATION = 0x8000_0000  # nothing is inherited from the parent directory
    LocalFree = _kernel32.LocalFree
    LocalFree.argtypes = (_VOID,)
    OpenProcessToken = _declare(_advapi32, "OpenProcessToken", _BOOL, _HANDLE, _DWORD, _HANDLE_OUT)
    GetTokenInformation = _declare(_advapi32, "GetTokenInformation", _BOOL, _HANDLE, _INT, _VOID, _DWORD, _DWORD_OUT)
    ConvertSidToStringSidW = _declare(_advapi32, "ConvertSidToStringSidW", _BOOL, _VOID, _TEXT_OUT)
    ConvertStringSecurityDescriptorToSecurityDescriptorW = _declare(
        _advapi32, "ConvertStringSecurityDescriptorToSecurityDescriptorW", _BOOL, _TEXT, _DWORD, _VOID_OUT, _VOID
    )
    ConvertSecurityDescriptorToStringSecurityDescriptorW = _declare(
        _advapi32,
        "ConvertSecurityDescriptorToStringSecurityDescriptorW",
        *(_BOOL, _VOID, _DWORD, _DWORD, _TEXT_OUT, _VOID),
    )
    ConvertStringSidToSidW = _declare(_advapi32, "ConvertStringSidToSidW", _BOOL, _TEXT, _VOID_OUT)
    LookupAccountSidW = _declare(
        _advapi32, "LookupAccountSidW", _BOOL, _TEXT, _VOID, _TEXT, _DWORD_OUT, _TEXT, _DWORD_OUT, _DWORD_OUT
    )
    _netapi32 = _WinDLL("netapi32")
    LG_INCLUDE_INDIRECT = 1
    NetUserGetLocalGroups = _netapi32.NetUserGetLocalGroups
    NetUserGetLocalGroups.argtypes = (_TEXT, _TEXT, _DWORD, _DWORD, _VOID_OUT, _DWORD, _DWORD_OUT, _DWORD_OUT)
    NetApiBufferFree = _netapi32.NetApiBufferFree
    NetApiBufferFree.argtypes = (_VOID,)
    GetSecurityDescriptorOwner = _declare(_advapi32, "GetSecurityDescriptorOwner", _BOOL, _VOID, _VOID_OUT, _BOOL_OUT)
    GetFileSecurityW = _declare(_advapi32, "GetFileSecurityW", _BOOL, _TEXT, _DWORD, _VOID, _DWORD, _DWORD_OUT)
    SetFileSecurityW = _declare(_advapi32, "SetFileSecurityW", _BOOL, _TEXT, _DWORD, _VOID)

    # The host's processes (Tool Help Functions)
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
    Process32FirstW = _kernel32.Process32FirstW
    Process32NextW = _kernel32.Process32NextW
    Process32FirstW.argtypes = (_HANDLE, ctypes.POINTER(ProcessEntry))
    Process32NextW.argtypes = (_HANDLE, ctypes.POINTER(ProcessEntry))

    # Services, as seen from within one (Service Functions)
    SERVICE_WIN32_OWN_PROCESS = 0x10
    SERVICE_STOPPED = 1
    SERVICE_START_PENDING = 2
    SERVICE_STOP_PENDING = 3
    SERVICE_RUNNING = 4
    SERVICE_CONTROL_STOP = 1
    SERVICE_CONTROL_INTERROGATE = 4
    SERVICE_CONTROL_PRESHUTDOWN = 15
    SERVICE_ACCEPT_STOP = 0x001
    SERVICE_ACCEPT_PRESHUTDOWN = 0x100
    ERROR_CALL_NOT_IMPLEMENTED = 120
    ERROR_SERVICE_SPECIFIC_ERROR = 1066
    ERROR_FAILED_SERVICE_CONTROLLER_CONNECT = 1063  # the process was not started by the service control manager

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
    ServiceMain = _function_type(None, _DWORD, _VOID)
    ServiceHandler = _function_type(_DWORD, _DWORD, _DWORD, _VOID, _VOID)

    class ServiceEntry(ctypes.Structure):
        """SERVICE_TABLE_ENTRYW."""

        _fields_ = (("ServiceName", _TEXT), ("ServiceProc", ServiceMain))

    _STATUS = ctypes.POINTER(ServiceStatus)
    StartServiceCtrlDispatcherW = _declare(
        _advapi32, "StartServiceCtrlDispatcherW", _BOOL, ctypes.POINTER(ServiceEntry)
    )
    RegisterServiceCtrlHandlerExW = _declare(
        _advapi32, "RegisterServiceCtrlHandlerExW", _HANDLE, _TEXT, ServiceHandler, _VOID
    )
    SetServiceStatus = _declare(_advapi32, "SetServiceStatus", _BOOL, _HANDLE, _STATUS)

    # Services, as installed and controlled from outside
    SC_MANAGER_CONNECT = 1
    SC_MANAGER_CREATE_SERVICE = 2
    SERVICE_ALL_ACCESS = 0xF01FF
    SERVICE_QUERY_CONFIG = 1
    SERVICE_QUERY_STATUS = 4
    SERVICE_NO_CHANGE = 0xFFFF_FFFF
    SERVICE_AUTO_START = 2
    SERVICE_ERROR_NORMAL = 1
    SC_STATUS_PROCESS_INFO = 0
    SERVICE_CONFIG_DESCRIPTION = 1
    SERVICE_CONFIG_FAILURE_ACTIONS = 2
    SERVICE_CONFIG_FAILURE_ACTIONS_FLAG = 4
    SERVICE_CONFIG_PRESHUTDOWN_INFO = 7
    SC_ACTION_RESTART = 1
    ERROR_ACCESS_DENIED = 5
    ERROR_SERVICE_ALREADY_RUNNING = 1056
    ERROR_SERVICE_DOES_NOT_EXIST = 1060
    ERROR_SERVICE_NOT_ACTIVE = 1062
    ERROR_SERVICE_LOGON_FAILED = 1069
    ERROR_SERVICE_NEVER_STARTED = 1077

    class ServiceAction(ctypes.Structure):
        """SC_ACTION; the delay is in milliseconds."""

        _fields_ = (("Type", _INT), ("Delay", _DWORD))

    class ServiceFailureActions(ctypes.Structure):
        """SERVICE_FAILURE_ACTIONSW; the reset period is in seconds."""

        _fields_ = (
            ("ResetPeriod", _DWORD),
            ("RebootMsg", _TEXT),
            ("Command", _TEXT),
            ("Actions", _DWORD),
            ("Action", ctypes.POINTER(ServiceAction)),
        )

    class ServiceConfig(ctypes.Structure):
        """QUERY_SERVICE_CONFIGW."""

        _fields_ = (
            ("ServiceType", _DWORD),
            ("StartType", _DWORD),
            ("ErrorControl", _DWORD),
            ("BinaryPathName", _TEXT),
            ("LoadOrderGroup", _TEXT),
            ("TagId", _DWORD),
            ("Dependencies", _TEXT),
            ("ServiceStartName", _TEXT),
            ("DisplayName", _TEXT),
        )

    OpenSCManagerW = _declare(_advapi32, "OpenSCManagerW", _HANDLE, _TEXT, _TEXT, _DWORD)
    OpenServiceW = _declare(_advapi32, "OpenServiceW", _HANDLE, _HANDLE, _TEXT, _DWORD)
    CreateServiceW = _declare(
        _advapi32, "CreateServiceW", _HANDLE, _HANDLE, _TEXT, _TEXT, *[_DWORD] * 4, _TEXT, _TEXT, _VOID,
        _TEXT, _TEXT, _TEXT,
    )  # fmt: skip
    ChangeServiceConfig2W = _declare(_advapi32, "ChangeServiceConfig2W", _BOOL, _HANDLE, _DWORD, _VOID)
    ChangeServiceConfigW = _declare(
        _advapi32, "ChangeServiceConfigW", _BOOL, _HANDLE, *[_DWORD] * 3, *[_TEXT] * 2, _VOID, *[_TEXT] * 4
    )
    QueryServiceConfigW = _declare(_advapi32, "QueryServiceConfigW", _BOOL, _HANDLE, _VOID, _DWORD, _DWORD_OUT)
    CommandLineToArgvW = _declare(
        _WinDLL("shell32", use_last_error=True), "CommandLineToArgvW", _TEXT_OUT, _TEXT, ctypes.POINTER(_INT)
    )
    StartServiceW = _declare(_advapi32, "StartServiceW", _BOOL, _HANDLE, _DWORD, _VOID)
    ControlService = _declare(_advapi32, "ControlService", _BOOL, _HANDLE, _DWORD, _STATUS)
    DeleteService = _declare(_advapi32, "DeleteService", _BOOL, _HANDLE)
    CloseServiceHandle = _declare(_advapi32, "CloseServiceHandle", _BOOL, _HANDLE)
    QueryServiceStatusEx = _declare(
        _advapi32, "QueryServiceStatusEx", _BOOL, _HANDLE, _INT, _STATUS, _DWORD, _DWORD_OUT
    )

    # Event log
    EVENTLOG_ERROR_TYPE = 1
    RegisterEventSourceW = _declare(_advapi32, "RegisterEventSourceW", _HANDLE, _TEXT, _TEXT)
    DeregisterEventSource = _declare(_advapi32, "DeregisterEventSource", _BOOL, _HANDLE)
    ReportEventW = _declare(
        _advapi32, "ReportEventW", _BOOL, _HANDLE, _WORD, _WORD, _DWORD, _VOID,
        _WORD, _DWORD, _TEXT_OUT, _VOID,
    )  # fmt: skip

# ======================================================================================================================
# II operating system / macOS processes: the process table, and what a process shows, by sysctl(3) and libproc
# ======================================================================================================================

# Nothing but the members that are read is declared, with offset and format as in the module struct, of a 64-bit kernel.
# The numbers are those of xnu-11417.101.15 (macOS 15.4); the offsets have been the same since macOS 10.14. Whether they
# are those of this kernel is found out once, by what it tells of this process: `MacKernel.find_difference`.


class Layout(NamedTuple):
    """A structure of the kernel's; `members` are offset and format of those that are read, by their names in C."""

    name: str
    size: int
    members: Mapping[str, tuple[int, str]]

    def read(self, buffer: bytes, member: str, start: int = 0) -> Any:
        """Return a member of the structure that begins at `start`."""
        offset, code = self.members[member]
        return struct.unpack_from(code, buffer, start + offset)[0]


KINFO_PROC = Layout(  # bsd/sys/sysctl.h, line 983; extern_proc in it: bsd/sys/proc.h, line 102
    "kinfo_proc",
    648,
    {
        "kp_proc.p_starttime.tv_sec": (0, "<q"),
        "kp_proc.p_starttime.tv_usec": (8, "<i"),
        "kp_proc.p_stat": (36, "<B"),
        "kp_proc.p_pid": (40, "<i"),
        "kp_proc.p_comm": (243, "<17s"),
        "kp_eproc.e_ucred.cr_uid": (420, "<I"),
        "kp_eproc.e_ppid": (560, "<i"),
        "kp_eproc.e_pgid": (564, "<i"),
    },
)
PROC_BSDINFO = Layout(  # bsd/sys/proc_info.h, line 59
    "proc_bsdinfo",
    136,
    {
        "pbi_status": (4, "<I"),
        "pbi_xstatus": (8, "<I"),
        "pbi_pid": (12, "<I"),
        "pbi_ppid": (16, "<I"),
        "pbi_pgid": (100, "<I"),
        "pbi_start_tvsec": (120, "<Q"),
        "pbi_start_tvusec": (128, "<Q"),
    },
)
PROC_TASKINFO = Layout(  # bsd/sys/proc_info.h, line 127
    "proc_taskinfo",
    96,
    {
        "pti_virtual_size": (0, "<Q"),
        "pti_resident_size": (8, "<Q"),
        "pti_threadnum": (84, "<i"),
    },
)
PROC_FDINFO = Layout(  # bsd/sys/proc_info.h, line 673
    "proc_fdinfo",
    8,
    {
        "proc_fd": (0, "<i"),
        "proc_fdtype": (4, "<I"),
    },
)
VNODE_FDINFO = Layout(  # bsd/sys/proc_info.h, line 329; vinfo_stat in it: line 288
    "vnode_fdinfowithpath",
    1200,
    {
        "pfi.fi_openflags": (0, "<I"),
        "pvip.vip_vi.vi_stat.vst_dev": (24, "<I"),
        "pvip.vip_vi.vi_stat.vst_mode": (28, "<H"),
        "pvip.vip_vi.vi_stat.vst_ino": (32, "<Q"),
    },
)
MAC_LAYOUTS = (KINFO_PROC, PROC_BSDINFO, PROC_TASKINFO, PROC_FDINFO, VNODE_FDINFO)
_CTL_KERN = 1  # bsd/sys/sysctl.h: the names of sysctl(3)
_KERN_PROC = 14
_KERN_PROC_ALL = 0
_KERN_PROC_PID = 1
_KERN_PROCARGS2 = 49
_SZOMB = 5  # bsd/sys/proc.h, p_stat
_PROC_ALL_PIDS = 1  # bsd/sys/proc_info.h: the types of proc_listpids, the flavors of proc_pidinfo and proc_pidfdinfo
_PROC_PIDLISTFDS = 1
_PROC_PIDTBSDINFO = 3
_PROC_PIDTASKINFO = 4
_PROC_PIDFDVNODEPATHINFO = 2
_PROX_FDTYPE_VNODE = 1
_FWRITE = 2  # bsd/sys/fcntl.h, fi_openflags
_SLACK = 4096  # for what begins between the question for a size and the next call
_SYSCTL_ATTEMPTS = 10  # while a table grows faster than it is read
_ARGUMENTS_ATTEMPTS = 3
FileIdentity = tuple[int, int]  # device and inode
SysctlName = Union[str, tuple[int, ...]]  # as sysctlbyname(3) has it, or sysctl(3)


@functools.lru_cache(maxsize=1)
def c_library() -> Any:
    """Return the C library as ctypes has it, with errno."""
    import ctypes  # here, for it takes memory that a daemon on Linux need not

    return ctypes.CDLL(None, use_errno=True)


def read_sysctl(name: SysctlName, expected_bytes: int = 0) -> bytes:
    """Return a value of the Mac's kernel, in one call where it has no more than the expected size. Raises OSError.

    bsd/kern/kern_newsysctl.c of XNU: without a buffer a call returns the size, of a table with room to spare, and
    ENOMEM where that is too small by now.
    """
    import ctypes

    size = expected_bytes
    for _ in range(_SYSCTL_ATTEMPTS):
        size = size or call_sysctl(name, None, 0)
        buffer = ctypes.create_string_buffer(size)
        try:
            length = call_sysctl(name, buffer, size)
            return buffer.raw[:length]
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
        size = 0
    raise OSError(errno.EAGAIN, f"sysctl {name}: it grows too fast")


def call_sysctl(name: SysctlName, buffer: Any, size: int) -> int:
    """Return the bytes of a value of the Mac's kernel, copied to the buffer where there is one. Raises OSError."""
    import ctypes

    library = c_library()
    length = ctypes.c_size_t(size)
    value = (buffer, ctypes.byref(length), None, ctypes.c_size_t())
    if isinstance(name, str):
        result = library.sysctlbyname(name.encode(), *value)
    else:
        numbers = (ctypes.c_int * len(name))(*name)
        result = library.sysctl(numbers, ctypes.c_uint(len(name)), *value)
    if result:
        code = ctypes.get_errno()
        raise OSError(code, f"sysctl {name}: {os.strerror(code)}")
    return length.value


def file_identity(status: os.stat_result) -> FileIdentity:
    """Return what identifies a file, as MacKernel tells it: a device has 32 bits there, with a sign in Python."""
    return status.st_dev & 0xFFFF_FFFF, status.st_ino


class MacProcess(NamedTuple):
    """A live process; `start` is when it was started, in microseconds since the epoch."""

    pid: int
    parent: int
    group: int
    start: int
    user: int  # the effective one
    program: bytes  # the name of the file, at most 16 bytes

    @property
    def session(self) -> int:
        """The session, as it is now; the group where the process is gone."""
        try:
            return os.getsid(self.pid)
        except OSError:
            return self.group


class MacArguments(NamedTuple):
    """What a process was started with; no environment where the kernel hides it, as it does of Apple's programs."""

    arguments: list[bytes]
    environment: list[bytes]


class MacKernel:
    """What the kernel of macOS tells of processes. Thread-safe. Each call raises OSError; none gives wrong bytes."""

    def __init__(self) -> None:
        """Load the functions. Raises AttributeError where there are none, as on other systems of this family."""
        import ctypes

        library = c_library()
        pointer = ctypes.c_void_p
        number = ctypes.c_int
        self._ctypes = ctypes
        self._list_pids = library.proc_listpids
        self._list_pids.argtypes = [ctypes.c_uint32, ctypes.c_uint32, pointer, number]
        self._pid_info = library.proc_pidinfo
        self._pid_info.argtypes = [number, number, ctypes.c_uint64, pointer, number]
        self._fd_info = library.proc_pidfdinfo
        self._fd_info.argtypes = [number, number, number, pointer, number]
        self._table_bytes = 0  # of the process table when it was last read

    def list_processes(self) -> list[MacProcess]:
        """Return every live process but the kernel's: zombies are dead."""
        expected_bytes = self._table_bytes + self._table_bytes // 8
        table = read_sysctl((_CTL_KERN, _KERN_PROC, _KERN_PROC_ALL), expected_bytes)
        self._table_bytes = len(table)
        processes = []
        for start in range(0, len(table), KINFO_PROC.size):
            is_live = KINFO_PROC.read(table, "kp_proc.p_stat", start) != _SZOMB
            if is_live and KINFO_PROC.read(table, "kp_proc.p_pid", start):
                processes.append(_mac_process(table, start))
        return processes

    def start_of(self, pid: int) -> int:
        """Return when a process was started; 0 when it is gone or a zombie."""
        try:
            info = self._pid_structure(pid, _PROC_PIDTBSDINFO, PROC_BSDINFO)
        except ProcessLookupError:
            return 0
        except PermissionError:  # of another user's process the table alone tells
            record = read_sysctl((_CTL_KERN, _KERN_PROC, _KERN_PROC_PID, pid))
            is_live = record and KINFO_PROC.read(record, "kp_proc.p_stat") != _SZOMB
            return _mac_process(record, 0).start if is_live else 0
        seconds: int = PROC_BSDINFO.read(info, "pbi_start_tvsec")
        microseconds: int = PROC_BSDINFO.read(info, "pbi_start_tvusec")
        return seconds * 10**6 + microseconds

    def exit_status(self, pid: int) -> int | None:
        """Return the status of a zombie as wait(2) has it, and leave it a zombie; None where there is none."""
        try:
            info = self._pid_structure(pid, _PROC_PIDTBSDINFO, PROC_BSDINFO, zombies=1)
        except ProcessLookupError:
            return None
        status: int = PROC_BSDINFO.read(info, "pbi_xstatus")
        return status if PROC_BSDINFO.read(info, "pbi_status") == _SZOMB else None

    def memory(self) -> tuple[int, int, int]:
        """Return of this process the bytes that are resident, those of its address space, and its threads."""
        info = self._pid_structure(os.getpid(), _PROC_PIDTASKINFO, PROC_TASKINFO)
        resident: int = PROC_TASKINFO.read(info, "pti_resident_size")
        virtual: int = PROC_TASKINFO.read(info, "pti_virtual_size")
        threads: int = PROC_TASKINFO.read(info, "pti_threadnum")
        return resident, virtual, threads

    def arguments(self, pid: int) -> MacArguments | None:
        """Return what a process was started with; None in the middle of an exec.

        Empty where it is gone or another user's. The area is: argc, the path of the program, NULs, the arguments, the
        environment, NULs, and words of the kernel's own (bsd/kern/kern_sysctl.c, sysctl_procargsx).
        """
        for _ in range(_ARGUMENTS_ATTEMPTS):
            arguments = self._try_arguments(pid)
            if arguments is not None:
                return arguments
        return None

    def _try_arguments(self, pid: int) -> MacArguments | None:
        names = (_CTL_KERN, _KERN_PROCARGS2, pid)
        try:
            size = call_sysctl(names, None, 0) + _SLACK
            area = self._ctypes.create_string_buffer(size)
            length = call_sysctl(names, area, size)
        except OSError as error:
            if error.errno == errno.EIO:
                return None
            if error.errno == errno.EINVAL:
                return MacArguments([], [])
            raise
        if length >= size:  # too small for what it has become: the kernel gives the end of it then, without an error
            return None
        content: bytes = area.raw[4:length]
        count = struct.unpack_from("<i", area)[0]
        _, _, strings = content.partition(b"\0")
        words = strings.lstrip(b"\0").split(b"\0")
        return MacArguments(words[:count], [word for word in words[count:] if word])

    def written_files(self, pid: int) -> set[FileIdentity]:
        """Return the regular files that a process may write, by whatever descriptor; none where it is gone."""
        files = set()
        for descriptor in self._file_descriptors(pid):
            try:
                info = self._fd_structure(pid, descriptor)
            except OSError as error:
                if error.errno in (errno.EBADF, errno.ENOENT, errno.ESRCH, errno.EPERM):  # closed meanwhile
                    continue
                raise
            is_regular = stat.S_ISREG(VNODE_FDINFO.read(info, "pvip.vip_vi.vi_stat.vst_mode"))
            if is_regular and VNODE_FDINFO.read(info, "pfi.fi_openflags") & _FWRITE:
                files.add(_identity_of(info))
        return files

    def list_pids(self) -> list[int]:
        """Return the pids of all processes, zombies too: the one call here that needs no structure."""
        size = self._list_pids(_PROC_ALL_PIDS, 0, None, 0)
        pids = (self._ctypes.c_int * (size // 4 + _SLACK))()
        length = self._list_pids(_PROC_ALL_PIDS, 0, pids, self._ctypes.sizeof(pids))
        if length <= 0:
            raise self._error()
        return [pid for pid in pids[: length // 4] if pid]

    def find_difference(self) -> str:
        """Return in which structure this kernel is another than declared here, by what it tells of us; else nothing."""
        pid = os.getpid()
        record = read_sysctl((_CTL_KERN, _KERN_PROC, _KERN_PROC_PID, pid))
        if len(record) != KINFO_PROC.size:
            return f"kinfo_proc has {len(record)} bytes, {KINFO_PROC.size} were expected"
        own = _mac_process(record, 0)
        if own[:3] != (pid, os.getppid(), os.getpgrp()) or abs(own.start / 10**6 - time.time()) > _YEARS_S:
            return "kinfo_proc has other members"
        info = self._pid_structure(pid, _PROC_PIDTBSDINFO, PROC_BSDINFO)
        if PROC_BSDINFO.read(info, "pbi_pid") != pid or PROC_BSDINFO.read(info, "pbi_ppid") != own.parent:
            return "proc_bsdinfo has other members"
        if self.start_of(pid) != own.start:
            return "proc_bsdinfo has another start time"
        if self.memory()[0] <= 0:
            return "proc_taskinfo has other members"
        arguments = self.arguments(pid)
        if not arguments or not arguments.arguments:
            return "KERN_PROCARGS2 shows no arguments"
        return self._find_difference_of_file(pid)

    def _find_difference_of_file(self, pid: int) -> str:
        descriptor = os.open(os.devnull, os.O_WRONLY)
        try:
            status = os.fstat(descriptor)
            info = self._fd_structure(pid, descriptor)
            is_listed = descriptor in self._file_descriptors(pid)
        finally:
            os.close(descriptor)
        if not is_listed:
            return "proc_fdinfo has other members"
        is_same = _identity_of(info) == file_identity(status)
        mode = VNODE_FDINFO.read(info, "pvip.vip_vi.vi_stat.vst_mode")
        if is_same and mode == status.st_mode and VNODE_FDINFO.read(info, "pfi.fi_openflags") & 3 == _FWRITE:
            return ""
        return "vnode_fdinfowithpath has other members"

    # -- the calls

    def _error(self) -> OSError:
        number = self._ctypes.get_errno()
        return OSError(number, os.strerror(number))

    def _pid_structure(self, pid: int, flavor: int, layout: Layout, zombies: int = 0) -> bytes:
        """Return a structure that tells of a process. Raises OSError, where it has another size too."""
        buffer = self._ctypes.create_string_buffer(layout.size)
        length = self._pid_info(pid, flavor, zombies, buffer, layout.size)
        return self._checked(buffer, length, layout)

    def _fd_structure(self, pid: int, descriptor: int) -> bytes:
        """Return what tells of a file that a process has open. Raises OSError."""
        size = VNODE_FDINFO.size
        buffer = self._ctypes.create_string_buffer(size)
        length = self._fd_info(pid, descriptor, _PROC_PIDFDVNODEPATHINFO, buffer, size)
        return self._checked(buffer, length, VNODE_FDINFO)

    def _checked(self, buffer: Any, length: int, layout: Layout) -> bytes:
        if length <= 0:
            raise self._error()
        if length != layout.size:
            raise OSError(errno.EOVERFLOW, f"{layout.name} has {length} bytes, {layout.size} were expected")
        return bytes(buffer.raw)

    def _file_descriptors(self, pid: int) -> list[int]:
        """Return the descriptors of a process that are files; none where it is gone or another user's."""
        length = self._pid_info(pid, _PROC_PIDLISTFDS, 0, None, 0)
        table = b""
        while length > 0 and not table:
            size = length + _SLACK
            self._ctypes.set_errno(0)
            buffer = self._ctypes.create_string_buffer(size)
            length = self._pid_info(pid, _PROC_PIDLISTFDS, 0, buffer, size)
            if length + PROC_FDINFO.size <= size:  # else it is full, and may have been cut
                table = bytes(buffer.raw[:length])
        if length <= 0:
            number = self._ctypes.get_errno()
            if number in (0, errno.ESRCH, errno.EPERM):
                return []
            raise self._error()
        descriptors = []
        for start in range(0, len(table), PROC_FDINFO.size):
            if PROC_FDINFO.read(table, "proc_fdtype", start) == _PROX_FDTYPE_VNODE:
                descriptors.append(PROC_FDINFO.read(table, "proc_fd", start))
        return descriptors


def _identity_of(info: bytes) -> FileIdentity:
    """Return what identifies the file of a vnode_fdinfowithpath."""
    device: int = VNODE_FDINFO.read(info, "pvip.vip_vi.vi_stat.vst_dev")
    number: int = VNODE_FDINFO.read(info, "pvip.vip_vi.vi_stat.vst_ino")
    return device, number


_YEARS_S = 30 * 366 * 86400  # a start time further away is none; a clock that was never set shows 1970


def _mac_process(table: bytes, start: int) -> MacProcess:
    """Return the process of a record of the process table."""
    seconds = KINFO_PROC.read(table, "kp_proc.p_starttime.tv_sec", start)
    microseconds = KINFO_PROC.read(table, "kp_proc.p_starttime.tv_usec", start)
    program: bytes = KINFO_PROC.read(table, "kp_proc.p_comm", start)
    return MacProcess(
        KINFO_PROC.read(table, "kp_proc.p_pid", start),
        KINFO_PROC.read(table, "kp_eproc.e_ppid", start),
        KINFO_PROC.read(table, "kp_eproc.e_pgid", start),
        seconds * 10**6 + microseconds,
        KINFO_PROC.read(table, "kp_eproc.e_ucred.cr_uid", start),
        program.partition(b"\0")[0],
    )


def mac_pids() -> list[int]:
    """Return the pids of all processes, whatever this kernel's structures are; none where it lists none."""
    try:
        return MacKernel().list_pids()
    except AttributeError:
        return []


@functools.lru_cache(maxsize=1)
def mac_kernel() -> MacKernel | None:
    """Return what this kernel tells of processes; None, and a line in the log, where it is not as declared here."""
    try:
        kernel = MacKernel()
        difference = kernel.find_difference()
    except (OSError, AttributeError, ImportError) as error:
        difference = str(error)
    if not difference:
        return kernel
    log.warning(
        "the process table of this system is not as expected (%s): a stop ends the step's session and no more",
        difference,
    )
    return None


class ExitWatch:
    """A descriptor that becomes readable when a process ends; -1 where there is none (kqueue(2), EVFILT_PROC)."""

    def __init__(self, pid: int) -> None:
        self.descriptor = -1
        self._queue: Any = None
        if pid:
            with contextlib.suppress(OSError):  # it has ended, or no descriptor is free: it is looked at now and then
                self._queue = _watch_exit(pid)
                self.descriptor = self._queue.fileno()

    def close(self) -> None:
        """Close it; idempotent."""
        if self._queue is not None:
            self._queue.close()
        self.descriptor = -1


def _watch_exit(pid: int) -> Any:
    """Return a select.kqueue that becomes readable at the end of a process. Raises OSError, ESRCH of a zombie too."""
    api: Any = select  # whose kqueue mypy misses on other systems
    queue = api.kqueue()
    try:
        queue.control([api.kevent(pid, api.KQ_FILTER_PROC, api.KQ_EV_ADD, api.KQ_NOTE_EXIT)], 0)
    except OSError:
        queue.close()
        raise
    return queue


def is_alive(pid: int) -> bool:
    """Return whether a process lives, and is no zombie, without a structure of the kernel's. Raises OSError."""
    try:
        _watch_exit(pid).close()
    except ProcessLookupError:
        return False
    return True


# ======================================================================================================================
# II operating system / own process: descriptors, signals and environment of this process
# ======================================================================================================================

# The errno values of what is used up, in this process or on the host, and may be free again in a moment. Winsock has
# values of its own for sockets.
DESCRIPTOR_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE})
RESOURCE_ERRNOS = DESCRIPTOR_ERRNOS | {errno.ENOMEM, errno.ENOBUFS, getattr(errno, "WSAENOBUFS", errno.ENOBUFS)}
_SCARCITY_LOOK_S = 0.05
_DESCRIPTORS_PER_RESPONSE = 4  # the file of an output, the two directories above it, and one of the database


class DescriptorReserve:
    """Descriptors held open, to be released for what must not fail for want of one: a stop, a response. Thread-safe."""

    def __init__(self, count: int = 8) -> None:
        self._count = count
        self._lock = threading.Lock()  # guards all below
        self._held: list[int] = []
        self._borrowers = 0
        self._next_look_s = 0.0
        self._was_scarce = False  # at the last look
        self._probe = -1  # duplicated to learn whether others are free; never released

    def fill(self) -> None:
        """Hold as many descriptors as are free, at most `count`."""
        with self._lock, contextlib.suppress(OSError):  # what is missing is taken the next time
            if self._probe < 0:
                self._probe = os.open(os.devnull, os.O_RDONLY)
            while len(self._held) < self._count and not self._borrowers:
                self._held.append(os.open(os.devnull, os.O_RDONLY))

    def is_short(self) -> bool:
        """Return whether some are missing: all others are used, or they are lent."""
        self.fill()
        with self._lock:
            return len(self._held) < self._count

    @contextlib.contextmanager
    def lend(self) -> Iterator[None]:
        """Release them for as long as the block lasts; several may borrow at once."""
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
    def lend_if_scarce(self, look_now: bool = False) -> Iterator[None]:
        """Lend where hardly any other descriptor is free, by a look of this moment or of the last 50 ms."""
        if self._is_scarce(look_now):
            with self.lend():
                yield
        else:
            yield

    def _is_scarce(self, look_now: bool) -> bool:
        """Return whether few are free. Each call of a look lets another thread run: that slows many connections."""
        now_s = time.monotonic()
        if look_now or now_s >= self._next_look_s:
            self._next_look_s = now_s + _SCARCITY_LOOK_S
            self._was_scarce = not self._can_open_some()
        return self._was_scarce

    def _can_open_some(self) -> bool:
        copies: list[int] = []
        try:
            for _ in range(_DESCRIPTORS_PER_RESPONSE):
                copies.append(os.dup(self._probe))
        except OSError:
            return False
        finally:
            for copy in copies:
                os.close(copy)
        return True


def set_inherited_fds_cloexec() -> None:
    """Set close-on-exec on all descriptors above 2: what this process inherited is not for the steps.

    What Python opens itself is closed at exec already (PEP 446).
    """
    if sys.platform == "win32":
        return
    for name in os.listdir("/dev/fd"):
        descriptor = int(name)
        if descriptor > 2:
            with contextlib.suppress(OSError):  # the listing's own is closed by now
                os.set_inheritable(descriptor, False)


def _max_files_on_mac(soft: int, hard: int) -> int:
    """Return the highest soft limit that a Mac accepts, at least the present one.

    bsd/kern/kern_resource.c of XNU, dosetrlimit: none is above kern.maxfilesperproc; setrlimit(2): up to 10.15 an
    infinite one is EINVAL.
    """
    import resource

    try:
        most = int.from_bytes(read_sysctl("kern.maxfilesperproc"), sys.byteorder)
    except OSError:
        most = _OPEN_MAX
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    if soft == resource.RLIM_INFINITY:
        return most
    return max(most, soft)


_OPEN_MAX = 10_240  # <sys/syslimits.h> of a Mac


def raise_fd_limit() -> str:
    """Raise the soft limit of open files to the hard one, for each step takes a few; return what the soft one was."""
    if sys.platform == "win32":
        return ""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    raised = hard
    if ON_MAC:
        raised = _max_files_on_mac(soft, hard)
    with contextlib.suppress(ValueError, OSError):  # refused: the soft limit stays
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    return "unlimited" if soft == resource.RLIM_INFINITY else str(soft)


def reset_inherited_signals() -> None:
    """Unblock all signals and stop ignoring any: steps would inherit what is ignored or blocked (signal(7)).

    A handler that does nothing, in place of "ignored", becomes the default at exec: nohup protects us as before.
    """
    if sys.platform == "win32":
        return
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    reset_by_popen = (signal.SIGPIPE, signal.SIGXFSZ)  # which CPython itself ignores
    for number in signal.valid_signals():
        if number in reset_by_popen or signal.getsignal(number) is not signal.SIG_IGN:
            continue
        if number in _RESET_TO_DEFAULT:
            signal.signal(number, signal.SIG_DFL)
        else:
            signal.signal(number, _do_nothing)
    _reset_library_signals()


def has_terminal() -> bool:
    """Return whether this process has a controlling terminal (tty(4)): none any more once that has hung up."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY))
    except OSError:
        return False
    return True


def is_ansi_terminal(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that obeys ANSI sequences; a console of Windows is told to."""
    if not stream.isatty():
        return False
    if sys.platform != "win32":
        return os.environ.get("TERM", "dumb") != "dumb"
    import msvcrt

    handle = msvcrt.get_osfhandle(stream.fileno())
    mode = wintypes.DWORD()
    try:
        GetConsoleMode(handle, ctypes.byref(mode))
        SetConsoleMode(handle, mode.value | ENABLE_VIRTUAL_TERMINAL_PROCESSING)
    except OSError:  # before Windows 10
        return False
    return True


def detach() -> None:
    """Leave the session and the process group of the parent."""
    if sys.platform != "win32":
        with contextlib.suppress(PermissionError):  # it leads a group of its own already
            os.setsid()


def _do_nothing(*_: Any) -> None:
    """Handle a signal."""


# Whoever ignores SIGCHLD gets no exit code of a child; the next three are harmless by default. With a handler, a write
# to a terminal in the background would be tried again for ever (termios(3), TOSTOP).
_RESET_TO_DEFAULT = {
    getattr(signal, name, None) for name in ("SIGCHLD", "SIGCONT", "SIGURG", "SIGWINCH", "SIGTTIN", "SIGTTOU")
}
_RT_SIGACTION = {"x86_64": 13, "aarch64": 134, "riscv64": 134}  # rt_sigaction(2), by machine


def _reset_library_signals() -> None:
    """Set signals 32 and 33 to their defaults, which glibc's posix_spawn leaves ignored: only the kernel can.

    CPython 3.13.0, make and others start their children so.
    """
    system_call = _RT_SIGACTION.get(os.uname().machine)
    if not ON_LINUX or system_call is None or struct.calcsize("P") != 8:
        return
    ignored = 0
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("SigIgn:"):
                ignored = int(line.split()[1], 16)
    for number in (32, 33):
        if ignored >> (number - 1) & 1:
            import ctypes

            default_action = bytes(64)  # a struct of zeros: SIG_DFL
            ctypes.CDLL(None).syscall(system_call, number, default_action, None, 8)


def clean_pyinstaller_env() -> None:
    """Undo what the launcher of a frozen program did to the environment: it is not for the steps.

    PyInstaller's manual, "Launching external programs from the frozen application".
    """
    if not getattr(sys, "frozen", False):
        return
    for name in list(os.environ):
        if name.startswith(("_PYI_", "_MEIPASS")):
            del os.environ[name]
    for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"):
        os.environ.pop(name, None)
        original = os.environ.pop(name + "_ORIG", None)
        if original is not None:
            os.environ[name] = original
    if ON_WINDOWS:
        SetDllDirectoryW(None)


_FAILPOINT = os.environ.get("REMOTE_EXECUTOR_FAILPOINT")
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # the latter is TerminateProcess on Windows


def failpoint(name: str) -> None:
    """Kill this process if $REMOTE_EXECUTOR_FAILPOINT is this name: how the tests prove what a crash leaves."""
    if name == _FAILPOINT:
        os.kill(os.getpid(), _KILL)


# ======================================================================================================================
# II operating system / private files: the root, which is ours alone, and what steps may leave in it
# ======================================================================================================================


def set_private_umask() -> int:
    """Set the umask to 077 and return the earlier one, which steps get back."""
    return os.umask(0o077)


def make_private_directory(path: str) -> None:
    """Make a directory that only we can enter. Raises StartupError for a link, another's, or one open to others.

    An empty one is closed to others. One that holds something may be meant for them, as /var/lib is.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        raise StartupError(f"--root: {path!a} is not UTF-8, as responses show it; choose another name") from None
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        if _is_link(os.lstat(path)):
            raise StartupError(f"--root: {path} is a link; give the directory itself")
        if ON_WINDOWS:
            _restrict_windows_directory(path)
        else:
            _restrict_posix_directory(path)
    except OSError as error:
        raise StartupError(f"--root: {path} cannot be used: {error.strerror or error}") from None


def is_temporary(path: str) -> bool:
    """Return whether a path without links is in the host's temporary directory, which is cleaned at times."""
    place = os.path.realpath(tempfile.gettempdir())
    return os.path.join(path, "").startswith(os.path.join(place, ""))


def _restrict_posix_directory(path: str) -> None:
    """Take an empty directory's rights from all but its owner. Raises StartupError, OSError."""
    status = os.lstat(path)
    if status.st_uid != os.geteuid():
        raise StartupError(f"--root: {path} belongs to another user (uid {status.st_uid}); choose one of your own")
    if status.st_mode & 0o077:
        if not os.listdir(path):
            os.chmod(path, 0o700)
        if os.listdir(path):  # checked again, for they could write until now
            raise StartupError(f"--root: {path} is open to other users; `chmod 700` it or choose one of your own")


_SYSTEM_SID = "S-1-5-18"
_ADMINISTRATORS_SID = "S-1-5-32-544"


def _restrict_windows_directory(path: str) -> None:
    """Grant access to the system, administrators and ourselves alone, and so to all content. Raises StartupError."""
    if len(path) > _MAX_ROOT_LENGTH:
        raise StartupError(f"--root: {path} is too long for cmd.exe; use at most {_MAX_ROOT_LENGTH} characters")
    if path.startswith("\\\\?\\"):
        raise StartupError(f"--root: {path} has the prefix \\\\?\\, with which cmd.exe cannot work; give it without")
    if path.startswith("\\\\"):
        raise StartupError(f"--root: {path} is on a network share, where cmd.exe cannot work; choose a local directory")
    own_sid = _own_sid()
    owner = _owner_sid(path)
    entries = "".join(f"(A;OICI;FA;;;{sid})" for sid in ("SY", "BA", own_sid))  # allow, inherited, full access
    if owner not in (own_sid, _SYSTEM_SID, _ADMINISTRATORS_SID):
        _take_over(path, owner, f"O:{own_sid}D:P{entries}")
    is_empty = not os.listdir(path)
    wanted = ctypes.c_void_p()
    ConvertStringSecurityDescriptorToSecurityDescriptorW(f"D:P{entries}", SDDL_REVISION_1, ctypes.byref(wanted), None)
    try:
        if is_empty:
            SetFileSecurityW(path, DACL_SECURITY_INFORMATION | PROTECTED_DACL_SECURITY_INFORMATION, wanted)
        granted = _granted_sids(_read_security_descriptor(path, DACL_SECURITY_INFORMATION))
        others = granted - _granted_sids(wanted) - {"CO", "OW"}  # of content: who created it, who owns it
    finally:
        LocalFree(wanted)
    if others or (is_empty and os.listdir(path)):  # they could write until now
        who = ", ".join(sorted(others)) or "one has just written there"
        problem = f"--root: {path} is open to other users ({who})"
        raise StartupError(
            f"{problem}; give an empty directory, which is made private, or remove their rights by icacls"
        )


def _take_over(path: str, owner: str, security: str) -> None:
    """Make a root ours that a member of the administrators has used alone, if we may. Raises StartupError otherwise.

    Its database says what to run: another user's could have been put there to have us run it.
    """
    others = _granted_sids(_read_security_descriptor(path, DACL_SECURITY_INFORMATION)) - {owner, "SY", "BA", "CO", "OW"}
    if not others and _is_administrator(owner):
        with contextlib.suppress(OSError):  # we are neither the system nor an administrator
            set_security(path, security)
            return
    icacls = f'icacls "{path}" /setowner Administrators /T /C'
    raise StartupError(
        f"--root: {path} belongs to another user ({owner}); choose one of your own, or as an administrator: {icacls}"
    )


def _is_administrator(sid: str) -> bool:
    """Return whether a user is a member of the administrators, directly or by a group; False where nobody tells.

    NetUserGetLocalGroups of the Network Management Functions (MSDN); the group's name is of the host's language.
    """
    user = _account_name(sid)
    group = _account_name(_ADMINISTRATORS_SID).rpartition("\\")[2]
    if not user or not group:
        return False
    buffer = ctypes.c_void_p()
    count = _DWORD()
    no_limit = 0xFFFF_FFFF
    arguments = (0, LG_INCLUDE_INDIRECT, ctypes.byref(buffer), no_limit, ctypes.byref(count), ctypes.byref(_DWORD()))
    if NetUserGetLocalGroups(None, user, *arguments) or not buffer:
        return False
    try:
        return group in ctypes.cast(buffer, _TEXT_OUT)[: count.value]
    finally:
        NetApiBufferFree(buffer)


def _account_name(sid: str) -> str:
    """Return DOMAIN\\name of a SID string; empty where it has none."""
    binary = ctypes.c_void_p()
    name = ctypes.create_unicode_buffer(_MAX_ACCOUNT_NAME)
    domain = ctypes.create_unicode_buffer(_MAX_ACCOUNT_NAME)
    sizes = (_DWORD(_MAX_ACCOUNT_NAME), _DWORD(_MAX_ACCOUNT_NAME))
    try:
        ConvertStringSidToSidW(sid, ctypes.byref(binary))
        name_size, domain_size = map(ctypes.byref, sizes)
        LookupAccountSidW(None, binary, name, name_size, domain, domain_size, ctypes.byref(_DWORD()))
    except OSError:
        return ""
    finally:
        LocalFree(binary)
    return f"{domain.value}\\{name.value}"


_MAX_ACCOUNT_NAME = 512
_MAX_ROOT_LENGTH = 200  # so that a step's files stay below MAX_PATH, which cmd.exe cannot pass
_ACCESS_ENTRY = re.compile(r"\((\w+);[^()]*?;([^;()]+)(?:;\(.*?\))?\)")  # the type of an ACE, and its SID


def _granted_sids(descriptor: Any) -> set[str]:
    """Return to whom a security descriptor grants anything, as SID strings or their two-letter abbreviations.

    Source: Security Descriptor String Format (MSDN).
    """
    text = _TEXT()
    ConvertSecurityDescriptorToStringSecurityDescriptorW(
        descriptor, SDDL_REVISION_1, DACL_SECURITY_INFORMATION, ctypes.byref(text), None
    )
    try:
        entries = _ACCESS_ENTRY.findall(text.value or "")
    finally:
        LocalFree(ctypes.cast(text, ctypes.c_void_p))
    granted = {sid for kind, sid in entries if kind != "D"}
    return granted or {"everyone"}  # without a list there is no limit


def _own_sid() -> str:
    """Return the user of this process, as a SID string."""
    token = _HANDLE()
    user = ctypes.create_string_buffer(256)
    size = _DWORD()
    OpenProcessToken(GetCurrentProcess(), TOKEN_QUERY, ctypes.byref(token))
    try:
        GetTokenInformation(token, TOKEN_USER, user, len(user), ctypes.byref(size))
    finally:
        CloseHandle(token)
    return _sid_text(ctypes.c_void_p.from_buffer(user))  # TOKEN_USER begins with a pointer to the SID


def _owner_sid(path: str) -> str:
    """Return the owner of a file, as a SID string. Raises OSError."""
    descriptor = _read_security_descriptor(path, OWNER_SECURITY_INFORMATION)
    owner = ctypes.c_void_p()
    GetSecurityDescriptorOwner(descriptor, ctypes.byref(owner), ctypes.byref(_BOOL()))
    return _sid_text(owner)


def set_security(path: str, text: str) -> None:
    """Set owner and access list of a file, as far as this text has them. Raises OSError.

    Source: Security Descriptor String Format (MSDN).
    """
    parts = 0
    if "O:" in text:
        parts |= OWNER_SECURITY_INFORMATION
    if "D:P" in text:
        parts |= DACL_SECURITY_INFORMATION | PROTECTED_DACL_SECURITY_INFORMATION
    descriptor = ctypes.c_void_p()
    ConvertStringSecurityDescriptorToSecurityDescriptorW(text, SDDL_REVISION_1, ctypes.byref(descriptor), None)
    try:
        SetFileSecurityW(path, parts, descriptor)
    finally:
        LocalFree(descriptor)


def _read_security_descriptor(path: str, parts: int) -> Any:
    """Return these parts (SECURITY_INFORMATION) of a file's security descriptor. Raises OSError."""
    size = 1 << 16
    descriptor = ctypes.create_string_buffer(size)
    GetFileSecurityW(path, parts, descriptor, size, ctypes.byref(_DWORD()))
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
    """Lock a directory while the process lives; return the descriptor, None where the system has no such lock.

    It holds when the files in it are gone, and systemd-tmpfiles leaves alone what is locked so (tmpfiles.d(5)); while
    that cleans a directory it locks it itself, so this waits a little. Raises StartupError when another daemon has it.
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
                raise StartupError(f"--root: {path} is in use by another daemon; choose another root") from None
        except OSError:  # NFS locks only what can be written
            os.close(descriptor)
            return None
        time.sleep(0.05)


def lock_file(path: str) -> int:
    """Lock a file exclusively while the process lives; return the descriptor. Raises StartupError if it is locked."""
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
        root = os.path.dirname(path)
        raise StartupError(f"--root: {root} is in use by another daemon; choose another root") from None
    return descriptor


_HELD_RETRY_S = 5.0


def retry_while_held(action: Callable[..., Any], *arguments: Any) -> Any:
    """Return what an action on a file returns; on Windows retry for seconds while another process holds the file.

    A virus scanner, a backup or an indexer may, at any time and with any share mode. Raises OSError.
    """
    end_s = time.monotonic() + _HELD_RETRY_S
    while True:
        try:
            return action(*arguments)
        except PermissionError:  # the CRT tells a sharing violation as it tells missing rights (_dosmaperr)
            if not ON_WINDOWS or time.monotonic() > end_s:
                raise
        time.sleep(0.05)


def rename(path: str, new: str) -> None:
    """Rename a file or directory; on Windows retry for seconds. Raises OSError."""
    retry_while_held(os.rename, path, new)


_JUNCTION = 0xA000_0003  # IO_REPARSE_TAG_MOUNT_POINT


def _is_link(status: os.stat_result) -> bool:
    """Return whether this is a symbolic link, or a junction of Windows."""
    return stat.S_ISLNK(status.st_mode) or getattr(status, "st_reparse_tag", 0) == _JUNCTION


def ignore_links(directory: str, names: Sequence[str]) -> list[str]:
    """Return the names of links and junctions, as `ignore` of shutil.copytree, which follows junctions."""
    links = []
    for name in names:
        status = os.lstat(os.path.join(directory, name))
        if _is_link(status):
            links.append(name)
    return links


def is_real_directory(path: str) -> bool:
    """Return whether the path is a directory, and not a link to one."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and not _is_link(status)


def is_open_to_others(path: str) -> bool:
    """Return whether other users may read or write a file; on Windows its directory decides that."""
    return not ON_WINDOWS and os.stat(path).st_mode & 0o066 != 0


_O_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_SUPPORTS_DIR_FD = os.open in os.supports_dir_fd
_DIRECTORY_FLAGS = os.O_RDONLY | _O_NOFOLLOW | getattr(os, "O_DIRECTORY", 0)
_FILE_FLAGS = _O_NOFOLLOW | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_NEW_FILE_FLAGS = _FILE_FLAGS | os.O_WRONLY | os.O_CREAT | os.O_EXCL
_NO_FILES: Mapping[str, bytes] = types.MappingProxyType({})
_REMOVAL_S = 10.0  # for one directory, before others have their turn
# On Windows a directory inherits the rights on the root, which the daemon's user has elevated and not: CPython of 2024
# and later takes 0o700 for a list of its own (os.mkdir), on which that user stands as the owner alone.
_DIRECTORY_MODE = 0o777 if ON_WINDOWS else 0o700
# What Windows would take for another drive, a stream of a file (`a:b`), a pattern, or a device (Naming Files, MSDN).
_NO_WINDOWS_NAME = re.compile(
    r'.*[<>:"|?*\\\x00-\x1f].*|.*[. ]|(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3]) *(\..*)?',
    re.IGNORECASE | re.DOTALL,
)


def split_path(path: bytes) -> list[str]:
    """Return the names in a path that a client gave, for SafeDirectory; it is relative, whatever it begins with.

    Raises ValueError where a name leads elsewhere than to the entry of that name.
    """
    names = []
    for part in path.split(b"/"):
        if part:
            names.append(_entry_name(part))
    return names


def _entry_name(part: bytes) -> str:
    try:
        name = os.fsdecode(part)
    except UnicodeDecodeError:  # on Windows
        raise ValueError(f"name {part!r} is not UTF-8") from None
    if name in (".", ".."):
        raise ValueError(f"name {name!r} is not allowed in a path")
    if "\0" in name:
        raise ValueError(f"name {name!a} contains NUL")
    if ON_WINDOWS and _NO_WINDOWS_NAME.fullmatch(name):
        raise ValueError(f"name {name!a} is none that a file of Windows may have")
    return name


def _extended_path(path: str) -> str:
    """Return a path that Windows takes to the letter and at any length (Naming Files, MSDN); elsewhere the same one."""
    if ON_WINDOWS and not path.startswith("\\\\"):
        return rf"\\?\{path}"
    return path


def _check_spelling(directory: str, name: str) -> None:
    """Raise FileNotFoundError where a name is the short (8.3) one of an entry that has another name."""
    if "~" not in name or not os.path.lexists(os.path.join(directory, name)):
        return
    if name.casefold() not in {entry.casefold() for entry in os.listdir(directory)}:
        raise FileNotFoundError(errno.ENOENT, "is the short name of another entry", name)


def _open_shared(name: str, parent: int | None) -> int:
    """Open a file to read it, so that others may rename or remove it meanwhile. Raises OSError."""
    if not ON_WINDOWS:
        return os.open(name, os.O_RDONLY | _FILE_FLAGS, dir_fd=parent)
    import msvcrt

    handle = CreateFileW(name, GENERIC_READ, FILE_SHARE_ALL, None, OPEN_EXISTING, 0, None)
    open_handle = vars(msvcrt)["open_osfhandle"]
    try:
        return int(open_handle(handle, os.O_RDONLY | vars(os)["O_NOINHERIT"] | _FILE_FLAGS))
    except OSError:
        CloseHandle(handle)
        raise


class SafeDirectory:
    """A directory of ours, in whose content steps may have made anything. Thread-safe.

    Nothing in it is reached through a link: each directory is opened from the one above it, so that no exchange for a
    link in between leads out of it (CWE-22, 59, 367). Windows has no such calls: there the names are checked just
    before. A hard link is as good a name of its file as any: nothing is ever written through one.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._top = -1  # its descriptor, for as long as it is open
        self._mount = ""  # the only mount in which anything is reached; empty for any

    def open(self) -> None:
        """Keep the directory itself open, whatever becomes of its name. Raises OSError."""
        if _SUPPORTS_DIR_FD:
            self._top = os.open(self.path, _DIRECTORY_FLAGS)

    @contextlib.contextmanager
    def enter(self, *names: str) -> Iterator[SafeDirectory]:
        """Yield a directory in this one, which is open, as one of its own; nothing that is mounted there is reached.

        Raises OSError.
        """
        directory = SafeDirectory(os.path.join(self.path, *names))
        with self._directory(names) as descriptor:
            if descriptor is not None:
                directory._mount = self._mount or _mount_id(self._top)
                directory._check_mount(descriptor)
                directory._top = os.dup(descriptor)
        try:
            yield directory
        finally:
            if descriptor is not None:
                os.close(directory._top)

    def status(self, *names: str) -> os.stat_result:
        """Return the status of an entry, of a link itself. Raises OSError."""
        with self._parent(names) as (name, parent):
            return os.stat(name, dir_fd=parent, follow_symlinks=False)

    def entries(self) -> Iterator[os.DirEntry[str]]:
        """Yield the entries of the directory itself, which must be open, in no order. Raises OSError."""
        with os.scandir(self._top if _SUPPORTS_DIR_FD else _extended_path(self.path)) as entries:
            yield from entries

    def read(self, *names: str) -> io.FileIO:
        """Open a regular file. Raises OSError, also for all else: a pipe would block, a device has no end."""
        with self._parent(names) as (name, parent):
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)  # for opening alone may move a device
            if _is_link(status):
                raise OSError(errno.ELOOP, "is a link", name)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "is not a regular file", name)
            descriptor = retry_while_held(_open_shared, name, parent)
        try:
            self._check_mount(descriptor)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "is not a regular file", names[-1])
        except OSError:
            os.close(descriptor)
            raise
        return open(descriptor, "rb", buffering=0)

    @contextlib.contextmanager
    def temporary_file(self) -> Iterator[tuple[str, io.FileIO]]:
        """Yield name and file of a new one, which is removed unless `move_from` has moved it. Raises OSError.

        One that a killed daemon left belongs to no task: the next start removes it.
        """
        name = f"upload-{os.urandom(16).hex()}"
        with self._parent([name]) as (path, parent):
            file = io.FileIO(os.open(path, _NEW_FILE_FLAGS, 0o600, dir_fd=parent), "w")
        try:
            with file:
                yield name, file
        finally:
            with contextlib.suppress(FileNotFoundError):
                self.unlink(name)

    def move_from(self, other: SafeDirectory, name: str, *names: str) -> None:
        """Move a file of `other` into this directory, in place of what has its name; make directories on its way.

        Raises OSError, where the place is that of a directory too.
        """
        with other._parent([name]) as (source, source_parent), self._parent(names, may_make=True) as (target, parent):
            _replace(source, target, source_parent, parent)

    def copy_from(
        self,
        other: SafeDirectory,
        is_wanted: Callable[[], bool],
    ) -> None:
        """Copy all that is in `other`, as long as it is wanted: holes as holes, links as links; no pipe and no device.

        Nothing that is mounted there is copied. Raises OSError.
        """
        for entry in other.walk():
            if not is_wanted():
                return
            if _is_link(entry.status):
                self._copy_link(entry.directory, *entry.names)
            elif stat.S_ISDIR(entry.status.st_mode):
                self.make(*entry.names)
            elif stat.S_ISREG(entry.status.st_mode):
                self.copy_file(entry.directory, *entry.names)

    def walk(self) -> Iterator[WalkedEntry]:
        """Yield the entries at any depth, a directory before what is in it. Raises OSError."""
        pending: list[tuple[str, ...]] = [()]
        while pending:
            names = pending.pop()
            with contextlib.ExitStack() as closing:
                try:
                    directory = closing.enter_context(self.enter(*names))
                except OSError as error:
                    if error.errno != errno.EXDEV:
                        raise
                    continue  # it is mounted
                for entry in [*directory.entries()]:
                    status = directory.status(entry.name)
                    if stat.S_ISDIR(status.st_mode) and not _is_link(status):
                        pending.append((*names, entry.name))
                    yield WalkedEntry(directory, (*names, entry.name), status)

    def copy_file(self, other: SafeDirectory, *names: str) -> None:
        """Copy a regular file of `other`, with its times and rights, to where nothing is yet. Raises OSError.

        The last of the names is that of the file in `other` too.
        """
        with other.read(names[-1]) as source, self._parent(names) as (path, parent):
            status = os.fstat(source.fileno())
            descriptor = os.open(path, _NEW_FILE_FLAGS, 0o600, dir_fd=parent)
            with io.FileIO(descriptor, "w") as target:
                for begin, end in _data_ranges(source.fileno(), status.st_size):
                    _copy_range(source, target, begin, end)
                target.truncate(status.st_size)
                if not ON_WINDOWS:
                    os.chmod(descriptor, status.st_mode & 0o777)
                    os.utime(descriptor, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _copy_link(self, other: SafeDirectory, *names: str) -> None:
        with other._parent(names[-1:]) as (source, source_parent):
            destination = os.readlink(source, dir_fd=source_parent)
        with self._parent(names) as (path, parent):
            try:
                os.symlink(destination, path, dir_fd=parent)
            except OSError as error:
                if not ON_WINDOWS:
                    raise
                log.warning("the link %s cannot be copied: %s", path, error)  # that needs a right of its own there

    def unlink(self, *names: str) -> None:
        """Remove what is no directory, a link itself. Raises OSError."""
        with self._parent(names) as (name, parent):
            os.unlink(name, dir_fd=parent)

    def make(self, *names: str, content: Mapping[str, bytes] = _NO_FILES, may_exist: bool = False) -> None:
        """Make a directory, which must not exist yet, with these files in it, which never may. Raises OSError."""
        with self._parent(names) as (name, parent):
            try:
                os.mkdir(name, _DIRECTORY_MODE, dir_fd=parent)
            except FileExistsError:
                if not may_exist:
                    raise
            directory = None
            if content and parent is not None:
                directory = os.open(name, _DIRECTORY_FLAGS, dir_fd=parent)
        try:
            for file_name, data in content.items():
                path = os.path.join(name, file_name) if directory is None else file_name
                descriptor = os.open(path, _NEW_FILE_FLAGS, 0o600, dir_fd=directory)
                with io.FileIO(descriptor, "w") as file:
                    file.write(data)
        finally:
            if directory is not None:
                os.close(directory)

    def remove_empty(self, *names: str) -> None:
        """Remove a directory. Raises OSError where it is none, or not empty."""
        with self._parent(names) as (name, parent):
            os.rmdir(name, dir_fd=parent)

    def remove(self, *names: str) -> bool:
        """Remove a directory with all that is in it, but what is mounted there; return False when something is left.

        Raises OSError where no descriptor is free.
        """
        try:
            with self._parent(names) as (name, parent):
                if parent is None:
                    return _remove_by_path(name)
                return _remove(name, parent, _mount_id(parent))
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno in DESCRIPTOR_ERRNOS:
                raise
            return False

    @contextlib.contextmanager
    def _parent(self, names: Sequence[str], may_make: bool = False) -> Iterator[tuple[str, int | None]]:
        """Yield the last name and its directory's descriptor; where there are none, the whole path and None."""
        with self._directory(names[:-1], may_make) as descriptor:
            if descriptor is not None:
                yield names[-1], descriptor
                return
            directory = os.path.join(_extended_path(self.path), *names[:-1])
            if ON_WINDOWS:
                _check_spelling(directory, names[-1])
            yield os.path.join(directory, names[-1]), None

    @contextlib.contextmanager
    def _directory(self, names: Sequence[str], may_make: bool = False) -> Iterator[int | None]:
        """Yield the descriptor of a directory; None where there are none, when the path to it has no link."""
        if not _SUPPORTS_DIR_FD:
            _check_path(_extended_path(self.path), names, may_make)
            yield None
            return
        descriptor = self._top
        if descriptor < 0:
            descriptor = os.open(self.path, _DIRECTORY_FLAGS)
        try:
            for name in names:
                above = descriptor
                if may_make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, 0o700, dir_fd=above)
                descriptor = os.open(name, _DIRECTORY_FLAGS, dir_fd=above)
                if above != self._top:
                    os.close(above)
                self._check_mount(descriptor)
            yield descriptor
        finally:
            if descriptor != self._top:
                os.close(descriptor)

    def _check_mount(self, descriptor: int) -> None:
        """Raise OSError where what is open is on another mount than all that may be reached."""
        if self._mount and _mount_id(descriptor) != self._mount:
            raise OSError(errno.EXDEV, "is mounted")


class WalkedEntry(NamedTuple):
    """An entry of a tree: the directory that it is in, its names from the top, its own status."""

    directory: SafeDirectory
    names: tuple[str, ...]
    status: os.stat_result


_COPY_BLOCK_BYTES = 1 << 20


def _data_ranges(
    descriptor: int,
    size: int,
) -> Iterator[tuple[int, int]]:
    """Yield begin and end of what a file holds between its holes (lseek(2)); all of it where none are told."""
    if not hasattr(os, "SEEK_DATA"):
        yield 0, size
        return
    end = 0
    while end < size:
        try:
            begin = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nothing but a hole follows
                raise
            return
        end = os.lseek(descriptor, begin, os.SEEK_HOLE)
        yield begin, end


def _copy_range(
    source: io.FileIO,
    target: io.FileIO,
    begin: int,
    end: int,
) -> None:
    source.seek(begin)
    target.seek(begin)
    while begin < end:
        block = source.read(min(end - begin, _COPY_BLOCK_BYTES))
        if not block:
            return  # it has become shorter
        begin += len(block)
        while block:
            block = block[target.write(block) :]


def _check_path(path: str, names: Sequence[str], may_make: bool) -> None:
    """Raise OSError unless there are only directories from `path` along these names; make them where that may be."""
    for name in ("", *names):
        if name:
            if ON_WINDOWS:
                _check_spelling(path, name)
            path = os.path.join(path, name)
            if may_make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(path, _DIRECTORY_MODE)
        status = os.lstat(path)
        if _is_link(status) or not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "is not a directory", path)


def _replace(source: str, target: str, source_parent: int | None, target_parent: int | None) -> None:
    """Rename a file over what has the other name; on Windows retry for seconds. Raises OSError."""
    if ON_WINDOWS and os.path.isdir(target):  # for which it has the same error as for a file that is held
        raise IsADirectoryError(errno.EISDIR, "is a directory", target)
    replace = functools.partial(os.replace, src_dir_fd=source_parent, dst_dir_fd=target_parent)
    retry_while_held(replace, source, target)


def _remove(name: str, parent: int, mount: str) -> bool:
    """Remove whatever has this name, links themselves; return True. Raises OSError when something is left.

    Directories come up one level at a time, so that no depth needs a stack, a long path or many descriptors.
    """
    if _unlink(name, parent):
        return True
    top = _open_for_removal(name, parent, mount)
    end_s = time.monotonic() + _REMOVAL_S
    try:
        has_changed = True
        while has_changed and time.monotonic() < end_s:
            has_changed = False
            with os.scandir(top) as entries:
                for entry in entries:
                    if _unlink(entry.name, top) or _flatten_into_parent(entry.name, top, mount):
                        has_changed = True
        os.rmdir(name, dir_fd=parent)
    finally:
        os.close(top)
    return True


def _flatten_into_parent(name: str, top: int, mount: str) -> bool:
    """Move the directories of a directory of `top` into `top` and remove it; return whether anything has changed."""
    has_changed = False
    with contextlib.suppress(OSError):  # what cannot be removed stays: `remove` returns False
        directory = _open_for_removal(name, top, mount)
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if _unlink(entry.name, directory) or _move_up(entry.name, directory, top):
                        has_changed = True
        finally:
            os.close(directory)
        os.rmdir(name, dir_fd=top)
        has_changed = True
    return has_changed


def _unlink(name: str, parent: int) -> bool:
    """Remove what is no directory; return whether it is gone."""
    try:
        os.unlink(name, dir_fd=parent)
    except OSError:
        return False
    return True


def _move_up(name: str, directory: int, top: int) -> bool:
    """Move a directory into `top`, under a name that cannot be guessed; return whether it moved."""
    try:
        _grant_rights(name, directory)
        os.rename(name, f".{os.urandom(16).hex()}", src_dir_fd=directory, dst_dir_fd=top)
    except OSError:
        return False
    return True


def _open_for_removal(name: str, parent: int, mount: str) -> int:
    """Open a directory, with all rights on it. Raises OSError for a link and for what is mounted there."""
    with contextlib.suppress(PermissionError, NotImplementedError):  # then opening it raises
        _grant_rights(name, parent)
    descriptor = os.open(name, _DIRECTORY_FLAGS, dir_fd=parent)
    if _mount_id(descriptor) != mount:
        os.close(descriptor)
        raise OSError(errno.EXDEV, "is mounted", name)
    return descriptor


def _grant_rights(name: str, parent: int) -> None:
    """Give us all rights on a directory, from which a step may have taken them; follow no link. Raises OSError."""
    if not ON_LINUX:
        return os.chmod(name, 0o700, dir_fd=parent, follow_symlinks=False)
    descriptor = os.open(name, os.O_PATH | _DIRECTORY_FLAGS, dir_fd=parent)  # needs no right to read it
    try:
        if os.fstat(descriptor).st_mode & 0o700 != 0o700:
            os.chmod(f"/proc/self/fd/{descriptor}", 0o700)
    finally:
        os.close(descriptor)
    return None


def _mount_id(descriptor: int) -> str:
    """Return what a directory shares with its mount alone; st_dev is the same where a filesystem is mounted twice."""
    with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as file:  # no /proc
        return next((line for line in file if line.startswith("mnt_id")), "")
    return str(os.fstat(descriptor).st_dev)


def _remove_by_path(path: str) -> bool:
    """Do what `_remove` does, where there are no descriptors of directories; return whether it is gone."""

    def retry(action: Callable[..., Any], name: str, _: Any) -> None:
        with contextlib.suppress(OSError):  # it stays, and so does the directory
            os.chmod(name, stat.S_IWRITE)  # a step may have made it read-only
            action(name)

    if is_real_directory(path):
        shutil.rmtree(path, onerror=retry)
    else:
        os.unlink(path)
    return not os.path.lexists(path)


_TOKEN_NAME = "token"
_RESTART = "restart the daemon, with a --root that nothing cleans up"
_ROOT_ADVICE = {
    "": f"new results are lost, and no task is accepted; {_RESTART}",
    "lock": "another daemon might start on this root; restart this one, which adopts what runs",
    "remote_executor.db": f"new results are lost, and no task is accepted; {_RESTART}",
    "remote_executor.db-wal": f"new results are lost, and no task is accepted; {_RESTART}",
    "tasks": f"its outputs and workspaces are lost; {_RESTART}",
    _TOKEN_NAME: "it is no longer valid; restart the daemon, which writes a new one",
}


class RootWatch:
    """Detects files of the root that were removed or replaced; `look` is for the daemon's thread, `warning` for any.

    Who cleans up /tmp removes files that are in use too, and what is written to them from then on is lost.
    """

    def __init__(self, root: str, has_token: bool) -> None:
        self._paths: dict[str, str] = {}
        for name in _ROOT_ADVICE:
            if has_token or name != _TOKEN_NAME:
                self._paths[name] = os.path.join(root, name) if name else root
        self._identities: dict[str, tuple[int, int]] = {}  # by name, device and inode of the file that was there first
        self._missing: tuple[str, ...] = ()

    def look(self) -> None:
        """Compare the files with those that were there first, and log a change once."""
        missing = []
        for name, path in self._paths.items():
            if self._is_missing(name, path):
                missing.append(name)
                if not name:
                    break  # and with it all that was in it
        if missing and tuple(missing) != self._missing:
            log.error("%s", "; ".join(map(self._describe, missing)))
        elif self._missing and not missing:
            log.info("--root: all of %s is in place again", self._paths[""])
        self._missing = tuple(missing)

    def warning(self) -> str:
        """Return what is missing, and what to do; empty when nothing is."""
        return "; ".join(map(self._describe, self._missing))

    def _describe(self, name: str) -> str:
        return f"--root: {self._paths[name]} is gone: {_ROOT_ADVICE[name]}"

    def _is_missing(self, name: str, path: str) -> bool:
        """Return whether a file that was there is gone, or another has its name."""
        try:
            status = os.lstat(path)
        except OSError as error:
            return name in self._identities and error.errno in (
                errno.ENOENT,
                errno.ENOTDIR,
            )  # from others nothing follows
        identity = (status.st_dev, status.st_ino)
        is_same = self._identities.setdefault(name, identity) == identity
        return not is_same and name != _TOKEN_NAME  # which an editor may replace


# ======================================================================================================================
# II operating system / network peers: who on this host holds the other end of a connection
# ======================================================================================================================


def socket_timeout(seconds: float) -> bytes:
    """Return the value of the socket options SO_RCVTIMEO and SO_SNDTIMEO: a timeval, on Windows milliseconds."""
    if ON_WINDOWS:
        return struct.pack("I", max(1, int(seconds * 1000)))
    whole_s = int(seconds)
    rest_us = int(seconds % 1 * 1_000_000)
    if seconds < 1:
        rest_us = max(1, rest_us)  # zero would mean no timeout
    return struct.pack("ll", whole_s, rest_us)


_Address = tuple[str, int]  # the host, numeric, and the port
_Ends = tuple[str, str]  # the addresses of a connection, the client's and ours, as the kernel shows them
_Users = dict[_Ends, int]  # the uid of each connection


# Linux says of one socket who has it (sock_diag(7)): 0.1 ms, where its table, of 30,000 sockets, takes 660. The layouts
# are those of nlmsghdr in linux/netlink.h, and of inet_diag_req_v2, inet_diag_sockid and inet_diag_msg in inet_diag.h.
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NETLINK_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence number, sender
_DIAG_QUESTION = struct.Struct("=BBBxI")  # family, protocol, extensions, states, which count for lists alone
_DIAG_SOCKET = struct.Struct("!HH16s16s4s8s")  # its port, the other end's, both addresses, interface, cookie
_DIAG_ANSWER = struct.Struct(f"=BB2x{_DIAG_SOCKET.size}s12xII")  # family, state, socket, uid, inode
_LOOPBACK_INDEX = struct.pack("=I", 1)  # of every network namespace; sockets that are bound to no interface match too
_ANY_COOKIE = b"\xff" * 8
# The states in which a process holds the end of a connection from which we read: ESTABLISHED, and FIN_WAIT1 and
# FIN_WAIT2 when it has shut down its writes (`nc -N`). enum in net/tcp_states.h.
_HELD_STATES = (1, 4, 5)
_MAPPED_BYTES = bytes(10) + b"\xff\xff"


def _user_of_socket(peer: _Address, ours: _Address) -> int | None:
    """Return the uid that holds the peer's end of a connection, None where Linux does not say.

    What it does not find by these ends, or cannot tell at all, its table may still show. Raises OSError for want of
    descriptors or memory.
    """
    peer_ip = ipaddress.ip_address(peer[0])
    addresses = (peer_ip.packed, ipaddress.ip_address(ours[0]).packed)
    padded = [address.ljust(16, b"\0") for address in addresses]
    wanted = _DIAG_SOCKET.pack(peer[1], ours[1], *padded, _LOOPBACK_INDEX, _ANY_COOKIE)
    family = socket.AF_INET if peer_ip.version == 4 else socket.AF_INET6
    try:
        answer = _ask_kernel(_DIAG_QUESTION.pack(family, socket.IPPROTO_TCP, 0, 0) + wanted)
    except OSError as error:
        if error.errno in RESOURCE_ERRNOS:
            raise
        return None
    if len(answer) < _DIAG_ANSWER.size:
        return None
    _, state, found, user, inode = _DIAG_ANSWER.unpack_from(answer)
    port, other_port, address, other_address, _, _ = _DIAG_SOCKET.unpack(found)
    # It may be a listener on that port, or nobody's any more: then it has no inode, and its uid means nothing.
    is_held = state in _HELD_STATES and inode != 0
    ends = (port, other_port, _unmapped(address), _unmapped(other_address))
    if is_held and ends == (peer[1], ours[1], *padded):
        return int(user)
    return None


def _ask_kernel(question: bytes) -> bytes:
    """Return what the kernel says of a socket, empty if it has found none. Raises OSError."""
    size = _NETLINK_HEADER.size
    header = _NETLINK_HEADER.pack(size + len(question), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
        kernel.sendto(header + question, (0, 0))
        answer, sender = kernel.recvfrom(4096, socket.MSG_DONTWAIT)  # it is there when sendto() returns
    kind = _NETLINK_HEADER.unpack_from(answer)[1]
    if kind != _SOCK_DIAG_BY_FAMILY or sender[0] != 0:
        return b""
    return answer[size:]


def _unmapped(address: bytes) -> bytes:
    """Return 16 bytes of the kernel's, of an IPv4-mapped address those of IPv4 with zeros behind them."""
    if address.startswith(_MAPPED_BYTES):
        return address[12:].ljust(16, b"\0")
    return address


class LocalPeers:
    """The users who hold the other ends of the connections to one port of this host. Thread-safe.

    The kernel's tables cost milliseconds each, so one reading serves all who asked before it began.
    """

    def __init__(self, descriptors: DescriptorReserve) -> None:
        self._descriptors = descriptors
        self._lock = threading.Lock()  # guards all below
        self._tables: dict[str, tuple[float, _Users]] = {}  # by name, when its reading began, and the content

    def user(self, peer: _Address, ours: _Address) -> int | None:
        """Return the uid that holds the peer's end; None on Windows, which does not show it.

        Raises LookupError where the host has no such connection: there is no end to trust then; and OSError, of which
        PeersUnknown is the kind where the system has no table that we can read.
        """
        if ON_WINDOWS:
            return None
        if ON_LINUX:
            with self._descriptors.lend_if_scarce(look_now=True):
                user = _user_of_socket(peer, ours)
            if user is not None:
                return user
        ends = (_kernel_address(*peer), _kernel_address(*ours))
        tables: tuple[str, ...] = ("tcp", "tcp6")  # the latter has IPv4 of IPv6's sockets
        if ON_MAC:
            tables = (_MAC_TABLE,)
        elif ":" in peer[0]:
            tables = ("tcp6",)
        for table in tables * 2:  # twice, for one that changes while it is read may lack a line
            users = self._users(table, ours[1])
            if ends in users:
                return users[ends]
        raise LookupError("this host has no such connection")

    def check(self) -> None:
        """Raise PeersUnknown where no user can be told, and OSError."""
        if not (ON_WINDOWS or ON_LINUX):
            self._users(_MAC_TABLE, 0)

    def _users(self, table: str, port: int) -> _Users:
        """Return the content of a table, read after this was called. Raises OSError."""
        asked_s = time.monotonic()
        with self._lock:
            begin_s, users = self._tables.get(table, (0.0, {}))
            if begin_s <= asked_s:
                begin_s = time.monotonic()
                with self._descriptors.lend_if_scarce(look_now=True):
                    users = dict(_read_table(table, port))
                self._tables[table] = (begin_s, users)
            return users


class PeersUnknown(OSError):
    """This system does not show who holds the other end of a connection, or not in a form that we know."""


def _read_table(table: str, port: int) -> Iterable[tuple[_Ends, int]]:
    """Return the ends and the uid of each connection to a port that a process holds. Raises OSError."""
    if ON_MAC:
        try:
            content = read_sysctl(table)
        except (FileNotFoundError, PermissionError) as error:  # of another macOS, or in a sandbox
            raise PeersUnknown(str(error)) from None
        return _connections_on_mac(content, port)
    if ON_LINUX:
        return _connections(table, port)
    raise PeersUnknown(f"{sys.platform} has no table of connections that is known")


def _connections(table: str, port: int) -> Iterator[tuple[_Ends, int]]:
    """Yield the ends and the uid of each connection to a port that a process holds (proc_net(5))."""
    port_and_state = re.compile(rb":%04X 0[%b] " % (port, b"".join(b"%d" % state for state in _HELD_STATES)))
    with contextlib.suppress(FileNotFoundError), open(f"/proc/net/{table}", "rb") as file:  # no IPv6: no tcp6
        for line in file:
            if not port_and_state.search(line):
                continue
            fields = line.decode("ascii").split()
            if fields[9] != "0":  # the inode, which a socket that no process has lacks
                ends = (_unmap(fields[1]), _unmap(fields[2]))
                yield ends, int(fields[7])


def _kernel_address(host: str, port: int) -> str:
    """Return an address as the kernel's tables show it: 32-bit words as this host reads them, in hexadecimal."""
    try:
        packed = ipaddress.ip_address(host).packed
    except ValueError:
        return ""
    return _show_address(packed, port)


def _show_address(packed: bytes, port: int) -> str:
    """Return an address of bytes in network order as `_kernel_address` returns it."""
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"


_MAPPED_PREFIX = _kernel_address("::ffff:0.0.0.0", 0)[:24]


def _unmap(address: str) -> str:
    """Return the IPv4 address of an IPv4-mapped one, any other as it is; both as the kernel shows them."""
    if address.startswith(_MAPPED_PREFIX):
        return address[len(_MAPPED_PREFIX) :]
    return address


# What a Mac shows of its TCP sockets: a header, of each socket a group of records, and a trailer like the header. A
# record begins with its size and kind, and the next one at a multiple of 8 behind it; the last one of a group is the
# xtcpcb_n. `#pragma pack(4)` holds for all. bsd/netinet/in_pcblist.c and in_pcb.h, bsd/sys/socketvar.h and
# bsd/netinet/tcp_var.h of XNU, the same from 10.14 (4903) to 15.4 (11417) but for the size of xsocket_n.
_MAC_TABLE = "net.inet.tcp.pcblist_n"
_XINPGEN_SIZE = 24
_XSO_INPCB = 0x10
_XSO_SOCKET = 1
_XSO_TCPCB = 0x20
_XSO_SIZES = {
    _XSO_INPCB: (104,),
    _XSO_SOCKET: (76, 104),  # up to macOS 11, and later
    _XSO_TCPCB: (204,),
}
_INP_IPV4 = 1  # of inp_vflag; alone too for an IPv4 connection of an IPv6 socket
_INP_IPV6 = 2
_HELD_STATES_OF_MAC = (4, 6, 9)  # TCPS_ESTABLISHED, TCPS_FIN_WAIT_1 and TCPS_FIN_WAIT_2 of bsd/netinet/tcp_fsm.h


def _connections_on_mac(table: bytes, port: int) -> Iterator[tuple[_Ends, int]]:
    """Yield the ends and the uid of each connection to a port whose client has not gone. Raises PeersUnknown.

    Nothing of a table is believed that has a record of another size or a group that is not whole.
    """
    records: dict[int, bytes] = {}  # of one group, by kind
    for kind, record in _records_on_mac(table):
        if kind == _XSO_INPCB:  # the first of a group
            records = {}
        records[kind] = record
        if kind != _XSO_TCPCB:
            continue
        if not records.keys() >= _XSO_SIZES.keys():
            raise PeersUnknown(f"{_MAC_TABLE} has a socket without all of its records")
        inpcb = records[_XSO_INPCB]
        peer_port, client_port = struct.unpack_from(">HH", inpcb, 16)  # inp_fport and inp_lport: those of its owner
        (state,) = struct.unpack_from("=i", record, 36)
        if peer_port == port and state in _HELD_STATES_OF_MAC:
            peer, client = _addresses_on_mac(inpcb)
            ends = (_show_address(client, client_port), _show_address(peer, peer_port))
            (user,) = struct.unpack_from("=I", records[_XSO_SOCKET], 64)  # so_uid
            yield ends, user


def _records_on_mac(table: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the kind and the bytes of each record between header and trailer. Raises PeersUnknown."""
    if len(table) < 2 * _XINPGEN_SIZE or table[:4] != struct.pack("=I", _XINPGEN_SIZE):
        raise PeersUnknown(f"{_MAC_TABLE} has another header than xinpgen of {_XINPGEN_SIZE} bytes")
    start = _XINPGEN_SIZE
    end = len(table) - _XINPGEN_SIZE
    while start < end:
        size, kind = struct.unpack_from("=II", table, start)
        if size < 8 or start + size > end or size not in _XSO_SIZES.get(kind, (size,)):
            raise PeersUnknown(f"{_MAC_TABLE} has a record of kind {kind:#x} with {size} bytes")
        yield kind, table[start : start + size]
        start += -(-size // 8) * 8
    if start != end:
        raise PeersUnknown(f"{_MAC_TABLE} does not end with a record")


def _addresses_on_mac(inpcb: bytes) -> tuple[bytes, bytes]:
    """Return the foreign and the local address of an xinpcb_n, in network order. Raises PeersUnknown."""
    version = inpcb[44]  # inp_vflag
    if version == _INP_IPV4:
        return inpcb[60:64], inpcb[76:80]  # in_addr_4in6
    if version == _INP_IPV6:
        return inpcb[48:64], inpcb[64:80]
    raise PeersUnknown(f"{_MAC_TABLE} has a connection of version {version}")


def is_trusted_uid(user: int | None) -> bool:
    """Return whether this uid may do what the daemon's own may; None is Windows, which does not show it."""
    return sys.platform == "win32" or user in (0, os.geteuid())


# ======================================================================================================================
# II operating system / system information: what the host is, what this process takes of it, what it lets run
# ======================================================================================================================


def system_program(name: str) -> str:
    """Return the path of a program that comes with Windows."""
    windows = os.environ.get("SYSTEMROOT", r"C:\Windows")
    return os.path.join(windows, "System32", name)


def _find_on_mac(program: str, path: str) -> str | None:
    """Return the file of a program on this PATH, but no stub, which only opens the installer of developer tools."""
    file = shutil.which(program, path=path)
    if file not in _MAC_STUBS or _has_developer_tools():
        return file
    directories = path.split(os.pathsep)
    others = [directory for directory in directories if os.path.join(directory, program) != file]
    return shutil.which(program, path=os.pathsep.join(others)) if others else None


_MAC_STUBS = {"/usr/bin/python3", "/usr/bin/git"}  # of those that we run; xcode-select(1), "FILES"
_XCODE_SELECT_TIMEOUT_S = 5.0


def _has_developer_tools() -> bool:
    """Return whether the stubs in /usr/bin have what they run: `xcode-select -p` fails where they have not."""
    command = ["/usr/bin/xcode-select", "-p"]
    null = subprocess.DEVNULL
    try:
        process = subprocess.run(command, stdin=null, stdout=null, stderr=null, timeout=_XCODE_SELECT_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):  # it comes with every Mac; better to run the program than not
        return True
    return not process.returncode


def find_program(program: str, path: str) -> str | None:
    """Return the file of a program on this PATH, None without one."""
    if ON_MAC:
        return _find_on_mac(program, path)
    if not ON_WINDOWS:
        return shutil.which(program, path=path)
    if program == "cmd":
        return system_program("cmd.exe")
    # Not `shutil.which`, which begins in the current directory, and before Python 3.12 adds no suffix to a path. The
    # directory that is left out for it is where Windows keeps a `python` that opens its store.
    suffixes = list(filter(None, os.environ.get("PATHEXT", "").split(";"))) or [".COM", ".EXE", ".BAT", ".CMD"]
    for part in path.split(os.pathsep):
        directory = part.strip('"')
        is_store = program == "python" and directory.rstrip("\\").lower().endswith("\\microsoft\\windowsapps")
        if is_store or not os.path.isabs(directory):
            continue
        for suffix in suffixes:
            file = os.path.join(directory, program + suffix)
            if os.path.isfile(file):
                return file
    return None


def fallback_encoding() -> str:
    """Return the encoding of output that is not UTF-8: the console's code page where there is one."""
    return "oem" if ON_WINDOWS else "utf-8"


def merge_variables(*environments: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the names and values of several environments; the last one counts of those that are the same name.

    Names keep their case; on Windows, where it does not matter, those that differ in it alone are the same.
    """
    merged = {}
    for name, value in itertools.chain(*environments):
        key = name.upper() if ON_WINDOWS else name
        merged[key] = (name, value)
    return dict(merged.values())


def variable(environment: Mapping[str, str], name: str, default: str) -> str:
    """Return the value of a variable, whose name is in capitals; on Windows it may have been given in any case."""
    for other, value in environment.items():
        if name == (other.upper() if ON_WINDOWS else other):
            return value
    return default


MAX_VARIABLE_UNITS = 32767  # of Windows (SetEnvironmentVariableW)


def fits_environment(value: str) -> bool:
    """Return whether a variable of this host can have the value."""
    return not ON_WINDOWS or len(value.encode("utf-16-le")) <= 2 * MAX_VARIABLE_UNITS


def own_environment() -> dict[str, str]:
    """Return the environment of this process, with the names as it got them: os.environ of Windows has capitals."""
    own = dict(os.environ)
    if sys.platform == "win32":
        import nt

        names = {name.upper(): name for name in nt.environ}
        own = {names.get(name, name): value for name, value in own.items()}
    return own


@functools.lru_cache(maxsize=1)
def boot_time_s() -> float:
    """Return when the host started, in seconds since the epoch."""
    if ON_MAC:
        with contextlib.suppress(OSError, struct.error):
            seconds, microseconds = struct.unpack_from("=qi", read_sysctl("kern.boottime"))  # struct timeval
            return float(seconds + microseconds / 1e6)
    with contextlib.suppress(OSError), open("/proc/stat", encoding="ascii") as file:  # elsewhere there is no /proc
        for line in file:
            if line.startswith("btime "):
                return float(line.split()[1])
    return time.time() - time.monotonic()


def _creation_time(process: int) -> int:
    """Return when the process was created, in units of 100 ns since 1601."""
    created = wintypes.FILETIME()
    others = [wintypes.FILETIME() for _ in range(3)]  # exit, kernel and user time
    GetProcessTimes(process, ctypes.byref(created), *map(ctypes.byref, others))
    return int(created.dwHighDateTime) << 32 | int(created.dwLowDateTime)


_LOADED_S = time.time()
_EPOCH_OF_1601 = 116_444_736_000_000_000  # 1970, in the units of a FILETIME
_MAX_HANDLES = 16 * 1024 * 1024  # of a process (Pushing the Limits of Windows: Handles)


class ProcessStats(NamedTuple):
    """What this process uses; None where the system does not show it."""

    cpu_s: float
    started_s: float  # since the epoch
    threads: int
    resident_bytes: int | None
    virtual_bytes: int | None
    open_files: int | None  # on Windows handles
    max_files: int | None


def process_stats() -> ProcessStats:
    """Return what this process uses now. Raises OSError."""
    if ON_WINDOWS:
        return _windows_stats()
    open_files = len(os.listdir("/dev/fd")) - 1  # the listing itself takes one
    stats = ProcessStats(
        cpu_s=time.process_time(),
        started_s=_LOADED_S,
        threads=threading.active_count(),
        resident_bytes=None,
        virtual_bytes=None,
        open_files=open_files,
        max_files=_max_files(),
    )
    if not ON_LINUX:
        kernel = mac_kernel()
        if kernel is None:
            return stats
        resident, virtual, threads = kernel.memory()
        return stats._replace(resident_bytes=resident, virtual_bytes=virtual, threads=threads)
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()  # from the state on (proc_pid_stat(5))
    return stats._replace(
        started_s=boot_time_s() + int(fields[19]) / os.sysconf("SC_CLK_TCK"),
        threads=int(fields[17]),
        resident_bytes=int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
        virtual_bytes=int(fields[20]),
    )


def _windows_stats() -> ProcessStats:
    process = GetCurrentProcess()
    memory = ProcessMemory()
    handles = wintypes.DWORD()
    GetProcessMemoryInfo(process, ctypes.byref(memory), ctypes.sizeof(memory))
    GetProcessHandleCount(process, ctypes.byref(handles))
    return ProcessStats(
        cpu_s=time.process_time(),
        started_s=(_creation_time(process) - _EPOCH_OF_1601) / 10**7,
        threads=threading.active_count(),
        resident_bytes=memory.WorkingSet,
        virtual_bytes=memory.Private,
        open_files=handles.value,
        max_files=_MAX_HANDLES,
    )


def _max_files() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft


class Limit(NamedTuple):
    """How many of something this process may have, and which setting limits it."""

    value: int
    name: str
    also: str = ""  # the flag beside --pool_size that could be lowered


class StepCapacity(NamedTuple):
    """How many steps can run at once, and the limit that allows no more; None where there is none."""

    steps: int
    limit: Limit | None


_UNLIMITED_STEPS = 2**63
_DESCRIPTORS_PER_STEP = 3  # a pidfd, and while it starts its output and the pipe of Popen that shows an exec
_OWN_DESCRIPTORS = 64  # the database's, the log, the reserve, the listener
_PROCESSES_PER_STEP = 4  # a thread that waits, the wrapper, the script and one that it starts: a guess
_OWN_THREADS = 32  # some connections among them


def step_capacity(descriptors: Limit | None, processes: Sequence[Limit], max_connections: int) -> StepCapacity:
    """Return how many steps can run at once under these limits, at least 1."""
    capacity = StepCapacity(_UNLIMITED_STEPS, None)
    if descriptors:
        connections = min(max_connections, descriptors.value // 4)
        free = descriptors.value - connections - min(_OWN_DESCRIPTORS, descriptors.value // 2)
        capacity = StepCapacity(free // _DESCRIPTORS_PER_STEP, descriptors)
    for limit in processes:
        free = limit.value - min(_OWN_THREADS, limit.value // 2)
        steps = free // _PROCESSES_PER_STEP
        if steps < capacity.steps:
            capacity = StepCapacity(steps, limit)
    return capacity._replace(steps=max(1, capacity.steps))


def descriptor_limit() -> Limit | None:
    """Return how many descriptors this process may have; None where the system sets no limit."""
    count = _max_files()
    if count is None:
        return None
    return Limit(count, "the limit of open files (ulimit -n, LimitNOFILE)", " or --max_connections")


def process_limits(cgroups: str = "/sys/fs/cgroup", own_cgroups: str = "/proc/self/cgroup") -> list[Limit]:
    """Return each limit of processes and threads that holds for this process."""
    if sys.platform == "win32":
        return []
    import resource

    limits = []
    soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if os.geteuid() and soft != resource.RLIM_INFINITY:
        limits.append(Limit(soft, "the limit of processes (ulimit -u, LimitNPROC)"))
    try:
        with open(own_cgroups, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.readlines()
    except OSError:  # the host has no cgroups
        lines = []
    for line in lines:  # cgroups(7): the number, the controllers, empty for version 2, and the path
        _, controllers, path = line.rstrip("\n").split(":", 2)
        if controllers in ("", "pids"):
            limits += _pids_limits(os.path.join(cgroups, controllers), path)
    return limits


def _pids_limits(mount: str, path: str) -> Iterator[Limit]:
    """Yield the limits of a cgroup and of all above it; in a container the upper ones cannot be seen."""
    names = path.strip("/").split("/")
    for depth in range(len(names), -1, -1):
        file_name = os.path.join(mount, *names[:depth], "pids.max")
        with contextlib.suppress(OSError, ValueError), open(file_name, encoding="ascii") as file:
            yield Limit(int(file.read()), f"{file_name} (TasksMax)")  # ValueError: "max"


@functools.lru_cache(maxsize=1)
def boot_id() -> str:
    """Return what identifies this boot of the host: an id of the kernel, else about when it was."""
    if ON_MAC:
        with contextlib.suppress(OSError):  # in a sandbox
            return read_sysctl("kern.bootsessionuuid").rstrip(b"\0").decode("ascii")
    # suppress: not Linux, or /proc is not mounted
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
    booted_s = time.time() - time.monotonic()
    return f"about {round(booted_s / 600)}"  # the wall clock drifts, hence the coarse grain


class HostInfo(NamedTuple):
    """The name of this host, its operating system and its processor."""

    name: str
    system: str
    release: str
    machine: str


def host_info() -> HostInfo:
    """Return what this host is."""
    if sys.platform == "win32":  # not by `platform`, which asks WMI
        version = sys.getwindowsversion()
        release = f"{version.major}.{version.minor}.{version.build}"
        machine = os.environ.get("PROCESSOR_ARCHITEW6432") or os.environ.get("PROCESSOR_ARCHITECTURE", "")
        return HostInfo(socket.gethostname(), "Windows", release, machine)
    system, name, release, _, machine = os.uname()
    return HostInfo(name, system, release, machine)


class Build(NamedTuple):
    """The version of the program, its commit, empty where it is unknown, when it was built, and its Python."""

    version: str
    commit: str
    built: str
    implementation: str
    python: str
    os: str
    arch: str


# `git archive` fills these in (gitattributes(5), export-subst).
_ARCHIVED_COMMIT = "$Format:%H$"
_ARCHIVED_AT = "$Format:%cI$"


@functools.lru_cache(maxsize=1)
def build() -> Build:
    """Return the build: of an archive what git wrote into it, else the checked-out commit and the file's time."""
    commit = _ARCHIVED_COMMIT
    built = _ARCHIVED_AT
    if commit.startswith("$"):  # no archive
        commit = _checked_out_commit()
        built = _modification_time()
    system = "windows" if ON_WINDOWS else sys.platform
    return Build(
        version=__version__,
        commit=commit,
        built=built,
        implementation=sys.implementation.name,
        python=sys.version.split()[0],
        os=system,
        arch=host_info().machine,
    )


def _checked_out_commit() -> str:
    """Return the commit of the git checkout that this file is in; empty where there is none, or no git."""
    directory = os.path.dirname(os.path.abspath(__file__))
    git_dir = os.path.join(directory, ".git")
    if not os.path.isdir(git_dir):
        return ""
    git = find_program("git", os.environ.get("PATH", os.defpath))
    if git is None:
        return ""
    command = [git, f"--git-dir={git_dir}", "rev-parse", "--verify", "HEAD"]
    null = subprocess.DEVNULL
    try:
        process = subprocess.run(
            command,
            stdin=null,
            stdout=subprocess.PIPE,
            stderr=null,
        )
    except OSError:  # there is no process left for it
        return ""
    if process.returncode:  # such as a checkout without a commit
        return ""
    return process.stdout.decode("ascii").strip()


def _modification_time() -> str:
    """Return when the file was written, or the archive or the program that it is a part of."""
    paths = [__file__, os.path.dirname(__file__), sys.executable]
    if getattr(sys, "frozen", False):  # those of the file are of the copy that the launcher has just made
        paths = [sys.executable]
    for path in paths:
        with contextlib.suppress(OSError):  # in an archive the file has no path of its own
            return format_time(int(os.stat(path).st_mtime))
    return ""


def version_line() -> str:
    """Return what /version shows, as one line."""
    info = build()
    commit = f"commit {info.commit[:12]}, " if info.commit else ""
    python = f"{info.implementation} {info.python}, {info.os} {info.arch}"
    return f"remote_executor {info.version} ({commit}built {info.built}; {python})"


# ======================================================================================================================
# II operating system / interpreters: the command line that runs a script, and the bytes of its file
# ======================================================================================================================


class Interpreter(NamedTuple):
    """How scripts of a command type run: the first of `programs` that is on PATH, its own options, and `arguments`.

    {file} in the arguments is the script's path, {quoted} the same within single quotes of PowerShell.
    """

    programs: tuple[str, ...]
    suffix: str = ""
    arguments: tuple[str, ...] = ("{file}",)
    env: tuple[str, ...] = ()  # KEY=value, unless the task sets another
    has_utf_8_console: bool = False  # on Windows its console has code page 65001 before it starts


# Python writes to a file in the ANSI code page by default, whoever calls it; console programs do in the OEM code page.
_STEP_ENVIRONMENT = ("PYTHONIOENCODING=utf-8",) if ON_WINDOWS else ()
_PYTHON_PROGRAMS = ("python", "py -3") if ON_WINDOWS else ("python3",)
_PYTHON_ENV = ("PYTHONUNBUFFERED=1",)  # what it prints is seen at once, and a stop loses nothing of it
_PYTHON = Interpreter(_PYTHON_PROGRAMS, ".py", env=_PYTHON_ENV)
_PYTHON2 = Interpreter(("python2",), ".py", env=_PYTHON_ENV)
_SH = Interpreter(("sh",), ".sh")
_CMD_ARGUMENTS = ("/D", "/E:ON", "/V:OFF", "/S", "/C", 'CALL "{file}"')
_CMD = Interpreter(("cmd",), ".bat", _CMD_ARGUMENTS)
# What PowerShell runs: the script, with the meaning of any step. Errors do not end it; its code is that of
# its `exit`, else of the last program that it ran, else 1 where it could not begin or was ended by an error.
#
# - Not -File, whose code ignores $LASTEXITCODE, which in turn ignores a script that could not begin: `$?` does not.
# - Not `exit`, which drops what PowerShell still holds back: up to 300 ms of a table, and all text after it (PowerShell
#   issue 13985). A constrained language mode (about_Language_Modes) allows no method, so there it must be `exit`.
# - Encodings without BOM, which Windows PowerShell would write to the output, to programs and to its jobs otherwise.
#   They cannot be set where there is no console, or in a constrained language mode.
# - No colours: PowerShell 7.2 to 7.6 drops them only for redirections of its own. Earlier ones have no $PSStyle.
# - $LASTEXITCODE of all scopes is one variable: a script that sets it means the code of its step.
# - A loop of one round: a `break` or `continue` outside of loops unwinds to the next one, past whatever follows.
_POWERSHELL_LINES = (
    "try { $OutputEncoding = New-Object System.Text.UTF8Encoding $false } catch { }",
    "try { [Console]::InputEncoding = [Console]::OutputEncoding = $OutputEncoding } catch { }",
    "try { $PSStyle.OutputRendering = 'PlainText' } catch { }",
    "try { New-Variable LASTEXITCODE -Scope Global -Option AllScope -Force -ErrorAction Stop } catch { }",
    "$RemoteExecutorOk = $true",
    "do { & {quoted}; $RemoteExecutorOk = $? } while ($false)",
    "$RemoteExecutorCode = if ($LASTEXITCODE) { $LASTEXITCODE } else { [int](-not $RemoteExecutorOk) }",
    "if ($RemoteExecutorCode) { "
    "try { $host.SetShouldExit($RemoteExecutorCode) } catch { exit $RemoteExecutorCode } }",
)
_POWERSHELL_ARGUMENTS = (
    "-NoLogo",
    "-NoProfile",
    "-NonInteractive",
    "-ExecutionPolicy",
    "Bypass",
    "-Command",
    "; ".join(_POWERSHELL_LINES),
)
_NO_COLORS = ("NO_COLOR=1",)  # where $PSStyle cannot be set, and for programs of a script (no-color.org)
_PWSH = Interpreter(("pwsh",), ".ps1", _POWERSHELL_ARGUMENTS, _NO_COLORS, has_utf_8_console=True)
_POWERSHELL = _PWSH._replace(programs=("powershell",)) if ON_WINDOWS else _PWSH
INTERPRETERS: Mapping[str, Interpreter] = {
    "sh": _SH,
    "shell": _SH,
    "bash": _SH._replace(programs=("bash",)),
    "ash": _SH._replace(programs=("ash",)),
    "dash": _SH._replace(programs=("dash",)),
    "ksh": _SH._replace(programs=("ksh",)),
    "zsh": _SH._replace(programs=("zsh",)),
    "csh": _SH._replace(programs=("csh",)),
    "tcsh": _SH._replace(programs=("tcsh",)),
    "python": _PYTHON,
    "python3": _PYTHON,
    "py": _PYTHON,
    "py3": _PYTHON,
    "python2": _PYTHON2,
    "py2": _PYTHON2,
    "cmd": _CMD,
    "bat": _CMD,
    "powershell": _POWERSHELL,
    "ps": _POWERSHELL,
    "ps1": _POWERSHELL,
    "pwsh": _PWSH,
}




class ProgramCache:
    """Where programs were found, for some seconds: a search costs a step 20 to 80 µs, on Windows more. Thread-safe."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], tuple[str, float]] = {}  # the file, and until when it is believed

    def find(self, program: str, path: str) -> str | None:
        """Return what `find_program` does; a program that is not found is looked for again each time."""
        now_s = time.monotonic()
        file, expires_s = self._entries.get((program, path), ("", 0.0))
        if now_s < expires_s:
            return file
        found = find_program(program, path)
        if found:
            if len(self._entries) >= _PROGRAM_CACHE_SIZE:  # a step may bring a PATH of its own
                self._entries.clear()
            self._entries[program, path] = (found, now_s + _PROGRAM_CACHE_TTL_S)
        return found


_PROGRAM_CACHE_TTL_S = 10.0
_PROGRAM_CACHE_SIZE = 256


def interpreter_command(
    command_type: str,
    file: str,
    workspace: str,
    path: str,
    find: Callable[[str, str], str | None] = find_program,
) -> list[str]:
    """Return the command line that runs the file; `path` is the PATH to search before the daemon's own.

    Raises LaunchError for a missing program.
    """
    interpreter = INTERPRETERS[command_type]
    if ON_WINDOWS and interpreter.suffix == ".sh":  # the bash of Windows is a Linux's
        file = os.path.relpath(file, workspace).replace("\\", "/")
    elif ON_WINDOWS and _SPECIAL_TO_CMD.search(file):  # else not, for a script may change directory and ask where it is
        file = os.path.relpath(file, workspace)
    arguments = [_substitute_file(argument, file) for argument in interpreter.arguments]
    own_path = os.environ.get("PATH", os.defpath)  # for a step that looks for its own programs elsewhere
    if interpreter is not _CMD or ON_WINDOWS:
        for search_path in dict.fromkeys((path, own_path)):
            for program in interpreter.programs:
                command = _program_command(program, search_path, find)
                if command and (len(interpreter.programs) == 1 or _starts(command)):
                    return [*command, *arguments]
    if interpreter is _PYTHON and not getattr(sys, "frozen", False) and sys.executable:
        return [sys.executable, *arguments]
    raise LaunchError(f"{' or '.join(interpreter.programs)} is not on the PATH of this host")


_SPECIAL_TO_CMD = re.compile("[%!^&]")  # also within quotes, in a line that CALL reads a second time
def _starts(command: Sequence[str]) -> bool:
    """Return whether a candidate for Python starts: the launcher `py` may be there, but know no Python that we may run.

    It is tried once, then the answer holds as long as its file is the same.
    """
    words = command[1:] if command[0] == "call" else command
    try:
        status = os.stat(words[0])
        return _try_python(tuple(words), status.st_mtime_ns, status.st_size)
    except subprocess.TimeoutExpired:  # on a busy host: it is believed, and tried again
        return True
    except OSError:
        return False


@functools.lru_cache(maxsize=64)
def _try_python(command: tuple[str, ...], _modified_ns: int, _size: int) -> bool:
    """Return whether Python runs an empty script by this command. Raises OSError and TimeoutExpired."""
    environment = {}
    for name, value in os.environ.items():
        if not name.startswith("REMOTE_EXECUTOR_"):  # the PATH that led to the file may be a step's
            environment[name] = value
    process = subprocess.run(
        [*command, "-c", ""],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        timeout=_TRIAL_TIMEOUT_S,
        creationflags=CREATE_NO_WINDOW,
    )
    return process.returncode == 0


_TRIAL_TIMEOUT_S = 10.0
_FILE_PLACEHOLDER = re.compile(r"\{(?:file|quoted)\}")
_POWERSHELL_QUOTE = re.compile("['\u2018\u2019\u201a\u201b]")  # the typographic ones too (about_Quoting_Rules)


def _substitute_file(argument: str, file: str) -> str:
    """Return an interpreter's argument with the placeholders replaced."""
    quoted = _POWERSHELL_QUOTE.sub(r"\g<0>\g<0>", file)
    values = {"{file}": file, "{quoted}": f"'{quoted}'"}
    return _FILE_PLACEHOLDER.sub(lambda match: values[match[0]], argument)


def _program_command(program: str, path: str, find: Callable[[str, str], str | None]) -> list[str]:
    """Return the words that run a program with its options, such as `py -3`; none where it is not on this PATH."""
    name, *options = program.split()
    file = find(name, path)
    if file is None:
        return []
    if file.lower().endswith((".bat", ".cmd")):  # it would not come back to the wrapper, unless it is called
        return ["call", file, *options]
    return [file, *options]


def script_name(command_type: str) -> str:
    """Return the name of the script's file."""
    return "script" + INTERPRETERS[command_type].suffix


def script_environment(command_type: str) -> tuple[str, ...]:
    """Return what the interpreter, and what a script may call, needs in its environment, as KEY=value."""
    return (*_STEP_ENVIRONMENT, *INTERPRETERS[command_type].env)


def needs_utf_8_console(command_type: str) -> bool:
    """Return whether the console of the script must have code page 65001 before it starts."""
    return INTERPRETERS[command_type].has_utf_8_console


def encode_script(command_type: str, text: str, variables: Sequence[str] = ()) -> bytes:
    """Return the content of the script's file, without the U+FEFF that some editors and shells put before a text.

    `variables` are texts of its environment that it may show.
    """
    text = text.removeprefix("\ufeff")
    suffix = INTERPRETERS[command_type].suffix
    if suffix == ".ps1":
        return text.encode("utf-8-sig")  # without a BOM Windows PowerShell takes it for the ANSI code page
    if suffix == ".bat":
        return _encode_batch(text, "".join(variables), fallback_encoding())
    if suffix == ".sh" and not re.search("(?<!\r)\n", text):  # as editors of Windows end lines; no shell takes the CR
        text = text.replace("\r\n", "\n")
    return text.encode()


# A command of its own, not a word of `echo` or `rem`: at the begin of a line or of what follows another command.
_CHANGES_PAGE = re.compile(
    r'(?:^|[&|(@]|>\s*nul\b)\s*(?:"?[^\s"&|]*\\)?chcp(?:\.com)?"?\s+(\d+)',
    re.IGNORECASE,
)
_UTF_8_PAGE = "65001"


def _encode_batch(text: str, variables: str, encoding: str) -> bytes:
    """Return a batch file. cmd reads each line in the code page that its console has then, which the script may change.

    In UTF-8 from the begin where the page of the host lacks a character of the script or of its variables.
    """
    lines = ["@echo off", *re.split("\r?\n", text)]
    try:
        variables.encode(encoding)
        return b"".join(_encode_lines_of_batch(lines, encoding))
    except UnicodeEncodeError:
        chcp = system_program("chcp.com")
        first = f'@"{chcp}" {_UTF_8_PAGE} >nul\r\n'.encode()
        return first + b"".join(_encode_lines_of_batch(lines, "utf-8"))


def _encode_lines_of_batch(lines: Iterable[str], encoding: str) -> Iterator[bytes]:
    """Yield each line in the page that holds there. Raises UnicodeEncodeError, but for a page that the script chose."""
    errors = "strict"
    for line in lines:
        yield line.encode(encoding, errors) + b"\r\n"
        for page in _CHANGES_PAGE.findall(line):
            encoding = _page_encoding(page)
            errors = "replace"


def changes_to_utf_8(batch: bytes) -> bool:
    """Return whether a batch file has its console's output in UTF-8, at least from some line on."""
    return any(_UTF_8_PAGE in _CHANGES_PAGE.findall(line) for line in batch.decode("latin-1").splitlines())


def _page_encoding(page: str) -> str:
    """Return the encoding of a console's code page, UTF-8 for one that is not known."""
    if page == _UTF_8_PAGE:
        return "utf-8"
    try:
        return codecs.lookup(f"cp{page}").name
    except LookupError:
        return "utf-8"


# ======================================================================================================================
# II operating system / step processes: the contract of a process tree, which three systems fulfil
# ======================================================================================================================

# A process tree is the process of a step, its wrapper before it, and whatever these have started, directly or not.
# Nothing in a POSIX system keeps such a tree together: a process may leave its group and its session, lose its parent,
# change its environment. So membership is a matter of evidence, gathered anew by every scan of the process table:
#
#   1. the session of the wrapper, for as long as its number cannot have been reused;
#   2. STEP_ENV_VAR in the environment that the process was started with, naming the step's directory;
#   3. the step's output as its standard output or error, where the process was started with another environment; on
#      macOS, whose kernel hides the environment of Apple's programs, in any descriptor that can write;
#   4. an orphan that has become our child, bears no mark that we can read (ssh-agent denies it), and is of an age at
#      which only this step can have started it;
#   5. the children of members, all that is in a session of a member, and what was a member before.
#
# A path among the arguments is no evidence: an operator's `du` has it too. A daemon of ours, marked by DAEMON_ENV_VAR,
# is never a member, nor does the walk over children pass through it. The numbers of a process, a group and a session
# are reused: a process is identified by its pid and its start time, compared before every signal; the wrapper is left a
# zombie until `release`, so that its numbers stay ours. A process seen in the middle of an exec, when it has no
# environment, gives no evidence: that scan is incomplete, and does not count.
#
# To stop a tree is to signal first what needs no scan, to scan then, and to end when three complete scans in succession
# have found nothing.

STEP_ENV_VAR = "REMOTE_EXECUTOR_STEP"  # in the environment of each process of a step; its value is the step's directory
DAEMON_ENV_VAR = "REMOTE_EXECUTOR_DAEMON"  # instead, in that of a daemon that a step has started
_STEP_KEY = STEP_ENV_VAR.encode()
_DAEMON_KEY = DAEMON_ENV_VAR.encode()
GRACE_S = 5.0  # between SIGTERM and SIGKILL
STOP_SIGNALS = ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "KILL")  # by which a client may have a step stopped
_MAX_WAIT_S = 86400.0
_POLL_S = 0.02  # between polls of a process for which there is no pidfd
_KILL_TIMEOUT_S = 10.0
_Child = subprocess.Popen[bytes]
_Environment = Mapping[str, str]


class ProcessTree(Protocol):
    """One step's wrapper and all that it started. `wake` is thread-safe, the rest for the thread that owns the tree."""

    pid: int  # of the wrapper; 0 where unknown

    def wait(self, deadline_s: float | None) -> bool:
        """Wait for the wrapper's end, a `wake` or the deadline of time.monotonic(); return whether it has ended."""

    def wake(self) -> None:
        """Make `wait` return, and `stop` call `is_hurried` again."""

    def exit_code(self) -> int | None:
        """Return the code of an ended wrapper that is our child and ended by itself.

        None when it was killed by a signal or is not our child: its result file may have the code. Without that file
        the step is lost, and what it left running must be stopped first.
        """

    def stop(self, is_hurried: Callable[[], bool], first_signal: int = signal.SIGTERM) -> None:
        """End the tree: send `first_signal` to every member, SIGKILL to what is left after GRACE_S.

        The grace ends as soon as `is_hurried` returns True; it is called at every `wake` and at least every 50 ms.
        """

    def close(self) -> None:
        """Close the descriptors; idempotent."""


class StepProcesses(Protocol):
    """Starts, adopts and reaps process trees. Thread-safe, but for `reap`."""

    initial_files: Mapping[str, bytes]  # beside the script in a step's directory before `start`

    def start(
        self,
        command: Sequence[str],
        step_dir: str,
        cwd: str,
        env: _Environment,
        has_utf_8_console: bool = False,
        has_stdin: bool = False,
        stderr_is_apart: bool = False,
    ) -> ProcessTree:
        """Start the command behind the wrapper, its output into the step's files; `env` is added to the daemon's own.

        Its standard input is the step's file `stdin`, or empty.
        Raises OSError, after which nothing runs: `is_scarcity` tells whether to try again.
        """

    def adopt(self, step_dir: str) -> ProcessTree | None:
        """Return the tree of a step that an earlier daemon started, None when its wrapper has ended.

        Raises OSError where no descriptor is free to find out.
        """

    def remains(self, step_dirs: Sequence[str]) -> ProcessTree:
        """Return a tree of what these steps, whose wrappers have ended, left running: `wait` returns True at once."""

    def may_have_started(self, step_dir: str) -> bool:
        """Return by the step's files whether its script may have run. Raises OSError where they cannot be read."""

    def death_signal(self, code: int) -> int | None:
        """Return which signal killed a step whose wrapper left this code, None for none."""

    def release(self, tree: ProcessTree) -> None:
        """Release what the tree holds; it has ended, or runs on without us."""

    def reap(self) -> None:
        """Reap ended orphans of steps; for one thread, now and then."""


_DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_SCARCE = DESCRIPTOR_ERRNOS | _DISK_FULL | {errno.EAGAIN, errno.ENOMEM}
# ERROR_NOT_ENOUGH_MEMORY, _DISK_FULL, _NO_SYSTEM_RESOURCES, _COMMITMENT_LIMIT, _NOT_ENOUGH_QUOTA (System Error Codes)
_SCARCE_ON_WINDOWS = {8, 112, 1450, 1455, 1816}


def signal_number(name: str) -> int:
    """Return the number of a signal of STOP_SIGNALS; that of SIGTERM where this system, Windows, has none."""
    return int(getattr(signal, f"SIG{name}", signal.SIGTERM))


def is_disk_full(error: OSError) -> bool:
    return error.errno in _DISK_FULL or getattr(error, "winerror", None) == 112  # ERROR_DISK_FULL


def is_scarcity(error: OSError) -> bool:
    """Return whether an error is of what is used up for now: descriptors, processes, memory, disk."""
    return error.errno in _SCARCE or getattr(error, "winerror", None) in _SCARCE_ON_WINDOWS


# ======================================================================================================================
# II operating system / POSIX processes: trees found in the process table, behind a wrapper of shell builtins
# ======================================================================================================================

# Not trapped is what cannot be caught, is the shell's own, or ends nothing by default; and a fault, of which a trap
# would make an endless loop. The real-time signals stand last: zsh, which has no names for them, stops there.
_UNTRAPPED = {"KILL", "STOP", "CHLD", "CONT", "TSTP", "TTIN", "TTOU", "WINCH", "URG", "INFO"}
_FAULTS = {"SEGV", "BUS", "ILL", "FPE"}


def _trapped_signals() -> list[int]:
    """Return the signals that end a process unless it catches them, and that it can catch."""
    untrapped = {getattr(signal, f"SIG{name}", None) for name in _UNTRAPPED | _FAULTS}
    return sorted(int(number) for number in set(signal.valid_signals()) - untrapped)


# $0 is the step's directory, $1 and $2 the umask and the limit of open files that the daemon was started with: no
# variable has a name here, for the step's environment may hold any. Every word is a builtin.
# The file `pid` is there already, empty. The pid is appended first: no pid, no run. `begun` follows when the subshell
# is about to become the script: a wrapper that could not fork, with whatever code its shell ends then, has begun
# nothing; nor has one that could not write that, and is killed for it, lest it writes a result.
# `trap :` and not `trap ''`: children get the default handlers, the wrapper survives a signal to its group and writes
# the result. Its own stderr is /dev/null: a shell writes "Killed" there, which is no output of the step. Descriptor 8
# is meanwhile that of the script.
# `set -C`: what is there already, a link perhaps, is not written to. Where the disk is full the result goes into `pid`,
# which has a block already, by the descriptor that was opened before the script could put another file there.
_WRAPPER = (
    "exec 8>&2 2>/dev/null; "
    'exec 9>>"$0/pid"; echo "$$ wrapper" >&9 || exit 125; umask $1; ulimit -Sn $2; shift 2; '
    f"trap : {' '.join(map(str, _trapped_signals()))}; "
    '(echo begun >&9 || { kill -9 $$; exit; }; exec "$@" 2>&8 8>&- 9>&-); set -- $?; '
    'umask 077; set -C; echo $1 >"$0/rc" || echo "ended $1" >&9; exit $1'
)
# Before it, where the daemon's service has taken the daemon off the list of what the kernel kills first (proc(5)): its
# steps are not. To raise the score needs no privilege.
_OOM_SCORE_FILE = "/proc/self/oom_score_adj"
_RESET_OOM_SCORE = f"echo 0 2>/dev/null >{_OOM_SCORE_FILE}; "
# A shell drops variables whose names it could not have itself, and sets, resets or interprets those listed here. Their
# values travel in a file of the step's directory, for everybody on the host may read a command line; the environment is
# made of it after the wrapper's shell. What an interpreter ignores when it starts must be as by default in the script.
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


_Identity = tuple[int, str]  # of a process: its pid and its start time


class ProcessInfo(NamedTuple):
    """A process as a scan found it; the start time distinguishes it from a later one with the same pid."""

    pid: int
    parent: int
    group: int
    session: int
    start: str
    program: bytes = b""  # its name, where an exec can show a mark that was hidden before
    is_foreign: bool = False  # it is another user's, of which this system shows no more than this

    @property
    def identity(self) -> _Identity:
        """What distinguishes the process from a later one with the same pid."""
        return self.pid, self.start


class _Marks(NamedTuple):
    """What a process shows of its origin: its step's directory, empty for none, and whether it is a daemon of ours."""

    step_dir: bytes
    is_daemon: bool
    is_before_exec: bool = False  # its program, and so its environment, is not the final one
    is_hidden: bool = False  # the kernel shows no environment: a child of its may have a mark


_NO_MARKS = _Marks(b"", False, True)


class _Lifetimes:
    """When the steps ran whose orphans become children of this process. Thread-safe.

    A time is one of the process table, in clock ticks since the boot.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below
        self._spans: dict[bytes, tuple[int, float]] = {}  # start and end, by the step's directory
        self._may_own = False

    def open(self) -> None:
        """Begin to attribute orphans: whatever becomes our child from the first step on comes from a step.

        Not so for the first process of a container, which gets all orphans, or if this process had children at exec.
        """
        try:
            os.waitid(os.P_ALL, 0, _PEEK)
        except ChildProcessError:
            self._may_own = os.getpid() != 1

    def begin(self, step_dir: bytes) -> None:
        """Record that a step starts; of too many steps the times are not kept, and no orphan is attributed."""
        with self._lock:
            self._may_own = self._may_own and len(self._spans) < _MAX_LIFETIMES
            if self._may_own:
                self._spans[step_dir] = (_clock_ticks(), float("inf"))

    def end(self, step_dir: bytes) -> None:
        """Record that a step has ended."""
        with self._lock:
            if step_dir in self._spans:
                begin, _ = self._spans[step_dir]
                self._spans[step_dir] = (begin, _clock_ticks() + 1)

    def forget_ended(self, before: int) -> None:
        """Forget the steps that ended before this time, at which we had no orphan."""
        with self._lock:
            for step_dir, (_, end) in list(self._spans.items()):
                if end < before:
                    del self._spans[step_dir]

    def can_only_be_of(self, step_dirs: frozenset[bytes], start: int) -> bool:
        """Return whether an orphan with this start time can come from these steps alone."""
        suspects = set()
        with self._lock:
            for step_dir, (begin, end) in self._spans.items():
                if begin <= start <= end:
                    suspects.add(step_dir)
        return self._may_own and bool(suspects) and suspects <= step_dirs


class _Snapshot:
    """The live processes at one moment, by what a tree looks for. Nothing changes it.

    So the stop of one step of many costs what its own processes cost, not what all do.
    """

    def __init__(
        self,
        processes: Sequence[tuple[ProcessInfo, _Marks]] = (),
        unclear: Sequence[ProcessInfo] = (),
        writers: Mapping[FileIdentity, Sequence[ProcessInfo]] = types.MappingProxyType({}),
    ) -> None:
        self.processes = processes
        self.unclear = unclear  # those of them whose marks could not be read, and may be of a step
        self.writers = writers  # which unmarked ones may write a file
        self.by_pid: dict[int, ProcessInfo] = {}  # these are without this process and daemons, which are never members
        self.by_mark: dict[bytes, list[ProcessInfo]] = {}
        self.by_session: dict[int, list[ProcessInfo]] = {}
        self.by_parent: dict[int, list[ProcessInfo]] = {}
        self.orphans: list[ProcessInfo] = []  # unmarked children of this process
        own_pid = os.getpid()
        marked: dict[int, bytes] = {}
        for process, marks in processes:
            marked[process.pid] = marks.step_dir
            if process.pid == own_pid or marks.is_daemon:
                continue
            self.by_pid[process.pid] = process
            self.by_session.setdefault(process.session, []).append(process)
            self.by_parent.setdefault(process.parent, []).append(process)
            if marks.step_dir:
                self.by_mark.setdefault(marks.step_dir, []).append(process)
            elif process.parent == own_pid and not marks.is_before_exec:
                self.orphans.append(process)
        self.unclear_marks = {marked.get(process.parent, b"") for process in unclear}  # of their parents


class _ProcessTable:
    """The live processes of the host with their marks. Thread-safe.

    A scan costs milliseconds and two descriptors, so there is one at a time, which serves all who asked before it
    began: a task of many steps is stopped at the cost of one.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards the next five
        self._is_scanning = False  # and whoever has set it owns the last two
        self._scans_begun = 0
        self._snapshot = _Snapshot()
        self._snapshot_number = 0  # of the scan that found it
        self._outputs_since_s = float("inf")
        self._files: dict[tuple[_Identity, bytes], frozenset[FileIdentity]] = {}  # that these processes may write
        self._unmarked: dict[tuple[_Identity, bytes], _Marks] = {}  # no exec gives such a process the mark of a step

    def look_for_outputs(self, since_s: float) -> None:
        """Have later scans tell of the files of processes started since then, in seconds since the epoch."""
        with self._changed:
            self._outputs_since_s = min(self._outputs_since_s, since_s)

    def snapshot(self) -> _Snapshot:
        """Return the processes, as found by a scan that began after the call. Raises OSError."""
        with self._changed:
            last_number = self._scans_begun
            while self._is_scanning and self._snapshot_number <= last_number:
                self._changed.wait()
            if self._snapshot_number > last_number:
                return self._snapshot
            self._is_scanning = True
            self._scans_begun += 1
            number = self._scans_begun
        snapshot = None
        try:
            snapshot = self._scan()
            return snapshot
        finally:
            with self._changed:
                self._is_scanning = False
                if snapshot:
                    self._snapshot = snapshot
                    self._snapshot_number = number
                self._changed.notify_all()

    def _scan(self) -> _Snapshot:
        """Read the process table; only marks that an exec cannot change are cached. Raises OSError."""
        processes: list[tuple[ProcessInfo, _Marks]] = []
        unclear: list[ProcessInfo] = []
        unmarked: dict[tuple[_Identity, bytes], _Marks] = {}
        system = _system()
        for process in system.scan():
            key = (process.identity, process.program)
            is_cached = key in self._unmarked
            marks = self._unmarked[key] if is_cached else system.read_marks(process)
            if marks is not None and not marks.step_dir and not marks.is_before_exec:
                unmarked[key] = marks
            is_checked = is_cached or process.is_foreign
            if marks is None or (not is_checked and system.start_time(process.pid) != process.start):
                unclear.append(process)  # it execs, or ended before its marks were read, and may have forked
            processes.append((process, marks or _NO_MARKS))
        self._unmarked = unmarked
        writers = self._find_writers(processes, unclear)
        parents = {process.pid: process.parent for process, _ in processes}
        without_steps = {identity[0] for (identity, _), marks in unmarked.items() if not marks.is_hidden}
        without_steps -= _possible_reapers(parents)  # their children are no step's
        unclear = [process for process in unclear if process.parent not in without_steps]
        return _Snapshot(processes, unclear, writers)

    def _find_writers(
        self,
        processes: Sequence[tuple[ProcessInfo, _Marks]],
        unclear: list[ProcessInfo],
    ) -> dict[FileIdentity, list[ProcessInfo]]:
        """Return which processes may write a file, of those that show no mark and are young: `look_for_outputs`.

        What cannot be read now is added to the unclear ones.
        """
        system = _system()
        known: dict[tuple[_Identity, bytes], frozenset[FileIdentity]] = {}
        writers: dict[FileIdentity, list[ProcessInfo]] = {}
        for process, marks in processes:
            is_marked = marks.step_dir or marks.is_daemon or process.pid == os.getpid()
            if is_marked or system.is_older(process, self._outputs_since_s):
                continue
            key = (process.identity, process.program)
            try:
                files = self._files[key] if key in self._files else system.written_files(process)
            except OSError:
                unclear.append(process)
                continue
            if not marks.is_before_exec:
                known[key] = files
            for file in files:
                writers.setdefault(file, []).append(process)
        self._files = known
        return writers


def _possible_reapers(parents: Mapping[int, int]) -> set[int]:
    """Return the processes whose children may be a step's orphans: this one, its ancestors, and pid 1."""
    reapers = {1}
    pid = os.getpid()
    while pid and pid not in reapers:
        reapers.add(pid)
        pid = parents.get(pid, 0)
    return reapers


class _Shared(NamedTuple):
    """What the trees of this process share."""

    table: _ProcessTable
    lifetimes: _Lifetimes
    reserve: DescriptorReserve


class PosixTree(ProcessTree):
    """Processes of steps, found in the process table; the wrapper, if there is one, leads a session.

    Only members are ever signalled: before every signal the start time is compared.
    """

    def __init__(
        self,
        step_dirs: Iterable[str],
        pid: int,
        child: _Child | None,
        wake_pipe: tuple[int, int],
        shared: _Shared,
    ) -> None:
        self.pid = pid
        self._system = _system()
        self.step_dirs = frozenset(os.fsencode(path) for path in step_dirs)
        self._child = child  # None when an earlier daemon started it
        self._shared = shared
        self._ended = not pid  # whether the wrapper has
        self._start = self._system.start_time(pid) if pid and not child else ""
        self._outputs: _Outputs | None = None  # looked up when it is stopped
        self._wake_out, self._wake_in = wake_pipe  # -1 where no descriptor was free
        self._is_woken = False
        self._is_signalled = False  # the script, if it ran, had the signal to its group
        self._exit_watch = self._system.watch_exit(pid)
        self._pidfd = self._exit_watch.descriptor  # readable from the wrapper's end on
        self._members: set[_Identity] = set()  # processes that are or were of the tree
        self._denied: set[_Identity] = set()  # members that we are not permitted to signal
        self._scan_incomplete = False  # the last scan may have missed a member
        self._close_lock = threading.Lock()  # guards _wake_in: a closed descriptor's number may be another's

    def wait(self, deadline_s: float | None) -> bool:
        while not self._ended and (self._pidfd >= 0 or not self._has_ended()):
            left_s = _MAX_WAIT_S if deadline_s is None else deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            is_woken = self._pause(min(left_s, _MAX_WAIT_S))
            if is_woken:
                return self._has_ended()
        return True

    def wake(self) -> None:
        self._is_woken = True
        with self._close_lock:
            if self._wake_in >= 0:
                os.write(self._wake_in, b"w")

    def exit_code(self) -> int | None:
        if self._child is None:
            return None
        return self._system.exit_code(self._child)

    def stop(self, is_hurried: Callable[[], bool], first_signal: int = signal.SIGTERM) -> None:
        with self._shared.reserve.lend():
            self._signal_own_group(first_signal)
            if is_hurried():  # a scan takes as long as it takes to write hundreds of megabytes
                self._pause(_SIGTERM_LEAD_S)
                self._kill_own_group()
            self._signal_other_groups(first_signal)
            has_ended = self._await_end(is_hurried, first_signal)
            self._kill_all(empty_scans=int(has_ended))

    def close(self) -> None:
        with self._close_lock:
            descriptors = (self._wake_in, self._wake_out)
            for descriptor in descriptors:
                if descriptor >= 0:
                    os.close(descriptor)
            self._exit_watch.close()
            self._pidfd = -1
            self._wake_in = -1
            self._wake_out = -1

    def reap(self) -> None:
        """Reap the wrapper if it has ended and is our child: its numbers may be another's from now on."""
        if self._child is not None:
            self._child.poll()

    def _pause(self, seconds: float) -> bool:
        """Wait at most this long for a `wake` or the wrapper's end; return whether it was a wake."""
        poller = select.poll()
        if self._wake_out >= 0:
            poller.register(self._wake_out, select.POLLIN)
        if self._pidfd >= 0 and not self._ended:
            poller.register(self._pidfd, select.POLLIN)
        if self._wake_out < 0 or (self._pidfd < 0 and not self._ended):
            seconds = min(seconds, _POLL_S)
        timeout_ms = seconds * 1000 + 0.999
        ready = dict(poller.poll(timeout_ms))
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
        """Return whether the wrapper has ended.

        It stays a zombie until `release`: its pid, group and session stay ours.
        """
        if self._ended:
            return True
        if self._child is None:
            self._ended = self._has_vanished()
        else:
            self._ended = self._system.has_ended(self._child)
        return self._ended

    def _has_vanished(self) -> bool:
        """Return whether an adopted wrapper is gone; False where that cannot be read."""
        try:
            start = self._system.start_time(self.pid)
        except OSError:
            return False
        return not start or start != self._start

    def _owns_session(self) -> bool:
        """Return whether the number of the session is certain to be ours."""
        if not self.pid:
            return False
        if not self._has_ended():
            return True
        return self._child is not None and self._child.returncode is None

    # -- the stages of a stop

    def _signal_own_group(self, number: int) -> None:
        """Send a signal to the wrapper's group; again at the next call, until the script had begun before the signal.

        The wrapper itself ignores it: what it forks after the signal would know nothing of it.
        """
        if not self._is_signalled and self._owns_session():
            self._is_signalled = all(map(_has_begun, self.step_dirs))
            _signal_group(self.pid, number)
            _signal_group(self.pid, signal.SIGCONT)

    def _kill_own_group(self) -> None:
        if self._owns_session():
            _signal_group(self.pid, signal.SIGKILL)

    def _signal_other_groups(self, number: int) -> None:
        """Send a signal to the members that the signal to the wrapper's group did not reach, once to each."""
        own_group = self.pid if self._owns_session() else 0
        signalled: set[_Identity] = set()
        for _ in range(_SIGTERM_SCANS):
            for member in self._scan():
                if member.group != own_group and member.identity not in signalled:
                    signalled.add(member.identity)
                    self._signal(member, number)
                    self._signal(member, signal.SIGCONT)
            if not self._scan_incomplete:
                break

    def _await_end(self, is_hurried: Callable[[], bool], first_signal: int) -> bool:
        """Return True when a complete scan has found nothing, False when the grace is over."""
        end_s = time.monotonic() + GRACE_S
        give_up_s = end_s
        pause_s = 0.001
        while time.monotonic() < end_s and not is_hurried():
            self._signal_own_group(first_signal)
            if self._has_running_member() or self._scan():
                give_up_s = end_s
            elif not self._scan_incomplete:
                return True
            else:
                give_up_s = min(give_up_s, time.monotonic() + _INCOMPLETE_SCANS_S)
            if time.monotonic() >= give_up_s:
                break
            self._pause(pause_s)
            pause_s = min(2 * pause_s, _POLL_S)
        return False

    def _has_running_member(self) -> bool:
        """Return, without a scan, whether a member that we may signal, or the wrapper, runs."""
        if not self._has_ended():
            return True
        return any(map(_is_running, self._members - self._denied))

    def _kill_all(self, empty_scans: int) -> None:
        """Send SIGKILL to whatever is left, until three scans in succession were empty, these included."""
        begin_s = time.monotonic()
        last_s = begin_s  # when a member was found
        while empty_scans < 3:
            end_s = min(begin_s + _KILL_TIMEOUT_S, last_s + _INCOMPLETE_SCANS_S)
            if time.monotonic() >= end_s:
                break
            self._kill_own_group()
            members = self._scan()
            for member in members:
                self._signal(member, signal.SIGKILL)
            if members:
                empty_scans = 0
                last_s = time.monotonic()
            elif not self._scan_incomplete:
                empty_scans += 1

    def _signal(self, member: ProcessInfo, number: int) -> None:
        """Signal a member if it is still the process that was found."""
        try:
            if self._system.start_time(member.pid) == member.start:
                os.kill(member.pid, number)
        except PermissionError:  # by sudo; waiting does not help
            if member.identity not in self._denied:
                log.warning("process %d of a step cannot be stopped: it runs as another user", member.pid)
            self._denied.add(member.identity)
        except OSError:  # it is gone, or no descriptor is free: the next scan shows which
            pass

    # -- membership

    def _scan(self) -> list[ProcessInfo]:
        """Return the live members that we may signal."""
        if self._system.hides_environments and self._outputs is None:
            self._outputs = _Outputs(self.step_dirs)
            self._shared.table.look_for_outputs(self._outputs.begin_s)
        try:
            snapshot = self._shared.table.snapshot()
        except OSError:  # no descriptor or memory for a scan
            self._scan_incomplete = True
            time.sleep(_POLL_S)
            return []
        marks = snapshot.unclear_marks
        self._scan_incomplete = b"" in marks or bool(marks & self.step_dirs)  # another step's child is not ours
        members = self._find_evident(snapshot)
        _add_descendants(members, snapshot)
        self._members.update(member.identity for member in members)
        return [member for member in members if member.identity not in self._denied]

    def _find_evident(self, snapshot: _Snapshot) -> set[ProcessInfo]:
        """Return the processes of which there is evidence of themselves, whatever others are."""
        evident: set[ProcessInfo] = set()
        for pid, start in self._members:
            process = snapshot.by_pid.get(pid)
            if process and process.start == start:
                evident.add(process)
        if self._owns_session():
            evident.update(snapshot.by_session.get(self.pid, ()))
        for step_dir in self.step_dirs:
            evident.update(snapshot.by_mark.get(step_dir, ()))
        for file in self._outputs.files if self._outputs else ():
            evident.update(snapshot.writers.get(file, ()))
        for process in snapshot.orphans if self._system.has_subreaper else ():
            if self._shared.lifetimes.can_only_be_of(self.step_dirs, int(process.start)):
                evident.add(process)
        return evident


class _Outputs:
    """The outputs of steps that have begun; `begin_s` is before that, in seconds since the epoch."""

    def __init__(self, step_dirs: Iterable[bytes]) -> None:
        self.files: set[FileIdentity] = set()
        self.begin_s = float("inf")
        for step_dir in step_dirs:
            for name in _STEP_OUTPUTS:
                with contextlib.suppress(OSError):  # it is gone, or there is none
                    output = os.lstat(os.path.join(step_dir, name))
                    if stat.S_ISREG(output.st_mode):  # a script may have put something else there
                        self.files.add(file_identity(output))
                        self.begin_s = min(self.begin_s, self._begin_of(step_dir))

    def _begin_of(self, step_dir: bytes) -> float:
        """Return when the wrapper wrote that it begins; 0 where the script has removed that."""
        try:
            return os.lstat(os.path.join(step_dir, b"pid")).st_mtime
        except OSError:
            return 0.0


def _add_descendants(members: set[ProcessInfo], snapshot: _Snapshot) -> None:
    """Add to the members their children and what is in a session of theirs, until there are no more."""
    foreign_sessions = _own_sessions()
    unvisited = [*members]
    while unvisited:
        member = unvisited.pop()
        related = [*snapshot.by_parent.get(member.pid, ())]
        if member.session not in foreign_sessions:
            related += snapshot.by_session[member.session]
        for process in related:
            if process not in members:
                members.add(process)
                unvisited.append(process)


_PEEK = os.WEXITED | os.WNOHANG | os.WNOWAIT if ON_LINUX else 0  # for waitid: the zombie stays
_INCOMPLETE_SCANS_S = 1.0  # that scans may find nothing but be incomplete, on a busy host
_MAX_LIFETIMES = 10_000  # ended steps are kept for as long as there is an orphan, which may be for ever
_EXEC_SCANS = 10
_CLOCK_STEP_S = 60.0  # by which the clock may have been set while a step ran, as after a sleep of the host
_SIGTERM_LEAD_S = 0.005  # of a SIGTERM before the SIGKILL of a stop in haste
_SIGTERM_SCANS = 3  # more would send it to what members start to clean up
_KERNEL_THREAD = 0x0020_0000  # PF_KTHREAD of include/linux/sched.h


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(OSError):  # it is empty, or all in it run as other users
        os.killpg(group, number)


def _own_sessions() -> set[int]:
    """Return the sessions that are no step's: of this process, and 0, which stands for all outside of its container."""
    return {0, os.getsid(0), os.getpgrp()}


def _clock_ticks() -> int:
    """Return the time as the process table of Linux counts it (proc_pid_stat(5), starttime)."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def _read_proc(pid: int | str, name: str) -> bytes | None:
    """Return a file of the process in /proc; empty when the process is gone, None when we may not read it.

    Raises OSError where no descriptor or memory is free.
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
    content = _read_proc(pid, "stat") or b""
    return content.rpartition(b")")[2].split()


def _is_live(fields: Sequence[bytes]) -> bool:
    """Return whether these fields of /proc/PID/stat are of a process that is no zombie."""
    return bool(fields) and fields[0] not in (b"Z", b"X")


def _start_time(pid: int) -> str:
    """Return when the process started, as /proc shows it; empty when it is gone or a zombie. Raises OSError."""
    fields = _stat_of(pid)
    return fields[19].decode("ascii") if _is_live(fields) else ""


def _is_running(process: _Identity) -> bool:
    """Return whether the process with this pid and start time lives; True where that cannot be read."""
    pid, start = process
    try:
        return _system().start_time(pid) == start
    except OSError:
        return True


def _scan_processes() -> Iterator[ProcessInfo]:
    """Yield every live process of the host but the kernel's, from /proc. Raises OSError."""
    seen: set[str] = set()
    while new := _list_pids() - seen:
        seen |= new  # what these fork meanwhile, the next listing has
        for name in new:
            fields = _stat_of(name)
            if _is_live(fields) and not int(fields[6]) & _KERNEL_THREAD:
                parent_pid, group_id, session = map(int, fields[1:4])
                start = fields[19].decode("ascii")
                yield ProcessInfo(int(name), parent_pid, group_id, session, start)


def _list_pids() -> set[str]:
    """Return the names of the processes in /proc. Raises OSError."""
    return set(filter(str.isdigit, os.listdir("/proc")))


def _read_marks(pid: int) -> _Marks | None:
    """Return the marks of a process; None in the middle of an exec or an exit. Raises OSError.

    A process without a mark belongs to the step whose output it has open.
    """
    environ = _read_proc(pid, "environ")
    if environ == b"" and _is_between_programs(pid):
        return None
    if environ and environ == _own_environ():
        return _NO_MARKS  # a wrapper before its exec; never one of a tree that is being stopped
    marks = _environment_marks((environ or b"").split(b"\0"))
    if marks.step_dir or marks.is_daemon:
        return marks
    return marks._replace(step_dir=_step_of_output(pid))


def _environment_marks(entries: Iterable[bytes]) -> _Marks:
    """Return the marks in an environment, whose entries are KEY=value; of two with the same name the first counts."""
    variables: dict[bytes, bytes] = {}
    for entry in entries:
        name, _, value = entry.partition(b"=")
        variables.setdefault(name, value)
    step_dir = variables.get(_STEP_KEY, b"")
    return _Marks(step_dir, is_daemon=_DAEMON_KEY in variables)


_STEP_OUTPUTS = (b"output", b"stderr")  # in a step's directory; those of an earlier attempt N have .N behind


def _step_of_output(pid: int) -> bytes:
    """Return the directory of the step whose output is a process's standard output or error; empty for none."""
    step_dir = b""
    for number in (1, 2):
        with contextlib.suppress(OSError):  # the process is gone, or we may not read that
            target = os.readlink(f"/proc/{pid}/fd/{number}".encode())
            directory, _, name = target.rpartition(b"/")
            if name.partition(b".")[0] in _STEP_OUTPUTS:
                step_dir = directory
    return step_dir


@functools.lru_cache(maxsize=1)
def _own_environ() -> bytes | None:
    return _read_proc("self", "environ")


def _is_between_programs(pid: int) -> bool:
    """Return whether a process with an empty environment is in the middle of an exec or an exit."""
    fields = _stat_of(pid)
    return not fields or fields[48] == b"0"  # env_end


class _PidFd:
    """An ExitWatch of Linux (pidfd_open(2))."""

    def __init__(self, pid: int) -> None:
        pidfd_open: Callable[[int], int] | None = getattr(os, "pidfd_open", None)
        self.descriptor = -1
        if pid and pidfd_open is not None:
            with contextlib.suppress(OSError):
                self.descriptor = pidfd_open(pid)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


class _System(Protocol):
    """What this operating system tells of processes. Thread-safe; what cannot be told now raises OSError."""

    has_subreaper: bool  # orphans become children of this process
    hides_environments: bool  # of some programs, whose files must tell of their step

    def scan(self) -> Iterator[ProcessInfo]:
        """Yield every live process of the host but the kernel's."""

    def start_time(self, pid: int) -> str:
        """Return when the process started, in whatever unit; empty when it is gone or a zombie."""

    def read_marks(self, process: ProcessInfo) -> _Marks | None:
        """Return the marks of a process; None in the middle of an exec or an exit."""

    def written_files(self, process: ProcessInfo) -> frozenset[FileIdentity]:
        """Return the regular files that a process may write; none where its marks tell of them already."""

    def is_older(self, process: ProcessInfo, time_s: float) -> bool:
        """Return whether a process was started before this time, in seconds since the epoch."""

    def is_wrapper(self, pid: int, step_dir: bytes) -> bool:
        """Return whether the process is the wrapper of a step."""

    def find_wrapper(self, step_dir: bytes) -> int:
        """Return the pid of a step's wrapper that has not written it; 0 where none runs."""

    def watch_exit(self, pid: int) -> ExitWatch | _PidFd:
        """Return what shows the end of a process; of pid 0 nothing."""

    def has_ended(self, child: _Child) -> bool:
        """Return whether a child has ended; it stays a zombie. Raises nothing."""

    def exit_code(self, child: _Child) -> int | None:
        """Return the code of a child that has ended by itself; None of another. Raises nothing."""


class _LinuxSystem(_System):
    has_subreaper = True
    hides_environments = False

    def scan(self) -> Iterator[ProcessInfo]:
        return _scan_processes()

    def start_time(self, pid: int) -> str:
        return _start_time(pid)

    def read_marks(self, process: ProcessInfo) -> _Marks | None:
        return _read_marks(process.pid)

    def written_files(self, process: ProcessInfo) -> frozenset[FileIdentity]:
        return frozenset()

    def is_older(self, process: ProcessInfo, time_s: float) -> bool:
        return True

    def is_wrapper(self, pid: int, step_dir: bytes) -> bool:
        return _is_wrapper(pid, step_dir)

    def find_wrapper(self, step_dir: bytes) -> int:
        return _find_wrapper(step_dir)

    def watch_exit(self, pid: int) -> _PidFd:
        return _PidFd(pid)

    def has_ended(self, child: _Child) -> bool:
        try:
            return os.waitid(os.P_PID, child.pid, _PEEK) is not None
        except ChildProcessError:
            return True

    def exit_code(self, child: _Child) -> int | None:
        with contextlib.suppress(ChildProcessError):  # whoever ignores SIGCHLD has none to wait for
            status = os.waitid(os.P_PID, child.pid, _PEEK)
            if status is not None and status.si_code == os.CLD_EXITED:
                return status.si_status
        return None


class _MacSystem(_System):
    has_subreaper = False
    hides_environments = True

    def __init__(self, kernel: MacKernel) -> None:
        self._kernel = kernel
        self._own = kernel.arguments(os.getpid())

    def scan(self) -> Iterator[ProcessInfo]:
        own_user = os.geteuid()
        for process in self._kernel.list_processes():
            yield ProcessInfo(
                process.pid,
                process.parent,
                process.group,
                process.session,
                str(process.start),
                process.program,
                own_user not in (0, process.user),
            )

    def start_time(self, pid: int) -> str:
        return str(self._kernel.start_of(pid) or "")

    def read_marks(self, process: ProcessInfo) -> _Marks | None:
        """Return the marks of a process; None in the middle of an exec.

        The kernel shows neither the environment of another user's process nor, to anybody, that of Apple's programs.
        """
        if process.is_foreign:
            return _Marks(b"", is_daemon=False, is_hidden=True)
        arguments = self._kernel.arguments(process.pid)
        if arguments is None:
            return None
        if process.parent == os.getpid() and arguments == self._own:  # a wrapper before its exec
            return _NO_MARKS
        return _environment_marks(arguments.environment)._replace(is_hidden=not arguments.environment)

    def written_files(self, process: ProcessInfo) -> frozenset[FileIdentity]:
        return frozenset(self._kernel.written_files(process.pid))

    def is_older(self, process: ProcessInfo, time_s: float) -> bool:
        return int(process.start) / 10**6 < time_s - _CLOCK_STEP_S

    def is_wrapper(self, pid: int, step_dir: bytes) -> bool:
        """Return whether the process is the wrapper of a step.

        By its arguments, for the shell's environment is hidden: the session that it leads tells it from an operator's.
        """
        return _has_wrapper_arguments(self._kernel, pid, step_dir) and _leads_session(pid)

    def find_wrapper(self, step_dir: bytes) -> int:
        for process in self._kernel.list_processes():
            if process.session == process.pid and self.is_wrapper(process.pid, step_dir):
                return process.pid
        return 0

    def watch_exit(self, pid: int) -> ExitWatch:
        return ExitWatch(pid)

    def has_ended(self, child: _Child) -> bool:
        try:
            return not self._kernel.start_of(child.pid)
        except OSError:
            return False

    def exit_code(self, child: _Child) -> int | None:
        """Return the code of a child that has ended by itself.

        Its end is told a moment before it is a zombie (bsd/kern/kern_exit.c, lines 2543 and 2612).
        """
        for _ in range(_EXEC_SCANS):
            status = None
            with contextlib.suppress(OSError):  # it cannot be told now
                status = self._kernel.exit_status(child.pid)
            if status is not None:
                return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
            time.sleep(_POLL_S)
        return None


class _UnknownSystem(_System):
    """A Mac, or another of its family, whose structures are not as declared: a step is its wrapper's session."""

    has_subreaper = False
    hides_environments = False

    def scan(self) -> Iterator[ProcessInfo]:
        for pid in mac_pids():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if is_alive(pid):
                    yield ProcessInfo(pid, 0, os.getpgid(pid), os.getsid(pid), _UNKNOWN_START)

    def start_time(self, pid: int) -> str:
        """Return a word for each live process: nothing tells when it was started."""
        return _UNKNOWN_START if is_alive(pid) else ""

    def read_marks(self, process: ProcessInfo) -> _Marks | None:
        return _Marks(b"", is_daemon=False)

    def written_files(self, process: ProcessInfo) -> frozenset[FileIdentity]:
        return frozenset()

    def is_older(self, process: ProcessInfo, time_s: float) -> bool:
        return True

    def is_wrapper(self, pid: int, step_dir: bytes) -> bool:
        """Return whether the process is the wrapper of a step, by its arguments, which are in no structure."""
        try:
            kernel = MacKernel()
        except AttributeError:
            return False
        return is_alive(pid) and _has_wrapper_arguments(kernel, pid, step_dir) and _leads_session(pid)

    def find_wrapper(self, step_dir: bytes) -> int:
        return 0

    def watch_exit(self, pid: int) -> ExitWatch:
        return ExitWatch(pid)

    def has_ended(self, child: _Child) -> bool:
        try:
            return not is_alive(child.pid)
        except OSError:
            return False

    def exit_code(self, child: _Child) -> int | None:
        """Return the code of a child, which is reaped here."""
        for _ in range(_EXEC_SCANS):
            code = child.poll()
            if code is not None:
                return code if code >= 0 else None
            time.sleep(_POLL_S)  # its end is told a moment before it is a zombie
        return None


_UNKNOWN_START = "unknown"


def _has_wrapper_arguments(kernel: MacKernel, pid: int, step_dir: bytes) -> bool:
    """Return whether a process was started as the wrapper of a step, after its exec if it is in one. Raises OSError."""
    for _ in range(_EXEC_SCANS):
        arguments = kernel.arguments(pid)
        if arguments is not None:
            words = arguments.arguments
            return words[1:2] == [b"-c"] and step_dir in words[3:5]
        time.sleep(_POLL_S)
    return False


def _leads_session(pid: int) -> bool:
    """Return whether a process leads a session that is not ours."""
    try:
        return os.getsid(pid) == pid != os.getsid(0)
    except OSError:
        return False


@functools.lru_cache(maxsize=1)
def _system() -> _System:
    """Return what tells of processes here: the one place that asks which system this is."""
    if ON_LINUX:
        return _LinuxSystem()
    kernel = mac_kernel()
    return _MacSystem(kernel) if kernel else _UnknownSystem()


class PosixProcesses(StepProcesses):
    """Starts, adopts and reaps trees. Thread-safe, but for `reap`.

    `umask` and `descriptors`, a number or "unlimited", are what steps get, as the daemon was started with them.
    """

    initial_files = types.MappingProxyType({"pid": b""})

    def __init__(self, umask: int, descriptors: str, reserve: DescriptorReserve) -> None:
        build()  # it may run git, which must be over before the first step: any child of ours is a step's from then on
        _system()  # a process table that is not as expected is told when the daemon starts
        self._limits = (f"{umask:03o}", descriptors)
        self._wrapper = _RESET_OOM_SCORE + _WRAPPER if _is_spared_by_oom_killer() else _WRAPPER
        self._lifetimes = _Lifetimes()
        self._shared = _Shared(_ProcessTable(), self._lifetimes, reserve)
        self._reaper_lock = threading.Lock()  # guards _is_reaper
        self._is_reaper = False  # until the first step starts: ctypes takes memory that an idle daemon need not
        self._environment = _user_environment()
        for name, value in os.environb.items():
            if not name.startswith(b"REMOTE_EXECUTOR_"):
                self._environment[name] = value
        self._null = os.open(os.devnull, os.O_RDWR)
        self._children: set[int] = set()  # wrappers, until `release`
        self._orphans: set[int] = set()  # other zombies at the last `reap`

    def start(
        self,
        command: Sequence[str],
        step_dir: str,
        cwd: str,
        env: _Environment,
        has_utf_8_console: bool = False,
        has_stdin: bool = False,
        stderr_is_apart: bool = False,
    ) -> PosixTree:
        self._become_reaper()
        wake_pipe = os.pipe()  # first, for nothing may fail once the step runs
        try:
            with contextlib.ExitStack() as closing:
                stdin = self._null
                if has_stdin:
                    file = closing.enter_context(SafeDirectory(step_dir).read("stdin"))
                    stdin = file.fileno()
                outputs = closing.enter_context(_open_outputs(step_dir, stderr_is_apart))
                streams = _Streams(stdin, outputs[0], outputs[-1])
                child = self._spawn(command, step_dir, cwd, env, streams)
        except OSError:
            for descriptor in wake_pipe:
                os.close(descriptor)
            raise
        self._children.add(child.pid)
        return PosixTree((step_dir,), child.pid, child, wake_pipe, self._shared)

    def adopt(self, step_dir: str) -> PosixTree | None:
        mark = os.fsencode(step_dir)
        pid = _read_pid(step_dir)
        if not pid:  # the wrapper has not written it yet, or the script has removed it
            pid = _system().find_wrapper(mark)
        if not pid or not _system().is_wrapper(pid, mark):
            return None
        return PosixTree((step_dir,), pid, None, _open_pipe(), self._shared)

    def remains(self, step_dirs: Sequence[str]) -> PosixTree:
        return PosixTree(step_dirs, 0, None, _open_pipe(), self._shared)

    def may_have_started(self, step_dir: str) -> bool:
        return _may_have_started(step_dir)

    def death_signal(self, code: int) -> int | None:
        """Return the signal that a shell tells as 128 more (POSIX.1-2017, Shell Command Language, 2.8.2).

        A script that exits with such a code by itself looks the same.
        """
        return code - 128 if code - 128 in signal.valid_signals() else None

    def release(self, tree: ProcessTree) -> None:
        if isinstance(tree, PosixTree):
            tree.reap()
            self._children.discard(tree.pid)
            if tree.pid:
                for step_dir in tree.step_dirs:
                    self._lifetimes.end(step_dir)
        tree.close()

    def reap(self) -> None:
        """Reap ended orphans of steps; for one thread.

        Only what was a zombie at the last call too: a child that Popen has not returned yet is no orphan.
        """
        if not _system().has_subreaper:
            return
        now = _clock_ticks()
        if not _has_orphan():
            self._lifetimes.forget_ended(now)
        if not _has_zombie_child():
            return
        own_pid = str(os.getpid()).encode()
        zombies = set()
        for name in _list_pids():
            if _stat_of(name)[:2] == [b"Z", own_pid]:
                zombies.add(int(name))
        zombies -= self._children
        for pid in zombies & self._orphans:
            with contextlib.suppress(ChildProcessError):  # something else has waited for it
                os.waitpid(pid, os.WNOHANG)
        self._orphans = zombies

    def _become_reaper(self) -> None:
        """Make orphans of steps children of this process, where a stop finds them (prctl(2))."""
        with self._reaper_lock:
            if self._is_reaper or not _system().has_subreaper:
                return
            import ctypes

            self._lifetimes.open()
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            self._is_reaper = True

    def _spawn(
        self,
        command: Sequence[str],
        step_dir: str,
        cwd: str,
        env: _Environment,
        streams: _Streams,
    ) -> _Child:
        """Start the wrapper. Raises OSError."""
        with contextlib.suppress(FileExistsError):  # StepDirectory has made it
            os.close(_create(step_dir, "pid"))
        mark = os.fsencode(step_dir)
        self._lifetimes.begin(mark)
        try:
            marked_env = {**env, STEP_ENV_VAR: step_dir}
            environment, arguments = self._environment_for(command, step_dir, marked_env)
            return subprocess.Popen(
                ["/bin/sh", "-c", self._wrapper, step_dir, *self._limits, *arguments],
                stdin=streams.stdin,
                stdout=streams.stdout,
                stderr=streams.stderr,
                cwd=cwd,
                env=environment,
                start_new_session=True,
                close_fds=not _PIPES_ARE_CLOEXEC,  # where they are, so are all by `set_inherited_fds_cloexec`
            )
        except (OSError, ValueError, MemoryError, subprocess.SubprocessError) as error:
            self._lifetimes.end(mark)
            with contextlib.suppress(OSError):  # it is seldom there
                os.unlink(os.path.join(step_dir, "environment"))
            raise _as_os_error(error) from error

    def _environment_for(
        self, command: Sequence[str], step_dir: str, env: _Environment
    ) -> tuple[dict[bytes, bytes], list[str]]:
        """Return the wrapper's environment, and the words of the command that sees exactly `env` beside our own."""
        environment = dict(self._environment)
        for name, value in env.items():
            environment[_env_bytes(name)] = _env_bytes(value)
        unusual = [name for name in env if not _ORDINARY_NAME.fullmatch(name)]
        if not unusual:
            return environment, [*command]
        if getattr(sys, "frozen", False) or not sys.executable:
            assignments = [f"{name}={env[name]}" for name in unusual]
            return environment, ["/usr/bin/env", "--", *assignments, *command]
        content = b"\0".join(name + b"=" + value for name, value in environment.items())
        if content.count(b"\0") >= len(environment):
            raise ValueError("embedded null byte")
        with open(_create(step_dir, "environment"), "wb") as file:
            file.write(content)
        wrapper_environment = {}
        for key in (_STEP_KEY, b"LD_LIBRARY_PATH"):  # the latter may be what our Python needs to start
            if key in environment:
                wrapper_environment[key] = environment[key]
        python = [sys.executable, "-I", "-S", "-c", _EXEC_WITH_ENVIRONMENT]
        return wrapper_environment, [*python, os.path.join(step_dir, "environment"), *command]


# Without pipe2(2), as on macOS, a pipe is closed at exec only from a moment after it was made: what is forked meanwhile
# would keep it, and the Popen of another step wait for its end.
_PIPES_ARE_CLOEXEC = hasattr(os, "pipe2")
_PR_SET_CHILD_SUBREAPER = 36  # include/uapi/linux/prctl.h


def _create(step_dir: str, name: str, flags: int = 0) -> int:
    """Open a new file of a step to write. O_EXCL follows no link that another step has put there. Raises OSError."""
    path = os.path.join(step_dir, name)
    flags |= os.O_WRONLY | os.O_CREAT | os.O_EXCL
    return os.open(path, flags, 0o600)


def _discard(path: str) -> None:
    with contextlib.suppress(OSError):  # it is gone already
        os.unlink(path)


class _Streams(NamedTuple):
    """The descriptors of a step's standard streams."""

    stdin: int
    stdout: int
    stderr: int


@contextlib.contextmanager
def _open_outputs(
    step_dir: str,
    stderr_is_apart: bool,
) -> Iterator[list[int]]:
    """Yield the descriptors of a new step's outputs; on an error remove their files. Raises OSError."""
    names = ["output"]
    if stderr_is_apart:
        names.append("stderr")
    outputs = []
    with contextlib.ExitStack() as closing, contextlib.ExitStack() as undo:
        for name in names:
            outputs.append(_create(step_dir, name, os.O_APPEND))
            closing.callback(os.close, outputs[-1])
            undo.callback(_discard, os.path.join(step_dir, name))
        yield outputs
        undo.pop_all()


def _as_os_error(error: Exception) -> OSError:
    """Return what Popen raised as an OSError."""
    if isinstance(error, OSError):
        return error
    number = errno.EIO
    if isinstance(error, MemoryError):
        number = errno.ENOMEM
    elif isinstance(error, ValueError):
        number = errno.EINVAL
    return OSError(number, str(error) or os.strerror(number))


def _open_pipe() -> tuple[int, int]:
    """Open a pipe for wake-ups; where no descriptor is free return -1 twice, and the tree polls."""
    try:
        return os.pipe()
    except OSError:
        return -1, -1


def _is_spared_by_oom_killer() -> bool:
    """Return whether this process has a negative OOM score, which its children inherit."""
    with contextlib.suppress(OSError, ValueError), open(_OOM_SCORE_FILE, encoding="ascii") as file:  # only of Linux
        return int(file.read()) < 0
    return False


def _has_live_posix_wrapper(step_dir: str) -> bool:
    """Return whether the wrapper of a step lives. Raises OSError."""
    pid = _read_pid(step_dir)
    return pid != 0 and _system().is_wrapper(pid, os.fsencode(step_dir))


def _read_pid(step_dir: str) -> int:
    """Return the pid in a step's file `pid`, 0 without one. Raises OSError where it cannot be read now."""
    lines = _read_pid_file(step_dir)
    words = lines[0].split() if lines else []
    return int(words[0]) if words and words[0].isdigit() else 0


def _may_have_started(step_dir: str) -> bool:
    """Return by the file `pid` whether the script may have run: it was there, empty, before the wrapper.

    The wrapper of version 1.0.0 made it itself, and wrote its pid alone into it before the script ran. Raises OSError
    where it cannot be read now.
    """
    lines = _read_pid_file(step_dir)
    result = os.path.join(step_dir, "rc")
    if lines is None or os.path.lexists(result):
        return True
    if not lines:
        return False
    if len(lines) > 1:
        return True
    return not re.fullmatch(rb"[0-9]+ wrapper\s*", lines[0])


def _has_begun(step_dir: bytes) -> bool:
    """Return whether the script of a step may have begun; True where that cannot be read."""
    try:
        return _may_have_started(os.fsdecode(step_dir))
    except OSError:
        return True


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
    """Return whether the process is the wrapper of a step: it leads a session, and bears the step's mark."""
    fields = _stat_of(pid)
    if not _is_live(fields) or int(fields[3]) != pid:
        return False
    environ = _read_proc(pid, "environ") or b""
    mark = _STEP_KEY + b"=" + step_dir
    return mark in environ.split(b"\0")


def _find_wrapper(step_dir: bytes) -> int:
    """Return the pid of a step's wrapper that has not written it; 0 where none runs. Raises OSError."""
    for _ in range(_EXEC_SCANS):
        leaders = [process.pid for process in _scan_processes() if process.session == process.pid]
        for pid in leaders:
            if _is_wrapper(pid, step_dir):
                words = (_read_proc(pid, "cmdline") or b"").split(b"\0")
                if words[1:2] == [b"-c"] and step_dir in words[3:5]:  # not what it started in a session of its own
                    return pid
        if not any(map(_is_in_exec, leaders)):
            break
        time.sleep(_POLL_S)  # one of them may become the wrapper
    return 0


def _is_in_exec(pid: int) -> bool:
    return _read_proc(pid, "environ") == b"" and _is_between_programs(pid)


def _user_environment() -> dict[bytes, bytes]:
    """Return the variables that a login sets and a service manager may not (systemd.exec(5), User=)."""
    import pwd

    try:
        user = pwd.getpwuid(os.getuid())
    except KeyError:  # a container's user need not be in the database
        return {}
    entries = {
        b"HOME": user.pw_dir,
        b"USER": user.pw_name,
        b"LOGNAME": user.pw_name,
        b"SHELL": user.pw_shell,
    }
    environment = {}
    for name, value in entries.items():
        if value:
            environment[name] = os.fsencode(value)
    return environment


def _env_bytes(text: str) -> bytes:
    """Return text of an environment as UTF-8, whatever the locale; undecodable bytes come back as they were."""
    return text.encode("utf-8", "surrogateescape")


def _has_zombie_child() -> bool:
    try:
        return os.waitid(os.P_ALL, 0, _PEEK) is not None
    except ChildProcessError:
        return False


def _has_orphan() -> bool:
    """Return whether a process of a step has become our child; True where that cannot be read.

    The kernel gives it to the main thread, which starts no steps.
    """
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", "rb") as file:
            return bool(file.read().split())
    except OSError:
        return True


# ======================================================================================================================
# II operating system / Windows processes: trees in Job Objects, behind a batch file
# ======================================================================================================================

# `%*` is the command line. The wrapper's own standard error is NUL: what cmd writes there when it cannot write the
# result is no output of the step. A result that exists already is not the wrapper's: another process made it and may
# have it open, so writing is retried for seconds. The redirection stands before `echo`, or the last digit would be a
# handle's number. Paths are relative to the workspace, the wrapper's directory: so no letter of the root's, such as %,
# means anything to cmd. No process of the step sees the variables that are set below `held`. A code page is set before
# the step's process starts, which may keep the one that it began with.
_BATCH_WRAPPER = """\
{before}@%* {stderr}\r
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
# The exit code of what a stop ends; no script ends with it by itself. Bit 29 is reserved for
# applications (MSDN, "GetLastError"); the codes of the system and its runtimes begin with 0xC0, 0x80 or 0xE0 (C++,
# .NET).
_ENDED_BY_STOP = 0xE052_5252
_SPAWN_ATTEMPTS = 3
# Files that are read again while the step runs: cmd opens a batch file for each of its lines, a later daemon reads the
# pid. The wrapper keeps them open with these share modes, so that nobody else can open them exclusively. A script may
# change or delete itself.
_HELD_FILES = {"pid": 0x01, "run.bat": 0x01, "script.bat": 0x07}  # FILE_SHARE_READ, and with WRITE and DELETE
_FIND_OWN_PROCESS_S = 0.5  # until the first search for a step's own process; most steps are over by then
_MODULE_PATH = "PSMODULEPATH"  # of PowerShell 7, where the daemon was started in it: 5.1 fails on its modules
_OTHER_CHILDREN = ("conhost.exe", "chcp.com")  # of a wrapper: its console's host, and what sets the code page
_UNQUOTED_WORD = re.compile(r"[-/][A-Za-z0-9:]+|Bypass|call")


class _WrapperRecord(NamedTuple):
    """The content of a step's file `pid`, which the daemon writes while the wrapper is suspended.

    The first line identifies the wrapper. A second follows when the wrapper can be adopted, before it may run.
    """

    pid: int
    created: int  # its creation time: a later process may have the same pid
    job_name: str
    may_have_started: bool = False
    is_batch: bool = False  # the step is a batch file that the wrapper itself runs

    @classmethod
    def read(cls, step_dir: str) -> _WrapperRecord | None:
        """Read the file; return None without it or without a complete first line. Raises OSError."""
        try:
            with retry_while_held(open, os.path.join(step_dir, "pid")) as file:
                first, end, second = file.read(200).partition("\n")
            pid, created, job_name = first.split(" ")
            record = cls(int(pid), int(created), job_name)
        except (FileNotFoundError, ValueError):
            return None
        if not end:
            return None
        return record._replace(may_have_started="\n" in second, is_batch="batch" in second)


def _wait_for(handles: Sequence[int], seconds: float) -> int | None:
    """Return the index of the first handle that is signalled; None on timeout. Raises OSError."""
    count = len(handles)
    array = (_HANDLE * count)(*handles)
    timeout_ms = int(seconds * 1000 + 0.999)
    result: int = WaitForMultipleObjects(count, array, False, timeout_ms)
    if result == WAIT_FAILED:
        raise _WinError(_get_last_error())
    index = result - WAIT_OBJECT_0
    return index if index < count else None


def _is_signalled(handle: int) -> bool:
    return _wait_for((handle,), 0) == 0


def _duplicate(
    handle: int,
    process: int,
    access: int = 0,
    is_inherited: bool = False,
) -> int:
    """Duplicate a handle into a process, with the same access or less; return its value there. Raises OSError."""
    copy = _HANDLE()
    options = 0 if access else DUPLICATE_SAME_ACCESS
    DuplicateHandle(GetCurrentProcess(), handle, process, ctypes.byref(copy), access, is_inherited, options)
    return copy.value or 0


def _hand_job(job: int, process: int) -> None:
    """Give a process a handle of its job, whose name lasts as long as a handle is open somewhere. Raises OSError.

    Its children may inherit the handle, which allows nothing but to query the job.
    """
    _duplicate(job, process, JOB_OBJECT_QUERY, is_inherited=True)


def _hold_file(path: str, process: int, share: int) -> None:
    """Have a process keep a file open with this share mode, so that until its end others must open it compatibly."""
    with contextlib.suppress(OSError):  # another process keeps it open, or there is none
        file = retry_while_held(CreateFileW, path, GENERIC_READ, share, None, OPEN_EXISTING, 0, None)
        try:
            _duplicate(file, process)
        finally:
            CloseHandle(file)


def _limit_job(job: int, flags: int) -> None:
    """Set the limits of a job, with which no crash opens a dialog box. Raises OSError."""
    limits = JobLimits(LimitFlags=flags | JOB_OBJECT_LIMIT_DIE_ON_UNHANDLED_EXCEPTION)
    size = ctypes.sizeof(limits)
    SetInformationJobObject(job, JOB_OBJECT_EXTENDED_LIMIT_INFORMATION, ctypes.byref(limits), size)


def job_warning() -> str:
    """Return that the job which this process was started in ends the steps with it; empty where none does.

    sshd, WinRM and Task Scheduler have such jobs. JOBOBJECT_BASIC_LIMIT_INFORMATION (MSDN).
    """
    if not ON_WINDOWS:
        return ""
    limits = JobLimits()
    size = ctypes.sizeof(limits)
    with contextlib.suppress(OSError):  # this process is in no job
        QueryInformationJobObject(None, JOB_OBJECT_EXTENDED_LIMIT_INFORMATION, ctypes.byref(limits), size, None)
    flags = limits.LimitFlags & (JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE | JOB_OBJECT_LIMIT_SILENT_BREAKAWAY_OK)
    if flags != JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE:
        return ""
    return "the session that started this daemon ends it with all its steps when it closes; install it as a service"


def _count_active(job: int) -> int:
    """Return how many processes of a job have not ended."""
    accounting = JobAccounting()
    size = ctypes.sizeof(accounting)
    QueryInformationJobObject(job, JOB_OBJECT_BASIC_ACCOUNTING_INFORMATION, ctypes.byref(accounting), size, None)
    return int(accounting.ActiveProcesses)


def _list_members(job: int) -> list[int]:
    """Return the pids of the live processes of a job (JOBOBJECT_BASIC_PROCESS_ID_LIST). Raises OSError."""
    capacity = 64
    while True:
        table = (ctypes.c_size_t * (1 + capacity))()
        counts = ctypes.cast(table, ctypes.POINTER(wintypes.DWORD))  # of the processes, and of those in the list
        begin = 2 * ctypes.sizeof(wintypes.DWORD) // ctypes.sizeof(ctypes.c_size_t)
        size = ctypes.sizeof(table)
        try:
            QueryInformationJobObject(job, JOB_OBJECT_BASIC_PROCESS_ID_LIST, table, size, None)
        except OSError as error:
            if getattr(error, "winerror", 0) != ERROR_MORE_DATA:
                raise
        else:
            return list(table[begin : begin + counts[1]])
        capacity = 2 * max(capacity, counts[0])


def _end_job(job: int) -> None:
    """Terminate all processes of a job; return when they have ended, or after _KILL_TIMEOUT_S."""
    end_s = time.monotonic() + _KILL_TIMEOUT_S
    while _count_active(job) and time.monotonic() < end_s:
        with contextlib.suppress(OSError):  # some are ending already: try again
            TerminateJobObject(job, _ENDED_BY_STOP)
        time.sleep(_POLL_S)


def list_processes() -> Iterator[tuple[int, int, str]]:
    """Yield pid, parent's pid and lower-case file name of the host's processes."""
    entry = ProcessEntry(Size=ctypes.sizeof(ProcessEntry))
    snapshot = CreateToolhelp32Snapshot(TH32CS_SNAPPROCESS, 0)
    try:
        has_entry = Process32FirstW(snapshot, ctypes.byref(entry))
        while has_entry:
            yield entry.ProcessID, entry.ParentProcessID, entry.ExeFile.lower()
            has_entry = Process32NextW(snapshot, ctypes.byref(entry))
    finally:
        CloseHandle(snapshot)


def _open_child(parent: int, job: int) -> int:
    """Open the step's process, which the wrapper, a member of the job, has started; return 0 without one."""
    members = set(_list_members(job)) - {parent}
    if not members:
        return 0
    for pid, parent_pid, name in list_processes():
        if parent_pid == parent and pid in members and name not in _OTHER_CHILDREN:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                handle: int = OpenProcess(SYNCHRONIZE | PROCESS_QUERY_LIMITED_INFORMATION, False, pid)
                return handle
    return 0


def _open_process(pid: int) -> int:
    """Open a process to watch and control it. Raises OSError."""
    access = SYNCHRONIZE | PROCESS_QUERY_LIMITED_INFORMATION
    access |= PROCESS_TERMINATE | PROCESS_DUP_HANDLE | PROCESS_SET_QUOTA | PROCESS_SUSPEND_RESUME
    handle: int = OpenProcess(access, False, pid)
    return handle


def _open_wrapper(record: _WrapperRecord) -> int:
    """Open the wrapper that the record names; return 0 when it has ended."""
    try:
        process = _open_process(record.pid)
    except PermissionError:  # it is, or what has its pid by now, of a user with more rights than ours
        if _may_be_alive(record):
            raise
        return 0
    except OSError:  # there is no such process
        return 0
    with contextlib.suppress(OSError):
        if _creation_time(process) == record.created and not _is_signalled(process):
            return process
    CloseHandle(process)
    return 0


def _may_be_alive(record: _WrapperRecord) -> bool:
    """Return whether a process has the wrapper's pid, and as far as we may ask, its creation time too."""
    try:
        process: int = OpenProcess(PROCESS_QUERY_LIMITED_INFORMATION, False, record.pid)
    except PermissionError:
        return any(pid == record.pid for pid, _, _ in list_processes())
    except OSError:
        return False
    try:
        code = ctypes.c_int32()
        GetExitCodeProcess(process, ctypes.byref(code))
        return code.value == STILL_ACTIVE and _creation_time(process) == record.created
    finally:
        CloseHandle(process)


def _end_process(process: int) -> None:
    """Terminate a process and close the handle; return when it has ended, or after _KILL_TIMEOUT_S."""
    try:
        TerminateProcess(process, _ENDED_BY_STOP)
        _wait_for((process,), _KILL_TIMEOUT_S)
    except OSError:  # it is ending already
        pass
    finally:
        CloseHandle(process)


def _quote_word(word: str) -> str:
    """Return a word of a line that cmd reads: quoted, unless it is an option, which has no letter special to cmd."""
    return word if _UNQUOTED_WORD.fullmatch(word) else f'"{word}"'


class WindowsTree:
    """One step's wrapper and what it started, in a Job Object. `wake` is thread-safe, the rest for one thread.

    The step ends with its own process, which the wrapper has started and waits for. A wrapper that was killed, or ended
    by Ctrl-C, leaves no result and may end before that process: then the tree waits for the latter.
    """

    def __init__(
        self,
        record: _WrapperRecord,
        step_dir: str,
        wrapper: int,
        job: int,
        child: _Child | None,
    ) -> None:
        self.pid = record.pid
        self._result = os.path.join(step_dir, "rc")
        self._is_batch = record.is_batch
        self._wrapper = wrapper
        self._own_process = 0  # the step's, once it was found
        self._find_after_s = _FIND_OWN_PROCESS_S
        self._job = job
        self._child = child  # None when an earlier daemon started it
        self._woken = CreateEventW(None, False, False, None)
        self._close_lock = threading.Lock()  # guards _woken: a closed handle's number may be another's

    def wait(self, deadline_s: float | None) -> bool:
        """Wait for the step's end until time.monotonic() is `deadline_s`, or a `wake`; return whether it has ended."""
        while not self._has_ended():
            left_s = _MAX_WAIT_S if deadline_s is None else deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            process = self._wrapper
            if self._own_process and _is_signalled(self._wrapper):
                process = self._own_process
            timeout_s = min(left_s, self._find_after_s, _MAX_WAIT_S)
            signalled = _wait_for((process, self._woken), timeout_s)
            if signalled == 1:
                return self._has_ended()
            if signalled is None:
                self.find_own_process()
        return True

    def wake(self) -> None:
        """Make `wait` return."""
        with self._close_lock:
            if self._woken:
                SetEvent(self._woken)

    def exit_code(self) -> int | None:
        """Return the code of an ended step, unsigned, as the system keeps it.

        The wrapper's is that of the step's process. Where the wrapper was killed, that process itself has the code;
        None when it was not found, or when a stop ended it.
        """
        process = self._wrapper if self._has_result() else self._own_process
        if not process or not _is_signalled(process):
            return None
        code = _DWORD()
        GetExitCodeProcess(process, ctypes.byref(code))
        return None if code.value == _ENDED_BY_STOP else int(code.value)

    def stop(self, is_hurried: Callable[[], bool], first_signal: int = signal.SIGTERM) -> None:
        """Terminate all processes of the job, also those that outlived the wrapper.

        At once: no signal is sent to them first, so there is no grace that `is_hurried` could end.
        """
        _end_job(self._job)

    def close(self) -> None:
        """Close the handles; idempotent."""
        with self._close_lock:
            if self._woken:
                for handle in (self._wrapper, self._own_process, self._job, self._woken):
                    if handle:
                        CloseHandle(handle)
            self._woken = 0
        if self._child:
            self._child.poll()

    def find_own_process(self) -> bool:
        """Search for the step's own process, after a longer pause each time; return whether it was found."""
        self._find_after_s *= 2
        if self._is_batch:  # the wrapper runs the step itself, and its children are the step's
            self._find_after_s = _MAX_WAIT_S
        elif not self._own_process:
            self._own_process = _open_child(self.pid, self._job)
        if self._own_process:
            self._find_after_s = _MAX_WAIT_S
        return self._own_process != 0

    def keep_job(self) -> int:
        """Give a handle of the job to what an ended step left running, for later daemons; return one of our own.

        Return 0 where nothing is left, or where the wrapper still runs and has a handle itself.
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
        """Return whether the wrapper reached its last line, even if it could not write the result."""
        return os.path.exists(self._result)

    def _has_ended(self) -> bool:
        """Return whether the step has: its wrapper with a result, or its own process too."""
        if not _is_signalled(self._wrapper):
            return False
        if self._has_result():
            return True
        return not self.find_own_process() or _is_signalled(self._own_process)


class WatchedTree:
    """A step that a daemon with more rights has started: it cannot be opened, so it is only watched until its end."""

    def __init__(self, record: _WrapperRecord) -> None:
        self.pid = record.pid
        self._record = record
        self._woken = threading.Event()

    def wait(self, deadline_s: float | None) -> bool:
        """Wait for the wrapper's end, a `wake` or the deadline; return whether it has ended."""
        while _may_be_alive(self._record):
            left_s = _MAX_WAIT_S if deadline_s is None else deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            if self._woken.wait(min(left_s, _WATCH_S)):
                self._woken.clear()
                return not _may_be_alive(self._record)
        return True

    def wake(self) -> None:
        """Make `wait` return."""
        self._woken.set()

    def exit_code(self) -> int | None:
        """Return None: the result file may have the code."""
        return None

    def stop(self, is_hurried: Callable[[], bool]) -> None:
        """Warn that this daemon may not end the step, if it has not ended by itself."""
        if _may_be_alive(self._record):
            log.warning("process %d of a step cannot be stopped: it was started with more rights", self.pid)

    def close(self) -> None:
        """Do nothing: no handle is held between calls."""


_WATCH_S = 0.5  # between looks at a process that cannot be waited for


class WindowsRemains:
    """What steps whose wrappers have ended left running in their jobs."""

    pid = 0

    def __init__(self, step_dirs: Sequence[str]) -> None:
        self._step_dirs = step_dirs

    def wait(self, deadline_s: float | None) -> bool:
        """Return True: the wrappers have ended."""
        return True

    def wake(self) -> None:
        """Do nothing: `wait` never blocks."""

    def exit_code(self) -> int | None:
        """Return None: the results of these steps are stored."""
        return None

    def stop(self, is_hurried: Callable[[], bool], first_signal: int = signal.SIGTERM) -> None:
        """Terminate all processes of the jobs, at once."""
        for step_dir in self._step_dirs:
            try:
                record = _WrapperRecord.read(step_dir)
                if record is None:
                    continue
                job = OpenJobObjectW(JOB_OBJECT_ALL_ACCESS, False, record.job_name)
            except OSError:  # nothing is left in it, or we may not open it
                continue
            try:
                _end_job(job)
            finally:
                CloseHandle(job)

    def close(self) -> None:
        """Do nothing: no handle is held between calls."""


class WindowsProcesses:
    """Starts, adopts and reaps trees. Thread-safe, but for `reap`."""

    def __init__(self, umask: int, descriptors: str, reserve: object) -> None:
        self._environment = {}
        for name, value in own_environment().items():
            if not name.upper().startswith("REMOTE_EXECUTOR_"):
                self._environment[name] = value
        # What a step starts inherits it: else a crash, a missing DLL or disk opens a box that nobody sees, and waits.
        SetErrorMode(SetErrorMode(0) | SEM_FAILCRITICALERRORS | SEM_NOGPFAULTERRORBOX)
        self._null = os.open(os.devnull, os.O_RDWR)
        self.initial_files: Mapping[str, bytes] = {}  # of a step's directory; its wrapper needs none
        self._left_jobs: collections.deque[int] = collections.deque()  # of ended steps, with processes in them

    def start(
        self,
        command: Sequence[str],
        step_dir: str,
        cwd: str,
        env: _Environment,
        has_utf_8_console: bool = False,
        has_stdin: bool = False,
        stderr_is_apart: bool = False,
    ) -> WindowsTree:
        """Start the command behind the wrapper, its output into the step's files; `env` is added to the daemon's own.

        The wrapper is suspended until it is in its job and its pid is on disk. Raises OSError.
        """
        directory = os.path.relpath(step_dir, cwd)
        result = os.path.join(directory, "rc")
        before = ""
        if has_utf_8_console:
            before = f'@"{system_program("chcp.com")}" 65001 >nul\r\n'
        stderr = "2>&1"
        if stderr_is_apart:
            stderr = f'2>>"{os.path.join(directory, "stderr")}"'
        wrapper = _BATCH_WRAPPER.format(
            before=before,
            result=result,
            stderr=stderr,
            ping=system_program("ping.exe"),
        )
        wrapper_file = os.path.join(step_dir, "run.bat")
        with retry_while_held(open, wrapper_file, "wb") as file:
            file.write(wrapper.encode("ascii"))
        environment = self._step_environment(command[0], env, step_dir)
        words = [os.path.join(directory, "run.bat"), *command]
        line = " ".join(map(_quote_word, words))
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT  # opened to read too: nobody can open it and deny reading
        output = retry_while_held(os.open, os.path.join(step_dir, "output"), flags, 0o600)
        try:
            with contextlib.ExitStack() as closing:
                stdin = self._null
                if has_stdin:
                    stdin_file = closing.enter_context(SafeDirectory(step_dir).read("stdin"))
                    stdin = stdin_file.fileno()
                child = self._spawn(line, stdin, output, cwd, environment)
        except ValueError as error:  # such as a NUL
            raise OSError(errno.EINVAL, str(error)) from error
        finally:
            os.close(output)
        try:
            return self._launch(child, step_dir, is_batch=command[0] == "call")
        except OSError:
            child.kill()
            raise

    def _step_environment(self, program: str, env: _Environment, step_dir: str) -> dict[str, str]:
        """Return the whole environment of a step, without what would mislead its programs.

        Windows PowerShell makes a path of modules of its own where there is none (about_PSModulePath).
        """
        merged = merge_variables(self._environment.items(), env.items(), [(STEP_ENV_VAR, step_dir)])
        given = {name.upper() for name in env}
        misleading = {"ERRORLEVEL"}  # it would hide cmd's own, which the wrapper writes
        if os.path.basename(program).lower() == "powershell.exe" and _MODULE_PATH not in given:
            misleading.add(_MODULE_PATH)
        return {name: value for name, value in merged.items() if name.upper() not in misleading}

    def _spawn(
        self,
        line: str,
        stdin: int,
        output: int,
        cwd: str,
        environment: _Environment,
    ) -> _Child:
        """Start a suspended cmd; retry, for a virus scanner or a busy host may refuse it at first. Raises OSError."""
        shell = system_program("cmd.exe")
        command = f'"{shell}" /D /E:ON /V:OFF /S /C "{line}"'
        attempts = 0
        while True:
            attempts += 1
            try:
                return subprocess.Popen(
                    command,
                    executable=shell,
                    stdin=stdin,
                    stdout=output,
                    stderr=self._null,
                    cwd=cwd,
                    env=environment,
                    creationflags=CREATE_SUSPENDED | CREATE_NO_WINDOW,
                )
            except OSError:
                if attempts == _SPAWN_ATTEMPTS:
                    raise
            time.sleep(_POLL_S)

    def _launch(self, child: _Child, step_dir: str, is_batch: bool) -> WindowsTree:
        """Put a suspended child into a job, which would end it if this process died now, then resume it.

        Once the child has a handle of its job, that survives this process, and the child can be adopted: only then
        is it recorded that it may have started. Raises OSError.
        """
        name = f"Global\\remote_executor-{os.urandom(16).hex()}"  # which nobody can guess and create first
        job = CreateJobObjectW(None, name)
        process = _open_process(child.pid)
        record = _WrapperRecord(child.pid, _creation_time(process), name, True, is_batch)
        tree = WindowsTree(record, step_dir, process, job, child)
        try:
            _limit_job(job, JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE)
            AssignProcessToJobObject(job, process)
            with retry_while_held(open, os.path.join(step_dir, "pid"), "w") as file:
                file.write(f"{record.pid} {record.created} {name}\n")
                file.flush()
                _hand_job(job, process)
                state = "started batch" if is_batch else "started"
                file.write(f"{state}\n")
            for file_name, share in _HELD_FILES.items():
                _hold_file(os.path.join(step_dir, file_name), process, share)
            _limit_job(job, 0)
            NtResumeProcess(process)
        except OSError:
            tree.close()
            raise
        return tree

    def adopt(self, step_dir: str) -> WindowsTree | WatchedTree | None:
        """Return the live tree of a step that an earlier daemon started; None when its wrapper is gone.

        A wrapper that may not have started is ended: the step can start anew.
        """
        record = None
        try:
            record = _WrapperRecord.read(step_dir)
            wrapper = _open_wrapper(record) if record else 0
            if record and wrapper:
                return self._adopt(record, wrapper, step_dir)
        except OSError as error:
            if record and isinstance(error, PermissionError):
                log.warning("%s: the step's process can only be waited for: %s", step_dir, error)
                return WatchedTree(record)
            log.warning("%s: the step cannot be adopted: %s", step_dir, error)
        return None

    def _adopt(self, record: _WrapperRecord, wrapper: int, step_dir: str) -> WindowsTree | None:
        """Adopt a live wrapper, or end one that has never run. Raises OSError."""
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
        """Return whether anything of the step may have run: the daemon records it first."""
        if os.path.exists(os.path.join(step_dir, "rc")):
            return True
        try:
            record = _WrapperRecord.read(step_dir)
        except OSError:  # another process has it open, so it is unknown
            return True
        return record is not None and record.may_have_started

    def death_signal(self, code: int) -> int | None:
        """Return None: Windows has no signals."""
        return None

    def release(self, tree: ProcessTree) -> None:
        """Release what the tree holds; it has ended, or runs on without us.

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


def _has_live_windows_wrapper(step_dir: str) -> bool:
    """Return whether the wrapper of a step lives. Raises OSError."""
    record = _WrapperRecord.read(step_dir)
    wrapper = _open_wrapper(record) if record else 0
    if wrapper:
        CloseHandle(wrapper)
    return wrapper != 0


if sys.platform == "win32":
    Processes = WindowsProcesses
    has_live_wrapper = _has_live_windows_wrapper
else:
    Processes = PosixProcesses
    has_live_wrapper = _has_live_posix_wrapper

# ======================================================================================================================
# III tasks / task model: states, messages and how the ends of steps become the end of their task
# ======================================================================================================================


class State(IntEnum):
    """The state of a task or a step as it is stored and shown. Never renumber."""

    ENDED = 0
    RUNNING = 1
    PENDING = 2
    ERROR = 255


STATE_NAMES = {
    State.ENDED: "Stop",
    State.RUNNING: "Running",
    State.PENDING: "Pending",
    State.ERROR: "System Error",
}
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


class Result(str, Enum):
    """What has become of a task or a step, as a word for programs; stored when it happens. Never rename."""

    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"
    TIMED_OUT = "timed_out"
    OUTPUT_LIMIT = "output_limit"
    LOST = "lost"
    NOT_STARTED = "not_started"
    NOT_RUN = "not_run"


_RESULTS_BY_FORCE = {
    STOPPED: Result.STOPPED,
    TIMED_OUT: Result.TIMED_OUT,
    OUTPUT_EXCEEDED: Result.OUTPUT_LIMIT,
    LOST: Result.LOST,
}


class Outcome(NamedTuple):
    """How a step ended; `reason` is why it did not end by itself, `signal` what killed its process."""

    code: int
    result: Result
    reason: str = ""
    signal: int | None = None
    output_bytes: int | None = None  # None: its files tell


def exited(code: int, signal_number: int | None = None) -> Outcome:
    """Return the outcome of a step that ended by itself, with this code."""
    result = Result.FAILED if code else Result.SUCCEEDED
    return Outcome(code, result, signal=signal_number)


def forced(reason: str) -> Outcome:
    """Return the outcome of a step that was ended for one of the reasons above."""
    return Outcome(FORCED_CODE, _RESULTS_BY_FORCE[reason], reason)


def not_started(reason: str) -> Outcome:
    """Return the outcome of a step that could not start, for a reason of its own."""
    return Outcome(FORCED_CODE, Result.NOT_STARTED, reason)


def task_result(stop: str, results: Iterable[str]) -> Result:
    """Return the result of an ended task: why it was ended as a whole, else that of its first failed step."""
    if stop:
        return _RESULTS_BY_FORCE[stop]
    for result in results:
        if result not in (Result.SUCCEEDED, Result.NOT_RUN):
            return Result(result)
    return Result.SUCCEEDED


def name_steps(steps: Iterable[tuple[int, str]]) -> str:
    """Return the text by which messages list steps, from index and name of each."""
    return "; ".join(f"Step: {index}, Name: {name}" for index, name in steps)


def summarize(steps: Iterable[tuple[int, str, int]]) -> tuple[int, str]:
    """Return code and message of an ended task, from index, name and code of its steps."""
    total = 0
    failed = []
    for index, name, code in steps:
        if code:
            total += code
            failed.append((index, name))
    if failed:
        return total, f"execution failed: [{name_steps(failed)}]"
    return 0, TASK_SUCCEEDED


def format_failure(index: int, name: str, code: int, reason: str) -> str:
    """Return how a failed step is shown, in its own message and in its task's."""
    text = f"Step: {index}, Name: {name}, Exit Code: {code}"
    return f"{text}: {reason}" if reason else text


def step_message(
    index: int,
    name: str,
    state: int,
    code: int,
    reason: str,
) -> str:
    """Return the `msg` of a step."""
    if state == State.PENDING:
        return STEP_PENDING
    if state == State.RUNNING:
        return STEP_RUNNING
    if code:
        return format_failure(index, name, code, reason)
    return STEP_SUCCEEDED


MAX_RETRIES = 100
MAX_RETRY_DELAY_NS = 3600 * _SECOND_NS


class Retry(NamedTuple):
    """How often a step that failed is tried again; `codes` are the exit codes for which it is, empty for any."""

    limit: int
    delay_ns: int
    backoff: float
    codes: tuple[int, ...]

    def applies(self, outcome: Outcome, attempt: int) -> bool:
        """Return whether a step is tried again after this outcome of this attempt."""
        if not outcome.code or outcome.result is Result.STOPPED or attempt > self.limit:
            return False
        return not self.codes or outcome.code in self.codes

    def delay_after(self, attempt: int) -> int:
        """Return how many nanoseconds pass between this attempt's end and the next one."""
        grown_ns = self.delay_ns * self.backoff ** (attempt - 1)
        return int(min(grown_ns, MAX_RETRY_DELAY_NS))


class When(str, Enum):
    """What must have become of all that a step depends on, directly or not, for it to run. Never rename."""

    SUCCESS = "success"  # nothing has failed
    FAILURE = "failure"  # something has
    ALWAYS = "always"


class StepSpec(NamedTuple):
    """A step as submitted; `depends_on` are indexes of steps, `timeout_ns` is 0 for the default, `stdin` is Base64.

    Give each later field a default: the fingerprint of a submission that lacks it then stays what it was.
    """

    name: str
    command_type: str
    content: str
    env: tuple[str, ...]
    depends_on: tuple[int, ...]
    timeout_ns: int
    stdin: str = ""
    stderr: str = "joined"
    retry: Retry | None = None
    when: When = When.SUCCESS


class DoneStep(NamedTuple):
    """A step that a task takes over from its parent, since it succeeded there."""

    step_index: int
    started_ns: int | None
    ended_ns: int | None
    attempt: int
    output_bytes: int | None


class TaskSpec(NamedTuple):
    """A task as submitted; `timeout_ns` is 0 for none, `fingerprint` is a hash of all that makes it this task.

    `delay_ns` is how long it waits at least before its first step, `start_at_ns` the moment of the wall clock until
    which it does. `query` and `steps_json` are the submission as it was given; `warnings` say what of it has no effect.
    `parent` is the id of the task whose submission this repeats. Where it goes on with what that one has left, its
    number is `copy_of`, and `done` are the steps that it takes over.
    """

    id: str
    steps: tuple[StepSpec, ...]
    env: tuple[str, ...]
    timeout_ns: int
    fingerprint: str
    delay_ns: int
    start_at_ns: int
    is_paused: bool
    query: str
    steps_json: str
    warnings: tuple[str, ...] = ()
    parent: str = ""
    copy_of: int = 0
    done: tuple[DoneStep, ...] = ()


# ======================================================================================================================
# III tasks / submission: JSON to frozen specs; an error says where
# ======================================================================================================================

ID_PATTERN = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9_-])?")
ENV_ENTRY_PATTERN = re.compile(r"[^=\x00]+=[^\x00]*")
BOOLEANS = {
    "1": True,
    "t": True,
    "true": True,
    "0": False,
    "f": False,
    "false": False,
}
_WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")
MAX_NAME_LENGTH = 128
# What a submission may have: what is not here is told to be unknown. The parameters by each name that they may have.
_PARAMETERS = {
    "id": "id",
    "timeout": "timeout",
    "time_out": "timeout",
    "ansync": "ansync",
    "async": "ansync",
    "delay": "delay",
    "at": "at",
    "paused": "paused",
    "env_vars": "env_vars",
    "strict": "strict",
}
_REPEATABLE_PARAMETER = "env_vars"
STEP_FIELDS = (
    "command_type",
    "command_content",
    "name",
    "env_vars",
    "depets_on",
    "depends_on",
    "timeout",
    "stdin",
    "stdin_base64",
    "stderr",
    "retry",
    "when",
)
_MAX_WARNINGS = 20  # of a submission; each names up to so many steps
_MAX_SHOWN_LENGTH = 64  # of an unknown name
_REQUIRED_FIELDS = {"command_type": "CommandType", "command_content": "CommandContent"}
Pairs = Sequence[tuple[str, str]]


def parse_json(body: bytes) -> Any:
    """Return the value of a body in UTF-8, or in UTF-16 behind a byte order mark. Raises BadRequest."""
    text = _decode_body(body)
    try:
        return json.loads(text, parse_constant=_reject_constant)
    except RecursionError:
        raise BadRequest("the body is not JSON: nested too deeply") from None
    except ValueError as error:
        if _FORM_START.match(text):
            raise BadRequest("the body is a form: expected JSON, which PowerShell makes by ConvertTo-Json") from None
        raise BadRequest(f"the body is not JSON: {error}") from None


def _decode_body(body: bytes) -> str:
    """Return the text of a body, without a byte order mark: files of Windows PowerShell have one. Raises BadRequest."""
    encoding = "UTF-8"
    if body.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "UTF-16"  # whose codec takes the mark off
    try:
        return body.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise BadRequest(
            f"the body is not {encoding} at byte {error.start}: send JSON in UTF-8, "
            "from Windows PowerShell with -ContentType 'application/json; charset=utf-8'"
        ) from None


# The begin of application/x-www-form-urlencoded, of which no field has a quote or a brace, or of multipart/form-data.
_FORM_START = re.compile(r"[^\s\"'{}\[\]=&]+=|--\S+\r?\nContent-", re.IGNORECASE)


def _reject_constant(word: str) -> None:
    """Raise ValueError: NaN and Infinity, which Python's parser takes, are not of RFC 8259."""
    raise ValueError(f"{word} is not a JSON value")


def parse_submission(body: bytes, query: Pairs, command_types: Iterable[str]) -> TaskSpec:
    """Return the task that a POST asks for. Raises BadRequest, which names the field at fault, such as [2].timeout."""
    unknown = _UnknownNames()
    parameters = _parse_query(query, unknown)
    task_id = _parse_task_id(parameters["id"][1])
    parallel = _parse_bool(*parameters["ansync"])
    timeout_ns = _parse_timeout(*parameters["timeout"])
    start = _parse_start(parameters, timeout_ns)
    task_env = _parse_environment("env_vars", [value for name, value in query if name == "env_vars"])
    body_value = parse_json(body)
    values = [body_value] if isinstance(body_value, dict) else body_value
    if not isinstance(values, list) or not values:
        raise BadRequest("the body must be a JSON array of one step or more")
    items = [_step_fields(index, value, unknown) for index, value in enumerate(values)]
    if _parse_bool(*parameters["strict"]):
        unknown.refuse()
    allowed_types = tuple(command_types)
    steps = []
    for index, item in enumerate(items):
        steps.append(_parse_step(index, item, f"{task_id}-{index}", allowed_types))
    steps = _resolve_dependencies(steps, items, parallel)
    names = [item.get("name") or None for item in items]  # as sent: a default name holds the id, which may be random
    identities = [_identify_step(step) for step in steps]
    identity = [parallel, timeout_ns, task_env, names, identities]
    if any(start):  # a later field, see `_identify_step`
        identity.append(start)
    return TaskSpec(
        task_id,
        tuple(steps),
        task_env,
        timeout_ns,
        _fingerprint(identity),
        *start,
        urllib.parse.urlencode(query),
        json.dumps(items),
        (*unknown.warnings(), *_condition_warnings(steps)),
    )


class _UnknownNames:
    """Names in a submission that mean nothing: each with where it stands, in the order of its first appearance."""

    def __init__(self) -> None:
        self._places: dict[tuple[str, str], list[str]] = {}  # by kind (parameter or field) and name

    def add(self, kind: str, name: str, where: str) -> None:
        """Note a name."""
        self._places.setdefault((kind, name), []).append(where)

    def refuse(self) -> None:
        """Raise BadRequest for the first name, if there is any."""
        for (kind, name), places in self._places.items():
            known = STEP_FIELDS if kind == "field" else _PARAMETERS
            raise BadRequest(f"{places[0]}: unknown {kind} {_shorten(name)}: expected one of {', '.join(known)}")

    def warnings(self) -> tuple[str, ...]:
        """Return a line for each name; of many, a line that counts the rest."""
        lines = []
        for (kind, name), places in itertools.islice(self._places.items(), _MAX_WARNINGS):
            shown = ", ".join(places[:_MAX_WARNINGS])
            if len(places) > _MAX_WARNINGS:
                shown += f" and {len(places) - _MAX_WARNINGS} more"
            lines.append(f"{shown}: unknown {kind} {_shorten(name)}: ignored")
        if len(self._places) > _MAX_WARNINGS:
            lines.append(f"{len(self._places) - _MAX_WARNINGS} more unknown names: ignored")
        return tuple(lines)


def _shorten(name: str) -> str:
    """Return a name that a client has chosen as texts show it: quoted, on one line, and not long."""
    if len(name) > _MAX_SHOWN_LENGTH:
        name = name[:_MAX_SHOWN_LENGTH] + "..."
    return repr(name)


def _step_fields(index: int, value: Any, unknown: _UnknownNames) -> dict[str, Any]:
    """Return the fields of a step, by their names in lower case, as Go's parser of JSON takes them in any."""
    where = f"[{index}]"
    if not isinstance(value, dict):
        raise BadRequest(f"{where}: a step must be a JSON object")
    fields = lower_keys(where, value)
    for name in fields:
        if name not in STEP_FIELDS:
            unknown.add("field", name, where)
    return fields


def lower_keys(where: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its keys in lower case. Raises BadRequest for keys that differ in case alone."""
    fields: dict[str, Any] = {}
    for key, item in value.items():
        name = key.lower()
        if name in fields:
            raise BadRequest(f"{where}: {_shorten(key)} stands twice in different case: give one of them")
        fields[name] = item
    return fields


def check_rerun(changes: Pairs) -> None:
    """Raise BadRequest for changes that `parse_rerun` would refuse, whatever is submitted again."""
    _parse_task_id(_parse_query(changes, _UnknownNames())["id"][1])
    _parse_environment("env_vars", [value for name, value in changes if name == "env_vars"])


def parse_rerun(
    query: str,
    steps: Any,
    parent: str,
    changes: Pairs,
    command_types: Iterable[str],
) -> TaskSpec:
    """Return the task that repeats a submission, with the id and `env_vars` of these changes. Raises BadRequest."""
    parameters = []
    for name, value in urllib.parse.parse_qsl(query, keep_blank_values=True):
        if name != "id":
            parameters.append((name, value))
    for name, value in changes:
        if name == "env_vars":
            parameters.append((name, value))
    task_id = _parse_task_id(_parse_query(changes, _UnknownNames())["id"][1])
    parameters.append(("id", task_id))
    _rename_defaults(steps, parent, task_id)
    body = json.dumps(steps).encode()
    spec = parse_submission(body, parameters, command_types)
    fingerprint = _fingerprint([spec.fingerprint, parent])
    return spec._replace(parent=parent, fingerprint=fingerprint)


def _rename_defaults(
    steps: Sequence[dict[str, Any]],
    task_id: str,
    new_id: str,
) -> None:
    """Change what steps depend on, where that are default names, which have the id of their task."""
    names = {}
    for index, item in enumerate(steps):
        if not item.get("name"):
            names[f"{task_id}-{index}"] = f"{new_id}-{index}"
    for item in steps:
        for key in ("depets_on", "depends_on"):
            if item.get(key):
                item[key] = [names.get(name, name) for name in item[key]]


def continue_task(
    spec: TaskSpec,
    parent_number: int,
    done: Sequence[DoneStep],
) -> TaskSpec:
    """Return the same task, which takes over these steps of its parent, and its workspace."""
    indexes = [step.step_index for step in done]
    fingerprint = _fingerprint([spec.fingerprint, parent_number, indexes])
    return spec._replace(
        copy_of=parent_number,
        done=tuple(done),
        fingerprint=fingerprint,
    )


def _condition_warnings(steps: Iterable[StepSpec]) -> Iterator[str]:
    """Yield which steps will never run, whatever the others do."""
    for index, step in enumerate(steps):
        if step.when is When.FAILURE and not step.depends_on:
            yield f"[{index}].when: 'failure' is never true: the step depends on no other, so it will not run"


def _fingerprint(submission: Any) -> str:
    """Return a hash of a value that JSON can hold."""
    import hashlib  # here, because OpenSSL takes half a megabyte that an idle daemon need not

    return hashlib.sha256(json.dumps(submission).encode()).hexdigest()


def _identify_step(step: StepSpec) -> list[Any]:
    """Return what the fingerprint covers of a step: the fields of 1.0, and later ones that are not at their default.

    So a field that is added to StepSpec changes the fingerprint of no submission that lacks it.
    """
    identity = [
        "",
        step.command_type,
        step.content,
        step.env,
        step.depends_on,
        step.timeout_ns,
    ]
    later = {}
    for name in StepSpec._fields[len(identity) :]:
        value = getattr(step, name)
        if value != StepSpec._field_defaults[name]:
            later[name] = value
    if later:
        identity.append(later)
    return identity


def _parse_query(query: Pairs, unknown: _UnknownNames) -> dict[str, tuple[str, str]]:
    """Return the parameters that may be given once: of each the alias that was used, and its text, empty by default."""
    parameters = {name: (name, "") for name in _PARAMETERS.values()}
    for alias, text in query:
        name = _PARAMETERS.get(alias)
        if name is None:
            unknown.add("parameter", alias, "query")
        if name in (None, _REPEATABLE_PARAMETER):
            continue
        earlier = parameters[name][1]
        if earlier not in ("", text):
            raise BadRequest(f"{alias}: given twice, as {earlier!r} and as {text!r}")
        parameters[name] = (alias, text)
    return parameters


def _parse_task_id(text: str) -> str:
    """Return a valid task id, a new UUID where none is given."""
    if not text:
        import uuid

        return str(uuid.uuid4())
    if not ID_PATTERN.fullmatch(text) or _WINDOWS_DEVICE.fullmatch(text):
        raise BadRequest(
            f"invalid id {text!r}: use 1 to 64 of A-Z a-z 0-9 . _ -, starting with a letter or digit, "
            "not ending with a dot, and no Windows device name"
        )
    return text


def _parse_bool(where: str, text: str) -> bool:
    """Return a boolean; an empty text is False."""
    if not text:
        return False
    if text.lower() not in BOOLEANS:
        raise BadRequest(f"{where}: invalid boolean {text!r}: expected true or false")
    return BOOLEANS[text.lower()]


def _parse_timeout(where: str, value: Any) -> int:
    """Return the nanoseconds of a duration, 0 where none is given."""
    if value is None or value == "":
        return 0
    if not isinstance(value, str):
        raise BadRequest(f"{where}: must be a string, a duration such as 90s, 1h30m or 500ms")
    try:
        timeout_ns = parse_duration(value)
    except ValueError as error:
        raise BadRequest(f"{where}: {error}") from None
    if not timeout_ns:
        raise BadRequest(f"{where}: must be more than 0")
    return timeout_ns


def _parse_start(parameters: Mapping[str, tuple[str, str]], timeout_ns: int) -> tuple[int, int, bool]:
    """Return after how many nanoseconds a task starts, or when by the wall clock; and whether it is held until then."""
    delay_ns = 0
    start_at_ns = 0
    delay = parameters["delay"][1]
    at = parameters["at"][1]
    if delay and at:
        raise BadRequest("at: excludes delay: give one of them")
    try:
        if delay:
            delay_ns = parse_duration(delay)
        if at:
            start_at_ns = parse_time(at)
    except ValueError as error:
        name = "delay" if delay else "at"
        raise BadRequest(f"{name}: {error}") from None
    if 0 < timeout_ns <= delay_ns:
        raise BadRequest("timeout: counts from the acceptance, and must be longer than delay")
    return delay_ns, start_at_ns, _parse_bool(*parameters["paused"])


def _require_str(where: str, value: Any) -> str:
    """Return the value if it is a string that can be encoded, for a file or an environment."""
    if not isinstance(value, str):
        raise BadRequest(f"{where}: must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRequest(f"{where}: contains an unpaired surrogate") from None
    return value


def _parse_environment(where: str, value: Any) -> tuple[str, ...]:
    """Return a list of KEY=value, empty where none is given."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise BadRequest(f"{where}: must be a list of KEY=value")
    for index, entry in enumerate(value):
        text = _require_str(f"{where}[{index}]", entry)
        if not ENV_ENTRY_PATTERN.fullmatch(text):
            raise BadRequest(f"{where}[{index}]: invalid entry {text!r}: expected KEY=value")
        name, _, variable = text.partition("=")
        if not fits_environment(variable):
            limit = f"this host allows at most {MAX_VARIABLE_UNITS} UTF-16 units"
            raise BadRequest(f"{where}[{index}]: the value of {name} is too long: {limit}")
    return tuple(value)


def _parse_step(
    index: int,
    item: Mapping[str, Any],
    default_name: str,
    allowed_types: tuple[str, ...],
) -> StepSpec:
    """Return the step of one element, without its dependencies."""
    where = f"[{index}]"
    for key, field in _REQUIRED_FIELDS.items():
        if item.get(key) in (None, ""):
            tag = f"Error:Field validation for '{field}' failed on the 'required' tag"
            raise BadRequest(f"{where}: Key: 'PostStruct.{field}' {tag}")
    command_type = _require_str(f"{where}.command_type", item["command_type"])
    if command_type not in allowed_types:
        raise BadRequest(f"{where}.command_type: unknown {command_type!r}: expected one of {', '.join(allowed_types)}")
    name = item.get("name")
    if name in (None, ""):
        name = default_name
    name = _require_str(f"{where}.name", name)
    if len(name) > MAX_NAME_LENGTH or _CONTROL_CHARACTER.search(name):
        raise BadRequest(f"{where}.name: must have at most {MAX_NAME_LENGTH} characters and no control characters")
    content = _require_str(f"{where}.command_content", item["command_content"])
    if "\0" in content:
        raise BadRequest(f"{where}.command_content: contains a NUL character, which no script may have")
    env = _parse_environment(f"{where}.env_vars", item.get("env_vars"))
    timeout_ns = _parse_timeout(f"{where}.timeout", item.get("timeout"))
    return StepSpec(
        name,
        command_type,
        content,
        env,
        (),
        timeout_ns,
        _parse_stdin(where, item),
        _parse_word(f"{where}.stderr", item.get("stderr"), STDERR_MODES),
        _parse_retry(f"{where}.retry", item.get("retry")),
        When(_parse_word(f"{where}.when", item.get("when"), [*When])),
    )


STDERR_MODES = ("joined", "apart")
RETRY_DEFAULTS = {"limit": 1, "delay": "1s", "backoff": 2, "codes": []}
MAX_BACKOFF = 100
MAX_EXIT_CODE = 0xFFFF_FFFF  # of Windows


def _parse_word(
    where: str,
    value: Any,
    words: Sequence[str],
) -> str:
    """Return one of these words, the first by default."""
    if value in (None, ""):
        return words[0]
    if value not in words:
        raise BadRequest(f"{where}: invalid {value!r}: expected one of {', '.join(words)}")
    return str(value)


def _parse_stdin(where: str, item: Mapping[str, Any]) -> str:
    """Return the Base64 of what a step reads from its standard input, empty by default."""
    text = item.get("stdin") or ""
    encoded = item.get("stdin_base64") or ""
    if not text and not encoded:
        return ""
    if text and encoded:
        raise BadRequest(f"{where}.stdin_base64: excludes stdin: give one of them")
    import base64  # here, because few submissions need it

    data = _require_str(f"{where}.stdin", text).encode()
    if encoded:
        try:
            data = base64.b64decode(_require_str(f"{where}.stdin_base64", encoded), validate=True)
        except ValueError as error:
            raise BadRequest(f"{where}.stdin_base64: invalid Base64: {error}") from None
    return base64.b64encode(data).decode("ascii")


def _is_failure_code(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_EXIT_CODE


def _parse_retry(where: str, value: Any) -> Retry | None:
    """Return how often a step is tried again, None where it is not."""
    if value is None:
        return None
    if not isinstance(value, dict) or not RETRY_DEFAULTS.keys() >= value.keys():
        raise BadRequest(f"{where}: must be an object with limit, delay, backoff or codes")
    given = {name: item for name, item in value.items() if item is not None}
    limit, delay, backoff, codes = {**RETRY_DEFAULTS, **given}.values()
    if type(limit) is not int or not 1 <= limit <= MAX_RETRIES:
        raise BadRequest(f"{where}.limit: must be a number from 1 to {MAX_RETRIES}")
    if type(backoff) not in (int, float) or not 1 <= backoff <= MAX_BACKOFF:
        raise BadRequest(f"{where}.backoff: must be a number from 1 to {MAX_BACKOFF}")
    if not isinstance(codes, list) or not all(map(_is_failure_code, codes)):
        raise BadRequest(f"{where}.codes: must be a list of exit codes from 1 to {MAX_EXIT_CODE}")
    try:
        delay_ns = parse_duration(_require_str(f"{where}.delay", delay))
    except ValueError as error:
        raise BadRequest(f"{where}.delay: {error}") from None
    if delay_ns > MAX_RETRY_DELAY_NS:
        raise BadRequest(f"{where}.delay: must be at most 1h")
    return Retry(limit, delay_ns, float(backoff), tuple(codes))


def _dependency_names(index: int, item: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return where the dependencies of a step stand, such as [1].depets_on, and the names in it."""
    key = "depets_on"
    names: list[str] = []
    for alias in ("depets_on", "depends_on"):
        value = item.get(alias)
        if not value:
            continue
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise BadRequest(f"[{index}].{alias}: must be a list of step names")
        if names and names != value:
            raise BadRequest(f"[{index}].depends_on: differs from depets_on, which is the same field: give one of them")
        if not names:
            key = alias
            names = value
    return f"[{index}].{key}", names


def _resolve_dependencies(
    steps: Sequence[StepSpec], items: Sequence[Mapping[str, Any]], parallel: bool
) -> list[StepSpec]:
    """Return the steps with the indexes of what they depend on.

    Raises BadRequest for duplicate names, dependencies that cannot be, and cycles, with the names in them.
    """
    dependencies = [_dependency_names(index, item) for index, item in enumerate(items)]
    indexes: dict[str, int] = {}
    for index, step in enumerate(steps):
        first = indexes.setdefault(step.name, index)
        if first != index:
            raise BadRequest(f"[{index}].name: {step.name!r} is already the name of [{first}]")
    graph = {}
    for index, (where, names) in enumerate(dependencies):
        depends_on = [_dependency_index(where, name, index, indexes, parallel) for name in names]
        if not parallel and index:
            depends_on.append(index - 1)
        graph[index] = tuple(dict.fromkeys(depends_on))
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        cycle = " -> ".join(steps[index].name for index in reversed(error.args[1]))
        raise BadRequest(f"depets_on: the steps wait for each other: {cycle}") from None
    return [step._replace(depends_on=graph[index]) for index, step in enumerate(steps)]


def _dependency_index(
    where: str,
    name: str,
    index: int,
    indexes: Mapping[str, int],
    parallel: bool,
) -> int:
    """Return the index of the step of that name, on which the step at `index` may depend."""
    dependency = indexes.get(name)
    if dependency is None:
        raise BadRequest(f"{where}: unknown step {name!r}")
    if dependency == index:
        raise BadRequest(f"{where}: step {name!r} depends on itself")
    if dependency > index and not parallel:
        raise BadRequest(f"{where}: {name!r} comes later: steps run in the order given, unless ansync=true")
    return dependency


# ======================================================================================================================
# III tasks / dependency plan: which step may run next
# ======================================================================================================================


class Plan:
    """The dependency graph of one task, by the indexes of its steps; not thread-safe. Raises graphlib.CycleError.

    A step is over when it has ended, or never will run.
    """

    def __init__(self, depends_on: Sequence[Sequence[int]]) -> None:
        self._depends_on = depends_on
        self._failures: set[int] = set()  # steps that failed, or depend on such a one
        graph = dict(enumerate(depends_on))
        self._sorter: graphlib.TopologicalSorter[int] = graphlib.TopologicalSorter(graph)
        self._sorter.prepare()
        self._dependents: dict[int, list[int]] = {}
        for index, dependencies in enumerate(depends_on):
            for dependency in dependencies:
                self._dependents.setdefault(dependency, []).append(index)

    def ready(self) -> list[int]:
        """Return, in order, the steps whose dependencies are all over, each only once."""
        return sorted(self._sorter.get_ready())

    def is_met(self, index: int, when: When) -> bool:
        """Return whether a step that `ready` has returned runs on this condition."""
        if when is When.ALWAYS:
            return True
        has_failure = not self._failures.isdisjoint(self._depends_on[index])
        return has_failure == (when is When.FAILURE)

    def finish(self, index: int, has_failed: bool = False) -> None:
        """Mark a step that `ready` has returned as over. Raises ValueError for any other."""
        if has_failed or not self._failures.isdisjoint(self._depends_on[index]):
            self._failures.add(index)
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
_MAX_SPANS = 100_000  # in a trace, which then holds the first of them
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}  # any other word of a client counts as "other"
METRIC_PREFIX = "remote_executor_"  # of the names of our own metrics
_GC_METRICS = (
    ("collections", "collections", "Runs of the garbage collector."),
    ("collected", "objects_collected", "Objects that it freed."),
    ("uncollectable", "objects_uncollectable", "Objects that it could not free."),
)
_LABEL_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
Sample = tuple[str, Pairs, float]  # a suffix of the metric's name, labels and a value


class MetricFamily(NamedTuple):
    """A metric: its name, type and help, and its samples."""

    name: str
    kind: str
    help: str
    samples: Sequence[Sample]


def metric(
    name: str,
    kind: str,
    text: str,
    value: float | None,
    labels: Pairs = (),
) -> MetricFamily:
    """Return a metric of one sample, or of none where the value is None."""
    samples = []
    if value is not None:
        samples.append(("", labels, value))
    return MetricFamily(name, kind, text, samples)


def format_metrics(families: Iterable[MetricFamily]) -> str:
    """Return the metrics in the text format 0.0.4 of Prometheus (Exposition formats)."""
    lines = []
    for family in families:
        if family.samples:
            lines.append(f"# HELP {family.name} {family.help}")
            lines.append(f"# TYPE {family.name} {family.kind}")
        for suffix, labels, value in family.samples:
            pairs = ",".join(f'{name}="{text.translate(_LABEL_ESCAPES)}"' for name, text in labels)
            braces = f"{{{pairs}}}" if pairs else ""
            lines.append(f"{family.name}{suffix}{braces} {value}")
    lines.append("")
    return "\n".join(lines)


class Histogram:
    """Counts of values at or below each bound; not thread-safe."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def samples(self, labels: Pairs = ()) -> list[Sample]:
        """Return the samples of a metric: cumulative buckets, sum and count."""
        samples: list[Sample] = []
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts):
            total += count
            bucket_labels = (*labels, ("le", str(bound)))
            samples.append(("_bucket", bucket_labels, total))
        samples.append(("_sum", labels, self._sum))
        samples.append(("_count", labels, total))
        return samples


def histogram_metric(name: str, text: str, histograms: Mapping[Pairs, Histogram]) -> MetricFamily:
    """Return a metric of histograms, each with its labels."""
    samples = []
    for labels, histogram in histograms.items():
        samples += histogram.samples(labels)
    return MetricFamily(name, "histogram", text, samples)


class Span(NamedTuple):
    """A piece of work in a thread, as a trace shows it; `begin_s` is of time.perf_counter()."""

    name: str
    category: str
    begin_s: float
    seconds: float
    thread_id: int
    thread_name: str
    args: Mapping[str, Any]


def _ended_span(
    name: str,
    category: str,
    seconds: float,
    args: Mapping[str, Any],
) -> Span:
    """Return a span of this thread that ends now."""
    begin_s = time.perf_counter() - seconds
    thread_name = threading.current_thread().name
    return Span(name, category, begin_s, seconds, threading.get_native_id(), thread_name, args)


def trace_events(spans: Sequence[Span]) -> dict[str, Any]:
    """Return the spans in the Trace Event Format, which Perfetto and chrome://tracing read."""
    pid = os.getpid()
    begin_s = min((span.begin_s for span in spans), default=0.0)
    events: list[dict[str, Any]] = []
    thread_names = {span.thread_id: span.thread_name for span in spans}
    for thread_id, name in thread_names.items():
        events.append(
            {
                "name": "thread_name",
                "ph": "M",
                "pid": pid,
                "tid": thread_id,
                "args": {"name": name},
            }
        )
    for span in spans:
        events.append(
            {
                "name": span.name,
                "cat": span.category,
                "ph": "X",
                "pid": pid,
                "tid": span.thread_id,
                "ts": (span.begin_s - begin_s) * 1e6,
                "dur": span.seconds * 1e6,
                "args": span.args,
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


class Metrics:
    """Counts what the daemon does since its start. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below, for some hundred nanoseconds at a time
        self._steps = {"succeeded": 0, "failed": 0, "forced": 0}
        self._step_seconds = Histogram(_STEP_BOUNDS_S)
        self._queue_seconds = Histogram(_QUEUE_BOUNDS_S)
        self._output_bytes = 0
        self._commit_seconds = Histogram(_REQUEST_BOUNDS_S)
        self._changes = 0
        self._requests: collections.Counter[tuple[str, str, int]] = collections.Counter()
        self._request_seconds: dict[tuple[str, str], Histogram] = {}
        self._running: dict[tuple[str, int], Span] = {}  # steps, with no end yet
        self._spans: list[Span] | None = None  # while a trace is taken

    def commit(self, seconds: float, changes: int) -> None:
        """Count a commit of the store."""
        with self._lock:
            self._commit_seconds.add(seconds)
            self._changes += changes
            self._trace("commit", "store", seconds, {"changes": changes})

    def step_started(self, task_id: str, step_index: int, waited_s: float) -> None:
        """Count the start of a step, so many seconds after it was ready."""
        span = _ended_span(f"{task_id} step {step_index}", "step", 0.0, {"waited_s": waited_s})
        with self._lock:
            self._queue_seconds.add(waited_s)
            self._running[task_id, step_index] = span

    def step_requeued(self, task_id: str, step_index: int) -> None:
        """Forget the start of a step, if there was one: nothing of it has run."""
        with self._lock:
            self._running.pop((task_id, step_index), None)

    def step_ended(
        self,
        task_id: str,
        step_index: int,
        result: str,
        seconds: float,
        output_bytes: int,
    ) -> None:
        """Count the end of a step; `result` is succeeded, failed or forced."""
        with self._lock:
            self._steps[result] += 1
            self._step_seconds.add(seconds)
            self._output_bytes += output_bytes
            args = {"result": result, "output_bytes": output_bytes}
            started = self._running.pop((task_id, step_index), None)
            if started:
                args = {**started.args, **args}
            self._trace(f"{task_id} step {step_index}", "step", seconds, args)

    def request(self, method: str, template: str, status: int, seconds: float) -> None:
        """Count an answered request; the template is empty where no route has its path."""
        if method not in _METHODS:
            method = "other"
        key = (template, method)
        with self._lock:
            self._requests[template, method, status] += 1
            if key not in self._request_seconds:
                self._request_seconds[key] = Histogram(_REQUEST_BOUNDS_S)
            self._request_seconds[key].add(seconds)
            if self._spans is not None:
                self._trace(f"{method} {template}", "request", seconds, {"status": status})

    def _trace(
        self,
        name: str,
        category: str,
        seconds: float,
        args: Mapping[str, Any],
    ) -> None:
        """Add a span of this thread that ends now to the trace, if one is taken; the lock is held."""
        if self._spans is not None and len(self._spans) < _MAX_SPANS:
            self._spans.append(_ended_span(name, category, seconds, args))

    def trace(self, seconds: float) -> list[Span]:
        """Wait, and return what has ended meanwhile and the steps that still run; for one thread at a time."""
        with self._lock:
            self._spans = []
        time.sleep(seconds)
        now_s = time.perf_counter()
        with self._lock:
            spans = self._spans
            self._spans = None
            running = [*self._running.values()]
        for span in running:
            args = {**span.args, "result": "still running"}
            spans.append(span._replace(seconds=now_s - span.begin_s, args=args))
        return spans

    def families(self) -> list[MetricFamily]:
        """Return all counts as metrics."""
        with self._lock:
            return [*self._step_families(), *self._request_families(), *self._store_families()]

    def _step_families(self) -> list[MetricFamily]:
        steps = [("", (("result", result),), count) for result, count in self._steps.items()]
        return [
            MetricFamily(METRIC_PREFIX + "steps_ended_total", "counter", "Steps that ended, by result.", steps),
            histogram_metric(METRIC_PREFIX + "step_duration_seconds", "How long steps ran.", {(): self._step_seconds}),
            histogram_metric(
                METRIC_PREFIX + "step_queue_seconds", "How long ready steps waited.", {(): self._queue_seconds}
            ),
            metric(METRIC_PREFIX + "step_output_bytes_total", "counter", "What ended steps wrote.", self._output_bytes),
        ]

    def _request_families(self) -> list[MetricFamily]:
        requests = []
        for (template, method, status), count in self._requests.items():
            labels = (*_route_labels(template, method), ("status", str(status)))
            requests.append(("", labels, count))
        histograms = {}
        for (template, method), histogram in self._request_seconds.items():
            histograms[_route_labels(template, method)] = histogram
        return [
            MetricFamily(METRIC_PREFIX + "http_requests_total", "counter", "Requests answered.", requests),
            histogram_metric(
                METRIC_PREFIX + "http_request_duration_seconds",
                "From a request's first byte to its answer's last.",
                histograms,
            ),
        ]

    def _store_families(self) -> list[MetricFamily]:
        return [
            histogram_metric(
                METRIC_PREFIX + "store_commit_duration_seconds",
                "How long commits took.",
                {(): self._commit_seconds},
            ),
            metric(METRIC_PREFIX + "store_changes_total", "counter", "Changes in these commits.", self._changes),
        ]


def _route_labels(template: str, method: str) -> Pairs:
    return ("route", template or "none"), ("method", method)


def process_families(stats: ProcessStats) -> list[MetricFamily]:
    """Return metrics of the process and its Python, by the names of the official clients of Prometheus."""
    families = [
        metric("process_cpu_seconds_total", "counter", "User and system CPU time.", stats.cpu_s),
        metric("process_resident_memory_bytes", "gauge", "Resident memory.", stats.resident_bytes),
        metric("process_virtual_memory_bytes", "gauge", "Virtual memory.", stats.virtual_bytes),
        metric("process_open_fds", "gauge", "Open file descriptors, on Windows handles.", stats.open_files),
        metric("process_max_fds", "gauge", "The most of them.", stats.max_files),
        metric("process_threads", "gauge", "Threads.", stats.threads),
        metric("process_start_time_seconds", "gauge", "When it started, since the epoch.", stats.started_s),
    ]
    generations = gc.get_stats()
    for key, name, text in _GC_METRICS:
        samples: list[Sample] = []
        for number, counts in enumerate(generations):
            labels = (("generation", str(number)),)
            samples.append(("", labels, counts[key]))
        families.append(MetricFamily(f"python_gc_{name}_total", "counter", text, samples))
    return families


# ======================================================================================================================
# III tasks / step directory: a step's script, its output, its pid and its result
# ======================================================================================================================

_BLOCK_BYTES = 1 << 17
_MAX_SCRIPT_LOOK_BYTES = 1 << 20
# It has not begun, or has removed it, or replaced it or a directory above it; of a socket it is ENXIO.
_NO_OUTPUT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL, errno.ENXIO}
_HEAD_BYTES = 256  # more than a pid file or a result has
_RESULT = re.compile(rb"(-?[0-9]{1,10})\s*\n")  # bounded, for a step may write there too
_CODE_MODULUS = 1 << 32  # on Windows, where cmd writes those above 2**31 as negative numbers
_LATE_RESULT = re.compile(rb"^ended (-?[0-9]{1,10})\n", re.MULTILINE)
_EARLIER_OUTPUT = re.compile(r"(output|stderr)\.[0-9]+")
OUTPUT_STREAMS = {"stdout": "output", "stderr": "stderr"}


def is_output_name(name: str) -> bool:
    """Return whether a file of a step's directory has its output, of the last attempt or an earlier one."""
    return name in OUTPUT_STREAMS.values() or _EARLIER_OUTPUT.fullmatch(name) is not None


def output_name(stream: str, earlier_attempt: int | None = None) -> str:
    """Return the name of the file to which a step writes a stream, or wrote it in an earlier attempt."""
    name = OUTPUT_STREAMS[stream]
    return name if earlier_attempt is None else f"{name}.{earlier_attempt}"


def _rename_once(directory: SafeDirectory, name: str, new: str) -> None:
    """Rename a file unless it is not there, or the new name is taken."""
    with contextlib.suppress(FileNotFoundError):
        directory.status(name)
        try:
            directory.status(new)
        except FileNotFoundError:
            directory.move_from(directory, name, new)


class StepDirectory:
    """The files of one step; any thread may read them, one prepares them.

    A step runs as the daemon's own user: it may have replaced any of them by anything.
    """

    def __init__(self, tasks: SafeDirectory, task_number: int, step_index: int) -> None:
        self._tasks = tasks
        self._names = (str(task_number), str(step_index))
        self.path = os.path.join(tasks.path, *self._names)

    def prepare(
        self,
        name: str,
        content: bytes,
        others: Mapping[str, bytes],
        attempt: int = 1,
    ) -> str:
        """Make the directory with the script and these other files in it; return the script's path.

        Only the outputs of earlier attempts stay in it. Raises OSError; then a later call begins anew.
        """
        files = {name: content, **others}
        if attempt > 1 and self._keep_outputs(attempt - 1):
            self._tasks.make(*self._names, content=files, may_exist=True)
            return os.path.join(self.path, name)
        try:
            self._tasks.make(*self._names, content=files)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):  # a parallel step did
                self._tasks.make(self._names[0])
            self._tasks.make(*self._names, content=files)
        except FileExistsError:  # an earlier attempt made it, which did not start the step; or another step of the task
            is_removed = self._tasks.remove(*self._names)  # unless a crash left a process of Windows suspended in it
            self._tasks.make(*self._names, content=files, may_exist=not is_removed)
        return os.path.join(self.path, name)

    def _keep_outputs(self, attempt: int) -> bool:
        """Rename the outputs of this attempt, and remove all but these and earlier ones; return whether that is done.

        A call that was cut short is repeated: what has its later name then keeps it.
        """
        try:
            with self._tasks.enter(*self._names) as directory:
                for stream in OUTPUT_STREAMS:
                    _rename_once(directory, output_name(stream), output_name(stream, attempt))
                names = [entry.name for entry in directory.entries()]
                others = [name for name in names if not _EARLIER_OUTPUT.fullmatch(name)]
                return all([directory.remove(name) for name in others])
        except OSError as error:
            if is_scarcity(error):
                raise
            return False  # the step has put something else in its place

    def exit_code(self) -> int | None:
        """Return the result that the wrapper left, None while there is none. Only a whole line counts.

        A wrapper that has no room for a file of its own appends the result to its pid file.
        Raises OSError where descriptors or memory are missing for now.
        """
        match = _RESULT.fullmatch(self._head("rc"))
        if match is None:
            match = _LATE_RESULT.search(self._head("pid"))
        return int(match[1]) % _CODE_MODULUS if match else None

    def _head(self, name: str) -> bytes:
        """Return the first bytes of a file, none where there is no such regular file."""
        try:
            with self._tasks.read(*self._names, name) as file:
                return file.read(_HEAD_BYTES)
        except OSError as error:
            if is_scarcity(error):
                raise
            return b""

    def output_bytes(self, attempt: int = 1) -> int:
        """Return how much the last attempt, which is this one, has written to both streams."""
        total = 0
        for stream in OUTPUT_STREAMS:
            for name in (output_name(stream, attempt), output_name(stream)):
                with contextlib.suppress(OSError):  # there is none, or the step has removed it
                    total += os.lstat(os.path.join(self.path, name)).st_size
                    break
        return total

    def writes_in_host_page(self) -> bool:
        """Return whether the script is one of cmd that leaves the console in the code page of the host."""
        with contextlib.suppress(OSError), self._tasks.read(*self._names, script_name("cmd")) as file:
            return not changes_to_utf_8(file.read(_MAX_SCRIPT_LOOK_BYTES))
        return False

    def open_output(
        self,
        stream: str,
        attempt: int,
        last_attempt: int,
    ) -> io.FileIO | None:
        """Open what an attempt has written so far; None where that is not there, or not a regular file any more.

        `last_attempt` is the last one that is stored as begun. Raises OSError where it cannot be read.
        """
        earlier_name = output_name(stream, attempt)
        file = self._open(earlier_name)
        if file is None and attempt == last_attempt:
            file = self._open(output_name(stream))
            renamed = self._open(earlier_name)  # meanwhile, when the next attempt was prepared: then `file` may be its
            if renamed and file:
                file.close()
            file = renamed or file
        return file

    def _open(self, name: str) -> io.FileIO | None:
        try:
            return self._tasks.read(*self._names, name)
        except OSError as error:
            if error.errno in _NO_OUTPUT:
                return None
            raise

    def read_output(self, attempt: int = 1) -> Iterator[bytes]:
        """Return what the last attempt, which is this one, has written so far, in blocks.

        That is stdout, then stderr where that is apart; nothing where an output is not a regular file any more. Raises
        OSError where it cannot be read.
        """
        files = []
        try:
            for stream in OUTPUT_STREAMS:
                files.append(self.open_output(stream, attempt, attempt))
        except OSError:
            for file in filter(None, files):
                file.close()
            raise
        return _read_in_turn(filter(None, files))


def _read_blocks(file: io.FileIO) -> Iterator[bytes]:
    """Yield what a file has now, and close it."""
    with file:
        remaining = os.fstat(file.fileno()).st_size
        while remaining > 0 and (block := file.read(min(remaining, _BLOCK_BYTES))):
            remaining -= len(block)
            yield block


def _read_in_turn(files: Iterable[io.FileIO]) -> Iterator[bytes]:
    """Yield what each file has now, from the begin of a line, and close them."""
    is_within_line = False
    for file in files:
        for index, block in enumerate(_read_blocks(file)):
            if is_within_line and index == 0:
                yield b"\n"
            is_within_line = not block.endswith(b"\n")
            yield block


# ======================================================================================================================
# III tasks / store: sqlite; every statement, one place that writes
# ======================================================================================================================

# The store is the truth: a change is valid once it is committed, and reads see nothing else. Whoever changes something
# queues a change in the same critical section in which memory changes, so that the database has the order of memory;
# one thread takes all that is queued and commits it in one transaction. A change is one of two kinds:
#
# - A request (`_submit`: a submission, the begin of a step, a stop): it may fail, and the error goes to who waits.
# - A record (`_record`: the end of a step): it has happened, so it is tried again until it is stored. Meanwhile it is
#   overtaken by no later record and by no request for the same task; those fail. Other requests go on.
#
# A change of either kind may have to survive a loss of power: a commit with such a one is synced (`PRAGMA synchronous =
# FULL`). Whatever a change raises fails that change alone: its waiter gets the error, and the thread goes on.
#
# What a commit has changed is told to the listeners of `feed`, in the order of the database. Who listens first and then
# reads misses nothing, and need not ask again and again.
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
    """Create the tables of version 1.0.0."""
    for statement in _SCHEMA.split(";\n")[:-1]:
        db.execute(statement)


def _repair_ended_tasks(db: sqlite3.Connection) -> None:
    """Repair what 1.0.0 could store of ended tasks: a step that runs for ever, a wrong sum, scripts kept."""
    db.execute(
        "UPDATE step SET state = 0, code = ?, reason = ? WHERE state = 1 "
        "AND task IN (SELECT seq FROM task WHERE ended_ns IS NOT NULL)",
        (FORCED_CODE, LOST),
    )
    _repair_sums(db)
    db.execute("DELETE FROM script WHERE task NOT IN (SELECT seq FROM task WHERE ended_ns IS NULL)")


def _make_codes_unsigned(db: sqlite3.Connection) -> None:
    """Show the codes of Windows as a client of the original sees them: earlier versions stored signed ones."""
    db.execute("UPDATE step SET code = code + 4294967296 WHERE code < 0")
    _repair_sums(db)


def _repair_sums(db: sqlite3.Connection) -> None:
    """Summarize anew each ended task whose code is not the sum of its steps'."""
    wrong = db.execute(
        "SELECT seq FROM task WHERE ended_ns IS NOT NULL AND state = 0 "
        "AND code != (SELECT total(code) FROM step WHERE task = seq)"
    ).fetchall()
    for (task_number,) in wrong:
        steps = db.execute("SELECT idx, name, code FROM step WHERE task = ? ORDER BY idx", (task_number,))
        code, message = summarize(steps)
        db.execute("UPDATE task SET code = ?, message = ? WHERE seq = ?", (code, message, task_number))


_RESULT_COLUMNS = """
ALTER TABLE task ADD COLUMN result TEXT NOT NULL DEFAULT 'waiting';
ALTER TABLE task ADD COLUMN started_ns INTEGER;                         -- when its first step began
ALTER TABLE task ADD COLUMN starts_ns INTEGER NOT NULL DEFAULT 0;       -- no step begins earlier
ALTER TABLE task ADD COLUMN submitted_by TEXT NOT NULL DEFAULT '';      -- labels of clients
ALTER TABLE task ADD COLUMN stopped_by TEXT NOT NULL DEFAULT '';
ALTER TABLE task ADD COLUMN stop_reason TEXT NOT NULL DEFAULT '';       -- in the client's words
ALTER TABLE step ADD COLUMN result TEXT NOT NULL DEFAULT '';            -- of one that ended, or never will run
ALTER TABLE step ADD COLUMN signal INTEGER;
ALTER TABLE step ADD COLUMN command_type TEXT NOT NULL DEFAULT '';
ALTER TABLE step ADD COLUMN attempt INTEGER NOT NULL DEFAULT 1;
ALTER TABLE step ADD COLUMN output_bytes INTEGER;                       -- NULL: its file tells
ALTER TABLE step ADD COLUMN stopped_by TEXT NOT NULL DEFAULT '';
ALTER TABLE step ADD COLUMN stop_reason TEXT NOT NULL DEFAULT '';
CREATE TABLE submission (                                               -- as it was given
    task INTEGER PRIMARY KEY,
    query TEXT NOT NULL,
    steps TEXT NOT NULL                                                 -- JSON
);
"""
_RESULTS_BY_TEXT = """
UPDATE step SET command_type = ifnull(
    (SELECT command_type FROM script WHERE script.task = step.task AND script.idx = step.idx), '');
UPDATE step SET result = CASE
    WHEN code = 0 THEN 'succeeded'
    WHEN reason = '' THEN 'failed'
    WHEN reason = 'artificial force termination' THEN 'stopped'
    WHEN reason = 'forced termination by timeout' THEN 'timed_out'
    WHEN reason = 'output limit exceeded' THEN 'output_limit'
    WHEN reason LIKE 'lost:%' THEN 'lost'
    ELSE 'not_started' END
    WHERE state = 0;
UPDATE step SET result = 'not_run'
    WHERE state = 2 AND task IN (SELECT seq FROM task WHERE ended_ns IS NOT NULL);
UPDATE task SET started_ns = (SELECT min(started_ns) FROM step WHERE task = seq);
UPDATE task SET result = CASE
    WHEN ended_ns IS NULL AND state = 1 THEN 'running'
    WHEN ended_ns IS NULL THEN 'waiting'
    WHEN state = 255 THEN 'lost'
    WHEN code = 0 THEN 'succeeded'
    WHEN stop = 'artificial force termination' THEN 'stopped'
    WHEN stop = 'forced termination by timeout' THEN 'timed_out'
    ELSE ifnull((SELECT result FROM step WHERE task = seq AND code != 0 ORDER BY idx LIMIT 1), 'failed') END;
"""
# The tasks of each result are counted as they change: to count a million rows takes longer than to read a page of them.
_RESULT_INDEXES = """
CREATE INDEX task_result ON task (result);
CREATE INDEX task_result_ended ON task (result, ended_ns);
CREATE TABLE task_total (result TEXT PRIMARY KEY, tasks INTEGER NOT NULL) WITHOUT ROWID;
CREATE TRIGGER task_added AFTER INSERT ON task BEGIN
    INSERT OR IGNORE INTO task_total VALUES (new.result, 0);
    UPDATE task_total SET tasks = tasks + 1 WHERE result = new.result; END;
CREATE TRIGGER task_removed AFTER DELETE ON task BEGIN
    UPDATE task_total SET tasks = tasks - 1 WHERE result = old.result; END;
CREATE TRIGGER task_changed AFTER UPDATE OF result ON task WHEN old.result != new.result BEGIN
    UPDATE task_total SET tasks = tasks - 1 WHERE result = old.result;
    INSERT OR IGNORE INTO task_total VALUES (new.result, 0);
    UPDATE task_total SET tasks = tasks + 1 WHERE result = new.result; END;
INSERT INTO task_total SELECT result, count(*) FROM task GROUP BY result;
"""


def _add_results(db: sqlite3.Connection) -> None:
    """Add what programs ask for: results, moments, who did it; of earlier tasks as far as their texts tell."""
    for script in (_RESULT_COLUMNS, _RESULTS_BY_TEXT, _RESULT_INDEXES):
        for statement in re.split(r";\s*(?:--.*)?\n(?! )", script)[:-1]:
            db.execute(statement)


_CONDITION_COLUMNS = """
ALTER TABLE step ADD COLUMN condition TEXT NOT NULL DEFAULT 'success';  -- a When
ALTER TABLE step ADD COLUMN retry TEXT NOT NULL DEFAULT 'null';         -- JSON, a Retry
ALTER TABLE step ADD COLUMN retry_at_ns INTEGER;                        -- of one that failed: when it is tried again
ALTER TABLE task ADD COLUMN stop_count INTEGER NOT NULL DEFAULT 0;
ALTER TABLE task ADD COLUMN parent TEXT NOT NULL DEFAULT '';            -- id of the task that it repeats
ALTER TABLE task ADD COLUMN copy_of INTEGER NOT NULL DEFAULT 0;         -- number of the task whose files it needs yet
ALTER TABLE script ADD COLUMN stdin TEXT NOT NULL DEFAULT '';           -- Base64
ALTER TABLE script ADD COLUMN stderr TEXT NOT NULL DEFAULT 'joined';
"""


def _add_conditions(db: sqlite3.Connection) -> None:
    """Add what a step may ask for beyond its script."""
    for statement in re.findall("ALTER .*?;", _CONDITION_COLUMNS):
        db.execute(statement)


_MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (
    _create_tables,
    _repair_ended_tasks,
    _make_codes_unsigned,
    _add_results,
    _add_conditions,
)
_BATCH = 500  # tasks in a query or a transaction
_RETRY_S = 0.5  # between attempts to store a record
_GROUP_COMMIT_DELAY_S = 0.003  # that a change waits for others when nobody waits for it
_READER_TIMEOUT_S = 5.0  # to wait for a connection where no more can be opened
_MAX_IDLE_READERS = 8
_FILE_SUFFIXES = ("", "-wal", "-shm")
_RESERVE_SUFFIX = ".reserve"
_RESERVE_BYTES = 256 * 1024  # -shm takes 32 KiB, -wal what the start and the first commits write
_RUNNING_STEPS = "SELECT task, idx, name FROM step WHERE state = 1 ORDER BY task, idx"
_REQUEUE_TASK = (
    "UPDATE task SET state = ?1, "
    "started_ns = CASE ?1 WHEN 1 THEN ifnull((SELECT min(started_ns) FROM step WHERE task = seq), started_ns) END, "
    "result = CASE WHEN result = 'running' AND ?1 = 2 THEN 'waiting' ELSE result END WHERE seq = ?2"
)
_END_STEP = (  # with the fields of an Outcome
    "UPDATE step SET state = 0, code = ?, result = ?, reason = ?, signal = ?, output_bytes = ?, ended_ns = ? "
    "WHERE task = ? AND idx = ?"
)
_RESUME_TASK = "UPDATE task SET result = CASE state WHEN 1 THEN 'running' ELSE 'waiting' END WHERE seq = ?"
_INDEX = re.compile("0|[1-9][0-9]{0,8}")


class Accepted(NamedTuple):
    """A task as the answer to its submission shows it; `is_new` is False for one that was there before."""

    task_number: int
    id: str
    step_count: int
    accepted_ns: int
    is_new: bool


class TaskRow(NamedTuple):
    """A stored task; `message` is empty until it has ended."""

    task_number: int
    id: str
    step_count: int
    state: int
    code: int
    message: str
    accepted_ns: int
    ended_ns: int | None
    started_ns: int | None = None
    result: str = Result.WAITING
    submitted_by: str = ""
    stopped_by: str = ""
    stop_reason: str = ""
    parent: str = ""
    copy_of: int = 0


class StepRow(NamedTuple):
    """A stored step; `depends_on` is JSON, a list of indexes. `result` is empty until it ended, or never will run."""

    step_index: int
    name: str
    depends_on: str
    state: int
    code: int
    reason: str
    started_ns: int | None
    ended_ns: int | None
    result: str = ""
    signal: int | None = None
    command_type: str = ""
    attempt: int = 1
    output_bytes: int | None = None
    stopped_by: str = ""
    stop_reason: str = ""
    retry_at_ns: int | None = None


class UnfinishedStep(NamedTuple):
    """What the scheduler needs of a step of an unfinished task; `stop` is why it is to be stopped, empty if it is not.

    Each has the fields `name`, `depends_on`, `timeout_ns`, `retry` and `when` of a StepSpec. `attempt` is the last one
    that began, 1 before that; `retry_at_ns` is when the next one begins at the earliest, None where there is none.
    """

    step_index: int
    name: str
    depends_on: tuple[int, ...]
    timeout_ns: int
    state: int
    code: int
    started_ns: int | None
    stop: str
    result: str
    when: When
    retry: Retry | None
    attempt: int
    retry_at_ns: int | None


class UnfinishedTask(NamedTuple):
    """A task that has not ended; `stop` is why it is to be stopped, empty if it is not."""

    task_number: int
    id: str
    timeout_ns: int
    accepted_ns: int
    stop: str
    result: str
    starts_ns: int
    step_count: int
    stop_count: int
    copy_of: int


class Script(NamedTuple):
    """What a step runs; `env` is the task's entries, then the step's; `stdin` is Base64."""

    command_type: str
    content: str
    env: list[str]
    stdin: str
    stderr: str


class Stop(NamedTuple):
    """Why a task or a step is to be stopped: by a deadline, or by a client, with the reason that it gave."""

    cause: str = STOPPED
    client: str = ""
    reason: str = ""


BY_NOBODY = Stop()


class Submission(NamedTuple):
    """What was submitted: the query, as a part of a URL, and the steps as JSON."""

    query: str
    steps: str


class TaskEnd(NamedTuple):
    """How a task ended: the sum of its steps' codes, its message and its result."""

    code: int
    message: str
    result: Result


# The columns whose names are not those of the attributes that hold them.
_COLUMNS = {
    "task_number": "seq",
    "step_count": "count",
    "step_index": "idx",
    "depends_on": "needs",
    "when": "condition",
}


def _select(row: Any, table: str) -> str:
    """Return the query for rows of this NamedTuple."""
    columns = ", ".join(_COLUMNS.get(field, field) for field in row._fields)
    return f"SELECT {columns} FROM {table}"


_TASK = _select(TaskRow, "task")
_STEP = _select(StepRow, "step")
_UNFINISHED_TASK = _select(UnfinishedTask, "task")
_UNFINISHED_STEP = _select(UnfinishedStep, "step")
_SCRIPT = _select(Script, "script")
_Apply = Callable[[sqlite3.Connection], Any]


class Selection(NamedTuple):
    """Which tasks a list shows, and in which order: by acceptance (st), end (et) or expiry (rt).

    `results` is empty for all, `id_glob` too; `limit` is -1 for none. `after` is the cursor of the page before.
    """

    sort: str = "st"
    is_descending: bool = False
    results: tuple[str, ...] = ()
    id_glob: str = ""
    limit: int = -1
    after: str = ""


class Page(NamedTuple):
    """Tasks by number; `cursor` is where the next page begins, empty at the end."""

    task_numbers: list[int]
    cursor: str


# A list is read in segments, each by an index: a task that has not ended has no time to sort it by.
_SEGMENTS = {"st": ("all",), "et": ("unfinished", "ended"), "rt": ("ended", "unfinished")}
_CURSOR = re.compile("(?:([0-9]{1,19})-)?([0-9]{1,19})")  # when it ended, where that is sorted by, and its number
_Position = tuple[int, int]  # the same as numbers


def check_cursor(text: str) -> None:
    """Raise ValueError unless this is the cursor of a page, or empty."""
    if text and (not _CURSOR.fullmatch(text) or max(map(int, re.findall("[0-9]+", text))) > _INT64_MAX):
        raise ValueError(f"invalid cursor {text!r}: expected the `next` of an answer")


def _segments(selection: Selection) -> Iterator[tuple[str, _Position]]:
    """Yield the segments of a list in their order, and after which position each is to be read."""
    names = _SEGMENTS[selection.sort]
    start = (0, 0)
    if selection.is_descending:
        names = names[::-1]
        start = (_INT64_MAX, _INT64_MAX)
    match = _CURSOR.fullmatch(selection.after)
    if match:
        current = names[0]
        if len(names) > 1:
            current = "ended" if match[1] else "unfinished"
        yield current, (int(match[1] or 0), int(match[2]))
        names = names[names.index(current) + 1 :]
    for name in names:
        yield name, start


def _segment_query(
    selection: Selection,
    segment: str,
    after: _Position,
    results: Sequence[str],
) -> tuple[str, list[Any]]:
    """Return the query for a segment of a list after this position, and its values."""
    beyond = "<" if selection.is_descending else ">"
    direction = "DESC" if selection.is_descending else "ASC"
    ended_ns, number = after
    plus = "+" if selection.id_glob else ""  # then by the index of the ids alone (SQLite, "The Query Optimizer")
    order = f"seq {direction}"
    where = f"{plus}seq {beyond} ?"
    values: list[Any] = [number]
    if segment == "unfinished":
        where += f" AND {plus}ended_ns IS NULL"
    elif segment == "ended":
        order = f"ended_ns {direction}, {order}"
        where = f"{plus}ended_ns {beyond}= ? AND (ended_ns {beyond} ? OR seq {beyond} ?)"
        values = [ended_ns, ended_ns, number]
    if results:
        where += f" AND {plus}result IN ({', '.join('?' * len(results))})"
        values += results
    if selection.id_glob:
        where += f" AND {_ID_GLOB}"
        values += _id_glob_values(selection.id_glob)
    return f"SELECT seq, ended_ns FROM task WHERE {where} ORDER BY {order} LIMIT ?", values


_ID_GLOB = "id >= ? AND id < ? AND id GLOB ?"


def _id_glob_values(glob: str) -> tuple[str, str, str]:
    """Return the values of _ID_GLOB: what is literal at its begin bounds the ids, which are ASCII."""
    prefix = re.split(r"[*?\[]", glob)[0]
    return prefix, prefix + "\x7f", glob


class Notice(NamedTuple):
    """What a commit has changed: a task, or the pool where its number is 0, and these steps of the task.

    `deleted_id` is the id of a task whose record is gone, `has_ended` says that the task has ended with this commit.
    """

    task_number: int
    step_indexes: tuple[int, ...] = ()
    deleted_id: str = ""
    has_ended: bool = False


_Listener = Callable[[Notice], None]


_EVERY_TASK = -1  # which is the number of none


class Feed:
    """Tells what each commit has changed, in the order of the database. Thread-safe.

    A listener is called by the thread that writes, so it must not wait. While there is none, nothing is done.
    """

    def __init__(self) -> None:
        self._listeners: dict[int, tuple[_Listener, ...]] = {}  # by the number of the task
        self._lock = threading.Lock()  # guards changes of _listeners

    def has_listeners(self) -> bool:
        return bool(self._listeners)

    @contextlib.contextmanager
    def listen(self, listener: _Listener, task_number: int = _EVERY_TASK) -> Iterator[None]:
        """Call the listener with all that is committed within the context, or with what concerns this task."""
        with self._lock:
            self._listeners[task_number] = (*self._listeners.get(task_number, ()), listener)
        try:
            yield
        finally:
            with self._lock:
                listeners = self._listeners[task_number]
                others = [other for other in listeners if other is not listener]
                if others:
                    self._listeners[task_number] = tuple(others)  # at once, for `tell` takes no lock
                else:
                    del self._listeners[task_number]

    def tell(self, notice: Notice) -> None:
        of_every_task = self._listeners.get(_EVERY_TASK, ())
        of_this_task = self._listeners.get(notice.task_number, ())
        for listener in of_every_task + of_this_task:
            try:
                listener(notice)
            except Exception:
                log.exception("a listener of the store failed")


_Notices = Callable[[Any], Iterable[Notice]]


def _no_notices(_: Any) -> Iterable[Notice]:
    return ()


class _Change(NamedTuple):
    """A change of the database in the queue.

    Somebody waits for its future, and it may fail; or it has none: it records what has happened, and is tried again
    until it is stored.
    """

    apply: _Apply
    future: Future[Any] | None
    task_number: int  # no later change of the same task overtakes it; 0 for no task
    is_durable: bool  # it must survive a loss of power
    notices: _Notices = _no_notices  # what it has changed, from what `apply` returned


class Store:
    """The database; any thread may call it. One thread of its own writes, all queued changes in one transaction.

    Reads raise StorageFull and Unavailable; futures fail with these and Conflict.
    """

    def __init__(self, path: str, on_commit: Callable[[float, int], None]) -> None:
        self._path = path
        self._on_commit = on_commit  # called after each commit: its seconds, its changes
        self._queue: list[_Change] = []
        self._is_closing = False
        self._queue_changed = threading.Condition()  # guards _queue and _is_closing
        self._readers: list[sqlite3.Connection] = []
        self._reader_returned = threading.Condition()  # guards _readers
        self._writer: sqlite3.Connection  # from `start` on; the writing thread's
        self._file_id: tuple[int, int] = (0, 0)  # device and inode of the database
        self._start_warning = ""
        self._write_error = ""  # why changes wait to be stored
        self.quarantine_suffix = ""  # of the names of a damaged database's files
        self.feed = Feed()
        self._thread = DaemonThread(target=self._write, name="store")

    def start(self) -> None:
        """Open the database, created where there is none; a damaged one goes into quarantine. Raises StartupError."""
        try:
            self._open_all_or_use_reserve()
            self._file_id = self._stat_id()
        except (sqlite3.Error, OSError) as error:
            raise StartupError(f"--root: {self._path} cannot be used: {error}") from None
        self._fill_reserve()
        self._thread.start()

    def _open_all_or_use_reserve(self) -> None:
        try:
            self._open_all()
        except sqlite3.OperationalError:
            if not self._release_reserve():
                raise
            log.error("no space left for %s: starting with the reserved space", self._path)
            self._open_all()

    def _open_all(self) -> None:
        """Open the writer's connection and the first reader's."""
        try:
            self._writer = self._open()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter of a message that quotes the file
            if isinstance(error, sqlite3.OperationalError) and "decode" not in str(error):
                raise  # the file is not at fault: it is locked, or cannot be opened
            self._quarantine(error)
            self._writer = self._open()
        self._readers.append(self._connect())

    def _fill_reserve(self) -> None:
        """Reserve disk space for the files that SQLite needs beside the database (SQLite: Write-Ahead Logging)."""
        path = self._path + _RESERVE_SUFFIX
        if os.path.exists(path):
            return
        try:
            with open(path, "wb") as file:
                file.write(os.urandom(_RESERVE_BYTES))  # random, so that no file system compresses it
        except OSError:
            self._release_reserve()  # a part of it helps nobody

    def _release_reserve(self) -> bool:
        """Free the reserved disk space; return whether there was any."""
        try:
            os.unlink(self._path + _RESERVE_SUFFIX)
        except OSError:
            return False
        return True

    def _open(self) -> sqlite3.Connection:
        """Return a connection to a sound database of the current version, created where there is none.

        Raises sqlite3.DatabaseError where it is damaged, StartupError where it is of a later version.
        """
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
        """Rename a damaged database with all its files; a person may want to look at it."""
        self.quarantine_suffix = f".corrupt-{time.strftime('%Y%m%dT%H%M%S')}"
        name = self._path + self.quarantine_suffix
        for suffix in _FILE_SUFFIXES:
            with contextlib.suppress(FileNotFoundError):  # not every database has all three
                rename(self._path + suffix, name + suffix)
        self._start_warning = f"the database was damaged ({error}); it was renamed to {name}, and a new one created"
        log.error("%s", self._start_warning)

    def stop(self) -> None:
        """Commit what is queued, and close."""
        with self._queue_changed:
            self._is_closing = True
            self._queue_changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        with self._reader_returned:
            while self._readers:
                self._readers.pop().close()

    def is_alive(self) -> bool:
        """Return whether the writing thread runs."""
        return self._thread.is_alive()

    def is_in_place(self) -> bool:
        """Return whether the open database is still the file of its name; True where that cannot be known."""
        try:
            return self._stat_id() == self._file_id
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def check_in_place(self) -> None:
        """Raise Unavailable if the database was removed, and what is stored from now on would be lost."""
        if not self.is_in_place():
            raise Unavailable(f"the database {self._path} was removed while in use; restart the daemon")

    def _stat_id(self) -> tuple[int, int]:
        status = os.stat(self._path)
        return status.st_dev, status.st_ino

    def warning(self) -> str:
        """Return what the operator should know of the store now, empty for nothing."""
        return "; ".join(filter(None, (self._start_warning, self._write_error)))

    # -- changes

    def save_metadata(self, metadata: Mapping[str, str]) -> None:
        """Store daemon metadata; do not wait for it."""
        rows = list(metadata.items())
        self._record(lambda db: db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows))

    def accept(
        self,
        task_number: int,
        spec: TaskSpec,
        now_ns: int,
        starts_ns: int = 0,
        submitted_by: str = "",
    ) -> Future[Accepted]:
        """Add a task, or find the one that the same submission made; fails with Conflict if another has its id."""
        row = {
            "seq": task_number,
            "id": spec.id,
            "digest": spec.fingerprint,
            "count": len(spec.steps),
            "timeout_ns": spec.timeout_ns,
            "accepted_ns": now_ns,
            "starts_ns": starts_ns,
            "result": Result.PAUSED if spec.is_paused else Result.WAITING,
            "submitted_by": submitted_by,
            "parent": spec.parent,
            "copy_of": spec.copy_of,
        }

        def apply(db: sqlite3.Connection) -> Accepted:
            return _accept(db, row, spec)

        def notices(accepted: Accepted) -> list[Notice]:
            return [Notice(task_number)] * accepted.is_new

        return self._submit(apply, is_durable=True, notices=notices)

    def begin(
        self,
        task_number: int,
        step_index: int,
        now_ns: int,
        attempt: int = 1,
    ) -> Future[None]:
        """Mark a step as running, whose files are made. Only what is known to have begun may run."""

        def apply(db: sqlite3.Connection) -> None:
            values = (now_ns, attempt, task_number, step_index)
            db.execute(
                "UPDATE step SET state = 1, started_ns = ?, attempt = ?, retry_at_ns = NULL WHERE task = ? AND idx = ?",
                values,
            )
            db.execute(
                "UPDATE task SET state = 1, started_ns = ?, "
                "result = CASE result WHEN 'waiting' THEN 'running' ELSE result END WHERE seq = ? AND state = 2",
                (now_ns, task_number),
            )

        notice = Notice(task_number, (step_index,))
        return self._submit(apply, task_number, is_durable=True, notices=lambda _: [notice])

    def requeue(self, task_number: int, step_index: int, task_state: State) -> None:
        """Mark a step that was marked as running, and has not run, as pending again."""

        def apply(db: sqlite3.Connection) -> None:
            key = (task_number, step_index)
            db.execute("UPDATE step SET state = 2, started_ns = NULL WHERE task = ? AND idx = ?", key)
            db.execute(_REQUEUE_TASK, (task_state, task_number))

        notice = Notice(task_number, (step_index,))
        self._record(apply, task_number, notices=lambda _: [notice])

    def retry(
        self,
        task_number: int,
        step_index: int,
        retry_at_ns: int,
    ) -> None:
        """Store that a step which failed is tried again, at this time at the earliest."""

        def apply(db: sqlite3.Connection) -> None:
            db.execute(
                "UPDATE step SET state = 2, started_ns = NULL, retry_at_ns = ? WHERE task = ? AND idx = ?",
                (retry_at_ns, task_number, step_index),
            )

        notice = Notice(task_number, (step_index,))
        self._record(
            apply,
            task_number,
            is_durable=True,
            notices=lambda _: [notice],
        )

    def record_stop(
        self,
        task_number: int,
        step_index: int | None,
        stop: Stop,
        stop_count: int = 1,
    ) -> Future[None]:
        """Store that a task is to be stopped for so many times, or a step of it; why it was first stopped stays.

        A stopped task is not paused any more.
        """

        def apply(db: sqlite3.Connection) -> None:
            change = "SET stop = ?, stopped_by = ?, stop_reason = ? WHERE stop = ''"
            if step_index is None:
                db.execute(f"UPDATE task {change} AND seq = ?", (*stop, task_number))
                db.execute("UPDATE task SET stop_count = ? WHERE seq = ?", (stop_count, task_number))
                db.execute(f"{_RESUME_TASK} AND result = 'paused'", (task_number,))
            else:
                db.execute(f"UPDATE step {change} AND task = ? AND idx = ?", (*stop, task_number, step_index))

        notice = Notice(task_number)
        if step_index is not None:
            notice = Notice(task_number, (step_index,))
        return self._submit(apply, task_number, is_durable=True, notices=lambda _: [notice])

    def record_copy(self, task_number: int) -> None:
        """Store that a task has all the files that it takes over."""

        def apply(db: sqlite3.Connection) -> None:
            db.execute("UPDATE task SET copy_of = 0 WHERE seq = ?", (task_number,))

        self._record(apply, task_number, is_durable=True)

    def record_pause(self, task_number: int, is_paused: bool) -> Future[None]:
        """Store that a task is paused, or goes on."""

        def apply(db: sqlite3.Connection) -> None:
            change = "UPDATE task SET result = 'paused' WHERE seq = ?"
            if not is_paused:
                change = _RESUME_TASK
            db.execute(f"{change} AND ended_ns IS NULL", (task_number,))

        return self._submit(apply, task_number, is_durable=True, notices=lambda _: [Notice(task_number)])

    def record_pool(self, pool: Mapping[str, Any]) -> Future[None]:
        """Store what a client has set of the pool."""
        text = json.dumps(pool)
        return self._submit(
            lambda db: db.execute("INSERT OR REPLACE INTO meta VALUES ('pool', ?)", (text,)),
            is_durable=True,
            notices=lambda _: [Notice(0)],
        )

    def delete(self, task_id: str) -> Future[int]:
        """Delete an ended task, and return its number. Fails with Conflict if it has not ended, with NotFound."""

        def apply(db: sqlite3.Connection) -> int:
            row = db.execute("SELECT seq, ended_ns FROM task WHERE id = ?", (task_id,)).fetchone()
            if row is None:
                raise NotFound(NO_TASK)
            task_number, ended_ns = row
            if ended_ns is None:
                raise Conflict(f"task {task_id!r} has not ended: stop it first")
            _delete_tasks(db, [(task_number,)])
            return int(task_number)

        return self._submit(
            apply,
            is_durable=True,
            notices=lambda task_number: [Notice(task_number, deleted_id=task_id)],
        )

    def end(
        self,
        task_number: int,
        ends: Sequence[tuple[int, Outcome]],
        skipped: Sequence[int],
        task_end: TaskEnd | None,
        now_ns: int,
    ) -> None:
        """Store the ends of steps, by index, and that others never will run.

        With them goes the end of their task where `task_end` is not None.
        """
        rows = [(*outcome, now_ns, task_number, index) for index, outcome in ends]
        skipped_rows = [(task_number, index) for index in skipped]

        def apply(db: sqlite3.Connection) -> None:
            db.executemany(_END_STEP, rows)
            db.executemany("UPDATE step SET result = 'not_run' WHERE task = ? AND idx = ?", skipped_rows)
            if task_end:
                _end_task(db, task_number, State.ENDED, task_end, now_ns)

        def notices(_: Any) -> list[Notice]:
            indexes = [index for index, _ in ends]
            return [Notice(task_number, (*indexes, *skipped), has_ended=task_end is not None)]

        self._record(apply, task_number, is_durable=True, notices=notices)

    def fail(self, task_number: int, message: str, now_ns: int) -> None:
        """End a task that cannot be restored with a system error; its running steps are lost."""

        def apply(db: sqlite3.Connection) -> tuple[int, ...]:
            rows = db.execute("SELECT idx FROM step WHERE task = ? AND state != 0", (task_number,)).fetchall()
            db.execute(
                "UPDATE step SET state = 0, code = ?, result = 'lost', reason = ?, ended_ns = ? "
                "WHERE task = ? AND state = 1",
                (FORCED_CODE, LOST, now_ns, task_number),
            )
            db.execute("UPDATE step SET result = 'not_run' WHERE task = ? AND state = 2", (task_number,))
            _end_task(db, task_number, State.ERROR, TaskEnd(FORCED_CODE, message, Result.LOST), now_ns)
            return tuple(index for (index,) in rows)

        self._record(
            apply,
            task_number,
            is_durable=True,
            notices=lambda indexes: [Notice(task_number, indexes, has_ended=True)],
        )

    def expire(self, ended_before_ns: int) -> list[int]:
        """Delete the records of tasks that ended before, at most a batch; return the tasks' numbers."""

        def apply(db: sqlite3.Connection) -> list[tuple[int, str]]:
            rows = db.execute(
                "SELECT seq, id FROM task WHERE ended_ns < ? ORDER BY ended_ns LIMIT ?", (ended_before_ns, _BATCH)
            )
            expired = rows.fetchall()
            _delete_tasks(db, [(number,) for number, _ in expired])
            return expired

        def notices(expired: Iterable[tuple[int, str]]) -> list[Notice]:
            return [Notice(number, deleted_id=task_id) for number, task_id in expired]

        if not self._read("SELECT 1 FROM task WHERE ended_ns < ? LIMIT 1", (ended_before_ns,)):
            return []
        return [number for number, _ in self._submit(apply, notices=notices).result()]

    # -- reads

    def metadata(self) -> dict[str, str]:
        """Return what `save_metadata` has stored."""
        return dict(self._read("SELECT key, value FROM meta"))

    def latest_ns(self) -> int:
        """Return the latest time that is stored, 0 where there is none."""
        rows = self._read("SELECT max(ifnull(max(accepted_ns), 0), ifnull(max(ended_ns), 0)) FROM task")
        return int(rows[0][0] or 0)

    def last_task_number(self) -> int:
        """Return the highest number that a task has, or had before it expired; 0 where there was none."""
        stored = self._read("SELECT max(seq) FROM task")
        assigned = self._read("SELECT max(seq) FROM sqlite_sequence WHERE name = 'task'")
        numbers = [row[0] or 0 for row in stored + assigned]
        return max(map(int, numbers))

    def task_numbers(self) -> list[int]:
        """Return the numbers of all tasks in the order of their acceptance."""
        return self.page(Selection()).task_numbers

    def page(self, selection: Selection) -> Page:
        """Return the tasks of a page of a list."""
        limit = selection.limit
        rows: list[tuple[int, int | None]] = []
        for segment, after in _segments(selection):
            if limit < 0 or len(rows) <= limit:
                rows += self._segment(selection, segment, after)
        cursor = ""
        if 0 <= limit < len(rows):
            number, ended_ns = rows[limit - 1]
            cursor = str(number)
            if selection.sort != "st" and ended_ns is not None:
                cursor = f"{ended_ns}-{number}"
            rows = rows[:limit]
        return Page([number for number, _ in rows], cursor)

    def _segment(self, selection: Selection, segment: str, after: _Position) -> list[tuple[int, int | None]]:
        """Return number and end of the tasks of a segment, one more than the page has at most."""
        limit = selection.limit + (selection.limit >= 0)
        groups: list[Sequence[str]] = [selection.results]
        if selection.results and not selection.id_glob:
            groups = [(result,) for result in selection.results]  # each by its index, in order
        rows = []
        for results in groups:
            statement, values = _segment_query(selection, segment, after, results)
            rows += self._read(statement, (*values, limit))
        if len(groups) > 1:
            by_end = segment == "ended"
            rows.sort(key=lambda row: (row[1], row[0]) if by_end else row[0], reverse=selection.is_descending)
        return rows

    def total(self, selection: Selection) -> int:
        """Return how many tasks a list has on all its pages."""
        if not selection.id_glob:
            totals = dict(self._read("SELECT result, tasks FROM task_total"))
            return sum(totals.get(result, 0) for result in selection.results or totals)
        statement = f"SELECT count(*) FROM task WHERE {_ID_GLOB}"
        values: list[Any] = [*_id_glob_values(selection.id_glob)]
        if selection.results:
            statement += f" AND +result IN ({', '.join('?' * len(selection.results))})"
            values += selection.results
        return int(self._read(statement, values)[0][0])

    def tasks(self, task_numbers: Sequence[int]) -> Iterator[list[TaskRow]]:
        """Yield these tasks in this order, in blocks; those that have expired meanwhile are left out."""
        for begin in range(0, len(task_numbers), _BATCH):
            block = task_numbers[begin : begin + _BATCH]
            in_block = ",".join(map(str, block))
            rows = self._read(f"{_TASK} WHERE seq IN ({in_block})")
            by_number = {row[0]: TaskRow._make(row) for row in rows}
            yield [by_number[number] for number in block if number in by_number]

    def task(self, task_id: str) -> TaskRow:
        """Return a task by its id. Raises NotFound."""
        rows = self._read(f"{_TASK} WHERE id = ?", (task_id,))
        if not rows:
            raise NotFound(NO_TASK)
        return TaskRow._make(rows[0])

    def steps(self, task_number: int) -> list[StepRow]:
        """Return the steps of a task, in order."""
        rows = self._read(f"{_STEP} WHERE task = ? ORDER BY idx", (task_number,))
        return [StepRow._make(row) for row in rows]

    def step(self, task_number: int, key: str) -> StepRow:
        """Return a step by its index or its name, the index first. Raises NotFound."""
        rows = []
        if _INDEX.fullmatch(key):
            rows = self._read(f"{_STEP} WHERE task = ? AND idx = ?", (task_number, int(key)))
        if not rows:
            rows = self._read(f"{_STEP} WHERE task = ? AND name = ?", (task_number, key))
        if not rows:
            raise NotFound(NO_TASK)
        return StepRow._make(rows[0])

    def running_steps(self) -> dict[int, list[tuple[int, str]]]:
        """Return index and name of the running steps, by task number."""
        running = collections.defaultdict(list)
        for task_number, *step in self._read(_RUNNING_STEPS):
            running[task_number].append(tuple(step))
        return running

    def script(self, task_number: int, step_index: int) -> Script:
        """Return what the step runs. Raises LookupError when its task has ended."""
        key = (task_number, step_index)
        rows = self._read(f"{_SCRIPT} WHERE task = ? AND idx = ?", key)
        if not rows:
            raise LookupError(f"no script of step {step_index} of task number {task_number}")
        script = Script._make(rows[0])
        return script._replace(env=json.loads(rows[0][2]))

    def submission(self, task_number: int) -> Submission | None:
        """Return what was submitted; None for a task that an earlier version accepted."""
        rows = self._read("SELECT query, steps FROM submission WHERE task = ?", (task_number,))
        return Submission._make(rows[0]) if rows else None

    def has_task(self, task_number: int) -> bool:
        """Return whether the record of a task is kept, and with it its files."""
        return bool(self._read("SELECT 1 FROM task WHERE seq = ?", (task_number,)))

    def counts(self) -> dict[int, int]:
        """Return the number of tasks by state."""
        return dict(self._read("SELECT state, count(*) FROM task GROUP BY state"))

    def oldest_ns(self) -> int | None:
        """Return when the oldest task was accepted, None where there is no task."""
        rows = self._read("SELECT accepted_ns FROM task ORDER BY seq LIMIT 1")
        return int(rows[0][0]) if rows else None

    def size_bytes(self) -> int:
        """Return the size of the database on disk."""
        total = 0
        for suffix in _FILE_SUFFIXES:
            with contextlib.suppress(OSError):  # SQLite may remove it at any moment
                total += os.stat(self._path + suffix).st_size
        return total

    def unfinished_task_numbers(self) -> list[int]:
        """Return the numbers of the tasks that have not ended, in order of acceptance."""
        rows = self._read("SELECT seq FROM task WHERE ended_ns IS NULL ORDER BY seq")
        return [number for (number,) in rows]

    def unfinished_task(self, task_number: int) -> tuple[UnfinishedTask, list[UnfinishedStep]]:
        """Return a task that has not ended, and its steps.

        Raises ValueError and TypeError where what is stored is inconsistent.
        """
        task = UnfinishedTask._make(self._read(f"{_UNFINISHED_TASK} WHERE seq = ?", (task_number,))[0])
        steps = []
        for row in self._read(f"{_UNFINISHED_STEP} WHERE task = ? ORDER BY idx", (task_number,)):
            steps.append(_unfinished_step(row))
        indexes = range(task.step_count)
        if [step.step_index for step in steps] != list(indexes):
            raise ValueError("its steps are incomplete")
        for step in steps:
            if any(index not in indexes for index in step.depends_on):
                raise ValueError("a step depends on one that does not exist")
        return task, steps

    def _read(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        """Return the rows of a query. Raises StorageFull and Unavailable."""
        try:
            connection = self._borrow_reader()
            try:
                return _fetch(connection, statement, values)
            finally:
                self._return_reader(connection)
        except sqlite3.Error as error:
            raise _storage_error(error) from error

    def _borrow_reader(self) -> sqlite3.Connection:
        """Return an idle connection, or a new one; wait for one to be returned where no more can be opened."""
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
            if len(self._readers) < _MAX_IDLE_READERS:
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
            # fsync(2) of a Mac leaves data in the drive's cache, F_FULLFSYNC of fcntl(2) does not; elsewhere these do
            # nothing (SQLite, "Pragma Statements").
            connection.execute("PRAGMA fullfsync = ON")
            connection.execute("PRAGMA checkpoint_fullfsync = ON")
            undo.pop_all()
        return connection

    # -- the queue and the thread that writes

    def _submit(
        self,
        apply: _Apply,
        task_number: int = 0,
        is_durable: bool = False,
        notices: _Notices = _no_notices,
    ) -> Future[Any]:
        """Queue a change that somebody waits for, and that may fail."""
        future: Future[Any] = Future()
        self._enqueue(_Change(apply, future, task_number, is_durable, notices))
        return future

    def _record(
        self,
        apply: _Apply,
        task_number: int = 0,
        is_durable: bool = False,
        notices: _Notices = _no_notices,
    ) -> None:
        """Queue a change that records what has happened; it is tried again until it is stored."""
        self._enqueue(_Change(apply, None, task_number, is_durable, notices))

    def _enqueue(self, change: _Change) -> None:
        """Queue a change; wake the writing thread for it, or leave it to the one that woke it."""
        with self._queue_changed:
            if not self._is_closing:
                self._queue.append(change)
                if change.future or len(self._queue) == 1:
                    self._queue_changed.notify()
                return
        _fail_all([change], Unavailable("the daemon is shutting down; send the request again to the next one"))

    def _write(self) -> None:
        """Commit what is queued until the store is closed; no exception ends this thread."""
        batch: list[_Change] = []
        is_last = False
        while not is_last:
            is_last = self._take_queue(batch)
            if not batch:
                continue
            try:
                batch = self._commit(batch)
            except Exception as error:
                log.exception("the store failed: %d changes are not stored", len(batch))
                _fail_all(batch, error)
                batch = []
            if not batch:
                self._set_write_error("")
        if batch:
            log.error("%d changes could not be stored before the exit", len(batch))
            _fail_all(batch, Unavailable("the daemon exited before this could be stored"))
        self._writer.close()

    def _take_queue(self, batch: list[_Change]) -> bool:
        """Wait for changes and append them to `batch`, those to be tried again; return whether the store is closing."""
        with self._queue_changed:
            if not self._queue and not self._is_closing:
                timeout_s = _RETRY_S if batch else None
                self._queue_changed.wait(timeout_s)
            has_waiter = any(change.future for change in self._queue)
            if not self._is_closing and not has_waiter:
                self._queue_changed.wait(_GROUP_COMMIT_DELAY_S)  # the end of a step goes with the begin of the next
            batch += self._queue
            self._queue = []
            return self._is_closing

    def _commit(self, batch: Sequence[_Change]) -> list[_Change]:
        """Commit the changes together, else one by one; return those to be tried again."""
        begin_s = time.perf_counter()
        error = self._try_commit(batch)
        self._on_commit(time.perf_counter() - begin_s, len(batch))
        if error is None:
            return []
        if len(batch) > 1:
            return self._commit_singly(batch)
        if not batch[0].future and _is_transient(error):
            self._set_write_error(f"cannot write to {self._path}, trying again: {error}")
            return [*batch]
        _fail_all(batch, error)
        return []

    def _commit_singly(self, batch: Sequence[_Change]) -> list[_Change]:
        """Commit the changes one by one; return those to be tried again.

        Neither another record nor a change of the same task overtakes one of these.
        """
        unsaved: list[_Change] = []
        unsaved_tasks: set[int] = set()
        for change in batch:
            if unsaved and not change.future:
                unsaved.append(change)
            elif change.task_number in unsaved_tasks:
                _fail_all([change], Unavailable(self._write_error))
            else:
                unsaved += self._commit([change])
            if unsaved and unsaved[-1] is change and change.task_number:
                unsaved_tasks.add(change.task_number)
        return unsaved

    def _try_commit(self, batch: Sequence[_Change]) -> Exception | None:
        """Commit the changes, the one place that writes; return the error that undid all of them, or None."""
        results: list[Any] = []
        try:
            level = "FULL" if any(change.is_durable for change in batch) else "NORMAL"
            self._writer.execute(f"PRAGMA synchronous = {level}")
            self._writer.execute("BEGIN IMMEDIATE")
            for change in batch:
                try:
                    results.append(change.apply(self._writer))
                except ApiError as error:  # refused before it changed anything
                    results.append(error)
            self._writer.execute("COMMIT")
        except Exception as error:
            if len(batch) == 1 and not isinstance(error, sqlite3.OperationalError):
                log.exception("a change of the database failed")
            with contextlib.suppress(sqlite3.Error):  # there may be no transaction
                self._writer.execute("ROLLBACK")
            return error
        if any(change.is_durable and not change.future for change in batch):  # the end of a step
            failpoint("stored")
        for change, result in zip(batch, results):
            if not change.future:
                continue
            if isinstance(result, ApiError):
                change.future.set_exception(result)
            else:
                change.future.set_result(result)
        if self.feed.has_listeners():
            self._tell(batch, results)
        return None

    def _tell(self, batch: Sequence[_Change], results: Sequence[Any]) -> None:
        """Tell the listeners what these changes, which are committed, have changed."""
        for change, result in zip(batch, results):
            if not isinstance(result, ApiError):
                for notice in change.notices(result):
                    self.feed.tell(notice)

    def _set_write_error(self, text: str) -> None:
        """Set why changes wait, empty for none do; log when that begins, and when it is over."""
        if text and not self._write_error:
            log.error("%s", text)
        if self._write_error and not text:
            log.info("%s can be written again", self._path)
        self._write_error = text


def _unfinished_step(row: Sequence[Any]) -> UnfinishedStep:
    """Raises ValueError and TypeError where what is stored is inconsistent."""
    step = UnfinishedStep._make(row)
    retry = json.loads(row[step._fields.index("retry")])
    return step._replace(
        depends_on=tuple(json.loads(row[2])),
        when=When(step.when),
        retry=Retry(*retry) if retry else None,
    )


def _fail_all(changes: Iterable[_Change], error: Exception) -> None:
    """Give the error to whoever waits for these changes."""
    for change in changes:
        if change.future and not change.future.done():
            change.future.set_exception(_storage_error(error))


def _is_transient(error: Exception) -> bool:
    """Return whether a change may succeed later: the disk is full, say, and the change itself not at fault."""
    return isinstance(error, (sqlite3.OperationalError, MemoryError)) or type(error) is sqlite3.DatabaseError


def _storage_error(error: Exception) -> ApiError:
    """Return what a client is answered."""
    if isinstance(error, ApiError):
        return error
    if "full" in str(error):
        return StorageFull(f"no space left on the disk of --root; free some or choose another --root ({error})")
    return Unavailable(f"the database is unavailable, try again ({error})")


def _fetch(connection: sqlite3.Connection, statement: str, values: Sequence[Any]) -> list[Any]:
    """Return the rows of a query; damaged texts have replacement characters."""
    try:
        return connection.execute(statement, values).fetchall()
    except sqlite3.OperationalError as error:
        if "decode" not in str(error):
            raise
    connection.text_factory = functools.partial(str, encoding="utf-8", errors="replace")
    return connection.execute(statement, values).fetchall()


def _check_integrity(db: sqlite3.Connection, version: int) -> str:
    """Return what is wrong with an existing database, empty for nothing.

    It is sound if SQLite says so, and if it has the columns of its version; how the schema is worded does not matter.
    """
    if not version:
        return "it is empty"
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as model:
        for migrate in _MIGRATIONS[:version]:
            migrate(model)
        missing = _columns(model) - _columns(db)
    if missing:
        return f"it lacks {', '.join(sorted(missing))}"
    report: str = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if report == "ok":
        return ""
    return report.replace("\n", " ")


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
    """Migrate a database from this version to the next, whole or not at all."""
    db.execute("BEGIN IMMEDIATE")
    try:
        _MIGRATIONS[version](db)
        db.execute(f"PRAGMA user_version = {version + 1}")
        db.execute("COMMIT")
    except sqlite3.Error:
        db.execute("ROLLBACK")
        raise


def _accept(db: sqlite3.Connection, task: Mapping[str, Any], spec: TaskSpec) -> Accepted:
    """Insert a task, unless the same submission has already done so. Raises Conflict."""
    row = db.execute("SELECT seq, count, accepted_ns, digest FROM task WHERE id = ?", (spec.id,)).fetchone()
    if row is None:
        _insert_task(db, task, spec)
        return Accepted(task["seq"], spec.id, len(spec.steps), task["accepted_ns"], is_new=True)
    earlier_number, step_count, accepted_ns, fingerprint = row
    if fingerprint != spec.fingerprint:
        raise Conflict(f"id {spec.id!r} already belongs to a different task; use another id")
    return Accepted(earlier_number, spec.id, step_count, accepted_ns, is_new=False)


def _insert_task(db: sqlite3.Connection, task: Mapping[str, Any], spec: TaskSpec) -> None:
    """Insert a task, given by its columns, with its steps."""
    task_number = task["seq"]
    marks = ", ".join("?" * len(task))
    db.execute(f"INSERT INTO task ({', '.join(task)}) VALUES ({marks})", tuple(task.values()))
    steps = []
    scripts = []
    for index, step in enumerate(spec.steps):
        depends_on = json.dumps(step.depends_on)
        env = json.dumps(spec.env + step.env)
        key = (task_number, index)
        options = (step.when.value, json.dumps(step.retry))
        steps.append(
            (
                *key,
                step.name,
                depends_on,
                step.timeout_ns,
                step.command_type,
                *options,
            )
        )
        scripts.append(
            (
                *key,
                step.command_type,
                env,
                step.content,
                step.stdin,
                step.stderr,
            )
        )
    db.executemany(
        "INSERT INTO step (task, idx, name, needs, timeout_ns, command_type, condition, retry) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        steps,
    )
    db.executemany("INSERT INTO script VALUES (?, ?, ?, ?, ?, ?, ?)", scripts)
    db.execute("INSERT INTO submission VALUES (?, ?, ?)", (task_number, spec.query, spec.steps_json))
    done = [(*step[1:], task_number, step.step_index) for step in spec.done]
    db.executemany(
        "UPDATE step SET state = 0, result = 'succeeded', started_ns = ?, ended_ns = ?, attempt = ?, output_bytes = ? "
        "WHERE task = ? AND idx = ?",
        done,
    )


def _delete_tasks(db: sqlite3.Connection, numbers: Sequence[tuple[int]]) -> None:
    """Delete all that is stored of tasks."""
    for table, column in (("step", "task"), ("script", "task"), ("submission", "task"), ("task", "seq")):
        db.executemany(f"DELETE FROM {table} WHERE {column} = ?", numbers)


def _end_task(
    db: sqlite3.Connection,
    task_number: int,
    state: State,
    end: TaskEnd,
    now_ns: int,
) -> None:
    """Mark a task as ended, and delete its scripts."""
    values = (state, *end, now_ns, task_number)
    db.execute("UPDATE task SET state = ?, code = ?, message = ?, result = ?, ended_ns = ? WHERE seq = ?", values)
    db.execute("DELETE FROM script WHERE task = ?", (task_number,))


# ======================================================================================================================
# III tasks / scheduler: the pool, and the one site where a step or a task changes its phase
# ======================================================================================================================

# An unfinished task and its steps live in memory; everything else is a row. The phases of a step:
#
#     BLOCKED --> READY <--> STARTING --> RUNNING --> ENDED
#                   ^           |            |
#                   '----- RETRYING <--------'
#
# BLOCKED waits for other steps, READY for a slot of the pool, in the order in which steps became ready. STARTING has a
# slot; its files are made, then its begin is stored. RUNNING has a process tree. RETRYING has failed, and waits without
# a slot for its next attempt. ENDED has a code; each of the others leads there too, when it is stopped or cannot start.
# SKIPPED, which BLOCKED alone becomes, never runs, and is shown as pending for ever. A READY step of a task that is
# paused, or whose time to start has not come, is held: it is not in the queue. STARTING and RUNNING go back to READY
# where the host lacks what a start needs: a process, a descriptor, memory, disk space; nothing of the step's own has
# run then.
#
# Whether a BLOCKED step runs is decided when all that it depends on is over, directly or not, by its When; a step that
# needs success is SKIPPED as soon as one of these has failed.
#
# Who moves it: `submit` and the end of other steps make it READY; `_dispatch` gives it a slot; its worker, which owns
# it from then on, moves it to RUNNING and ENDED, to RETRYING or back to READY; the timekeeper moves it from RETRYING to
# READY; a stop ends a step that no worker owns, and else asks its worker to. A stop that comes while the worker sees
# the step end is not lost: `finish` does not end a step that is to be stopped until its tree has been. Nor does it let
# a step be tried again before that: two attempts never run at once. A worker that fails in between keeps its step, and
# tries again.
#
# The stop of a task spares the steps that run ALWAYS, which clean up; a second stop does not. Nothing is tried again in
# a stopped task.
#
# A task that goes on with what another has left is held until it has a copy of that: `copy_of` says so, in the database
# too, so that a later daemon begins the copy anew. One that cannot be had ends the task, and nothing of it runs.
#
# `_move` is the one site that changes a phase, and raises for a move that is not in `_MOVES`. Its record is queued for
# the store in the same critical section, so the database has all moves in the order of memory, a task's end after its
# steps' ends. Under the lock there is no I/O and no waiting, and no other lock is taken but those of the store's queue
# and of an event: what else a move brings about (threads, wake-ups, files) is in a `_Deferred`, for after the lock.
#
# What a crash leaves at each edge, by the names of the failpoints:
#
#     accepted  the task is stored, none of its steps has begun: the next daemon queues them
#     begun     the step is stored as running, but its files show that it has no process: it is queued again
#     spawned   the process runs: it is adopted
#     ended     the process has left its result: it is read
#     stored    the end is in the database, what depends on it was not started: it is queued; or the end of an attempt
#               and the time of the next one are: that is waited for
#
# A task ends with its last step, with the sum of the codes (`summarize`); one that was stopped also waits until nothing
# is left of what its ended steps had started.


class Phase(Enum):
    """The phase of a step of an unfinished task."""

    BLOCKED = "blocked"
    READY = "ready"
    STARTING = "starting"
    RUNNING = "running"
    RETRYING = "retrying"
    ENDED = "ended"
    SKIPPED = "skipped"


_MOVES: Mapping[Phase, frozenset[Phase]] = {
    Phase.BLOCKED: frozenset({Phase.READY, Phase.RETRYING, Phase.ENDED, Phase.SKIPPED}),  # RETRYING as restored
    Phase.READY: frozenset({Phase.STARTING, Phase.ENDED}),
    Phase.STARTING: frozenset({Phase.READY, Phase.RUNNING, Phase.RETRYING, Phase.ENDED}),
    Phase.RUNNING: frozenset({Phase.READY, Phase.RETRYING, Phase.ENDED}),
    Phase.RETRYING: frozenset({Phase.READY, Phase.ENDED}),
    Phase.ENDED: frozenset(),
    Phase.SKIPPED: frozenset(),
}
_FINAL = (Phase.ENDED, Phase.SKIPPED)
_CLEANUP_TIMEOUT_NS = 60 * _SECOND_NS  # of a step that runs although its task is stopped, unless it has one of its own
_START_RETRY_S = 0.5  # between attempts where the host lacks what a start needs
_SCARCITY_S = 5.0  # after this time without a failed start the host lacks nothing any more
_JOIN_TIMEOUT_S = 1.5  # that an exit waits for threads, which the process ends anyway


class PoolStats(NamedTuple):
    """The pool: its size, the steps that have a slot, the steps that are ready and wait for one.

    While it is paused no step starts; `reason` is in the words of who paused it.
    """

    size: int
    running: int
    waiting: int
    paused: bool = False
    reason: str = ""


class IllegalMove(Exception):
    """A step was to make a move that is not in the table."""


class Step:
    """A step of an unfinished task. Guarded by the scheduler's lock, but for `tree`, which its runner owns."""

    __slots__ = (
        "attempt",
        "code",
        "index",
        "name",
        "phase",
        "ready_s",
        "reason",
        "result",
        "retry",
        "slot_count",
        "started_ns",
        "stop_count",
        "stop_reason",
        "stop_signal",
        "task",
        "timeout_ns",
        "tree",
        "when",
    )

    def __init__(self, task: Task, index: int, spec: StepSpec | UnfinishedStep) -> None:
        self.task = task
        self.index = index
        self.name = spec.name
        self.timeout_ns = spec.timeout_ns
        self.when = spec.when
        self.retry = spec.retry
        self.attempt = 1  # the one that runs, or is the next to run
        self.phase = Phase.BLOCKED
        self.code = 0
        self.result = ""  # of one that has ended
        self.reason = ""  # of its end, where it has one
        self.ready_s = 0.0  # when it became ready, by time.monotonic()
        self.slot_count = 0  # how often it was given a slot
        self.started_ns = 0  # 0: it never began
        self.stop_reason = ""  # why it is to be stopped
        self.stop_count = 0  # how often that was asked for
        self.stop_signal = "TERM"  # that its tree gets first
        self.tree: ProcessTree | None = None

    def __str__(self) -> str:
        return f"task {self.task.id} step {self.index}"

    @property
    def log_extra(self) -> dict[str, Any]:
        """The `extra` of a log record: fields that the JSON format shows."""
        return {"log_fields": {"task": self.task.id, "step": self.index}}


class Task:
    """A task that has not ended. Guarded by the scheduler's lock."""

    def __init__(
        self,
        task_id: str,
        specs: Sequence[StepSpec | UnfinishedStep],
        timeout_ns: int,
    ) -> None:
        self.id = task_id
        self.number = 0  # from its acceptance on
        self.timeout_ns = timeout_ns
        self.steps = [Step(self, index, spec) for index, spec in enumerate(specs)]
        self.plan = Plan([spec.depends_on for spec in specs])
        self.unfinished = len(specs)  # steps that are in no final phase
        self.skipped: list[int] = []  # steps of which it is not stored yet that they never will run
        self.stop_reason = ""  # why all of it is stopped
        self.stop_count = 0  # how often that was asked for
        self.stopped_ns = 0  # when it was first, or was restored
        self.is_cleaning = False  # what its ended steps left running is being stopped
        self.copy_of = 0  # the task whose files it needs before it can start; 0 for none, or when it has them
        self.is_paused = False
        self.is_delayed = False  # its time to start has not come

    @property
    def is_held(self) -> bool:
        """Whether none of its steps may start now."""
        return self.copy_of != 0 or (not self.stop_reason and (self.is_paused or self.is_delayed))

    def ends_by_stop(self, step: Step) -> bool:
        """Return whether the stop of the task has ended this step: one that cleans up needs two."""
        return self.stop_reason != "" and (step.when is not When.ALWAYS or self.stop_count > 1)

    def __str__(self) -> str:
        return f"task {self.id}"

    def waiting_steps(self) -> list[Step]:
        """Return the steps that wait for a slot or for their next attempt, and that its stop ends."""
        waiting = []
        for step in self.steps:
            is_ended = step.phase is Phase.READY and self.ends_by_stop(step)
            if is_ended or step.phase is Phase.RETRYING:
                waiting.append(step)
        return waiting

    def ended_steps(self) -> list[Step]:
        """Return the steps that have run and may have left processes behind."""
        return [step for step in self.steps if step.phase is Phase.ENDED and step.started_ns]


class _Deferred(NamedTuple):
    """What a critical section leaves to be done without the lock."""

    assigned: list[Step]  # given a slot: each needs a worker
    cleanups: list[Task]  # or copies: each needs a thread
    ended: list[Task]


class Scheduler:
    """Decides which step runs when, and knows the phase of each. Thread-safe.

    At most `size` steps run at once, or as many as the host can run, in the order in which they became ready. A worker
    runs one step after another for as long as there are ready ones.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        size: int,
        capacity: int,
        on_task_end: Callable[[int], None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._capacity = capacity  # how many steps this host can run at once
        self._on_task_end = on_task_end  # called with the task's number, without the lock
        self._run_step: Callable[[Step], None]  # from `start` on
        self._clean_up: Callable[[Task], None]
        self._copy: Callable[[Task], None]
        self.timekeeper_wakeup = threading.Event()  # set where a deadline or limit may come before its next look
        self._lock = threading.Lock()  # guards all below, and what tasks and steps hold
        self._size = size
        self._last_number = 0
        self._tasks: dict[int, Task] = {}
        self._ready: collections.OrderedDict[Step, None] = collections.OrderedDict()
        self._active: set[Step] = set()  # STARTING and RUNNING: each has a slot
        self._without_thread: collections.deque[Step | Task] = collections.deque()  # none could be started so far
        self._cleanups: list[Task] = []  # for the next _Deferred
        self._ended: list[Task] = []  # for the next _Deferred
        self._deadlines: list[tuple[int, int]] = []  # a heap: when, task number; the task may have ended
        self._starts: list[tuple[int, int]] = []  # the same of delayed tasks: when they may start
        self._retries: list[tuple[int, int, int]] = []  # the same of RETRYING steps, by task number and index
        self._is_pool_paused = False
        self._pool_reason = ""
        self._workers: set[threading.Thread] = set()
        self._is_closed = True  # no step starts, as until `start`
        self.is_shutting_down = False  # runners leave their steps running, and return
        self.scarcity = ""  # what the host lacks to start steps; empty for nothing
        self._retry_at_s = 0.0  # the next attempt while there is scarcity
        self._last_lack_s = 0.0  # when the last attempt failed for it

    # -- the daemon's

    def start(
        self,
        run_step: Callable[[Step], None],
        clean_up: Callable[[Task], None],
        copy: Callable[[Task], None],
    ) -> None:
        """Start what is ready, and attend to what was restored."""
        self._run_step = run_step
        self._clean_up = clean_up
        self._copy = copy
        with self._lock:
            self._is_closed = False
            adopted = [step for step in self._active if step.phase is Phase.RUNNING]
            deferred = self._dispatch()
            self._without_thread.extend(adopted)
        self._run_deferred(deferred)
        self.retry()

    def reserve_task_numbers(self, last: int) -> None:
        """Give no new task this number or a lower one."""
        with self._lock:
            self._last_number = max(self._last_number, last)

    def close(self) -> int:
        """Start no more steps; return how many run."""
        with self._lock:
            self._is_closed = True
            return len(self._active)

    def stop_running(self) -> None:
        """Stop all running steps by force; do not wait for it."""
        with self._lock:
            trees = self._request_stops([*self._active], STOPPED)
        _wake(trees)

    def stop(self) -> None:
        """End every worker; steps that run still run on without a daemon."""
        with self._lock:
            self._is_closed = True
            self.is_shutting_down = True
            trees = [step.tree for step in self._active if step.tree]
            workers = [*self._workers]
        _wake(trees)
        deadline_s = time.monotonic() + _JOIN_TIMEOUT_S
        for worker in workers:
            if worker.is_alive():
                worker.join(max(0, deadline_s - time.monotonic()))

    # -- submissions

    def submit(self, spec: TaskSpec, submitted_by: str = "") -> Accepted:
        """Accept a task of a client; return when it is stored. Raises Conflict, StorageFull, Unavailable.

        It is known here before anybody can see it in the store, so that a stop finds it.
        """
        self._store.check_in_place()
        task = Task(spec.id, spec.steps, spec.timeout_ns)
        task.is_paused = spec.is_paused
        task.copy_of = spec.copy_of
        with self._lock:
            for done in spec.done:
                step = task.steps[done.step_index]
                self._move(step, Phase.ENDED)
                step.result = Result.SUCCEEDED
            now_ns = self._clock.now_ns()  # so that tasks are accepted in the order of their numbers
            if self._is_closed:
                raise Unavailable("the daemon is shutting down; send the task again to the next one")
            self._last_number += 1
            task.number = self._last_number
            starts_ns = now_ns + spec.delay_ns
            if spec.start_at_ns:
                starts_ns += spec.start_at_ns - time.time_ns()
            starts_ns = min(max(starts_ns, now_ns), _INT64_MAX)  # `at` may be of any year
            task.is_delayed = starts_ns > now_ns
            future = self._store.accept(task.number, spec, now_ns, starts_ns, submitted_by)
            self._tasks[task.number] = task
        is_new = False
        try:
            accepted = future.result()
            is_new = accepted.is_new
        finally:
            if not is_new:
                with self._lock:
                    del self._tasks[task.number]
        failpoint("accepted")
        if is_new:
            self._activate(task, now_ns, starts_ns)
        return accepted

    def _activate(self, task: Task, accepted_ns: int, starts_ns: int) -> None:
        """Let the steps of an accepted task run."""
        with self._lock:
            self._set_deadlines(task, accepted_ns, starts_ns)
            if task.number in self._tasks:  # not stopped already
                self._end_steps(task, [])
                self._queue_copy(task)
            deferred = self._dispatch()
        self._run_deferred(deferred)

    def restore(self, stored: UnfinishedTask, rows: Sequence[UnfinishedStep]) -> list[Step]:
        """Restore a task as it is stored; return its steps that had begun, for `attach`, `finish` or `reset`.

        Raises ValueError and TypeError where what is stored is inconsistent. Nothing starts before `start`.
        """
        task = Task(stored.id, rows, stored.timeout_ns)
        task.number = stored.task_number
        task.stop_reason = stored.stop
        if stored.stop:
            task.stop_count = max(1, stored.stop_count)
            task.stopped_ns = self._clock.now_ns()
        with self._lock:
            self._restore_steps(task, rows)
            ready = self._decide(task)
            begun = [step for step in ready if rows[step.index].state == State.RUNNING]
            if len(begun) != sum(row.state == State.RUNNING for row in rows):
                raise ValueError("a step runs before what it depends on has succeeded")
            task.copy_of = stored.copy_of
            task.is_paused = stored.result == Result.PAUSED
            task.is_delayed = stored.starts_ns > self._clock.now_ns()
            self._set_deadlines(task, stored.accepted_ns, stored.starts_ns)
            self._tasks[task.number] = task  # nothing raises from here on
            for step in ready:
                retry_at_ns = rows[step.index].retry_at_ns
                if retry_at_ns is None:
                    self._make_ready(step)
                else:
                    self._await_retry(step, retry_at_ns)
            for step in begun:
                self._move(step, Phase.STARTING)
            self._queue_copy(task)
            deferred = self._end_restored(task)
            self._without_thread.extend(deferred.cleanups)
        self._run_deferred(deferred._replace(cleanups=[]))
        return begun

    def _restore_steps(self, task: Task, rows: Sequence[UnfinishedStep]) -> None:
        """Restore how far steps have come, and skip what needs the success of those that failed; the lock is held."""
        for step, row in zip(task.steps, rows):
            step.stop_reason = row.stop
            if task.ends_by_stop(step) or row.retry_at_ns is not None:
                step.stop_reason = task.stop_reason or row.stop
            if row.stop:
                step.retry = None
            step.started_ns = row.started_ns or 0
            step.attempt = row.attempt + (row.retry_at_ns is not None)
            if row.state == State.ENDED:
                self._move(step, Phase.ENDED)
                step.code = row.code
                step.result = row.result
        for step in task.steps:
            if step.code:
                self._skip_dependents(step)

    def _end_restored(self, task: Task) -> _Deferred:
        """End the steps that are to be stopped and have not begun, and the task with its last step; the lock is held.

        The BLOCKED steps of a task that is stopped as a whole are ended or skipped when what they wait for has ended.
        """
        phases = {Phase.READY, Phase.RETRYING}
        if task.stop_reason:
            self._queue_cleanup(task)
        else:
            phases.add(Phase.BLOCKED)
        stopped = [step for step in task.steps if step.stop_reason and step.phase in phases]
        self._end_steps(task, [(step, forced(step.stop_reason)) for step in stopped])
        return self._dispatch()

    # -- stops

    def stop_task(self, task_number: int, stop: Stop = BY_NOBODY) -> None:
        """Stop the steps of a task by force, and what ended ones left running; return when that is recorded.

        The first stop spares those that clean up. Raises NotFound if it has ended.
        """
        with self._lock:
            task = self._tasks.get(task_number)
            if task is None:
                raise NotFound("the task has already ended")
            cause = stop.cause
            if cause == STOPPED or not task.stop_reason:  # a deadline does not cut the grace of a stop
                task.stop_count += 1
            if task.copy_of:  # nothing has run that could be cleaned up
                task.stop_count = 2
            task.stop_reason = task.stop_reason or cause
            task.stopped_ns = task.stopped_ns or self._clock.now_ns()
            if task.stop_reason != cause:
                stop = Stop(task.stop_reason)
            future = self._store.record_stop(task_number, None, stop, task.stop_count)
            active = [step for step in self._active if step.task is task]
            trees = self._request_stops(filter(task.ends_by_stop, active), cause)
            trees += [step.tree for step in active if step.tree]  # the deadline of those that clean up is another now
            self._queue_cleanup(task)
            self._hold_or_queue(task)
            outcome = forced(task.stop_reason)
            self._end_steps(task, [(step, outcome) for step in task.waiting_steps()])
            deferred = self._dispatch()
        _wake(trees)
        self._run_deferred(deferred)
        _wait_until_recorded(task, future)

    def stop_step(
        self,
        task_number: int,
        step_index: int,
        stop: Stop = BY_NOBODY,
        signal_name: str = "TERM",
    ) -> None:
        """Stop a step by force; return when that is recorded. Raises NotFound if it has ended, or never will run.

        Its tree gets this signal first; the next daemon, should this one be killed now, sends SIGTERM.
        """
        with self._lock:
            task = self._tasks.get(task_number)
            if task is None or task.steps[step_index].phase in _FINAL:
                raise NotFound("the step has already ended")
            step = task.steps[step_index]
            if step.stop_reason not in ("", STOPPED):
                stop = Stop(step.stop_reason)
            future = self._store.record_stop(task_number, step_index, stop)
            step.retry = None
            trees: list[ProcessTree] = []
            if step in self._active:
                step.stop_signal = signal_name
                trees = self._request_stops([step], STOPPED)
            else:
                self._end_steps(task, [(step, forced(STOPPED))])
            deferred = self._dispatch()
        _wake(trees)
        self._run_deferred(deferred)
        _wait_until_recorded(step, future)

    def request_stop(self, step: Step, reason: str) -> None:
        """Have a step stopped by its runner, if it has one; do not wait for it."""
        trees: list[ProcessTree] = []
        with self._lock:
            if step in self._active:
                trees = self._request_stops([step], reason)
        _wake(trees)

    def _request_stops(self, steps: Iterable[Step], reason: str) -> list[ProcessTree]:
        """Mark these active steps as to be stopped; return the trees to wake. The lock is held."""
        trees = []
        for step in steps:
            if reason == STOPPED or not step.stop_reason:  # a deadline does not cut the grace of a stop
                step.stop_count += 1
            step.stop_reason = step.stop_reason or reason
            if step.tree:
                trees.append(step.tree)
        return trees

    def _queue_cleanup(self, task: Task) -> None:
        """Have what the task's ended steps left running stopped; the lock is held."""
        if not task.copy_of and not task.is_cleaning and task.ended_steps():
            task.is_cleaning = True
            self._cleanups.append(task)

    def _queue_copy(self, task: Task) -> None:
        """Have the files copied that a task needs; the lock is held."""
        if task.copy_of:
            self._cleanups.append(task)

    def finish_copy(self, task: Task, error: str = "") -> None:
        """Let a task start that has all files it needs, or end it, where these cannot be had."""
        with self._lock:
            task.copy_of = 0
            if task.number not in self._tasks:
                return  # it was stopped
            if error:
                blocked = [step for step in task.steps if step.phase is Phase.BLOCKED]
                for step in blocked:
                    self._move(step, Phase.SKIPPED)
                ready = [step for step in task.steps if step.phase is Phase.READY]
                self._end_steps(task, [(step, not_started(error)) for step in ready])
            else:
                self._store.record_copy(task.number)
                self._hold_or_queue(task)
            deferred = self._dispatch()
        self._run_deferred(deferred)

    def finish_cleanup(self, task: Task) -> None:
        """End the clean-up of a task: nothing is left of what its ended steps had started."""
        with self._lock:
            task.is_cleaning = False
            self._end_steps(task, [])
            deferred = self._dispatch()
        self._run_deferred(deferred)

    # -- pauses

    def pause_task(self, task_number: int, is_paused: bool) -> None:
        """Let no further step of a task start, or let them start again; return when that is recorded.

        What runs goes on. Raises NotFound if it has ended.
        """
        with self._lock:
            task = self._tasks.get(task_number)
            if task is None:
                raise NotFound("the task has already ended")
            if task.stop_reason:
                raise NotFound("the task has been stopped")
            task.is_paused = is_paused
            self._hold_or_queue(task)
            future = self._store.record_pause(task_number, is_paused)
            deferred = self._dispatch()
        self._run_deferred(deferred)
        _wait_until_recorded(task, future)

    def _hold_or_queue(self, task: Task) -> None:
        """Take the ready steps of a task out of the queue, or put them there; the lock is held."""
        for step in task.steps:
            if step.phase is not Phase.READY:
                continue
            if task.is_held:
                self._ready.pop(step, None)
            elif step not in self._ready:
                self._ready[step] = None
                step.ready_s = time.monotonic()

    # -- for runners

    def begin(self, step: Step) -> Future[None] | None:
        """Store that a step begins, whose files are made; it must not run before the future is done.

        Return None where it may not start any more, since a pause came first: it is ready again.
        """
        with self._lock:
            if not step.task.is_held and not self._is_pool_paused:
                step.started_ns = self._clock.now_ns()
                return self._store.begin(
                    step.task.number,
                    step.index,
                    step.started_ns,
                    step.attempt,
                )
        self.reset(step)
        return None

    def attach(self, step: Step, tree: ProcessTree) -> None:
        """Mark a step as running, as this tree."""
        with self._lock:
            self._move(step, Phase.RUNNING)
            step.tree = tree
            self._retry_at_s = 0.0
            is_quiet = not self._ready or time.monotonic() - self._last_lack_s > _SCARCITY_S
            has_recovered = bool(self.scarcity) and is_quiet
            if has_recovered:
                self.scarcity = ""
            deferred = self._dispatch()
        if has_recovered:
            log.info("steps start again")
        self._run_deferred(deferred)

    def reset(self, step: Step) -> None:
        """Make a step ready again that has a slot, and of which nothing has run."""
        with self._lock:
            self._reset(step)
            deferred = self._dispatch()
        self._run_deferred(deferred)

    def requeue(self, step: Step, lack: str) -> None:
        """Put a step at the head of the queue that could not be started, for want of something on this host."""
        with self._lock:
            self._last_lack_s = time.monotonic()
            self._retry_at_s = self._last_lack_s + _START_RETRY_S
            is_new = not self.scarcity
            self.scarcity = f"steps wait, they cannot be started now: {lack}"
            self._reset(step)
            if step in self._ready:
                self._ready.move_to_end(step, last=False)
            deferred = self._dispatch()
        if is_new:
            log.error("%s: %s", step, self.scarcity, extra=step.log_extra)
        self._run_deferred(deferred)

    def _reset(self, step: Step) -> None:
        """Make a step ready again, or end it where it is to be stopped; the lock is held."""
        task = step.task
        self._move(step, Phase.READY)
        if step.started_ns:
            step.started_ns = 0
            has_begun = any(other.started_ns or other.attempt > 1 for other in task.steps)
            task_state = State.RUNNING if has_begun else State.PENDING
            self._store.requeue(task.number, step.index, task_state)
        if step.stop_reason:
            self._end_steps(task, [(step, forced(step.stop_reason))])

    def finish(
        self,
        step: Step,
        outcome: Outcome,
        tree_has_ended: bool = False,
    ) -> Outcome | None:
        """End a step or its attempt, and return how, with its tree taken from it where it is tried again.

        Return None, having done nothing, where its tree must be stopped first.
        """
        with self._lock:
            if step.stop_reason:
                outcome = forced(step.stop_reason)._replace(output_bytes=outcome.output_bytes)
            is_retried = self._is_retried(step, outcome)
            if (step.stop_reason or is_retried) and not tree_has_ended:
                return None
            if is_retried:
                self._retry_later(step)
            else:
                self._end_steps(step.task, [(step, outcome)])
            self._retry_at_s = 0.0  # what it took is free
            deferred = self._take_deferred()  # its worker takes the next step
        self._run_deferred(deferred)
        return outcome

    def _is_retried(self, step: Step, outcome: Outcome) -> bool:
        if step.retry is None or step.task.stop_reason:
            return False
        return step.retry.applies(outcome, step.attempt)

    def _retry_later(self, step: Step) -> None:
        """Let a step wait for its next attempt; the lock is held."""
        assert step.retry
        retry_at_ns = self._clock.now_ns() + step.retry.delay_after(step.attempt)
        step.tree = None
        step.attempt += 1
        step.started_ns = 0
        step.stop_reason = ""
        step.stop_count = 0
        self._store.retry(step.task.number, step.index, retry_at_ns)
        self._await_retry(step, retry_at_ns)

    def _await_retry(self, step: Step, retry_at_ns: int) -> None:
        self._move(step, Phase.RETRYING)
        heapq.heappush(self._retries, (retry_at_ns, step.task.number, step.index))
        self.timekeeper_wakeup.set()

    # -- for the API and the janitor

    def pool(self) -> PoolStats:
        """Return the pool's size and how many steps run and wait."""
        with self._lock:
            return self._pool_stats()

    def set_pool(self, size: int | None = None, is_paused: bool | None = None, reason: str | None = None) -> PoolStats:
        """Set the size of the pool, pause it or let it go on; return when that is recorded. None: as it is.

        When it grows or goes on, more steps start at once; when it shrinks, running ones end before others start.
        """
        with self._lock:
            self._size = size or self._size
            if is_paused is not None:
                self._is_pool_paused = is_paused
                self._pool_reason = ""
            if reason is not None:
                self._pool_reason = reason
            deferred = self._dispatch()
            stats = self._pool_stats()
            kept = {"size": stats.size, "paused": stats.paused, "reason": stats.reason}
            future = self._store.record_pool(kept)
        self._run_deferred(deferred)
        _wait_until_recorded("the pool", future)
        return stats

    def restore_pool(self, metadata: Mapping[str, str], with_size: bool) -> None:
        """Set the pool as it was kept for a later daemon, but for its size unless `with_size`."""
        kept: Mapping[str, Any] = json.loads(metadata.get("pool", "{}"))
        with self._lock:
            self._is_pool_paused = kept.get("paused", False)
            self._pool_reason = kept.get("reason", "")
            if with_size:
                self._size = kept.get("size", self._size)

    def pause_warning(self) -> str:
        """Return that the pool is paused, empty when it is not."""
        stats = self.pool()
        if not stats.paused:
            return ""
        return f"the pool is paused: no step starts: {stats.reason}".rstrip(": ")

    def _pool_stats(self) -> PoolStats:
        return PoolStats(
            self._size,
            len(self._active),
            len(self._ready),
            self._is_pool_paused,
            self._pool_reason,
        )

    def running_steps(self) -> list[Step]:
        """Return the steps that have a process tree and are not being stopped."""
        with self._lock:
            return [step for step in self._active if step.tree and not step.stop_reason]

    def pop_overdue_task(self) -> int | None:
        """Return the number of a task whose deadline has passed, each once; it may have ended. None for no more."""
        now_ns = self._clock.now_ns()
        with self._lock:
            if self._deadlines and self._deadlines[0][0] <= now_ns:
                return heapq.heappop(self._deadlines)[1]
        return None

    def next_deadline_ns(self) -> int | None:
        """Return when the next task or attempt starts, or a task is overdue; None where there is none."""
        with self._lock:
            moments = [heap[0] for heap in (self._deadlines, self._starts, self._retries) if heap]
        return min(moments)[0] if moments else None

    def start_delayed(self) -> None:
        """Let the steps of tasks start whose delay is over, and the attempts whose is."""
        now_ns = self._clock.now_ns()
        with self._lock:
            while self._starts and self._starts[0][0] <= now_ns:
                task = self._tasks.get(heapq.heappop(self._starts)[1])
                if task:  # not stopped meanwhile
                    task.is_delayed = False
                    self._hold_or_queue(task)
            while self._retries and self._retries[0][0] <= now_ns:
                _, number, index = heapq.heappop(self._retries)
                task = self._tasks.get(number)
                if task and task.steps[index].phase is Phase.RETRYING:
                    self._make_ready(task.steps[index])
            deferred = self._dispatch()
        self._run_deferred(deferred)

    def retry(self) -> None:
        """Try again what the host lacked something for."""
        with self._lock:
            without_thread = [*self._without_thread]
            self._without_thread.clear()
            deferred = self._dispatch()
        for work in without_thread:
            self._start_worker(work)
        self._run_deferred(deferred)

    # -- moves; the lock is held

    def _move(self, step: Step, phase: Phase) -> None:
        """Change the phase of a step, the one site that does. Raises IllegalMove."""
        if phase not in _MOVES[step.phase]:
            raise IllegalMove(f"{step}: from {step.phase.value} to {phase.value}")
        self._ready.pop(step, None)
        if phase is Phase.READY and not step.task.is_held:
            self._ready[step] = None
        if phase is Phase.STARTING:
            self._active.add(step)
        elif phase is not Phase.RUNNING:
            self._active.discard(step)
        if phase in _FINAL:
            step.task.unfinished -= 1
        if phase is Phase.SKIPPED:
            step.task.skipped.append(step.index)
        step.phase = phase

    def _make_ready(self, step: Step) -> None:
        step.ready_s = time.monotonic()
        self._move(step, Phase.READY)

    def _end_steps(self, task: Task, ends: Sequence[tuple[Step, Outcome]]) -> None:
        """End steps, make ready what waited for them, and end the task with its last step; all in one record.

        The steps of a stopped task that become ready end at once.
        """
        records: list[tuple[int, Outcome]] = []
        while True:
            for step, outcome in ends:
                self._end_step(step, outcome)
                records.append((step.index, outcome))
            ready = self._decide(task)
            for step in ready:
                self._make_ready(step)
            ends = [(step, forced(task.stop_reason)) for step in ready if task.ends_by_stop(step)]
            if not ends:
                break
        task_end = None
        if not task.unfinished and not task.is_cleaning:
            code, message = summarize((step.index, step.name, step.code) for step in task.steps)
            result = task_result(task.stop_reason, [step.result for step in task.steps if step.code])
            task_end = TaskEnd(code, message, result)
            del self._tasks[task.number]
            self._ended.append(task)
        if records or task.skipped or task_end:
            now_ns = self._clock.now_ns()
            self._store.end(task.number, records, task.skipped, task_end, now_ns)
            task.skipped = []

    def _end_step(self, step: Step, outcome: Outcome) -> None:
        has_waited_for_others = step.phase is not Phase.BLOCKED
        self._move(step, Phase.ENDED)
        step.code = outcome.code
        step.result = outcome.result
        step.reason = outcome.reason
        if outcome.code:
            self._skip_dependents(step)
        if has_waited_for_others:
            step.task.plan.finish(step.index, outcome.code != 0)

    def _decide(self, task: Task) -> list[Step]:
        """Decide which steps run, of those that wait for no other any more; return these, and skip the others."""
        runnable = []
        while indexes := task.plan.ready():
            for index in indexes:
                step = task.steps[index]
                is_undecided = step.phase is Phase.BLOCKED
                if is_undecided and task.plan.is_met(index, step.when):
                    runnable.append(step)
                    continue
                if is_undecided:
                    self._move(step, Phase.SKIPPED)
                task.plan.finish(index, step.code != 0)
        return runnable

    def _skip_dependents(self, step: Step) -> None:
        """Skip what needs that a failed step, on which it depends, had succeeded."""
        task = step.task
        pending = [*task.plan.dependents(step.index)]
        while pending:
            dependent = task.steps[pending.pop()]
            if dependent.phase is Phase.BLOCKED and dependent.when is When.SUCCESS:
                self._move(dependent, Phase.SKIPPED)
                pending += task.plan.dependents(dependent.index)

    def _next_ready_step(self) -> Step | None:
        """Give a slot to the step that is ready longest; return None where there is none, or no slot."""
        slots = min(self._size, self._capacity)
        if self._is_closed or self._is_pool_paused or not self._ready or len(self._active) >= slots:
            return None
        if self.scarcity:  # one at a time is tried then
            now_s = time.monotonic()
            if now_s < self._retry_at_s:
                return None
            self._retry_at_s = now_s + _START_RETRY_S
        step = next(iter(self._ready))
        self._move(step, Phase.STARTING)
        step.slot_count += 1
        return step

    def _dispatch(self) -> _Deferred:
        """Give free slots to ready steps; return what is to be done without the lock."""
        assigned = []
        while step := self._next_ready_step():
            assigned.append(step)
        return self._take_deferred(assigned)

    def _take_deferred(self, assigned: Sequence[Step] = ()) -> _Deferred:
        deferred = _Deferred([*assigned], self._cleanups, self._ended)
        self._cleanups = []
        self._ended = []
        return deferred

    def _set_deadlines(self, task: Task, accepted_ns: int, starts_ns: int) -> None:
        if task.timeout_ns:
            heapq.heappush(self._deadlines, (accepted_ns + task.timeout_ns, task.number))
            self.timekeeper_wakeup.set()
        if task.is_delayed:
            heapq.heappush(self._starts, (starts_ns, task.number))
            self.timekeeper_wakeup.set()

    # -- workers; without the lock

    def _run_deferred(self, deferred: _Deferred) -> None:
        """Do what must not be done under the lock. Threads come first: a slot without one would be lost."""
        for step in deferred.assigned:
            self._start_worker(step)
        for task in deferred.cleanups:
            self._start_worker(task)
        for task in deferred.ended:
            _log_end(task, self._clock.now_ns())
            try:
                self._on_task_end(task.number)
            except Exception:
                log.exception("%s: failed after its end", task)

    def _start_worker(self, work: Step | Task) -> None:
        """Start a thread for a step that has a slot, or for the clean-up of a task; where none can be, retry later."""
        worker = None
        try:
            worker = DaemonThread(target=self._work, args=(work,), name="step")
            with self._lock:
                self._workers.add(worker)
            worker.start()
        except (RuntimeError, MemoryError) as error:
            with self._lock:
                self._workers.discard(worker)
                if not isinstance(work, Step) or work.phase is not Phase.STARTING:
                    self._without_thread.append(work)
                    return
            self.requeue(work, f"no thread can be started ({error})")

    def _work(self, first: Step | Task) -> None:
        """Run one piece of work, then ready steps until there are none; the body of a worker."""
        work: Step | Task | None = first
        while work is not None:
            self._run(work)
            with self._lock:
                work = self._next_ready_step()
                if work is None:
                    self._workers.discard(threading.current_thread())
                deferred = self._dispatch()
            self._run_deferred(deferred)

    def _run(self, work: Step | Task) -> None:
        """Run a step or a clean-up to its end. Whatever it raises is logged, and it is tried again while it is ours."""
        slot = work.slot_count if isinstance(work, Step) else 0
        while not self.is_shutting_down:
            try:
                if not self._owns(work, slot):
                    return
                if isinstance(work, Task):
                    return self._copy(work) if work.copy_of else self._clean_up(work)
                return self._run_step(work)
            except Exception as error:
                if isinstance(error, OSError) and is_scarcity(error):
                    log.error("%s: cannot be attended to now, trying again: %s", work, error)
                else:
                    log.exception("%s: the daemon failed, trying again", work)
            time.sleep(_START_RETRY_S)

    def _owns(self, work: Step | Task, slot: int) -> bool:
        """Return whether a piece of work is still that of the worker that got it, for a step with this slot."""
        with self._lock:
            if isinstance(work, Task):
                return work.is_cleaning or (work.copy_of != 0 and work.number in self._tasks)
            return work in self._active and work.slot_count == slot


def _log_end(task: Task, now_ns: int) -> None:
    """Log how a task has ended, and in how many seconds from the begin of its first step."""
    begins = [step.started_ns for step in task.steps if step.started_ns]
    seconds = round((now_ns - min(begins, default=now_ns)) / _SECOND_NS, 3)
    fields: dict[str, Any] = {"task": task.id, "result": "succeeded", "seconds": seconds}
    failed = next((step for step in task.steps if step.code), None)
    if failed is None:
        log.info("%s: succeeded in %.3f s", task, seconds, extra={"log_fields": fields})
        return
    result = task_result(task.stop_reason, [failed.result]).value
    fields.update(result=result, step=failed.index, code=failed.code)
    failure = format_failure(failed.index, failed.name, failed.code, failed.reason)
    log.warning("%s: %s after %.3f s: %s", task, result, seconds, failure, extra={"log_fields": fields})


def _wake(trees: Iterable[ProcessTree]) -> None:
    """Wake the runners that wait for these trees."""
    for tree in trees:
        tree.wake()


def _wait_until_recorded(subject: Step | Task | str, future: Future[None]) -> None:
    """Wait until a stop or a pause is stored. If it cannot be, it takes effect all the same."""
    try:
        future.result()
    except (StorageFull, Unavailable) as error:
        log.error("%s: cannot store a stop or a pause: %s", subject, error)


# ======================================================================================================================
# III tasks / runner: launch, watch and result of one step
# ======================================================================================================================

_EXCESS = 1.25  # a step that is stopped for its output is killed at this multiple of the limit
_EARLY_LOOK_BYTES = 1 << 30  # a limit of output below this is checked as soon as a step starts


class NotStarted(Exception):
    """A step could not be started for now; the text says what the host lacks."""


class _Launch(NamedTuple):
    """What starts a step; `env` is added to the daemon's environment."""

    args: list[str]
    workspace: str
    env: dict[str, str]
    has_utf_8_console: bool
    has_stdin: bool
    stderr_is_apart: bool


class Runner:
    """Runs steps, each in a worker of the scheduler; any thread may call it."""

    def __init__(
        self,
        store: Store,
        scheduler: Scheduler,
        processes: Processes,
        clock: Clock,
        files: SafeDirectory,
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self._store = store
        self._scheduler = scheduler
        self._processes = processes
        self._clock = clock
        self._files = files
        self._settings = settings
        self._metrics = metrics
        self._path = os.environ.get("PATH", os.defpath)
        self._programs = ProgramCache()

    def directory(self, step: Step) -> StepDirectory:
        """Return the directory of a step."""
        return StepDirectory(self._files, step.task.number, step.index)

    def run(self, step: Step) -> None:
        """Run a step, or continue with an adopted one, until it has ended, is ready again, or the daemon exits."""
        tree = step.tree
        try:
            if tree is None and not self._launch(step):
                return
            tree = step.tree
            self._watch(step)
        except NotStarted as error:
            self._metrics.step_requeued(step.task.id, step.index)
            try:
                self._close_tree(step, tree)
            finally:  # else it would be launched once more while it counts as running
                self._scheduler.requeue(step, str(error))
            return
        except LaunchError as error:
            self._finish(step, not_started(str(error)))
        if step.phase is Phase.ENDED or self._scheduler.is_shutting_down:
            self._close_tree(step, tree)

    def clean_up(self, task: Task) -> None:
        """Stop what the ended steps of a stopped task have left running."""
        paths = [self.directory(step).path for step in task.ended_steps()]
        tree = self._processes.remains(paths)
        try:
            tree.stop(lambda: task.stop_count > 1)
        finally:
            self._processes.release(tree)
        self._scheduler.finish_cleanup(task)

    def copy_files(self, task: Task) -> None:
        """Copy what a task takes over from another: its workspace, and the outputs of steps that succeeded there."""
        error = ""
        try:
            self._copy_files(task)
        except OSError as problem:
            if is_scarcity(problem) and not is_disk_full(problem):
                raise  # later
            error = f"could not copy the files of the task that it repeats: {problem}"
        if not self._scheduler.is_shutting_down:  # else the next daemon copies them
            self._scheduler.finish_copy(task, error)

    def _copy_files(self, task: Task) -> None:
        def is_wanted() -> bool:
            return not task.stop_reason and not self._scheduler.is_shutting_down

        number = str(task.number)
        parent = str(task.copy_of)
        self._files.remove(number)  # what an earlier daemon may have left of it
        self._files.make(number)
        self._files.make(number, "workspace")
        if self._has_files(parent, "workspace"):
            with contextlib.ExitStack() as closing:
                source = closing.enter_context(self._files.enter(parent, "workspace"))
                target = closing.enter_context(self._files.enter(number, "workspace"))
                target.copy_from(source, is_wanted)
        for step in task.steps:
            index = str(step.index)
            has_output = step.phase is Phase.ENDED and self._has_files(parent, index)
            if has_output and is_wanted():
                self._copy_outputs(parent, number, index)
        if not self._store.has_task(task.copy_of):  # files go after their record: what was copied may be a part
            raise FileNotFoundError(errno.ENOENT, "it has expired meanwhile")

    def _has_files(self, *names: str) -> bool:
        try:
            self._files.status(*names)
        except FileNotFoundError:
            return False
        return True

    def _copy_outputs(
        self,
        parent: str,
        number: str,
        index: str,
    ) -> None:
        self._files.make(number, index)
        with self._files.enter(parent, index) as source:
            for entry in [*source.entries()]:
                is_file = stat.S_ISREG(source.status(entry.name).st_mode)
                if is_file and is_output_name(entry.name):
                    self._files.copy_file(source, number, index, entry.name)

    def remove_empty_workspace(self, task_number: int) -> None:
        """Remove the workspace of an ended task if it is empty."""
        with contextlib.suppress(OSError):  # it is not empty, or was never made
            self._files.remove_empty(str(task_number), "workspace")

    # -- launch

    def _launch(self, step: Step) -> bool:
        """Start the step's process; return False where the step was stopped before that, or the daemon exits.

        Raises LaunchError, and NotStarted where it can be tried again.
        """
        try:
            command = self._prepare(step)
            begun = self._scheduler.begin(step)
            if begun is None:
                return False
            begun.result()  # only what is known to have begun may run
            if step.stop_reason:
                self._finish(step, forced(step.stop_reason))
            if step.phase is Phase.ENDED or self._scheduler.is_shutting_down:
                return False
            failpoint("begun")
            tree = self._processes.start(
                command.args,
                self.directory(step).path,
                command.workspace,
                command.env,
                command.has_utf_8_console,
                command.has_stdin,
                command.stderr_is_apart,
            )
            failpoint("spawned")
        except (StorageFull, Unavailable, MemoryError) as error:
            raise NotStarted(str(error)) from error
        except (OSError, LookupError, ValueError) as error:
            if isinstance(error, OSError) and is_scarcity(error):
                raise NotStarted(str(error)) from error
            raise LaunchError(f"could not start: {error}") from error
        self._scheduler.attach(step, tree)
        if 0 < self._settings.max_output < _EARLY_LOOK_BYTES:
            self._scheduler.timekeeper_wakeup.set()
        waited_s = time.monotonic() - step.ready_s
        self._metrics.step_started(step.task.id, step.index, waited_s)
        log.debug("%s: started, pid %d", step, tree.pid, extra=step.log_extra)
        return True

    def _prepare(self, step: Step) -> _Launch:
        """Make the files of a step; return what is to be started. Raises what `_launch` sorts, and LaunchError."""
        script = self._store.script(step.task.number, step.index)
        name = script_name(script.command_type)
        content = encode_script(script.command_type, script.content, (*script.env, step.name))
        others = dict(self._processes.initial_files)
        if script.stdin:
            others["stdin"] = binascii.a2b_base64(script.stdin)
        file = self.directory(step).prepare(
            name,
            content,
            others,
            step.attempt,
        )
        workspace = self._make_workspace(step)
        entries = (*script_environment(script.command_type), *script.env)
        env = self._environment(step, entries, workspace)
        path = variable(env, "PATH", self._path)
        args = interpreter_command(
            script.command_type,
            file,
            workspace,
            path,
            self._programs.find,
        )
        return _Launch(
            args,
            workspace,
            env,
            needs_utf_8_console(script.command_type),
            has_stdin=script.stdin != "",
            stderr_is_apart=script.stderr == "apart",
        )

    def _make_workspace(self, step: Step) -> str:
        """Return the task's workspace, created where there is none. Raises LaunchError."""
        names = (str(step.task.number), "workspace")
        workspace = os.path.join(self._files.path, *names)
        if not is_real_directory(workspace):
            with contextlib.suppress(FileExistsError):  # a parallel step did
                self._files.make(*names)
        if not is_real_directory(workspace):
            raise LaunchError("could not start: an earlier step has replaced the workspace by something else")
        return workspace

    def _environment(
        self,
        step: Step,
        entries: Iterable[str],
        workspace: str,
    ) -> dict[str, str]:
        """Return what the step's environment has beyond the daemon's; `entries` are KEY=value, the last one counts."""
        given = []
        for entry in entries:
            name, _, value = entry.partition("=")
            given.append((name, value))
        own = {
            "TASK_ID": step.task.id,
            "TASK_STEP_ID": str(step.index),
            "TASK_STEP_NAME": step.name,
            "TASK_WORKSPACE": workspace,
        }
        if step.retry or step.attempt > 1:  # a client may have it stopped, and with that its retries
            own["TASK_STEP_ATTEMPT"] = str(step.attempt)
        return merge_variables(given, own.items())

    # -- watch

    def _watch(self, step: Step) -> None:
        """Wait for the step, stopping it on timeout or request, and end it. Return early if the daemon exits.

        Raises NotStarted where nothing of it has run.
        """
        assert step.tree
        has_ended = False
        while not (has_ended or step.stop_reason or self._scheduler.is_shutting_down):
            deadline_s = self._clock.monotonic_s(self._deadline_ns(step))
            has_ended = step.tree.wait(deadline_s)
            if not has_ended and time.monotonic() >= deadline_s:
                self._scheduler.request_stop(step, TIMED_OUT)
        if step.stop_reason:
            self._stop(step)
            self._finish(step, forced(step.stop_reason), tree_has_ended=True)
        elif has_ended:
            self._finish_ended(step)

    def _deadline_ns(self, step: Step) -> int:
        """Return when a step times out; one that cleans up after a stop has less time, or its own timeout."""
        if step.timeout_ns:
            return step.started_ns + step.timeout_ns
        deadline_ns = step.started_ns + self._settings.exec_timeout
        if step.task.stop_reason:
            begin_ns = max(step.started_ns, step.task.stopped_ns)
            deadline_ns = min(deadline_ns, begin_ns + _CLEANUP_TIMEOUT_NS)
        return deadline_ns

    def _finish_ended(self, step: Step) -> None:
        """End a step whose wrapper has ended by itself; a stop or a retry that comes now still reaches its tree."""
        code = self._exit_code(step)
        if code is None:  # its wrapper was killed: what it ran may run on
            self._stop(step)
            self._finish(step, forced(LOST), tree_has_ended=True)
        elif not self._finish(step, self.exited(code)):
            self._stop(step, "it is tried again")
            self._finish(step, self.exited(code), tree_has_ended=True)

    def exited(self, code: int) -> Outcome:
        """Return the outcome of a step whose wrapper has ended by itself and left this code."""
        return exited(code, self._processes.death_signal(code))

    def _exit_code(self, step: Step) -> int | None:
        """Return the exit code of the step's script, None where it is lost. Raises NotStarted if it never began."""
        assert step.tree
        directory = self.directory(step)
        code = step.tree.exit_code()
        if code is None:
            code = directory.exit_code()
        if code != 0 and not step.stop_reason and not self._processes.may_have_started(directory.path):
            raise NotStarted("no process could be started, or nothing written to its directory")
        return code

    def _stop(self, step: Step, reason: str = LOST) -> None:
        """Stop the step's tree: ask it to end, kill it when the grace period is over."""
        assert step.tree
        log.info("%s: %s", step, step.stop_reason or reason, extra=step.log_extra)
        directory = self.directory(step)
        max_bytes = self._settings.max_output * _EXCESS

        def is_hurried() -> bool:
            is_excessive = step.stop_reason == OUTPUT_EXCEEDED and directory.output_bytes(step.attempt) > max_bytes
            return step.stop_count > 1 or step.stop_signal == "KILL" or is_excessive

        step.tree.stop(is_hurried, signal_number(step.stop_signal))

    def _finish(self, step: Step, outcome: Outcome, tree_has_ended: bool = False) -> bool:
        """End the step or its attempt; return False, having done nothing, where its tree must be stopped first."""
        failpoint("ended")
        seconds = 0.0
        if step.started_ns:
            seconds = (self._clock.now_ns() - step.started_ns) / _SECOND_NS
        output_bytes = self.directory(step).output_bytes(step.attempt)
        tree = step.tree
        attempt = step.attempt
        tree_has_ended = tree_has_ended or tree is None
        end = self._scheduler.finish(
            step,
            outcome._replace(output_bytes=output_bytes),
            tree_has_ended,
        )
        if end is None:
            return False
        if tree and step.tree is not tree:  # it is tried again, perhaps by another worker already
            self._processes.release(tree)
        result = "forced"
        if end.result in (Result.SUCCEEDED, Result.FAILED):
            result = end.result.value
        self._metrics.step_ended(step.task.id, step.index, result, seconds, output_bytes)
        log.debug(
            "%s: attempt %d ended with code %d %s",
            step,
            attempt,
            end.code,
            end.reason,
            extra=step.log_extra,
        )
        return True

    def _close_tree(self, step: Step, tree: ProcessTree | None) -> None:
        """Release a tree of this step, unless that was done; by now the step may have another worker and tree."""
        if tree and step.tree is tree:
            step.tree = None
            self._processes.release(tree)


# ======================================================================================================================
# III tasks / recovery: what an earlier daemon left
# ======================================================================================================================

_TASK_NUMBER = re.compile("[1-9][0-9]{0,17}")
_RECOVERY_PATIENCE_S = 30.0  # with a host that has no descriptor or memory for an answer; then the daemon ends
_RECOVERY_PAUSE_S = 0.1


class Recovery:
    """Restores the tasks that an earlier daemon left; for the daemon's start, before anything runs."""

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
        self._open_files()
        self._scheduler.reserve_task_numbers(self._store.last_task_number())
        stored = {str(number) for number in self._store.task_numbers()}
        strays = []
        for name in os.listdir(self._files.path):
            if name not in stored:
                strays.append(self._rename_for_removal(name))
        for number in self._store.unfinished_task_numbers():
            try:
                self._restore(*self._store.unfinished_task(number))
            except (ValueError, TypeError) as error:
                log.error("task number %d cannot be restored: %s", number, error)
                self._store.fail(number, f"lost: what was stored of it is damaged: {error}", self._clock.now_ns())
        return strays

    def _open_files(self) -> None:
        """Open the tasks' directory, a new one where the old one belongs to a database in quarantine."""
        path = self._files.path
        suffix = self._store.quarantine_suffix
        if suffix and os.path.isdir(path):
            _move_or_copy(path, path + suffix)
        os.makedirs(path, exist_ok=True)
        self._files.open()

    def _rename_for_removal(self, name: str) -> str:
        """Rename a stray directory, for a new task may get its number before it is removed; return its new name."""
        stem = name.partition(".")[0][:20]
        new_name = f"{stem}.gone-{time.time_ns()}"
        path = os.path.join(self._files.path, name)
        try:
            os.rename(path, os.path.join(self._files.path, new_name))
        except OSError:  # it is a mount, or a process works in it, which Windows lets nobody move
            if _TASK_NUMBER.fullmatch(name):
                self._scheduler.reserve_task_numbers(int(name))
            return name
        return new_name

    def _restore(self, stored: UnfinishedTask, rows: Sequence[UnfinishedStep]) -> None:
        for step in self._scheduler.restore(stored, rows):
            self._restore_patiently(step)

    def _restore_patiently(self, step: Step) -> None:
        """Restore a step that had begun; what cannot be found out now is asked again. Raises OSError in the end."""
        give_up_s = time.monotonic() + _RECOVERY_PATIENCE_S
        has_failed = False
        while True:
            try:
                self._restore_begun_step(step)
                return
            except OSError as error:
                if time.monotonic() >= give_up_s:
                    raise
                if not has_failed:
                    log.warning("%s: cannot find out whether it still runs, trying again: %s", step, error)
                has_failed = True
            time.sleep(_RECOVERY_PAUSE_S)

    def _restore_begun_step(self, step: Step) -> None:
        """Find out by its files and processes what became of a step that had begun, and have it attended to."""
        directory = self._runner.directory(step)
        tree = self._processes.adopt(directory.path)
        if tree:
            log.info("%s: still runs, pid %d", step, tree.pid, extra=step.log_extra)
            self._scheduler.attach(step, tree)
            return
        code = directory.exit_code()
        if code is not None:
            outcome = self._runner.exited(code)._replace(output_bytes=directory.output_bytes(step.attempt))
            if self._scheduler.finish(step, outcome):
                return
        if code is not None or self._processes.may_have_started(directory.path):
            # It was stopped or killed, or is tried again, and may have left something: its runner ends that first.
            self._scheduler.attach(step, self._processes.remains([directory.path]))
        else:
            self._scheduler.reset(step)


def _move_or_copy(path: str, target: str) -> None:
    """Move a directory; copy its content where it cannot be moved."""
    try:
        rename(path, target)
        return
    except OSError:  # it is a mount, or a process works in it, which Windows lets nobody move
        log.warning("%s cannot be moved: copying its content", path)
    try:
        shutil.copytree(path, target, symlinks=True, ignore=ignore_links)
    except shutil.Error as error:
        log.error("not all of %s could be copied to %s: %s", path, target, error)


# ======================================================================================================================
# III tasks / janitor: deadlines, limits of output, expiry, removal
# ======================================================================================================================

_TICK_S = 0.5  # between checks of outputs and of what has expired
_MIN_TICK_S = 0.01
_FASTEST_WRITER_BYTES_PER_S = 2 * 10**9  # a step may fill its limit that fast
_REMOVAL_ATTEMPTS = 20  # until a removal that fails is logged: 10 s, longer than a virus scanner holds a file


class Janitor:
    """Enforces deadlines and limits of output, deletes what has expired and its files; by threads of its own."""

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
        self._stored_sleeps = clock.sleeps()  # the timekeeper's
        self._pending_removals: dict[str, int] = {}  # names of directories, and how often that failed; the sweeper's
        self._handed_over: collections.deque[str] = collections.deque()  # for the sweeper to remove
        self._stopping = threading.Event()
        timekeeper = (self._enforce_limits, scheduler.timekeeper_wakeup)
        sweeper = (self._sweep, self._stopping)
        self._background_threads = [
            DaemonThread(target=self._run_periodically, args=timekeeper, name="timekeeper"),
            DaemonThread(target=self._run_periodically, args=sweeper, name="sweeper"),
        ]

    def start(self, strays: Iterable[str]) -> None:
        """Start the threads; these directories are removed first."""
        self._pending_removals.update(dict.fromkeys(strays, 0))
        for thread in self._background_threads:
            thread.start()

    def stop(self) -> None:
        """End the threads, or leave them after a moment."""
        self._stopping.set()
        self._scheduler.timekeeper_wakeup.set()
        for thread in self._background_threads:
            if thread.is_alive():
                thread.join(_JOIN_TIMEOUT_S)

    def is_alive(self) -> bool:
        """Return whether its threads run."""
        return all(thread.is_alive() for thread in self._background_threads)

    def _run_periodically(self, action: Callable[[], float], wakeup: threading.Event) -> None:
        """Repeat an action, after the pause in seconds that it returns, or at the wake-up; the body of a thread.

        What it raises is logged, the same thing only once in succession.
        """
        last_error = ""
        while not self._stopping.is_set():
            pause_s = _TICK_S
            try:
                pause_s = action()
                last_error = ""
            except Exception as error:
                if repr(error) != last_error:
                    log.exception("%s failed, trying again", threading.current_thread().name)
                last_error = repr(error)
            if wakeup.wait(pause_s) and wakeup is not self._stopping:
                wakeup.clear()

    def _enforce_limits(self) -> float:
        """Stop what is overdue and what writes too much, retry what waits; return the pause until the next look."""
        self._store_sleep()
        self._scheduler.start_delayed()
        while (task_number := self._scheduler.pop_overdue_task()) is not None:
            with contextlib.suppress(NotFound):  # it has ended
                self._scheduler.stop_task(task_number, Stop(TIMED_OUT))
        self._scheduler.retry()
        pause_s = self._check_outputs()
        deadline_ns = self._scheduler.next_deadline_ns()
        if deadline_ns is not None:
            pause_s = min(pause_s, (deadline_ns - self._clock.now_ns()) / _SECOND_NS)
        return max(0.0, pause_s)

    def _store_sleep(self) -> None:
        """Store that the host has slept, where it has: a later daemon could not tell before which times that was."""
        sleeps = self._clock.sleeps()
        if sleeps is not self._stored_sleeps:
            self._stored_sleeps = sleeps
            self._store.save_metadata(self._clock.metadata())

    def _check_outputs(self) -> float:
        """Stop the steps that write too much; return how soon another one may."""
        limit = self._settings.max_output
        if not limit:
            return _TICK_S
        pause_s = _TICK_S
        for step in self._scheduler.running_steps():
            output_bytes = StepDirectory(self._files, step.task.number, step.index).output_bytes(step.attempt)
            if output_bytes > limit:
                self._scheduler.request_stop(step, OUTPUT_EXCEEDED)
            else:
                pause_s = min(pause_s, (limit - output_bytes) / _FASTEST_WRITER_BYTES_PER_S)
        return max(_MIN_TICK_S, pause_s)

    def _sweep(self) -> float:
        """Delete what has expired, and its files; return the pause until the next look."""
        with contextlib.suppress(OSError):  # no descriptor to look with: the next time
            self._processes.reap()
        self._remove_pending()  # first, for on a full disk nothing expires
        expired = self._store.expire(self._clock.now_ns() - self._settings.key_expire)
        for task_number in expired:
            self._pending_removals[str(task_number)] = 0
        return 0 if expired else _TICK_S

    def remove_files(self, task_number: int) -> None:
        """Remove the files of a task now, or as soon as that can be; any thread may ask."""
        name = str(task_number)
        if not self._remove(name):
            self._handed_over.append(name)

    def _remove_pending(self) -> None:
        """Remove the directories that are pending; log once which ones cannot be."""
        while self._handed_over:
            self._pending_removals[self._handed_over.popleft()] = 0
        for name in [*self._pending_removals]:
            if self._stopping.is_set():
                return
            if self._remove(name):
                del self._pending_removals[name]
                continue
            self._pending_removals[name] += 1  # held by a process or a virus scanner, or mounted: later
            if self._pending_removals[name] == _REMOVAL_ATTEMPTS:
                log.warning("%s cannot be removed yet, trying again", os.path.join(self._files.path, name))

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
    trusted_proxies: tuple[Network, ...] = ()  # empty unless this is one of them

    @property
    def address(self) -> str:
        return self.endpoints[0][0]


class Forwarded(NamedTuple):
    """What a trusted proxy says of a request that it forwards; empty where it does not say."""

    address: str = ""  # of the client
    scheme: str = ""
    host: str = ""
    prefix: str = ""  # of the path, which the proxy has taken off


def _show_endpoint(endpoint: tuple[str, int]) -> str:
    host, port = endpoint
    if ":" in host:
        host = f"[{host}]"
    return f"{host}:{port}"


class BodyStream(Protocol):
    """A body that is read block by block as its handler asks for it; each block is valid until the next."""

    is_finished: bool

    def __iter__(self) -> Iterator[memoryview]:
        """Yield the blocks. Raise BadRequest or ConnectionEnded."""


class Hold(Protocol):
    """A connection whose answer waits for something. `wake` is for any thread, all else for the connection's."""

    is_ending: bool  # the daemon ends, so nothing more is worth waiting for

    def wake(self) -> None:
        """End `wait`, or the next one."""

    def wait(self, timeout_s: float) -> None:
        """Wait for `wake` or the end of the daemon, at most so long. Raise ConnectionEnded if the client has gone."""


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
    raw_path: str = ""  # as sent, for names of files, which need not be UTF-8
    raw_query: str = ""
    is_utf8: bool = True  # path and query, their escapes decoded
    stream: BodyStream | None = None  # the body, where the route reads it itself
    forwarded: Forwarded = Forwarded()
    hold: Hold | None = None  # where the answer may have to wait

    @property
    def peer(self) -> str:
        """The client's address, for the log and the limits: as a trusted proxy tells it, else the connection's."""
        return self.forwarded.address or self.client.address

    @property
    def scheme(self) -> str:
        return self.forwarded.scheme or self.client.scheme

    @property
    def base_url(self) -> str:
        host = self.host or _show_endpoint(self.client.endpoints[1])  # HTTP/1.0 needs no Host
        return f"{self.scheme}://{host}{self.forwarded.prefix}"

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for `100 Continue` before it sends the body."""
        return not self.is_http_10 and "expect" in self.headers and self.body_bytes != 0


class FileSlice(NamedTuple):
    """Bytes of an open file, as the body of a response; who sends them closes the file."""

    file: io.FileIO
    offset: int
    byte_count: int


class Response(NamedTuple):
    """A response. A body of several blocks is streamed, for a HEAD none of them is made.

    `audit` describes a change in the log, beside its path. Who sends a body
    closes it, but not the file of a block.
    """

    status: int = 200
    headers: Headers = ()
    body: bytes | FileSlice | Iterable[bytes | FileSlice] = b""
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


_BYTE_RANGE = re.compile(r"bytes=[ \t]*([0-9]{0,18})-([0-9]{0,18})[ \t]*", re.IGNORECASE)


def parse_range(header: str, total_bytes: int) -> tuple[int, int] | None:
    """Return offset and number of the bytes that a Range header asks for (RFC 9110, 14.2).

    None where it is to be ignored: none, several, malformed. Raise RangeNotSatisfiable.
    """
    match = _BYTE_RANGE.fullmatch(header)
    if not match or not (match[1] or match[2]):
        return None
    first = int(match[1] or 0)
    end = total_bytes
    if not match[1]:
        first = max(0, total_bytes - int(match[2]))
    elif match[2]:
        if int(match[2]) < first:
            return None
        end = min(total_bytes, int(match[2]) + 1)
    if first >= end:
        raise RangeNotSatisfiable(f"no byte of {header!r} is there: it has {total_bytes} bytes", total_bytes)
    return first, end - first


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
#                                   before the colon, both body lengths or one twice, any coding but chunked. Only an
#                                   empty line before a request is ignored.
#     an ambiguous Host             The access rules trust it: it comes once, without user, path or control character.
#     leaving a path                The path is split into segments, then each is decoded, once: %2f separates nothing,
#                                   %252e%252e is no parent directory. Other bytes than UTF-8 are refused.
#     forged forwarding             What a proxy says is read of a --trusted_proxy alone, and as strictly as Host.
#     exhausting memory             Head, fields, lines of chunks and bodies are bounded, a body by its declared length
#                                   before a byte of it is read.
#     exhausting time (slowloris)   One deadline for the head and one for the body, not a timeout for each read: a byte
#                                   now and then gains nothing. An upload has one for each 64 KB.
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
_GLANCE_S = 0.001
_STREAM_BLOCK_BYTES = 1 << 18  # one for each upload: larger ones are no faster
_MIN_STREAM_BYTES = 1 << 16
_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# A target has ASCII alone (RFC 3986), but curl sends UTF-8 as it was typed.
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([\x21-\x7e\x80-\xff]+) HTTP/1\.([01])")
_FIELD_LINE = re.compile(rf"({_TOKEN}):([\t\x20-\x7e\x80-\xff]*)")
_BARE_CR_LF_OR_NUL = re.compile(rb"(?<!\r)\n|\r[^\n]|\0")
_AUTHORITY = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~-]+)(?::[0-9]{1,5})?")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,12})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
_SINGLE_FIELDS = {"host", "content-length", "transfer-encoding", "authorization", "origin", "expect"}


class ConnectionEnded(Exception):
    """The client has closed or reset the connection, or is too slow."""


class ReaderTooSlow(ConnectionEnded):
    """The client does not read the response in time."""


@functools.lru_cache(maxsize=1024)  # asked for several times a request
def _parse_ip(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Parse an address; one that is mapped into IPv6, as a dual-stack socket shows it, as IPv4. Raise ValueError."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
        return ip.ipv4_mapped
    return ip


def _readable(socks: Iterable[socket.socket]) -> set[Any]:
    """Return those from which data, or an end, can be read now."""
    selector_class = getattr(selectors, "PollSelector", selectors.SelectSelector)  # neither takes a descriptor
    with selector_class() as selector:
        for sock in socks:
            selector.register(sock, selectors.EVENT_READ)
        return {key.fileobj for key, _ in selector.select(0)}


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
        """Wait for the first byte of a request. Raise ConnectionEnded if there is none in time.

        An empty line is none: some clients send one behind a body (RFC 9112, 2.2).
        """
        while len(self._buffer) <= 2 and not self._buffer.strip(b"\r\n"):
            self._receive()

    def read_head(self) -> list[str]:
        """Return the lines of a head, without the empty last one. Raise BadRequest or ConnectionEnded."""
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
        """Return the bytes before a CRLF, which is dropped. Raise BadRequest or ConnectionEnded."""
        while True:
            end = self._buffer.find(b"\r\n", 0, _MAX_CHUNK_LINE_BYTES)
            if end >= 0:
                break
            if len(self._buffer) >= _MAX_CHUNK_LINE_BYTES:
                raise BadRequest(f"line of the chunked body longer than {_MAX_CHUNK_LINE_BYTES} bytes")
            self._receive()
        return self._take(end + 2)[:-2]

    def read_exactly(self, count: int) -> bytes:
        """Return `count` bytes. Raise ConnectionEnded."""
        while len(self._buffer) < count:
            self._receive()
        return self._take(count)

    def read_into(self, view: memoryview) -> int:
        """Read into the beginning of `view`, which is not empty; return how many bytes. Raise ConnectionEnded."""
        count = min(len(view), len(self._buffer))
        if not count:
            return int(self._before_deadline(self._sock.recv_into, view))
        view[:count] = self._take(count)
        return count

    def has_buffered(self, count: int) -> bool:
        """Return whether `count` bytes were received that nobody has read."""
        return len(self._buffer) >= count

    def has_ended(self) -> bool:
        """Return whether the client has closed its end; what it has sent meanwhile is kept for the next request."""
        if len(self._buffer) > _MAX_HEAD_BYTES or not _readable([self._sock]):
            return False
        self._timeout_s = _GLANCE_S
        self._set_timeout(_GLANCE_S)  # TLS may have received what holds no data
        try:
            received = self._sock.recv(1 << 16)
        except OSError as error:
            return not isinstance(error, (TimeoutError, socket.timeout, BlockingIOError))
        self._buffer += received
        return not received

    def drain(self, timeout_s: float) -> None:
        """Read and drop what comes, until the client closes or `timeout_s` is over."""
        self.set_deadline(timeout_s)
        with contextlib.suppress(ConnectionEnded):  # which is what this waits for
            while True:
                self._buffer.clear()
                self._receive()

    def _check_head(self, end: int) -> None:
        """Raise BadRequest if the head up to `end` is too large, or has a line end that is not CRLF."""
        if end > _MAX_HEAD_BYTES:
            raise BadRequest(f"request head larger than {_MAX_HEAD_BYTES // 1024} KB")
        begin = max(0, self._scanned - 1)  # whose last byte may be the CR of a CRLF
        if _BARE_CR_LF_OR_NUL.search(self._buffer, begin, end):
            raise BadRequest("bare CR, bare LF or NUL in the request head")

    def _take(self, count: int) -> bytes:
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def _receive(self) -> None:
        """Add to the buffer what the client has sent. Raise ConnectionEnded at the end or the deadline."""
        self._buffer += self._before_deadline(self._sock.recv, 1 << 16)

    def _before_deadline(self, receive: Callable[[Any], Any], argument: Any) -> Any:
        """Return what a recv() returns, which is not nothing. Raise ConnectionEnded at the end or the deadline."""
        left_s = self._deadline_s - time.monotonic()
        try:
            # Setting costs a system call, so a timeout that is up to a second too short for this deadline is kept.
            if left_s < self._timeout_s or left_s > self._timeout_s + 1:
                self._timeout_s = max(left_s, 0.001)
                self._set_timeout(self._timeout_s)
            received = receive(argument)
        except OSError as error:
            raise ConnectionEnded(str(error)) from None
        if not received:
            raise ConnectionEnded("the client has closed the connection")
        if left_s <= 0:
            raise ConnectionEnded("the client is too slow")
        return received


def read_head(reader: RequestReader, timeout_s: float, client: Client) -> Request:
    """Return the next request, without its body (RFC 9112, read strictly).

    Raise BadRequest, after which nothing more can be read from the connection, or ConnectionEnded.
    """
    reader.set_deadline(timeout_s)
    request_line, *field_lines = reader.read_head()
    if not request_line and field_lines:  # an empty line before it is ignored (RFC 9112, 2.2)
        request_line, *field_lines = field_lines
    match = _REQUEST_LINE.fullmatch(request_line)
    if not match:
        raise BadRequest("malformed request line: expected for example GET /version HTTP/1.1")
    method, target, minor_version = match.groups()
    fields = _parse_fields(field_lines)
    is_http_10 = minor_version == "0"
    if "host" not in fields and not is_http_10:
        raise BadRequest("missing Host header")
    path, query, host = _split_target(target, fields.get("host", ""))
    body_bytes = _body_bytes(fields, is_http_10)
    segments = tuple(_unquote(segment) for segment in path.split("/")[1:])
    request = Request(
        method,
        segments,
        _decode_query(query),
        fields,
        host,
        is_http_10,
        body_bytes,
        client,
        raw_path=path,
        raw_query=query,
        is_utf8=_is_utf8(target),
    )
    if not client.trusted_proxies:
        return request
    forwarded = _parse_forwarded(request)
    return request._replace(forwarded=forwarded, host=forwarded.host or host)


def read_body(
    reader: RequestReader,
    request: Request,
    timeout_s: float,
    max_bytes: int,
    send_continue: Callable[[], None],
) -> bytes:
    """Return the body of a request whose head was read; `send_continue` is called if the client waits for it.

    Raise ContentTooLarge or BadRequest, after which nothing more can be read from the connection, or ConnectionEnded.
    """
    size = request.body_bytes
    if size == 0:
        return b""
    if size is not None and size > max_bytes:
        raise ContentTooLarge(f"request body has {size} bytes; at most {max_bytes} are allowed (--max_body)")
    if request.expects_continue and not reader.has_buffered(size or 1):
        send_continue()
    reader.set_deadline(timeout_s)
    if size is None:
        return _read_chunks(reader, max_bytes)
    reader.extend_deadline(size / _MIN_BODY_BYTES_PER_S)
    return reader.read_exactly(size)


def _parse_fields(lines: Sequence[str]) -> dict[str, str]:
    """Return header fields by their names in lower case, repeated ones joined by commas. Raise BadRequest."""
    if len(lines) > _MAX_FIELDS:
        raise BadRequest(f"more than {_MAX_FIELDS} header fields")
    fields: dict[str, str] = {}
    for line in lines:
        match = _FIELD_LINE.fullmatch(line)
        if not match:
            raise BadRequest("malformed header field: expected `Name: value`")
        name = match[1].lower()
        value = match[2].strip(" \t")
        if name not in fields:
            fields[name] = value
        elif name in _SINGLE_FIELDS:
            raise BadRequest(f"duplicate {match[1]} header")
        else:
            fields[name] += f", {value}"
    return fields


def _split_target(target: str, host: str) -> tuple[str, str, str]:
    """Return path, query and host. The host of an absolute target replaces Host (RFC 9112, 3.2.2). Raise BadRequest."""
    if host and not _AUTHORITY.fullmatch(host):
        raise BadRequest("malformed Host header: expected host or host:port")
    if "#" in target or _BAD_ESCAPE.search(target):
        raise BadRequest("malformed request target: it has a fragment or a bad escape")
    if target.startswith("/"):  # not for urlsplit: //version would have a host
        path, _, query = target.partition("?")
        return path, query, host
    try:
        url = urllib.parse.urlsplit(target)
    except ValueError:
        raise BadRequest("malformed request target: its host is invalid") from None
    if url.scheme not in ("http", "https"):
        raise BadRequest("malformed request target: expected a path or an http URL")
    if not _AUTHORITY.fullmatch(url.netloc):
        raise BadRequest("malformed request target: expected host or host:port in the URL")
    return url.path or "/", url.query, url.netloc


def _body_bytes(fields: Mapping[str, str], is_http_10: bool) -> int | None:
    """Return the declared size of the body, None for chunks. Raise BadRequest (RFC 9112, 6.3)."""
    length = fields.get("content-length", "0")
    coding = fields.get("transfer-encoding")
    if coding is not None and "content-length" in fields:
        raise BadRequest("both Content-Length and Transfer-Encoding: send only one of them")
    if not re.fullmatch("[0-9]{1,18}", length):
        raise BadRequest("invalid Content-Length: expected a number of bytes")
    if coding is not None and is_http_10:
        raise BadRequest("Transfer-Encoding is not allowed in HTTP/1.0: send Content-Length")
    if coding is not None and coding.lower() != "chunked":
        raise BadRequest("unsupported Transfer-Encoding: only chunked is supported")
    if fields.get("expect", "100-continue").lower() != "100-continue":
        raise BadRequest("unsupported Expect: only 100-continue is supported")
    if coding is not None:
        return None
    return int(length)


def _is_utf8(target: str) -> bool:
    """Return whether a target, its escapes decoded, is UTF-8."""
    if target.isascii() and "%" not in target:
        return True
    try:
        urllib.parse.unquote_to_bytes(target.encode("latin-1")).decode()
        return True
    except UnicodeDecodeError:
        return False


def _to_text(text: str) -> str:
    """Return the text of bytes that were decoded as Latin-1; where `_is_utf8` is False, with replacement marks."""
    if text.isascii():
        return text
    return text.encode("latin-1").decode("utf-8", "replace")


def _unquote(segment: str) -> str:
    if "%" in segment:
        segment = urllib.parse.unquote(segment, encoding="latin-1")
    return _to_text(segment)


def _decode_query(query: str) -> tuple[tuple[str, str], ...]:
    pairs = urllib.parse.parse_qsl(query, keep_blank_values=True, encoding="latin-1")
    return tuple((_to_text(name), _to_text(value)) for name, value in pairs)


# What a proxy says of a request is believed of a --trusted_proxy alone. Each proxy adds what it sees at the end of a
# list, so the list is read from there, as far as the proxies are trusted: what stands before comes from anybody.

_FORWARDED_PAIR = re.compile(rf'\s*({_TOKEN})=(?:({_TOKEN})|"([^"\\]*)")\s*(;|,|$)')
_FORWARDED_NODE = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::[0-9]{1,5})?|([0-9.]+)(?::[0-9]{1,5})?|([0-9A-Fa-f:.]+)")
_HIDDEN_NODE = re.compile(r"unknown|_[A-Za-z0-9._-]+", re.IGNORECASE)
_PREFIX = re.compile(r"(?:/[A-Za-z0-9._~!$&'()*+;=:@-]+)*/?")


def _parse_forwarded(request: Request) -> Forwarded:
    """Return what the trusted proxies say of a request. Raise BadRequest where it is malformed or contradicts itself.

    A proxy that sets fields of one kind may let those of the other kind pass, which then are the client's own.
    """
    standard = _innermost_untrusted(_parse_forwarded_field(request.headers), request.client)
    usual = _innermost_untrusted(_x_forwarded_elements(request.headers), request.client)
    values = []
    for name, value, other in zip(Forwarded._fields, standard, usual):
        if value and other and value != other:
            raise BadRequest(f"Forwarded and X-Forwarded-* differ in the {name}: have the proxy remove one of them")
        values.append(value or other)
    return Forwarded(*values)


def _innermost_untrusted(elements: Sequence[Mapping[str, str]], client: Client) -> Forwarded:
    """Return what the first proxy says that is trusted, of elements in the order of the proxies. Raise BadRequest."""
    address = ""
    scheme = ""
    host = ""
    prefix = ""
    for element in reversed(elements):
        scheme = element.get("proto", scheme).lower()
        host = element.get("host", host)
        prefix = element.get("prefix", prefix)
        address = _parse_node(element.get("for", ""))
        if not address or not _is_in(address, client.trusted_proxies):
            break
    if scheme not in ("", "http", "https"):
        raise BadRequest(f"invalid forwarded scheme {scheme!r}: expected http or https")
    if host and not _AUTHORITY.fullmatch(host):
        raise BadRequest("malformed forwarded host: expected host or host:port")
    if not _PREFIX.fullmatch(prefix) or {".", ".."} & {*prefix.split("/")}:
        raise BadRequest("malformed forwarded prefix: expected for example /executor")
    return Forwarded(address, scheme, host, prefix.rstrip("/"))


def _x_forwarded_elements(headers: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the elements of X-Forwarded-*; lists of different lengths end together, with the last proxy's."""
    elements: list[dict[str, str]] = []
    for name in ("for", "proto", "host", "prefix"):
        texts = headers.get(f"x-forwarded-{name}", "").split(",")
        for index, text in enumerate(reversed(texts)):
            if index == len(elements):
                elements.append({})
            if text.strip():
                elements[index][name] = text.strip()
    return elements[::-1]


def _parse_forwarded_field(headers: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the elements of Forwarded (RFC 7239, 4). Raise BadRequest."""
    if "forwarded" not in headers:
        return []
    elements: list[dict[str, str]] = [{}]
    separator = ";"
    end = 0
    while separator:
        match = _FORWARDED_PAIR.match(headers["forwarded"], end)
        if not match or match[1].lower() in elements[-1]:
            raise BadRequest("malformed Forwarded header: expected for example for=192.0.2.7;proto=https")
        elements[-1][match[1].lower()] = match[2] or match[3]
        separator = match[4]
        end = match.end()
        if separator == ",":
            elements.append({})
    return elements


def _parse_node(node: str) -> str:
    """Return the address of a node (RFC 7239, 6), empty if it hides it. Raise BadRequest."""
    if not node or _HIDDEN_NODE.fullmatch(node):
        return ""
    match = _FORWARDED_NODE.fullmatch(node)
    if match:
        with contextlib.suppress(ValueError):  # refused below
            return str(_parse_ip(match[1] or match[2] or match[3]))
    raise BadRequest("malformed address of a forwarded client: expected for example 192.0.2.7")


def _is_in(address: str, networks: Iterable[Network]) -> bool:
    ip = _parse_ip(address)
    return any(ip in network for network in networks)


def _read_chunks(reader: RequestReader, max_bytes: int) -> bytes:
    """Return a chunked body (RFC 9112, 7.1). Its trailer is read as strictly as the head, and dropped."""
    body = bytearray()
    while size := _read_chunk_size(reader):
        if len(body) + size > max_bytes:
            raise ContentTooLarge(f"request body has more than {max_bytes} bytes, the most allowed (--max_body)")
        reader.extend_deadline(size / _MIN_BODY_BYTES_PER_S)
        body += reader.read_exactly(size)
        _read_chunk_end(reader)
    _read_trailer(reader)
    return bytes(body)


def _read_chunk_end(reader: RequestReader) -> None:
    if reader.read_exactly(2) != b"\r\n":
        raise BadRequest("malformed chunk: expected CRLF after its data")


def _read_trailer(reader: RequestReader) -> None:
    trailer: list[str] = []
    while len(trailer) <= _MAX_FIELDS and (line := reader.read_line()):
        trailer.append(line.decode("latin-1"))
    _parse_fields(trailer)


def _read_chunk_size(reader: RequestReader) -> int:
    match = _CHUNK_SIZE.fullmatch(reader.read_line())
    if not match:
        raise BadRequest("malformed chunk size: expected a hexadecimal number")
    return int(match[1], 16)


class IncomingBody:
    """The body of a request, read block by block as its handler asks for it; for the connection's thread.

    It may take as long as it likes, if at least 64 KB come within each `timeout_s`, those for which the handler does
    not wait left out.
    """

    def __init__(
        self,
        reader: RequestReader,
        request: Request,
        timeout_s: float,
        send_continue: Callable[[], None],
    ) -> None:
        self.is_finished = request.body_bytes == 0
        self._reader = reader
        self._request = request
        self._timeout_s = timeout_s
        self._send_continue = send_continue
        self._block = memoryview(bytearray(_STREAM_BLOCK_BYTES))
        self._earned_bytes = 0  # since the deadline was set

    def __iter__(self) -> Iterator[memoryview]:
        """Yield the blocks, each valid until the next. Raise BadRequest or ConnectionEnded."""
        if self.is_finished:
            return
        size = self._request.body_bytes
        if self._request.expects_continue and not self._reader.has_buffered(size or 1):
            self._send_continue()
        self._reader.set_deadline(self._timeout_s)
        if size is None:
            yield from self._read_chunks()
        else:
            yield from self._read_blocks(size)
        self.is_finished = True

    def _read_chunks(self) -> Iterator[memoryview]:
        while size := _read_chunk_size(self._reader):
            yield from self._read_blocks(size)
            _read_chunk_end(self._reader)
        _read_trailer(self._reader)

    def _read_blocks(self, left_bytes: int) -> Iterator[memoryview]:
        while left_bytes:
            count = self._reader.read_into(self._block[:left_bytes])
            left_bytes -= count
            self._earned_bytes += count
            yield self._block[:count]
            if self._earned_bytes >= _MIN_STREAM_BYTES:
                self._earned_bytes = 0
                self._reader.set_deadline(self._timeout_s)


# ======================================================================================================================
# IV HTTP / routing: which handler answers a method on a path
# ======================================================================================================================


class Route(NamedTuple):
    """The handler of a method on a path; {names} in the template are parameters, a last {path} is all the rest.

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
    streams_body: bool = False  # it is in the request's `stream`, of any size
    names_file: bool = False  # by what need not be UTF-8
    is_page: bool = False  # for people, who may come by a link on another site; public ones are too
    is_held: Callable[[Request], bool] = lambda _: False  # the answer may have to wait, by the request's `hold`


_SEE_DOCUMENT = "/openapi.json lists all routes"
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
            methods = table.setdefault(segments, {})
            methods[route.method] = route
            if route.method == "GET":
                methods.setdefault("HEAD", route)
        self._variable = dict(sorted(self._variable.items(), key=_parameter_places))  # words before parameters

    def match(self, request: Request) -> tuple[Route, dict[str, str]]:
        """Return the route of a request and its parameters, for HEAD where there is none that of GET.

        Raise PathNotFound, MethodNotAllowed or BadRequest.
        """
        methods, params = self._match_path(request.segments)
        route = methods.get(request.method)
        if route is None:
            allowed = ", ".join(methods)
            raise MethodNotAllowed(
                f"method {request.method} not allowed here; allowed: {allowed}; {_SEE_DOCUMENT}", [*methods]
            )
        if not (request.is_utf8 or route.names_file):
            raise BadRequest("malformed request target: it is not UTF-8, as it stands or by its escapes")
        return route, params

    def methods(self, request: Request) -> list[str]:
        """Return the methods of the request's path. Raise PathNotFound."""
        methods, _ = self._match_path(request.segments)
        return [*methods]

    def _match_path(self, segments: _Segments) -> tuple[_Methods, dict[str, str]]:
        """Return the routes of a path by method, and its parameters. Raise PathNotFound.

        A slash at the end of a path that no route has with it means nothing.
        """
        if segments in self._fixed:
            return self._fixed[segments], {}
        if not segments[-1]:
            segments = segments[:-1]
        if segments in self._fixed:
            return self._fixed[segments], {}
        for template, methods in self._variable.items():
            params = _match_template(template, segments)
            if params is not None:
                return methods, params
        path = "/".join(segments)
        raise PathNotFound(f"not found: /{path}; {_SEE_DOCUMENT}")


_REST = "{path}"


def _parameter_places(item: tuple[_Segments, _Methods]) -> list[bool]:
    return [segment.startswith("{") for segment in item[0]]


def _match_template(template: _Segments, segments: _Segments) -> dict[str, str] | None:
    """Return the parameters of a path, None if the template is not its."""
    depth = len(template) - 1
    if template[depth] == _REST and len(segments) > depth:
        segments = (*segments[:depth], "/".join(segments[depth:]))
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
#                                   under --insecure and on public routes too. A link may lead to what is for people:
#                                   the browser shows that in place of the page with the link, which cannot read it.
#     a client that guesses tokens  A token that was sent decides: a wrong one is never anonymous access. Compared in
#                                   constant time; after ten wrong ones a minute from an address, or an IPv6 /64, more
#                                   get 429. A right one always gets in, for others may share the address (a proxy): so
#                                   what protects a token is its length, and the log names short ones.
#     a client on another host      It needs a token, or a certificate of --tls_client_ca.
#     a page by DNS rebinding       Its name has come to mean this host, so for the browser it calls its own origin; but
#                                   Host still has that name. Without a token, Host must be a name of this host, with
#                                   our port or none.
#     a stranger through a proxy    The proxy connects from this host, but adds Forwarded, Via or the like. Trusted or
#                                   not, its clients need a token: what is trusted is only whom it says they are.
#     another user of this host     The kernel knows the user at the other end of a local TCP connection (Linux; other
#                                   systems do not say, there all users of the host are let in).
#
# A client that no check lets in may call public routes alone, and does not learn which others exist: it is refused
# before a 404 or 405 could tell them apart.

_OCTET = "(?:25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])"
# Names, not addresses: ipaddress would take spellings such as [0:0::1], which no browser sends.
_LOCAL_HOST = re.compile(rf"(?:localhost|127(?:\.{_OCTET}){{3}}|\[::1\])(?::([0-9]+))?", re.IGNORECASE)
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}  # which an origin leaves out
_PROXY_FIELDS = ("forwarded", "x-forwarded", "x-real-ip", "via")  # beginnings of the fields that a proxy adds
_WRONG_TOKENS_WINDOW_S = 60.0
_MAX_WRONG_TOKENS = 10  # of a client in that time: a typing error is no attack, 2**256 tokens are out of reach
_MIN_TOKEN_BYTES = 16  # of 64 random bits at least: at 10,000 guesses a second 58 million years
_MAX_REMEMBERED_CLIENTS = 10_000  # that sent wrong tokens: a few megabytes


_EXPOSED_HEADERS = (
    "X-Task-ID",
    "X-Task-STATE",
    "Content-Disposition",
    "Content-Range",
    "ETag",
    "Retry-After",
    "X-Output-Offset",
    "X-Step-Result",
    "X-Step-Attempt",
)


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
        self._check_peers()
        if self._settings.insecure:
            log.warning("--insecure: anyone who reaches the port can run code on this host, as the daemon's user")

    def _check_peers(self) -> None:
        """Warn where the users of this host cannot be told apart: all of them need a token then."""
        try:
            self._peers.check()
        except PeersUnknown as error:
            log.warning("clients on this host need a token too, for it does not show whose they are: %s", error)
        except OSError as error:  # it is tried again for each client
            log.debug("the users of clients cannot be looked up: %s", error)

    def _create_token(self) -> None:
        """Make the root's token file, unless it exists. Raise OSError."""
        if os.path.exists(self._path):
            return
        import secrets  # here, because OpenSSL takes half a megabyte that an idle daemon need not

        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="ascii", newline="\n") as file:  # `$(cat token)` keeps a CR
            file.write(secrets.token_hex(32) + "\n")

    def rule(self) -> str:
        """Return who needs a token, and where one is; empty under --insecure, of which `start` has warned."""
        if self._settings.insecure:
            return ""
        if self._settings.require_token:
            return f"every client needs a token of {self._path}"
        return f"clients need a token of {self._path}, but for this user's on this host"

    def reload(self) -> None:
        """Load the tokens again, whatever the file's time says."""
        with self._lock:
            self._file_version = ()
            self._reload()

    def authorize(self, request: Request, is_public: bool, is_page: bool = False) -> str:
        """Return the client's label for the log, empty for a stranger on a public route.

        Raise Forbidden, Unauthorized, TooManyRequests or Unavailable.
        """
        self._check_browser(request, is_public or is_page)
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
            ("Access-Control-Expose-Headers", ", ".join(_EXPOSED_HEADERS)),
            ("Vary", "Origin"),
        )

    def is_preflight(self, request: Request) -> bool:
        """Return whether a page of an allowed origin asks what it may do; this needs no credentials."""
        origin = request.headers.get("origin", "")
        return request.method == "OPTIONS" and origin in self._settings.cors_origin

    def release(self, endpoints: Endpoints) -> None:
        """Forget a connection that has ended; another may soon have its port."""
        self._trusted.pop(endpoints, None)

    def _check_browser(self, request: Request, is_for_people: bool) -> None:
        """Raise Forbidden if a page sent the request that is neither ours nor of an allowed origin."""
        origin = request.headers.get("origin")
        if origin is not None and origin in self._settings.cors_origin:
            return
        if origin is not None and not _is_own_origin(origin, request.host):
            raise Forbidden(f"pages of the origin {origin!r} may not call this; --cors_origin allows one")
        if request.headers.get("sec-fetch-site", "none") in ("same-origin", "none"):
            return
        if not is_for_people or not _is_followed_link(request):
            raise Forbidden("pages of other sites may not call this; --cors_origin allows one")

    def _identify(self, request: Request) -> str:
        """Return the client's label. Raise Unauthorized, Forbidden, TooManyRequests or Unavailable for a stranger."""
        authorization = request.headers.get("authorization")
        if authorization is not None:
            return self._check_token(request, authorization)
        if request.client.certificate:
            return f"certificate {request.client.certificate}"
        self._check_local(request)
        return "local"

    def _check_token(self, request: Request, authorization: str) -> str:
        """Return the label of the token in an Authorization header. Raise Unauthorized or TooManyRequests."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer":
            token = ""
        client = rate_limit_key(request.peer)
        now_s = time.monotonic()
        with self._lock:
            self._reload()
            label = self._find_label(token.strip(" ").encode("latin-1"))
            if label:
                self._warn_if_plaintext(request)
                return label
            earlier = self._wrong_tokens.get(client, ())
            recent = [at_s for at_s in earlier if now_s - at_s < _WRONG_TOKENS_WINDOW_S]
            if len(recent) >= _MAX_WRONG_TOKENS:
                raise AuthRateLimited("too many wrong tokens from this address; wait a minute")
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
        if self._has_warned or request.scheme != "http" or is_loopback(request.peer):
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
                if 0 < len(token.strip()) < _MIN_TOKEN_BYTES:
                    log.info("--token_file: the token of line %d is short, so it can be guessed", number)
                if token.strip():
                    tokens[token.strip().encode()] = label or f"token of line {number}"
        self._tokens = tokens
        self._file_version = file_version

    def _check_local(self, request: Request) -> None:
        """Raise Unauthorized, Forbidden or Unavailable unless a request without a token is of our own user here."""
        if not is_loopback(request.client.address):
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
        if endpoints in self._trusted:
            return self._trusted[endpoints]
        is_trusted = False
        try:
            is_trusted = is_trusted_uid(self._peers.user(*endpoints))
        except LookupError:  # the client has closed its end already, or a table changed while it was read
            return False
        except PeersUnknown:  # told at the start
            pass
        except OSError as error:
            if error.errno in RESOURCE_ERRNOS:
                raise Unavailable("no file descriptor left to look up the client's user; try again") from None
            log.warning("a client's user cannot be looked up, so it needs a token: %s", error)
        self._trusted[endpoints] = is_trusted
        return is_trusted


def _is_own_origin(origin: str, host: str) -> bool:
    """Return whether a page is of this host and port by whatever scheme: a proxy before us may have ended its TLS."""
    scheme, _, own = origin.partition("://")
    default_port = _DEFAULT_PORTS.get(scheme)
    if default_port is None or not host:
        return False
    return own.lower() in (host.lower(), host.lower().removesuffix(default_port))


def _is_followed_link(request: Request) -> bool:
    """Return whether a person followed a link, so that this becomes a page of its own (Fetch Metadata, W3C)."""
    mode = request.headers.get("sec-fetch-mode")
    place = request.headers.get("sec-fetch-dest", "document")  # not within another page
    return request.method == "GET" and mode == "navigate" and place == "document"


def _is_local_host(request: Request) -> bool:
    """Return whether the client calls us by a name of this host, and by the port that it has reached."""
    match = _LOCAL_HOST.fullmatch(request.host)
    if not match:
        return False
    own_port = request.client.endpoints[1][1]
    return not match[1] or int(match[1]) == own_port


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
#     upload                              --timeout for each 64 KB, whatever its size
#     handler                             as long as it takes: only profiles and `wait` take long
#     response                            --timeout, and a second for each 64 KB; a streamed one earns it as it goes
#     answer that waits for something     hours, by a Hold: --timeout for each block, and a second for each 64 KB; each
#                                         5 s it is looked whether its client is still there
#     idle between requests               --idle_timeout, 60 s: nginx 75 s, Apache and node.js 5 s; an idle thread costs
#                                         little, and a poll each minute should find its connection again
#     lingering close                     5 s, as nginx: a close with unread input is a reset, which may destroy a
#                                         response on its way (RFC 9112, 9.6)
#
# An attacker wants all connections, threads or descriptors, so that nobody can stop what runs:
#
#     many from one address    at most 64 each, an IPv6 /64 counting as one; but those of this host share one, and those
#                              behind a trusted proxy
#     many from many           the last 8 of --max_connections serve stops (PUT) alone, with 3 s and one response each
#     answers that wait        at most half of --max_connections
#     no thread can start      two threads stand ready; up to 8 connections wait for them, silent ones give way
#     no descriptor is left    a reserve is lent to `accept`, 4 of it, and to responses
#     memory fails anywhere    the listener starts again; nothing that it calls may end it

_BACKLOG = 1024  # gunicorn 2048, nginx 511; the kernel may hold it lower (somaxconn)
_LINGER_S = 5.0
_MAX_PER_ADDRESS = 64
_RESERVED_CONNECTIONS = 8
_RESERVED_TIMEOUT_S = 3.0
_CLIENT_CHECK_S = 5.0
_LAST_ANSWERS_S = 1.0  # that an exit waits for those who waited
_KEEP_ALIVE_OPTIONS = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 20, "TCP_KEEPCNT": 3}  # tcp(7): a client that vanishes
_RESERVE_THREADS = 2
_MAX_PENDING_CONNECTIONS = 8
_RESERVE_DESCRIPTORS = 4  # of 8, for connections: the others are for what their responses open
_ACCEPT_RETRY_S = 0.05
_MAX_RESTART_PAUSE_S = 5.0
_REFILL_INTERVAL_S = 10.0
_WARNING_INTERVAL_S = 60.0
_REFUSED_BODY_BYTES = 64 * 1024  # read of a refused request, to keep its connection
_FILE_BLOCK_BYTES = 1 << 19
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


class HeldConnection:
    """A connection whose answer waits for something; see Hold. `end` is for any thread too."""

    def __init__(self, reader: RequestReader) -> None:
        self.is_ending = False
        self._reader = reader
        self._news = threading.Event()

    def wake(self) -> None:
        self._news.set()

    def end(self) -> None:
        """End this wait and all later ones."""
        self.is_ending = True
        self._news.set()

    def wait(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not self.is_ending:
            left_s = max(0.0, deadline_s - time.monotonic())
            if self._news.wait(min(left_s, _CLIENT_CHECK_S)) or left_s <= _CLIENT_CHECK_S:
                break
            if self._reader.has_ended():
                raise ConnectionEnded("the client has gone")
        self._news.clear()


def _probe_client(sock: socket.socket) -> None:
    """Have the kernel find out that a client has vanished, which has not said so."""
    with contextlib.suppress(OSError):  # it has reset the connection
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE_OPTIONS.items():
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _last_response(error: ApiError) -> bytes:
    """Return the whole response to a connection of which no request is read."""
    response = error_response(error)
    body = response.body if isinstance(response.body, bytes) else b""
    head = (
        f"HTTP/1.1 {response.status} {_REASONS[response.status]}\r\n"
        f"Content-Type: {JSON_TYPE[1]}\r\n"
        "Connection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Server(http.server.ThreadingHTTPServer):
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
        metrics: Metrics,
        tls: Tls | None,
        descriptors: DescriptorReserve,
    ) -> None:
        self.authenticator = authenticator
        self.descriptors = descriptors
        self.scheme = "https" if tls else "http"
        self.timeout_s = settings.timeout / _SECOND_NS
        self.idle_timeout_s = settings.idle_timeout / _SECOND_NS
        self.max_body_bytes = settings.max_body
        self.authority = ""
        self.is_stopping = False
        self._settings = settings
        self._router = router
        self._metrics = metrics
        self._tls = tls
        self._lock = threading.Lock()  # guards the five below
        self._connections: dict[socket.socket, str] = {}  # the client of each, as rate_limit_key has it
        self._reserved: set[socket.socket] = set()  # those of them that are among the last, which are for stops
        self._on_reserve: set[socket.socket] = set()  # those of them that hold a thread or descriptor of the reserve
        self._in_flight: set[socket.socket] = set()  # those of them with a request that --max-requests counts
        self._held: dict[socket.socket, HeldConnection] = {}  # those of them whose answers wait
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
        """Bind the socket, alone on Windows too; of every address, to IPv4 and IPv6. Raise OSError.

        Without asking the name service for our name, as HTTPServer does.
        """
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        if self.address_family == socket.AF_INET6 and not self.server_address[0]:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)

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
            held = [*self._held.values()]
        for connection in held:
            connection.end()
        for sock in connections:
            with contextlib.suppress(OSError):  # the client has closed it
                socket.socket.shutdown(sock, socket.SHUT_RD)  # SSLSocket.shutdown would go on in clear text
        self._pending.close()
        deadline_s = time.monotonic() + _LAST_ANSWERS_S
        while self._held and time.monotonic() < deadline_s:
            time.sleep(_ACCEPT_RETRY_S / 10)

    def get_request(self) -> tuple[Any, Any]:
        """Return the next connection and its address. Raise OSError if there is none, after a pause for resources."""
        try:
            sock, address, uses_reserve = self._accept()
        except OSError as error:
            if error.errno in RESOURCE_ERRNOS:
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
                if error.errno not in DESCRIPTOR_ERRNOS:
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
        is_bounded = not is_loopback(client) and not _is_in(client_address[0], self._settings.trusted_proxy)
        if not self._add_connection(request, client, is_bounded):
            self._reject_connection(request)
            return
        try:
            DaemonThread(self.process_request_thread, "connection", (request, client_address)).start()
        except (RuntimeError, MemoryError) as error:
            self._queue_for_reserve(request, client_address, error)

    def _add_connection(self, sock: socket.socket, client: str, is_bounded: bool) -> bool:
        """Add a connection. Return False if there are too many, or too many of a client that is bounded."""
        max_connections = self._settings.max_connections
        with self._lock:
            others = [*self._connections.values()]
            if len(others) >= max_connections:
                return False
            if is_bounded and others.count(client) >= _MAX_PER_ADDRESS:
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
        response = _last_response(Unavailable("too many connections; try again"))
        with contextlib.suppress(OSError):  # the client has gone, or would have to be waited for
            sock.setblocking(False)
            if not self._tls:
                sock.send(response)
                sock.shutdown(socket.SHUT_WR)
                sock.recv(_REFUSED_BODY_BYTES)  # a close with unread bytes would reset the connection
        super().shutdown_request(sock)

    def client(self, endpoints: Endpoints) -> Client:
        """Return the client at the other end of a connection; of its certificate nothing is known yet."""
        proxies = self._settings.trusted_proxy
        if not _is_in(endpoints[0][0], proxies):
            proxies = ()
        return Client(endpoints, self.scheme, trusted_proxies=proxies)

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
        self.release(sock)

    def authorize(self, request: Request, is_reserved: bool) -> tuple[Route | None, Request]:
        """Return the route, None for a CORS preflight, and the request with its parameters and the client's label.

        Raise ApiError. A stranger gets the same for every path, so as not to learn which there are.
        """
        route: Route | None = None
        try:
            route, params = self._router.match(request)
        except (PathNotFound, MethodNotAllowed) as error:
            path_exists = isinstance(error, MethodNotAllowed)
            if not path_exists or not self.authenticator.is_preflight(request):
                self.authenticator.authorize(request, is_public=False)
                raise
        else:
            label = self.authenticator.authorize(request, route.is_public, route.is_page)
            request = request._replace(params=params, label=label)
        if is_reserved and request.method != "PUT":
            raise Unavailable("too many connections; the last ones are reserved for stops (PUT)")
        return route, request

    def dispatch(self, sock: socket.socket, route: Route | None, request: Request) -> Response:
        """Return the response to an authorized request, whatever fails. It is in flight until `release`."""
        try:
            if route is None:
                return self._preflight_response(request)
            if route.is_limited and not request.hold:
                self._add_in_flight(sock)
            response = route.handle(request)
            if request.method not in ("GET", "HEAD"):
                self._log_change(request, response)
            return response
        except ApiError as error:
            return error_response(error)
        except ConnectionEnded:  # in the middle of an upload, or while it was waited for something
            raise
        except Exception:
            log.exception("%s %s failed", request.method, _path(request))
            return error_response(ApiError("internal error; see the daemon's log"))

    def _preflight_response(self, request: Request) -> Response:
        methods = ", ".join(self._router.methods(request))
        return Response(
            204,
            (
                ("Access-Control-Allow-Methods", methods),
                ("Access-Control-Allow-Headers", "Authorization, Content-Type, Last-Event-ID, Range"),
            ),
        )

    def _add_in_flight(self, sock: socket.socket) -> None:
        """Count a request in. Raise TooManyRequests."""
        limit = self._settings.max_requests
        with self._lock:
            if limit and len(self._in_flight) >= limit:
                raise TooManyRequests(f"{limit} requests are in flight, the most that --max-requests allows; try again")
            self._in_flight.add(sock)

    def hold(self, sock: socket.socket, reader: RequestReader) -> Hold:
        """Let the answer on a connection wait, until `release`. Raise Unavailable."""
        limit = self._settings.max_connections // 2
        held = HeldConnection(reader)
        _probe_client(sock)
        with self._lock:
            if self.is_stopping:
                raise Unavailable("the daemon is shutting down; send the request again to the next one")
            if sock in self._reserved or sock in self._on_reserve or len(self._held) >= limit:
                raise TooManyHeld(f"{limit} connections may wait at once, half of --max_connections; try again")
            self._held[sock] = held
        return held

    def release(self, sock: socket.socket) -> None:
        """Count the request of a connection out, if it was counted in."""
        with self._lock:
            self._in_flight.discard(sock)
            self._held.pop(sock, None)

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
        self._metrics.request(request.method, template, response.status, seconds)
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

    def log_cut(self, request: Request, sent: int, error: Exception) -> None:
        """Log a response that broke off after so many bytes; a client that has gone is no matter for a warning."""
        level = logging.WARNING if isinstance(error, ReaderTooSlow) else logging.DEBUG
        fields = {**_log_fields(request), "bytes": sent}
        message = '%s: the response to "%s %s" was cut off after %d B: %s'
        log.log(level, message, request.peer, request.method, _path(request), sent, error, extra={"log_fields": fields})

    def log_bad_request(self, error: ApiError, seconds: float) -> None:
        """Count a request whose head was malformed."""
        self._metrics.request("", "", error.status, seconds)

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
    for name in ("task", "step"):
        if name in request.params:
            fields[name] = request.params[name]
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
    _sent_bytes = 0  # of the response, with its head

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
            self._handle_requests(self.server.client((client_end, own_end)))
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
            reader.set_deadline(self.server.idle_timeout_s)
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
        first_byte = socket.socket.recv(self.request, 1, socket.MSG_PEEK)
        if first_byte.isalpha():  # of a method; TLS begins with 22 (RFC 8446, 5.1)
            self._refuse_plaintext()
        self.request.do_handshake()
        return client._replace(certificate=certificate_name(self.request.getpeercert()))

    def _refuse_plaintext(self) -> None:
        """Answer in clear text that this port speaks TLS. Raise ConnectionEnded or OSError."""
        error = BadRequest("plain HTTP was sent to the port of HTTPS: use https:// in the URL")
        self.server.log_bad_request(error, 0.0)
        socket.socket.sendall(self.request, _last_response(error))
        socket.socket.shutdown(self.request, socket.SHUT_WR)
        linger_s = min(_LINGER_S, self._timeout_s)
        self.request.settimeout(linger_s)
        end_s = time.monotonic() + linger_s
        while time.monotonic() < end_s and socket.socket.recv(self.request, 1 << 16):
            pass
        raise ConnectionEnded(error.message)

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
            request = self._read_body(reader, request, route, refusal)
            is_body_read = True
            if route and route.is_held(request):
                request = request._replace(hold=server.hold(self.request, reader))
        except ApiError as error:
            refusal = error

        with self._lend_descriptors(request):
            response = error_response(refusal) if refusal else server.dispatch(self.request, route, request)
            cors_headers = server.authenticator.cors_headers(request)
            response = response._replace(headers=response.headers + cors_headers)
            if request.stream:
                is_body_read = request.stream.is_finished
            is_kept = self._keeps_alive(request, response, is_body_read)
            self._sent_bytes = sent = 0
            try:
                sent = self._send_response(request, response, is_kept)
            except (OSError, ConnectionEnded) as error:
                sent = self._sent_bytes
                server.log_cut(request, sent, error)
                raise
            finally:
                server.release(self.request)
                server.log_request(request, route, response, time.perf_counter() - begin_s, sent)
        if not is_body_read:
            self._linger_and_close(reader)
        return is_kept

    def _lend_descriptors(self, request: Request) -> contextlib.AbstractContextManager[None]:
        """Return what lends a response the reserve's descriptors if there are no others, unless it takes too long."""
        if request.stream or request.hold:
            return contextlib.nullcontext()
        return self.server.descriptors.lend_if_scarce(look_now=self._is_scarce)

    def _read_body(
        self,
        reader: RequestReader,
        request: Request,
        route: Route | None,
        refusal: ApiError | None,
    ) -> Request:
        """Return the request with its body; a refused one keeps its connection if it is short and on its way.

        Raise the refusal, or another ApiError, if the body was not read to its end; ConnectionEnded; OSError.
        """
        if route and route.streams_body and not refusal:
            if self._is_scarce:
                raise Unavailable("too many connections for an upload; try again")
            stream = IncomingBody(reader, request, self._timeout_s, self._send_continue)
            return request._replace(stream=stream)
        max_bytes = self.server.max_body_bytes
        if refusal:
            max_bytes = min(max_bytes, _REFUSED_BODY_BYTES)
            if request.expects_continue or (request.body_bytes or 0) > max_bytes:
                raise refusal
        try:
            body = read_body(reader, request, self._timeout_s, max_bytes, self._send_continue)
        except ContentTooLarge as error:
            raise refusal or error from None
        return request._replace(body=body)

    def _keeps_alive(self, request: Request, response: Response, is_body_read: bool) -> bool:
        """Return whether another request may follow this response (RFC 9112, 9.3)."""
        if not is_body_read:  # so it is unknown where the next one begins
            return False
        if self._is_scarce or self.server.is_stopping:
            return False
        has_length = isinstance(response.body, (bytes, FileSlice))
        if request.is_http_10 and not has_length:  # only its end shows the end of the body
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
        is_chunked = not is_http_10 and not isinstance(response.body, (bytes, FileSlice))
        lines = [
            f"HTTP/1.1 {response.status} {_REASONS[response.status]}",
            f"Date: {_http_date(int(time.time()))}",
        ]
        lines += [f"{name}: {value}" for name, value in response.headers]
        if is_chunked:
            lines.append("Transfer-Encoding: chunked")
        elif isinstance(response.body, FileSlice):
            lines.append(f"Content-Length: {response.body.byte_count}")
        elif isinstance(response.body, bytes) and response.status not in (204, 304):
            lines.append(f"Content-Length: {len(response.body)}")
        if not is_kept:
            lines.append("Connection: close")
        elif is_http_10:
            lines.append("Connection: keep-alive")
        head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
        is_head = request is not None and request.method == "HEAD"
        is_held = request is not None and request.hold is not None
        if isinstance(response.body, bytes):
            body = b"" if is_head else response.body
            self._send_bytes(head + body)
            return len(body)
        with contextlib.ExitStack() as closing:
            if isinstance(response.body, FileSlice):
                closing.callback(response.body.file.close)
            elif hasattr(response.body, "close"):
                closing.callback(response.body.close)
            if is_head:
                self._send_bytes(head)
                return 0
            if isinstance(response.body, FileSlice):
                self._send_bytes(head)
                self._send_file(response.body)
                return response.body.byte_count
            return self._send_blocks(head, response.body, is_chunked, is_held)

    def _send_blocks(
        self,
        head: bytes,
        blocks: Iterable[bytes | FileSlice],
        is_chunked: bool,
        is_held: bool,
    ) -> int:
        """Send the head with the first block, then the others as they come. Return the bytes of the body.

        Where the answer waits for something the head goes at once, and the time for each block begins with it.
        """
        sent = 0
        if is_held:
            self._send_bytes(head)
            head = b""
        for block in blocks:
            if is_held:
                self._send_deadline_s = time.monotonic() + self._timeout_s
            count = block.byte_count if isinstance(block, FileSlice) else len(block)
            if not count:  # as a chunk it would be the last
                continue
            before = b"%b%x\r\n" % (head, count) if is_chunked else head
            after = b"\r\n" if is_chunked else b""
            if isinstance(block, FileSlice):
                self._send_bytes(before)
                self._send_file(block)
                self._send_bytes(after)
            else:
                self._send_bytes(before + block + after)
            head = b""
            sent += count
        if is_held:
            self._send_deadline_s = time.monotonic() + self._timeout_s
        end = b"0\r\n\r\n" if is_chunked else b""
        self._send_bytes(head + end)
        return sent

    def _send_file(self, part: FileSlice) -> None:
        """Send bytes of a file. Raise ConnectionEnded or OSError."""
        file, offset, left_bytes = part
        file.seek(offset)
        while left_bytes:
            count = self._send_file_block(file, offset, min(left_bytes, _FILE_BLOCK_BYTES))
            if not count:
                raise ConnectionEnded("the file was shortened while it was sent")
            offset += count
            left_bytes -= count

    def _send_file_block(self, file: io.FileIO, offset: int, max_bytes: int) -> int:
        """Send what comes next in a file, at `offset`; return how many bytes. Raise ConnectionEnded or OSError."""
        if self.server.scheme == "https" or not hasattr(os, "sendfile"):
            block = file.read(max_bytes)
            self._send_bytes(block)
            return len(block)
        count = os.sendfile(self.request.fileno(), file.fileno(), offset, max_bytes)
        self._send_deadline_s += count / _MIN_BODY_BYTES_PER_S
        if time.monotonic() > self._send_deadline_s:
            raise ConnectionEnded("the client reads too slowly")
        return count

    def _send_bytes(self, data: bytes) -> None:
        """Send all of `data`, within the time for the response up to here. Raise ConnectionEnded or OSError."""
        self._send_deadline_s += len(data) / _MIN_BODY_BYTES_PER_S
        rest = memoryview(data)
        while rest:
            left_s = self._send_deadline_s - time.monotonic()
            if left_s <= 0:
                raise ReaderTooSlow("the client reads too slowly")
            if self.server.scheme == "https":
                self.request.settimeout(left_s)
            try:
                count = self.request.send(rest)
            except (BlockingIOError, TimeoutError, socket.timeout):  # SO_SNDTIMEO; on Windows; TLS
                raise ReaderTooSlow(f"the client has read nothing for {self._timeout_s:g} s (--timeout)") from None
            self._sent_bytes += count
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
.delete { color: var(--bad); }
.bad { color: var(--bad); }
@media (max-width: 40rem) { label { grid-template-columns: 1fr; } label small { grid-column: 1; } }
"""
API_SCRIPT = r"""
"use strict";
const MAX_SHOWN_CHARACTERS = 100000;
const TOKEN_KEY = "remote_executor token";
const content = document.getElementById("content");
const note = document.getElementById("note");
const tokenInput = document.getElementById("token");
let openapi = null;

function createElement(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function createPre(text, label) {
  return createElement("pre", label ? { tabindex: "0", "aria-label": label } : { tabindex: "0" }, text);
}

function resolve(object) {
  if (!object || !object.$ref) return object;
  return object.$ref.split("/").slice(1).reduce((parent, name) => parent[name], openapi);
}

// A schema as a type of TypeScript, its descriptions as comments.
function typeText(reference, indent = "") {
  const schema = resolve(reference) || {};
  const deeper = indent + "  ";
  if (schema.oneOf) return schema.oneOf.map((choice) => typeText(choice, indent)).join("\n" + indent + "or ");
  if (schema.anyOf) return schema.anyOf.map((choice) => typeText(choice, indent)).join(" | ");
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.items) return "[" + typeText(schema.items, indent) + ", ...]";
  if (!schema.properties) return [].concat(schema.type || "any").join(" | ");
  const required = schema.required || [];
  const lines = Object.entries(schema.properties).map(([name, property]) => {
    const mark = required.includes(name) ? "" : "?";
    const description = (resolve(property) || {}).description;
    const comment = description ? "  // " + description : "";
    return deeper + name + mark + ": " + typeText(property, deeper) + comment;
  });
  return ["{", ...lines, indent + "}"].join("\n");
}

// Where the daemon's paths begin: behind a proxy perhaps below the root.
const base = location.pathname.replace(/\/swagger(\/.*)?$/, "");

function authorization() {
  return tokenInput.value ? { Authorization: "Bearer " + tokenInput.value } : {};
}

// Not by JSON.parse, which rounds the nanoseconds.
function indentJson(text) {
  let indent = "\n";
  return text.replace(/"(?:[^"\\]|\\.)*"|\[\]|{}|[{}[\],:]/g, (token) => {
    if (token === "{" || token === "[") return token + (indent += "  ");
    if (token === "}" || token === "]") return (indent = indent.slice(0, -2)) + token;
    if (token === ",") return token + indent;
    return token === ":" ? ": " : token;
  });
}

// The parameters of an operation, each with its input.
function createInputs(operation) {
  return (operation.parameters || []).map(resolve).map((parameter) => {
    const isArray = resolve(parameter.schema).type === "array";
    const input = createElement(isArray ? "textarea" : "input", { name: parameter.name });
    if (parameter.required) { input.required = true; input.value = parameter.example; }
    else input.placeholder = [].concat(parameter.example).join("\n");
    return { parameter, input, isArray };
  });
}

function createLabel({ parameter, input, isArray }) {
  let hint = parameter.required ? "" : "; optional";
  if (isArray) hint = "; one a line";
  return createElement("label", {}, createElement("code", {}, parameter.name), input,
    createElement("small", {}, parameter.description + hint));
}

function createBody(operation) {
  const body = resolve(operation.requestBody);
  if (!body) return [null, []];
  const media = Object.values(body.content)[0];
  const examples = Object.entries(media.examples || { "": { value: media.example } });
  const titles = examples.map(([title]) => createElement("option", {}, title));
  const area = createElement("textarea", { "aria-label": "Body", spellcheck: "false" });
  const choice = createElement("select", { "aria-label": "Example" }, ...titles);
  const fill = () => {
    const value = examples[choice.selectedIndex][1].value;
    area.value = typeof value === "string" ? value : JSON.stringify(value, null, 2);
  };
  choice.addEventListener("change", fill);
  fill();
  return [area, [createElement("h3", {}, "Body"), createPre(typeText(media.schema)), choice, area]];
}

function createResponses(operation) {
  return Object.entries(operation.responses).map(([status, reference]) => {
    const response = resolve(reference);
    const parts = [];
    for (const [type, media] of Object.entries(response.content || {})) {
      parts.push(createElement("p", { class: "soft" }, type), createPre(typeText(media.schema)));
      for (const [title, example] of Object.entries(media.examples || {}))
        parts.push(createElement("p", { class: "soft" }, "Example: " + title),
          createPre(JSON.stringify(example.value, null, 2)));
    }
    const summary = createElement("summary", {}, createElement("code", {}, status), " ", response.description);
    return createElement("details", {}, summary, createElement("div", { class: "body" }, ...parts));
  });
}

function targetUrl(template, inputs) {
  let path = template;
  const query = new URLSearchParams();
  for (const { parameter, input, isArray } of inputs) {
    const values = isArray ? input.value.split("\n") : [input.value];
    if (parameter.in === "path") path = path.replace("{" + parameter.name + "}", encodeURIComponent(input.value));
    else for (const value of values) if (value) query.append(parameter.name, value);
  }
  return String(query) ? path + "?" + query : path;
}

async function send(url, request, result) {
  const begin = performance.now();
  const response = await fetch(url, request);
  const data = new Uint8Array(await response.arrayBuffer());
  const milliseconds = Math.round(performance.now() - begin);
  const type = response.headers.get("Content-Type") || "";
  const status = `${response.status} ${response.statusText}, ${data.length} bytes, ${milliseconds} ms`;
  const headers = [...response.headers].map(([name, value]) => `${name}: ${value}`).join("\n");
  const blob = URL.createObjectURL(new Blob([data], { type }));
  const save = createElement("a", { href: blob, download: "response" }, "Save");
  result.replaceChildren(createElement("p", response.ok ? {} : { class: "bad" }, status, " ", save),
    createPre(headers, "Headers"));
  if (!data.length || !/json|text/.test(type)) return;
  let text = new TextDecoder().decode(data);
  if (type.includes("json")) text = indentJson(text);
  const ending = text.length > MAX_SHOWN_CHARACTERS ? "\n(truncated)" : "";
  result.append(createPre(text.slice(0, MAX_SHOWN_CHARACTERS) + ending, "Response body"));
}

function showOperation(path, method, operation, parent) {
  const inputs = createInputs(operation);
  const [area, body] = createBody(operation);
  const button = createElement("button", {}, "Send");
  const result = createElement("div", { "aria-live": "polite" });
  const form = createElement("form", {},
    ...inputs.map(createLabel), ...body, createElement("p", {}, button), result);
  let controller = null;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (controller) return controller.abort();
    controller = new AbortController();
    button.textContent = "Cancel";
    result.replaceChildren("waiting for the response");
    const request = { method: method.toUpperCase(), headers: authorization(), signal: controller.signal };
    if (area) request.body = area.value;
    try { await send(base + targetUrl(path, inputs), request, result); }
    catch (error) { result.replaceChildren(createElement("p", { class: "bad" }, "no response: " + error.message)); }
    controller = null;
    button.textContent = "Send";
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  parent.append(form, createElement("h3", {}, "Responses"), ...createResponses(operation));
}

function createOperation(path, method, operation) {
  const body = createElement("div", { class: "body" });
  const summary = createElement("summary", {},
    createElement("span", { class: "method " + method }, method.toUpperCase()),
    createElement("span", { class: "path" }, path), " ", createElement("small", {}, operation.summary));
  const details = createElement("details", { id: operation.operationId }, summary, body);
  details.addEventListener("toggle", () => showOperation(path, method, operation, body), { once: true });
  return details;
}

function showDocument() {
  const sections = new Map();
  for (const [path, operations] of Object.entries(openapi.paths))
    for (const [method, operation] of Object.entries(operations)) {
      const tag = operation.tags[0];
      if (!sections.has(tag)) sections.set(tag, createElement("section", {}, createElement("h2", {}, tag)));
      sections.get(tag).append(createOperation(path, method, operation));
    }
  content.replaceChildren(...sections.values());
  document.getElementById("version").textContent = openapi.info.version;
  document.getElementById("description").textContent = openapi.info.description;
  const target = document.getElementById(location.hash.slice(1));
  if (target) { target.open = true; target.scrollIntoView(); }
}

async function load() {
  note.textContent = "";
  try {
    const response = await fetch(base + "/swagger/doc.json", { headers: authorization() });
    const body = await response.json();
    if (response.ok) { openapi = body; showDocument(); return; }
    note.textContent = response.status + ": " + body.message;
  } catch (error) { note.textContent = "cannot load the API document: " + error.message; }
  tokenInput.focus();
}

tokenInput.value = sessionStorage.getItem(TOKEN_KEY) || "";
document.getElementById("use").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN_KEY, tokenInput.value);
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
<p id="description" class="soft"></p>
<form id="use" class="token">
<label for="token">Token</label>
<input id="token" type="password" autocomplete="off" spellcheck="false" aria-describedby="token-hint">
<button>Use</button>
<small id="token-hint">kept in this tab only; none is needed on the host itself</small>
</form>
<p id="note" class="bad" role="alert"></p>
</header>
<main id="content"></main>
<noscript><p>This page needs JavaScript; the API document is <a href="doc.json">doc.json</a>.</p></noscript>
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
<p class="soft">Profiles that take time run one at a time. <code>?seconds=5</code> sets how long,
<code>?debug=1</code> asks for text; without it they are for <code>go tool pprof</code> and speedscope, the trace is for
Perfetto.</p>
<dl>
{rows}
</dl>
</body>
</html>
"""


def profiles_page(rows: Iterable[tuple[str, str]]) -> str:
    """Return the index of profiles, from a link and a description of each."""
    items = []
    for link, description in rows:
        name = link.partition("?")[0]
        items.append(f'<dt><a href="{link}">{name}</a></dt><dd>{description}</dd>')
    return PROFILES_PAGE.replace("{rows}", "\n".join(items))


def _csp_hash(text: str) -> str:
    """Return the source expression that allows an inline style or script with this text."""
    import base64
    import hashlib  # here, because OpenSSL takes half a megabyte that an idle daemon need not

    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def page_response(page: str, style: str, script: str) -> Response:
    """Return a page with this style and script, which loads nothing and calls this daemon only (CSP Level 3)."""
    directives = (
        "default-src 'none'",
        f"style-src {_csp_hash(style)}",
        f"script-src {_csp_hash(script)}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    headers = (
        ("Content-Type", "text/html; charset=utf-8"),
        ("Content-Security-Policy", "; ".join(directives)),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
    )
    html = page.replace("{style}", style).replace("{script}", script)
    return Response(200, headers, html.encode())


# ======================================================================================================================
# V API / schemas: the terms of OpenAPI and JSON Schema, in which each section describes its own JSON
# ======================================================================================================================

# A section below keeps three things side by side: the function that makes a JSON value, its schema and its example. It
# offers them to the API document as Components. They are functions, since an idle daemon need not hold the document.

Json = dict[str, Any]
ParameterSpec = tuple[str, Json, Any]  # description, schema and example


class Components(NamedTuple):
    """What one section adds to the components of the API document, by name (OpenAPI 3.1, Components Object)."""

    parameters: Json
    request_bodies: Json
    responses: Json
    schemas: Json


def reference(kind: str, name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}


def schema_reference(name: str) -> Json:
    return reference("schemas", name)


def object_schema(properties: Json, optional: Sequence[str] = ()) -> Json:
    """Return the schema of an object with these properties and no others, all but the optional ones required."""
    return {
        "type": "object",
        "required": [name for name in properties if name not in optional],
        "properties": properties,
        "additionalProperties": False,
    }


def array_schema(items: Json, **keywords: Any) -> Json:
    return {"type": "array", "items": items, **keywords}


def string_schema(description: str, **keywords: Any) -> Json:
    return {"type": "string", "description": description, **keywords}


def time_schema(description: str) -> Json:
    return string_schema(description, format="date-time")


def integer_schema(description: str, minimum: int = 0, **keywords: Any) -> Json:
    return {"type": "integer", "description": description, "minimum": minimum, **keywords}


def nullable(schema: Json) -> Json:
    """Return the schema of the same values and null."""
    return {**schema, "type": [schema["type"], "null"]}


def envelope_schema(codes: Sequence[int], data: Json | None = None) -> Json:
    """Return the schema of an envelope with one of these codes, and with `data` where it has a schema."""
    code: Json = {"type": "integer", "enum": [*codes]}
    if len(codes) == 1:
        code = {"type": "integer", "const": codes[0]}
    properties: Json = {"code": code, "message": {"type": "string"}}
    if data:
        properties["data"] = data
    return object_schema(properties)


def success_example(data: Any) -> Json:
    return {"code": 0, "message": "success", "data": data}


def parameter_objects(location: str, parameters: Mapping[str, ParameterSpec]) -> Json:
    """Return the parameters in "path" or "query", by name."""
    objects: Json = {}
    for name, (description, schema, example) in parameters.items():
        objects[name] = {
            "name": name,
            "in": location,
            "description": description,
            "schema": schema,
            "example": example,
        }
        if location == "path":
            objects[name]["required"] = True
    return objects


def json_content(schema: Json, examples: Mapping[str, Any]) -> Json:
    """Return the content of a JSON body, with its examples by title."""
    media_type: Json = {"schema": schema}
    if examples:
        media_type["examples"] = {title: {"value": value} for title, value in examples.items()}
    return {"application/json": media_type}


def response_object(
    description: str,
    schema: Json,
    examples: Mapping[str, Any] = types.MappingProxyType({}),
    header: str = "",
) -> Json:
    """Return a response of JSON, with the one header that is its own."""
    response: Json = {"description": description, "content": json_content(schema, examples)}
    if header:
        response["headers"] = {header: {"schema": {"type": "string"}}}
    return response


def text_response_object(description: str, *media_types: str) -> Json:
    """Return a response of another media type than JSON."""
    content = {media_type: {"schema": {"type": "string"}} for media_type in media_types}
    return {"description": description, "content": content}


# ======================================================================================================================
# V API / task API: tasks, steps, consoles and the pool
# ======================================================================================================================

# What this program can beyond the original, in words for clients that ask /version.
FEATURES = (
    "result",
    "submission",
    "step",
    "reason",
    "pause",
    "delay",
    "at",
    "pool_paused",
    "delete",
    "paging",
    "wait",
    "output",
    "follow",
    "events",
    "head",
    "stdin",
    "stderr",
    "retry",
    "when",
    "rerun",
    "workspace",
)
_TASKS_PATH = "/api/v1/task"
_TASK_PATH = _TASKS_PATH + "/{task}"
_STEP_PATH = _TASK_PATH + "/{step}"
_POOL_PATH = "/api/v1/pool"
_NOT_FOUND_EXAMPLE = {"code": 1003, "message": NO_TASK}
_EXAMPLE_BASE_URL = "http://localhost:2376"
POOL_FIELDS = {  # of PoolStats, as the API document and the metrics describe them
    "size": "Maximum number of steps that run at once",
    "running": "Steps that run",
    "waiting": "Steps that are ready and wait",
}
_SORT_KEYS = ("st", "et", "rt")
_OFFSET_AT = len("2022-11-17T17:17:58")  # where the offset of a time begins
_MAX_LINE_BYTES = 1 << 20  # a longer line of a console is sent piece by piece


# The shapes: how each JSON value is made, its schema, its example.


class TimeFormat(NamedTuple):
    """How one response shows moments of the Clock, all in nanoseconds; `key_expire_ns` is how long records are kept."""

    now_ns: int
    wall_times: WallTimes
    key_expire_ns: int

    def task_times(self, task: TaskRow) -> Json:
        return self._times_json(task.accepted_ns, task.ended_ns, task.ended_ns)

    def step_times(self, step: StepRow, task: TaskRow) -> Json:
        return self._times_json(step.started_ns, step.ended_ns, step.ended_ns or task.ended_ns)

    def _times_json(
        self,
        begin_ns: int | None,
        end_ns: int | None,
        kept_since_ns: int | None,
    ) -> Json:
        """Return begin and end where there are, and the time left until the record expires."""
        times = {}
        if begin_ns is not None:
            times["st"] = format_time(self.wall_times.at(begin_ns) // _SECOND_NS)
        if end_ns is not None:
            times["et"] = format_time(self.wall_times.at(end_ns) // _SECOND_NS)
        left_ns = self.key_expire_ns
        if kept_since_ns is not None:
            left_ns -= self.now_ns - kept_since_ns
        times["rt"] = format_duration(max(0, left_ns))
        return times

    def seconds(self, row: TaskRow | StepRow) -> float:
        """Return how long a task or a step has run, to the millisecond."""
        if row.started_ns is None:
            return 0.0
        end_ns = row.ended_ns or self.now_ns
        return (end_ns - row.started_ns) // 10**6 / 1000

    def moment(self, moment_ns: int) -> str:
        """Return a moment as RFC 3339 with milliseconds; its whole seconds are those that `times` shows."""
        seconds, rest_ns = divmod(self.wall_times.at(moment_ns), _SECOND_NS)
        text = format_time(seconds)
        return f"{text[:_OFFSET_AT]}.{rest_ns // 10**6:03d}{text[_OFFSET_AT:]}"


def _times_schema() -> Json:
    properties = {
        "st": time_schema("Begin"),
        "et": time_schema("End"),
        "rt": string_schema("Time left before the record expires, as Go prints a duration"),
    }
    return object_schema(properties, optional=("st", "et"))


def result_words(task: TaskRow, row: TaskRow | StepRow, time_format: TimeFormat) -> Json:
    """Return what the list shows of a task for programs, and the detail of a step too; moments as far as known."""
    words = {
        "result": row.result or _unfinished_result(task, row),
        "seconds": time_format.seconds(row),
        "accepted_at": time_format.moment(task.accepted_ns),
    }
    if row.started_ns is not None:
        words["started_at"] = time_format.moment(row.started_ns)
    if row.ended_ns is not None:
        words["ended_at"] = time_format.moment(row.ended_ns)
    if task.ended_ns is not None:
        words["expires_at"] = time_format.moment(task.ended_ns + time_format.key_expire_ns)
    return words


def _unfinished_result(task: TaskRow, step: TaskRow | StepRow) -> Result:
    """Return the result of a step that is not over."""
    if step.state == State.RUNNING:
        return Result.RUNNING
    if task.result == Result.PAUSED:
        return Result.PAUSED
    return Result.WAITING


_MOMENTS = {
    "accepted_at": "When the task was accepted, with milliseconds",
    "started_at": "When it, or its first step, began",
    "ended_at": "When it ended",
    "expires_at": "When its record expires",
}


def _result_words_schema() -> Json:
    return {
        "result": {"type": "string", "enum": [*Result], "description": "What has become of it, in a word"},
        "seconds": {"type": "number", "minimum": 0, "description": "How long it has run"},
        **{name: time_schema(description) for name, description in _MOMENTS.items()},
    }


_CLIENT_WORDS = {
    "submitted_by": "The client that submitted it, as in the log",
    "stopped_by": "The client that stopped it",
    "stop_reason": "The reason that this client gave",
    "parent": "The id of the task that it repeats",
}


def task_words(task: TaskRow, steps: Sequence[StepRow]) -> Json:
    """Return what only a whole task shows for programs."""
    words: Json = {}
    for name in _CLIENT_WORDS:
        if value := getattr(task, name):
            words[name] = value
    words["failed_steps"] = [step.step_index for step in steps if step.code]
    return words


_STEP_WORDS = ("exit_code", "signal", "command_type", "stopped_by", "stop_reason")  # that are left out where unknown


def step_words(step: StepRow, output_bytes: int) -> Json:
    """Return what only a step shows for programs; `output_bytes` is how much it has written so far."""
    words: Json = {"attempt": step.attempt, "output_bytes": output_bytes}
    if step.result in (Result.SUCCEEDED, Result.FAILED):
        if step.signal is None:
            words["exit_code"] = step.code
        else:
            words["signal"] = step.signal
    for name in ("command_type", "stopped_by", "stop_reason"):
        if value := getattr(step, name):
            words[name] = value
    return words


def _step_words_schema() -> Json:
    return {
        "attempt": integer_schema("How often it was tried", 1),
        "output_bytes": integer_schema("How much it has written"),
        "exit_code": integer_schema("The exit code of its process, where it ended by itself"),
        "signal": integer_schema("The signal that killed its process", 1),
        "command_type": string_schema("As submitted"),
        "stopped_by": string_schema(_CLIENT_WORDS["stopped_by"]),
        "stop_reason": string_schema(_CLIENT_WORDS["stop_reason"]),
    }


def _task_url(base_url: str, task_id: str) -> str:
    return f"{base_url}{_TASKS_PATH}/{task_id}"


def _url_schema() -> Json:
    return string_schema("Where it can be read", format="uri")


def _state_schema() -> Json:
    return {"type": "integer", "enum": [*State], "description": "0 ended, 1 running, 2 pending, 255 system error"}


def _code_schema() -> Json:
    return {"type": "integer", "description": "0 success; a task's is the sum of its steps'"}


def task_json(
    task: TaskRow,
    running: Sequence[tuple[int, str]],
    base_url: str,
    time_format: TimeFormat,
) -> Json:
    """Return a task as the list shows it; `running` are index and name of its running steps."""
    message = task.message
    if task.ended_ns is None:
        message = f"currently executing: [{name_steps(running)}]" if running else WAITING
    return {
        "id": task.id,
        "url": _task_url(base_url, task.id),
        "state": task.state,
        "code": task.code,
        "count": task.step_count,
        "msg": message,
        "times": time_format.task_times(task),
        **result_words(task, task, time_format),
    }


def _task_properties() -> Json:
    return {
        "id": string_schema("Id"),
        "url": _url_schema(),
        "state": _state_schema(),
        "code": _code_schema(),
        "count": integer_schema("Steps", 1),
        "msg": {"type": "string"},
        "times": schema_reference("Times"),
        **_result_words_schema(),
    }


_OPTIONAL_MOMENTS = ("started_at", "ended_at", "expires_at")


def _task_schema() -> Json:
    return object_schema(_task_properties(), optional=_OPTIONAL_MOMENTS)


def _whole_task_schema() -> Json:
    properties = _task_properties()
    for name, description in _CLIENT_WORDS.items():
        properties[name] = string_schema(description)
    properties["failed_steps"] = array_schema(integer_schema("Index of a step that failed"))
    return object_schema(properties, optional=(*_OPTIONAL_MOMENTS, *_CLIENT_WORDS))


def _example_times() -> TimeFormat:
    """Return how the examples show moments, by the offset of this host."""
    offset_ns = 1668673078 * _SECOND_NS
    return TimeFormat(500 * _SECOND_NS, WallTimes(offset_ns, ((0, 0),)), 48 * UNIT_NS["h"])


def _example_task() -> TaskRow:
    message = "execution failed: [Step: 0, Name: step0; Step: 2, Name: step2]"
    return TaskRow(
        1,
        "release-1",
        4,
        State.ENDED,
        510,
        message,
        accepted_ns=0,
        ended_ns=3 * _SECOND_NS,
        started_ns=10**6,
        result=Result.TIMED_OUT,
        submitted_by="ci",
    )


def _task_list_response() -> Json:
    data = object_schema(
        {
            "running": integer_schema("Running tasks"),
            "tasks": array_schema(schema_reference("Task")),
            "total": integer_schema("Tasks on all pages"),
            "next": string_schema("The cursor of the next page"),
        },
        optional=("next",),
    )
    task = task_json(_example_task(), (), _EXAMPLE_BASE_URL, _example_times())
    examples = {
        "one task": success_example({"running": 0, "tasks": [task], "total": 1}),
        "none": success_example({"running": 0, "tasks": [], "total": 0}),
    }
    return response_object("All tasks", envelope_schema([Code.SUCCESS], data), examples)


def step_json(
    step: StepRow,
    task: TaskRow,
    names: Sequence[str],
    base_url: str,
    time_format: TimeFormat,
    output_bytes: int,
) -> Json:
    """Return a step as its task shows it; `names` are those of all steps of the task."""
    indexes = json.loads(step.depends_on)
    depends_on = [names[index] for index in indexes if index < len(names)]  # what is damaged is shown too
    value = {
        "step": step.step_index,
        "url": f"{_task_url(base_url, task.id)}/{step.step_index}/console",
        "name": step.name,
        "state": step.state,
        "code": step.code,
        "msg": step_message(
            step.step_index,
            step.name,
            step.state,
            step.code,
            step.reason,
        ),
        "depets_on": depends_on,
        "times": time_format.step_times(step, task),
        **result_words(task, step, time_format),
        **step_words(step, output_bytes),
    }
    if not depends_on:
        del value["depets_on"]
    return value


def _step_names_schema() -> Json:
    return array_schema({"type": "string"}, description="Names of the steps that must succeed first")


def _step_properties() -> Json:
    return {
        "step": integer_schema("Index"),
        "url": _url_schema(),
        "name": string_schema("Name"),
        "state": _state_schema(),
        "code": _code_schema(),
        "msg": {"type": "string"},
        "depets_on": _step_names_schema(),
        "times": schema_reference("Times"),
        **_result_words_schema(),
        **_step_words_schema(),
    }


_OPTIONAL_OF_STEP = ("depets_on", *_OPTIONAL_MOMENTS, *_STEP_WORDS)


def _step_schema() -> Json:
    return object_schema(_step_properties(), optional=_OPTIONAL_OF_STEP)


def _step_example(index: int, state: State, code: int = 0) -> Json:
    """Return step `index` of the task `a`, of which each step depends on the one before."""
    names = [f"a-{number}" for number in range(index + 1)]
    depends_on = to_json([*range(index)][-1:])
    step = StepRow(
        index,
        names[index],
        depends_on,
        int(state),
        code,
        "",
        started_ns=None,
        ended_ns=None,
        command_type="sh",
    )
    if state != State.PENDING:
        step = step._replace(started_ns=10**6)
    if state == State.ENDED:
        step = step._replace(ended_ns=2 * _SECOND_NS, result=exited(code).result)
    task = _example_task()._replace(id="a", result=Result.RUNNING, ended_ns=None)
    return step_json(
        step,
        task,
        names,
        _EXAMPLE_BASE_URL,
        _example_times(),
        output_bytes=42,
    )


def _task_outcome(task: TaskRow, steps: Sequence[StepRow]) -> tuple[Code, str]:
    """Return code and message of the envelope in which a task is shown."""
    if task.ended_ns is None:
        running = [(step.step_index, step.name) for step in steps if step.state == State.RUNNING]
        return Code.IN_PROGRESS, f"in progress: [{name_steps(running) or WAITING}]"
    if task.state == State.ERROR:
        return Code.FAILED, task.message
    failures = []
    for step in steps:
        if step.code:
            failures.append(format_failure(step.step_index, step.name, step.code, step.reason))
    if failures:
        return Code.FAILED, f"execution failed: [{'; '.join(failures)}]"
    return Code.SUCCESS, "success"


def _progress_schema(data: Json) -> Json:
    """Return the schema of an envelope that tells how far something is: over, in progress, failed, or not found."""
    codes = (Code.SUCCESS, Code.IN_PROGRESS, Code.FAILED)
    return {"oneOf": [envelope_schema(codes, data), schema_reference("NotFound")]}


def _task_detail_response() -> Json:
    succeeded = _step_example(0, State.ENDED)
    failed = _step_example(1, State.ENDED, code=2)
    running = _step_example(0, State.RUNNING)
    examples: Json = {
        "success": success_example([succeeded, _step_example(1, State.ENDED)]),
        "in progress": {
            "code": 1001,
            "message": "in progress: [Step: 0, Name: a-0]",
            "data": [running, _step_example(1, State.PENDING)],
        },
        "failed": {
            "code": 1002,
            "message": f"execution failed: [{failed['msg']}]",
            "data": [succeeded, failed],
        },
    }
    task = task_json(_example_task(), (), _EXAMPLE_BASE_URL, _example_times())
    for example in examples.values():
        example["task"] = {**task, **task_words(_example_task(), ())}
    examples["gone"] = _NOT_FOUND_EXAMPLE
    schema = _progress_schema(array_schema(schema_reference("Step")))
    envelope = schema["oneOf"][0]
    envelope["properties"]["task"] = schema_reference("WholeTask")
    envelope["required"].append("task")
    return response_object("The task", schema, examples, "X-Task-STATE")


_SUBMITTED = {  # of a step, in its own answer
    "env_vars": "Its own, as submitted",
    "command_content": "The script",
    "timeout": "As submitted",
}


def submitted_json(item: Json) -> Json:
    """Return what the answer for one step adds, from the step as submitted."""
    return {name: item[name] for name in _SUBMITTED if item.get(name)}


def _step_outcome(step: StepRow) -> tuple[Code, str]:
    """Return code and message of the envelope in which a step is shown."""
    if step.state != State.PENDING:
        return _console_outcome(step)
    if step.result == Result.NOT_RUN:
        return Code.FAILED, STEP_PENDING
    return Code.IN_PROGRESS, "pending"


def _step_detail_response() -> Json:
    content = {"command_content": "make test", "timeout": "90s"}
    example = {"code": 0, "message": "succeed", "data": {**_step_example(0, State.ENDED), **submitted_json(content)}}
    schema = _progress_schema(schema_reference("StepDetail"))
    return response_object("The step", schema, {"success": example, "gone": _NOT_FOUND_EXAMPLE})


def _step_detail_schema() -> Json:
    submitted: Json = {name: string_schema(description) for name, description in _SUBMITTED.items()}
    submitted["env_vars"] = array_schema({"type": "string"}, description=_SUBMITTED["env_vars"])
    return object_schema({**_step_properties(), **submitted}, optional=(*_OPTIONAL_OF_STEP, *_SUBMITTED))


def _submission_response() -> Json:
    steps = [{"command_type": "sh", "command_content": "make test"}]
    example = success_example({"query": "id=release-1&timeout=1h", "steps": steps})
    data = object_schema(
        {
            "query": string_schema("The parameters, as in a URL"),
            "steps": array_schema({"type": "object"}, description="The body"),
        }
    )
    schema = {"oneOf": [envelope_schema([Code.SUCCESS], data), schema_reference("NotFound")]}
    return response_object("The submission", schema, {"submission": example, "gone": _NOT_FOUND_EXAMPLE})


def _deleted_response() -> Json:
    schema = {"oneOf": [envelope_schema([Code.SUCCESS]), schema_reference("NotFound")]}
    examples = {"deleted": {"code": 0, "message": "success"}, "gone": _NOT_FOUND_EXAMPLE}
    return response_object("The task is deleted", schema, examples)


def _parameter(query: Pairs, name: str) -> str:
    """Return a parameter that may be given once, empty by default. Raise BadRequest."""
    values = {value for key, value in query if key == name}
    if len(values) > 1:
        raise BadRequest(f"{name}: given twice")
    return "".join(values)


def _choice(query: Pairs, name: str, choices: Sequence[str]) -> str:
    """Return a parameter that is one of these, the first by default. Raise BadRequest."""
    value = _parameter(query, name)
    if name not in dict(query):
        value = choices[0]
    if value not in choices:
        raise BadRequest(f"{name}: invalid {value!r}: expected one of {', '.join(choices)}")
    return value


_MAX_LIMIT = 10_000
_MAX_GLOB_STARS = 4  # each multiplies how long an id takes that nearly matches
_ORDERS = ("asc", "desc")


def _parse_selection(query: Pairs) -> Selection:
    """Return which tasks a list is to show. Raise BadRequest."""
    sort_keys = [value for name, value in query if name == "sort"] or ["st"]
    if len(sort_keys) > 1 or sort_keys[0] not in _SORT_KEYS:
        raise BadRequest("sort parameter error")
    results = [value for name, value in query if name == "result"]
    known = [result.value for result in Result]
    for result in results:
        if result not in known:
            raise BadRequest(f"result: unknown {result!r}: expected one of {', '.join(known)}")
    id_glob = _parameter(query, "id")
    if id_glob.count("*") > _MAX_GLOB_STARS:
        raise BadRequest(f"id: at most {_MAX_GLOB_STARS} * are taken")
    cursor = _parameter(query, "cursor")
    try:
        check_cursor(cursor)
    except ValueError as error:
        raise BadRequest(f"cursor: {error}") from None
    is_descending = _choice(query, "order", _ORDERS) == "desc"
    return Selection(
        sort_keys[0],
        is_descending,
        tuple(dict.fromkeys(results)),
        id_glob,
        _parse_limit(_parameter(query, "limit")),
        cursor,
    )


def _parse_limit(text: str) -> int:
    """Return how many tasks a page has at most, -1 for all. Raise BadRequest."""
    if not text:
        return -1
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= _MAX_LIMIT:
        raise BadRequest(f"limit: invalid {text!r}: expected 1 to {_MAX_LIMIT}")
    return int(text)


_MAX_WAIT = "1h"


def _has_wait(request: Request) -> bool:
    return any(name == "wait" for name, _ in request.query)


def _parse_wait(query: Pairs) -> float:
    """Return for how many seconds the end of a task is waited for, 0 if it is not. Raise BadRequest."""
    text = _parameter(query, "wait")
    wait_ns = _parse_timeout("wait", text)
    if wait_ns > parse_duration(_MAX_WAIT):
        raise BadRequest(f"wait: {text} is too long: expected at most {_MAX_WAIT}")
    return wait_ns / _SECOND_NS


_MAX_REASON_LENGTH = 1000


def _parse_reason(reason: Any) -> str:
    if not isinstance(reason, str) or len(reason) > _MAX_REASON_LENGTH or not reason.isprintable():
        raise BadRequest(f"reason: must be a text of one line with at most {_MAX_REASON_LENGTH} characters")
    return reason


_RERUN_CHOICES = ("all", "failed")


def steps_done(steps: Sequence[StepRow]) -> list[DoneStep]:
    """Return the steps of an ended task that succeeded, and depend on nothing that has to run again."""
    graph = {step.step_index: json.loads(step.depends_on) for step in steps}
    settled: set[int] = set()
    done = []
    for index in graphlib.TopologicalSorter(graph).static_order():
        step = steps[index]
        if step.result not in (Result.SUCCEEDED, Result.NOT_RUN):
            continue
        if not settled.issuperset(graph[index]):
            continue
        settled.add(index)
        if step.result == Result.SUCCEEDED:
            done.append(
                DoneStep(
                    index,
                    step.started_ns,
                    step.ended_ns,
                    step.attempt,
                    step.output_bytes,
                )
            )
    if len(settled) == len(steps):
        raise Conflict("none of its steps has failed")
    return sorted(done)


def _action_audit(action: str, reason: str) -> str:
    return f"{action}, reason: {reason}" if reason else action


def _stopped_response() -> Json:
    schema = {"oneOf": [envelope_schema([Code.SUCCESS]), schema_reference("NotFound")]}
    examples = {"stopped": {"code": 0, "message": "success"}, "gone": _NOT_FOUND_EXAMPLE}
    return response_object("The action is recorded", schema, examples)


def accepted_json(
    step_count: int,
    task_id: str,
    base_url: str,
    timestamp_ns: int,
    warnings: Sequence[str] = (),
) -> Json:
    """Return what answers a submission; the timestamp is of the wall clock."""
    data: Json = {
        "count": step_count,
        "id": task_id,
        "url": _task_url(base_url, task_id),
        "timestamp": timestamp_ns,
    }
    if warnings:
        data["warnings"] = list(warnings)
    return data


def _accepted_response() -> Json:
    data = object_schema(
        {
            "id": {"type": "string"},
            "url": {"type": "string"},
            "count": integer_schema("Steps", 1),
            "timestamp": integer_schema("Nanoseconds since the epoch"),
            "warnings": array_schema(string_schema("What has no effect, and where"), minItems=1),
        },
        optional=["warnings"],
    )
    example = accepted_json(4, "release-1", _EXAMPLE_BASE_URL, 1668649373430555500)
    schema = envelope_schema([Code.SUCCESS], data)
    return response_object("The task is stored", schema, {"stored": success_example(example)}, "X-Task-ID")


def _rerun_response() -> Json:
    (content,) = _accepted_response()["content"].values()
    schema = {"oneOf": [content["schema"], schema_reference("NotFound")]}
    example = accepted_json(4, "release-2", _EXAMPLE_BASE_URL, 1668649373430555500)
    examples = {"stored": success_example(example), "gone": _NOT_FOUND_EXAMPLE}
    return response_object("The task is stored", schema, examples, "X-Task-ID")


def _console_outcome(step: StepRow) -> tuple[Code, str]:
    """Return code and message of the envelope in which the console of a step that has started is shown."""
    if step.state == State.RUNNING:
        return Code.IN_PROGRESS, "in progress"
    if step.state == State.PENDING:  # it has failed, and is tried again
        return Code.IN_PROGRESS, "pending"
    if step.code:
        reason = step.reason or format_failure(step.step_index, step.name, step.code, "")
        return Code.FAILED, f"exit code: {step.code}; {reason}"
    return Code.SUCCESS, "succeed"


def _console_response() -> Json:
    reason = format_failure(0, "a-0", 2, "")
    examples = {
        "success": {"code": 0, "message": "succeed", "data": ["build linux", "  done"]},
        "in progress": {"code": 1001, "message": "in progress", "data": ["build linux"]},
        "waiting": {"code": 1001, "message": "pending", "data": []},
        "failed": {"code": 1002, "message": f"exit code: 2; {reason}", "data": ["no route to host"]},
        "gone": _NOT_FOUND_EXAMPLE,
    }
    return response_object("Its lines so far", _progress_schema(array_schema({"type": "string"})), examples)


def pool_json(stats: PoolStats) -> Json:
    """Return the pool as it is shown; the reason for a pause is left out where there is none."""
    value = stats._asdict()
    if not stats.reason:
        del value["reason"]
    return value


_POOL_PAUSED = "Whether no step starts"
_POOL_REASON = "Why, in the words of the client"


def _pool_schema() -> Json:
    properties = {name: integer_schema(description) for name, description in POOL_FIELDS.items()}
    properties["size"]["minimum"] = 1
    properties["paused"] = {"type": "boolean", "description": _POOL_PAUSED}
    properties["reason"] = string_schema(_POOL_REASON)
    return object_schema(properties, optional=("reason",))


def _pool_response() -> Json:
    example = pool_json(PoolStats(size=30, running=1, waiting=0))
    schema = envelope_schema([Code.SUCCESS], schema_reference("Pool"))
    return response_object("The pool", schema, {"pool": success_example(example)})


def _pool_size_schema() -> Json:
    size = integer_schema(POOL_FIELDS["size"], 1, maximum=MAX_POOL_SIZE)
    properties = {
        "size": size,
        "paused": {"type": "boolean", "description": _POOL_PAUSED},
        "reason": string_schema(_POOL_REASON, maxLength=_MAX_REASON_LENGTH),
    }
    return {"type": "object", "minProperties": 1, "properties": properties}


def _parse_pool_settings(body: Any) -> Json:
    """Return what a body asks for of size, paused and reason. Raise BadRequest."""
    expected = f'expected {{"size": n}} with n from 1 to {MAX_POOL_SIZE}, "paused": true or false, "reason": a text'
    settings: Json = {}
    if isinstance(body, dict):
        fields = lower_keys("the body", body)
        settings = {name: fields[name] for name in ("size", "paused", "reason") if name in fields}
    size = settings.get("size", 1)
    if not settings or type(size) is not int or not 1 <= size <= MAX_POOL_SIZE:
        raise BadRequest(f"invalid body: {expected}")
    if type(settings.get("paused", True)) is not bool:
        raise BadRequest(f"paused: {expected}")
    _parse_reason(settings.get("reason", ""))
    return settings


# What a submission may be: the grammars are those of `parse_submission`. Empty and null are as absent.


def _both_cases(character: str) -> str:
    return character + character.upper() if character.isalpha() else character


def _bool_pattern() -> str:
    """Return the pattern of the words for true and false in any case: JSON Schema has no flag for that."""
    letters = "".join(_both_cases(word) for word in BOOLEANS if len(word) == 1)
    alternatives = [f"[{letters}]"]
    for word in BOOLEANS:
        if len(word) > 1:
            alternatives.append("".join(f"[{_both_cases(letter)}]" for letter in word))
    return f"^({'|'.join(alternatives)})?$"


def _duration_schema(may_be_zero: bool = False) -> Json:
    units = json.dumps("|".join(UNIT_NS))[1:-1]  # not ASCII by the escapes of ECMA 262, as JSON Schema's patterns are
    number = r"([0-9]+(\.[0-9]*)?|\.[0-9]+)"
    pattern = rf"^((?=.*[1-9])\+?({number}({units}))+)?$"
    if may_be_zero:
        pattern = rf"^(\+?(0|({number}({units}))+))?$"
    return string_schema("As Go writes it", pattern=pattern, examples=["90s", "1h30m", "500ms"])


def _submitted_step_schema() -> Json:
    step_names = nullable(_step_names_schema())
    properties = {
        "command_type": {"type": "string", "enum": [*INTERPRETERS]},
        "command_content": string_schema("The script", minLength=1),
        "name": nullable(string_schema("Default <task id>-<index>", maxLength=MAX_NAME_LENGTH)),
        "env_vars": nullable(array_schema(schema_reference("Variable"))),
        "depets_on": step_names,
        "depends_on": {**step_names, "description": "The same as `depets_on`"},
        "timeout": {
            "anyOf": [schema_reference("Duration"), {"type": "null"}],
            "description": "Default --exec_timeout",
        },
        "stdin": nullable(string_schema("What it reads from its standard input")),
        "stdin_base64": nullable(string_schema("The same as Base64, instead", format="byte")),
        "stderr": {"enum": [*STDERR_MODES, "", None], "description": "`apart`: in a file of its own"},
        "retry": nullable(_retry_schema()),
        "when": {
            "enum": [*When, "", None],
            "description": "What must have become of the steps that it depends on, directly or not",
        },
    }
    return {"type": "object", "required": ["command_type", "command_content"], "properties": properties}


def _retry_schema() -> Json:
    code = integer_schema("Exit code", 1, maximum=MAX_EXIT_CODE)
    properties = {
        "limit": nullable(integer_schema("How many more attempts", 1, maximum=MAX_RETRIES)),
        "delay": {
            "anyOf": [schema_reference("Delay"), {"type": "null"}],
            "description": "Before the first of them, 1h at most",
        },
        "backoff": nullable(
            {
                "type": "number",
                "minimum": 1,
                "maximum": MAX_BACKOFF,
                "description": "By which the delay grows each time, up to 1h",
            }
        ),
        "codes": nullable(array_schema(code, description="After which it is tried again, instead of any")),
    }
    return {"type": "object", "properties": properties, "additionalProperties": False, "default": RETRY_DEFAULTS}


def _submission_body() -> Json:
    build = {"command_type": "sh", "command_content": 'echo "build $target"', "env_vars": ["target=linux"]}
    graph = [
        {"name": "fetch", "command_type": "sh", "command_content": "echo 42 >answer"},
        {"name": "left", "command_type": "sh", "command_content": "cat answer", "depets_on": ["fetch"]},
        {"name": "right", "command_type": "python", "command_content": "print(7)", "depets_on": ["fetch"]},
    ]
    examples = {"one after another": [build, {**build, "timeout": "90s"}], "a graph, with ansync=true": graph}
    return {"required": True, "content": json_content(schema_reference("Submission"), examples)}


def _pool_size_body() -> Json:
    examples = {"eight": {"size": 8}, "pause": {"paused": True, "reason": "maintenance"}}
    content = json_content(schema_reference("PoolSize"), examples)
    return {"required": True, "content": content}


def _task_parameters() -> Json:
    non_empty = {"type": "string", "minLength": 1}
    boolean = {"type": "string", "pattern": _bool_pattern()}
    sort_key = {"type": "string", "enum": [*_SORT_KEYS], "default": "st"}
    task_id = {"type": "string", "pattern": f"^({ID_PATTERN.pattern})?$"}
    variables = array_schema(schema_reference("Variable"))
    reason = string_schema("One line", maxLength=_MAX_REASON_LENGTH)
    results = array_schema({"type": "string", "enum": [*Result]})
    moment = {"anyOf": [time_schema("RFC 3339"), {"type": "string", "maxLength": 0}]}
    cursor = {"type": "string", "pattern": "^(([0-9]{1,19}-)?[0-9]{1,19})?$"}
    path = {
        "task": ("Id of the task", non_empty, "release-1"),
        "step": ("Index of the step, or its name", non_empty, "0"),
    }
    query: dict[str, ParameterSpec] = {
        "sort": ("By begin (st), end (et) or expiry (rt)", sort_key, "st"),
        "result": ("With this result; may be repeated", results, ["failed", "timed_out"]),
        "limit": ("At most so many tasks", integer_schema("Tasks", 1, maximum=_MAX_LIMIT), 50),
        "cursor": ("The `next` of the page before, with the other parameters as they were", cursor, "1234"),
        "order": ("Ascending or descending", {"type": "string", "enum": [*_ORDERS], "default": "asc"}, "desc"),
        "ansync": ("true: only `depets_on` orders the steps", boolean, "true"),
        "async": ("The same as `ansync`", boolean, "true"),
        "id": ("Id of the task; sent again, the same submission runs once", task_id, "release-1"),
        "timeout": ("Timeout of the whole task, from its acceptance", schema_reference("Duration"), "1h30m"),
        "env_vars": ("KEY=value for all steps; may be repeated", variables, ["target=linux"]),
        "wait": ("How long its end is waited for, at most", schema_reference("Duration"), "30s"),
        "delay": ("How long it waits at least before its first step", schema_reference("Delay"), "10m"),
        "at": ("Before which moment no step starts", moment, "2022-11-18T16:14:23+08:00"),
        "paused": ("true: held until it is resumed", boolean, "true"),
        "strict": ("true: an unknown field or parameter is refused, else told in `warnings`", boolean, "true"),
        "only": (
            "failed: what succeeded counts as done, and the workspace begins as a copy",
            {"type": "string", "enum": [*_RERUN_CHOICES], "default": _RERUN_CHOICES[0]},
            "failed",
        ),
        "action": ("What to do", {"type": "string", "enum": ["stop", "pause", "resume"], "default": "stop"}, "pause"),
        "reason": ("Why, for those who read it later", reason, "maintenance"),
        "signal": (
            "What its processes get 5 seconds before they are killed; nothing on Windows",
            {"type": "string", "enum": [*STOP_SIGNALS], "default": "TERM"},
            "INT",
        ),
    }
    step_action = {"type": "string", "enum": ["stop"], "default": "stop"}
    others: dict[str, ParameterSpec] = {  # whose names mean something else in other routes
        "action": ("What to do", step_action, "stop"),
        "id": ("A pattern of ids: `*`, `?` and `[a-z]`", string_schema("A glob"), "web-*"),
    }
    other_objects = parameter_objects("query", others)
    return {
        **parameter_objects("path", path),
        **parameter_objects("query", query),
        "step_action": other_objects["action"],
        "id_glob": other_objects["id"],
    }


# The console: bytes to the lines of a JSON array, decoded on the way.


class OutputDecoder:
    """Decodes the lines of a step's output: UTF-8, else the code page of the host's consoles, with replacement marks.

    The programs of a step may write either. Of a cmd step, which writes in the page of the host unless it has changed
    it, a line that is UTF-8 may be so by accident: `is_of_page`, and `is_mixed` where other lines are no UTF-8.
    """

    def __init__(self, page: str, is_of_page: bool = False, is_mixed: bool = False) -> None:
        self._page = page
        self._is_of_page = is_of_page
        self._is_mixed = is_mixed

    def lines(self, data: bytes) -> list[str]:
        """Decode whole lines, without the end of the last one."""
        if self._is_of_page and not data.isascii():
            lines = [self.line(line) for line in data.split(b"\n")]
        else:
            try:
                lines = data.decode().split("\n")
            except UnicodeDecodeError:
                lines = [self.line(line) for line in data.split(b"\n")]
        return [line[:-1] if line.endswith("\r") else line for line in lines]

    def line(self, line: bytes) -> str:
        """Decode a line, or a piece of one."""
        try:
            text = line.decode()
        except UnicodeDecodeError:
            return line.decode(self._page, "replace")
        if self._is_of_page and not line.isascii():
            return self._likelier(line, text)
        return text

    def _likelier(self, line: bytes, text: str) -> str:
        """Return the line in the page of the host where that is a word and `text`, the same as UTF-8, is none.

        Words in Latin letters are never UTF-8 by accident. Russian ones come out as signs of East Asia; two bytes of
        Chinese or Korean as a letter of Europe, which stands alone there.
        """
        if len(line) > _MAX_ACCIDENT_BYTES or _is_latin_word(text) or max(text) > "\uffff":
            return text
        try:
            in_page = line.decode(self._page)
        except UnicodeDecodeError:
            return text
        if not _is_foreign_word(in_page):
            return text
        if len(in_page) < len(line):  # two bytes a character
            if max(text) >= "\u0800":  # UTF-8 of three bytes a character
                return text
            if self._is_mixed:
                return in_page
        try:
            text.encode(self._page)
        except UnicodeEncodeError:  # so nothing of this host is likely to write that
            return in_page
        return text


_MAX_ACCIDENT_BYTES = 120  # of a line: in a longer one some character is no UTF-8
_FIRST_NOT_LATIN = "\u0370"
_ASCII = re.compile(r"[\x00-\x7f]+")


def _is_foreign_word(text: str) -> bool:
    """Return whether what is not ASCII is all letters, none of them Latin, and none a capital after a small one."""
    letters = _ASCII.sub("", text)
    if min(letters) < _FIRST_NOT_LATIN or not letters.isalpha():
        return False
    pairs = zip(letters, letters[1:])
    return not any(first.islower() and second.isupper() for first, second in pairs)


_TOUCHES_ASCII = re.compile(r"[A-Za-z][^\x00-\x7f]|[^\x00-\x7f][A-Za-z]")


def _is_latin_word(text: str) -> bool:
    """Return whether what is not ASCII is all letters, some of them in a word with ASCII ones."""
    return _TOUCHES_ASCII.search(text) is not None and _ASCII.sub("", text).isalpha()


def is_utf_8(blocks: Iterable[bytes]) -> bool:
    """Return whether these bytes are UTF-8 so far."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for block in blocks:
            decoder.decode(block)
    except UnicodeDecodeError:
        return False
    return True


def _utf8_length(first_byte: int) -> int:
    """Return how many bytes a character has that begins with this one, which is not ASCII (RFC 3629)."""
    if first_byte < 0xE0:
        return 2
    if first_byte < 0xF0:
        return 3
    return 4


def _utf8_split_point(line: bytes) -> int:
    """Return where a long line may be cut: within no character, nor before a CR that may belong to the line's end."""
    end = len(line) - line.endswith(b"\r")
    for back in range(1, 4):
        byte = line[end - back]
        if byte < 0x80:
            return end
        if byte >= 0xC0:  # the first byte of a character
            is_incomplete = back < _utf8_length(byte)
            return end - back if is_incomplete else end
    return end


def encode_lines(blocks: Iterable[bytes], decoder: OutputDecoder) -> Iterator[bytes]:
    """Yield the lines of an output as elements of a JSON array, in pieces, so that memory stays flat for any output.

    A line ends in LF or CRLF.
    """
    rest = b""
    comma = b""  # empty before the first line
    is_inside_line = False  # the first pieces of a long line have been sent
    for block in blocks:
        whole, newline, rest = (rest + block).rpartition(b"\n")
        if newline:
            lines = decoder.lines(whole)
            if is_inside_line:
                yield to_json(lines.pop(0))[1:].encode()
                is_inside_line = False
            if lines:
                yield comma + to_json(lines)[1:-1].encode()
            comma = b","
        if len(rest) > _MAX_LINE_BYTES:
            cut = _utf8_split_point(rest)
            opening = b"" if is_inside_line else comma + b'"'
            piece = to_json(decoder.line(rest[:cut]))[1:-1]
            yield opening + piece.encode()
            rest = rest[cut:]
            comma = b","
            is_inside_line = True
    if is_inside_line:
        yield to_json(decoder.line(rest))[1:].encode()
    elif rest:
        yield comma + to_json(decoder.line(rest)).encode()


def _output_decoder(directory: StepDirectory, attempt: int) -> OutputDecoder:
    """Return what decodes the output of a step's last attempt as a whole. Raises OSError."""
    if not directory.writes_in_host_page():
        return OutputDecoder(fallback_encoding())
    is_mixed = not is_utf_8(directory.read_output(attempt))
    return OutputDecoder(fallback_encoding(), True, is_mixed)


class TaskApi:
    """Handlers for the routes of tasks and of the pool. Thread-safe."""

    def __init__(
        self,
        store: Store,
        scheduler: Scheduler,
        clock: Clock,
        files: SafeDirectory,
        key_expire_ns: int,
        remove_files: Callable[[int], None],
    ) -> None:
        self._remove_files = remove_files  # of a task, by its number
        self._store = store
        self._scheduler = scheduler
        self._clock = clock
        self._files = files
        self._key_expire_ns = key_expire_ns

    def routes(self) -> list[Route]:
        return [*self._task_routes(), *self._rerun_routes(), *self._step_routes(), *self._pool_routes()]

    def _task_routes(self) -> list[Route]:
        return [
            Route(
                "GET",
                _TASKS_PATH,
                self.list_tasks,
                "Lists tasks",
                "TaskList",
                ("sort", "result", "id_glob", "limit", "cursor", "order"),
                is_limited=True,
            ),
            Route(
                "POST",
                _TASKS_PATH,
                self.submit_task,
                "Submits a task",
                "Accepted",
                ("ansync", "async", "id", "timeout", "env_vars", "delay", "at", "paused", "strict"),
                "Submission",
                errors=(409, 507),
                is_limited=True,
            ),
            Route(
                "GET",
                _TASK_PATH,
                self.show_task,
                "Shows a task, step by step",
                "TaskDetail",
                ("wait",),
                is_limited=True,
                is_held=_has_wait,
            ),
            Route(
                "PUT",
                _TASK_PATH,
                self.act_on_task,
                "Stops a task by force, pauses it or lets it go on",
                "Stopped",
                ("action", "reason"),
            ),
            Route(
                "DELETE",
                _TASK_PATH,
                self.delete_task,
                "Deletes an ended task with its files",
                "Deleted",
                errors=(409, 507),
                is_limited=True,
            ),
        ]

    def _rerun_routes(self) -> list[Route]:
        return [
            Route(
                "POST",
                _TASK_PATH + "/rerun",
                self.rerun_task,
                "Submits a task again",
                "Rerun",
                ("only", "id", "env_vars"),
                errors=(409, 507),
                is_limited=True,
            ),
            Route(
                "GET",
                _TASK_PATH + "/submission",
                self.show_submission,
                "Shows what was submitted",
                "SubmissionDetail",
                is_limited=True,
            ),
        ]

    def _step_routes(self) -> list[Route]:
        """Return the routes of a step; those of its task, whose words stand in its name's place, come before."""
        return [
            Route("GET", _STEP_PATH, self.show_step, "Shows a step and what it runs", "StepDetail", is_limited=True),
            Route(
                "PUT",
                _STEP_PATH,
                self.stop_step,
                "Stops a step by force",
                "Stopped",
                ("step_action", "reason", "signal"),
            ),
            Route(
                "GET",
                _STEP_PATH + "/console",
                self.show_console,
                "Shows what a step wrote",
                "Console",
                is_limited=True,
            ),
        ]

    def _pool_routes(self) -> list[Route]:
        return [
            Route("GET", _POOL_PATH, self.show_pool, "Shows the pool", "Pool", is_limited=True),
            Route(
                "POST",
                _POOL_PATH,
                self.set_pool,
                "Sets the size of the pool, pauses it or lets it go on",
                "Pool",
                body="PoolSize",
                is_limited=True,
            ),
        ]

    def list_tasks(self, request: Request) -> Response:
        selection = _parse_selection(request.query)
        page = self._store.page(selection)
        total = None
        if selection != Selection(selection.sort):
            total = self._store.total(selection)
        return Response(headers=(JSON_TYPE,), body=self._task_list(page, total, request.base_url))

    def _task_list(self, page: Page, total: int | None, base_url: str) -> Iterator[bytes]:
        """Yield the JSON of the list block by block, so that memory stays flat for any number of tasks.

        `total` is None where the list is of all tasks: those that are shown.
        """
        running = self._store.running_steps()
        shown = 0
        yield b'{"code":0,"message":"success","data":{"running":%d,"tasks":[' % len(running)
        for rows in self._store.tasks(page.task_numbers):
            if not rows:
                continue
            time_format = self._time_format()
            block = []
            for row in rows:
                running_steps = running.get(row.task_number, ())
                block.append(task_json(row, running_steps, base_url, time_format))
            separator = b"," if shown else b""
            yield separator + to_json(block)[1:-1].encode()
            shown += len(rows)
        end: Json = {"total": shown}
        if total is not None:
            end["total"] = total
        if page.cursor:
            end["next"] = page.cursor
        yield b"]," + to_json(end)[1:].encode() + b"}"

    def submit_task(self, request: Request) -> Response:
        return self._submit(parse_submission(request.body, request.query, INTERPRETERS), request)

    def _submit(self, submission: TaskSpec, request: Request) -> Response:
        accepted = self._scheduler.submit(submission, request.label)
        audit = f"task {accepted.id}, steps: {accepted.step_count}"
        if not accepted.is_new:
            audit += ", submitted before"
        if submission.warnings:
            fields = {"task": accepted.id}
            log.warning("task %s: %s", accepted.id, "; ".join(submission.warnings), extra={"log_fields": fields})
        data = accepted_json(
            accepted.step_count,
            accepted.id,
            request.base_url,
            self._clock.wall_times().at(accepted.accepted_ns),
            submission.warnings,
        )
        return json_response(data, headers=(("X-Task-ID", accepted.id),), audit=audit)

    def show_task(self, request: Request) -> Response:
        timeout_s = _parse_wait(request.query)
        task = self._store.task(request.params["task"])
        if request.hold:
            self._await_end(task, request.hold, timeout_s)
            task = self._store.task(task.id)
        rows = self._store.steps(task.task_number)
        names = [row.name for row in rows]
        time_format = self._time_format()
        data = [self._step_json(row, task, names, request, time_format) for row in rows]
        code, message = _task_outcome(task, rows)
        running = [(row.step_index, row.name) for row in rows if row.state == State.RUNNING]
        whole = {**task_json(task, running, request.base_url, time_format), **task_words(task, rows)}
        envelope = {"code": code, "message": message, "data": data, "task": whole}
        state_header = ("X-Task-STATE", STATE_NAMES[State(task.state)])
        return Response(headers=(JSON_TYPE, state_header), body=to_json(envelope).encode())

    def _await_end(
        self,
        task: TaskRow,
        hold: Hold,
        timeout_s: float,
    ) -> None:
        """Wait for the end of a task, told by what is committed, or until this time is over. Raise ConnectionEnded."""

        def hear(notice: Notice) -> None:
            if notice.has_ended:
                hold.wake()

        with self._store.feed.listen(hear, task.task_number):
            if self._store.task(task.id).ended_ns is None:
                hold.wait(timeout_s)

    def _step_json(
        self,
        step: StepRow,
        task: TaskRow,
        names: Sequence[str],
        request: Request,
        time_format: TimeFormat,
    ) -> Json:
        """Return a step; how much it has written is stored at its end, until then its file tells."""
        output_bytes = step.output_bytes
        if output_bytes is None:
            output_bytes = StepDirectory(self._files, task.task_number, step.step_index).output_bytes(step.attempt)
        return step_json(
            step,
            task,
            names,
            request.base_url,
            time_format,
            output_bytes,
        )

    def show_step(self, request: Request) -> Response:
        task = self._store.task(request.params["task"])
        step = self._store.step(task.task_number, request.params["step"])
        names = [row.name for row in self._store.steps(task.task_number)]
        data = self._step_json(step, task, names, request, self._time_format())
        submission = self._store.submission(task.task_number)
        if submission:
            data.update(submitted_json(json.loads(submission.steps)[step.step_index]))
        code, message = _step_outcome(step)
        return json_response(data, code, message)

    def show_submission(self, request: Request) -> Response:
        submission = self._submission(self._store.task(request.params["task"]))
        return json_response({"query": submission.query, "steps": json.loads(submission.steps)})

    def _submission(self, task: TaskRow) -> Submission:
        submission = self._store.submission(task.task_number)
        if submission is None:
            raise NotFound("the task was accepted by an earlier version, which did not keep its submission")
        return submission

    def rerun_task(self, request: Request) -> Response:
        only = _choice(request.query, "only", _RERUN_CHOICES)
        check_rerun(request.query)
        task = self._store.task(request.params["task"])
        submission = self._submission(task)
        steps = json.loads(submission.steps)
        spec = parse_rerun(
            submission.query,
            steps,
            task.id,
            request.query,
            INTERPRETERS,
        )
        if only == "failed":
            if task.ended_ns is None:
                raise Conflict(f"task {task.id!r} has not ended")
            if task.copy_of:
                raise Conflict(f"task {task.id!r} has not got all files of its parent: rerun {task.parent!r}")
            done = steps_done(self._store.steps(task.task_number))
            self._check_room(task.task_number)
            spec = continue_task(spec, task.task_number, done)
        return self._submit(spec, request)

    def _check_room(self, task_number: int) -> None:
        """Raise StorageFull unless there is room for a copy of a task's files."""
        needed = 0
        try:
            with self._files.enter(str(task_number)) as directory:
                for entry in directory.walk():
                    blocks = getattr(entry.status, "st_blocks", 0)  # of 512 bytes (stat(2)); not on Windows
                    needed += blocks * 512 or entry.status.st_size
        except OSError as error:
            log.warning("task number %d: its files cannot be measured: %s", task_number, error)
        free = shutil.disk_usage(self._files.path).free
        if needed > free:
            raise StorageFull(f"a copy of its files takes {needed} bytes, and {free} are free on the disk of --root")

    def act_on_task(self, request: Request) -> Response:
        action = _choice(request.query, "action", ("stop", "pause", "resume"))
        reason = _parse_reason(_parameter(request.query, "reason"))
        task = self._store.task(request.params["task"])
        if action == "stop":
            self._scheduler.stop_task(task.task_number, Stop(STOPPED, request.label, reason))
        else:
            self._scheduler.pause_task(task.task_number, action == "pause")
        return json_response(audit=_action_audit(action, reason))

    def stop_step(self, request: Request) -> Response:
        action = _choice(request.query, "action", ("stop",))
        signal_name = _choice(request.query, "signal", STOP_SIGNALS)
        reason = _parse_reason(_parameter(request.query, "reason"))
        task = self._store.task(request.params["task"])
        step = self._store.step(task.task_number, request.params["step"])
        stop = Stop(STOPPED, request.label, reason)
        self._scheduler.stop_step(task.task_number, step.step_index, stop, signal_name)
        return json_response(audit=_action_audit(action, reason))

    def delete_task(self, request: Request) -> Response:
        task_number = self._store.delete(request.params["task"]).result()
        self._remove_files(task_number)
        return json_response()

    def show_console(self, request: Request) -> Response:
        task = self._store.task(request.params["task"])
        step = self._store.step(task.task_number, request.params["step"])
        if step.state == State.PENDING and step.retry_at_ns is None:
            if task.ended_ns is not None:
                raise NotFound(NO_TASK)
            return json_response([], Code.IN_PROGRESS, "pending")
        code, message = _console_outcome(step)
        directory = StepDirectory(self._files, task.task_number, step.step_index)
        try:
            output = directory.read_output(step.attempt)
            lines = encode_lines(output, _output_decoder(directory, step.attempt))
        except OSError as error:
            if is_scarcity(error):
                raise Unavailable(f"the output cannot be read now: {error.strerror}; try again") from None
            raise ApiError(f"the output cannot be read: {error.strerror}: {directory.path}") from None
        head = f'{{"code":{int(code)},"message":{to_json(message)},"data":['.encode()
        body = itertools.chain([head], lines, [b"]}"])
        return Response(headers=(JSON_TYPE,), body=body)

    def show_pool(self, _: Request) -> Response:
        return json_response(pool_json(self._scheduler.pool()))

    def set_pool(self, request: Request) -> Response:
        body = parse_json(request.body)
        settings = _parse_pool_settings(body)
        audit = ", ".join(f"{name} {to_json(value)}" for name, value in settings.items())
        stats = self._scheduler.set_pool(settings.get("size"), settings.get("paused"), settings.get("reason"))
        return json_response(pool_json(stats), audit=audit)

    def _time_format(self) -> TimeFormat:
        return TimeFormat(self._clock.now_ns(), self._clock.wall_times(), self._key_expire_ns)


def task_components() -> Components:
    """Return what the API document says of the routes of tasks and of the pool."""
    step = schema_reference("SubmittedStep")
    return Components(
        parameters=_task_parameters(),
        request_bodies={"Submission": _submission_body(), "PoolSize": _pool_size_body()},
        responses={
            "TaskList": _task_list_response(),
            "Accepted": _accepted_response(),
            "Rerun": _rerun_response(),
            "TaskDetail": _task_detail_response(),
            "Stopped": _stopped_response(),
            "Deleted": _deleted_response(),
            "StepDetail": _step_detail_response(),
            "SubmissionDetail": _submission_response(),
            "Console": _console_response(),
            "Pool": _pool_response(),
        },
        schemas={
            "Duration": _duration_schema(),
            "Delay": _duration_schema(may_be_zero=True),
            "Variable": string_schema("KEY=value", pattern=f"^{ENV_ENTRY_PATTERN.pattern}$"),
            "SubmittedStep": _submitted_step_schema(),
            "Submission": {"anyOf": [array_schema(step, minItems=1), step]},
            "PoolSize": _pool_size_schema(),
            "Times": _times_schema(),
            "Task": _task_schema(),
            "WholeTask": _whole_task_schema(),
            "Step": _step_schema(),
            "StepDetail": _step_detail_schema(),
            "Pool": _pool_schema(),
            "NotFound": envelope_schema([Code.NOT_FOUND]),
        },
    )


# ======================================================================================================================
# V API / follow API: what a step writes and what changes, sent as it happens
# ======================================================================================================================

# These answers last for hours, so they cost nothing while nothing happens. Whoever waits is woken:
#
#     by a commit   The store's feed tells what has changed, after the commit. Who listens first and then reads what is
#                   stored misses nothing.
#     by a look     Output is a file, and no way to be told of its growth is the same on three systems. One thread looks
#                   at the sizes of all files that are followed.
#
# A client that was cut off goes on by itself: with the offset of an output, with the last id of the events.

_EVENTS_PATH = "/api/v1/event"
_OUTPUT_PATH = _STEP_PATH + "/output"
_LOOK_INTERVAL_S = 0.1
_MAX_LOOK_SHARE = 0.02  # of a processor, that the looks take
_FOLLOW_INTERVAL_S = 3600.0  # after which a follower looks by itself
_READ_BYTES = 1 << 16  # a smaller part of an output is sent with its frame, a larger one by sendfile
_MAX_SLICE_BYTES = 1 << 23
_COMMENT_INTERVAL_S = 15.0
_KEPT_EVENTS = 10_000
_EVENTS_AT_ONCE = 200
_MAX_CACHED_NAMES = 10_000  # of steps, by each client of events
_UNSTORED = ("Cache-Control", "no-cache")
_UNBUFFERED = ("X-Accel-Buffering", "no")  # a proxy is to pass on each part at once (nginx, ngx_http_proxy_module)
_Wake = Callable[[], None]


class FileWatch:
    """Calls for looks at files that are followed, from one thread, which lives while there are any. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below
        self._looks: dict[object, _Wake] = {}
        self._is_running = False

    @contextlib.contextmanager
    def watch(self, look: _Wake) -> Iterator[None]:
        """Call `look`, which must not wait, again and again within the context. Raise RuntimeError without a thread."""
        key = object()
        with self._lock:
            if not self._is_running:
                DaemonThread(self._run, "output watch").start()
                self._is_running = True
            self._looks[key] = look
        try:
            yield
        finally:
            with self._lock:
                del self._looks[key]

    def _run(self) -> None:
        """Look 10 times a second, or as often as the share of a processor allows."""
        while True:
            with self._lock:
                looks = [*self._looks.values()]
                self._is_running = bool(looks)
            if not looks:
                return
            begin_s = time.thread_time()
            for look in looks:
                try:
                    look()
                except Exception:
                    log.exception("a look at an output failed")
            spent_s = time.thread_time() - begin_s
            time.sleep(max(_LOOK_INTERVAL_S, spent_s / _MAX_LOOK_SHARE))


class OutputFollower:
    """The body of an answer that sends what a step writes until it, or the attempt that is followed, has ended.

    For the connection's thread, but for what the feed and the watch call.
    """

    def __init__(
        self,
        store: Store,
        task_number: int,
        step: StepRow,
        attempt: int,
        open_file: Callable[[int], io.FileIO | None],
        file: io.FileIO | None,
        offset: int,
        hold: Hold,
    ) -> None:
        self._store = store
        self._task_number = task_number
        self._step = step
        self._attempt = attempt  # one that may begin yet
        self._open_file = open_file  # with the last attempt that has begun
        self._file = file  # None until it can be opened
        self._offset = offset
        self._hold = hold
        self._is_changed = True  # the step, since it was read
        self._contexts = contextlib.ExitStack()

    def follow(self, watch: FileWatch) -> OutputFollower:
        """Begin to listen and look; `close` ends it. Raise Unavailable."""
        try:
            self._contexts.enter_context(watch.watch(self._look))
        except RuntimeError as error:
            raise Unavailable(f"no thread for a look at the output ({error}); try again") from None
        self._contexts.enter_context(self._store.feed.listen(self._hear, self._task_number))
        return self

    def close(self) -> None:
        self._contexts.close()
        if self._file:
            self._file.close()

    def __iter__(self) -> Iterator[bytes | FileSlice]:
        """Yield the parts. Raise ConnectionEnded."""
        while True:
            is_over = self._is_over()  # first, for it writes until then
            yield from self._new_parts()
            if is_over:
                return
            self._hold.wait(_FOLLOW_INTERVAL_S)
            if self._hold.is_ending:
                raise ConnectionEnded("the daemon shuts down")

    def _hear(self, notice: Notice) -> None:
        if notice.has_ended or self._step.step_index in notice.step_indexes:
            self._is_changed = True
            self._hold.wake()

    def _look(self) -> None:
        if self._step.state != State.RUNNING or self._step.attempt != self._attempt:
            return
        with contextlib.suppress(OSError, ValueError):  # it was closed just now
            if self._file is None or self._left_bytes():
                self._hold.wake()

    def _left_bytes(self) -> int:
        """Return how many bytes there are that were not sent; the step may have shortened its file."""
        if self._file is None:
            return 0
        size = os.fstat(self._file.fileno()).st_size
        return max(0, size - self._offset)

    def _is_over(self) -> bool:
        if self._is_changed:
            self._is_changed = False
            try:
                self._step = self._store.step(self._task_number, str(self._step.step_index))
            except ApiError as error:
                raise ConnectionEnded(error.message) from None
        if self._step.result or self._step.attempt > self._attempt:
            return True
        return self._step.attempt == self._attempt and self._step.retry_at_ns is not None

    def _new_parts(self) -> Iterator[bytes | FileSlice]:
        if self._file is None:
            self._file = self._open_file(self._step.attempt)
        if self._file is None:
            return
        while left_bytes := self._left_bytes():
            offset = self._offset
            if left_bytes > _READ_BYTES:
                count = min(left_bytes, _MAX_SLICE_BYTES)
                self._offset += count
                yield FileSlice(self._file, offset, count)
            else:
                self._file.seek(offset)
                block = self._file.read(left_bytes)
                self._offset += len(block)
                yield block


def tail_offset(
    file: io.FileIO,
    size: int,
    lines: int,
) -> int:
    """Return where the last lines of a file of this size begin; what has no end of a line is one too."""
    if not lines or not size:
        return size
    file.seek(size - 1)
    if file.read(1) == b"\n":
        lines += 1
    end = size
    while end:
        begin = max(0, end - _BLOCK_BYTES)
        file.seek(begin)
        block = file.read(end - begin)
        count = block.count(b"\n")
        if count >= lines:
            at = len(block)
            for _ in range(lines):
                at = block.rfind(b"\n", 0, at)
            return begin + at + 1
        lines -= count
        end = begin
    return 0


class _OutputQuery(NamedTuple):
    """What of an output a request asks for; None where it does not say."""

    stream: str
    attempt: int | None
    offset: int | None
    tail: int | None


def _parse_output_query(request: Request) -> _OutputQuery:
    """Raise BadRequest."""
    query = request.query
    offset = _parse_number(query, "offset")
    tail = _parse_number(query, "tail")
    if offset is not None and tail is not None:
        raise BadRequest("offset, tail: give one of them")
    if _has_range(request) and (offset is not None or tail is not None or request.hold):
        raise BadRequest("Range: does not go with offset, tail or follow")
    stream = _choice(query, "stream", ("stdout", "stderr"))
    attempt = _parse_number(query, "attempt")
    if attempt == 0:
        raise BadRequest("attempt: they are counted from 1")
    return _OutputQuery(stream, attempt, offset, tail)


def _parse_number(query: Pairs, name: str) -> int | None:
    text = _parameter(query, name)
    if text and not re.fullmatch("[0-9]{1,15}", text):
        raise BadRequest(f"{name}: invalid {text!r}: expected a number")
    return int(text) if text else None


def _has_range(request: Request) -> bool:
    """Return whether a request asks for a range; one that has a condition is ignored, for there is no validator."""
    return "range" in request.headers and "if-range" not in request.headers


def _is_followed(request: Request) -> bool:
    return _parse_bool("follow", _parameter(request.query, "follow"))


def _output_response() -> Json:
    headers = {}
    for name in ("X-Output-Offset", "X-Step-Result", "X-Step-Attempt"):
        headers[name] = {"schema": {"type": "string"}}
    content = {"text/plain": {"schema": {"type": "string"}}}
    content.update(json_content(schema_reference("NotFound"), {"gone": _NOT_FOUND_EXAMPLE}))
    return {"description": "What the step has written, as it is", "headers": headers, "content": content}


# Events: what has changed, numbered. An event shows its subject as it is when it is sent.


class Event(NamedTuple):
    """A change of a task, or of a step of it, or of the pool, whose task number is 0."""

    number: int
    task_number: int
    step_index: int  # or one of those below


_NO_STEP = -1
_DELETED = -2


class EventLog:
    """The last changes, by numbers that rise by one; kept from the first time that somebody subscribes. Thread-safe.

    The numbers of each daemon are above those of all earlier ones: they begin with the microseconds of the clock.
    """

    def __init__(self, feed: Feed, first_number: int) -> None:
        self._feed = feed
        self._listening = contextlib.ExitStack()
        self._lock = threading.Lock()  # guards all below
        self._first = first_number
        self._next = first_number
        # A ring, in which an event takes 12 bytes.
        self._task_numbers = array.array("q")
        self._step_indexes = array.array("i")
        self._deleted_ids: dict[int, str] = {}  # of tasks in the ring
        self._subscribers: dict[object, tuple[int | None, _Wake]] = {}

    @contextlib.contextmanager
    def subscribe(self, wake: _Wake, task_number: int | None) -> Iterator[None]:
        """Call `wake` for each event within the context, or for each of this task."""
        key = object()
        with self._lock:
            if not self._task_numbers:
                self._task_numbers.extend([0] * _KEPT_EVENTS)
                self._step_indexes.extend([0] * _KEPT_EVENTS)
                self._listening.enter_context(self._feed.listen(self._hear))
            self._subscribers[key] = (task_number, wake)
        try:
            yield
        finally:
            with self._lock:
                del self._subscribers[key]

    def last_number(self) -> int:
        with self._lock:
            return self._next - 1

    def has_all_after(self, number: int) -> bool:
        """Return whether the events after this one are kept."""
        with self._lock:
            return self._oldest() - 1 <= number < self._next

    def after(self, number: int) -> list[Event]:
        """Return the next events after this one, some hundred at most. Raise LookupError if they are not kept."""
        with self._lock:
            if number < self._oldest() - 1:
                raise LookupError(number)
            end = min(self._next, number + 1 + _EVENTS_AT_ONCE)
            return [self._event(current) for current in range(number + 1, end)]

    def deleted_id(self, task_number: int) -> str:
        """Return the id of a task whose record is gone; empty where that was not told yet."""
        with self._lock:
            return self._deleted_ids.get(task_number, "")

    def _oldest(self) -> int:
        return max(self._first, self._next - _KEPT_EVENTS)

    def _event(self, number: int) -> Event:
        slot = number % _KEPT_EVENTS
        return Event(number, self._task_numbers[slot], self._step_indexes[slot])

    def _hear(self, notice: Notice) -> None:
        """Keep what a commit has changed: steps first, then their task."""
        with self._lock:
            for index in notice.step_indexes:
                self._append(notice.task_number, index)
            if notice.deleted_id:
                self._append(notice.task_number, _DELETED)
                self._deleted_ids[notice.task_number] = notice.deleted_id
            else:
                self._append(notice.task_number, _NO_STEP)
            for task_number, wake in self._subscribers.values():
                if task_number in (None, notice.task_number):
                    wake()

    def _append(self, task_number: int, step_index: int) -> None:
        slot = self._next % _KEPT_EVENTS
        if self._next - self._first >= _KEPT_EVENTS and self._step_indexes[slot] == _DELETED:
            del self._deleted_ids[self._task_numbers[slot]]
        self._task_numbers[slot] = task_number
        self._step_indexes[slot] = step_index
        self._next += 1


def format_event(kind: str, data: Json, number: int) -> bytes:
    """Return an event as it is sent (HTML Standard, 9.2, Server-sent events)."""
    return f"event: {kind}\nid: {number}\ndata: {to_json(data)}\n\n".encode()


_NamesByTask = dict[int, list[str]]  # of steps, by the number of their task


class FollowApi:
    """Handlers for the routes of outputs and events. Thread-safe."""

    def __init__(
        self,
        store: Store,
        scheduler: Scheduler,
        clock: Clock,
        files: SafeDirectory,
        key_expire_ns: int,
    ) -> None:
        self._store = store
        self._scheduler = scheduler
        self._clock = clock
        self._files = files
        self._key_expire_ns = key_expire_ns
        self._watch = FileWatch()
        self._log = EventLog(store.feed, clock.now_ns() // 1000)

    def routes(self) -> list[Route]:
        return [
            Route(
                "GET",
                _OUTPUT_PATH,
                self.show_output,
                "Sends what a step wrote, byte by byte",
                "Output",
                ("stream", "offset", "tail", "follow", "attempt"),
                errors=(416,),
                is_limited=True,
                is_held=_is_followed,
            ),
            Route(
                "GET",
                _EVENTS_PATH,
                self.show_events,
                "Sends what changes, as it changes",
                "Events",
                ("event_task", "last_event_id"),
                is_held=lambda _: True,
            ),
        ]

    # -- output

    def show_output(self, request: Request) -> Response:
        query = _parse_output_query(request)
        task = self._store.task(request.params["task"])
        step = self._store.step(task.task_number, request.params["step"])
        attempt = query.attempt or step.attempt
        self._check_output_query(task, step, query, is_followed=request.hold is not None)
        directory = StepDirectory(self._files, task.task_number, step.step_index)
        open_file = functools.partial(directory.open_output, query.stream, attempt)
        with contextlib.ExitStack() as closing:
            try:
                file = open_file(step.attempt)
            except OSError as error:
                raise Unavailable(f"the output cannot be opened ({error.strerror}); try again") from None
            size = 0
            if file:
                closing.callback(file.close)
                size = os.fstat(file.fileno()).st_size
            status, headers, offset, byte_count = self._part(request, query, file, size)
            body: bytes | FileSlice | OutputFollower = b""
            if request.hold:
                follower = OutputFollower(
                    self._store,
                    task.task_number,
                    step,
                    attempt,
                    open_file,
                    file,
                    offset,
                    request.hold,
                )
                body = follower.follow(self._watch)
                headers += (_UNBUFFERED,)
            elif file:
                body = FileSlice(file, offset, byte_count)
            closing.pop_all()
        own_headers = (
            TEXT_TYPE,
            ("X-Content-Type-Options", "nosniff"),
            _UNSTORED,
            ("X-Output-Offset", str(offset)),
            ("X-Step-Result", Result(step.result or _unfinished_result(task, step)).value),
            ("X-Step-Attempt", str(attempt)),
        )
        return Response(status, own_headers + headers, body)

    def _check_output_query(
        self,
        task: TaskRow,
        step: StepRow,
        query: _OutputQuery,
        is_followed: bool,
    ) -> None:
        """Raise BadRequest for an output that the step has not got; who follows may ask for its next attempt."""
        if query.stream == "stderr":
            submission = self._store.submission(task.task_number)
            steps = json.loads(submission.steps) if submission else []
            if not steps or steps[step.step_index].get("stderr") != "apart":
                raise BadRequest("stream: the stderr of this step is in its stdout; submit it with `stderr` as `apart`")
        last = step.attempt + is_followed
        if query.attempt and query.attempt > last:
            raise BadRequest(f"attempt: invalid {query.attempt}: expected 1 to {last}")

    def _part(
        self,
        request: Request,
        query: _OutputQuery,
        file: io.FileIO | None,
        size: int,
    ) -> tuple[int, Headers, int, int]:
        """Return status, headers, offset and number of the bytes that a request asks for. Raise RangeNotSatisfiable."""
        accepts = ("Accept-Ranges", "bytes")
        if _has_range(request) and request.method == "GET":
            part = parse_range(request.headers["range"], size)
            if part:
                offset, count = part
                content_range = f"bytes {offset}-{offset + count - 1}/{size}"
                return 206, (accepts, ("Content-Range", content_range)), offset, count
        offset = query.offset or 0
        if query.tail is not None and file:
            offset = tail_offset(file, size, query.tail)
        if offset > size:
            raise RangeNotSatisfiable(f"offset: invalid {offset}: it has {size} bytes", size)
        return 200, (accepts,), offset, size - offset

    # -- events

    def show_events(self, request: Request) -> Response:
        task_id = _parameter(request.query, "task")
        task_number = self._store.task(task_id).task_number if task_id else None
        last_id = request.headers.get("last-event-id") or _parameter(request.query, "last_event_id")
        if last_id and not re.fullmatch("[0-9]{1,18}", last_id):
            raise BadRequest(f"last_event_id: invalid {last_id!r}: expected the `id` of an event")
        headers = (("Content-Type", "text/event-stream; charset=utf-8"), _UNSTORED, _UNBUFFERED)
        hold = request.hold
        if hold is None:
            raise Unavailable("this connection cannot wait; try again")
        return Response(200, headers, self._events(hold, last_id, task_number, request.base_url))

    def _events(
        self,
        hold: Hold,
        last_id: str,
        task_number: int | None,
        base_url: str,
    ) -> Iterator[bytes]:
        """Yield the events after this id, or from now on. Raise ConnectionEnded."""
        names: _NamesByTask = {}
        with self._log.subscribe(hold.wake, task_number):
            position = int(last_id or self._log.last_number())
            if self._log.has_all_after(position):
                yield f"retry: 1000\nid: {position}\n\n".encode()  # so that it can go on before the first event
            else:
                position = self._log.last_number()
                yield b"retry: 1000\n" + format_event("reset", {}, position)
            sent = position
            while not hold.is_ending:
                events = self._events_after(position)
                position += len(events)
                shown = [event for event in events if task_number in (None, event.task_number)]
                if shown:
                    sent = position
                    yield self._render(shown, base_url, names)
                if events:
                    continue
                begin_s = time.monotonic()
                hold.wait(_COMMENT_INTERVAL_S)
                if time.monotonic() - begin_s >= _COMMENT_INTERVAL_S:
                    yield b":\n\n" if sent == position else f":\nid: {position}\n\n".encode()
                    sent = position
        raise ConnectionEnded("the daemon shuts down")

    def _events_after(self, position: int) -> list[Event]:
        try:
            return self._log.after(position)
        except LookupError:
            raise ConnectionEnded("the client reads too slowly") from None

    def _render(
        self,
        events: Iterable[Event],
        base_url: str,
        names: _NamesByTask,
    ) -> bytes:
        """Return events as they are sent. `names` caches those of a task's steps. Raise ConnectionEnded."""
        now_ns = self._clock.now_ns()
        time_format = TimeFormat(now_ns, self._clock.wall_times(), self._key_expire_ns)
        rendered = []
        try:
            running = self._store.running_steps()
            for event in events:
                kind, data = self._subject(event, running, base_url, time_format, names)
                if kind:
                    rendered.append(format_event(kind, data, event.number))
                else:
                    rendered.append(f"id: {event.number}\n\n".encode())
        except ApiError as error:  # of the store
            raise ConnectionEnded(error.message) from None
        return b"".join(rendered)

    def _subject(
        self,
        event: Event,
        running: Mapping[int, Sequence[tuple[int, str]]],
        base_url: str,
        time_format: TimeFormat,
        names: _NamesByTask,
    ) -> tuple[str, Json]:
        """Return the kind of an event and the JSON of its subject as it is now; no kind where that is unknown."""
        number = event.task_number
        if not number:
            return "pool", pool_json(self._scheduler.pool())
        tasks = next(self._store.tasks([number]))
        if not tasks:
            deleted_id = self._log.deleted_id(number)
            return ("expired" if deleted_id else ""), {"id": deleted_id}
        task = tasks[0]
        if event.step_index < 0:
            return "task", task_json(task, running.get(number, ()), base_url, time_format)
        if number not in names:
            if sum(map(len, names.values())) > _MAX_CACHED_NAMES:
                names.clear()
            names[number] = [row.name for row in self._store.steps(number)]
        step = self._store.step(number, str(event.step_index))
        output_bytes = step.output_bytes
        if output_bytes is None:
            output_bytes = StepDirectory(self._files, number, step.step_index).output_bytes(step.attempt)
        shown = step_json(
            step,
            task,
            names[number],
            base_url,
            time_format,
            output_bytes,
        )
        return "step", {"task": task.id, **shown}


def _events_response() -> Json:
    example = format_event("expired", {"id": "release-1"}, 1668649373430556).decode()
    content: Json = {"text/event-stream": {"schema": {"type": "string"}, "example": example}}
    content.update(json_content(schema_reference("NotFound"), {"gone": _NOT_FOUND_EXAMPLE}))
    return {"description": "Events `task`, `step`, `pool`, `expired` and `reset`, for ever", "content": content}


def follow_components() -> Components:
    """Return what the API document says of the routes of outputs and events."""
    boolean = {"type": "string", "pattern": _bool_pattern()}
    stream = {"type": "string", "enum": ["stdout", "stderr"], "default": "stdout"}
    number = {"type": "string", "pattern": "^[0-9]{0,18}$"}
    attempt = integer_schema("Attempt", 1, maximum=10**15 - 1)
    query: dict[str, ParameterSpec] = {
        "stream": ("stderr: what was written there, where it is apart", stream, "stdout"),
        "offset": ("Where to begin, in bytes", integer_schema("Bytes", maximum=10**15 - 1), 0),
        "tail": ("Begin with so many last lines", integer_schema("Lines", maximum=10**15 - 1), 100),
        "follow": ("true: goes on until the step has ended", boolean, "true"),
        "attempt": ("Of this attempt; default the last that has begun. With follow also the next one", attempt, 1),
        "last_event_id": ("The last event that is known; the header Last-Event-ID wins", number, "1668649373430556"),
    }
    parameters = parameter_objects("query", query)
    task: ParameterSpec = ("Id of a task: its events alone", {"type": "string"}, "release-1")
    parameters["event_task"] = parameter_objects("query", {"task": task})["task"]
    return Components(
        parameters=parameters,
        request_bodies={},
        responses={"Output": _output_response(), "Events": _events_response()},
        schemas={},
    )


# ======================================================================================================================
# V API / workspace API: the files of a task, sent and fetched
# ======================================================================================================================

# A client that is let in may do all that the daemon's user may; what is guarded against is the content of a workspace,
# which foreign code may have made: SafeDirectory reaches nothing through a link or a mount, and opens regular files
# alone. An upload is received beside the tasks, so that no step meets half a file, and renamed into place.

_WORKSPACE_PATH = _TASK_PATH + "/workspace"
_WORKSPACE_FILE_PATH = _WORKSPACE_PATH + "/{path}"
_LISTED_AT_ONCE = 5000
_NO_PLAIN_CHARACTER = re.compile(r'[^\x20-\x7e]|["\\]')


class _Place(NamedTuple):
    """What a request is about: the entry with these names, one in the other, of a task's workspace."""

    task: TaskRow
    names: list[str]

    def __str__(self) -> str:
        return _shown_name("/".join(self.names) or ".")

    @property
    def workspace(self) -> tuple[str, str]:
        return str(self.task.task_number), "workspace"


def _shown_name(name: str) -> str:
    """Return a name as JSON shows it: bytes that are not UTF-8 as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _raw_path(request: Request) -> bytes:
    """Return the path in the workspace that a request names, in its URL or as `path=`. Raise BadRequest."""
    if "path" in request.params:
        rest = request.raw_path.split("/", 6)[6:]  # behind /api/v1/task/{task}/workspace/
        return urllib.parse.unquote_to_bytes("".join(rest))
    parameters = urllib.parse.parse_qsl(request.raw_query, keep_blank_values=True, encoding="latin-1")
    paths = [value for name, value in parameters if name == "path"]
    if len(paths) > 1:
        raise BadRequest("path: given more than once")
    return "".join(paths).encode("latin-1")


@contextlib.contextmanager
def _answer_os_errors(place: _Place) -> Iterator[None]:
    """Raise the ApiError that an OSError stands for."""
    try:
        yield
    except FileNotFoundError:
        raise PathNotFound(f"not found in the workspace: {place}") from None
    except OSError as error:
        problem = f"{place}: {error.strerror or error}"
        if error.errno in _DISK_FULL:
            raise StorageFull(f"no space left on the disk of --root for {place}; free some") from None
        if is_scarcity(error):
            raise Unavailable(f"{problem}; try again") from None
        if error.errno in (errno.ENAMETOOLONG, errno.EILSEQ):
            raise BadRequest(f"{problem}; choose another name") from None
        raise Conflict(f"{problem}; links and mounts are not followed, and only files and directories opened") from None


def _entry_type(status: os.stat_result) -> str:
    if _is_link(status):
        return "link"
    if stat.S_ISREG(status.st_mode):
        return "file"
    if stat.S_ISDIR(status.st_mode):
        return "directory"
    return "other"


def _format_modified(status: os.stat_result) -> str:
    """Return when a file was changed, RFC 3339 with milliseconds; empty for a year that has not four digits."""
    try:
        moment = datetime.datetime.fromtimestamp(status.st_mtime_ns // 10**6 / 1000).astimezone()
    except (OverflowError, ValueError, OSError):
        return ""
    return moment.isoformat(timespec="milliseconds")


def entry_json(name: str, status: os.stat_result, url: str) -> Json:
    """Return an entry of a workspace; only a file has a size."""
    value: Json = {"name": _shown_name(name), "type": _entry_type(status), "url": url}
    if value["type"] == "file":
        value["bytes"] = status.st_size
    modified_at = _format_modified(status)
    if modified_at:
        value["modified_at"] = modified_at
    return value


def _next_entries(entries: Iterator[os.DirEntry[str]]) -> list[os.DirEntry[str]]:
    return sorted(itertools.islice(entries, _LISTED_AT_ONCE), key=lambda entry: entry.name)


def _entry_schema() -> Json:
    return object_schema(
        {
            "name": string_schema("Name; bytes that are not UTF-8 as \\xff"),
            "type": {"type": "string", "enum": ["file", "directory", "link", "other"]},
            "url": _url_schema(),
            "bytes": integer_schema("Size of a file"),
            "modified_at": time_schema("When its content was changed"),
        },
        optional=("bytes", "modified_at"),
    )


def _entry_example() -> Json:
    return {
        "name": "app.tar",
        "type": "file",
        "url": f"{_EXAMPLE_BASE_URL}/api/v1/task/release-1/workspace/app.tar",
        "bytes": 10240,
        "modified_at": "2022-11-18T16:14:26.123+08:00",
    }


def _bytes_content() -> Json:
    return {"application/octet-stream": {"schema": {"type": "string", "contentMediaType": "application/octet-stream"}}}


def _file_response_object() -> Json:
    entries = array_schema(schema_reference("Entry"))
    schema = {"oneOf": [envelope_schema([Code.SUCCESS], entries), schema_reference("NotFound")]}
    examples = {"directory": success_example([_entry_example()]), "gone": _NOT_FOUND_EXAMPLE}
    response = response_object("A file, or the entries of a directory", schema, examples)
    response["content"].update(_bytes_content())
    return response


def _uploaded_response() -> Json:
    schema = {"oneOf": [envelope_schema([Code.SUCCESS], schema_reference("Entry")), schema_reference("NotFound")]}
    return response_object("The file is in its place", schema, {"stored": success_example(_entry_example())})


def _removed_response() -> Json:
    schema = {"oneOf": [envelope_schema([Code.SUCCESS]), schema_reference("NotFound")]}
    return response_object("It is removed", schema, {"removed": {"code": 0, "message": "success"}})


def file_response(request: Request, file: io.FileIO, name: str) -> Response:
    """Return a file, or the part of it that Range asks for (RFC 9110, 14); never for a browser to show."""
    status = os.fstat(file.fileno())
    etag = f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
    plain_name = _NO_PLAIN_CHARACTER.sub("_", _shown_name(name))
    quoted_name = urllib.parse.quote(os.fsencode(name), safe="")
    headers = [
        ("Content-Type", "application/octet-stream"),
        ("X-Content-Type-Options", "nosniff"),
        ("Content-Disposition", f"attachment; filename=\"{plain_name}\"; filename*=UTF-8''{quoted_name}"),
        ("Accept-Ranges", "bytes"),
        ("Cache-Control", "no-cache"),
        ("ETag", etag),
    ]
    with contextlib.suppress(OverflowError, ValueError, OSError):  # a year that has not four digits
        headers.append(("Last-Modified", email.utils.formatdate(status.st_mtime, usegmt=True)))
    if request.headers.get("if-none-match", "") in (etag, "*"):
        return Response(304, tuple(headers))
    part = None
    if request.method == "GET" and request.headers.get("if-range", etag) == etag:
        part = parse_range(request.headers.get("range", ""), status.st_size)
    if part is None:
        return Response(200, tuple(headers), FileSlice(file, 0, status.st_size))
    offset, byte_count = part
    headers.append(("Content-Range", f"bytes {offset}-{offset + byte_count - 1}/{status.st_size}"))
    return Response(206, tuple(headers), FileSlice(file, offset, byte_count))


class WorkspaceApi:
    """Handlers for the routes of workspaces. Thread-safe."""

    def __init__(self, store: Store, files: SafeDirectory) -> None:
        self._store = store
        self._files = files

    def routes(self) -> list[Route]:
        return [
            *self._routes(_WORKSPACE_PATH, "POST", ("workspace_path",)),
            *self._routes(_WORKSPACE_FILE_PATH, "PUT", ()),
        ]

    def _routes(self, path: str, upload_method: str, query: tuple[str, ...]) -> list[Route]:
        shown = ("Sends a file, or lists a directory", "File", query, "", (404, 409, 416), True)
        uploaded = ("Stores a file", "Uploaded", query, "File", (404, 409, 415, 507), True)
        removed = ("Removes a file or directory", "Removed", (*query, "recursive"), "", (404, 409), True)
        return [
            Route("GET", path, self.show, *shown, names_file=True),
            Route(upload_method, path, self.upload, *uploaded, names_file=True, streams_body=True),
            Route("DELETE", path, self.remove, *removed, names_file=True),
        ]

    def show(self, request: Request) -> Response:
        place = self._place(request)
        with _answer_os_errors(place):
            if self._is_directory(place):
                entries = self._list(place, request.base_url)
                head = next(entries)  # by now it is open
                return Response(headers=(JSON_TYPE,), body=itertools.chain([head], entries))
            with self._files.enter(*place.workspace) as workspace:
                file = workspace.read(*place.names)
        return self._file_response(request, file, place)

    def _file_response(self, request: Request, file: io.FileIO, place: _Place) -> Response:
        """Return what `file_response` does; close the file where it is not sent."""
        with contextlib.ExitStack() as closing:
            closing.callback(file.close)
            response = file_response(request, file, place.names[-1])
            if isinstance(response.body, FileSlice):
                closing.pop_all()
        return response

    def upload(self, request: Request) -> Response:
        place = self._place(request)
        self._check_upload(request, place)
        with _answer_os_errors(place), self._files.temporary_file() as (name, file):
            byte_count = 0
            for block in request.stream or ():
                byte_count += len(block)
                while block:
                    block = block[file.write(block) :]
            file.close()
            place = self._place(request)  # it may have ended or expired meanwhile
            self._make_workspace(place)
            with self._files.enter(*place.workspace) as workspace:
                workspace.move_from(self._files, name, *place.names)
                status = workspace.status(*place.names)
        entry = entry_json(place.names[-1], status, self._url(place, request.base_url))
        return json_response(entry, audit=f"upload of {place}, {byte_count} bytes")

    def remove(self, request: Request) -> Response:
        flags = [value for name, value in request.query if name == "recursive"] or [""]
        is_recursive = _parse_bool("recursive", flags[-1])
        place = self._place(request)
        if not place.names:
            raise BadRequest("path: expected that of a file or directory in the workspace")
        with _answer_os_errors(place), self._files.enter(*place.workspace) as workspace:
            is_directory = stat.S_ISDIR(workspace.status(*place.names).st_mode)
            if is_directory and not is_recursive:
                raise Conflict(f"{place} is a directory: add recursive=true to remove it with all that is in it")
            if not is_directory:
                workspace.unlink(*place.names)
            elif not workspace.remove(*place.names):
                raise Conflict(f"not all of {place} could be removed; try again")
        return json_response(audit=f"removal of {place}")

    def _place(self, request: Request) -> _Place:
        """Return what a request is about. Raise NotFound for its task, BadRequest for its path."""
        task = self._store.task(request.params["task"])
        try:
            return _Place(task, split_path(_raw_path(request)))
        except ValueError as error:
            raise BadRequest(f"invalid path: {error}") from None

    def _url(self, place: _Place, base_url: str) -> str:
        path = "/".join(urllib.parse.quote(os.fsencode(name), safe="") for name in place.names)
        return f"{_task_url(base_url, place.task.id)}/workspace/{path}"

    def _is_directory(self, place: _Place) -> bool:
        """Return whether a place is a directory, as that of the whole workspace always is. Raise OSError."""
        if not place.names:
            return True
        with self._files.enter(*place.workspace) as workspace:
            return stat.S_ISDIR(workspace.status(*place.names).st_mode)

    def _list(self, place: _Place, base_url: str) -> Iterator[bytes]:
        """Yield the JSON of a directory, so that memory stays flat for any size; by name, some thousands at a time.

        A workspace that is not there yet, or that was removed because it was empty, is empty. Raise OSError.
        """
        url = self._url(place, base_url).rstrip("/")
        separator = b""
        with contextlib.ExitStack() as closing:
            entries: Iterator[os.DirEntry[str]] = iter(())
            some: list[os.DirEntry[str]] = []
            try:
                workspace = closing.enter_context(self._files.enter(*place.workspace))
                entries = closing.enter_context(workspace.enter(*place.names)).entries()
                some = _next_entries(entries)  # before the first byte is sent, for it may fail
            except FileNotFoundError:
                if place.names:
                    raise
            yield b'{"code":0,"message":"success","data":['
            while some:
                block = [*self._entries_json(some, url)]
                if block:
                    yield separator + to_json(block)[1:-1].encode()
                    separator = b","
                some = _next_entries(entries)
            yield b"]}"

    def _entries_json(self, entries: Iterable[os.DirEntry[str]], url: str) -> Iterator[Json]:
        for entry in entries:
            with contextlib.suppress(OSError):  # it has just been removed
                status = entry.stat(follow_symlinks=False)
                name = urllib.parse.quote(os.fsencode(entry.name), safe="")
                yield entry_json(entry.name, status, f"{url}/{name}")

    def _check_upload(self, request: Request, place: _Place) -> None:
        """Raise ApiError for an upload that cannot end well, before its body is read."""
        if not place.names:
            raise BadRequest("path: expected that of a file in the workspace")
        if request.headers.get("content-type", "").lower().startswith("multipart/"):
            raise UnsupportedMediaType("a form is not stored: send the bytes of the file, as curl -T does")
        free_bytes = shutil.disk_usage(self._files.path).free
        if (request.body_bytes or 0) > free_bytes:
            raise StorageFull(f"no space left for {request.body_bytes} bytes: the disk of --root has {free_bytes}")
        self._check_ended(place)
        with contextlib.suppress(PathNotFound), _answer_os_errors(place):  # what is missing is made
            if self._is_directory(place):
                raise Conflict(f"{place} is a directory")

    def _check_ended(self, place: _Place) -> None:
        """Raise Conflict where the workspace is gone with the task's end: nothing would remove a new empty one."""
        workspace = os.path.join(self._files.path, *place.workspace)
        if place.task.ended_ns is not None and not is_real_directory(workspace):
            raise Conflict("the task has ended, and its workspace, which was empty, was removed")

    def _make_workspace(self, place: _Place) -> None:
        """Make the workspace of a task that has not ended. Raise Conflict where an ended one has none, OSError."""
        self._check_ended(place)
        if place.task.ended_ns is not None:
            return
        for depth in (1, 2):
            with contextlib.suppress(FileExistsError):
                self._files.make(*place.workspace[:depth])


def workspace_components() -> Components:
    """Return what the API document says of the routes of workspaces."""
    any_path = {"type": "string"}
    boolean = {"type": "string", "pattern": _bool_pattern()}
    in_url = ("Path in the workspace, whose slashes may be escaped", any_path, "dist/app.tar")
    in_query = ("Path in the workspace; default the workspace itself", any_path, "dist/app.tar")
    recursive = ("true: a directory is removed with all that is in it", boolean, "true")
    parameters = parameter_objects("query", {"path": in_query, "recursive": recursive})
    parameters["workspace_path"] = parameters["path"]
    parameters.update(parameter_objects("path", {"path": in_url}))
    return Components(
        parameters=parameters,
        request_bodies={"File": {"content": _bytes_content()}},  # without one the file is empty
        responses={
            "File": _file_response_object(),
            "PartialFile": {"description": "The part of the file that Range asks for", "content": _bytes_content()},
            "NotModified": {"description": "The file has the ETag of If-None-Match"},
            "Uploaded": _uploaded_response(),
            "Removed": _removed_response(),
        },
        schemas={"Entry": _entry_schema()},
    )


# ======================================================================================================================
# V API / operator API: the daemon's version, health, metrics and state
# ======================================================================================================================


# The shapes: how each JSON value is made, and its schema.


def _host_json(host: HostInfo, boot_s: float) -> Json:
    return {**host._asdict(), "boot_time": format_time(int(boot_s))}


def _host_schema() -> Json:
    names = {name: string_schema(name) for name in HostInfo._fields}
    return object_schema({**names, "boot_time": time_schema("When it started")})


def _process_json(stats: ProcessStats, program: Build) -> Json:
    return {
        "pid": os.getpid(),
        "uptime_s": round(max(0.0, time.time() - stats.started_s), 3),
        "cpu_s": round(stats.cpu_s, 3),
        "rss_bytes": stats.resident_bytes,
        "threads": stats.threads,
        "open_files": stats.open_files,
        "python": f"{program.implementation} {program.python}",
    }


def _process_schema() -> Json:
    seconds = {"type": "number", "minimum": 0}
    return object_schema(
        {
            "pid": integer_schema("Process id", 1),
            "uptime_s": {**seconds, "description": "Seconds since its start"},
            "cpu_s": {**seconds, "description": "Seconds of user and system CPU time"},
            "rss_bytes": nullable(integer_schema("Resident memory")),
            "threads": integer_schema("Threads", 1),
            "open_files": nullable(integer_schema("File descriptors, on Windows handles")),
            "python": string_schema("Implementation and version"),
        }
    )


def _tasks_json(counts: Mapping[int, int]) -> Json:
    return {name: counts.get(state, 0) for state, name in STATE_NAMES.items()}


def _tasks_schema() -> Json:
    return object_schema({name: integer_schema("Tasks in this state") for name in STATE_NAMES.values()})


def _store_json(size_bytes: int, records: int, oldest: str | None) -> Json:
    return {"bytes": size_bytes, "records": records, "oldest": oldest}


def _store_schema() -> Json:
    return object_schema(
        {
            "bytes": integer_schema("Size of the database"),
            "records": integer_schema("Tasks kept"),
            "oldest": nullable(time_schema("When the oldest kept task was accepted")),
        }
    )


def _root_json(path: str) -> Json:
    disk = shutil.disk_usage(path)
    return {"path": path, "disk_free_bytes": disk.free, "disk_total_bytes": disk.total}


def _root_schema() -> Json:
    return object_schema(
        {
            "path": string_schema("The root"),
            "disk_free_bytes": integer_schema("Free space on its file system"),
            "disk_total_bytes": integer_schema("Size of its file system"),
        }
    )


def _daemon_state_schema() -> Json:
    return object_schema(
        {
            "host": _host_schema(),
            "process": _process_schema(),
            "pool": schema_reference("Pool"),
            "tasks": _tasks_schema(),
            "store": _store_schema(),
            "root": _root_schema(),
        }
    )


def version_json(program: Build) -> Json:
    python = {
        "implementation": program.implementation,
        "version": program.python,
        "os": program.os,
        "arch": program.arch,
    }
    return {
        "version": program.version,
        "python": python,
        "commit": program.commit or None,
        "built": program.built,
        "features": [*FEATURES],
    }


def _version_schema() -> Json:
    python = {name: string_schema(name) for name in ("implementation", "version", "os", "arch")}
    return object_schema(
        {
            "version": string_schema("Version of the program"),
            "python": object_schema(python),
            "commit": nullable(string_schema("The git commit, null where it is unknown")),
            "built": string_schema("When it was committed, else when its file was written"),
            "features": array_schema({"type": "string"}, description="What it can beyond the original"),
        }
    )


_LINKS = {
    "tasks": _TASKS_PATH,
    "pool": _POOL_PATH,
    "events": _EVENTS_PATH,
    "document": "/openapi.json",
    "metrics": "/metrics",
}


def index_json(base_url: str) -> Json:
    return {"version": __version__, "links": {name: base_url + path for name, path in _LINKS.items()}}


def _index_response() -> Json:
    links = object_schema({name: _url_schema() for name in _LINKS})
    data = object_schema({"version": string_schema("Version of the program"), "links": links})
    example = success_example(index_json(_EXAMPLE_BASE_URL))
    return response_object("The version, and links", envelope_schema([Code.SUCCESS], data), {"index": example})


def health_json(server: str, client: str, timestamp_ns: int) -> Json:
    return {"server": server, "client": client, "state": "Running", "timestamp": timestamp_ns}


def _health_properties() -> Json:
    return {
        "server": string_schema("Host and port, as the client calls the daemon"),
        "client": string_schema("The client's address"),
        "state": {"const": "Running"},
        "timestamp": integer_schema("Nanoseconds since the epoch"),
    }


def _health_schema() -> Json:
    warning = string_schema("What the operator should know")
    return object_schema({**_health_properties(), "warning": warning}, optional=("warning",))


def _health_response() -> Json:
    envelope = envelope_schema([Code.SUCCESS], schema_reference("Health"))
    return response_object("The daemon is alive", object_schema({**envelope["properties"], **_health_properties()}))


class OperatorApi:
    """Handlers for the routes about the daemon itself. Thread-safe."""

    def __init__(
        self,
        store: Store,
        scheduler: Scheduler,
        clock: Clock,
        metrics: Metrics,
        root: str,
        warnings: Sequence[Callable[[], str]],
    ) -> None:
        self._store = store
        self._scheduler = scheduler
        self._clock = clock
        self._metrics = metrics
        self._root = root
        self._warnings = warnings  # each returns what the operator should know now, or an empty text

    def routes(self) -> list[Route]:
        return [
            Route("GET", "/", self.show_index, "Shows the version and where all else is", "Index"),
            Route("GET", "/version", self.show_version, "Shows the version", "Version"),
            Route("GET", "/healthyz", self.show_health, "Shows that the daemon is alive", "Health", is_public=True),
            Route("GET", "/heartbeat", self.heartbeat, "Responds with an empty body", "Empty", is_public=True),
            Route("HEAD", "/heartbeat", self.heartbeat, "Responds with an empty body", "Empty", is_public=True),
            Route("GET", "/metrics", self.show_metrics, "Shows metrics for Prometheus", "Metrics", is_page=True),
            Route("GET", "/api/v1/state", self.show_state, "Shows host, process and work", "State", is_limited=True),
        ]

    def show_index(self, request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):  # a browser
            return Response(302, (("Location", "/swagger/index.html"),))
        return json_response(index_json(request.base_url))

    def show_version(self, _: Request) -> Response:
        return json_response(version_json(build()))

    def show_health(self, request: Request) -> Response:
        """Return the envelope with the members of `data` beside it too, where clients of the original look."""
        health = health_json(request.host, request.peer, time.time_ns())
        data = health
        if request.label:
            warnings = [warn() for warn in self._warnings]
            warning = "; ".join(filter(None, warnings))
            if warning:
                data = {**health, "warning": warning}
        envelope = {"code": 0, "message": "success", "data": data, **health}
        return Response(headers=(JSON_TYPE,), body=to_json(envelope).encode())

    def heartbeat(self, _: Request) -> Response:
        return Response()

    def show_metrics(self, _: Request) -> Response:
        families = self._gauges()
        families += self._metrics.families()
        families += process_families(process_stats())
        return Response(headers=(METRICS_TYPE,), body=format_metrics(families).encode())

    def _gauges(self) -> list[MetricFamily]:
        """Return the metrics of what there is now, read when they are asked for."""
        counts = self._store.counts()
        tasks = [("", (("state", name),), count) for name, count in _tasks_json(counts).items()]
        labels = tuple(build()._asdict().items())
        families = [
            metric(METRIC_PREFIX + "build_info", "gauge", "The program and its Python; always 1.", 1, labels),
            MetricFamily(METRIC_PREFIX + "tasks", "gauge", "Tasks kept, by state.", tasks),
        ]
        pool = self._scheduler.pool()._asdict()
        for name, description in POOL_FIELDS.items():
            families.append(metric(f"{METRIC_PREFIX}pool_{name}", "gauge", f"{description}.", pool[name]))
        size_bytes = self._store.size_bytes()
        store_size = metric(METRIC_PREFIX + "store_size_bytes", "gauge", "What the database takes on disk.", size_bytes)
        return [*families, store_size]

    def show_state(self, _: Request) -> Response:
        counts = self._store.counts()
        oldest_ns = self._store.oldest_ns()
        oldest = None
        if oldest_ns is not None:
            oldest = format_time(self._clock.wall_times().at(oldest_ns) // _SECOND_NS)
        state = {
            "host": _host_json(host_info(), boot_time_s()),
            "process": _process_json(process_stats(), build()),
            "pool": pool_json(self._scheduler.pool()),
            "tasks": _tasks_json(counts),
            "store": _store_json(self._store.size_bytes(), sum(counts.values()), oldest),
            "root": _root_json(self._root),
        }
        return json_response(state)


def operator_components() -> Components:
    """Return what the API document says of the routes about the daemon itself."""
    success = [Code.SUCCESS]
    return Components(
        parameters={},
        request_bodies={},
        responses={
            "Index": _index_response(),
            "Version": response_object("The version", envelope_schema(success, schema_reference("Version"))),
            "State": response_object("Host, process and work", envelope_schema(success, schema_reference("State"))),
            "Health": _health_response(),
            "Empty": {"description": "An empty body"},
            "Metrics": text_response_object("Text format 0.0.4 of Prometheus", "text/plain"),
        },
        schemas={
            "Version": _version_schema(),
            "State": _daemon_state_schema(),
            "Health": _health_schema(),
        },
    )


# ======================================================================================================================
# V API / profiling: stacks and memory of the daemon, in the formats of Go's tools
# ======================================================================================================================

# Clients of the original ask for the profiles of Go's net/http/pprof. Answered is what is true of a Python process: a
# profile of what CPython keeps no account of is empty, and its comment says so.

_PPROF_PATH = "/debug/pprof/"
_PERIOD_NS = 10**7  # between two samples, 100 Hz as in Go
_PAUSE_FACTOR = 24  # pause 24 times the CPU time of a sample: sampling takes 4 % of a CPU at most
_HEAP_DEPTH = 16  # frames of an allocation's stack
_DEFAULT_PROFILE_S = 30.0  # as in Go
_DEFAULT_TRACE_S = 1.0  # as in Go
_DEFAULT_S = 5.0  # of all others
_PROFILE_TYPE = ("Content-Type", "application/octet-stream")
_FOREIGN_THREAD = "not Python's"
_DEBUG_LEVELS = ("0", "1", "2")

ValueTypes = Sequence[tuple[str, str]]  # the name and the unit of each value of a stack
_SAMPLE_TYPES = (("samples", "count"), ("wall", "nanoseconds"))
_HEAP_TYPES = (("inuse_objects", "count"), ("inuse_space", "bytes"))
_THREAD_TYPES = (("threads", "count"),)
_WAIT_TYPES = (("waits_sampled", "count"), ("wait", "nanoseconds"))

_UNKNOWN_WAITS = (
    "Empty: CPython keeps no account of how long threads wait for locks, conditions or each other's end. "
    "`profile` samples where all threads are, whether they run or wait."
)
_UNKNOWN_STARTS = "Empty: CPython keeps no stack of a thread's start. `goroutine` has the threads that live."
_PROFILES = {  # what the index and the API document say of each
    "profile": "Where all threads are, sampled at 100 Hz",
    "goroutine": "The stacks of all threads now",
    "heap": "What is allocated in some seconds and kept",
    "allocs": "The same as heap",
    "threadcreate": "Empty: CPython keeps no stack of a thread's start",
    "block": "Empty: CPython keeps no account of waits",
    "mutex": "Empty: CPython keeps no account of waits for locks",
    "trace": "The steps, requests and commits of some seconds",
    "cmdline": "The command line",
    "symbol": "No symbols: the profiles hold the names of their functions",
}
_INDEX_DEBUG_LEVELS = {"goroutine": "2", "threadcreate": "1", "block": "1", "mutex": "1", "heap": "1"}


class Frame(NamedTuple):
    """A place in the program; the function is qualified by its module."""

    function: str
    file: str
    line: int


Stack = tuple[Frame, ...]  # the innermost frame first
_StackKey = tuple[
    str, tuple[tuple[int, int], ...]
]  # a thread's name, and the id of the code and the line of each frame


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _packed(values: Iterable[int]) -> bytes:
    return b"".join(map(_varint, values))


def _field(number: int, value: int | bytes) -> bytes:
    """Return a field of a protocol buffer: a number, or bytes with their length (Protocol Buffers, Encoding)."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


class _ProfileEncoder:
    """The tables of one profile.proto, and the messages that refer to their entries by number. Not thread-safe."""

    def __init__(self) -> None:
        self._strings = {"": 0}  # the first must be empty
        self._locations: dict[Frame, int] = {}
        self._functions: dict[tuple[str, str], int] = {}

    def string(self, text: str) -> int:
        return self._strings.setdefault(text, len(self._strings))

    def value_type(self, name: str, unit: str) -> bytes:
        return _field(1, self.string(name)) + _field(2, self.string(unit))

    def sample(self, thread_name: str, stack: Stack, values: Sequence[int]) -> bytes:
        locations = [self._locations.setdefault(frame, len(self._locations) + 1) for frame in stack]
        message = _field(1, _packed(locations)) + _field(2, _packed(values))
        if thread_name:
            label = _field(1, self.string("thread")) + _field(2, self.string(thread_name))
            message += _field(3, label)
        return message

    def mapping(self) -> bytes:
        """Return the only mapping, of all addresses. It has functions, files and lines: no tool need look for them."""
        addresses = _field(1, 1) + _field(3, 2**63 - 1)
        file = _field(5, self.string(sys.executable))
        has_symbols = _field(7, 1) + _field(8, 1) + _field(9, 1)
        return addresses + file + has_symbols

    def tables(self) -> list[bytes]:
        """Return the locations, functions and strings; call it when all else is encoded."""
        fields = []
        for frame, location_id in self._locations.items():
            key = (frame.function, frame.file)
            function_id = self._functions.setdefault(key, len(self._functions) + 1)
            line = _field(1, function_id) + _field(2, frame.line)
            location = _field(1, location_id) + _field(2, 1) + _field(4, line)
            fields.append(_field(4, location))
        for (name, file), function_id in self._functions.items():
            names = _field(2, self.string(name)) + _field(4, self.string(file))
            fields.append(_field(5, _field(1, function_id) + names))
        fields += [_field(6, text.encode()) for text in self._strings]
        return fields


class Profile:
    """Values by thread and stack. Not thread-safe."""

    def __init__(self, value_types: ValueTypes, comment: str, seconds: float = 0.0) -> None:
        self._value_types = value_types
        self._comment = comment
        self._seconds = seconds
        self._samples: dict[tuple[str, Stack], Sequence[int]] = {}  # by a thread's name and its stack

    def add(self, thread_name: str, stack: Stack, values: Sequence[int]) -> None:
        """Add the values to those of the same thread and stack."""
        key = (thread_name, stack)
        previous = self._samples.get(key)
        if previous:
            values = [value + more for value, more in zip(previous, values)]
        self._samples[key] = values

    def text(self) -> str:
        """Return the stacks for people, the largest value first."""
        value_types = ", ".join(f"{name} ({unit})" for name, unit in self._value_types)
        lines = [self._comment, f"values: {value_types}", ""]
        samples = sorted(self._samples.items(), key=lambda item: item[1][-1], reverse=True)
        for (thread_name, stack), values in samples:
            lines.append(f"{' '.join(map(str, values))} @ {thread_name}")
            for frame in stack:
                lines.append(f"#\t{frame.function}\t{frame.file}:{frame.line}")
            lines.append("")
        return "\n".join(lines) + "\n"

    def encode(self) -> bytes:
        """Return a gzipped profile.proto (github.com/google/pprof/proto/profile.proto)."""
        import gzip

        encoder = _ProfileEncoder()
        value_types = [encoder.value_type(name, unit) for name, unit in self._value_types]
        fields = [_field(1, value_type) for value_type in value_types]
        for (thread_name, stack), values in self._samples.items():
            fields.append(_field(2, encoder.sample(thread_name, stack, values)))
        fields += [
            _field(3, encoder.mapping()),
            _field(9, time.time_ns()),
            _field(10, int(self._seconds * _SECOND_NS)),
            _field(11, value_types[-1]),
            _field(12, _PERIOD_NS),
            _field(13, encoder.string(self._comment)),
            _field(14, encoder.string(self._value_types[-1][0])),
        ]
        fields += encoder.tables()
        return gzip.compress(b"".join(fields), 6)


def _thread_names() -> dict[int, str]:
    return {thread.ident: thread.name for thread in threading.enumerate() if thread.ident}


def _walk(innermost: types.FrameType) -> Iterator[tuple[types.CodeType, int]]:
    """Yield code and line of a frame and of its callers."""
    frame: types.FrameType | None = innermost
    while frame:
        yield frame.f_code, frame.f_lineno or 0
        frame = frame.f_back


def _frame(code: types.CodeType, line: int) -> Frame:
    module = os.path.basename(code.co_filename).partition(".")[0]
    name = getattr(code, "co_qualname", code.co_name)  # Python 3.11
    return Frame(f"{module}.{name}", code.co_filename, line)


class Sampler:
    """Counts the stacks of all threads but the one that made it. Not thread-safe."""

    def __init__(self) -> None:
        self._own_thread = threading.get_ident()
        self._thread_names: dict[int, str] = {}
        self._codes: dict[int, types.CodeType] = {}  # by id: a code object is slow to hash
        self._counts: dict[_StackKey, list[int]] = {}  # how often, and for how many nanoseconds

    def run(self, seconds: float) -> None:
        """Sample 100 times a second, less often where there are so many threads that it would cost too much."""
        last_ns = time.perf_counter_ns()
        end_ns = last_ns + int(seconds * _SECOND_NS)
        pause_ns = _PERIOD_NS
        while last_ns < end_ns:
            time.sleep(min(pause_ns, end_ns - last_ns) / _SECOND_NS)
            now_ns = time.perf_counter_ns()
            cpu_ns = time.thread_time_ns()
            self.sample(now_ns - last_ns)
            last_ns = now_ns
            cost_ns = time.thread_time_ns() - cpu_ns
            pause_ns = max(_PERIOD_NS - cost_ns, cost_ns * _PAUSE_FACTOR)

    def sample(self, elapsed_ns: int = 0) -> None:
        """Count every stack once, with the time since the last sample."""
        for thread, frame in sys._current_frames().items():
            if thread != self._own_thread:
                counts = self._counts.setdefault(self._key(thread, frame), [0, 0])
                counts[0] += 1
                counts[1] += elapsed_ns

    def _key(self, thread: int, innermost: types.FrameType) -> _StackKey:
        if thread not in self._thread_names:
            self._thread_names.update(_thread_names())
        stack = []
        for code, line in _walk(innermost):
            self._codes[id(code)] = code
            stack.append((id(code), line))
        return self._thread_names.get(thread, _FOREIGN_THREAD), tuple(stack)

    def stacks(self) -> Iterator[tuple[str, Stack, list[int]]]:
        """Yield the thread's name, the frames, and how often and for how many nanoseconds they were seen."""
        for (thread_name, stack), counts in self._counts.items():
            frames = tuple(_frame(self._codes[code_id], line) for code_id, line in stack)
            yield thread_name, frames, counts


def profile_time(seconds: float) -> Profile:
    """Return where all threads are, whether they run or wait."""
    sampler = Sampler()
    sampler.run(seconds)
    profile = Profile(_SAMPLE_TYPES, "Python stacks of all threads, running or waiting.", seconds)
    for thread_name, stack, counts in sampler.stacks():
        profile.add(thread_name, stack, counts)
    return profile


def profile_threads() -> Profile:
    """Return the threads that live, by their stacks."""
    sampler = Sampler()
    sampler.sample()
    profile = Profile(_THREAD_TYPES, "Live threads, by stacks.")
    for thread_name, stack, counts in sampler.stacks():
        profile.add(thread_name, stack, counts[:1])
    return profile


def profile_memory(seconds: float) -> Profile:
    """Return what is allocated from now on and still there after these seconds; traced for that long alone."""
    import tracemalloc

    is_ours = not tracemalloc.is_tracing()  # else Python was started so
    if is_ours:
        tracemalloc.start(_HEAP_DEPTH)
    try:
        time.sleep(seconds)
        statistics = tracemalloc.take_snapshot().statistics("traceback")
    finally:
        if is_ours:
            tracemalloc.stop()
    comment = "Allocated while traced, and not freed; tracemalloc knows nothing of what is freed."
    profile = Profile(_HEAP_TYPES, comment, seconds)
    for statistic in statistics:
        stack = []
        for frame in reversed(statistic.traceback):
            function = f"{os.path.basename(frame.filename)}:{frame.lineno}"  # tracemalloc keeps no names of functions
            stack.append(Frame(function, frame.filename, frame.lineno))
        profile.add("", tuple(stack), (statistic.count, statistic.size))
    return profile


def empty_waits(_: float) -> Profile:
    return Profile(_WAIT_TYPES, _UNKNOWN_WAITS)


def _describe_thread(thread: threading.Thread | None) -> str:
    if thread is None:
        return _FOREIGN_THREAD
    kind = "daemon" if thread.daemon else "no daemon"
    return f"{thread.name}, {kind}"


def stacks_text() -> str:
    """Return the stack of every thread for people, the innermost frame first."""
    lines = []
    threads = {thread.ident: thread for thread in threading.enumerate()}
    for ident, innermost in sys._current_frames().items():
        lines.append(f"thread {ident} [{_describe_thread(threads.get(ident))}]:")
        for code, line in _walk(innermost):
            frame = _frame(code, line)
            lines += [frame.function, f"\t{frame.file}:{frame.line}"]
        lines.append("")
    return "\n".join(lines)


def _last_value(request: Request, name: str) -> str | None:
    """Return the last value of a parameter of the query."""
    values = [value for key, value in request.query if key == name]
    return values[-1] if values else None


def _debug_level(request: Request) -> int:
    text = _last_value(request, "debug")
    if text is None:
        return 0
    if text not in _DEBUG_LEVELS:
        raise BadRequest(f"debug: invalid level {text!r}: expected 0, 1 or 2")
    return int(text)


def _text_response(text: str) -> Response:
    """Return a text, with `?` for what UTF-8 cannot have: arguments and names of files may hold stray bytes."""
    return Response(headers=(TEXT_TYPE,), body=text.encode(errors="replace"))


def _profile_response(request: Request, profile: Profile) -> Response:
    if _debug_level(request):
        return _text_response(profile.text())
    return Response(headers=(_PROFILE_TYPE,), body=profile.encode())


class ProfileApi:
    """Handlers for the routes of pprof. Thread-safe; what takes time is taken once at a time."""

    def __init__(self, metrics: Metrics, max_ns: int) -> None:
        self._metrics = metrics
        self._max_s = max_ns / _SECOND_NS
        self._busy = threading.Lock()  # held while something is taken that takes time

    def routes(self) -> list[Route]:
        cmdline = _PPROF_PATH + "cmdline"
        symbol = _PPROF_PATH + "symbol"
        trace = _PPROF_PATH + "trace"
        return [
            Route("GET", _PPROF_PATH, self.show_index, "Lists the profiles", "Page"),
            Route("GET", cmdline, self.show_command_line, _PROFILES["cmdline"], "Text"),
            self._timed_route("profile", profile_time, _DEFAULT_PROFILE_S),
            self._instant_route("goroutine", self.show_threads),
            self._timed_route("heap", profile_memory, _DEFAULT_S),
            self._timed_route("allocs", profile_memory, _DEFAULT_S),
            self._instant_route("threadcreate", self.show_thread_starts),
            self._timed_route("block", empty_waits, _DEFAULT_S),
            self._timed_route("mutex", empty_waits, _DEFAULT_S),
            Route(
                "GET",
                trace,
                self.trace,
                _PROFILES["trace"],
                "Trace",
                ("seconds",),
                errors=(409,),
            ),
            Route("GET", symbol, self.show_symbols, _PROFILES["symbol"], "Text"),
            Route("POST", symbol, self.show_symbols, _PROFILES["symbol"], "Text", body="Addresses"),
        ]

    def _timed_route(
        self,
        name: str,
        take: Callable[[float], Profile],
        default_s: float,
    ) -> Route:
        handle = functools.partial(self._take, take=take, default_s=default_s)
        query = ("seconds", "debug")
        return Route(
            "GET",
            _PPROF_PATH + name,
            handle,
            _PROFILES[name],
            "Profile",
            query,
            errors=(409,),
        )

    def _instant_route(self, name: str, handle: Callable[[Request], Response]) -> Route:
        return Route("GET", _PPROF_PATH + name, handle, _PROFILES[name], "Profile", ("debug",))

    def show_index(self, _: Request) -> Response:
        rows = []
        for name, description in _PROFILES.items():
            level = _INDEX_DEBUG_LEVELS.get(name)
            link = f"{name}?debug={level}" if level else name
            rows.append((link, description))
        return page_response(profiles_page(rows), API_STYLE, "")

    def show_command_line(self, _: Request) -> Response:
        argv = getattr(sys, "orig_argv", None) or [sys.executable, *sys.argv]  # Python 3.10
        return _text_response("\0".join(argv))

    def show_threads(self, request: Request) -> Response:
        if _debug_level(request) == 2:
            return _text_response(stacks_text())
        return _profile_response(request, profile_threads())

    def show_thread_starts(self, request: Request) -> Response:
        return _profile_response(request, Profile(_THREAD_TYPES, _UNKNOWN_STARTS))

    def trace(self, request: Request) -> Response:
        seconds = self._seconds(request, _DEFAULT_TRACE_S)
        if request.method == "HEAD":
            return Response(headers=(JSON_TYPE,), body=())
        with self._exclusive():
            events = trace_events(self._metrics.trace(seconds))
        return Response(headers=(JSON_TYPE,), body=to_json(events).encode())

    def show_symbols(self, _: Request) -> Response:
        """Say that there are none to look up, as the symbol protocol of pprof has it: profiles come with names."""
        return _text_response("num_symbols: 0\n")

    def _take(
        self,
        request: Request,
        take: Callable[[float], Profile],
        default_s: float,
    ) -> Response:
        seconds = self._seconds(request, default_s)
        content_type = TEXT_TYPE if _debug_level(request) else _PROFILE_TYPE  # refused before the time is spent
        if request.method == "HEAD":
            return Response(headers=(content_type,), body=())
        with self._exclusive():
            profile = take(seconds)
        return _profile_response(request, profile)

    def _seconds(self, request: Request, default_s: float) -> float:
        """Return the `seconds` of the query; raise BadRequest where they are not within --profile_timeout."""
        text = _last_value(request, "seconds")
        if text is None:
            return min(default_s, self._max_s)
        seconds = float(text) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) else 0.0
        if not 0 < seconds <= self._max_s:
            limit = f"{self._max_s:g} (--profile_timeout)"
            raise BadRequest(f"seconds: {text!r} is out of range: expected more than 0, up to {limit}")
        return seconds

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Raise Conflict while another profile or trace is being taken."""
        if not self._busy.acquire(blocking=False):
            raise Conflict("another profile or trace is being taken; wait for its end")
        try:
            yield
        finally:
            self._busy.release()


def profile_components() -> Components:
    """Return what the API document says of the routes of profiles."""
    seconds = {"type": "number", "exclusiveMinimum": 0}
    debug = {"type": "string", "enum": [*_DEBUG_LEVELS], "default": "0"}
    parameters: dict[str, ParameterSpec] = {
        "seconds": ("Duration; at most --profile_timeout", seconds, "5"),
        "debug": ("1: as text; 2: of goroutine, as text with whole stacks", debug, "1"),
    }
    events = array_schema({"type": "object"})
    trace = object_schema({"traceEvents": events, "displayTimeUnit": {"const": "ms"}})
    description = "A gzipped profile.proto, for `go tool pprof` and speedscope; text where `debug` is set"
    addresses = {"schema": {"type": "string"}, "example": "0x7f0000000000+0x7f0000000010"}
    return Components(
        parameters=parameter_objects("query", parameters),
        request_bodies={"Addresses": {"content": {"text/plain": addresses, "application/octet-stream": addresses}}},
        responses={
            "Text": text_response_object("Text", "text/plain"),
            "Profile": text_response_object(description, _PROFILE_TYPE[1], "text/plain"),
            "Trace": response_object("In the Trace Event Format, which Perfetto opens", trace),
        },
        schemas={},
    )


# ======================================================================================================================
# V API / API document: OpenAPI, assembled from the routes and from what their sections say of them
# ======================================================================================================================

_ERRORS = {  # by status: when it is answered, and an example of its message
    400: (
        "The request is malformed.",
        "[0]: Key: 'PostStruct.CommandType' Error:Field validation for 'CommandType' failed on the 'required' tag",
    ),
    401: ("A token is missing or wrong.", "send `Authorization: Bearer ...` with a token of the daemon"),
    403: (
        "The request comes from a page of another origin.",
        "pages of other sites may not call this; --cors_origin allows one",
    ),
    404: ("The workspace has no such entry.", "not found in the workspace: dist/app.tar"),
    413: ("The body is too large.", "the body has 16777217 bytes; at most 16777216 are taken (--max_body)"),
    415: (
        "The body is a form.",
        "a form is not stored: send the bytes of the file, as curl -T does",
    ),
    416: ("The file has no such bytes.", "no byte of 'bytes=10-' is there: it has 10 bytes"),
    429: (
        "Too many requests; try again later.",
        "8 requests are in work, the most that --max-requests allows; try again",
    ),
    500: ("The daemon failed.", "the daemon failed; its log says how"),
    503: ("Temporarily unavailable.", "the daemon is ending; send the task again to the next one"),
    409: (
        "In conflict with an existing task, with what a workspace holds, or with a profile that is being taken.",
        "id 'a' already belongs to a different task; use another id",
    ),
    507: ("The disk is full.", "no space left on the disk of --root; free some or choose another --root"),
}
_ERRORS_OF_EVERY_ROUTE = (400, 401, 403, 413, 429, 500, 503)
_ERROR_HEADERS = {401: "WWW-Authenticate", 429: "Retry-After", 503: "Retry-After"}
_DESCRIPTION = (
    "Runs scripts on this host: tasks of steps, in order, in parallel or as a graph. The `code` of a response is "
    "0 for success, 1001 in progress, 1002 execution failed, 1003 not found, expired or destroyed, else the status of "
    "an error: 404 for a path that does not exist, 405 for a method that is not allowed on a path, and those below. "
    "HEAD is answered wherever GET is."
)
_TAGS = {  # by how the paths begin; all others are "daemon"
    "/api/v1/task": "tasks",
    "/api/v1/event": "tasks",
    "/api/v1/pool": "pool",
    "/debug/": "profiles",
    "/swagger": "document",
}


def _tag(template: str) -> str:
    for prefix, tag in _TAGS.items():
        if template.startswith(prefix):
            return tag
    return "daemon"


def _error_name(status: int) -> str:
    return f"Refused{status}"


def _error_response(status: int) -> Json:
    description, message = _ERRORS[status]
    example = {"code": status, "message": message}
    header = _ERROR_HEADERS.get(status, "")
    return response_object(description, envelope_schema([status]), {"refused": example}, header)


def _operation_id(route: Route) -> str:
    """Return a name that is no other's, in whatever case a generator of clients writes its words."""
    endpoint = route.method.lower() + route.template.replace("}", "")
    if endpoint.endswith("/"):
        endpoint += "index"
    return re.sub(r"\W+", "_", endpoint)


def _operation(route: Route) -> Json:
    parameters = [*re.findall(r"{(\w+)}", route.template), *route.query]
    success = "302" if route.answer == "Redirect" else "200"
    responses = {success: reference("responses", route.answer)}
    if 416 in route.errors:
        responses["206"] = reference("responses", "PartialFile")
    if route.answer == "File":
        responses["304"] = reference("responses", "NotModified")
    for status in sorted((*_ERRORS_OF_EVERY_ROUTE, *route.errors)):
        responses[str(status)] = reference("responses", _error_name(status))
    operation: Json = {
        "operationId": _operation_id(route),
        "summary": route.summary,
        "tags": [_tag(route.template)],
        "responses": responses,
    }
    if parameters:
        operation["parameters"] = [reference("parameters", name) for name in parameters]
    if route.body:
        operation["requestBody"] = reference("requestBodies", route.body)
    if route.is_public:
        operation["security"] = [{}]
    return operation


def document_components() -> Components:
    """Return what the API document says of its own routes."""
    location = {"schema": {"type": "string"}}
    return Components(
        parameters={},
        request_bodies={},
        responses={
            "Document": response_object("This document", {"type": "object"}),
            "Page": text_response_object("A page", "text/html"),
            "Redirect": {"description": "To the page", "headers": {"Location": location}},
        },
        schemas={},
    )


def _components() -> Json:
    document: Json = {
        "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "description": "See --token_file."}},
        "parameters": {},
        "requestBodies": {},
        "responses": {_error_name(status): _error_response(status) for status in _ERRORS},
        "schemas": {},
    }
    parts = (
        task_components(),
        follow_components(),
        workspace_components(),
        operator_components(),
        profile_components(),
        document_components(),
    )
    for part in parts:
        document["parameters"].update(part.parameters)
        document["requestBodies"].update(part.request_bodies)
        document["responses"].update(part.responses)
        document["schemas"].update(part.schemas)
    return document


def api_document(routes: Iterable[Route], prefix: str) -> Json:
    """Return the OpenAPI 3.1 document of these routes, to whose paths a proxy may add a prefix."""
    paths: dict[str, Json] = {}
    for route in routes:
        operations = paths.setdefault(route.template, {})
        operations[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "remote_executor",
            "version": __version__,
            "description": _DESCRIPTION,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": prefix + "/"}],
        "security": [{}, {"token": []}],
        "paths": paths,
        "components": _components(),
    }


class DocumentApi:
    """Handlers for the document of all routes and for the page that shows it. Thread-safe."""

    def __init__(self, other_routes: Sequence[Route]) -> None:
        self._other_routes = other_routes

    def routes(self) -> list[Route]:
        document = self.show_document
        page = "/swagger/index.html"
        redirect = self.redirect_to_page
        return [
            Route("GET", "/openapi.json", document, "Shows this document", "Document"),
            Route("GET", "/swagger/doc.json", document, "Shows this document", "Document"),
            Route("GET", page, self.show_page, "Shows this document as a page", "Page", is_public=True),
            Route("GET", "/swagger/", redirect, "Redirects to the page", "Redirect", is_public=True),
            Route("GET", "/swagger", redirect, "Redirects to the page", "Redirect", is_public=True),
        ]

    def show_document(self, request: Request) -> Response:
        document = api_document([*self._other_routes, *self.routes()], request.forwarded.prefix)
        return Response(headers=(JSON_TYPE,), body=to_json(document).encode())

    def show_page(self, _: Request) -> Response:
        return page_response(API_PAGE, API_STYLE, API_SCRIPT)

    def redirect_to_page(self, request: Request) -> Response:
        """Lead to the page by a relative reference, which holds behind a proxy too (RFC 9110, 10.2.2)."""
        location = "swagger/index.html" if request.segments[-1] else "index.html"
        return Response(302, (("Location", location),))


# ======================================================================================================================
# VI program / daemon: wiring, start, periodic checks, signals, shutdown
# ======================================================================================================================


_EXIT_SIGNAL_NAMES = ("SIGINT", "SIGTERM", "SIGBREAK")  # the last one is of Windows
_EXIT_SIGNALS = [getattr(signal, name) for name in _EXIT_SIGNAL_NAMES if hasattr(signal, name)]
_POLL_INTERVAL_S = 0.5
_EVERY_ADDRESS = ("", "0.0.0.0", "::")


URL_FILE = "url"  # in the root while the daemon serves


class Supervisor:
    """What started the daemon and watches it; this one stands for nobody. Called by the thread that runs the daemon."""

    def ready(self, url: str) -> None:
        """Report that the daemon serves requests."""

    def ping_watchdog(self, is_healthy: Callable[[], bool]) -> None:
        """Report that all of the daemon works, unless `is_healthy` denies it. Called twice a second."""

    def stopping(self) -> None:
        """Report that the daemon shuts down; called again while that takes long."""


class _TaskParts(NamedTuple):
    """The parts of the daemon that work on tasks."""

    store: Store
    metrics: Metrics
    clock: Clock
    files: SafeDirectory
    scheduler: Scheduler
    runner: Runner
    recovery: Recovery
    janitor: Janitor


def _is_healthy(tasks: _TaskParts, server: Server) -> bool:
    """Return whether the daemon's threads live; hang when the scheduler's lock is never released.

    A passing shortage, of threads or of disk space, is not a failure: a restart would not help.
    """
    tasks.scheduler.pool()
    return tasks.store.is_alive() and tasks.janitor.is_alive() and server.is_alive()


def _capacity_warning(capacity: StepCapacity, scheduler: Scheduler) -> str:
    """Return that the pool is larger than what the limits of this host allow, and what to do; empty when it is not."""
    size = scheduler.pool().size
    steps, limit = capacity
    if not limit or size <= steps:
        return ""
    return (
        f"--pool_size: {size} steps at once are too many here: {limit.name} is {limit.value}, which lets "
        f"{steps} run; raise that limit, or lower --pool_size{limit.also}"
    )


def _log_uncaught_exception(uncaught: Any) -> None:
    """Log what ended a thread; for `threading.excepthook`, which would write to standard error itself."""
    name = uncaught.thread.name if uncaught.thread else "unknown"
    exc_info = (uncaught.exc_type, uncaught.exc_value, uncaught.exc_traceback)
    with contextlib.suppress(MemoryError):  # of logging; the thread has ended anyway
        log.critical("the thread %s has ended", name, exc_info=exc_info)


def _ignore_signals(numbers: Iterable[int]) -> None:
    """Ignore these signals from now on, and what CPython reports of one that arrived just before."""
    hook = sys.unraisablehook

    def drop_signal_races(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not isinstance(error, OSError) or "race condition" not in str(error):
            hook(unraisable)

    sys.unraisablehook = drop_signal_races
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def _unlink_if_there(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _resolve_root(path: str) -> str:
    """Return the root's absolute path; a link at its end, which the root must not be, stays. Raise StartupError."""
    parent, name = os.path.split(os.path.abspath(path))
    try:
        return os.path.join(os.path.realpath(parent), name)
    except OSError as error:  # such as a name of a device of Windows
        raise StartupError(f"--root: {path} cannot be used: {error.strerror or error}; choose a directory") from None


class Daemon:
    """The whole program: builds and starts its parts, checks on them, and stops them in reverse order.

    One thread calls `run`; any thread may call `request_shutdown`.
    """

    def __init__(self, settings: Settings, supervisor: Supervisor) -> None:
        self._settings = settings
        self._supervisor = supervisor
        self._root = _resolve_root(settings.root)
        self._shutdown_requests = 0
        self._exit_code = 0
        # A byte wakes `run`; a signal writes one too. No Event: set() would hang in a signal handler that interrupts
        # wait(), and on Windows no signal interrupts it.
        self._wakeup_sender: socket.socket | None = None
        self._tls = Tls(settings) if settings.tls_cert else None
        self._must_reload = False
        self._ends_with_terminal = False
        self._token_rule = ""
        self._reserve = DescriptorReserve()
        self._periodic_checks: list[Callable[[], None]] = []
        self._error_stream: QueuedStreamHandler | None = None
        self._log_file: LogFile | None = None

    def run(self) -> int:
        """Serve until a shutdown is requested; return the exit code. Raise StartupError."""
        self._configure_log()
        try:
            with contextlib.ExitStack() as closing:
                self._serve(closing)
            log.info("ended")
        finally:
            if self._error_stream:
                self._error_stream.flush()  # what is printed next, such as why it ends, comes behind it
        return self._exit_code

    def request_shutdown(self) -> None:
        """Shut down in order; a second request ends the wait for running steps."""
        self._shutdown_requests += 1
        if self._wakeup_sender:
            with contextlib.suppress(OSError):  # the bytes in it are enough to wake `run`; or it has ended
                self._wakeup_sender.send(b"\0")

    def _serve(self, closing: contextlib.ExitStack) -> None:
        receiver, sender = socket.socketpair()
        receiver.settimeout(_POLL_INTERVAL_S)
        sender.setblocking(False)
        closing.callback(receiver.close)
        closing.callback(sender.close)
        self._wakeup_sender = sender
        if threading.current_thread() is threading.main_thread():
            self._install_signal_handlers(closing, sender.fileno())
        try:
            url = self._start(closing)
        except (ApiError, OSError) as error:  # of the store and of the root's files
            raise StartupError(f"--root: {self._root} cannot be used: {error}") from error
        self._leave_url(url, closing)
        self._print_ready(url)
        self._log_start(url)
        self._supervisor.ready(url)
        while not self._shutdown_requests:
            with contextlib.suppress(socket.timeout):  # the time of the next checks
                receiver.recv(4096)
            self._run_periodic_checks()
        self._supervisor.stopping()

    def _run_periodic_checks(self) -> None:
        for check in self._periodic_checks:
            try:
                check()
            except Exception:
                with contextlib.suppress(MemoryError):  # of logging; the other checks have to be made
                    log.exception("a periodic check failed; the daemon goes on")

    def _local_url(self, url: str) -> str:
        """Return the URL by which a client on this host reaches the daemon."""
        host, _ = parse_address(self._settings.addr)
        if host not in _EVERY_ADDRESS:
            return url
        scheme, _, authority = url.partition("://")
        port = authority.rpartition(":")[2]
        return f"{scheme}://localhost:{port}"  # 0.0.0.0 is no name that needs no token

    def _leave_url(self, url: str, closing: contextlib.ExitStack) -> None:
        """Leave the URL in the root, for clients of this user on this host, until `closing` is closed."""
        path = os.path.join(self._root, URL_FILE)
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(self._local_url(url) + "\n")
        except OSError as error:
            log.warning("%s cannot be written: %s", path, error)
            return
        closing.callback(_unlink_if_there, path)

    def _log_start(self, url: str) -> None:
        """Log where the daemon listens, where its data lies, who needs a token, and how to go on."""
        authority = url.partition("://")[2]
        host, _ = parse_address(self._settings.addr)
        address = f"on {authority}"
        if host in _EVERY_ADDRESS:
            port = authority.rpartition(":")[2]
            address = f"on every address of this host, port {port}"
            url = self._local_url(url)
        log.info("%s listens %s", version_line(), address)
        advice = ""
        if is_temporary(self._root):
            advice = ", a temporary directory: --root keeps it in another one"
        log.info("its data is in %s%s", self._root, advice)
        if self._token_rule:
            log.info("%s", self._token_rule)
        log.info("to go on: open %s/swagger/index.html in a browser", url)

    def _print_ready(self, url: str) -> None:
        """Print that the port is open, in a thread: whoever started the daemon need not read it."""
        if not sys.stdout:
            return
        results: list[bool] = []
        stream = QueuedStreamHandler(sys.stdout)
        printer = DaemonThread(lambda: results.append(stream.write(f"listening on {url}")), "ready line")
        printer.start()
        printer.join(_FLUSH_S)
        if results != [True]:
            log.warning("standard output cannot be written")

    # -- signals

    def _install_signal_handlers(self, closing: contextlib.ExitStack, wakeup_fd: int) -> None:
        """Handle signals until `closing` is closed; after that none disturbs the end of the process, which is near."""
        hangup = getattr(signal, "SIGHUP", None)  # Windows has none
        if hangup:
            self._ends_with_terminal = signal.getsignal(hangup) is not signal.SIG_IGN and has_terminal()  # not by nohup
        reset_inherited_signals()
        handlers: dict[int, Callable[..., None]] = dict.fromkeys(_EXIT_SIGNALS, self._handle_exit_signal)
        if hangup:
            handlers[hangup] = self._handle_hangup_signal
        signal.set_wakeup_fd(wakeup_fd, warn_on_full_buffer=False)
        closing.callback(signal.set_wakeup_fd, -1, warn_on_full_buffer=False)
        closing.callback(_ignore_signals, handlers)
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def _handle_exit_signal(self, *_: object) -> None:
        self._shutdown_requests += 1  # the byte that wakes `run` was written already

    def _handle_hangup_signal(self, *_: object) -> None:
        self._must_reload = True

    # -- start: the wiring

    def _start(self, closing: contextlib.ExitStack) -> str:
        """Build and start all parts, return the URL; `closing` stops them. Raise StartupError, ApiError and OSError."""
        settings = self._settings
        steps_umask = set_private_umask()
        if self._tls:
            self._tls.load()
        self._open_root(closing)
        steps_fd_limit = self._prepare_process()
        capacity = step_capacity(descriptor_limit(), process_limits(), settings.max_connections)

        metrics = Metrics()
        store = Store(os.path.join(self._root, "remote_executor.db"), metrics.commit)
        store.start()
        closing.callback(store.stop)
        processes = Processes(steps_umask, steps_fd_limit, self._reserve)
        tasks = self._build_task_parts(store, metrics, processes, capacity.steps)

        root_watch = RootWatch(self._root, has_token=settings.token_file.startswith("$ROOT"))
        warnings = self._health_warnings(tasks, capacity, root_watch)
        router = self._build_router(tasks, warnings)
        authenticator = Authenticator(settings, self._root, self._reserve)
        server = Server(settings, router, authenticator, metrics, self._tls, self._reserve)
        closing.callback(server.stop)
        server.open()
        authenticator.start()
        self._token_rule = authenticator.rule()

        self._start_task_parts(tasks, closing)
        server.start()
        self._start_periodic_checks(tasks, server, authenticator, root_watch)
        for warning in filter(None, (_capacity_warning(capacity, tasks.scheduler), job_warning())):
            log.warning("%s", warning)
        return f"{server.scheme}://{server.authority}"

    def _open_root(self, closing: contextlib.ExitStack) -> None:
        """Create and lock the root, which is this daemon's alone, and begin to log to a file in it."""
        make_private_directory(self._root)
        closing.callback(os.close, lock_file(os.path.join(self._root, "lock")))
        directory = lock_directory(self._root)
        if directory is not None:
            closing.callback(os.close, directory)
        self._log_to(os.path.join(self._root, "logs"))

    def _prepare_process(self) -> str:
        """Free this process of what its launcher left in it; return the limit of open files that steps get."""
        set_inherited_fds_cloexec()
        clean_pyinstaller_env()
        steps_fd_limit = raise_fd_limit()
        self._reserve.fill()
        return steps_fd_limit

    def _build_task_parts(
        self,
        store: Store,
        metrics: Metrics,
        processes: Processes,
        capacity: int,
    ) -> _TaskParts:
        settings = self._settings
        clock = Clock.resume(store.metadata(), store.latest_ns(), boot_id())
        store.save_metadata(clock.metadata())
        files = SafeDirectory(os.path.join(self._root, "tasks"))
        scheduler = Scheduler(
            store,
            clock,
            settings.pool_size,
            capacity,
            lambda task_number: runner.remove_empty_workspace(task_number),  # made below, for it needs the scheduler
        )
        scheduler.restore_pool(store.metadata(), with_size="pool_size" not in settings.given)
        runner = Runner(store, scheduler, processes, clock, files, settings, metrics)
        recovery = Recovery(store, scheduler, processes, clock, files, runner)
        janitor = Janitor(store, scheduler, processes, clock, files, settings)
        return _TaskParts(store, metrics, clock, files, scheduler, runner, recovery, janitor)

    def _health_warnings(
        self,
        tasks: _TaskParts,
        capacity: StepCapacity,
        root_watch: RootWatch,
    ) -> list[Callable[[], str]]:
        """Return the functions whose texts, where not empty, are the warning of /healthyz."""
        insecure_warning = "--insecure: authentication is disabled" if self._settings.insecure else ""
        return [
            tasks.store.warning,
            lambda: insecure_warning,
            functools.lru_cache(job_warning),
            functools.partial(_capacity_warning, capacity, tasks.scheduler),
            lambda: tasks.scheduler.scarcity,
            tasks.scheduler.pause_warning,
            root_watch.warning,
        ]

    def _build_router(self, tasks: _TaskParts, warnings: Sequence[Callable[[], str]]) -> Router:
        settings = self._settings
        store = tasks.store
        scheduler = tasks.scheduler
        clock = tasks.clock
        task_api = TaskApi(
            store,
            scheduler,
            clock,
            tasks.files,
            settings.key_expire,
            tasks.janitor.remove_files,
        )
        follow_api = FollowApi(store, scheduler, clock, tasks.files, settings.key_expire)
        workspace_api = WorkspaceApi(store, tasks.files)
        operator_api = OperatorApi(store, scheduler, clock, tasks.metrics, self._root, warnings)
        profile_api = ProfileApi(tasks.metrics, settings.profile_timeout)
        apis = (task_api, follow_api, workspace_api, operator_api, profile_api)
        routes = list(itertools.chain.from_iterable(api.routes() for api in apis))
        document_api = DocumentApi(routes)
        return Router([*routes, *document_api.routes()])

    def _start_task_parts(self, tasks: _TaskParts, closing: contextlib.ExitStack) -> None:
        """Recover the tasks of an earlier daemon, then let steps start."""
        closing.callback(tasks.janitor.stop)
        closing.callback(self._end_steps, tasks.scheduler)
        strays = tasks.recovery.run()
        runner = tasks.runner
        tasks.scheduler.start(runner.run, runner.clean_up, runner.copy_files)
        tasks.janitor.start(strays)

    # -- while it runs

    def _start_periodic_checks(
        self,
        tasks: _TaskParts,
        server: Server,
        authenticator: Authenticator,
        root_watch: RootWatch,
    ) -> None:
        is_healthy = functools.partial(_is_healthy, tasks, server)
        root_watch.look()
        self._periodic_checks = [
            self._reserve.fill,
            functools.partial(self._reload, authenticator),
            root_watch.look,
            server.fill_reserve,
            functools.partial(self._check_threads, is_healthy),
            functools.partial(self._supervisor.ping_watchdog, is_healthy),
        ]

    def _reload(self, authenticator: Authenticator) -> None:
        """Open the log file and read tokens and certificates again after SIGHUP; end if it came of a lost terminal."""
        if not self._must_reload:
            return
        self._must_reload = False
        if self._ends_with_terminal and not has_terminal():
            log.info("the terminal is gone")
            self._shutdown_requests += 1
            return
        if self._log_file:
            self._log_file.reopen()
        authenticator.reload()
        log.info("SIGHUP: the log file is opened again, the tokens are read again")
        if self._tls:
            self._reload_certificates(self._tls)

    def _reload_certificates(self, tls: Tls) -> None:
        try:
            tls.load()
            log.info("certificates reloaded")
        except StartupError as error:
            log.error("certificates not reloaded, the previous ones stay in use: %s", error)

    def _check_threads(self, is_healthy: Callable[[], bool]) -> None:
        """Shut down when a thread is dead: the next start recovers everything, as after a crash."""
        if self._shutdown_requests or is_healthy():
            return
        log.critical("a thread of the daemon has ended: exiting with code 1; the next start adopts running steps")
        self._exit_code = 1
        self._shutdown_requests += 1

    # -- end

    def _end_steps(self, scheduler: Scheduler) -> None:
        """Do with the running steps what --on_exit says."""
        on_exit = self._settings.on_exit
        scheduler.close()
        if on_exit == "stop":
            scheduler.stop_running()
        if on_exit != "leave":
            while scheduler.pool().running and self._shutdown_requests < 2:
                self._supervisor.stopping()
                time.sleep(_POLL_INTERVAL_S / 10)
        running = scheduler.pool().running
        if running and on_exit != "stop":
            noun = "step" if running == 1 else "steps"
            log.warning("%d %s left running; the next start adopts them", running, noun)
        scheduler.stop()

    # -- log

    def _configure_log(self) -> None:
        level = logging.DEBUG if self._settings.debug else logging.INFO
        log.setLevel(level)
        log.propagate = False
        threading.excepthook = _log_uncaught_exception
        if sys.stderr:  # a Windows service has none
            self._error_stream = QueuedStreamHandler(sys.stderr)
            self._error_stream.start()
            self._add_log_handler(self._error_stream)

    def _log_to(self, directory: str) -> None:
        with contextlib.suppress(OSError):  # it is there, or it cannot be made, of which LogFile warns
            os.mkdir(directory)
        self._log_file = LogFile(os.path.join(directory, "remote_executor.log"))
        self._add_log_handler(self._log_file)

    def _add_log_handler(self, handler: logging.Handler) -> None:
        formatter: logging.Formatter = LineFormatter("%(asctime)s %(levelname)s %(message)s")
        if self._settings.log_format == "json":
            formatter = JsonFormatter()
        elif handler is self._error_stream and is_journal(sys.stderr):
            formatter = JournalFormatter("%(levelname)s %(message)s")
        handler.setFormatter(formatter)
        log.addHandler(handler)


# ======================================================================================================================
# VI program / supervisors: what starts the daemon and watches it
# ======================================================================================================================

SERVICE = "remote_executor"  # its name for every service manager
_STATE_CHANGE_S = 60.0  # that a service manager waits for the start, and for each stage of the end
WINDOWS_SERVICE_ROOT = os.path.join(os.environ.get("PROGRAMDATA", r"C:\ProgramData"), "remote_executor")
FAILED_START = "did not start: "  # in the log of a service of Windows, before the reason


class SystemdSupervisor(Supervisor):
    """systemd, over its socket (sd_notify(3), sd_watchdog_enabled(3)); without systemd it does nothing."""

    def __init__(self, address: str, watchdog_us: int) -> None:
        self._address = address
        self._ping_interval_s = watchdog_us / 2e6  # half the timeout, as the manual recommends; 0 for never
        self._last_ping_s = 0.0  # of time.monotonic()
        self._sock: socket.socket | None = None  # kept open: for lack of a descriptor systemd would kill the daemon

    @classmethod
    def from_environ(cls) -> SystemdSupervisor:
        """Return the one that the environment names; remove its variables, which are not meant for the steps."""
        address = os.environ.pop("NOTIFY_SOCKET", "")
        watchdog_us = os.environ.pop("WATCHDOG_USEC", "")
        watchdog_pid = os.environ.pop("WATCHDOG_PID", "")
        is_for_us = watchdog_pid in ("", str(os.getpid()))
        if not is_for_us or not watchdog_us.isdigit():
            watchdog_us = "0"
        address = re.sub("^@", "\0", address)  # a socket in the abstract namespace, unix(7)
        return cls(address, int(watchdog_us))

    def ready(self, url: str) -> None:
        self._notify(f"READY=1\nSTATUS=listening on {url}")

    def ping_watchdog(self, is_healthy: Callable[[], bool]) -> None:
        if not self._ping_interval_s:
            return
        now_s = time.monotonic()
        if now_s - self._last_ping_s < self._ping_interval_s - _POLL_INTERVAL_S:
            return
        if is_healthy() and self._notify("WATCHDOG=1"):
            self._last_ping_s = now_s

    def stopping(self) -> None:
        timeout_us = int(_STATE_CHANGE_S * 1e6)
        self._notify(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={timeout_us}")

    def _notify(self, state: str) -> bool:
        """Return False when systemd did not take it."""
        if not self._address:
            return True
        try:
            if not self._sock:
                self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._sock.setblocking(False)
            self._sock.sendto(state.encode(), self._address)
        except OSError:  # such as a full queue; a ping is tried again half a second later
            return False
        return True


class _RefusedDaemon:
    """Stands for a daemon whose command line is wrong."""

    def __init__(self, error: UsageError) -> None:
        self._error = error

    def run(self) -> int:
        """Raise the UsageError."""
        raise self._error

    def request_shutdown(self) -> None:
        """Do nothing: it ends by itself."""


class WindowsSupervisor(Supervisor):
    """The service control manager, whose own threads call `_serve` and `_control` (Service Functions, MSDN)."""

    def __init__(self, make_daemon: Callable[[Supervisor], Daemon | _RefusedDaemon], root: str) -> None:
        self._daemon = make_daemon(self)
        self._root = root
        self._main = ServiceMain(self._serve)  # kept here, because the system keeps no reference
        self._handler = ServiceHandler(self._control)
        self._handle = 0
        self._status = ServiceStatus(ServiceType=SERVICE_WIN32_OWN_PROCESS)
        self._exit_code = 0

    def run(self) -> int | None:
        """Serve as a service; return the exit code, None when the service control manager did not start this process.

        Raise StartupError.
        """
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
        """Run the daemon in the service's own thread.

        A crash ends the process while the service still counts as running: the manager then starts it again.
        """
        self._handle = RegisterServiceCtrlHandlerExW(SERVICE, self._handler, None)
        self._report(SERVICE_START_PENDING)
        try:
            self._exit_code = self._daemon.run()
        except (StartupError, UsageError) as error:
            self._exit_code = 2 if isinstance(error, UsageError) else 1
            _log_failed_start(self._root, str(error))
            register_event_source()
            print_error(str(error))
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
        status = self._status
        status.CurrentState = state
        if state in (SERVICE_START_PENDING, SERVICE_STOP_PENDING):
            status.CheckPoint += 1
            status.WaitHint = int(_STATE_CHANGE_S * 1000)
        else:
            status.CheckPoint = 0
            status.WaitHint = 0
        status.ControlsAccepted = 0
        if state == SERVICE_RUNNING:
            status.ControlsAccepted = SERVICE_ACCEPT_STOP | SERVICE_ACCEPT_PRESHUTDOWN
        status.Win32ExitCode = ERROR_SERVICE_SPECIFIC_ERROR if self._exit_code else 0
        status.ServiceSpecificExitCode = self._exit_code
        with contextlib.suppress(OSError):  # the manager is gone; the daemon is not its child
            SetServiceStatus(self._handle, ctypes.byref(status))


def _started_by_scm() -> bool:
    """Return whether the service control manager started this process, or its launcher, as an exe and a venv have one.

    The manager itself knows for certain, but may take ten seconds to say no.
    """
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for pid, parent_pid, name in list_processes():
        parents[pid] = parent_pid
        names[pid] = name
    parent = parents.get(os.getpid(), 0)
    grandparent = parents.get(parent, 0)
    return "services.exe" in (names.get(parent), names.get(grandparent))


def run_supervised(settings: Settings) -> int:
    """Run the daemon under whatever started it; return the exit code. Raise StartupError."""
    if not ON_WINDOWS:
        return Daemon(settings, SystemdSupervisor.from_environ()).run()
    code = WindowsSupervisor(functools.partial(Daemon, settings), settings.root).run()
    if code is None:
        code = Daemon(settings, Supervisor()).run()
    return code


def report_wrong_service(error: UsageError, root: str) -> bool:
    """Report a wrong command line to the service control manager; return False where that did not start this process.

    Otherwise the manager would say no more than that the service did not respond (error 1053).
    """
    if not ON_WINDOWS:
        return False
    return WindowsSupervisor(lambda _: _RefusedDaemon(error), root or WINDOWS_SERVICE_ROOT).run() is not None


def log_path(root: str) -> str:
    """Return the log of a daemon with this root."""
    return os.path.join(root, "logs", "remote_executor.log")


def _log_failed_start(root: str, reason: str) -> None:
    """Log why a service of Windows did not start: in its root, in the default one where that cannot be used."""
    if not any(isinstance(handler, LogFile) for handler in log.handlers):
        for directory in (root, WINDOWS_SERVICE_ROOT):
            with contextlib.suppress(StartupError, OSError):  # the event log has the reason too
                make_private_directory(directory)
                os.makedirs(os.path.dirname(log_path(directory)), exist_ok=True)
                handler = LogFile(log_path(directory))
                handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
                log.addHandler(handler)
                break
    log.critical("%s%s", FAILED_START, reason)


_EVENT_SOURCE_KEY = rf"SYSTEM\CurrentControlSet\Services\EventLog\Application\{SERVICE}"
# EventCreate.exe of the system has the messages 1 to 1000, each of them "%1" (eventcreate, "/id"; Event Sources, MSDN).
_EVENT_MESSAGES = r"%SystemRoot%\System32\EventCreate.exe"
_EVENT_ID = 1


def register_event_source() -> None:
    """Register what makes our texts show in the event log, where this user may."""
    if sys.platform == "win32":
        import winreg

        with contextlib.suppress(OSError), winreg.CreateKey(winreg.HKEY_LOCAL_MACHINE, _EVENT_SOURCE_KEY) as key:
            winreg.SetValueEx(key, "EventMessageFile", 0, winreg.REG_EXPAND_SZ, _EVENT_MESSAGES)
            winreg.SetValueEx(key, "TypesSupported", 0, winreg.REG_DWORD, 7)  # error, warning, information


def unregister_event_source() -> None:
    """Remove what `register_event_source` has registered."""
    if sys.platform == "win32":
        import winreg

        with contextlib.suppress(OSError):  # it is not there
            winreg.DeleteKey(winreg.HKEY_LOCAL_MACHINE, _EVENT_SOURCE_KEY)


def print_error(text: str) -> None:
    """Print a line to standard error, or to the event log of Windows where there is none."""
    if sys.stderr:
        print(f"{SERVICE}: {text}", file=sys.stderr)
    elif ON_WINDOWS:
        strings = ctypes.byref(_TEXT(text))  # an array of one
        with contextlib.suppress(OSError):  # no place is left to report it
            source = RegisterEventSourceW(None, SERVICE)
            ReportEventW(source, EVENTLOG_ERROR_TYPE, 0, _EVENT_ID, None, 1, 0, strings, None)
            DeregisterEventSource(source)


def print_json(value: Any, indent: int | None = 2) -> None:
    """Print a value as JSON, in UTF-8 whatever the encoding of standard output is; on one line without an indent."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # of a lone surrogate makes JSON's escape
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=indent) + "\n")  # in one piece, of several threads


def own_command() -> list[str]:
    """Return the command that runs this program: a frozen one, a zipapp or a file."""
    if getattr(sys, "frozen", False):
        return [sys.executable]
    path = os.path.abspath(__file__)
    while not os.path.isfile(path):  # within a zipapp
        path = os.path.dirname(path)
    python = sys.executable
    if ON_WINDOWS:
        # The python.exe of a virtual environment only starts another one, which is not the service's process.
        python = getattr(sys, "_base_executable", python)
    return [python, path]


def leave_step() -> None:
    """Execute this program anew without the marker of the step that started it, whose stop would end the daemon too.

    The kernel shows the environment that a program began with, whatever it makes of it (proc_pid_environ(5)). A signal
    to the step's group must not reach the daemon either.
    """
    if ON_WINDOWS or STEP_ENV_VAR not in os.environ:
        return
    environment = {**os.environ, DAEMON_ENV_VAR: "1"}
    del environment[STEP_ENV_VAR]
    detach()
    command = [*own_command(), *sys.argv[1:]]
    with contextlib.suppress(
        OSError
    ):  # the program has been replaced meanwhile: better with the marker than not at all
        os.execve(command[0], command, environment)


# ======================================================================================================================
# VI program / service managers: systemd, launchd, Windows' services
# ======================================================================================================================

_SERVICE_TITLE = "Remote executor"
_LOG_LINES = 100  # that `service logs` shows
_LOG_TAIL_BYTES = 64 * 1024
_MAX_LINKS = 40  # on the way to a file, as for the kernel (path_resolution(7))


class ServiceOptions(NamedTuple):
    """What a service is beside the command that it runs."""

    is_user: bool = False  # it belongs to the user who installs it, and needs no rights of root
    run_as: str = ""  # the user that it runs as; empty for root, on Windows for SYSTEM
    is_copy: bool = False  # it runs a copy of the program that others cannot change


_NO_OPTIONS = ServiceOptions()


class Services:
    """This host's service manager, as far as it concerns this program. Its methods raise StartupError."""

    default_root = "/var/lib/remote_executor"
    copy_dir = "/opt/remote_executor"  # of the copied program
    advice = ""  # what else is to be done after an install

    def __init__(self, options: ServiceOptions = _NO_OPTIONS) -> None:
        self._options = options
        self._undo = contextlib.ExitStack()  # takes back what an install has written so far
        self._copied = ""  # the copy of the program, where it was written anew

    def prepare_program(self, program: Sequence[str]) -> list[str]:
        """Return the command of the program that the service is to run: as it is, or a copy.

        Raise StartupError where others than the service's user may change it.
        """
        raise NotImplementedError

    def install(self, command: Sequence[str]) -> str:
        """Install the command as a service that starts with the host; return a line that says what was written.

        A failure takes back what was written, the copy of the program too.
        """
        self._require_rights()
        try:
            with self._undo:
                was_changed, line = self._install(command)
                self._undo.pop_all()
        except OSError as error:
            raise StartupError(f"service: {error.filename} cannot be written: {error.strerror}") from None
        if self._copied:
            line = f"wrote {self._copied}; {line}"
        with contextlib.suppress(StartupError):  # it is installed, whether or not the manager tells its status
            if self._has_earlier_command(command, was_changed or self._copied != ""):
                line += "; the service still runs as it was before: `service restart` applies the change"
        return line

    def uninstall(self) -> str:
        """Stop the service and remove it; return a line that says what was removed."""
        raise NotImplementedError

    def start(self) -> str:
        """Start the service unless it runs; return its status."""
        raise NotImplementedError

    def stop(self) -> str:
        """Stop the service if it runs; return its status, and how many steps run on."""
        raise NotImplementedError

    def restart(self) -> str:
        """Stop the service and start it; return its status."""
        self.stop()
        return self.start()

    def status(self) -> tuple[int, str]:
        """Return the exit code of init scripts (LSB: 0 running, 3 not running, 4 not installed) and a line."""
        raise NotImplementedError

    def logs(self) -> str:
        """Return the last lines that the service has logged."""
        return _read_tail(log_path(self._installed_root()))

    def _install(self, command: Sequence[str]) -> tuple[bool, str]:
        """Do what `install` says; return whether something has changed, and the line."""
        raise NotImplementedError

    def _write(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Write a file; `_undo` gives it its earlier content. Raises OSError."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self._undo.callback(_restore_file, path, _read_or_none(path), mode)
        _replace_file(path, content, mode)

    def _copy_program(self, source: str, target: str) -> None:
        """Copy the program to where only root or administrators may write; everybody may run it."""
        directory = os.path.dirname(target)
        try:
            content = _read_or_none(source)
            if content is None or content == _read_or_none(target):
                return
            self._undo.callback(_remove_empty, directory)
            os.makedirs(directory, exist_ok=True)
            self._protect_directory(directory)
            self._write(target, content, 0o755)
            self._protect_copy(target)
        except OSError as error:
            self._undo.close()
            where = error.filename or target
            raise StartupError(f"service: --copy: {where} cannot be written: {error.strerror}") from None
        self._copied = target

    def _protect_directory(self, directory: str) -> None:
        """Let everybody read the directory of the copy, and only its owner write there. Raises OSError."""
        os.chmod(directory, 0o755)  # whatever the umask

    def _protect_copy(self, path: str) -> None:
        """Do the same with the copy, where its directory's rights are not enough. Raises OSError."""

    def _remove_copy(self, command: Sequence[str], destdir: str = "") -> None:
        """Remove the program that the service ran, where it was a copy of ours."""
        for word in command[:2]:
            if os.path.dirname(word) == self.copy_dir:
                with contextlib.suppress(OSError):  # it is gone; or, on Windows, it is the exe that runs just now
                    os.unlink(destdir + word)
                _remove_empty(destdir + self.copy_dir)

    def _require_rights(self) -> None:
        """Raise StartupError where this user may not install a service."""

    def _installed_command(self) -> list[str]:
        """Return the command of the installed service; empty where it cannot be read."""
        raise NotImplementedError

    def _installed_root(self) -> str:
        """Return the root of the installed service, as its daemon names it."""
        parent, name = os.path.split(_root_of(self._installed_command()) or self.default_root)
        return os.path.join(os.path.realpath(parent), name)

    def _has_earlier_command(self, command: Sequence[str], was_changed: bool) -> bool:
        """Return whether the service runs, and not as it has just been installed."""
        return was_changed and self.status()[0] == 0

    def _steps_left(self) -> str:
        """Return how many steps of the stopped service run on, to be added to a line."""
        count = _count_running_steps(self._installed_root())
        if not count:
            return ""
        noun = "step runs" if count == 1 else "steps run"
        return f"; {count} {noun} on, and the next start adopts what runs then"


def _root_of(command: Sequence[str]) -> str:
    """Return the root that a command line names; empty where it names none."""
    for word in command:
        if word.startswith("--root="):
            return word.partition("=")[2]
    return ""


def _count_running_steps(root: str) -> int:
    """Return how many steps below a root have a live wrapper; 0 where that cannot be read."""
    count = 0
    with contextlib.suppress(OSError):
        tasks = os.path.join(root, "tasks")
        for task in os.listdir(tasks):
            if not _TASK_NUMBER.fullmatch(task):
                continue
            with os.scandir(os.path.join(tasks, task)) as entries:
                step_dirs = [entry.path for entry in entries if entry.name.isdigit()]
            count += sum(map(has_live_wrapper, step_dirs))
    return count


def _read_tail(path: str) -> str:
    """Return the last lines of a log."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError as error:
        raise StartupError(f"service: the log {path} cannot be read: {error.strerror}") from None
    return "\n".join(lines[-_LOG_LINES:])


def _read_or_none(path: str) -> bytes | None:
    """Return the content of a file; None where there is none. Raises OSError."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def _replace_file(path: str, content: bytes, mode: int) -> None:
    """Write a file whole or not at all. Raises OSError."""
    new = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):  # a crash has left it
        os.unlink(new)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.chmod(new, mode)  # whatever the umask
        os.replace(new, path)
    except OSError:
        os.unlink(new)
        raise


def _restore_file(path: str, content: bytes | None, mode: int) -> None:
    """Give a file its earlier content; remove it where there was none."""
    with contextlib.suppress(OSError):  # the failure itself is what the user has to know
        if content is None:
            os.unlink(path)
        else:
            _replace_file(path, content, mode)


def _remove_empty(directory: str) -> None:
    with contextlib.suppress(OSError):  # it is gone, or has something else in it
        os.rmdir(directory)


def _walk_path(path: str) -> Iterator[str]:
    """Yield each directory and each link on the way to a file, then the file (path_resolution(7)). Raises OSError."""
    names = path.split("/")
    current = "/"
    links = 0
    yield current
    while names:
        name = names.pop(0)
        if name == "..":
            current = os.path.dirname(current)
        if name in ("", ".", ".."):
            continue
        above = current
        current = os.path.join(above, name)
        yield current
        if os.path.islink(current):
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            target = os.readlink(current)
            names = [*target.split("/"), *names]
            current = "/" if target.startswith("/") else above


def _find_changeable(path: str, owners: Sequence[int]) -> tuple[str, str] | None:
    """Return what on the way to a program others than these users may change, and who; None where nobody may.

    In a directory with the sticky bit nobody can replace what is another's; but beside the program a new file could
    be one that it loads.
    """
    own_dirs = (os.path.dirname(path), os.path.dirname(os.path.realpath(path)))
    for entry in _walk_path(path):
        status = os.lstat(entry)
        is_sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if status.st_uid not in owners:
            return entry, f"the user with uid {status.st_uid}"
        if stat.S_ISLNK(status.st_mode) or (is_sticky and entry not in own_dirs):
            continue
        if status.st_mode & 0o002:
            return entry, "everybody"
        if status.st_mode & 0o020:
            return entry, f"the group with gid {status.st_gid}"
    return None


def _run_tool(command: Sequence[str]) -> tuple[int, str]:
    """Run a program of the host; return its exit code and its output. Raise StartupError where there is none."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except OSError as error:
        raise StartupError(f"service: {command[0]} cannot be run: {error.strerror}") from None
    return done.returncode, done.stdout.decode(errors="replace")


class UnixServices(Services):
    """A service manager that reads a file; with $DESTDIR the file goes below it, and the manager is not called."""

    path = ""  # of the file

    def __init__(self, destdir: str, options: ServiceOptions = _NO_OPTIONS) -> None:
        super().__init__(options)
        self._destdir = os.path.abspath(destdir) if destdir else ""
        self._file = self._destdir + self.path

    def prepare_program(self, program: Sequence[str]) -> list[str]:
        *python, source = program
        target = source
        if self._options.is_copy:
            self._require_rights()
            target = os.path.join(self.copy_dir, os.path.basename(source))
            self._copy_program(source, self._destdir + target)
        if not self._destdir:  # the owners in an image are those of whoever builds it
            self._require_unchangeable([*python, target, os.__file__])
        return [self._without_destdir(word) for word in [*python, target]]

    def uninstall(self) -> str:
        self._require_rights()
        self._require_file()
        lines = [f"removed {self._file}{self._steps_left_by_removal()}"]
        program = self._installed_command()
        try:
            os.unlink(self._file)
            self._remove_copy(program, self._destdir)
            self._after_change()
        except OSError as error:
            raise StartupError(f"service: {error.filename} cannot be removed: {error.strerror}") from None
        except StartupError as error:  # of a manager that does not run, as in a container
            lines.append(str(error))
        return "; ".join(lines)

    def content(self, command: Sequence[str]) -> bytes:
        """Return the content of the file that makes the manager run the command."""
        raise NotImplementedError

    def _install(self, command: Sequence[str]) -> tuple[bool, str]:
        content = self.content(command)
        if _read_or_none(self._file) == content and self._is_enabled():
            return False, f"unchanged: {self._file}"
        self._undo.callback(self._reload)
        self._give_root(command)
        self._write(self._file, content)
        self._after_change()
        return True, f"wrote {self._file}"

    def _require_unchangeable(self, paths: Sequence[str]) -> None:
        """Raise StartupError where others than root and the service's user may change one of these files."""
        owners = [0, self._uid()]
        for path in paths:
            try:
                changeable = _find_changeable(path, owners)
            except OSError as error:
                self._undo.close()
                raise StartupError(f"service: {path} cannot be checked: {error.strerror}") from None
            if changeable:
                self._undo.close()
                entry, who = changeable
                advice = f"--copy installs {self.copy_dir}, which is root's alone"
                if path != paths[-2] or self._options.is_copy:
                    advice = "use a Python that is root's alone, such as /usr/bin/python3"
                raise StartupError(f"service: {entry} may be changed by {who}, and so what the service runs; {advice}")

    def _uid(self) -> int:
        """Return the user that the service runs as."""
        if self._options.is_user:
            return os.geteuid()
        if self._options.run_as:
            return int(self._account().pw_uid)
        return 0

    def _account(self) -> Any:
        """Return the entry of --run_as in the user database. Raises StartupError."""
        import pwd

        try:
            return pwd.getpwnam(self._options.run_as)
        except KeyError:
            raise StartupError(f"service: --run_as: this host has no user {self._options.run_as!r}") from None

    def _give_root(self, command: Sequence[str]) -> None:
        """Make the root, where it is missing, and give it to the user of --run_as. Raises OSError, StartupError."""
        if not self._options.run_as or self._destdir:
            return
        account = self._account()
        root = _root_of(command)
        if not os.path.lexists(root):
            os.makedirs(os.path.dirname(root), exist_ok=True)
            os.mkdir(root, 0o700)
            self._undo.callback(_remove_empty, root)
            descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)  # not what a user exchanges for it
            try:
                os.fchown(descriptor, account.pw_uid, account.pw_gid)
            finally:
                os.close(descriptor)
        owner = os.lstat(root).st_uid
        if owner != account.pw_uid:
            name = self._options.run_as
            raise StartupError(f"service: --root: {root} belongs to uid {owner}; `chown -R {name}: {root}` first")

    def _without_destdir(self, path: str) -> str:
        """Return the path that a file of the image has when the image runs."""
        if self._destdir and path.startswith(self._destdir + os.sep):
            return path[len(self._destdir) :]
        return path

    def _require_rights(self) -> None:
        if os.geteuid() and not self._destdir and not self._options.is_user:
            raise StartupError("service: root privileges required; run it with sudo, or install it with --user")

    def _require_file(self) -> None:
        if not os.path.exists(self._file):
            raise NotInstalled(f"service: not installed: {self._file} does not exist")

    def _is_enabled(self) -> bool:
        """Return whether the manager starts the service with the host."""
        return True

    def _after_change(self) -> None:
        """Let the manager read the file, which was written or removed."""

    def _reload(self) -> None:
        """Let the manager read the file again after a failure, as far as it can."""

    def _steps_left_by_removal(self) -> str:
        """Stop the service; return what it left running, and why it may not have stopped, to be added to a line."""
        if self._destdir:
            return ""
        try:
            self._before_removal()
        except StartupError as error:
            return f", though the service was not stopped ({error})"
        return self._steps_left()

    def _before_removal(self) -> None:
        """Stop the service."""

    def _call(self, *command: str) -> str:
        """Run a command of the manager; return its output on one line. Raise StartupError with it when it fails."""
        return self._run(*command)[1]

    def _run(self, *command: str, accepted: Sequence[int] = ()) -> tuple[int, str]:
        """Do the same; return the exit code too, which is 0 or one of those accepted."""
        code, text = _run_tool(command)
        output = " ".join(text.split())
        if code and code not in accepted:
            raise StartupError(f"service: `{' '.join(command)}` failed: {output}")
        return code, output


# KillMode: the steps are to outlive a restart of the daemon. OOMPolicy: one that takes too much memory does not end it;
# OOMScoreAdjust: nor is the daemon taken for it. A step sets its own to 0.
_UNIT_FILE = f"""\
[Unit]
Description={_SERVICE_TITLE}
{{network}}StartLimitIntervalSec=0

[Service]
Type={{kind}}
ExecStart={{command}}
{{account}}KillMode=process
OOMPolicy=continue
Restart=on-failure
RestartSec=5
LimitNOFILE=65536
TasksMax=infinity

[Install]
WantedBy={{target}}
"""
_UNIT_NETWORK = """\
Wants=network-online.target
After=network-online.target
"""
_UNIT_ESCAPES = str.maketrans(
    {
        "\\": r"\\",
        '"': r"\"",
        "%": "%%",
        "$": "$$",
    }
)


def _quote_unit_word(word: str) -> str:
    """Quote a word for a command line of a unit file (systemd.service(5), systemd.syntax(7))."""
    word = word.translate(_UNIT_ESCAPES)
    if re.fullmatch(r"[\w./:=@+,$%-]+", word):
        return word
    return f'"{word}"'


def _split_unit_line(line: str) -> list[str]:
    """Return the words of a command line that `_quote_unit_word` has quoted."""
    return [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(line)]


class SystemdServices(UnixServices):
    """systemd, by a unit file (systemd.service(5)); of a user, by one in that user's own manager (systemd.unit(5))."""

    path = f"/etc/systemd/system/{SERVICE}.service"

    def __init__(self, destdir: str, options: ServiceOptions = _NO_OPTIONS) -> None:
        super().__init__(destdir, options)
        self._systemctl = ["systemctl"]
        self._target = "multi-user.target"
        if options.is_user:
            home = os.path.expanduser("~")
            config = os.environ.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
            state = os.environ.get("XDG_STATE_HOME") or os.path.join(home, ".local", "state")
            self._systemctl = ["systemctl", "--user"]
            self._target = "default.target"
            self._file = f"{self._destdir}{config}/systemd/user/{SERVICE}.service"
            self.default_root = os.path.join(state, SERVICE)
            self.advice = " --user, and `loginctl enable-linger` to have it run without a login"

    def content(self, command: Sequence[str]) -> bytes:
        # systemd watches the launcher of a frozen program, which does not speak sd_notify.
        kind = "exec" if getattr(sys, "frozen", False) else "notify\nWatchdogSec=60"
        account = ""
        network = _UNIT_NETWORK
        if self._options.run_as:
            account = f"User={self._options.run_as}\n"
            if _root_of(command) == self.default_root:  # systemd makes it, and gives it to that user
                account += f"StateDirectory={SERVICE}\nStateDirectoryMode=0700\n"
        if self._options.is_user:
            network = ""  # its manager has no such target, and may not lower an OOM score
        else:
            account += "OOMScoreAdjust=-500\n"
        text = _UNIT_FILE.format(
            kind=kind,
            command=" ".join(map(_quote_unit_word, command)),
            network=network,
            account=account,
            target=self._target,
        )
        return text.encode()

    def start(self) -> str:
        return self._control("start")

    def stop(self) -> str:
        return self._control("stop") + self._steps_left()

    def restart(self) -> str:
        return self._control("restart")

    def status(self) -> tuple[int, str]:
        if not os.path.exists(self._file):
            return 4, "not installed"
        output = self._call(*self._systemctl, "show", "--property=ActiveState,SubState,MainPID", SERVICE)
        properties = dict(line.split("=", 1) for line in output.split())
        state = properties.get("ActiveState")
        if state != "active":
            return 3, f"not running ({state}, {properties.get('SubState')}); see `service logs`"
        return 0, f"running, pid {properties.get('MainPID')}"

    def logs(self) -> str:
        unit = "--user-unit" if self._options.is_user else "--unit"
        code, text = _run_tool(["journalctl", f"{unit}={SERVICE}", f"--lines={_LOG_LINES}", "--no-pager"])
        if code:
            raise StartupError(f"service: journalctl failed: {' '.join(text.split())}")
        return text.rstrip("\n")

    def _control(self, action: str) -> str:
        """Have systemd do this with the service; return its status."""
        self._require_rights()
        self._call(*self._systemctl, action, SERVICE)
        return self.status()[1]

    def _give_root(self, command: Sequence[str]) -> None:
        if _root_of(command) != self.default_root:  # which systemd itself gives to the user, by StateDirectory
            super()._give_root(command)

    def _installed_command(self) -> list[str]:
        content = _read_or_none(self._file) or b""
        match = re.search(r"(?m)^ExecStart=(.*)$", content.decode(errors="replace"))
        return _split_unit_line(match[1]) if match else []

    def _has_earlier_command(self, command: Sequence[str], was_changed: bool) -> bool:
        """Ask the running process itself too, which an earlier installation may have left as it was."""
        if self._destdir:
            return False
        code, line = self.status()
        if code:
            return False
        running = _read_or_none(f"/proc/{line.rpartition(' ')[2]}/cmdline")
        if not running or was_changed:
            return was_changed
        return running.rstrip(b"\0").split(b"\0") != [os.fsencode(word) for word in command]

    def _is_enabled(self) -> bool:
        if self._destdir:
            return os.path.lexists(self._wants_link())
        return self._run(*self._systemctl, "is-enabled", SERVICE, accepted=range(1, 256))[0] == 0

    def _after_change(self) -> None:
        is_installed = os.path.exists(self._file)
        if self._destdir:
            self._link_in_image(is_installed)
            return
        if not is_installed:
            self._remove_link()  # systemctl does it, where it can be called
        self._call(*self._systemctl, "daemon-reload")
        if is_installed:
            self._call(*self._systemctl, "enable", SERVICE)

    def _reload(self) -> None:
        with contextlib.suppress(StartupError):  # the failure itself is what the user has to know
            if not os.path.exists(self._file):
                self._remove_link()
            if not self._destdir:
                self._call(*self._systemctl, "daemon-reload")

    def _wants_link(self) -> str:
        directory, name = os.path.split(self._file)
        return os.path.join(directory, f"{self._target}.wants", name)

    def _remove_link(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._wants_link())

    def _link_in_image(self, is_enabled: bool) -> None:
        """Make or remove the link that `systemctl enable` would make."""
        self._remove_link()
        if is_enabled:
            link = self._wants_link()
            os.makedirs(os.path.dirname(link), exist_ok=True)
            os.symlink(f"../{os.path.basename(self._file)}", link)

    def _before_removal(self) -> None:
        self._call(*self._systemctl, "disable", "--now", SERVICE)


class LaunchdServices(UnixServices):
    """launchd of a Mac, by a property list (launchd.plist(5), launchctl(1)); of a user, as an agent of the login.

    A service that is loaded need not have a process: it may have ended, or be waiting for its next start.
    """

    default_root = "/var/db/remote_executor"
    copy_dir = "/usr/local/remote_executor"
    path = f"/Library/LaunchDaemons/{SERVICE}.plist"
    log_path = f"/var/log/{SERVICE}.log"

    def __init__(self, destdir: str, options: ServiceOptions = _NO_OPTIONS) -> None:
        super().__init__(destdir, options)
        self._domain = "system"
        self._home = "/var/root"
        if options.is_user:
            self.advice = " --user"
            self._home = os.path.expanduser("~")
            library = os.path.join(self._home, "Library")
            self._domain = f"gui/{os.geteuid()}"
            self._file = f"{self._destdir}{library}/LaunchAgents/{SERVICE}.plist"
            self.log_path = f"{library}/Logs/{SERVICE}.log"
            self.default_root = f"{library}/Application Support/{SERVICE}"
        elif options.run_as:
            self._home = self._account().pw_dir
        self._target = f"{self._domain}/{SERVICE}"

    def content(self, command: Sequence[str]) -> bytes:
        import plistlib

        exit_timeout_s = _LAUNCHD_EXIT_TIMEOUT_S
        if "--on_exit=wait" in command:
            exit_timeout_s = _LAUNCHD_LONG_EXIT_TIMEOUT_S
        account = {"UserName": self._options.run_as} if self._options.run_as else {}
        return plistlib.dumps(
            {
                "Label": SERVICE,
                "ProgramArguments": list(command),
                **account,
                "EnvironmentVariables": {"HOME": self._home, "LANG": "en_US.UTF-8"},
                "RunAtLoad": True,
                "KeepAlive": {"SuccessfulExit": False},
                "AbandonProcessGroup": True,  # the steps are to outlive a restart of the daemon
                "ExitTimeOut": exit_timeout_s,
                "ProcessType": "Interactive",  # any other has its processor time and I/O throttled, its steps too
                "StandardErrorPath": self.log_path,
            },
            sort_keys=False,
        )

    def start(self) -> str:
        self._require_rights()
        self._require_file()
        if self._print() is not None:
            self._launchctl("kickstart", self._target, accepted=(_LAUNCHD_ALREADY_IN_PROGRESS,))
        else:
            self._bootstrap()
        end_s = time.monotonic() + _LAUNCHD_START_S
        while self.status()[0] and time.monotonic() < end_s:
            time.sleep(_POLL_S)
        return self.status()[1]

    def stop(self) -> str:
        self._require_rights()
        self._require_file()
        not_loaded = (_LAUNCHD_NO_SUCH_PROCESS, _LAUNCHD_NOT_FOUND)
        self._launchctl("bootout", self._target, accepted=(_LAUNCHD_IN_PROGRESS, *not_loaded))
        end_s = time.monotonic() + _LAUNCHD_STOP_S
        while self._print() is not None:  # before, a bootstrap would fail
            if time.monotonic() > end_s:
                return f"still stopping: {self.status()[1]}"
            time.sleep(_POLL_S)
        return self.status()[1] + self._steps_left()

    def status(self) -> tuple[int, str]:
        if not os.path.exists(self._file):
            return 4, "not installed"
        output = self._print()
        if output is None:
            return 3, "not running"
        pid = re.search(r"\bpid = ([0-9]+)", output)
        if pid:
            return 0, f"running, pid {pid[1]}"
        code = re.search(r"\blast exit code = ([0-9]+)", output)
        if code and code[1] != "0":
            return 3, f"not running (last exit code {code[1]}); see {self.log_path}"
        return 3, "not running"

    def logs(self) -> str:
        return _read_tail(self.log_path)

    def _installed_command(self) -> list[str]:
        import plistlib
        from xml.parsers.expat import ExpatError

        try:
            words = plistlib.loads(_read_or_none(self._file) or b"").get("ProgramArguments", [])
        except (ValueError, ExpatError):  # somebody has edited it
            return []
        return [str(word) for word in words]

    def _has_earlier_command(self, command: Sequence[str], was_changed: bool) -> bool:
        return not self._destdir and super()._has_earlier_command(command, was_changed)

    def _after_change(self) -> None:
        """Make the file of standard error, which launchd would let everybody read: it tells who has submitted what."""
        if self._destdir or not os.path.exists(self._file):
            return
        os.makedirs(os.path.dirname(self.log_path), exist_ok=True)
        descriptor = os.open(self.log_path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            if self._options.run_as:
                account = self._account()
                os.fchown(descriptor, account.pw_uid, account.pw_gid)
        finally:
            os.close(descriptor)

    def _before_removal(self) -> None:
        """Stop the service; one that waits for its steps ends without its file."""
        self.stop()

    def _bootstrap(self) -> None:
        """Load the service, which starts it. It is tried again while launchd may still be removing an earlier one."""
        for _ in range(_LAUNCHD_ATTEMPTS - 1):
            code, _ = self._launchctl("bootstrap", self._domain, self._file, accepted=(_LAUNCHD_IO_ERROR,))
            if not code:
                return
            time.sleep(_LAUNCHD_RETRY_S)
        self._launchctl("bootstrap", self._domain, self._file)

    def _print(self) -> str | None:
        """Return what launchd shows of the service; None where it is not loaded."""
        code, output = self._launchctl("print", self._target, accepted=(_LAUNCHD_NOT_FOUND,))
        return None if code else output

    def _launchctl(self, *words: str, accepted: Sequence[int] = ()) -> tuple[int, str]:
        """Run launchctl; return its code, 0 or one of those accepted, and its output."""
        return self._run("launchctl", *words, accepted=accepted)


_LAUNCHD_TARGET = f"system/{SERVICE}"
# Exit codes of launchctl, which are errors of launchd (`launchctl error N`).
_LAUNCHD_NO_SUCH_PROCESS = 3  # of bootout: not loaded
_LAUNCHD_IO_ERROR = 5  # of bootstrap: loaded already, perhaps for a moment only
_LAUNCHD_IN_PROGRESS = 36  # of bootout: the service has not ended yet
_LAUNCHD_ALREADY_IN_PROGRESS = 37
_LAUNCHD_NOT_FOUND = 113  # not loaded
_LAUNCHD_ATTEMPTS = 5
_LAUNCHD_RETRY_S = 1.0
_LAUNCHD_START_S = 5.0  # until the process that was asked for is there
_LAUNCHD_STOP_S = 60.0
_LAUNCHD_EXIT_TIMEOUT_S = 60  # until SIGKILL; a stop of steps has a grace of seconds
_LAUNCHD_LONG_EXIT_TIMEOUT_S = 24 * 3600  # the longest that steps take by default; 0 could hold up a shutdown for ever


_CHANGE_RIGHTS = 0x500D_0000  # GENERIC_ALL, GENERIC_WRITE, WRITE_OWNER, WRITE_DAC, DELETE
_FILE_CHANGE_RIGHTS = _CHANGE_RIGHTS | 0x0006  # FILE_WRITE_DATA, FILE_APPEND_DATA
_OWN_DIRECTORY_CHANGE_RIGHTS = _CHANGE_RIGHTS | 0x0046  # FILE_ADD_FILE, FILE_ADD_SUBDIRECTORY, FILE_DELETE_CHILD
_DIRECTORY_CHANGE_RIGHTS = 0x100D_0040  # not those that add to it; GENERIC_WRITE does no more than that
_ACL_ENTRY = re.compile(r"\((\w+);(\w*);(\w*);[^;()]*;[^;()]*;([^;()]+)[^()]*\)")
_ACL_RIGHTS = {
    **{"GA": 0x1000_0000, "GW": 0x4000_0000, "GR": 0, "GX": 0},
    **{"FA": 0x1F_01FF, "FW": 0x12_0116, "FR": 0, "FX": 0},
    **{"SD": 0x1_0000, "RC": 0x2_0000, "WD": 0x4_0000, "WO": 0x8_0000},
    **{"CC": 0x1, "DC": 0x2, "LC": 0x4, "SW": 0x8, "RP": 0x10, "WP": 0x20, "DT": 0x40, "LO": 0x80, "CR": 0x100},
}
# The system, administrators, the built-in administrator, TrustedInstaller; creator and owner, who are one of these.
_TRUSTED_SIDS = {
    *("SY", "BA", "LA", "CO", "OW", "S-1-5-18", "S-1-5-32-544"),
    "S-1-5-80-956008885-3418522649-1831038044-1853292631-2271478464",
}


def untrusted_writers(descriptor: str, rights: int) -> list[str]:
    """Return who has one of these rights on a file, but for system and administrators, by its owner and its list.

    Source: Security Descriptor String Format, ACE Strings (MSDN).
    """
    head, _, entries = descriptor.partition("D:")
    owner = re.search(r"O:([\w-]+?)(?=G:|$)", head)
    writers = set() if owner is None else {owner[1]}
    if "NO_ACCESS_CONTROL" in entries:
        writers.add("WD")
    for kind, flags, granted, sid in _ACL_ENTRY.findall(entries):
        if kind.startswith("A") and "IO" not in flags and _parse_rights(granted) & rights:
            writers.add(sid)
    return sorted(writers - _TRUSTED_SIDS)


def _parse_rights(text: str) -> int:
    if text.startswith("0x"):
        return int(text, 16)
    rights = 0
    for begin in range(0, len(text), 2):
        rights |= _ACL_RIGHTS.get(text[begin : begin + 2], 0)
    return rights


def _describe_security(path: str) -> str:
    """Return owner and access list of a file, as SDDL. Raises OSError."""
    parts = OWNER_SECURITY_INFORMATION | DACL_SECURITY_INFORMATION
    text = _TEXT()
    descriptor = _read_security_descriptor(path, parts)
    ConvertSecurityDescriptorToStringSecurityDescriptorW(descriptor, SDDL_REVISION_1, parts, ctypes.byref(text), None)
    try:
        return text.value or ""
    finally:
        LocalFree(ctypes.cast(text, ctypes.c_void_p))


def _find_changeable_on_windows(path: str) -> tuple[str, str] | None:
    """Return what of a program's path others than administrators may change, and who; None where nobody may."""
    entry = path
    rights = _FILE_CHANGE_RIGHTS
    while True:
        writers = untrusted_writers(_describe_security(entry), rights)
        if writers:
            return entry, ", ".join(writers)
        rights = _DIRECTORY_CHANGE_RIGHTS
        if entry == path:
            rights = _OWN_DIRECTORY_CHANGE_RIGHTS
        above = os.path.dirname(entry)
        if above == entry:
            return None
        entry = above


def _has_one_user() -> bool:
    """Return whether this is Wine, where services run as the user of the prompt and all files are that user's."""
    return hasattr(_WinDLL("ntdll"), "wine_get_version")


def _split_command_line(line: str) -> list[str]:
    """Return the words of a command line of Windows. Raises OSError."""
    count = _INT()
    words = CommandLineToArgvW(line, ctypes.byref(count))
    try:
        return list(words[: count.value])
    finally:
        LocalFree(ctypes.cast(words, ctypes.c_void_p))


class WindowsServices(Services):
    """The service control manager (Service Functions, MSDN)."""

    default_root = WINDOWS_SERVICE_ROOT
    copy_dir = os.path.join(os.environ.get("PROGRAMFILES", r"C:\Program Files"), "remote_executor")

    def prepare_program(self, program: Sequence[str]) -> list[str]:
        *python, source = program
        target = source
        if self._options.is_copy:
            target = os.path.join(self.copy_dir, os.path.basename(source))
            self._copy_program(source, target)
        if not _has_one_user():
            self._require_unchangeable([*python, target])
        return [*python, target]

    def uninstall(self) -> str:
        command = self._installed_command()
        with self._service(SERVICE_ALL_ACCESS) as service:
            self._stop(service)
            steps_left = self._steps_left()
            DeleteService(service)
        unregister_event_source()
        self._remove_copy(command)
        return f"removed the service {SERVICE}{steps_left}"

    def start(self) -> str:
        with self._service(SERVICE_ALL_ACCESS) as service:
            try:
                StartServiceW(service, 0, None)
            except OSError as error:
                if getattr(error, "winerror", 0) != ERROR_SERVICE_ALREADY_RUNNING:
                    raise
            self._wait_while(SERVICE_START_PENDING, service)
            code, line = self._describe(self._query(service))
        if code:
            raise StartupError(f"service: it did not start: {line}")
        return line

    def stop(self) -> str:
        with self._service(SERVICE_ALL_ACCESS) as service:
            self._stop(service)
            return self._describe(self._query(service))[1] + self._steps_left()

    def status(self) -> tuple[int, str]:
        try:
            with self._service(SERVICE_QUERY_STATUS) as service:
                return self._describe(self._query(service))
        except NotInstalled:
            return 4, "not installed"

    def _install(self, command: Sequence[str]) -> tuple[bool, str]:
        command_line = subprocess.list2cmdline(command)
        account = self._account()
        if self.status()[0] == 4:
            self._create(command_line, account)
            register_event_source()
            return True, f"installed the service {SERVICE}: {command_line}"
        with self._service(SERVICE_ALL_ACCESS) as service:
            if self._query_config(service) == (command_line, account):
                return False, f"unchanged: the service {SERVICE}: {command_line}"
            kept = SERVICE_NO_CHANGE
            password = self._password(account)
            ChangeServiceConfigW(
                *(service, kept, SERVICE_AUTO_START, kept, command_line),
                *(None, None, None, account, password, None),  # load order group, its tag, dependencies
            )
            self._configure(service)
        return True, f"changed the service {SERVICE}: {command_line}"

    def _create(self, command_line: str, account: str) -> None:
        with self._manager(SC_MANAGER_CONNECT | SC_MANAGER_CREATE_SERVICE) as manager:
            service = CreateServiceW(
                manager,
                SERVICE,
                _SERVICE_TITLE,
                SERVICE_ALL_ACCESS,
                SERVICE_WIN32_OWN_PROCESS,
                SERVICE_AUTO_START,
                SERVICE_ERROR_NORMAL,
                command_line,
                None,  # load order group
                None,  # its tag
                None,  # dependencies
                account,
                self._password(account),
            )
            try:
                self._configure(service)
            except OSError:
                DeleteService(service)
                raise
            finally:
                CloseServiceHandle(service)

    def _account(self) -> str:
        """Return the account that the service runs as, as the manager spells it."""
        account = self._options.run_as or "LocalSystem"
        is_local = self._options.run_as and "\\" not in account and "@" not in account
        return f".\\{account}" if is_local else account

    def _password(self, account: str) -> str | None:
        """Ask for the password of an account that has one: no virtual, system's or managed account."""
        if account == "LocalSystem" or account.upper().startswith("NT ") or account.endswith("$"):
            return None
        import getpass

        return getpass.getpass(f"password of {account}: ")

    def _require_unchangeable(self, paths: Sequence[str]) -> None:
        """Raise StartupError where others than administrators may change one of these files."""
        for path in paths:
            problem = ""
            try:
                changeable = _find_changeable_on_windows(path)
            except OSError as error:
                problem = f"{path} cannot be checked: {error}"
            else:
                if changeable:
                    problem = f"{changeable[0]} may be changed by {changeable[1]}, and so what the service runs"
                elif "\\windowsapps\\" in path.lower():
                    problem = f"{path} is of the Microsoft Store, whose programs no service can run"
            if problem:
                self._undo.close()
                advice = f"--copy installs {self.copy_dir}, which is administrators' alone"
                if path != paths[-1] or self._options.is_copy:
                    advice = "use a Python that was installed for all users, below %ProgramFiles%"
                raise StartupError(f"service: {problem}; {advice}")

    def _protect_directory(self, directory: str) -> None:
        set_security(directory, "O:BAD:P(A;OICI;FA;;;SY)(A;OICI;FA;;;BA)(A;OICI;0x1200a9;;;BU)")

    def _protect_copy(self, path: str) -> None:
        set_security(path, "O:BA")

    def _installed_command(self) -> list[str]:
        try:
            with self._service(SERVICE_QUERY_CONFIG) as service:
                return _split_command_line(self._query_config(service)[0])
        except NotInstalled:
            return []

    def _installed_root(self) -> str:
        return os.path.abspath(_root_of(self._installed_command()) or self.default_root)

    def _configure(self, service: int) -> None:
        """Set the description, the restarts after a crash, and the time to stop in when the host shuts down."""
        restarts = [ServiceAction(SC_ACTION_RESTART, delay_ms) for delay_ms in (1_000, 5_000, 30_000)]
        actions = (ServiceAction * len(restarts))(*restarts)
        reset_period_s = 3600
        failure = ServiceFailureActions(reset_period_s, None, None, len(actions), actions)
        for kind, value in (
            (SERVICE_CONFIG_DESCRIPTION, _TEXT("Runs scripts on this host for clients of its HTTP API.")),
            (SERVICE_CONFIG_FAILURE_ACTIONS, failure),
            (SERVICE_CONFIG_PRESHUTDOWN_INFO, _DWORD(int(_STATE_CHANGE_S * 1000))),
        ):
            ChangeServiceConfig2W(service, kind, ctypes.byref(value))
        with contextlib.suppress(OSError):  # Wine does not have it
            on_failed_starts_too = ctypes.byref(_BOOL(True))
            ChangeServiceConfig2W(service, SERVICE_CONFIG_FAILURE_ACTIONS_FLAG, on_failed_starts_too)

    def _stop(self, service: int) -> None:
        """Stop the service if it runs. Raises OSError."""
        if self._query(service).CurrentState == SERVICE_STOPPED:
            return
        try:
            ControlService(service, SERVICE_CONTROL_STOP, ctypes.byref(ServiceStatus()))
        except OSError as error:
            if getattr(error, "winerror", 0) != ERROR_SERVICE_NOT_ACTIVE:  # it has just ended
                raise
        self._wait_while(SERVICE_STOP_PENDING, service)

    def _wait_while(self, pending_state: int, service: int) -> None:
        """Wait while the service is in that state, as long as it reports progress."""
        end_s = time.monotonic() + _STATE_CHANGE_S
        checkpoint = -1
        while time.monotonic() < end_s:
            status = self._query(service)
            if status.CurrentState != pending_state:
                return
            if status.CheckPoint != checkpoint:
                checkpoint = status.CheckPoint
                end_s = time.monotonic() + _STATE_CHANGE_S
            time.sleep(_POLL_S)

    def _describe(self, status: Any) -> tuple[int, str]:
        """Return what `status` returns."""
        state = int(status.CurrentState)
        if state == SERVICE_RUNNING:
            return 0, f"running, pid {status.ProcessId}"
        names = {
            SERVICE_STOPPED: "not running",
            SERVICE_START_PENDING: "starting",
            SERVICE_STOP_PENDING: "stopping",
        }
        line = names.get(state, f"state {state}")
        code = status.ServiceSpecificExitCode or status.Win32ExitCode % ERROR_SERVICE_NEVER_STARTED
        if code:
            reason = self._last_failure() or "see `service logs` and the event log"
            line += f" (exit code {code}: {reason})"
        return 3, line

    def _last_failure(self) -> str:
        """Return why the last start failed, by the last line of the log; empty where it cannot be read."""
        for root in (self._installed_root(), self.default_root):
            with contextlib.suppress(StartupError):  # it is not there, or only administrators may read it
                _, found, reason = _read_tail(log_path(root)).rpartition(FAILED_START)
                if found and "\n" not in reason:
                    return reason
        return ""

    def _query(self, service: int) -> Any:
        status = ServiceStatus()
        size = ctypes.sizeof(status)
        needed = ctypes.byref(_DWORD())
        QueryServiceStatusEx(service, SC_STATUS_PROCESS_INFO, ctypes.byref(status), size, needed)
        return status

    def _query_config(self, service: int) -> tuple[str, str]:
        """Return the command line of the service, and its account. Raises OSError."""
        size = 8192  # the most that the function takes
        buffer = ctypes.create_string_buffer(size)
        QueryServiceConfigW(service, buffer, size, ctypes.byref(_DWORD()))
        config = ServiceConfig.from_buffer(buffer)
        return config.BinaryPathName or "", config.ServiceStartName or "LocalSystem"

    @contextlib.contextmanager
    def _manager(self, access: int) -> Iterator[int]:
        """Open the manager; an OSError of the block becomes a StartupError of one line."""
        messages = {
            ERROR_ACCESS_DENIED: "administrator rights required; use a prompt opened by `Run as administrator`",
            ERROR_SERVICE_LOGON_FAILED: "the account of --run_as may not log on: check its password, and give it the "
            "right `Log on as a service` (secpol.msc), which `NT SERVICE\\remote_executor` has by itself",
        }
        manager = 0
        try:
            manager = OpenSCManagerW(None, None, access)
            yield manager
        except OSError as error:
            code = getattr(error, "winerror", 0)
            if code == ERROR_SERVICE_DOES_NOT_EXIST:
                raise NotInstalled("service: not installed; `service install` installs it") from None
            raise StartupError(f"service: {messages.get(code, str(error))}") from None
        finally:
            if manager:
                CloseServiceHandle(manager)

    @contextlib.contextmanager
    def _service(self, access: int) -> Iterator[int]:
        """Open the service."""
        with self._manager(SC_MANAGER_CONNECT) as manager:
            service = OpenServiceW(manager, SERVICE, access)
            try:
                yield service
            finally:
                CloseServiceHandle(service)


# Task Scheduler Schema (MSDN). Its own defaults would end the daemon after three days, and on battery power.
_TASK_XML = """\
<?xml version="1.0" encoding="UTF-16"?>
<Task version="1.2" xmlns="http://schemas.microsoft.com/windows/2004/02/mit/task">
  <RegistrationInfo><Description>{title}</Description></RegistrationInfo>
  <Triggers><LogonTrigger><UserId>{user}</UserId></LogonTrigger></Triggers>
  <Principals><Principal id="Author">
    <UserId>{user}</UserId>
    <LogonType>InteractiveToken</LogonType>
    <RunLevel>LeastPrivilege</RunLevel>
  </Principal></Principals>
  <Settings>
    <MultipleInstancesPolicy>IgnoreNew</MultipleInstancesPolicy>
    <DisallowStartIfOnBatteries>false</DisallowStartIfOnBatteries>
    <StopIfGoingOnBatteries>false</StopIfGoingOnBatteries>
    <ExecutionTimeLimit>PT0S</ExecutionTimeLimit>
    <Priority>5</Priority>
    <RestartOnFailure><Interval>PT1M</Interval><Count>999</Count></RestartOnFailure>
  </Settings>
  <Actions Context="Author">
    <Exec><Command>{program}</Command><Arguments>{arguments}</Arguments></Exec>
  </Actions>
</Task>
"""
_TASK_CHANGE_S = 10.0  # until a daemon has its root locked, or has let go of it


class WindowsTasks(Services):
    """The service of one user on Windows: a task of the Task Scheduler that starts when this user logs on."""

    default_root = os.path.join(os.environ.get("LOCALAPPDATA", tempfile.gettempdir()), SERVICE)
    advice = " --user"

    def prepare_program(self, program: Sequence[str]) -> list[str]:
        """Return the program with the Python that opens no window."""
        words = list(program)
        without_window = re.sub(r"(?i)python\.exe$", "pythonw.exe", words[0])
        if os.path.exists(without_window):
            words[0] = without_window
        return words

    def content(self, command: Sequence[str]) -> str:
        """Return the definition of the task that runs the command."""
        return _TASK_XML.format(
            title=_SERVICE_TITLE,
            user=_own_sid(),
            program=html.escape(command[0]),
            arguments=html.escape(subprocess.list2cmdline(command[1:])),
        )

    def uninstall(self) -> str:
        self.stop()
        steps_left = self._steps_left()
        self._schtasks("/Delete", "/F")
        return f"removed the task {SERVICE}{steps_left}"

    def start(self) -> str:
        self._require_task()
        if self.status()[0]:
            self._schtasks("/Run")
            self._wait_for(0)
        return self.status()[1]

    def stop(self) -> str:
        """Kill the daemon, for the Task Scheduler asks none to end; the next one adopts what runs on."""
        self._require_task()
        if not self.status()[0]:
            self._schtasks("/End")
            self._wait_for(3)
        return self.status()[1] + self._steps_left()

    def status(self) -> tuple[int, str]:
        """Return what `Services.status` does, by the lock of the root: schtasks speaks the language of the host."""
        if not self._definition():
            return 4, "not installed"
        lock = os.path.join(self._installed_root(), "lock")
        if not os.path.exists(lock):
            return 3, "not running"
        try:
            os.close(lock_file(lock))
        except StartupError:
            return 0, "running"
        return 3, "not running"

    def _install(self, command: Sequence[str]) -> tuple[bool, str]:
        if self._installed_command() == list(command):
            return False, f"unchanged: the task {SERVICE}"
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "task.xml")
            with open(path, "w", encoding="utf-16") as file:
                file.write(self.content(command))
            self._schtasks("/Create", "/F", "/XML", path)
        return True, f"installed the task {SERVICE}: {subprocess.list2cmdline(command)}"

    def _installed_command(self) -> list[str]:
        match = re.search(r"<Command>(.*?)</Command>\s*<Arguments>(.*?)</Arguments>", self._definition(), re.DOTALL)
        if not match:
            return []
        return [html.unescape(match[1]), *_split_command_line("x " + html.unescape(match[2]))[1:]]

    def _definition(self) -> str:
        """Return the definition of the installed task; empty where there is none."""
        code, text = _run_tool(["schtasks.exe", "/Query", "/TN", SERVICE, "/XML"])
        return "" if code else text

    def _wait_for(self, code: int) -> None:
        """Wait until this is the code of the status."""
        end_s = time.monotonic() + _TASK_CHANGE_S
        while self.status()[0] != code and time.monotonic() < end_s:
            time.sleep(_POLL_S)

    def _require_task(self) -> None:
        if not self._definition():
            raise NotInstalled(f"service: the task {SERVICE} is not installed; `service install --user` installs it")

    def _schtasks(self, action: str, *words: str) -> None:
        """Have the Task Scheduler do this with the task. Raise StartupError where it does not."""
        code, text = _run_tool(["schtasks.exe", action, "/TN", SERVICE, *words])
        if code:
            raise StartupError(f"service: schtasks {action} failed: {' '.join(text.split())}")


def host_services(options: ServiceOptions) -> Services:
    """Return the service manager of this host. Raise StartupError."""
    if ON_WINDOWS:
        return WindowsTasks() if options.is_user else WindowsServices(options)
    destdir = os.environ.get("DESTDIR", "")
    if sys.platform == "darwin":
        return LaunchdServices(destdir, options)
    return SystemdServices(destdir, options)


# ======================================================================================================================
# VI program / self test: a daemon of its own, tried on this host
# ======================================================================================================================

_SELF_TEST_WAIT_S = 20.0  # for what must come; on an idle host all takes one or two seconds
_SLOW_INTERPRETERS_S = 4.0  # from the begin on; PowerShell's first start takes longer on some hosts
_OK = "ok"
_FAILED = "FAILED"
_BROKEN = "broken"  # as _FAILED, of what the program itself does not need
_MISSING = "missing"
_SLOW = "slow"
_NOTE = "note"
_NEEDED = ("sh", "cmd", "python")
_READY = "ready"
_READY_SCRIPTS = {
    ".sh": "echo ready",
    ".py": 'print("ready")',
    ".bat": "echo ready\nchcp",  # the code page of its output
    ".ps1": "'ready'",
}
# A step with a process that it leaves behind in the background, which holds a file open (Windows) or tells its pid.
_TREE_SCRIPT = "sleep 60 & echo $!; sleep 60"
_TREE_BATCH = 'start /b ping -n 60 127.0.0.1 >"%SELF_TEST_FILE%"\necho begun\nping -n 60 127.0.0.1 >nul'
# A step that ends when a file is there.
_GATED_SCRIPT = (
    "echo begun\n"
    'while [ ! -e "$SELF_TEST_FILE" ]; do sleep 0.1 2>/dev/null || sleep 1; done\n'
    "echo over"
)
_GATED_BATCH = (
    "echo begun\n"
    ":again\n"
    'if exist "%SELF_TEST_FILE%" goto over\n'
    "ping -n 2 127.0.0.1 >nul\n"
    "goto again\n"
    ":over\n"
    "echo over"
)


class _Check(NamedTuple):
    """What was tried or looked at, what came of it (a word), and a line about it."""

    name: str
    result: str
    detail: str


class _TestDaemon:
    """A daemon of this program in a directory of its own, on a free port of the loopback. Raises OSError."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._root = os.path.join(directory, "root")
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._pid = 0  # not that of the launcher which an exe has

    def start(self) -> None:
        """Start it and wait for its ready line. Raise StartupError with what it said instead."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
        command = [*own_command(), "run", f"--root={self._root}", "--addr=127.0.0.1:0"]
        with open(self._file("output"), "wb") as output, open(self._file("errors"), "wb") as errors:
            null = subprocess.DEVNULL
            self._process = subprocess.Popen(command, stdin=null, stdout=output, stderr=errors, env=environment)
        ready = _until(lambda: self._read("output").endswith("\n") or self._has_ended())
        match = re.search(":([0-9]+)$", self._read("output").strip())
        if not ready or not match:
            raise StartupError(f"the daemon did not start: {self._read('errors').strip() or 'it said nothing'}")
        self._port = int(match[1])
        self._pid = int(self.request("GET", "/api/v1/state")["data"]["process"]["pid"])

    def kill(self) -> None:
        """End it as a crash does."""
        if not self._process:
            return
        if self._pid and not self._has_ended():
            os.kill(self._pid, _KILL)
        self._process.kill()
        self._process.wait()
        self._pid = 0

    def request(self, method: str, path: str, body: Any = None, has_token: bool = True) -> Json:
        """Return the envelope of an answer."""
        headers = {}
        if has_token:
            with open(os.path.join(self._root, "token"), encoding="ascii") as file:
                headers["Authorization"] = f"Bearer {file.read().strip()}"
        data = None if body is None else json.dumps(body)
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_SELF_TEST_WAIT_S)
        with contextlib.closing(connection):
            connection.request(method, path, data, headers)
            envelope: Json = json.loads(connection.getresponse().read())
        return envelope

    def submit(self, task: str, steps: Sequence[Json]) -> None:
        """Submit a task whose steps start at once. Raise StartupError."""
        answer = self.request("POST", f"/api/v1/task?ansync=true&id={task}", steps)
        if answer["code"]:
            raise StartupError(f"a task was refused: {answer['message']}")

    def steps(self, task: str) -> list[Json]:
        """Return the steps of a task as its detail shows them."""
        steps: list[Json] = self.request("GET", f"/api/v1/task/{task}")["data"]
        return steps

    def has_finished(self, task: str) -> bool:
        return bool(self.request("GET", f"/api/v1/task/{task}")["code"] != Code.IN_PROGRESS)

    def console(self, task: str, step: int = 0) -> list[str]:
        """Return the lines that a step has written so far."""
        lines: list[str] = self.request("GET", f"/api/v1/task/{task}/{step}/console").get("data", [])
        return lines

    def _has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def _file(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def _read(self, name: str) -> str:
        with open(self._file(name), encoding="utf-8", errors="replace") as file:
            return file.read()


def _until(condition: Callable[[], Any], wait_s: float = _SELF_TEST_WAIT_S) -> Any:
    """Return the first true value of a condition, or the last one when the time is over."""
    end_s = time.monotonic() + wait_s
    while not (value := condition()) and time.monotonic() < end_s:
        time.sleep(_POLL_S)
    return value


class _SelfTest:
    """Tries this program on this host; `run` returns what was seen."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._daemon = _TestDaemon(directory)
        self._begin_s = time.monotonic()
        interpreters = {interpreter: name for name, interpreter in reversed([*INTERPRETERS.items()])}
        self._names = [name for name in INTERPRETERS if name in interpreters.values()]  # each interpreter once

    def run(self) -> list[_Check]:
        """Run all trials. The steps of the interpreters run beside the others, through the restart too."""
        checks: list[_Check] = []
        try:
            for trial in (self._start, self._local_user, self._stop, self._restart):
                checks.append(trial())
            checks += self._interpreter_checks()
        except (StartupError, OSError, ValueError, KeyError, http.client.HTTPException) as error:
            checks.append(_Check("daemon", _FAILED, str(error) or repr(error)))
        finally:
            self._end()
        return checks

    def _start(self) -> _Check:
        self._daemon.start()
        started_s = time.monotonic() - self._begin_s
        self._daemon.submit("interpreters", [self._step(name) for name in self._names])
        return _Check("start", _OK, f"the daemon serves after {started_s:.2f} s")

    def _step(self, name: str) -> Json:
        return {"command_type": name, "command_content": _READY_SCRIPTS[INTERPRETERS[name].suffix]}

    def _local_user(self) -> _Check:
        answer = self._daemon.request("GET", "/api/v1/pool", has_token=False)
        if answer["code"]:
            return _Check("local user", _NOTE, f"clients on this host need a token too: {answer['message']}")
        return _Check("local user", _OK, "a client of this user on this host needs no token")

    def _stop(self) -> _Check:
        """Stop a step that has left a process in the background."""
        held = os.path.join(self._directory, "held")
        self._submit_script("tree", held, _TREE_SCRIPT, _TREE_BATCH)
        lines = self._first_lines("tree")
        if not lines:
            return _Check("stop", _FAILED, f"the step wrote nothing: {self._daemon.steps('tree')[0]['msg']}")
        begin_s = time.monotonic()
        self._daemon.request("PUT", "/api/v1/task/tree")
        if not _until(lambda: self._daemon.has_finished("tree")):
            return _Check("stop", _FAILED, "a stopped step runs on")
        seconds = time.monotonic() - begin_s
        if not _until(lambda: _has_gone(lines[0], held), 1.0):
            return _Check("stop", _FAILED, "a process of the stopped step lives on")
        return _Check("stop", _OK, f"a step and its background process ended within {seconds:.2f} s")

    def _restart(self) -> _Check:
        """Kill the daemon while a step runs; the next one must adopt that and see its end."""
        gate = os.path.join(self._directory, "gate")
        self._submit_script("adopted", gate, _GATED_SCRIPT, _GATED_BATCH)
        self._first_lines("adopted")
        self._daemon.kill()
        self._daemon.start()
        is_adopted = not self._daemon.has_finished("adopted")
        with open(gate, "wb"):
            _until(lambda: self._daemon.has_finished("adopted"))
        step = self._daemon.steps("adopted")[0]
        if not is_adopted or step["code"] or self._daemon.console("adopted") != ["begun", "over"]:
            return _Check("restart", _FAILED, f"the step of a killed daemon was not adopted: {step['msg']}")
        return _Check("restart", _OK, "a step outlived a killed daemon, and the next one saw its end")

    def _first_lines(self, task: str) -> list[str]:
        """Return what the step of a task has written, as soon as there is something; nothing if it ends without."""
        _until(lambda: self._daemon.console(task) or self._daemon.has_finished(task))
        return self._daemon.console(task)

    def _submit_script(self, task: str, file: str, script: str, batch: str) -> None:
        """Submit a task of one step, of this host's own shell, that knows a file's path."""
        name = "cmd" if ON_WINDOWS else "sh"
        content = batch if ON_WINDOWS else script
        step = {"command_type": name, "command_content": content, "env_vars": [f"SELF_TEST_FILE={file}"]}
        self._daemon.submit(task, [step])

    def _interpreter_checks(self) -> list[_Check]:
        left_s = self._begin_s + _SLOW_INTERPRETERS_S - time.monotonic()
        _until(lambda: self._daemon.has_finished("interpreters"), left_s)
        steps = self._daemon.steps("interpreters")
        return [self._interpreter_check(name, step) for name, step in zip(self._names, steps)]

    def _interpreter_check(self, name: str, step: Json) -> _Check:
        try:
            program = interpreter_command(name, "script", ".", "")[0]
        except LaunchError as error:
            return _Check(name, _MISSING, str(error))
        if step["state"] != State.ENDED:
            return _Check(name, _SLOW, f"{program}: has not ended within {_SLOW_INTERPRETERS_S:.0f} s")
        lines = self._daemon.console("interpreters", step["step"])
        if step["code"] or lines[:1] != [_READY]:
            result = _FAILED if name in _NEEDED else _BROKEN
            return _Check(name, result, f"{program}: code {step['code']}: {' '.join(lines)[:80]}")
        return _Check(name, _OK, ", ".join([program, *lines[1:]]))

    def _end(self) -> None:
        """Stop what runs, and the daemon."""
        with contextlib.suppress(OSError, ValueError, KeyError, http.client.HTTPException):  # it is not there
            for task in ("interpreters", "tree", "adopted"):
                self._daemon.request("PUT", f"/api/v1/task/{task}")
            _until(lambda: not self._daemon.request("GET", "/api/v1/pool")["data"]["running"], 6.0)
        self._daemon.kill()


def _has_gone(line: str, file: str) -> bool:
    """Return whether the process whose pid is in the line has ended; on Windows whether nobody holds the file."""
    try:
        if ON_WINDOWS:
            os.unlink(file)
        else:
            os.kill(int(line), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return ON_WINDOWS


def _mount_type(path: str) -> str:
    """Return the type of the file system of a path, such as tmpfs; empty where the host does not show it."""
    found = ("", "")
    with contextlib.suppress(OSError), open("/proc/mounts", encoding="utf-8", errors="replace") as file:
        for line in file:
            place, kind = line.split()[1:3]
            if os.path.join(path, "").startswith(os.path.join(place, "")) and len(place) >= len(found[0]):
                found = (place, kind)
    return found[1]


def _look_at_root(settings: Settings) -> str:
    root = os.path.abspath(settings.root)
    parent = root
    while not os.path.isdir(parent) and os.path.dirname(parent) != parent:  # as of a drive that is not there
        parent = os.path.dirname(parent)
    parent = os.path.realpath(parent)
    kind = _mount_type(parent)
    notes = [root, f"{shutil.disk_usage(parent).free // 2**20} MiB free", kind]
    if is_temporary(parent) or kind in ("tmpfs", "ramfs"):
        notes.append("temporary: choose another --root to keep what is in it")
    return ", ".join(filter(None, notes))


def _look_at_port(settings: Settings) -> str:
    host, port = parse_address(settings.addr)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        return f"{settings.addr} cannot be used: {error.strerror}"
    return f"{settings.addr} is free"


def _look_at_descriptors(settings: Settings) -> str:
    raise_fd_limit()
    limit = descriptor_limit()
    capacity = step_capacity(limit, process_limits(), settings.max_connections)
    count = min(capacity.steps, settings.pool_size)
    files = limit.value if limit else "unlimited"
    return f"{files} open files; {count} steps run at once of the {settings.pool_size} of --pool_size"


def _look_at_processes(_: Settings) -> str:
    """Return how the ends of steps are seen and, on a Mac, whether the kernel's structures are those known here."""
    if ON_WINDOWS:
        return "handles tell of the ends of steps"
    text = "ends of steps are polled for, 50 times a second"
    watch = _system().watch_exit(os.getpid())
    if watch.descriptor >= 0:
        text = "a descriptor tells of the end of a step (pidfd or kqueue)"
    watch.close()
    if ON_MAC:
        text += f"; the process table is {MacKernel().find_difference() or 'as declared'}"
    return text


def _look_at_home(_: Settings) -> str:
    home = os.environ.get("USERPROFILE" if ON_WINDOWS else "HOME")
    return home or "not set: steps get that of the user database"


def _look_at_clock(_: Settings) -> str:
    sleep = "counts" if _SLEEP_CLOCKS is None else "does not count"
    return f"{format_time(int(time.time()))}; time that the host sleeps {sleep}"


def _look_at_encoding(_: Settings) -> str:
    encoding = getattr(sys.stdout, "encoding", None)
    return f"output that is not UTF-8 is taken for {fallback_encoding()}; standard output here is {encoding}"


_LOOKS: Mapping[str, Callable[[Settings], str]] = {
    "root": _look_at_root,
    "port": _look_at_port,
    "descriptors": _look_at_descriptors,
    "processes": _look_at_processes,
    "home": _look_at_home,
    "clock": _look_at_clock,
    "encoding": _look_at_encoding,
}


def _look_at_host(settings: Settings) -> list[_Check]:
    """Return what this host has, as far as a daemon with these settings would meet it."""
    notes = []
    for name, look in _LOOKS.items():
        try:
            notes.append(_Check(name, _NOTE, look(settings)))
        except (OSError, AttributeError) as error:  # the latter of a library that lacks a function
            notes.append(_Check(name, _NOTE, f"cannot be told: {error}"))
    return notes


def _remove_tree(directory: str) -> bool:
    """Remove a directory with all that is in it; return whether it is gone."""
    shutil.rmtree(directory, ignore_errors=True)
    return not os.path.exists(directory)


def self_test(settings: Settings, is_json: bool) -> int:
    """Try this program on this host and show what was seen; return 0, or 1 where something failed."""
    begin_s = time.monotonic()
    directory = os.path.realpath(tempfile.mkdtemp(prefix="remote_executor-selftest-"))
    try:
        checks = _SelfTest(directory).run()
    finally:
        _until(lambda: _remove_tree(directory), 2.0)  # Windows may still hold a file of an ended process
    checks += _look_at_host(settings)
    has_failed = any(check.result == _FAILED for check in checks)
    seconds = round(time.monotonic() - begin_s, 3)
    host = host_info()._replace(name="")  # a report is shown to others
    if is_json:
        rows = [check._asdict() for check in checks]
        report = {"ok": not has_failed, "seconds": seconds, "program": version_line(), "host": host._asdict()}
        print_json({**report, "checks": rows})
        return int(has_failed)
    verdict = "something FAILED" if has_failed else "what the program needs works here"
    lines = [version_line(), " ".join(filter(None, host))]
    lines += [f"{check.result:<9}{check.name:<13}{check.detail}" for check in checks]
    print("\n".join([*lines, f"{verdict} ({seconds:.1f} s)"]))
    return int(has_failed)


# ======================================================================================================================
# VI program / client: requests to a daemon, made again over faults and restarts
# ======================================================================================================================

# A command may run for hours while its daemon restarts or the network goes away. So each request may be made again:
# what it changes is named by an id that the client chose, output is taken up at the byte where it broke off, events
# after the last one seen. A daemon that was never reached is given up soon, for its name is probably wrong; one that
# was reached before is waited for as long as an upgrade takes.

_CLIENT_PORT = 2376
_FIRST_PATIENCE_S = 3.0
_LATER_PATIENCE_S = 300.0
_MAX_RETRY_DELAY_S = 5.0
_ANSWER_TIMEOUT_S = 90.0  # events have a comment every 15 s; a wait is answered after a minute
_RETRIED_STATUS = (429, 502, 503, 504)
_TRANSFER_BYTES = 1 << 18
_CLIENT_FAILED = 125  # as of env(1), timeout(1) and docker: the command itself, not what it ran
_TIMED_OUT = 124  # as of timeout(1)
_INTERRUPTED = 130  # as a shell shows a death by SIGINT
_BROKEN_PIPE = 141  # as a shell shows a death by SIGPIPE
_MAX_EXIT_CODE = 0x7FFF_FFFF  # of Windows, as a C long


_ANSI_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Return a text of others, such as a step's output, that cannot steer the terminal of who reads it."""
    return _CONTROL.sub(" ", _ANSI_SEQUENCE.sub("", text))


class ClientError(Exception):
    """A client's command cannot do its work; the text is the one line that the user sees."""


class Endpoint(NamedTuple):
    """A daemon as a client reaches it."""

    name: str  # for people: in prefixes and tables
    url: str  # without a slash at its end; a path in it is the prefix of a reverse proxy
    token: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""


def parse_endpoint_url(text: str) -> str:
    """Return the URL of HOST, HOST:PORT, [::1]:PORT or of a URL. Raise UsageError."""
    url = text
    is_url = "://" in text
    if not is_url:
        is_ipv6 = text.count(":") > 1 and not text.startswith("[")
        url = f"http://[{text}]" if is_ipv6 else f"http://{text}"
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        parts = urllib.parse.urlsplit("")
    is_valid = parts.scheme in ("http", "https") and parts.hostname
    if not is_valid or parts.query or parts.username or re.search(r"[\s\x00-\x1f]", text):
        raise UsageError(f"invalid host {text!r}: expected for example build-7, build-7:2376 or https://build-7:2376")
    authority = parts.netloc
    if port is None and not is_url:
        authority = f"{authority.rstrip(':')}:{_CLIENT_PORT}"
    return f"{parts.scheme}://{authority}{parts.path.rstrip('/')}"


class Reply(NamedTuple):
    """What the daemon answered: `code` and `data` of the envelope, and `task` beside the steps of a task."""

    code: int
    data: Any
    task: Any


class Api:
    """Requests to one daemon over one kept connection; each thread makes one of its own."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._url = urllib.parse.urlsplit(endpoint.url)
        self._target_prefix = self._url.path  # or all of the URL, for a proxy
        self._connection: http.client.HTTPConnection | None = None
        self._was_reached = False
        self._failures = 0
        self._failing_since_s = 0.0

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._connection:
            self._connection.close()
        self._connection = None

    def call(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
    ) -> Reply:
        """Make a request until it is answered. Raise ClientError when it is refused, or never answered."""
        content = None
        if body is not None:
            content = json.dumps(body).encode()
        while True:
            with self.open(method, path, query, content) as response:
                try:
                    return self._parse(response.read())
                except (OSError, http.client.HTTPException) as error:
                    broken = error
            self.wait_to_retry(broken)

    def require(self, features: Iterable[str]) -> Any:
        """Return what /version shows. Raise ClientError for a daemon that cannot do what is needed."""
        version = self.call("GET", "/version").data
        missing = [
            feature
            for feature in features
            if feature
            not in version.get(
                "features",
                (),
            )
        ]
        if missing:
            what = ", ".join(missing)
            raise ClientError(f"{self.endpoint.name}: its remote_executor is too old for this: no {what}; upgrade it")
        return version

    def _parse(self, text: bytes) -> Reply:
        try:
            envelope = json.loads(text)
            return Reply(
                envelope["code"],
                envelope.get("data"),
                envelope.get("task"),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ClientError(f"{self.endpoint.url} is not a remote_executor: it answered {text[:60]!r}") from None

    def open(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> http.client.HTTPResponse:
        """Make a request until its answer begins, and return that; the caller reads and closes it.

        `body` is bytes, or a file, of which a repetition sends all again. Raise ClientError.
        """
        while True:
            try:
                response = self._send(method, path, query, body, headers or {})
            except (OSError, http.client.HTTPException) as error:
                self.wait_to_retry(error)
                continue
            self._was_reached = True
            if response.status not in _RETRIED_STATUS:
                break
            self.wait_to_retry(self._refusal(response))
        self._failures = 0
        if response.status >= 400:
            raise self._refusal(response)
        return response

    def wait_to_retry(self, error: Exception) -> None:
        """Wait before a request is made again, longer each time. Raise ClientError when that has no prospect."""
        self.close()
        now_s = time.monotonic()
        if not self._failures:
            self._failing_since_s = now_s
        self._failures += 1
        failing_s = now_s - self._failing_since_s
        patience_s = _LATER_PATIENCE_S if self._was_reached else _FIRST_PATIENCE_S
        if failing_s > patience_s or not _is_temporary(error):
            raise ClientError(f"{self._fault(error)}; does the daemon run there, is -H right?") from error
        if failing_s > _FIRST_PATIENCE_S:
            _tell_once(f"{self._fault(error)}; trying again for {_LATER_PATIENCE_S:.0f} s")
        time.sleep(
            min(_MAX_RETRY_DELAY_S, 0.05 * 2 ** min(self._failures, 10)),
        )

    def _fault(self, error: Exception) -> str:
        if isinstance(error, ClientError):
            return str(error)
        reason = getattr(error, "strerror", "") or str(error) or type(error).__name__
        return f"{self.endpoint.url} cannot be reached: {reason}"

    def _refusal(self, response: http.client.HTTPResponse) -> ClientError:
        """Return what to tell of an answer that is an error, and end its connection."""
        message = f"HTTP status {response.status}"
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError, TypeError):  # a proxy's page
            message = printable(json.loads(response.read())["message"])
        self.close()
        hint = ""
        if response.status == 401:
            hint = "; give --token_file or $REMOTE_EXECUTOR_TOKEN"
        return ClientError(f"{self.endpoint.name}: {message}{hint}")

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None,
        body: Any,
        headers: Mapping[str, str],
    ) -> http.client.HTTPResponse:
        connection = self._connection or self._connect()
        self._connection = connection
        target = self._target_prefix + path
        if query:
            target += "?" + urllib.parse.urlencode(query, doseq=True).replace(
                "=True",
                "=true",
            )
        all_headers = {"Accept": "application/json", **headers}
        if self.endpoint.token:
            all_headers["Authorization"] = f"Bearer {self.endpoint.token}"
        if hasattr(body, "seek"):
            body.seek(0)
            all_headers["Content-Length"] = str(os.fstat(body.fileno()).st_size)
        try:
            connection.request(method, target, body, all_headers)
        except (BrokenPipeError, ConnectionResetError):
            if connection.sock is None:
                raise
        return connection.getresponse()  # after a body that was not taken, it says why

    def _connect(self) -> http.client.HTTPConnection:
        """Return a connection; it opens when the first request is sent."""
        host = self._url.hostname or ""
        port = self._url.port
        proxy = _proxy_for(self._url.scheme, host)
        address: tuple[str, int | None] = (host, port)
        if proxy:
            address = (proxy.hostname, proxy.port or 8080)
        options: dict[str, Any] = {"timeout": _ANSWER_TIMEOUT_S, "blocksize": _TRANSFER_BYTES}
        if self._url.scheme == "http":
            if proxy:
                self._target_prefix = self.endpoint.url  # RFC 9112, 3.2.2
            return http.client.HTTPConnection(*address, **options)
        secure = http.client.HTTPSConnection(
            *address,
            **options,
            context=self._tls_context(),
        )
        if proxy:
            secure.set_tunnel(host, port)
        return secure

    def _tls_context(self) -> Any:
        import ssl

        endpoint = self.endpoint
        try:
            context = ssl.create_default_context(cafile=endpoint.ca_file or None)
            if endpoint.cert_file:
                context.load_cert_chain(endpoint.cert_file, endpoint.key_file or None)
        except (OSError, ValueError) as error:
            raise ClientError(f"--cacert, --cert or --key cannot be used: {error}") from None
        return context


@functools.lru_cache(maxsize=64)
def _tell_once(text: str) -> None:
    """Print a line, for the several connections of a command meet the same fault."""
    print_error(text)


def _is_temporary(error: Exception) -> bool:
    """Return whether the same request may succeed later: not with a wrong name or certificate."""
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    return type(error).__name__ != "SSLCertVerificationError"  # by name: ssl is imported for https alone


def _is_own_host(host: str) -> bool:
    try:
        return is_loopback(host)
    except ValueError:
        return host == "localhost"


def _proxy_for(scheme: str, host: str) -> Any:
    """Return the proxy that the environment names for a host, as urlsplit does; None where it names none."""
    url = os.environ.get(f"{scheme}_proxy") or os.environ.get(f"{scheme.upper()}_PROXY")
    if not url or _is_own_host(host):
        return None
    from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

    if proxy_bypass_environment(host):
        return None
    return urllib.parse.urlsplit(url if "://" in url else f"http://{url}")


# -- which daemon, with which token


def _read_lines(flag: str, path: str) -> list[str]:
    """Raise ClientError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read().splitlines()
    except OSError as error:
        raise ClientError(f"{flag}: {path} cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise ClientError(f"{flag}: {path} is not text in UTF-8") from None


def _read_token(path: str) -> str:
    """Return the first token of a file, in which a line is a token and perhaps a comment. Raise ClientError."""
    for line in _read_lines("--token_file", path):
        words = line.split()
        if words and not words[0].startswith("#"):
            return words[0]
    raise ClientError(f"--token_file: {path} has no token")


def _local_roots() -> Iterator[str]:
    """Yield the roots in which a daemon of this host may be."""
    yield os.environ.get(ENV_PREFIX + "ROOT", "")
    for is_user in (False, True):
        with contextlib.suppress(StartupError):  # no service manager that is known
            yield host_services(ServiceOptions(is_user)).default_root
    yield default_root()


def _accepts_connections(url: str) -> bool:
    """Return whether somebody listens there; the file of a killed daemon stays."""
    parts = urllib.parse.urlsplit(url)
    try:
        socket.create_connection((parts.hostname, parts.port), 1.0).close()
    except OSError:
        return False
    return True


def local_endpoint() -> Endpoint:
    """Return the daemon of this host by the URL that it left in its root, else the default address."""
    for root in filter(None, _local_roots()):
        try:
            url = parse_endpoint_url(
                _read_lines("", os.path.join(root, URL_FILE))[0],
            )
        except (ClientError, UsageError, IndexError):  # no daemon has it, or another user's
            continue
        if _accepts_connections(url):
            token = ""
            with contextlib.suppress(ClientError):  # a client on the daemon's host may need none
                token = _read_token(os.path.join(root, "token"))
            return Endpoint("localhost", url, token)
    return Endpoint("localhost", f"http://127.0.0.1:{_CLIENT_PORT}")


def _given_token(options: argparse.Namespace) -> str:
    path = options.token_file or os.environ.get(ENV_PREFIX + "TOKEN_FILE", "")
    if path and not path.startswith("$ROOT"):  # which is a daemon's word
        return _read_token(path)
    return os.environ.get(ENV_PREFIX + "TOKEN", "")


def _endpoints_of_file(path: str, default: Endpoint) -> list[Endpoint]:
    """Return the hosts of a file; a line is a name and, where they differ, URL, token file and CA file.

    Raise ClientError and UsageError.
    """
    endpoints = []
    for line in _read_lines("-H", path):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, url, token_file, ca_file = (words + [""] * 3)[:4]
        endpoint = default._replace(name=name, url=parse_endpoint_url(url or name))
        if token_file:
            endpoint = endpoint._replace(token=_read_token(token_file))
        if ca_file:
            endpoint = endpoint._replace(ca_file=ca_file)
        endpoints.append(endpoint)
    return endpoints


def endpoints_of(options: argparse.Namespace) -> list[Endpoint]:
    """Return the daemons that the command line and the environment name. Raise ClientError and UsageError."""
    text = options.host or os.environ.get(ENV_PREFIX + "HOST", "")
    token = _given_token(options)
    default = Endpoint("", "", token, options.cacert, options.cert, options.key)
    if not text:
        local = local_endpoint()
        return [default._replace(name=local.name, url=local.url, token=token or local.token)]
    if text.startswith("@"):
        endpoints = _endpoints_of_file(text[1:], default)
    else:
        endpoints = [default._replace(name=host, url=parse_endpoint_url(host)) for host in text.split(",") if host]
    if not endpoints:
        raise UsageError(f"-H: {text} names no host")
    return endpoints


def single_api(options: argparse.Namespace) -> Api:
    """Return the one daemon that a command speaks to. Raise ClientError and UsageError."""
    endpoints = endpoints_of(options)
    if len(endpoints) != 1:
        raise UsageError("-H: several hosts are for exec and submit alone; give one")
    return Api(endpoints[0])


# -- streams that are taken up where they broke off


def _read_parts(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yield the body as it comes. Raise OSError and HTTPException where it breaks off."""
    left_bytes = response.length  # None of what is followed
    while chunk := response.read1(_TRANSFER_BYTES):
        if left_bytes is not None:
            left_bytes -= len(chunk)
        yield chunk
    if left_bytes:
        raise ConnectionResetError("the answer broke off")


def _copy_body(
    api: Api,
    open_at: Callable[[int | None], http.client.HTTPResponse],
    write: Callable[[bytes], Any],
) -> None:
    """Write a body, each byte once, however often the connection breaks.

    `open_at` begins an answer at a byte, at first at None. Raise ClientError, and whatever the two raise.
    """
    offset: int | None = None
    while True:
        with open_at(offset) as response:
            offset = offset or int(response.getheader("X-Output-Offset", "0"))
            parts = _read_parts(response)
            while True:
                try:
                    part = next(parts, b"")
                except (OSError, http.client.HTTPException) as error:
                    broken = error
                    break
                if not part:
                    return
                write(part)  # its errors are not the connection's
                offset += len(part)
        api.wait_to_retry(broken)


def copy_output(
    api: Api,
    path: str,
    query: Mapping[str, Any],
    write: Callable[[bytes], Any],
) -> None:
    """Write what a step has put out, to its end where `follow` is asked for. Raise ClientError, and as `write` does."""

    def open_at(offset: int | None) -> http.client.HTTPResponse:
        wanted = dict(query)
        if offset is not None:
            wanted.pop("tail", None)
            wanted["offset"] = offset
        response = api.open(
            "GET",
            path,
            wanted,
            headers={"Accept": "*/*"},
        )
        if response.getheader("X-Output-Offset") is None:
            raise ClientError(f"{api.endpoint.name}: no such task or step: never there, expired or deleted")
        return response

    _copy_body(api, open_at, write)


def follow_output(
    api: Api,
    step_path: str,
    stream: str,
    write: Callable[[bytes], Any],
    attempt: int = 1,
) -> Any:
    """Write what a step puts out to its end, attempt by attempt from this one on; return the ended step.

    Raise ClientError, and as `write` does.
    """
    while True:
        query = {"follow": "true", "stream": stream, "attempt": attempt}
        copy_output(api, f"{step_path}/output", query, write)
        reply = api.call("GET", step_path)
        if reply.data is None:
            raise ClientError(f"{api.endpoint.name}: the task expired or was deleted meanwhile")
        is_over = reply.data["result"] not in ("waiting", "running", "paused")
        if is_over and reply.data["attempt"] <= attempt:
            return reply.data
        attempt += 1


def copy_file(
    api: Api,
    path: str,
    begin: Callable[[int], Any],
    write: Callable[[bytes], Any],
) -> None:
    """Write a file; `begin` is told its size. Raise ClientError, and as `write` does."""

    def open_at(offset: int | None) -> http.client.HTTPResponse:
        headers = {"Accept": "*/*"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        response = api.open("GET", path, headers=headers)
        if response.getheader("Content-Disposition") is None:
            raise ClientError(f"{api.endpoint.name}: no such task, or a directory and no file: {path}; see `ls`")
        if offset is None:
            begin(response.length or 0)
        return response

    _copy_body(api, open_at, write)


class ClientEvent(NamedTuple):
    """An event of the daemon: `name` is task, step, pool, expired or reset, or empty when the stream begins."""

    name: str
    data: Any


def read_events(api: Api, task_id: str = "") -> Iterator[ClientEvent]:
    """Yield the daemon's events for ever, each once; a `reset` says that some were missed. Raise ClientError."""
    query = {"task": task_id} if task_id else {}
    headers = {"Accept": "text/event-stream"}
    while True:
        with api.open("GET", "/api/v1/event", query, headers=headers) as response:
            yield ClientEvent("", None)
            fields: dict[str, str] = {}
            broken: Exception = ConnectionResetError("the events ended")
            try:
                while line := response.readline().decode("utf-8", "replace"):
                    name, _, value = line.rstrip("\r\n").partition(": ")
                    if name:
                        fields[name] = value
                        continue
                    if "id" in fields:
                        headers["Last-Event-ID"] = fields["id"]
                    if "event" in fields:
                        yield ClientEvent(
                            fields["event"],
                            json.loads(fields.get("data", "null")),
                        )
                    fields = {}
            except (OSError, http.client.HTTPException, ValueError) as error:
                broken = error
        api.wait_to_retry(broken)


class Interrupts:
    """Counts Ctrl-C and SIGTERM, which then do not end the program; the third one does. For the main thread."""

    def __init__(self) -> None:
        self.count = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup(1) and shells have it
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, *_: object) -> None:
        self.count += 1
        if self.count > 2:
            print_error("interrupted for the third time: what it ran may go on")
            os._exit(_INTERRUPTED)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


# ======================================================================================================================
# VI program / client output: tables, colours and times for people, output as it comes
# ======================================================================================================================

_COLORS = {"succeeded": "32", "running": "36", "waiting": "2", "paused": "33", "not_run": "2", "bold": "1"}
_FAILED_COLOR = "31"
_FAILED_MARK = ""
_MARKS = {"succeeded": "✓", "running": "▶", "waiting": "·", "paused": "‖", "not_run": "–", _FAILED_MARK: "✗"}
_ASCII_MARKS = {"succeeded": "+", "running": ">", "waiting": ".", "paused": "=", "not_run": "-", _FAILED_MARK: "x"}
_REDRAW_INTERVAL_S = 0.25
_MAX_KEPT_LINE_BYTES = 1 << 16  # a longer one is written in parts, for it is kept in memory


def format_seconds(seconds: float) -> str:
    """Return how long something took: 0.3s, 12s, 3m05s, 2h10m, 4d02h."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    minutes, whole_s = divmod(int(seconds), 60)
    if not minutes:
        return f"{whole_s}s"
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes}m{whole_s:02}s"
    days, hours = divmod(hours, 24)
    if not days:
        return f"{hours}h{minutes:02}m"
    return f"{days}d{hours:02}h"


def format_ago(moment: str) -> str:
    """Return how long ago a moment in RFC 3339 was; an empty text where there is none."""
    if not moment:
        return ""
    then = datetime.datetime.fromisoformat(moment.replace("Z", "+00:00"))
    seconds = (datetime.datetime.now(datetime.timezone.utc) - then).total_seconds()
    return f"{format_seconds(max(0.0, seconds))} ago"  # the clock of the daemon may be ahead


def format_bytes(count: int) -> str:
    """Return a size with its unit: 512 B, 3.4 MiB."""
    if count < 1024:
        return f"{count} B"
    size = count / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


class Screen:
    """A stream as people see it: in colours and redrawn on a terminal, plain elsewhere. Thread-safe."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()  # keeps lines whole
        self.is_terminal = is_ansi_terminal(stream)
        self._has_color = self.is_terminal and not os.environ.get("NO_COLOR")
        self._marks = _MARKS
        try:
            "".join(_MARKS.values()).encode(stream.encoding or "ascii")
        except (UnicodeError, LookupError):
            self._marks = _ASCII_MARKS
        self._drawn_lines = 0

    def paint(self, text: str, word: str) -> str:
        """Return the text in the colour of a result, or of `bold`."""
        if not self._has_color:
            return text
        return f"\x1b[{_COLORS.get(word, _FAILED_COLOR)}m{text}\x1b[0m"

    def mark(self, result: str) -> str:
        """Return the sign of a result, in its colour."""
        mark = self._marks.get(result, self._marks[_FAILED_MARK])
        return self.paint(mark, result)

    def print(self, *lines: str) -> None:
        text = "".join(f"{line}\n" for line in lines)
        with self._lock:
            self._stream.write(text)
            self._stream.flush()

    def draw(self, lines: Sequence[str]) -> None:
        """Draw lines over those of the call before; on a terminal alone."""
        width, height = shutil.get_terminal_size()
        shown = [_cut(line, width - 1) for line in lines[: height - 1]]
        back = f"\x1b[{self._drawn_lines}A\x1b[J" if self._drawn_lines else ""
        self._drawn_lines = len(shown)
        with self._lock:
            self._stream.write(back + "".join(f"{line}\n" for line in shown))
            self._stream.flush()

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        results: Sequence[str] = (),
    ) -> list[str]:
        """Return the lines of a table, its columns aligned; a row is in the colour of its result."""
        widths = column_widths([header, *rows])
        lines = [self.paint(align(header, widths), "bold")]
        for index, row in enumerate(rows):
            line = align(row, widths)
            if results:
                line = self.paint(line, results[index])
            lines.append(line)
        return lines


def column_widths(rows: Iterable[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows)]


def align(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Return the cells as a line, each as wide as its column."""
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()


def _cut(line: str, width: int) -> str:
    """Return the line, of which at most `width` characters show, with all of its colours."""
    shown = 0
    end = 0
    while end < len(line) and shown < width:
        sequence = _ANSI_SEQUENCE.match(line, end)
        if sequence:
            end = sequence.end()
        else:
            end += 1
            shown += 1
    return line[:end] + "".join(_ANSI_SEQUENCE.findall(line[end:]))


class OutputWriter:
    """Writes a step's output to a stream of this process: its bytes, or on the console of Windows its letters.

    A stream that nobody reads any more raises BrokenPipeError, another fault of it ClientError.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._decoder: Any = None
        if ON_WINDOWS and stream.isatty():
            import codecs

            self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, content: bytes) -> None:
        try:
            if self._decoder:
                self._stream.write(self._decoder.decode(content))
            else:
                self._stream.buffer.write(content)
            self._stream.flush()
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EINVAL):  # the latter on Windows
                raise BrokenPipeError from None
            raise ClientError(f"the output cannot be written: {error.strerror or error}") from None

    def close(self) -> None:
        """Do nothing: the stream stays open. LineWriter has a rest to write."""


class LineWriter:
    """Passes on a step's output line by line, as a text without its end."""

    def __init__(self, emit: Callable[[str], Any]) -> None:
        self._emit = emit
        self._rest = b""

    def write(self, content: bytes) -> None:
        *lines, self._rest = (self._rest + content).split(b"\n")
        for line in lines:
            self._pass_on(line)
        if len(self._rest) > _MAX_KEPT_LINE_BYTES:
            self.close()

    def close(self) -> None:
        """Pass on what has no line end."""
        if self._rest:
            self._pass_on(self._rest)
        self._rest = b""

    def _pass_on(self, line: bytes) -> None:
        self._emit(line.decode("utf-8", "replace").rstrip("\r"))


class Progress:
    """A bar on standard error for what takes longer than a second, on a terminal alone."""

    def __init__(self, what: str) -> None:
        self._what = printable(what)
        self._total_bytes = 1
        self._done_bytes = 0
        self._begin_s = time.monotonic()
        self._shown_s = self._begin_s
        self._is_shown = False
        self._is_terminal = is_ansi_terminal(sys.stderr)

    def begin(self, total_bytes: int) -> None:
        self._total_bytes = max(total_bytes, 1)

    def add(self, count: int) -> None:
        self._done_bytes += count
        now_s = time.monotonic()
        took_s = now_s - self._begin_s
        if not self._is_terminal or took_s < 1 or now_s - self._shown_s < _REDRAW_INTERVAL_S:
            return
        self._shown_s = now_s
        self._is_shown = True
        share = min(1.0, self._done_bytes / self._total_bytes)
        bar = ("#" * int(share * 30)).ljust(30, ".")
        rate = format_bytes(int(self._done_bytes / took_s))
        sys.stderr.write(f"\r\x1b[2K{self._what} [{bar}] {share:4.0%} of {format_bytes(self._total_bytes)}, {rate}/s")
        sys.stderr.flush()

    def close(self) -> None:
        if self._is_shown:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()


def print_json_line(data: Any) -> None:
    """Print an object as one line of JSON."""
    print_json(data, indent=None)
    sys.stdout.flush()


# ======================================================================================================================
# VI program / client commands: exec, submit, follow, list and the others
# ======================================================================================================================

_TYPE_BY_SUFFIX = {
    ".sh": "sh",
    ".bash": "bash",
    ".ksh": "ksh",
    ".zsh": "zsh",
    ".csh": "csh",
    ".py": "python",
    ".ps1": "powershell",
    ".cmd": "cmd",
    ".bat": "cmd",
}
_CMD_SPECIAL = re.compile(r'([()!^"<>&|])')
_INTERRUPT_CHECK_S = 0.2
_EVENTS_TRUST_S = 15.0
_TAIL_OF_FAILED_STEP = 10
_UNBEGUN_RESULTS = ("waiting", "paused", "not_run", "not_started")
_QUIET_RESULTS = ("waiting", "running", "paused", "succeeded", "not_run")  # of which nothing has to be explained


def _task_path(
    task_id: str,
    step: str = "",
    leaf: str = "",
) -> str:
    parts = ["/api/v1/task", urllib.parse.quote(task_id, safe="")]
    if step:
        parts.append(urllib.parse.quote(step, safe=""))
    if leaf:
        parts.append(leaf)
    return "/".join(parts)


def _call_task(
    api: Api,
    method: str,
    task_id: str,
    step: str = "",
    leaf: str = "",
    **query: Any,
) -> Reply:
    """Make a request about a task or a step. Raise ClientError where there is none."""
    reply = api.call(method, _task_path(task_id, step, leaf), query)
    if reply.code == Code.NOT_FOUND:
        what = f"task {task_id!r}"
        if step:
            what = f"step {step!r} of {what}"
        ended = " or ended" if method == "PUT" else ""
        raise ClientError(f"{api.endpoint.name}: no {what}: never there, expired, deleted{ended}; see `list`")
    return reply


def _exit_code(result: str, code: int) -> int:
    """Return what this program ends with for the result and the code of a step or a task."""
    if result == "succeeded":
        return 0
    if result == "timed_out":
        return _TIMED_OUT
    if code > 255 and not ON_WINDOWS:
        return 255  # exit(3) keeps 8 bits, which may be 0
    if code > _MAX_EXIT_CODE:
        return code - 2 * (_MAX_EXIT_CODE + 1)  # the same 32 bits as sys.exit takes them
    return code or 1


def _task_exit_code(reply: Reply) -> int:
    """Return that of the first step that failed; of a task that was ended before any could, of the task."""
    for step in reply.data:
        if step["code"]:
            return _exit_code(step["result"], step["code"])
    return _exit_code(reply.task["result"], 0)


def _seconds_text(record: Mapping[str, Any]) -> str:
    if "started_at" not in record:
        return ""
    return format_seconds(record["seconds"])


def _await_in_thread(action: Callable[[], Any]) -> Any:
    """Return what the action does; meanwhile Ctrl-C is heard, for on Windows no signal ends a thread's wait."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except (ClientError, OSError) as error:
            future.set_exception(error)

    threading.Thread(target=run, name="client", daemon=True).start()
    while not future.done():
        with contextlib.suppress(concurrent.futures.TimeoutError):
            future.result(_INTERRUPT_CHECK_S)
    return future.result()


# -- jobs: a task on one host, from its submission to its end


class JobOutcome(NamedTuple):
    """What came of a job on a host; `code` is what this program would end with."""

    result: str
    code: int
    seconds: float = 0.0
    message: str = ""


class Job:
    """A task on one host, made and followed by one thread; `stop` is for another."""

    def __init__(self, endpoint: Endpoint, task_id: str) -> None:
        self.endpoint = endpoint
        self.task_id = task_id
        self._was_stopped = False

    def run(self) -> JobOutcome:
        """Do it to its end. A ClientError is an outcome too."""
        try:
            outcome = self.do()
        except ClientError as error:
            outcome = JobOutcome("error", _CLIENT_FAILED, message=str(error))
        if self._was_stopped:
            return outcome._replace(code=_INTERRUPTED)
        return outcome

    def do(self) -> JobOutcome:
        raise NotImplementedError

    def stop(self) -> None:
        """Stop the task; a second time at once."""
        self._was_stopped = True
        query = {"action": "stop", "reason": "interrupted at the client"}
        with contextlib.suppress(ClientError), Api(self.endpoint) as api:  # who follows the task tells of it
            api.call("PUT", _task_path(self.task_id), query)

    def post(
        self,
        api: Api,
        query: Mapping[str, Any],
        steps: Sequence[Any],
    ) -> Any:
        """Submit the task under its id and return what the daemon says. Raise ClientError."""
        data = api.call(
            "POST",
            "/api/v1/task",
            {"id": self.task_id, **query},
            list(steps),
        ).data
        for warning in data.get("warnings", ()):
            print_error(f"{self.endpoint.name}: {printable(warning)}")
        if self._was_stopped:
            self.stop()  # the first one came too early
        return data


def _run_jobs(
    jobs: Sequence[Job],
    parallel: int,
    is_fail_fast: bool,
) -> dict[Job, JobOutcome]:
    """Run the jobs, `parallel` at a time; Ctrl-C stops all, and after a failure no other begins if so asked.

    Return the outcomes of those that began.
    """
    outcomes: dict[Job, JobOutcome] = {}
    is_over = threading.Event()  # no further one begins

    def run(job: Job) -> None:
        if is_over.is_set():
            return
        outcomes[job] = job.run()
        if is_fail_fast and outcomes[job].code:
            is_over.set()

    stops = 0
    with Interrupts() as interrupts, concurrent.futures.ThreadPoolExecutor(max(1, parallel), "job") as pool:
        futures = {pool.submit(run, job): job for job in jobs}
        pending = set(futures)
        while pending:
            done, pending = concurrent.futures.wait(pending, _INTERRUPT_CHECK_S)
            for future in done:
                future.result()
            if interrupts.count > stops:
                stops = interrupts.count
                is_over.set()
                print_error("stopping what runs; Ctrl-C again kills it at once")
                for future in filter(Future.running, pending):
                    threading.Thread(target=futures[future].stop, name="stop", daemon=True).start()
    return outcomes


def _run_on_hosts(jobs: Sequence[Job], options: argparse.Namespace) -> int:
    """Run a job a host, canaries first, and tell what came of each; return the worst code."""
    outcomes = {}
    if options.canary:
        outcomes = _run_jobs(
            jobs[: options.canary],
            options.parallel,
            options.fail_fast,
        )
    if not any(outcome.code for outcome in outcomes.values()):
        others = jobs[options.canary :]
        outcomes.update(_run_jobs(others, options.parallel, options.fail_fast))
    rows = []
    for job in jobs:
        outcome = outcomes.get(job) or JobOutcome("not_begun", 0)
        if options.json:
            print_json_line(
                {"host": job.endpoint.name, "id": job.task_id, **outcome._asdict()},
            )
        took = format_seconds(outcome.seconds)
        message = printable(outcome.message)
        rows.append(
            (
                job.endpoint.name,
                outcome.result,
                str(outcome.code),
                took,
                job.task_id,
                message,
            ),
        )
    if not options.json:
        screen = Screen(sys.stderr)
        header = ("HOST", "RESULT", "CODE", "TOOK", "TASK", "MESSAGE")
        results = [row[1] for row in rows]
        screen.print(*screen.table(header, rows, results))
    return max([outcome.code for outcome in outcomes.values()], default=0)


# -- exec


def to_cmd_line(words: Sequence[str]) -> str:
    """Return a line of a batch file that runs a program with these words as they are. Raise UsageError.

    cmd sees no quotes, for each of its special characters stands behind a caret; those of list2cmdline are for the
    program (CommandLineToArgvW). A batch file wants its per cent signs doubled.
    """
    line = subprocess.list2cmdline(words)
    if re.search(r"[\r\n]", line):
        raise UsageError("exec: cmd takes no line break within a word; give a script with -c --type powershell")
    return _CMD_SPECIAL.sub(r"^\1", line).replace("%", "%%")


class _ExecJob(Job):
    """Runs one step, its output to the writers as it comes."""

    def __init__(
        self,
        endpoint: Endpoint,
        options: argparse.Namespace,
        stdin: bytes,
        is_single: bool,
    ) -> None:
        super().__init__(endpoint, f"exec-{os.urandom(16).hex()}")
        self._options = options
        self._stdin = stdin
        self._writers: dict[str, OutputWriter | LineWriter] = {}
        for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
            if options.json:
                self._writers[name] = LineWriter(
                    functools.partial(self._print_json, name),
                )
            elif is_single:
                self._writers[name] = OutputWriter(stream)
            else:
                self._writers[name] = LineWriter(
                    functools.partial(self._print, Screen(stream)),
                )

    def _print_json(self, stream: str, line: str) -> None:
        print_json_line(
            {"host": self.endpoint.name, "stream": stream, "line": line},
        )

    def _print(self, screen: Screen, line: str) -> None:
        screen.print(f"{self.endpoint.name} | {line}")

    def do(self) -> JobOutcome:
        query = {}
        if self._options.timeout:
            query["timeout"] = self._options.timeout
        with Api(self.endpoint) as api:
            step = self._step(api)
            if "stderr" not in step:
                del self._writers["stderr"]
            self.post(api, query, [step])
            with concurrent.futures.ThreadPoolExecutor(2, "output") as pool:
                copies = [pool.submit(self._copy, stream) for stream in self._writers]
            for copy in copies:
                copy.result()
            end = _await_task(api, self.task_id).data[0]
        message = ""
        if end["result"] == "timed_out":
            message = f"{self.endpoint.name}: timed out after {format_seconds(end['seconds'])}; --timeout allows more"
        elif end["result"] not in ("succeeded", "failed"):
            message = f"{self.endpoint.name}: {printable(end['msg'])}"
        return JobOutcome(
            end["result"],
            _exit_code(end["result"], end["code"]),
            end["seconds"],
            message,
        )

    def _step(self, api: Api) -> dict[str, Any]:
        """Return the step: a script as it is, or a command as its host's shell takes it."""
        features = ["wait", "output", "follow"]
        if self._stdin:
            features.append("stdin")
        version = api.require(features)
        is_windows = version["python"]["os"] == "windows"
        script = self._options.c
        if not script:
            script = to_cmd_line(self._options.words) if is_windows else shlex.join(self._options.words)
        step = {
            "command_type": self._options.type or ("cmd" if is_windows else "sh"),
            "command_content": script,
            "env_vars": self._options.env,
        }
        if "stderr" in version["features"]:
            step["stderr"] = "apart"
        else:
            print_error(f"{self.endpoint.name}: its remote_executor is older: stderr comes on standard output")
        if self._stdin:
            import base64

            step["stdin_base64"] = base64.b64encode(self._stdin).decode()
        return step

    def _copy(self, stream: str) -> None:
        writer = self._writers[stream]
        path = _task_path(self.task_id, "0")
        try:
            with Api(self.endpoint) as api, contextlib.closing(writer):
                follow_output(api, path, stream, writer.write)
        except (ClientError, OSError):  # the latter of who reads our output, such as head(1)
            self.stop()  # else its other stream would be followed to the end
            raise


def run_exec(options: argparse.Namespace) -> int:
    """Run one step, its output live, and return its exit code."""
    if options.words[:1] == ["--"]:
        del options.words[0]
    if bool(options.words) == bool(options.c):
        raise UsageError("exec: give a command behind --, or a script with -c")
    if options.type and options.words:
        raise UsageError("exec: --type is of a script, given with -c")
    endpoints = endpoints_of(options)
    stdin = sys.stdin.buffer.read() if options.stdin else b""
    jobs = [_ExecJob(endpoint, options, stdin, len(endpoints) == 1) for endpoint in endpoints]
    if len(jobs) > 1:
        return _run_on_hosts(jobs, options)
    outcome = _run_jobs(jobs, 1, is_fail_fast=False)[jobs[0]]
    if options.json:
        print_json_line(
            {"host": jobs[0].endpoint.name, "id": jobs[0].task_id, **outcome._asdict()},
        )
    elif outcome.message:
        print_error(outcome.message)
    return outcome.code


# -- following a task


def _await_task(api: Api, task_id: str) -> Reply:
    """Wait for a task's end; return its detail. Raise ClientError."""
    while True:
        reply = _call_task(api, "GET", task_id, wait="1m")  # below the time that an answer may take
        if reply.code != Code.IN_PROGRESS:
            return reply


class _Changes:
    """Tells the thread that waits when something may have changed, of one task or of all.

    Where the daemon has no connection to spare for events, that is once a second.
    """

    def __init__(self, endpoint: Endpoint, task_id: str = "") -> None:
        self._endpoint = endpoint
        self._task_id = task_id
        self._changed = threading.Event()
        self._poll_s = 1.0
        self._last_s = 0.0
        threading.Thread(target=self._watch, name="events", daemon=True).start()

    def wait(self, max_s: float = _EVENTS_TRUST_S) -> None:
        """Wait for the next change; many in a short time count as one."""
        end_s = time.monotonic() + min(max_s, self._poll_s)
        while not self._changed.wait(_INTERRUPT_CHECK_S) and time.monotonic() < end_s:
            pass  # on Windows no signal ends a wait
        rest_s = self._last_s + _REDRAW_INTERVAL_S - time.monotonic()
        time.sleep(max(0.0, rest_s))
        self._last_s = time.monotonic()
        self._changed.clear()

    def _watch(self) -> None:
        with contextlib.suppress(ClientError):
            for _ in read_events(Api(self._endpoint), self._task_id):
                self._poll_s = _EVENTS_TRUST_S
                self._changed.set()
        self._poll_s = 1.0


def _steps_with_stderr(api: Api, task_id: str) -> set[int]:
    """Return the indexes of the steps that write their stderr apart. Raise ClientError."""
    data = api.call("GET", _task_path(task_id, "submission")).data or {}  # an earlier version did not keep it
    steps = data.get("steps", [])
    return {index for index, step in enumerate(steps) if step.get("stderr") == "apart"}


class TaskFollower:
    """Shows a task until its end: each line of its output with its step's name, or on a terminal a line a step."""

    def __init__(
        self,
        endpoint: Endpoint,
        task_id: str,
        prefix: str = "",
        is_json: bool = False,
    ) -> None:
        self._endpoint = endpoint
        self._api = Api(endpoint)
        self._task_id = task_id
        self._screen = Screen(sys.stdout)
        self._prefix = prefix
        self._is_json = is_json
        self._with_stderr: set[int] = set()  # indexes of steps
        self._is_drawn = self._screen.is_terminal and not (prefix or is_json)
        self._copies: dict[int, list[threading.Thread]] = {}  # by step, one for each stream

    def follow(self) -> Reply:
        """Return the task's detail at its end. Raise ClientError."""
        self._api.require(["output", "follow", "events"])
        self._with_stderr = _steps_with_stderr(self._api, self._task_id)
        changes = _Changes(self._endpoint, self._task_id)
        while True:
            reply = _call_task(self._api, "GET", self._task_id)
            if self._is_drawn:
                self._draw(reply.data)
            else:
                self._copy_outputs(reply.data)
            if reply.code != Code.IN_PROGRESS:
                break
            changes.wait(1.0 if self._is_drawn else _EVENTS_TRUST_S)
        for copy in itertools.chain.from_iterable(self._copies.values()):
            copy.join()
        for step in reply.data:
            if step["result"] not in _QUIET_RESULTS:
                self._explain(step)
        self._api.close()
        return reply

    def _copy_outputs(self, steps: Sequence[Any]) -> None:
        """Copy the output of each step that has begun, in a thread of its own for each stream."""
        for step in steps:
            index = step["step"]
            has_begun = step["result"] not in _UNBEGUN_RESULTS or step["output_bytes"]
            if not has_begun or index in self._copies:
                continue
            self._copies[index] = []
            streams = ["stdout", "stderr"] if index in self._with_stderr else ["stdout"]
            for stream in streams:
                copy = threading.Thread(
                    target=self._copy,
                    args=(step, stream),
                    name=f"output {index}",
                    daemon=True,
                )
                self._copies[index].append(copy)
                copy.start()

    def _copy(self, step: Mapping[str, Any], stream: str) -> None:
        path = _task_path(self._task_id, str(step["step"]))
        writer = LineWriter(functools.partial(self._print, step["name"]))
        try:
            with Api(self._endpoint) as api, contextlib.closing(writer):
                follow_output(api, path, stream, writer.write)
        except ClientError as error:
            print_error(str(error))
        except BrokenPipeError:  # of who reads our output, such as head(1); the task goes on
            os._exit(_BROKEN_PIPE)

    def _print(self, step_name: str, line: str) -> None:
        if self._is_json:
            print_json_line({"step": step_name, "line": line})
        else:
            self._screen.print(f"{self._prefix}{printable(step_name)} | {line}")

    def _explain(self, step: Mapping[str, Any]) -> None:
        if self._is_json:
            print_json_line(
                {"step": step["name"], "result": step["result"], "msg": step["msg"]},
            )
        elif self._is_drawn:
            _print_failure(self._api, self._task_id, step, self._screen)
        else:
            text = self._screen.paint(printable(step["msg"]), step["result"])
            self._screen.print(f"{self._prefix}{printable(step['name'])} | {text}")

    def _draw(self, steps: Sequence[Any]) -> None:
        """Draw a line a step, of as many as there is room for, what runs or has failed first."""
        room = shutil.get_terminal_size().lines - 3
        chosen = sorted(
            sorted(steps, key=_display_rank)[:room],
            key=lambda step: int(step["step"]),
        )
        rows = [(printable(step["name"]), step["result"], _seconds_text(step)) for step in chosen]
        widths = column_widths(rows)
        lines = []
        for step, row in zip(chosen, rows):
            line = f"{self._screen.mark(step['result'])} {align(row, widths)}"
            if step["result"] == "running":
                last = _tail(self._api, self._task_id, step, 1)
                line += "  " + "".join(last)
            lines.append(line)
        if len(chosen) < len(steps):
            counts = collections.Counter(step["result"] for step in steps)
            texts = [f"{count} {result}" for result, count in counts.items()]
            lines.append(", ".join(texts))
        self._screen.draw(lines)


def _display_rank(step: Mapping[str, Any]) -> int:
    order = ("running", "waiting", "paused", "succeeded", "not_run")
    return order.index(step["result"]) if step["result"] in order else 0


def _tail(
    api: Api,
    task_id: str,
    step: Mapping[str, Any],
    count: int,
) -> list[str]:
    """Return the last lines of a step's output, printable."""
    content: list[bytes] = []
    copy_output(
        api,
        _task_path(task_id, str(step["step"]), "output"),
        {"tail": count},
        content.append,
    )
    return [printable(line) for line in b"".join(content).decode("utf-8", "replace").splitlines()]


def _print_failure(
    api: Api,
    task_id: str,
    step: Mapping[str, Any],
    screen: Screen,
) -> None:
    """Print why a step failed, and the last lines that it wrote."""
    message = printable(step["msg"])
    screen.print("", screen.paint(message, step["result"]))
    if step["result"] not in _UNBEGUN_RESULTS:
        for line in _tail(api, task_id, step, _TAIL_OF_FAILED_STEP):
            screen.print(f"    {line}")


def _follow_to_end(
    endpoint: Endpoint,
    task_id: str,
    options: argparse.Namespace,
) -> int:
    """Follow a task, or only wait for it; Ctrl-C leaves it running and says how to come back."""
    try:
        if options.follow:
            reply = TaskFollower(endpoint, task_id, is_json=options.json).follow()
        else:
            reply = _await_in_thread(lambda: _await_task(Api(endpoint), task_id))
    except KeyboardInterrupt:
        _say_how_to_return("task", task_id)
        raise
    code = _task_exit_code(reply)
    if options.json:
        print_json_line(
            {"id": task_id, "result": reply.task["result"], "code": code},
        )
    elif code and not options.follow:
        print_error(f"{task_id}: {printable(reply.task['msg'])}")
    return code


def _say_how_to_return(what: str, words: str) -> None:
    print_error(f"the {what} goes on: `follow {words}` shows it again, `stop {words}` stops it")


def run_follow(options: argparse.Namespace) -> int:
    """Show the output of a task or a step as it comes; return the exit code of the first step that failed."""
    api = single_api(options)
    if not options.step:
        options.follow = True
        return _follow_to_end(api.endpoint, options.id, options)
    api.require(["output", "follow"])
    index = _call_task(api, "GET", options.id, options.step).data["step"]
    path = _task_path(options.id, str(index))
    copies = []
    if index in _steps_with_stderr(api, options.id):
        writer = LineWriter(_print_output_line) if options.json else OutputWriter(sys.stderr)
        copy = threading.Thread(
            target=_copy_stderr,
            args=(Api(api.endpoint), path, writer),
            name="stderr",
            daemon=True,
        )
        copies.append(copy)
        copy.start()
    try:
        with contextlib.closing(_step_writer(options)) as writer:
            step = _await_in_thread(
                lambda: follow_output(api, path, "stdout", writer.write),
            )
    except KeyboardInterrupt:
        _say_how_to_return("step", shlex.join([options.id, options.step]))
        raise
    for copy in copies:
        copy.join()
    return _exit_code(step["result"], step["code"])


def _copy_stderr(api: Api, step_path: str, writer: OutputWriter | LineWriter) -> None:
    """Show what a step writes to its stderr."""
    try:
        with contextlib.closing(writer):
            follow_output(api, step_path, "stderr", writer.write)
    except ClientError as error:
        print_error(str(error))
    except OSError:  # of who reads our stderr: there is nobody to be told
        return


def _print_output_line(line: str) -> None:
    print_json_line({"line": line})


def _step_writer(options: argparse.Namespace) -> OutputWriter | LineWriter:
    if options.json:
        return LineWriter(_print_output_line)
    return OutputWriter(sys.stdout)


def run_log(options: argparse.Namespace) -> int:
    """Print what the steps of a task, or one of them, have written so far."""
    api = single_api(options)
    api.require(["output"])
    query = {}
    if options.tail is not None:
        query["tail"] = options.tail
    if options.step:
        steps = [_call_task(api, "GET", options.id, options.step).data]
    else:
        steps = _call_task(api, "GET", options.id).data
    with_stderr = _steps_with_stderr(api, options.id)
    for step in steps:
        if len(steps) > 1 and not options.json:
            print(f"==> {printable(step['name'])} <==", flush=True)
        streams = ["stdout", "stderr"] if step["step"] in with_stderr else ["stdout"]
        for stream in [options.stream] if options.stream else streams:
            with contextlib.closing(_step_writer(options)) as writer:
                copy_output(
                    api,
                    _task_path(options.id, str(step["step"]), "output"),
                    {**query, "stream": stream},
                    writer.write,
                )
    return 0


def run_wait(options: argparse.Namespace) -> int:
    """Wait for the end of all tasks, or of any; return the first exit code that is not 0."""
    api = single_api(options)
    changes = _Changes(api.endpoint)
    pending = list(options.ids)
    code = 0
    while True:
        for task_id in list(pending):
            reply = _call_task(api, "GET", task_id)
            if reply.code == Code.IN_PROGRESS:
                continue
            pending.remove(task_id)
            task_code = _task_exit_code(reply)
            code = code or task_code
            if options.json:
                print_json_line(
                    {"id": task_id, "result": reply.task["result"], "code": task_code},
                )
            elif options.any:
                print(task_id)
            elif task_code:
                print_error(f"{task_id}: {printable(reply.task['msg'])}")
        if not pending or (options.any and len(pending) < len(options.ids)):
            return code
        changes.wait()


# -- submit


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _script_type(path: str, script: str) -> str:
    """Return the command_type of a script by its suffix or its first line. Raise UsageError."""
    if _suffix(path) in _TYPE_BY_SUFFIX:
        return _TYPE_BY_SUFFIX[_suffix(path)]
    if script.startswith("#!"):
        for word in script[2:].partition("\n")[0].split():
            program = re.sub("[0-9.]*$", "", os.path.basename(word))
            if program in INTERPRETERS:
                return program
    raise UsageError(f"{path}: unknown type of script: name it .sh, .py, .ps1 or .cmd, begin it with #!, or use --type")


def _read_text(path: str) -> str:
    try:
        if path == "-":
            return sys.stdin.buffer.read().decode("utf-8-sig")
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except OSError as error:
        raise ClientError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise ClientError(f"{path} is not text in UTF-8") from None


def _steps_of(options: argparse.Namespace) -> list[Any]:
    """Return the steps of a task in JSON, or one for each script. Raise ClientError and UsageError."""
    texts = [_read_text(path) for path in options.files]
    first = options.files[0]
    has_type = options.type or _suffix(first) in _TYPE_BY_SUFFIX
    if len(texts) == 1 and not has_type and re.match(r"\s*[\[{]", texts[0]):
        try:
            task = json.loads(texts[0])
        except ValueError as error:
            raise ClientError(f"{first} is not JSON: {error}; for a script give --type") from None
        return task if isinstance(task, list) else [task]
    steps = []
    for path, text in zip(options.files, texts):
        command_type = options.type or _script_type(path, text)
        steps.append({"command_type": command_type, "command_content": text})
    names = [os.path.basename(path) for path in options.files]
    if len(set(names)) == len(names):
        for step, name in zip(steps, names):
            step["name"] = name
    return steps


def _split_file(text: str) -> tuple[str, str]:
    """Return the parts of LOCAL[:REMOTE]; the colon of a drive of Windows parts nothing."""
    drive, rest = os.path.splitdrive(text)
    local, _, remote = rest.partition(":")
    return drive + local, remote or os.path.basename(local)


class _SubmitJob(Job):
    """Submits a task, and follows or awaits it where that is asked for."""

    def __init__(
        self,
        endpoint: Endpoint,
        options: argparse.Namespace,
        steps: Sequence[Any],
    ) -> None:
        task_id = options.id or os.urandom(16).hex()
        super().__init__(endpoint, task_id)
        self._options = options
        self._steps = steps

    def submit(self) -> Any:
        """Submit the task with its files, and return the daemon's word of it. Raise ClientError."""
        options = self._options
        files = [_split_file(file) for file in options.file]
        for local, _ in files:
            if not os.path.isfile(local):
                raise ClientError(f"--file: {local} is not a file here")
        query: dict[str, Any] = {"env_vars": options.env}
        if files:
            query["paused"] = True
        for name in ("timeout", "delay", "async"):
            if getattr(options, name):
                query[name] = getattr(options, name)
        with Api(self.endpoint) as api:
            data = self.post(api, query, self._steps)
            for local, remote in files:
                upload(api, self.task_id, local, remote)
            if files:
                _call_task(api, "PUT", self.task_id, action="resume")
        return data

    def do(self) -> JobOutcome:
        self.submit()
        if self._options.follow:
            reply = TaskFollower(self.endpoint, self.task_id, f"{self.endpoint.name} | ", self._options.json).follow()
        elif self._options.wait:
            reply = _await_task(Api(self.endpoint), self.task_id)
        else:
            return JobOutcome("submitted", 0)
        task = reply.task
        message = "" if task["result"] in _QUIET_RESULTS else task["msg"]
        return JobOutcome(
            task["result"],
            _task_exit_code(reply),
            task["seconds"],
            message,
        )


def run_submit(options: argparse.Namespace) -> int:
    """Submit a task, print its id, and follow or await it where that is asked for."""
    endpoints = endpoints_of(options)
    steps = _steps_of(options)
    jobs = [_SubmitJob(endpoint, options, steps) for endpoint in endpoints]
    if len(jobs) > 1:
        return _run_on_hosts(jobs, options)
    data = jobs[0].submit()
    if options.json:
        print_json_line(data)
    else:
        print(jobs[0].task_id, flush=True)
    if options.follow or options.wait:
        return _follow_to_end(jobs[0].endpoint, jobs[0].task_id, options)
    return 0


# -- list and show


def _list_tasks(api: Api, options: argparse.Namespace) -> Any:
    query: dict[str, Any] = {"order": "desc", "limit": options.limit, "result": options.result}
    if options.id:
        query["id"] = options.id
    return api.call("GET", "/api/v1/task", query).data["tasks"]


def _task_table(tasks: Sequence[Any], screen: Screen) -> list[str]:
    rows = []
    for task in tasks:
        message = "" if task["result"] in _QUIET_RESULTS else printable(task["msg"])
        accepted = format_ago(task.get("accepted_at", ""))
        rows.append(
            (
                printable(task["id"]),
                printable(task["result"]),
                str(task["count"]),
                accepted,
                _seconds_text(task),
                message,
            ),
        )
    header = ("ID", "RESULT", "STEPS", "ACCEPTED", "TOOK", "MESSAGE")
    return screen.table(
        header,
        rows,
        [task["result"] for task in tasks],
    )


def run_list(options: argparse.Namespace) -> int:
    """Print the tasks, newest first; with --watch again at each change."""
    api = single_api(options)
    screen = Screen(sys.stdout)
    if options.watch and (options.json or not screen.is_terminal):
        raise UsageError("list: --watch needs a terminal, and no --json")
    api.require(["paging"])
    if options.json:
        for task in _list_tasks(api, options):
            print_json_line(task)
        return 0
    if not options.watch:
        screen.print(*_task_table(_list_tasks(api, options), screen))
        return 0
    changes = _Changes(api.endpoint)
    while True:
        screen.draw(_task_table(_list_tasks(api, options), screen))
        changes.wait(1.0)


def run_show(options: argparse.Namespace) -> int:
    """Print a task with its steps, or all of one step."""
    api = single_api(options)
    if options.step:
        step = _call_task(api, "GET", options.id, options.step).data
        if options.json:
            print_json_line(step)
        else:
            _print_step(step)
        return 0
    reply = _call_task(api, "GET", options.id)
    if options.json:
        print_json_line({**reply.task, "steps": reply.data})
    else:
        _print_task(api, reply)
    return 0


def _print_step(step: Mapping[str, Any]) -> None:
    """Print the fields of a step; the lines of its script as they are, but for what would steer a terminal."""
    for name, value in step.items():
        text = value
        if not isinstance(value, str):
            text = json.dumps(value, ensure_ascii=False)
        first, *others = map(printable, text.splitlines() or [""])
        print(f"{name:<16} {first}")
        for line in others:
            print(f"{'':<16} {line}")


def _print_task(api: Api, reply: Reply) -> None:
    """Print a task, its graph as a line a step, and why steps failed."""
    screen = Screen(sys.stdout)
    task = reply.task
    result = task["result"]
    head = [f"{screen.mark(result)} {printable(task['id'])}", screen.paint(result, result), _seconds_text(task)]
    screen.print(
        "  ".join(filter(None, [*head, f"accepted {format_ago(task.get('accepted_at', ''))}"])),
    )
    rows = []
    for step in reply.data:
        before = ", ".join(step.get("depets_on", ()))
        after = f"after {printable(before)}" if before else ""
        rows.append(
            (
                str(step["step"]),
                printable(step["name"]),
                step["result"],
                _seconds_text(step),
                after,
            ),
        )
    widths = column_widths(rows)
    for step, row in zip(reply.data, rows):
        screen.print(f"  {screen.mark(step['result'])} {align(row, widths)}")
    for step in reply.data:
        if step["result"] not in _QUIET_RESULTS:
            _print_failure(api, task["id"], step, screen)


# -- what changes a task


def _tell(options: argparse.Namespace, text: str) -> int:
    if options.json:
        print_json_line({"id": options.id})
    else:
        print(text)
    return 0


def run_stop(options: argparse.Namespace) -> int:
    """Stop a task or a step with its whole process tree."""
    query = {}
    if options.reason:
        query["reason"] = options.reason
    _change(options, "stop", options.step, **query)
    what = f"{options.id} {options.step}".rstrip()
    return _tell(options, f"{what}: stopped")


def _change(
    options: argparse.Namespace,
    action: str,
    step: str = "",
    **query: Any,
) -> None:
    api = single_api(options)
    _call_task(api, "PUT", options.id, step, action=action, **query)


def run_pause(options: argparse.Namespace) -> int:
    """Let no further step of a task start; what runs goes on."""
    _change(options, "pause")
    return _tell(options, f"{options.id}: paused")


def run_resume(options: argparse.Namespace) -> int:
    """Let the steps of a paused task start."""
    _change(options, "resume")
    return _tell(options, f"{options.id}: resumed")


def run_delete(options: argparse.Namespace) -> int:
    """Delete an ended task with its files."""
    _call_task(single_api(options), "DELETE", options.id)
    return _tell(options, f"{options.id}: deleted")


def run_rerun(options: argparse.Namespace) -> int:
    """Run a task again as a new one, whole or from what failed on; print the new id."""
    api = single_api(options)
    api.require(["rerun"])
    query: dict[str, Any] = {"id": os.urandom(16).hex(), "env_vars": options.env}
    if options.failed:
        query["only"] = "failed"
    data = _call_task(api, "POST", options.id, leaf="rerun", **query).data
    if options.json:
        print_json_line(data)
    else:
        print(data["id"], flush=True)
    if options.follow:
        return _follow_to_end(api.endpoint, data["id"], options)
    return 0


def run_pool(options: argparse.Namespace) -> int:
    """Show the pool, resize, pause or resume it."""
    api = single_api(options)
    change = {}
    if options.size is not None:
        change["size"] = options.size
    if options.pause or options.resume:
        change["paused"] = options.pause
    method = "POST" if change else "GET"
    pool = api.call(method, "/api/v1/pool", body=change or None).data
    if options.json:
        print_json_line(pool)
        return 0
    paused = ", paused" if pool.get("paused") else ""
    print(f"{pool['running']} running of {pool['size']}, {pool['waiting']} waiting{paused}")
    return 0


# -- files of the workspace


def _workspace_path(task_id: str, path: str) -> str:
    quoted = urllib.parse.quote(path.strip("/"))
    return _task_path(task_id, leaf=f"workspace/{quoted}".rstrip("/"))


class _CountedFile:
    """A file whose reading is shown as progress."""

    def __init__(self, file: Any, progress: Progress) -> None:
        self._file = file
        self._progress = progress
        self.seek = file.seek
        self.fileno = file.fileno

    def read(self, size: int = -1) -> bytes:
        content: bytes = self._file.read(size)
        self._progress.add(len(content))
        return content


def _open_local(path: str) -> io.BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise ClientError(f"{path} cannot be read: {error.strerror or error}") from None


def upload(
    api: Api,
    task_id: str,
    local: str,
    remote: str,
) -> None:
    """Copy a file of this host into the workspace of a task. Raise ClientError."""
    with _open_local(local) as file:
        progress = Progress(f"put {remote}")
        progress.begin(os.fstat(file.fileno()).st_size)
        path = _workspace_path(task_id, remote)
        with contextlib.closing(progress), api.open("PUT", path, body=_CountedFile(file, progress)) as response:
            envelope = json.loads(response.read())
    if envelope["code"]:
        raise ClientError(f"{api.endpoint.name}: {printable(envelope['message'])}")


def _download(
    api: Api,
    task_id: str,
    path: str,
    write: Callable[[bytes], Any],
) -> None:
    """Write a file of a workspace. Raise ClientError, and as `write` does."""
    progress = Progress(f"get {path}")

    def write_and_count(part: bytes) -> None:
        write(part)
        progress.add(len(part))

    with contextlib.closing(progress):
        copy_file(api, _workspace_path(task_id, path), progress.begin, write_and_count)


def run_put(options: argparse.Namespace) -> int:
    """Copy a file of this host into the workspace of a task."""
    remote = options.path or os.path.basename(options.local)
    upload(single_api(options), options.id, options.local, remote)
    return _tell(options, f"{options.local} -> {options.id}:{remote}")


def run_get(options: argparse.Namespace) -> int:
    """Copy a file of the workspace of a task to this host, whole or not at all; `-` is standard output."""
    api = single_api(options)
    local = options.local or os.path.basename(options.path)
    if local == "-":
        _download(
            api,
            options.id,
            options.path,
            OutputWriter(sys.stdout).write,
        )
        return 0
    if os.path.isdir(local):
        local = os.path.join(local, os.path.basename(options.path))
    partial = f"{local}.{os.urandom(8).hex()}"
    try:
        with open(partial, "xb") as file:  # no link that somebody has put there
            _download(api, options.id, options.path, file.write)
        os.replace(partial, local)
    except OSError as error:
        raise ClientError(f"{local} cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):  # it is there after a failure alone
            os.unlink(partial)
    return _tell(options, f"{options.id}:{options.path} -> {local}")


def run_ls(options: argparse.Namespace) -> int:
    """List a directory of the workspace of a task."""
    api = single_api(options)
    path = _workspace_path(options.id, options.path)
    with api.open("GET", path) as response:
        if response.getheader("Content-Disposition"):
            raise ClientError(f"{api.endpoint.name}: {options.path!r} is a file: `get` copies it")
    entries = api.call("GET", path).data
    if entries is None:
        raise ClientError(f"{api.endpoint.name}: no task {options.id!r}: never there, expired or deleted; see `list`")
    if options.json:
        for entry in entries:
            print_json_line(entry)
        return 0
    screen = Screen(sys.stdout)
    rows = []
    for entry in entries:
        slash = "/" if entry["type"] == "directory" else ""
        size = format_bytes(entry["bytes"]) if "bytes" in entry else ""
        rows.append(
            (
                printable(entry["name"]) + slash,
                size,
                format_ago(entry.get("modified_at", "")),
            ),
        )
    screen.print(
        *screen.table(("NAME", "SIZE", "MODIFIED"), rows),
    )
    return 0


# -- the table of commands


class UsageParser(argparse.ArgumentParser):
    """An argument parser that raises UsageError instead of ending the program."""

    def error(self, message: str) -> Any:
        raise UsageError(message)


class _Argument(NamedTuple):
    """An argument or a flag of a command, of one of the kinds below."""

    name: str
    placeholder: str
    help: str
    kind: str = "text"
    default: Any = ""


def _count(text: str) -> int:
    """Parse a number of things, for argparse."""
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"invalid number {text!r}: expected for example 5")
    return int(text)


_ARGUMENT_KINDS: Mapping[str, Mapping[str, Any]] = {
    "text": {},
    "required": {},  # an argument, as the next three
    "optional": {"nargs": "?"},
    "several": {"nargs": "+"},
    "rest": {"nargs": argparse.REMAINDER},
    "list": {"action": "append", "default": []},
    "count": {"type": _count},
}
_ID_ARGUMENT = _Argument("id", "ID", "id of a task", "required")
_STEP_ARGUMENT = _Argument("step", "STEP", "index or name of a step", "optional")
_PATH_ARGUMENT = _Argument("path", "PATH", "in the workspace", "optional")
_TYPE_ARGUMENT = _Argument("--type", "TYPE", "command_type of the script")
_ENV_ARGUMENT = _Argument("--env", "K=V", "environment; repeatable", "list")
_TIMEOUT_ARGUMENT = _Argument("--timeout", "TIME", "such as 90s; what takes longer is stopped, its code is 124")
_FOLLOW_ARGUMENT = _Argument("--follow", "", "show its output; end with its exit code", "switch")
_HOSTS = (
    _Argument("--parallel", "N", "hosts at a time (20)", "count", 20),
    _Argument("--fail_fast", "", "begin on no other host after a failure", "switch"),
    _Argument("--canary", "N", "N hosts first; the others if all is well there", "count", 0),
)
_WHERE = (
    _Argument("--json", "", "print JSON, one object a line", "switch"),
    _Argument("--host", "HOST", "HOST[:PORT] or a URL; with exec and submit also a,b,c or @FILE"),
    _Argument("--token_file", "FILE", "its first line is the token"),
    _Argument("--cacert", "FILE", "PEM file of the CA of the daemon"),
    _Argument("--cert", "FILE", "PEM file of a certificate of this client"),
    _Argument("--key", "FILE", "PEM file of its private key"),
)


class ClientCommand(NamedTuple):
    """A command that asks a daemon: what it does, an example of it, and what it takes beside `_WHERE`."""

    name: str
    help: str
    example: str
    run: Callable[[argparse.Namespace], int]
    arguments: Sequence[_Argument]

    @property
    def usage(self) -> str:
        """The command with its arguments, without flags."""
        usage = [self.name]
        for argument in self.arguments:
            if argument.kind == "optional":
                usage.append(f"[{argument.placeholder}]")
            elif argument.kind == "several":
                usage.append(f"{argument.placeholder}...")
            elif not argument.name.startswith("-"):
                usage.append(argument.placeholder)
        return " ".join(usage)


# -- completion


_SHELLS = ("bash", "zsh", "fish", "powershell")
_COMPLETED_NAMES = ("remote_executor.py", "remote_executor", "remote-executor")
_ID_WAIT_S = 0.3  # of somebody who has pressed Tab
_BASH_COMPLETION = """\
_remote_executor() {
    local words= current=${COMP_WORDS[COMP_CWORD]}
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="@NAMES@"
    else
        case "${COMP_WORDS[1]}" in
@FLAGS@
        esac
        case "$current/${COMP_WORDS[1]}" in
            -*) ;;
            @WITH_IDS@) words=$("${COMP_WORDS[0]}" completion ids 2>/dev/null) ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -o default -F _remote_executor @PROGRAMS@
"""
_ZSH_BEGIN = """\
whence compdef >/dev/null || { autoload -U compinit && compinit; }
autoload -U bashcompinit && bashcompinit
"""
_POWERSHELL_COMPLETION = """\
Register-ArgumentCompleter -Native -CommandName @PROGRAMS@ -ScriptBlock {
    param($word, $ast, $position)
    $flags = @{
@FLAGS@
    }
    $typed = @($ast.CommandElements | ForEach-Object { "$_" })
    $candidates = @()
    if ($typed.Count -lt 2 -or ($typed.Count -eq 2 -and $word)) {
        $candidates = -split '@NAMES@'
    } elseif ($word -like '-*') {
        $candidates = -split $flags[$typed[1]]
    } elseif ('@WITH_IDS@' -split ' ' -contains $typed[1]) {
        $candidates = & $typed[0] completion ids
    }
    $candidates | Where-Object { $_ -like "$word*" }
}
"""


def _flags_of(command: ClientCommand) -> list[str]:
    return [argument.name for argument in (*command.arguments, *_WHERE) if argument.name.startswith("--")]


def _fill_in(template: str, values: Mapping[str, str]) -> str:
    return re.sub(
        "@([A-Z_]+)@",
        lambda match: values[match[1]],
        template,
    )


def _completion_script(shell: str) -> str:
    """Return the script that has a shell complete commands, flags and ids of tasks."""
    flags = {command.name: " ".join(_flags_of(command)) for command in CLIENT_COMMANDS}
    with_ids = [command.name for command in CLIENT_COMMANDS if command.arguments[0].placeholder == "ID"]
    names = " ".join([*_DAEMON_COMMANDS, *flags])
    if shell == "fish":
        return "".join(_fish_lines(with_ids))
    if shell == "powershell":
        rows = [f"        '{name}' = '{text}'" for name, text in flags.items()]
        values = {"PROGRAMS": ", ".join(_COMPLETED_NAMES), "WITH_IDS": " ".join(with_ids)}
        return _fill_in(
            _POWERSHELL_COMPLETION,
            {**values, "NAMES": names, "FLAGS": "\n".join(rows)},
        )
    rows = [f'            {name}) words="{text}" ;;' for name, text in flags.items()]
    values = {"PROGRAMS": " ".join(_COMPLETED_NAMES), "WITH_IDS": "|".join(f"*/{name}" for name in with_ids)}
    script = _fill_in(
        _BASH_COMPLETION,
        {**values, "NAMES": names, "FLAGS": "\n".join(rows)},
    )
    if shell == "zsh":
        return _ZSH_BEGIN + script
    return script


def _fish_lines(with_ids: Sequence[str]) -> Iterator[str]:
    for program in _COMPLETED_NAMES:
        for command in CLIENT_COMMANDS:
            yield f"complete -c {program} -n __fish_use_subcommand -a {command.name} -d {shlex.quote(command.help)}\n"
            seen = f"complete -c {program} -n '__fish_seen_subcommand_from {command.name}'"
            for flag in _flags_of(command):
                yield f"{seen} -l {flag.lstrip('-')}\n"
            if command.name in with_ids:
                yield f"{seen} -f -a '({program} completion ids 2>/dev/null)'\n"


def _is_plain_id(task_id: str) -> bool:
    """Return whether an id may be given to a shell, which expands what it completes (compgen -W)."""
    return bool(re.fullmatch("[A-Za-z0-9._-]+", task_id))


def _print_ids(options: argparse.Namespace) -> None:
    """Print the ids of the newest tasks, if the daemon tells them in time."""
    ids: list[str] = []

    def ask() -> None:
        with contextlib.suppress(ClientError, UsageError), single_api(options) as api:
            page = api.call(
                "GET",
                "/api/v1/task",
                {"order": "desc", "limit": 50},
            ).data
            ids.extend(filter(_is_plain_id, [task["id"] for task in page["tasks"]]))

    thread = threading.Thread(target=ask, name="ids", daemon=True)
    thread.start()
    thread.join(_ID_WAIT_S)
    print("\n".join(ids))


def run_completion(options: argparse.Namespace) -> int:
    """Print a shell's script for completion, or what that asks for: ids of tasks."""
    if options.shell == "ids":
        _print_ids(options)
    elif options.shell not in _SHELLS:
        raise UsageError(f"completion: unknown shell {options.shell!r}: expected one of {', '.join(_SHELLS)}")
    else:
        print(_completion_script(options.shell), end="")
    return 0


_DAEMON_COMMANDS = ("help", "run", "config", "selftest", "service")
CLIENT_COMMANDS = (
    ClientCommand(
        "exec",
        "Run a command, its output live; end with its exit code.",
        "exec -H build-7 -- make -j4",
        run_exec,
        (
            _Argument("-c", "SCRIPT", "a script in place of a command"),
            _Argument("--stdin", "", "send standard input", "switch"),
            _TYPE_ARGUMENT,
            _ENV_ARGUMENT,
            _TIMEOUT_ARGUMENT,
            *_HOSTS,
            _Argument("words", "-- CMD ARG...", "the command", "rest"),
        ),
    ),
    ClientCommand(
        "submit",
        "Submit scripts or a task in JSON; print its id.",
        "submit build.sh test.py --follow",
        run_submit,
        (
            _Argument("files", "FILE", "scripts, or a task in JSON; - is standard input", "several"),
            _Argument("--id", "ID", "id of the task; default a random one"),
            _Argument("--async", "", "depends_on alone orders the steps", "switch"),
            _Argument("--delay", "TIME", "start no earlier than after this, such as 10m"),
            _Argument("--file", "LOCAL[:REMOTE]", "into its workspace; repeatable", "list"),
            _FOLLOW_ARGUMENT,
            _Argument("--wait", "", "wait for its end; end with its exit code", "switch"),
            _TYPE_ARGUMENT,
            _ENV_ARGUMENT,
            _TIMEOUT_ARGUMENT,
            *_HOSTS,
        ),
    ),
    ClientCommand("follow", "Show output as it comes.", "follow web-1", run_follow, (_ID_ARGUMENT, _STEP_ARGUMENT)),
    ClientCommand(
        "log",
        "Print what steps wrote.",
        "log web-1 0 --tail 20",
        run_log,
        (
            _ID_ARGUMENT,
            _STEP_ARGUMENT,
            _Argument("--tail", "N", "the last N lines alone", "count", None),
            _Argument("--stream", "NAME", "stdout or stderr, where they are apart"),
        ),
    ),
    ClientCommand(
        "wait",
        "Wait for the end of tasks.",
        "wait web-1 web-2 --any",
        run_wait,
        (
            _Argument("ids", "ID", "ids of tasks", "several"),
            _Argument("--any", "", "until one of them has ended", "switch"),
        ),
    ),
    ClientCommand(
        "list",
        "List the tasks, newest first.",
        "list --result failed --watch",
        run_list,
        (
            _Argument("--result", "RESULT", "such as failed; repeatable", "list"),
            _Argument("--id", "GLOB", "such as 'web-*'"),
            _Argument("--limit", "N", "how many (20)", "count", 20),
            _Argument("--watch", "", "again at each change, until Ctrl-C", "switch"),
        ),
    ),
    ClientCommand("show", "Show a task and its steps.", "show web-1", run_show, (_ID_ARGUMENT, _STEP_ARGUMENT)),
    ClientCommand(
        "stop",
        "Stop a task or a step with its process tree.",
        "stop web-1 --reason 'wrong branch'",
        run_stop,
        (_ID_ARGUMENT, _STEP_ARGUMENT, _Argument("--reason", "TEXT", "shown with the task")),
    ),
    ClientCommand("pause", "Let no further step of a task start.", "pause web-1", run_pause, (_ID_ARGUMENT,)),
    ClientCommand("resume", "Let the steps of a paused task start.", "resume web-1", run_resume, (_ID_ARGUMENT,)),
    ClientCommand(
        "rerun",
        "Run a task again as a new one.",
        "rerun web-1 --failed --follow",
        run_rerun,
        (
            _ID_ARGUMENT,
            _Argument("--failed", "", "what succeeded counts as done", "switch"),
            _ENV_ARGUMENT,
            _FOLLOW_ARGUMENT,
        ),
    ),
    ClientCommand("delete", "Delete an ended task with its files.", "delete web-1", run_delete, (_ID_ARGUMENT,)),
    ClientCommand(
        "pool",
        "Show the pool, resize, pause or resume it.",
        "pool --size 8",
        run_pool,
        (
            _Argument("--size", "N", "how many steps run at a time", "count", None),
            _Argument("--pause", "", "start no step", "switch"),
            _Argument("--resume", "", "start steps again", "switch"),
        ),
    ),
    ClientCommand(
        "get",
        "Copy a file of a workspace here.",
        "get web-1 out/a.tar",
        run_get,
        (
            _ID_ARGUMENT,
            _PATH_ARGUMENT._replace(kind="required"),
            _Argument("local", "LOCAL", "file here; - is standard output", "optional"),
        ),
    ),
    ClientCommand(
        "put",
        "Copy a file into a workspace.",
        "put web-1 a.tar in/a.tar",
        run_put,
        (_ID_ARGUMENT, _Argument("local", "LOCAL", "file here", "required"), _PATH_ARGUMENT),
    ),
    ClientCommand("ls", "List a directory of a workspace.", "ls web-1 out", run_ls, (_ID_ARGUMENT, _PATH_ARGUMENT)),
    ClientCommand(
        "completion",
        "Print the completion for bash, zsh, fish or powershell.",
        "completion bash >>~/.bashrc",
        run_completion,
        (_Argument("shell", "SHELL", "bash, zsh, fish or powershell", "required"),),
    ),
)


def client_parser(command: ClientCommand, program: str) -> argparse.ArgumentParser:
    """Return the parser of a client's command, which raises UsageError."""
    parser = UsageParser(
        prog=f"{program} {command.name}",
        description=command.help,
        epilog=f"example: {program} {command.example}",
        allow_abbrev=False,
    )
    for argument in (*command.arguments, *_WHERE):
        names = [argument.name]
        if argument.name == "--host":
            names.insert(0, "-H")
        if "_" in argument.name:
            names.append(argument.name.replace("_", "-"))
        if argument.kind == "switch":
            parser.add_argument(*names, help=argument.help, action="store_true")
            continue
        keywords = {"default": argument.default, **_ARGUMENT_KINDS[argument.kind]}
        parser.add_argument(
            *names,
            help=argument.help,
            metavar=argument.placeholder,
            **keywords,
        )
    return parser


def client_command(
    command: ClientCommand,
    argv: Sequence[str],
    program: str,
) -> int:
    """Run a client's command; return its exit code. Raise UsageError."""
    options = client_parser(command, program).parse_args(argv)
    try:
        code = command.run(options)
        sys.stdout.flush()
        return code
    except ClientError as error:
        print_error(str(error))
        return _CLIENT_FAILED
    except BrokenPipeError:  # of who reads our output, such as head(1)
        os._exit(_BROKEN_PIPE)  # what is still buffered cannot be written
    except OSError as error:
        print_error(f"the output cannot be written: {error.strerror or error}")
        os._exit(_CLIENT_FAILED)
    except KeyboardInterrupt:
        os._exit(_INTERRUPTED)  # its threads may be in the middle of a line


# ======================================================================================================================
# VI program / command line: flags, commands, main
# ======================================================================================================================

_PROGRAM = SERVICE
_SUMMARY = "Turns this host into a remote executor of scripts with an HTTP/JSON API."
_HELP_FLAG_HELP = "Show context-sensitive help (also try --help-long and --help-man)."
_VERSION_FLAG_HELP = "Show application version."


class _Command(NamedTuple):
    name: str
    arguments: str
    help: str

    @property
    def usage(self) -> str:
        return f"{self.name} {self.arguments}".rstrip()


_SERVICE_ACTIONS = {
    "install": "Install it, with the flags of run; once more to change them.",
    "uninstall": "Stop and remove it. Steps run on, the root stays.",
    "start": "Start it, unless it runs.",
    "stop": "Stop it. Steps run on, as --on_exit says.",
    "restart": "Stop and start it: with what install has changed.",
    "status": "Say whether it runs; exit code 0: running, 3: not, 4: not installed.",
    "logs": f"Print the last {_LOG_LINES} lines that it has logged.",
}
_SERVICE_FLAGS = (  # the flag, its placeholder, its help
    ("user", "", "The service of the user who installs it, not of the host: needs no root."),
    ("run_as", "USER", "The user that the service of the host runs as, in place of root or SYSTEM."),
    ("copy", "", "Install a copy of the program that only root or administrators may change."),
)
_COMMANDS = (
    _Command("help", "[<command>...]", "Show help."),
    _Command("run", "", "Run server"),
    _Command("config", "[--json]", "Show the value of each flag, and whether REMOTE_EXECUTOR_<FLAG> gave it."),
    _Command("selftest", "[--json]", "Try this program on this host, and say what works; takes the flags of run."),
    _Command(
        "service",
        "|".join(_SERVICE_ACTIONS),
        "Manage the service of this host that runs the server. install takes the flags of run.",
    ),
)


def _normalize_flag(word: str) -> str:
    """Return a flag with `_` between its words, which may be typed as `-` too; any other word as it is."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def parse_command_line(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the command with its arguments, and the flags as typed, by field. Raise UsageError."""
    parser = UsageParser(prog=_PROGRAM, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("args", nargs="*", default=[])
    parser.add_argument("-h", "--help", dest="help", action="store_true")
    switches = ["help_long", "help_man", "version", "json"]
    negatable = ["help", "version"]
    for option in OPTIONS:
        if option.kind == "flag":
            switches.append(option.field)
            negatable.append(option.field)
        else:
            action = "append" if option.is_list else "store"
            check = functools.partial(check_argument, option)
            parser.add_argument(f"--{option.field}", dest=option.field, type=check, action=action)
    for name, placeholder, _ in _SERVICE_FLAGS:
        if placeholder:
            parser.add_argument(f"--{name}", dest=name)
        else:
            switches.append(name)
    for name in switches:
        parser.add_argument(f"--{name}", dest=name, action="store_true")
    for name in negatable:
        parser.add_argument(f"--no_{name}", dest=name, action="store_false")
    flags = vars(parser.parse_intermixed_args(list(map(_normalize_flag, argv))))
    args = flags.pop("args")
    return args, flags


def _flag_rows(is_service: bool = False) -> Iterator[tuple[str, str]]:
    """Yield each flag as the help shows it, and its help."""
    yield "-h, --[no-]help", _HELP_FLAG_HELP
    for option in OPTIONS:
        default = default_text(option)
        if is_service and option.name == "root":
            default = host_services(_NO_OPTIONS).default_root
        if option.kind == "flag":
            flag = f"--[no-]{option.name}"
        elif option.kind in ("address", "path"):
            flag = f'--{option.name}="{default}"'
        else:
            flag = f"--{option.name}={default}"
        yield f"    {flag}", option.help
    yield "    --[no-]version", _VERSION_FLAG_HELP


def _service_lines() -> Iterator[str]:
    """Yield the lines of the help about the flags and the actions of `service`."""
    yield "Flags of service:"
    for name, placeholder, text in _SERVICE_FLAGS:
        flag = f"--{name}={placeholder}".rstrip("=")
        yield f"      {flag:<20}{text}"
    yield ""
    yield "Actions of service:"
    for action, text in _SERVICE_ACTIONS.items():
        yield f"  {action:<24}{text}"


def _find_command(name: str) -> _Command:
    for command in _COMMANDS:
        if command.name == name:
            return command
    names = ", ".join(command.name for command in (*_COMMANDS, *CLIENT_COMMANDS))
    raise UsageError(f"unknown command {name!r}: expected one of {names}")


def help_text(command_name: str | None = None, is_long: bool = False) -> str:
    """Return the help, of one command where it is named. Raise UsageError."""
    commands: Sequence[_Command] = _COMMANDS
    usage = f"usage: {_PROGRAM} [<flags>] <command> [<args> ...]"
    if command_name is not None:
        commands = [_find_command(command_name)]
        usage = f"usage: {_PROGRAM} {command_name} [<flags>]"
    lines = [usage, "", _SUMMARY, "", "Flags:"]
    is_service = command_name == "service"
    for flag, text in _flag_rows(is_service):
        if len(flag) < 23:
            lines.append(f"  {flag:<24}{text}")
        else:
            lines.append(f"  {flag}  ")
            lines.append(" " * 26 + text)
    if is_service or is_long:
        lines += ["", *_service_lines()]
    if command_name is None or is_long:
        lines += ["", "Commands:"]
        for command in commands:
            lines += [command.usage, f"    {command.help}", ""]
        lines.append("Commands of a client, of which `help <command>` tells more:")
        for row in CLIENT_COMMANDS:
            lines.append(f"  {row.usage:<24}{row.help}")
    return "\n".join(lines).rstrip() + "\n"


_EXAMPLES = (
    f"{_PROGRAM} run --addr=127.0.0.1:2376",
    f"{_PROGRAM} selftest",
    f"{_PROGRAM} exec -H build-7 -- make -j4",
    f"{_PROGRAM} service install --addr=:2376 && {_PROGRAM} service start",
    "curl -XPOST http://localhost:2376/api/v1/task -d "
    """'[{"command_type": "sh", "command_content": "echo hello"}]'""",
)
_EXIT_CODES = (
    ("0", "All is well; of run: an orderly end."),
    ("1", "It cannot start, or cannot do what was asked; of selftest: something does not work on this host."),
    ("2", "The command line, or a variable of the environment, is wrong."),
    ("3, 4", "Of service status: the service is not running, not installed."),
    ("124, 125", "Of a client's command: what it ran timed out; it could not run it. Else it ends as that has ended."),
    ("130, 141", "Of a client's command: it was interrupted; nobody read its output."),
)
_FILES = (
    ("$ROOT/token", "The token that clients send as `Authorization: Bearer`."),
    ("$ROOT/url", "Where the daemon listens, while it does: clients on this host find it by that."),
    ("$ROOT/remote_executor.db", "Tasks and steps."),
    ("$ROOT/tasks/", "The workspace, scripts and outputs of each task."),
    ("$ROOT/logs/remote_executor.log", "The log, and five older files of it."),
)


def _to_roff(text: str) -> str:
    """Return a text as man(7) shows it unchanged."""
    escaped = text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq")
    return re.sub("^[.]", r"\\&.", escaped)


def _manual_list(title: str, rows: Iterable[tuple[str, str]]) -> list[str]:
    """Return a section of the manual: terms, and a text about each."""
    lines = [f".SH {title}"]
    for term, text in rows:
        lines += [".TP", f".B {_to_roff(term)}", _to_roff(text)]
    return lines


def manual_text() -> str:
    """Return the manual page, in the language of man(7)."""
    summary = _SUMMARY[0].lower() + _SUMMARY[1:].rstrip(".")
    variable = (f"{ENV_PREFIX}<FLAG>", "The value of a flag that the command line does not give.")
    lines = [
        f'.TH {_PROGRAM} 1 "" "{__version__}"',
        ".SH NAME",
        f"{_PROGRAM} \\- {summary}",
        ".SH SYNOPSIS",
        f".B {_PROGRAM}",
        "[<flags>] <command> [<args> ...]",
        *_manual_list("COMMANDS", ((command.usage, command.help) for command in (*_COMMANDS, *CLIENT_COMMANDS))),
        *_manual_list("OPTIONS", ((flag.strip(), text) for flag, text in _flag_rows())),
        *_manual_list("ENVIRONMENT", [variable]),
        *_manual_list("FILES", _FILES),
        *_manual_list("EXIT STATUS", _EXIT_CODES),
        ".SH EXAMPLES",
        ".nf",
        *map(_to_roff, _EXAMPLES),
        ".fi",
    ]
    return "\n".join(lines) + "\n"


def _to_argv(flags: Mapping[str, Any]) -> list[str]:
    """Return the words that give these flags; paths are made absolute, for a service starts in another directory."""
    argv = []
    for option in OPTIONS:
        value = flags.get(option.field)
        if value is None:
            continue
        if option.kind == "flag":
            prefix = "" if value else "no-"
            argv.append(f"--{prefix}{option.name}")
            continue
        texts = value if option.is_list else [value]
        if option.kind == "path":
            texts = map(os.path.abspath, texts)
        argv += [f"--{option.name}={text}" for text in texts]
    return argv


def _join_command(command: Sequence[str]) -> str:
    """Return the command as one types it in a shell of this host."""
    if ON_WINDOWS:
        return subprocess.list2cmdline(command)
    return shlex.join(command)


def _install_service(services: Services, flags: Mapping[str, Any]) -> None:
    make_settings(flags)  # the service would end with what is wrong
    root = os.path.abspath(flags.get("root", services.default_root))
    argv = _to_argv({**flags, "root": root})
    program = services.prepare_program(own_command())
    print(services.install([*program, "run", *argv]))
    again = _join_command([*program, "service", "start"])
    print(f"next: {again}{services.advice}; clients on other hosts need the token that it writes in {root}")


def _take_service_options(flags: dict[str, Any]) -> ServiceOptions:
    """Take the flags of `service` out of the flags. Raise UsageError for those that conflict."""
    options = ServiceOptions(
        is_user=flags.pop("user", False),
        run_as=flags.pop("run_as", ""),
        is_copy=flags.pop("copy", False),
    )
    if options.is_user and (options.run_as or options.is_copy):
        raise UsageError("--user excludes --run_as and --copy: such a service runs as you, with your own file")
    return options


def service_command(args: Sequence[str], flags: dict[str, Any]) -> int:
    """Install the daemon as a service of this host, or control it; return the exit code.

    Raise UsageError and StartupError.
    """
    options = _take_service_options(flags)
    action = args[0] if len(args) == 1 else ""
    if action not in _SERVICE_ACTIONS:
        raise UsageError(f"service: expected one of {', '.join(_SERVICE_ACTIONS)}")
    if action != "install" and (flags or options.run_as or options.is_copy):
        raise UsageError(f"service {action} takes no flag but --user; service install takes those of run")
    services = host_services(options)
    if action == "install":
        _install_service(services, flags)
        return 0
    if action == "status":
        code, line = services.status()
        print(line)
        return code
    actions: dict[str, Callable[[], str]] = {
        "uninstall": services.uninstall,
        "start": services.start,
        "stop": services.stop,
        "restart": services.restart,
        "logs": services.logs,
    }
    print(actions[action]())
    return 0


def merge_environment(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of the environment, and over them those of the command line. Raise UsageError.

    A variable that stands for no flag may be misspelt: it is told.
    """
    known = {STEP_ENV_VAR, DAEMON_ENV_VAR, *map(variable_name, OPTIONS)}
    known |= {ENV_PREFIX + name for name in ("FAILPOINT", "HOST", "TOKEN")}  # the last two are a client's
    for name in sorted(os.environ):
        if name.startswith(ENV_PREFIX) and name not in known:
            print_error(f"{name} stands for no flag; see {_PROGRAM} config")
    return {**environment_flags(os.environ), **flags}


def _shown_value(option: Option, flags: Mapping[str, Any], settings: Settings) -> Any:
    """Return a value for people: a duration and a size as typed, a file with the root that it is in."""
    value = getattr(settings, option.field)
    if option.kind in ("duration", "size"):
        return flags.get(option.field, option.default)
    if option.kind == "path":
        return value.replace("$ROOT", settings.root)
    return value


def config_command(flags: Mapping[str, Any], is_json: bool) -> int:
    """Show the value of each option and where it comes from; return the exit code. Raise UsageError."""
    merged = merge_environment(flags)
    settings = make_settings(merged)
    rows = {}
    for option in OPTIONS:
        source = "default"
        if option.field in flags:
            source = "command line"
        elif option.field in merged:
            source = variable_name(option)
        rows[option.name] = {"value": _shown_value(option, merged, settings), "source": source}
    if is_json:
        print_json(rows)
        return 0
    texts = {name: json.dumps(row["value"], ensure_ascii=False) for name, row in rows.items()}
    width = max(map(len, texts.values()))
    print("\n".join(f"{name:<16}{texts[name]:<{width}}  {row['source']}" for name, row in rows.items()))
    return 0


def _find_client_command(name: str | None) -> ClientCommand | None:
    return next((command for command in CLIENT_COMMANDS if command.name == name), None)


def run_command(argv: Sequence[str]) -> int:
    """Do what the command line says; return the exit code. Raise UsageError and StartupError."""
    client = _find_client_command(argv[0] if argv else None)
    if client:
        return client_command(client, argv[1:], _PROGRAM)
    args, flags = parse_command_line(argv)
    if flags.get("version"):
        print(version_line())
        return 0
    if flags.get("help_man"):
        print(manual_text(), end="")
        return 0
    command, *rest = args or ["help"]
    if command == "help":
        topic = rest[0] if rest else None
        client = _find_client_command(topic)
        if client:
            print(client_parser(client, _PROGRAM).format_help(), end="")
            return 0
        print(help_text(topic, "help_long" in flags), end="")
        return 0
    if flags.get("help") or flags.get("help_long"):
        print(help_text(command, "help_long" in flags), end="")
        return 0
    if command == "service":
        return service_command(rest, flags)
    _find_command(command)
    if rest:
        raise UsageError(f"{command}: unexpected argument {rest[0]!r}")
    if _take_service_options(flags) != _NO_OPTIONS:
        raise UsageError("--user, --run_as and --copy are flags of service install")
    is_json = flags.pop("json", False)
    if command == "config":
        return config_command(flags, is_json)
    if is_json and command != "selftest":
        raise UsageError(f"{command}: unexpected flag --json")
    settings = make_settings(merge_environment(flags))
    if command == "selftest":
        return self_test(settings, is_json)
    leave_step()
    return run_supervised(settings)


def escape_unencodable_output() -> None:
    """Have letters that the encoding of standard output lacks written as \\u and digits, as on standard error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def main() -> int:
    """Run the program; return its exit code: 0, 1 when it cannot do its work, 2 for a wrong command line."""
    escape_unencodable_output()
    try:
        return run_command(sys.argv[1:])
    except UsageError as error:
        if not report_wrong_service(error, _root_of(sys.argv)):
            print_error(f"{error}; see {_PROGRAM} help")
        return 2
    except StartupError as error:
        print_error(str(error))
        return 1
    except BrokenPipeError:  # of `help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
        return 1


if __name__ == "__main__":
    sys.exit(main())
