"""
What a hostile builder tries, where a shell cannot: C{main} runs in the place of a builder and prints what it got.

Imports stand at the top, since nothing can be imported inside.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import resource
import socket
import stat
import struct

_libc = ctypes.CDLL(None, use_errno=True)
_NUMBERS = {
    "x86_64": {
        "chmod": 90,
        "mknod": 133,
        "openat2": 437,
        "fchmodat2": 452,
        "setxattrat": 463,
        "add_key": 248,
        "request_key": 249,
        "keyctl": 250,
        "syslog": 103,
        "socket": 41,
    },
    "aarch64": {
        "openat2": 437,
        "fchmodat2": 452,
        "setxattrat": 463,
        "add_key": 217,
        "request_key": 218,
        "keyctl": 219,
        "syslog": 116,
        "socket": 198,
    },
}.get(platform.machine(), {})
_X32 = 0x40000000


def _name(result):
    """The name of the error of a C function, or C{ok}."""
    return "ok" if result != -1 else errno.errorcode[ctypes.get_errno()]


def _call(number, *arguments):
    """What a system call says."""
    return _name(_libc.syscall(ctypes.c_long(number), *arguments))


def _python(function, *arguments, **options):
    """What a function of Python's says."""
    try:
        function(*arguments, **options)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "ok"


def _oldCall(number, *arguments, data=b""):
    """
    What a system call of 32-bit programs says, which a 64-bit program can make too.

    @param arguments: up to three; C{None} for the address of C{data}.
    """
    memory = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40, 7)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    first, second, third = (base + 64 if value is None else value for value in (*arguments, 0, 0, 0)[:3])
    # push rbx; mov ebx, first; mov ecx, second; mov edx, third; mov eax, number; int 0x80; pop rbx; ret
    code = b"\x53\xbb" + struct.pack("<I", first) + b"\xb9" + struct.pack("<I", second)
    code += b"\xba" + struct.pack("<I", third) + b"\xb8" + struct.pack("<I", number) + b"\xcd\x80\x5b\xc3"
    memory[:] = code.ljust(64, b"\0") + data.ljust(4096 - 64, b"\0")
    pid = os.fork()
    if pid == 0:
        result = ctypes.CFUNCTYPE(ctypes.c_int)(base)()
        os._exit(-result if result < 0 else 0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return errno.errorcode.get(status, "ok" if status == 0 else str(status))


def setuidFiles():
    """Every way to a setuid or setgid file."""
    os.close(os.open("file", os.O_WRONLY | os.O_CREAT))
    yield "chmod", _python(os.chmod, "file", 0o4755)
    yield "chmod setgid", _python(os.chmod, "file", 0o2755)
    with open("file") as file:
        yield "fchmod", _python(os.fchmod, file.fileno(), 0o4755)
    directory = os.open(".", os.O_RDONLY)
    yield "fchmodat", _python(os.chmod, "file", 0o4755, dir_fd=directory)
    yield "open", _python(os.open, "new", os.O_WRONLY | os.O_CREAT, 0o4755)
    yield "O_TMPFILE", _python(os.open, ".", os.O_WRONLY | os.O_TMPFILE, 0o4755)
    yield "mknod", _python(os.mknod, "node", stat.S_IFREG | 0o4755)
    if _NUMBERS:
        how = struct.pack("=QQQ", os.O_WRONLY | os.O_CREAT, 0o4755, 0)
        yield "openat2", _call(_NUMBERS["openat2"], -100, b"new2", how, ctypes.c_long(len(how)))
        yield "fchmodat2", _call(_NUMBERS["fchmodat2"], -100, b"file", 0o4755, 0)
    if "chmod" in _NUMBERS:
        yield "x32 chmod", _call(_NUMBERS["chmod"] | _X32, b"file", 0o4755)
        yield "i386 chmod", _oldCall(15, None, 0o4755, data=b"file")
    for name in os.listdir("."):
        yield f"mode of {name}", oct(os.stat(name).st_mode & 0o6000)
    yield "ordinary chmod", _python(os.chmod, "file", 0o755)
    yield "sticky", _python(os.chmod, ".", 0o1700)
    yield "open for reading", _python(os.open, "file", os.O_RDONLY, 0o4755)


def extendedAttributes():
    """Every way to an extended attribute."""
    os.close(os.open("attributes", os.O_WRONLY | os.O_CREAT))
    yield "set", _python(os.setxattr, "attributes", "user.x", b"y")
    yield "get", _python(os.getxattr, "attributes", "user.x")
    yield "list", _python(os.listxattr, "attributes")
    if _NUMBERS:
        yield "setxattrat", _call(_NUMBERS["setxattrat"], -100, b"attributes", 0, b"user.x", None, 0)


def privileges():
    """What is left of them."""
    with open("/proc/self/status") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name in ("CapEff", "CapPrm", "CapInh", "CapAmb", "NoNewPrivs", "Seccomp", "Groups", "Uid", "Gid"):
                yield name, value.strip()
    yield "mount", _call(165 if platform.machine() == "x86_64" else 40, b"x", b"/tmp", b"tmpfs", 0, None)
    yield "setuid", _python(os.setuid, 0)
    yield "sethostname", _python(socket.sethostname, "evil")
    yield "descriptors", " ".join(sorted(os.listdir("/proc/self/fd"))[:3])


def network():
    """Whom one can reach. The port and the name are of a listener on the host."""
    with socket.socket() as client:
        yield "tcp", _python(client.connect, ("127.0.0.1", int(os.environ["PORT"])))
    with socket.socket(socket.AF_UNIX) as client:
        yield "abstract", _python(client.connect, "\0" + os.environ["ABSTRACT"])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        yield "udp", _python(client.connect, ("192.0.2.1", 53))
    if "ADDRESS" in os.environ:
        with socket.socket() as client:
            yield "outside", _python(client.connect, (os.environ["ADDRESS"], int(os.environ["PORT"])))
        with socket.socket() as client:
            # Where slirp4netns has the 127.0.0.1 of the host, if it may.
            yield "gateway", _python(client.connect, ("10.0.2.2", int(os.environ["PORT"])))
    yield "interfaces", " ".join(name for _, name in socket.if_nameindex())


def listener():
    """An abstract socket for somebody to connect to, who gets a descriptor that C{OUTPUT} can be changed with."""
    out = os.open(os.environ["OUTPUT"], os.O_RDWR | os.O_CREAT, 0o644)
    os.write(out, b"good")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0" + os.environ["ABSTRACT"])
        server.listen()
        print("listening: here", flush=True)
        client, _ = server.accept()
        socket.send_fds(client, [b"x"], [out])
        yield "handed", "over"


def keyrings():
    """What is to be had of the keys of others, and to be left for them. C{KEY} is one of the server's."""
    key = os.environ["KEY"]
    with open("/proc/keys") as file:
        yield "listed", str(key in file.read())
    yield "session", _call(_NUMBERS["keyctl"], 0, -3, 0)
    yield "request", _call(_NUMBERS["request_key"], b"user", key.encode(), None, -3)
    if "LEAVE" in os.environ:
        yield "leave", _call(_NUMBERS["add_key"], b"user", b"nixserve-left", b"x", ctypes.c_long(1), -4)
    yield "list", _call(_NUMBERS["keyctl"], 11, -4, None, 0)
    if "chmod" in _NUMBERS:
        yield "x32 keyctl", _call(_NUMBERS["keyctl"] | _X32, 0, -3, 0)
        yield "i386 keyctl", _oldCall(288, 0, 0xFFFFFFFD, 0)
        yield "i386 add_key", _oldCall(286, None, None, None, data=b"user")
        yield "i386 request_key", _oldCall(287, None, None, 0, data=b"user")


def sockets():
    """Which families of sockets there are: C{AF_VSOCK} and C{AF_ALG} are not for builders."""
    for name in ("AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK"):
        yield name, _python(socket.socket, getattr(socket, name), socket.SOCK_DGRAM)
    yield "pair", _python(socket.socketpair)
    for family in range(46):
        if family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET):
            yield f"family {family}", _call(_NUMBERS["socket"], family, 1, 0)
    if "chmod" in _NUMBERS:
        yield "x32 AF_VSOCK", _call(_NUMBERS["socket"] | _X32, 40, 1, 0)
        yield "i386 AF_VSOCK", _oldCall(359, 40, 1, 0)
        yield "i386 AF_UNIX", _oldCall(359, 1, 1, 0)
        yield "i386 pair", _oldCall(360, 40, 1, 0)
        yield "socketcall AF_VSOCK", _oldCall(102, 1, None, data=struct.pack("<3I", 40, 1, 0))
        yield "socketcall AF_UNIX", _oldCall(102, 1, None, data=struct.pack("<3I", 1, 1, 0))


