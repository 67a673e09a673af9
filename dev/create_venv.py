"""Say clearly what this machine lacks, then make the virtual environment. Runs on any Python 3, also one that is too old.

python3 dev/create_venv.py .venv
"""

import importlib.util
import platform
import shutil
import subprocess
import sys


def problem() -> "str | None":
    """The first thing that is missing, as a sentence, or None."""
    if sys.version_info < (3, 11):  # noqa: UP036 - the very case this file is for
        return "Python 3.11 or newer is needed; %s is %s. Name another: make PYTHON=python3.12 ..." % (  # noqa: UP031
            sys.executable,
            platform.python_version(),
        )
    system, machine = platform.system(), platform.machine().lower()
    supported = {"Linux": ("x86_64", "amd64", "aarch64", "arm64"), "Darwin": ("x86_64", "arm64")}
    if machine not in supported.get(system, ()):
        return "This runs on Linux (x86-64, arm64) and macOS; this machine is {} {}.".format(system, machine)  # noqa: UP032
    if system == "Linux" and platform.libc_ver()[0] != "glibc":
        return "The PostgreSQL package needs glibc; this Linux has another C library (Alpine has musl)."
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        return "Python's venv module is missing. Debian and Ubuntu have it as a package: apt install python3-venv"
    return None


def create(folder: str) -> int:
    """Make the environment anew. What venv says is shown only if it fails: after Ctrl-C it would be a traceback."""
    shutil.rmtree(folder, ignore_errors=True)
    print("Creating %s (some 10 s) ..." % folder, flush=True)  # noqa: UP031 - see above
    venv = subprocess.Popen([sys.executable, "-m", "venv", folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        said, _ = venv.communicate()
    except KeyboardInterrupt:
        venv.communicate()
        return 130
    if venv.returncode:
        sys.stderr.write(said.decode("utf-8", "replace"))
    return venv.returncode


if __name__ == "__main__":
    sys.exit(problem() or create(sys.argv[1]))
