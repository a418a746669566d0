"""
L{nixserve.builder.seccomp}: system calls that builders may not make, told by a machine of our own for each architecture
that runs the filter.
"""

import struct

import pytest

from nixserve.builder.seccomp import filterProgram


def runFilter(program, audit, number, *arguments):
    """
    What a seccomp program answers.

    @return: C{"allow"} or a number of an error.
    """
    arguments = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack("<IIQ6Q", number, audit, 0, *arguments)
    steps = [struct.unpack_from("<HBBI", program, offset) for offset in range(0, len(program), 8)]
    accumulator, position = 0, 0
    while True:
        code, ifTrue, ifFalse, value = steps[position]
        position += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif code == 0x54:
            accumulator &= value
        elif code == 0x05:
            position += value
        elif code == 0x15:
            position += ifTrue if accumulator == value else ifFalse
        elif code == 0x45:
            position += ifTrue if accumulator & value else ifFalse
        else:
            assert code == 0x06
            return "allow" if value == 0x7FFF0000 else value - 0x50000


X86_64, I386, AARCH64, ARM = 0xC000003E, 0x40000003, 0xC00000B7, 0x40000028


EPERM, EINVAL, ENOSYS, ENOTSUP, EAFNOSUPPORT = 1, 22, 38, 95, 97


@pytest.mark.parametrize(
    ("machine", "audit", "number", "arguments", "expected"),
    [
        ("x86_64", X86_64, 90, (0, 0o4755), EPERM),
        ("x86_64", X86_64, 90, (0, 0o2755), EPERM),
        ("x86_64", X86_64, 90, (0, 0o1777), "allow"),
        ("x86_64", X86_64, 90, (0o6000, 0o755), "allow"),
        ("x86_64", X86_64, 90 | 0x40000000, (0, 0o4755), EPERM),
        ("x86_64", X86_64, 2, (0, 0o100, 0o4755), EPERM),
        ("x86_64", X86_64, 2, (0, 0, 0o4755), "allow"),
        ("x86_64", X86_64, 2, (0, 0o100, 0o644), "allow"),
        ("x86_64", X86_64, 257, (0, 0, 0o100, 0o2755), EPERM),
        ("x86_64", X86_64, 188, (), ENOTSUP),
        ("x86_64", X86_64, 196, (), ENOTSUP),
        ("x86_64", X86_64, 197, (), "allow"),
        ("x86_64", X86_64, 437, (), ENOSYS),
        ("x86_64", X86_64, 15, (0, 0o4755), "allow"),
        ("x86_64", I386, 15, (0, 0o4755), EPERM),
        ("x86_64", I386, 90, (0, 0o4755), "allow"),
        ("x86_64", I386, 226, (), ENOTSUP),
        ("x86_64", AARCH64, 52, (0, 0o4755), "allow"),
        ("aarch64", AARCH64, 52, (0, 0o4755), EPERM),
        ("aarch64", AARCH64, 53, (0, 0, 0o4755), EPERM),
        ("aarch64", AARCH64, 53, (0, 0o4755, 0o755), "allow"),
        ("aarch64", AARCH64, 56, (0, 0, 0o100, 0o4755), EPERM),
        ("aarch64", AARCH64, 5, (), ENOTSUP),
        ("aarch64", AARCH64, 14, (), "allow"),
        ("aarch64", ARM, 333, (0, 0, 0o4755), EPERM),
        ("aarch64", ARM, 226, (), ENOTSUP),
        ("aarch64", ARM, 0, (), "allow"),
        ("x86_64", X86_64, 250, (), ENOSYS),
        ("x86_64", X86_64, 248, (), ENOSYS),
        ("x86_64", X86_64, 249 | 0x40000000, (), ENOSYS),
        ("x86_64", X86_64, 426, (), ENOSYS),
        ("x86_64", X86_64, 103, (), EPERM),
        ("x86_64", X86_64, 41, (1,), "allow"),
        ("x86_64", X86_64, 41, (2,), "allow"),
        ("x86_64", X86_64, 41, (17,), "allow"),
        ("x86_64", X86_64, 41, (40,), EAFNOSUPPORT),
        ("x86_64", X86_64, 53, (40,), EAFNOSUPPORT),
        ("x86_64", X86_64, 41 | 0x40000000, (40,), EAFNOSUPPORT),
        ("x86_64", X86_64, 41, (40 | 1 << 32,), EAFNOSUPPORT),
        ("x86_64", X86_64, 102, (1,), "allow"),
        ("x86_64", X86_64, 72, (3, 1024), EINVAL),
        ("x86_64", X86_64, 72, (1024, 3), "allow"),
        ("x86_64", X86_64, 72 | 0x40000000, (3, 1024), EINVAL),
        ("x86_64", I386, 55, (3, 1024), EINVAL),
        ("x86_64", I386, 221, (3, 1024), EINVAL),
        ("x86_64", I386, 221, (3, 1025), "allow"),
        ("aarch64", AARCH64, 25, (3, 1024), EINVAL),
        ("aarch64", ARM, 221, (3, 1024), EINVAL),
        ("x86_64", I386, 288, (), ENOSYS),
        ("x86_64", I386, 359, (40,), EAFNOSUPPORT),
        ("x86_64", I386, 360, (1,), "allow"),
        ("x86_64", I386, 102, (1,), "allow"),
        ("aarch64", AARCH64, 219, (), ENOSYS),
        ("aarch64", AARCH64, 116, (), EPERM),
        ("aarch64", AARCH64, 198, (40,), EAFNOSUPPORT),
        ("aarch64", AARCH64, 199, (1,), "allow"),
        ("aarch64", ARM, 311, (), ENOSYS),
        ("aarch64", ARM, 281, (38,), EAFNOSUPPORT),
        ("aarch64", ARM, 281, (10,), "allow"),
    ],
)
def test_filter(machine, audit, number, arguments, expected):
    """The filter answers each call as its table says, for every instruction set of a processor."""
    assert runFilter(filterProgram(machine), audit, number, *arguments) == expected


@pytest.mark.parametrize(
    ("call", "expected"), [(1, EAFNOSUPPORT), (8, EAFNOSUPPORT), (2, "allow"), (3, "allow"), (16, "allow")]
)
def test_socketcall(call, expected):
    """The call of 32-bit x86 that hides its arguments makes no sockets unless that is wanted; all else it does."""
    assert runFilter(filterProgram("x86_64", socketcall=False), I386, 102, call) == expected


def test_noFilter():
    """A machine without a table has no filter, rather than one with wrong numbers."""
    assert filterProgram("vax") == b""