def kernelLog():
    """The kernel's log: SYSLOG_ACTION_READ_ALL, SYSLOG_ACTION_SIZE_BUFFER."""
    buffer = ctypes.create_string_buffer(1000)
    yield "read", _call(_NUMBERS["syslog"], 3, buffer, 1000)
    yield "size", _call(_NUMBERS["syslog"], 10, None, 0)


def leases():
    """Leases on an input that belongs to the builder's uid, as all do without root; and on a file of its own."""
    with open("own", "w"):
        pass
    for name in (os.environ["INPUT"], "own"):
        with open(name) as file:
            for kind in (fcntl.F_RDLCK, fcntl.F_WRLCK):
                yield f"{name} {kind}", _python(fcntl.fcntl, file, fcntl.F_SETLEASE, kind)
            yield f"{name} flags", _python(fcntl.fcntl, file, fcntl.F_GETFL)


def controlGroups():
    """The control groups of the host, in a namespace where one may mount; and how many namespaces there may be."""
    yield "apart", _name(_libc.unshare(0x10000000 | 0x20000))
    yield "cgroup namespace", _name(_libc.unshare(0x2000000))
    for kind in (b"cgroup2", b"cgroup"):
        yield kind.decode(), _name(_libc.mount(b"none", b"/tmp", kind, 0, b"pids" if kind == b"cgroup" else None))
    yield "tmpfs", _name(_libc.mount(b"none", b"/tmp", b"tmpfs", 0, None))
    held = []
    while len(held) < 600 and _libc.unshare(0x4000000) != -1:
        held.append(os.open("/proc/self/ns/uts", os.O_RDONLY))
    yield "many", str(len(held))


def limits():
    """What a builder might raise."""
    with open("/proc/self/oom_score_adj") as file:
        yield "oom", file.read().strip()
    yield "processes", str(resource.getrlimit(resource.RLIMIT_NPROC)[1])
    yield "core", str(resource.getrlimit(resource.RLIMIT_CORE))
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        yield "raised", "ok"
    except (OSError, ValueError):
        yield "raised", "refused"


def main():
    """Try what the variable C{ATTACK} names."""
    for what, result in globals()[os.environ["ATTACK"]]():
        print(f"{what}: {result}")
    return 0
