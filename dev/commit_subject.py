"""`python3 dev/commit_subject.py FILE` checks the subject of a commit message; `pre-commit install` runs it for each commit.

The subject is an order to the code ("Move", "Count"), at most 72 characters long; the reason goes into the body.
"""

import re
import sys
from pathlib import Path

LONGEST = 72

# Words that look like another form of a verb and are none.
_IMPERATIVES = frozenset(
    [
        *("Access", "Address", "Bring", "Bypass", "Discuss", "Embed", "Exceed", "Express", "Feed", "Focus", "Guess"),
        *("Need", "Pass", "Press", "Process", "Proceed", "Seed", "Speed", "Stress", "Succeed", "Suppress"),
    ]
)
# git's own subjects.
_GENERATED = re.compile(r"(Merge|Revert|fixup!|squash!|amend!) ")


def problems(message: str) -> list[str]:
    """What is wrong with the subject of this message; empty: nothing."""
    lines = [line for line in message.splitlines() if not line.startswith("#")]
    subject = next((line for line in lines if line.strip()), "")
    if _GENERATED.match(subject):
        return []
    first, found = subject.partition(" ")[0], []
    if len(subject) > LONGEST:
        found.append(f"It has {len(subject)} characters; {LONGEST} are allowed. Put the reason into the body.")
    if not re.fullmatch(r"[A-Z][a-z]+(-[a-z]+)?", first):
        found.append("It must begin with a verb and a capital letter, without a prefix such as `fix:`.")
    elif first not in _IMPERATIVES and re.search(r"(ed|ing|[^aiou]s)$", first):
        found.append(f"It must be an order (`Add`, not `Added`, `Adds` or `Adding`); `{first}` is none.")
    if subject.endswith("."):
        found.append("It must not end with a full stop.")
    rest = message[message.find(subject) + len(subject) :].split("\n")
    if len(rest) > 1 and rest[1].strip() and not rest[1].startswith("#"):
        found.append("An empty line must stand between the subject and the body.")
    return found


def main() -> int:
    found = problems(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for problem in found:
        print(f"The commit's subject: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
