"""What an executor process gives up: privileges, open files, memory, and a life of its own."""

import ctypes
import os
import pwd
import resource
import signal
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
ADDRESS_SLACK: Final = 512 << 20
DATA_SLACK: Final = 64 << 20


class ConfinementError(Exception):
    """The process could not give something up; it must not go on."""


def drop_privileges(user: str) -> None:
    """Become `user` when root, for good; then never gain privileges again.

    Raises ConfinementError when there is no such user, or it is root itself.
    """
    if os.geteuid() == 0:
        try:
            entry = pwd.getpwnam(user)
        except KeyError as error:
            raise ConfinementError(
                f"there is no user {user!r} to compute as; name another in the configuration"
            ) from error
        if entry.pw_uid == 0 or entry.pw_gid == 0:
            raise ConfinementError(f"user {user!r} is root; name an unprivileged user")
        os.setgroups([])
        os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
        os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
        if 0 in (*os.getresuid(), *os.getresgid()) or os.getgroups():
            raise ConfinementError(f"privileges are still there after becoming {user!r}")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def die_with_parent(parent: int) -> None:
    """Be killed when the thread that started this process ends. To be called after any setuid.

    Raises ConfinementError when `parent` has gone already.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise ConfinementError("the parent has gone")


def limit_memory(memory_bytes: int) -> None:
    """Allow `memory_bytes` more than what is mapped now, for good."""
    page = os.sysconf("SC_PAGESIZE")
    fields = Path("/proc/self/statm").read_text().split()
    mapped, data = int(fields[0]) * page, int(fields[5]) * page
    _lower(resource.RLIMIT_AS, mapped + memory_bytes + ADDRESS_SLACK)
    _lower(resource.RLIMIT_DATA, data + memory_bytes + DATA_SLACK)


def limit_files() -> None:
    """Write no files and no core dumps, open few descriptors."""
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, 0)
    _lower(resource.RLIMIT_NOFILE, 64)


def give_way(nice: int) -> None:
    """Have others run first, and be the first to go when memory is short. Before any setuid."""
    os.nice(nice)
    Path("/proc/self/oom_score_adj").write_text("1000")


def limit_processor_time(seconds: int) -> None:
    """Be killed by SIGXCPU after `seconds` more of processor time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = int(used.ru_utime + used.ru_stime) + 1 + seconds
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (until, hard))


def _lower(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(which, (value, value))


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise ConfinementError(f"prctl {option}: {os.strerror(number)}")
