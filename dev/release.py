"""`make release`: wheel, sdist, software bill of materials (CycloneDX) and checksums of the last commit, in dist/.

The tools have an environment of their own below .cache/, from requirements-release.lock. The bill lists what the image has:
requirements.lock with the hashes of its files. Raises CalledProcessError if a tool fails.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import app

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
TOOLS = ROOT / ".cache" / "release"
LOCK = ROOT / "requirements-release.lock"


def main() -> None:
    if changed := _git("status", "--porcelain"):
        sys.exit(f"A release is made of a commit, and these files are not committed:\n{changed}")
    python = _tools()
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        (source / "app" / "COMMIT").write_text(_git("rev-parse", "--short=12", "HEAD"), encoding="ascii")
        _run(python, "-m", "build", "--no-isolation", "--outdir", str(DIST), folder)
        bill = DIST / f"runs-api-{app.__version__}.cdx.json"
        lock = source / "requirements.lock"
        _run(
            python,
            "-m",
            "cyclonedx_py",
            "requirements",
            str(lock),
            "--output-format",
            "JSON",
            "--output-file",
            str(bill),
        )
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in sorted(DIST.iterdir())]
    (DIST / "SHA256SUMS").write_text("\n".join(sums) + "\n", encoding="ascii")
    print("\n".join(sums))


def _tools() -> str:
    """The interpreter of the environment with the tools; made anew when the locked list has changed."""
    stamp = TOOLS / "installed"
    python = TOOLS / "bin" / "python"
    wanted = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    if not stamp.exists() or stamp.read_text(encoding="ascii") != wanted:
        venv.create(TOOLS, clear=True, with_pip=True)
        _run(str(python), str(ROOT / "dev" / "install.py"), str(LOCK))
        stamp.write_text(wanted, encoding="ascii")
    return str(python)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _run(*command: str) -> None:
    subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
