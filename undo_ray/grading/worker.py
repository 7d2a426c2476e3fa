"""The far side of the grading pool: a process that forks workers, and the worker that judges answers.

`python -m undo_ray.grading.worker FD` imports the graders once and then forks a worker for each socket it is handed, in
milliseconds where a start takes a second. Before it sees an answer, a worker gives up for good what judging does not need: it
opens no network, starts no process, writes no file (a seccomp filter, held by the kernel), and its memory is bounded. Its
environment holds no secrets, as the pool starts this process with almost none. It may read files, and has nobody to tell.

For Linux on x86-64 and 64-bit Arm.
"""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import platform
import resource
import signal
import socket
import struct
import sys
from typing import Any, Final

from undo_ray import grading
from undo_ray.types import FORMAT, UserError, Verdict

# The number of each refused system call on x86-64 and on aarch64 (-1 where it has none).
REFUSED: Final = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "io_uring_setup": (425, 425),
    "fork": (57, -1), "vfork": (58, -1), "clone": (56, 220), "clone3": (435, 435), "execve": (59, 221), "execveat": (322, 281),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kill": (62, 129),
    "tkill": (200, 130), "tgkill": (234, 131), "pidfd_open": (434, 434), "setsid": (112, 157), "setrlimit": (160, 164),
    "prlimit64": (302, 261), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "creat": (85, -1),
    "openat2": (437, 437), "open_by_handle_at": (304, 265), "memfd_create": (319, 279), "truncate": (76, 45),
    "mknod": (133, -1), "mknodat": (259, 33), "mkdir": (83, -1), "mkdirat": (258, 34), "rmdir": (84, -1), "unlink": (87, -1),
    "unlinkat": (263, 35), "rename": (82, -1), "renameat": (264, 38), "renameat2": (316, 276), "link": (86, -1),
    "linkat": (265, 37), "symlink": (88, -1), "symlinkat": (266, 36), "chmod": (90, -1), "fchmodat": (268, 53),
    "chown": (92, -1), "fchownat": (260, 54), "utimensat": (280, 88),
}  # fmt: skip
READ_ONLY: Final = {"open": (2, -1), "openat": (257, 56)}
"""Allowed for reading."""
_FLAGS: Final = {"open": 1, "openat": 2}
"""Which argument holds the flags."""
_MACHINES: Final = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the tables above, and what the kernel calls the machine (AUDIT_ARCH_*)."""


# Berkeley packet filter instructions (linux/bpf_common.h, linux/seccomp.h).
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000


def main(control: socket.socket) -> None:
    """Obey the pool: make a kind of answer ready ("KIND"), or fork a worker for the socket that comes along ("BYTES")."""
    logging.disable(logging.CRITICAL)  # Math-Verify logs each answer it cannot read
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # finished workers leave nothing behind
    while True:
        order, sockets, _, _ = socket.recv_fds(control, 256, 1)
        if not order:
            return
        if not sockets:
            try:
                grading.warm(order.decode())
            except ImportError:
                pass  # each answer will say so
            control.sendall(struct.pack("!i", 0))
            continue
        pid = os.fork()
        if pid == 0:
            control.close()
            _judge(socket.socket(fileno=sockets[0]), int(order))
        os.close(sockets[0])
        control.sendall(struct.pack("!i", pid))


def _judge(pool: socket.socket, memory: int) -> None:
    """A worker's life: batches of (text, problem, kind) in, a verdict a line out. Ends with the pool, or out of memory."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not even a hung worker outlives the pool
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silence, stream)
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            confine()
        except (OSError, KeyError) as error:
            pool.sendall(str(error).encode())
            return
        pool.sendall(b"+")
        with pool.makefile("rb") as batches:
            for batch in batches:
                for text, problem, kind in json.loads(batch):
                    pool.sendall(json.dumps(_verdict(text, problem, kind)).encode() + b"\n")
    finally:
        os._exit(1)  # never back into the loop of the process this one was forked from


def _verdict(text: str, problem: dict[str, Any], kind: str) -> Any:
    """[correct, answer, reason], or a text: what is wrong with the problem's gold or with the installation."""
    try:
        verdict = grading.grade(text, problem, kind)
    except UserError as error:
        return str(error)
    except ImportError as error:
        return f"grading {kind} answers: {error}; install undo-ray with its extra cpu or gpu"
    except MemoryError:
        raise
    except Exception:  # whatever a parser does on hostile text: an answer that breaks it cannot be read
        verdict = Verdict(False, None, FORMAT)
    return [verdict.correct, verdict.answer, verdict.reason]


def confine() -> None:
    """Give up network, processes and writing for the rest of this process's life. Raises OSError where the kernel will not."""
    column, machine = _MACHINES[platform.machine()]
    refuse = [(_RETURN, 0, 0, _REFUSE)]
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, machine), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    program += [(_AT_LEAST, 0, 1, 0x40000000), *refuse]  # x86-64's second set of numbers
    for numbers in REFUSED.values():
        program += [(_EQUAL, 0, 1, numbers[column] & 0x3FFFFFFF), *refuse]
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    for name, numbers in READ_ONLY.items():
        opening = [(_LOAD, 0, 0, 16 + 8 * _FLAGS[name]), (_ANY_BIT, 0, 1, writing), *refuse, (_RETURN, 0, 0, _ALLOW)]
        program += [(_EQUAL, 0, len(opening), numbers[column] & 0x3FFFFFFF), *opening]
    program.append((_RETURN, 0, 0, _ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = struct.pack("@HP", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((38, 1, 0, 0, 0), (22, 2, header, 0, 0)):  # PR_SET_NO_NEW_PRIVS, then PR_SET_SECCOMP with the filter
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "the kernel refuses a seccomp filter")


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
