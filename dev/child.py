"""Become another program, tied to the life of the parent and, if asked, without root.

Usage: python -I child.py PARENT_PID SIGNAL USER PROGRAM [ARGUMENT...]

The kernel sends SIGNAL when the thread that started us ends (Linux only; elsewhere the next start stops what was left).
With USER not empty, PROGRAM runs as that user. PostgreSQL refuses to run as root, yet its folder may lie below folders
that only root may enter. So the process keeps one single capability: to pass folders that it may not read. That
changes no permission on disk.
"""

import ctypes
import os
import pwd
import sys

PR_SET_PDEATHSIG, PR_SET_SECUREBITS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 1, 28, 47, 2
SECBIT_NO_SETUID_FIXUP = 4
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2  # containers often grant root only the first, which is the wider one
CAPABILITY_VERSION_3 = 0x20080522


def leave_root(name: str) -> None:
    user = pwd.getpwnam(name)
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if libc is not None:
        # Keeps the capabilities over setuid, and makes access(2) count them: initdb looks for its binaries with it.
        libc.prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0)
    os.setgroups([])
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
    if libc is None:
        return
    for capability in (CAP_DAC_READ_SEARCH, CAP_DAC_OVERRIDE):
        bit = 1 << capability
        header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
        sets = (ctypes.c_uint32 * 6)(bit, bit, bit, 0, 0, 0)  # effective, permitted, inheritable; then the high words
        if libc.capset(header, sets) == 0 and libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0) == 0:
            return
    # Without it all still works where the folders above are open to everybody. Never go on with more than that.
    libc.capset((ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)())


def main() -> None:
    parent, signal_number, user, *command = sys.argv[1:]
    if user:
        leave_root(user)
    if sys.platform == "linux":  # after the change of user, which clears it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0)
        if os.getppid() != int(parent):
            sys.exit("the parent has gone")
    os.execv(command[0], command)  # noqa: S606 - the whole purpose


if __name__ == "__main__":
    main()
