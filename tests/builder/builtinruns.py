"""
The builders that are part of Nix, run here: what they leave, and a server that they can download from.
"""

import gzip
import http.server
import os
import threading
from pathlib import Path

from nixserve.builder.builtinjob import BuiltinJob
from nixserve.builder.builtins import runBuiltin


def run(name, out, network=False, attempts=1, caCertificates="", **env):
    """Run a builtin builder here."""
    runBuiltin(BuiltinJob(f"builtin:{name}", env, str(out), network, caCertificates, attempts))


def tree(top):
    """By path: the target of a link, the contents of a file and whether it is executable; C{None}: a directory."""
    found = {}
    for path in sorted(Path(top).rglob("*")):
        name = str(path.relative_to(top))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_dir():
            found[name] = None
        else:
            found[name] = (path.read_bytes(), bool(path.stat().st_mode & 0o100))
    return found


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the name of the file says."""

    def do_GET(self):
        """Answer a request."""
        self.server.requests.append((self.path, self.headers))
        again = len([path for path, _ in self.server.requests if path == self.path]) > 1
        match self.path.split("/")[1]:
            case "hello":
                self.reply(200, b"hello")
            case "compressed":
                self.reply(200, gzip.compress(b"hello", mtime=0), ("Content-Encoding", "gzip"))
            case "redirect":
                self.reply(302, b"", ("Location", "/hello"))
            case "elsewhere":
                self.reply(302, b"", ("Location", "file:///etc/passwd"))
            case "loop":
                self.reply(302, b"", ("Location", "/loop"))
            case "once":
                self.reply(200 if again else 503, b"hello")
            case "partial":
                self.reply(200, b"hello" if again else b"hel", ("Content-Length", "5"))
            case "closed":
                self.close_connection = True
                if again:
                    self.reply(200, b"hello")
            case "served":
                self.reply(200, self.server.served)
            case code:
                self.reply(int(code), b"nope")

    def reply(self, code, body, *headers):
        """Send an answer."""
        self.send_response(code)
        if not any(name == "Content-Length" for name, _ in headers):
            self.send_header("Content-Length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *arguments):
        """Say nothing."""


class Server(http.server.ThreadingHTTPServer):
    """Runs in a thread, on loopback."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = []
        self.served = b""
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})

    def count(self, path):
        """How often C{path} was asked for."""
        return [asked for asked, _ in self.requests].count(path)

    def handle_error(self, *arguments):
        """Clients that hang up are no news."""


def fetch(url, out, **more):
    """Download a file."""
    run("fetchurl", out, network=True, url=url, **more)
