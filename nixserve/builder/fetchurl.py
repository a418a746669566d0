"""
C{builtin:fetchurl}: downloads one file. Whether it is the right one the hash of the output says, later.

Source: Nix 2.8, src/libstore/builtins/fetchurl.cc and filetransfer.cc. Spoken are http, https and file; not ftp and
s3, and no file with passwords is read. Variables such as C{https_proxy} are those of the build, which may take them
from outside (C{impureEnvVars}).
"""

from __future__ import annotations

import http.client
import lzma
import os
import random
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import IO, Final

import nixserve
from nixserve.builder.builtinjob import BuiltinFailed, BuiltinJob, logRecord, warn
from nixserve.codec.text import encodeText
from nixserve.store.files import deletePath
from nixserve.store.restoring import restorePath

__all__ = ["fetchURL"]

_CHUNK = 256 * 1024

#: Seconds without a byte after which a download has stalled: Nix's stalled-download-timeout.
_STALL_TIMEOUT: Final = 300
#: Seconds before the second attempt; doubled each time, and varied so that not all come back at once.
_RETRY_DELAY: Final = 0.25
#: Seconds between reports of progress. They keep a silent download from being taken for a build that hangs.
_REPORT_INTERVAL: Final = 1.0

# Of the answers from 500 on these say that trying again is of no use; below 500 two say that it is.
_PERMANENT_SERVER_ERRORS = (501, 505, 511)
_TRANSIENT_CLIENT_ERRORS = (408, 429)

# Nix's numbers: an activity that transfers a file, and the progress of one.
_ACT_FILE_TRANSFER, _RES_PROGRESS, _LEVEL_TALKATIVE = 101, 105, 4

_PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))


class _Transient(Exception):
    """A download failed in a way that another attempt may not."""


def fetchURL(job: BuiltinJob) -> None:
    """
    Download the attribute C{url}. C{executable} = C{1} makes the file executable; with C{unpack} = C{1} it must be a
    NAR, compressed if its name ends in C{.xz}, which is restored.

    @raise BuiltinFailed: it cannot be had.
    @raise nixserve.errors.NixServeError: this is no NAR.
    @raise OSError: the output cannot be written.
    """
    if not job.network:
        raise BuiltinFailed("'builtin:fetchurl' must be a fixed-output or impure derivation")
    url = job.attribute("url")
    unpack = job.env.get("unpack") == "1"
    open_ = _opener(job, url)
    for attempt in range(1, job.attempts + 1):
        try:
            _download(url, open_, job.out, unpack)
            break
        except _Transient as error:
            deletePath(job.out)
            text = f"unable to download '{url}': {error}"
            if attempt == job.attempts:
                raise BuiltinFailed(text) from error
            delay = _RETRY_DELAY * 2 ** (attempt - 1) * random.uniform(1, 1.5)
            warn(f"{text}; retrying in {delay * 1000:.0f} ms")
            time.sleep(delay)
    if job.env.get("executable") == "1":
        os.chmod(job.out, 0o755)


#: What answers a request: bytes to read, and how many there should be, or C{None} if that is not known.
_Answer = tuple[IO[bytes] | http.client.HTTPResponse, int | None]


def _opener(job: BuiltinJob, url: str) -> Callable[[], _Answer]:
    """What opens C{url} each time it is called; raises L{_Transient} or L{BuiltinFailed}."""
    parts = _splitURL(url)
    if parts.scheme == "file":
        return lambda: _openFile(url, parts)
    if parts.scheme not in ("http", "https"):
        raise BuiltinFailed(f"unable to download '{url}': scheme '{parts.scheme}' is not supported")
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=_context(job.caCertificates)),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        # A redirection may name any scheme.
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    opener.addheaders = [("User-Agent", f"nixserve/{nixserve.__version__}"), ("Accept", "*/*")]
    return lambda: _openHTTP(url, opener)


def _splitURL(url: str) -> urllib.parse.SplitResult:
    try:
        return urllib.parse.urlsplit(url)
    except ValueError as error:
        raise BuiltinFailed(f"unable to download '{url}': {error}") from error


