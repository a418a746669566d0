"""
The system calls that a builder is refused, as a program for the kernel's filter.

Nix's rules (Nix 2.8, src/libstore/build/local-derivation-goal.cc:setupSeccomp): no builder may make a file setuid or
setgid, because others on the machine could run it as the build user while the build lasts, and none may use extended
attributes or ACLs, because they do not travel in a NAR. Nix refuses the calls that change modes; the same can be had by
creating a file with such a mode, and around the filter by calls whose arguments it cannot see, so these are refused
here as well: C{openat2} and C{io_uring} as if the kernel had none, which every caller must expect.

Stricter than Nix, since no namespace separates these from the host and from other builds:

  - keyrings: whose keys a process finds follows from its uid and its descent. As if the kernel had none;
  - families of sockets beside those of local programs and the internet: C{AF_VSOCK} leads to the hypervisor and other
    machines, C{AF_ALG} only to more of the kernel. Packet sockets need a network namespace of one's own. As if the
    kernel had not got them;
  - the kernel's log. As if it were root's alone, as it is on most machines;
  - leases: whoever owns a file can make everybody else wait for 45 seconds, or fail, who opens it, again and again.
    Without root the builder has the uid to which the objects of the store belong. As if the file system had none.

Everything else is allowed. A process may switch to the other instruction sets of its processor, which
number calls differently, so there is a table for each.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["filterProgram"]

# <linux/bpf_common.h>, <linux/seccomp.h>
_LOAD, _JUMP, _JUMP_EQUAL, _JUMP_SET, _AND, _RETURN = 0x20, 0x05, 0x15, 0x45, 0x54, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
# Offsets in struct seccomp_data; of the arguments the low halves, all these machines being little-endian.
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16

# S_ISUID | S_ISGID
_SPECIAL_BITS = 0o6000
# O_CREAT | __O_TMPFILE, the same on all machines below: only with one of them is there a mode.
_CREATING = 0o100 | 0o20000000
# x32 calls are those of x86-64 with this bit.
_WITHOUT_X32_BIT = 0xBFFFFFFF


@dataclass(frozen=True, slots=True)
class _Architecture:
    """
    An instruction set, as the kernel sees it.

    @ivar audit: its C{AUDIT_ARCH} number.
    @ivar modes: the calls that set a mode, each with the index of that argument.
    @ivar opens: likewise the calls that have a mode if the argument before it says so.
    @ivar xattrs: the calls that get, set and list extended attributes.
    @ivar keys: add_key, request_key and keyctl.
    @ivar syslog: reads the kernel's log.
    @ivar sockets: the calls that make sockets, with the family as first argument.
    @ivar fcntls: fcntl, and fcntl64 where that is another one.
    @ivar socketcall: makes sockets too, and hides from us of which family; 0 where there is none.
    """

    audit: int
    modes: Mapping[int, int]
    opens: Mapping[int, int]
    xattrs: tuple[int, ...]
    keys: tuple[int, int, int]
    syslog: int
    sockets: tuple[int, int]
    fcntls: tuple[int, ...]
    socketcall: int = 0


# Calls newer than Linux 5.1 have one number everywhere.
_FCHMODAT2 = {452: 2}
_XATTRS_AT = (463, 464, 465)
_WITHHELD = (425, 426, 427, 437)  # io_uring_setup, io_uring_enter, io_uring_register, openat2

# <linux/socket.h>: AF_UNIX, AF_INET, AF_INET6, AF_NETLINK, AF_PACKET.
_FAMILIES = (1, 2, 10, 16, 17)
# <linux/net.h>: SYS_SOCKET, SYS_SOCKETPAIR, the first argument of socketcall.
_SOCKETCALLS = (1, 8)

# <linux/fcntl.h>: F_SETLEASE, the second argument of fcntl.
_SET_LEASE = 1024

# In this order: chmod, fchmod, fchmodat, creat, mknod, mknodat; open, openat.
_X86_64 = _Architecture(
    0xC000003E,
    {90: 1, 91: 1, 268: 2, 85: 1, 133: 1, 259: 2} | _FCHMODAT2,
    {2: 2, 257: 3},
    (*range(188, 197), *_XATTRS_AT),
    (248, 249, 250),
    103,
    (41, 53),
    (72,),
)
_I386 = _Architecture(
    0x40000003,
    {15: 1, 94: 1, 306: 2, 8: 1, 14: 1, 297: 2} | _FCHMODAT2,
    {5: 2, 295: 3},
    (*range(226, 235), *_XATTRS_AT),
    (286, 287, 288),
    103,
    (359, 360),
    (55, 221),
    102,
)
# Has no chmod, creat, mknod and open.
_AARCH64 = _Architecture(
    0xC00000B7,
    {52: 1, 53: 2, 33: 2} | _FCHMODAT2,
    {56: 3},
    (*range(5, 14), *_XATTRS_AT),
    (217, 218, 219),
    116,
    (198, 199),
    (25,),
)
_ARM = _Architecture(
    0x40000028,
    {15: 1, 94: 1, 333: 2, 8: 1, 14: 1, 324: 2} | _FCHMODAT2,
    {5: 2, 322: 3},
    (*range(226, 235), *_XATTRS_AT),
    (309, 310, 311),
    103,
    (281, 288),
    (55, 221),
)
_MACHINES = {"x86_64": (_X86_64, _I386), "aarch64": (_AARCH64, _ARM)}


def filterProgram(machine: str = "", socketcall: bool = True) -> bytes:
    """
    The filter for a machine.

    @param machine: as C{uname -m} names it; this one if empty.
    @param socketcall: let 32-bit x86 programs make sockets by the call that the C libraries there use. It hides the
        family from the filter, so with it there is a way to all of them.
    @return: an array of C{struct sock_filter}; empty for a machine that has no table, where nothing is filtered.
    """
    architectures = _MACHINES.get(machine or platform.machine(), ())
    program = [block for architecture in architectures for block in _forArchitecture(architecture, socketcall)]
    return b"".join([*program, _step(_RETURN, _ALLOW)]) if program else b""


def _forArchitecture(architecture: _Architecture, socketcall: bool) -> list[bytes]:
    """The steps for one instruction set, passed over by calls of another."""
    body = [_step(_LOAD, _NUMBER)]
    if architecture is _X86_64:
        body.append(_step(_AND, _WITHOUT_X32_BIT))
    for number, argument in architecture.modes.items():
        body += _refuse(number, _checkMode(argument))
    for number, argument in architecture.opens.items():
        check = _checkMode(argument)
        flags = [_loadArgument(argument - 1), _step(_JUMP_SET, _CREATING, 0, len(check) - 1)]
        body += _refuse(number, flags + check)
    for number in architecture.xattrs:
        body += _refuse(number, [_step(_RETURN, _ERRNO | errno.ENOTSUP)])
    for number in (*_WITHHELD, *architecture.keys):
        body += _refuse(number, [_step(_RETURN, _ERRNO | errno.ENOSYS)])
    body += _refuse(architecture.syslog, [_step(_RETURN, _ERRNO | errno.EPERM)])
    for number in architecture.sockets:
        body += _refuse(number, _allowOnly(_FAMILIES))
    for number in architecture.fcntls:
        body += _refuse(number, _refuseOnly(1, (_SET_LEASE,), errno.EINVAL))
    if architecture.socketcall and not socketcall:
        body += _refuse(architecture.socketcall, _refuseOnly(0, _SOCKETCALLS, errno.EAFNOSUPPORT))
    body.append(_step(_RETURN, _ALLOW))
    # A conditional jump reaches 255 steps only.
    head = [_step(_LOAD, _ARCHITECTURE), _step(_JUMP_EQUAL, architecture.audit, 1, 0), _step(_JUMP, len(body))]
    return head + body


def _refuse(number: int, steps: list[bytes]) -> list[bytes]:
    """C{steps}, which return, if the number of the call, just loaded, is this one."""
    return [_step(_JUMP_EQUAL, number, 0, len(steps)), *steps]


def _checkMode(argument: int) -> list[bytes]:
    """Refuse if the mode has a special bit; otherwise, in the last step, allow."""
    return [
        _loadArgument(argument),
        _step(_JUMP_SET, _SPECIAL_BITS, 0, 1),
        _step(_RETURN, _ERRNO | errno.EPERM),
        _step(_RETURN, _ALLOW),
    ]


def _allowOnly(families: tuple[int, ...]) -> list[bytes]:
    """Refuse if the first argument is none of these; otherwise, in the last step, allow."""
    tests = [_step(_JUMP_EQUAL, family, len(families) - index) for index, family in enumerate(families)]
    return [
        _loadArgument(0),
        *tests,
        _step(_RETURN, _ERRNO | errno.EAFNOSUPPORT),
        _step(_RETURN, _ALLOW),
    ]


def _refuseOnly(argument: int, values: tuple[int, ...], error: int) -> list[bytes]:
    """Refuse, in the last step, if this argument is one of these; otherwise allow."""
    tests = [_step(_JUMP_EQUAL, value, len(values) - index) for index, value in enumerate(values)]
    return [
        _loadArgument(argument),
        *tests,
        _step(_RETURN, _ALLOW),
        _step(_RETURN, _ERRNO | error),
    ]


def _loadArgument(index: int) -> bytes:
    """Load the low half of an argument."""
    return _step(_LOAD, _ARGUMENTS + 8 * index)


def _step(code: int, value: int, ifTrue: int = 0, ifFalse: int = 0) -> bytes:
    """A C{struct sock_filter}; the jumps count the steps to pass over."""
    return struct.pack("=HBBI", code, ifTrue, ifFalse, value)
