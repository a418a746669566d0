"""
What a hostile builder tries, where a shell cannot: C{main} runs in the place of a builder and prints what it got.

Imports stand at the top, since nothing can be imported inside.
"""

import ctypes
import errno
import mmap
import os
import platform
import socket
import stat
import struct

_libc = ctypes.CDLL(None, use_errno=True)
_NUMBERS = {
    "x86_64": {"chmod": 90, "mknod": 133, "openat2": 437, "fchmodat2": 452, "setxattrat": 463},
    "aarch64": {"openat2": 437, "fchmodat2": 452, "setxattrat": 463},
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


def _oldInstructions():
    """chmod 04755 through the system calls of 32-bit programs, which a 64-bit program can call too."""
    memory = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40, 7)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    # push rbx; mov ebx, path; mov ecx, mode; mov eax, 15; int 0x80; pop rbx; ret
    code = b"\x53\xbb" + struct.pack("<I", base + 64) + b"\xb9" + struct.pack("<I", 0o4755)
    memory[:] = (code + b"\xb8\x0f\0\0\0\xcd\x80\x5b\xc3").ljust(64, b"\0") + b"file".ljust(4096 - 64, b"\0")
    pid = os.fork()
    if pid == 0:
        result = ctypes.CFUNCTYPE(ctypes.c_int)(base)()
        os._exit(-result if result < 0 else 0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return errno.errorcode.get(code, str(code))


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
        yield "i386 chmod", _oldInstructions()
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
    yield "interfaces", " ".join(name for _, name in socket.if_nameindex())


def main():
    """Try what the variable C{ATTACK} names."""
    for what, result in globals()[os.environ["ATTACK"]]():
        print(f"{what}: {result}")
    return 0
