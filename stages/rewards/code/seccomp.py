"""The system calls that a judged program is refused: what is not divided by namespaces, and what only widens the attack.

A filter for the kernel (seccomp), in its own byte code; bubblewrap loads it before the program starts. Most of the list does
nothing for a process without privileges anyway; the rest matters: memory that belongs to no process (System V, memfd) would
escape the memory limit, sockets other than IP and Unix (vsock) would reach the host of a virtual machine past the network
namespace, and new user namespaces would give privileges back.
"""

import struct

_REFUSED = (
    ("ptrace", 101, 117),
    ("process_vm_readv", 310, 270),
    ("process_vm_writev", 311, 271),
    ("kcmp", 312, 272),
    ("pidfd_getfd", 438, 438),
    ("shmget", 29, 194),
    ("shmat", 30, 196),
    ("shmctl", 31, 195),
    ("semget", 64, 190),
    ("msgget", 68, 186),
    ("mq_open", 240, 180),
    ("memfd_create", 319, 279),
    ("memfd_secret", 447, 447),
    ("mount", 165, 40),
    ("umount2", 166, 39),
    ("pivot_root", 155, 41),
    ("chroot", 161, 51),
    ("open_tree", 428, 428),
    ("move_mount", 429, 429),
    ("fsopen", 430, 430),
    ("fsconfig", 431, 431),
    ("fsmount", 432, 432),
    ("fspick", 433, 433),
    ("mount_setattr", 442, 442),
    ("unshare", 272, 97),
    ("setns", 308, 268),
    ("add_key", 248, 217),
    ("request_key", 249, 218),
    ("keyctl", 250, 219),
    ("bpf", 321, 280),
    ("perf_event_open", 298, 241),
    ("userfaultfd", 323, 282),
    ("io_uring_setup", 425, 425),
    ("io_uring_enter", 426, 426),
    ("io_uring_register", 427, 427),
    ("kexec_load", 246, 104),
    ("init_module", 175, 105),
    ("finit_module", 313, 273),
    ("delete_module", 176, 106),
    ("name_to_handle_at", 303, 264),
    ("open_by_handle_at", 304, 265),
    ("personality", 135, 92),
    ("quotactl", 179, 60),
    ("acct", 163, 89),
    ("syslog", 103, 116),
    ("swapon", 167, 224),
    ("reboot", 169, 142),
)
"""Name, number on x86_64, number on aarch64 (the kernel's unistd.h)."""
REFUSED = {
    "x86_64": {name: number for name, number, _ in _REFUSED},
    "aarch64": {name: number for name, _, number in _REFUSED},
}
"""Machine -> name of the call -> its number there."""

_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SOCKET = {"x86_64": (41, 53), "aarch64": (198, 199)}
"""`socket` and `socketpair`."""
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_FAMILIES = (1, 2, 10)
"""Unix, IP, IPv6."""
_NEW_NAMESPACES = 0x7E020080
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS, _EAFNOSUPPORT = 1, 38, 97
_NUMBER_AT, _MACHINE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
"""Offsets in the kernel's `seccomp_data`; the argument's low half on little-endian machines."""


def call_filter(machine: str) -> bytes:
    """The filter for `x86_64` or `aarch64`; `KeyError` for another machine."""
    numbers = REFUSED[machine]
    lines = [(_LOAD, 0, 0, _MACHINE_AT), (_EQUAL, 1, 0, _AUDIT[machine]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER_AT)]
    if machine == "x86_64":  # the x32 calls: other numbers for the same calls
        lines += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _REFUSE | _ENOSYS)]
    for number in numbers.values():
        lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE | _EPERM)]
    # Its flags lie in memory, where a filter cannot look; the C library goes on with `clone`.
    lines += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _REFUSE | _ENOSYS)]
    lines += [(_EQUAL, 0, 4, _CLONE[machine]), (_LOAD, 0, 0, _FIRST_ARGUMENT_AT)]
    lines += [(_ANY_BIT, 0, 1, _NEW_NAMESPACES), (_RETURN, 0, 0, _REFUSE | _EPERM), (_RETURN, 0, 0, _ALLOW)]
    first, second = _SOCKET[machine]
    lines += [(_EQUAL, 1, 0, first), (_EQUAL, 0, 5, second), (_LOAD, 0, 0, _FIRST_ARGUMENT_AT)]
    lines += [(_EQUAL, 3 - i, 0, family) for i, family in enumerate(_FAMILIES)]
    lines += [(_RETURN, 0, 0, _REFUSE | _EAFNOSUPPORT), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("<HBBI", *line) for line in lines)