def _context(caCertificates: str) -> ssl.SSLContext:
    # Comments between certificates may be in any language; here only ASCII is taken.
    text = caCertificates.encode("ascii", "ignore").decode("ascii")
    try:
        return ssl.create_default_context(cadata=text or None)
    except (ssl.SSLError, ValueError) as error:
        raise BuiltinFailed(f"the certificates of authorities to trust cannot be read: {error}") from error


def _openFile(url: str, parts: urllib.parse.SplitResult) -> _Answer:
    if parts.netloc not in ("", "localhost"):
        raise BuiltinFailed(f"unable to download '{url}': it is on another host, '{parts.netloc}'")
    path = urllib.parse.unquote(parts.path, errors="surrogateescape")
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed by whoever reads it
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BuiltinFailed(f"unable to download '{url}': {reason}") from error
    return file, os.fstat(file.fileno()).st_size


def _openHTTP(url: str, opener: urllib.request.OpenerDirector) -> _Answer:
    try:
        # Bytes that may not stand in a request are quoted; what is quoted already stays.
        response = opener.open(urllib.parse.quote(encodeText(url), safe=_PRINTABLE), timeout=_STALL_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        text = f"HTTP error {error.code} ('{error.reason}')"
        if (error.code >= 500 and error.code not in _PERMANENT_SERVER_ERRORS) or error.code in _TRANSIENT_CLIENT_ERRORS:
            raise _Transient(text) from error
        raise BuiltinFailed(f"unable to download '{url}': {text}") from error
    except urllib.error.URLError as error:
        # Without a certificate, or with an unknown scheme, there will be no difference next time.
        if isinstance(error.reason, OSError) and not isinstance(error.reason, ssl.SSLCertVerificationError):
            raise _Transient(str(error.reason)) from error
        raise BuiltinFailed(f"unable to download '{url}': {error.reason}") from error
    except (http.client.InvalidURL, ValueError) as error:
        raise BuiltinFailed(f"unable to download '{url}': {error}") from error
    except (http.client.HTTPException, OSError) as error:
        raise _Transient(str(error) or type(error).__name__) from error
    assert isinstance(response, http.client.HTTPResponse)  # only HTTP is spoken
    return response, response.length


def _download(url: str, open_: Callable[[], _Answer], out: str, unpack: bool) -> None:
    identity = random.getrandbits(48)
    logRecord(
        action="start",
        fields=[url],
        id=identity,
        level=_LEVEL_TALKATIVE,
        text=f"downloading '{url}'",
        type=_ACT_FILE_TRANSFER,
    )
    try:
        chunks = _read(*open_(), identity)
        if not unpack:
            _writeFile(out, chunks)
        else:
            restorePath(out, _decompress(chunks) if url.endswith(".xz") else chunks)
    finally:
        logRecord(action="stop", id=identity)


def _read(source: IO[bytes] | http.client.HTTPResponse, size: int | None, identity: int) -> Iterator[bytes]:
    """All of C{source}, reporting progress; raises L{_Transient} if it ends early."""
    received = 0
    reported = time.monotonic()
    with source:
        while True:
            try:
                chunk = source.read(_CHUNK)
            except (http.client.HTTPException, OSError) as error:
                raise _Transient(str(error) or type(error).__name__) from error
            if not chunk:
                break
            received += len(chunk)
            if time.monotonic() - reported >= _REPORT_INTERVAL:
                reported = time.monotonic()
                logRecord(action="result", fields=[received, size or 0, 0, 0], id=identity, type=_RES_PROGRESS)
            yield chunk
    if size is not None and received < size:
        raise _Transient(f"transferred a partial file: {received} of {size} bytes")


def _writeFile(path: str, chunks: Iterator[bytes]) -> None:
    with open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)


def _decompress(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """
    What is in an xz stream. At most one chunk at a time is in memory, however well it is compressed.
    """
    decompressor = lzma.LZMADecompressor()
    for chunk in chunks:
        pending = chunk
        while not decompressor.eof:
            try:
                data = decompressor.decompress(pending, _CHUNK)
            except lzma.LZMAError as error:
                raise BuiltinFailed(f"cannot decompress: {error}") from error
            if data:
                yield data
            if decompressor.needs_input:
                break
            pending = b""
    if not decompressor.eof:
        raise BuiltinFailed("cannot decompress: the data ends early")
