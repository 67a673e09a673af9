"""Rules of the house that no linter holds. Who may import whom in the app is held by import contracts (pyproject.toml)."""

import ast
import io
import re
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from app import errors
from app.config import Settings
from benchmarks.groups import GROUPS
from dev.commit_subject import problems
from dev.run import ROOT

TESTS = sorted((ROOT / "tests").rglob("*.py"))
OURS = ("app", "dev", "tests", "benchmarks", "examples", "migrations")


def imports(file: Path) -> Iterator[str]:
    """What a file imports of ours, as dotted names."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            continue
        yield from (name for name in found if name.partition(".")[0] in OURS)


@pytest.mark.parametrize("file", TESTS, ids=lambda file: str(file.relative_to(ROOT / "tests")))
def test_no_test_is_imported_and_no_private_name(file: Path) -> None:
    """What tests share is in tests/support."""
    wrong = [
        name
        for name in imports(file)
        if any(part.startswith(("_", "test_")) and part != "__version__" for part in name.split("."))
    ]
    assert not wrong


def test_sql_has_names_and_no_numbers() -> None:
    """Two swapped `$n` of one type would pass unseen."""
    files = [file for file in (ROOT / "app").rglob("*.py") if file.name != "statements.py"]
    numbered = [str(file) for file in files if re.search(r"\$[0-9]", file.read_text(encoding="utf-8"))]
    assert not numbered


def test_small_rules_have_one_home() -> None:
    """A second copy would be forgotten when the first one changes."""
    files = {
        str(file.relative_to(ROOT)): file.read_text(encoding="utf-8")
        for folder in ("app", "migrations")
        for file in (ROOT / folder).rglob("*.py")
        if "versions" not in file.parts
    }
    homes = {
        r"pg_(try_)?advisory": {"app/stores/locks.py"},
        r"IN \('scheduling', 'running'\)": {"app/models.py"},
        r"['\"](machine|session|pools):": {"app/scheduling/lanes.py"},
        r"WITH RECURSIVE \w+ AS \(": {"app/scheduling/rounds.py"},  # it hops along two columns; the others: loose_scan
        r"import hvac": {"app/stores/vault.py"},
    }
    for rule, home in homes.items():
        assert {name for name, text in files.items() if re.search(rule, text)} == home, rule


def test_http_writes_no_sql() -> None:
    """Each statement lives with its subject, below HTTP."""
    for file in (ROOT / "app/api").rglob("*.py"):
        assert "app.stores.statements" not in file.read_text(encoding="utf-8"), file


def test_every_module_stands_on_a_layer() -> None:
    """A module that no layer names could import anything, and anything could import it."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = pyproject["tool"]["importlinter"]["contracts"][0]["layers"]
    named = {name.strip() for layer in layers for name in layer.replace("|", ":").split(":")}
    files = [file.relative_to(ROOT).with_suffix("") for file in (ROOT / "app").rglob("*.py")]
    modules = [file.parts for file in files if file.name != "__init__"]
    homeless = [
        ".".join(parts) for parts in modules if not any(".".join(parts[:n]) in named for n in range(len(parts) + 1))
    ]
    assert homeless == []
    assert [
        name for name in named if not (ROOT / name.replace(".", "/")).exists() and tuple(name.split(".")) not in modules
    ] == []


def test_the_top_of_the_app_has_few_files() -> None:
    """A newcomer reads the top first: a thirteenth file belongs into a folder."""
    assert len(list((ROOT / "app").glob("*.py"))) <= 12


def test_a_long_file_says_why_it_is_one() -> None:
    """One idea a file; above 420 lines its docstring says why it is not two (`One file: ...`)."""
    for file in (ROOT / "app").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        docstring = ast.get_docstring(ast.parse(text)) or ""
        assert text.count("\n") <= 420 or "One file: " in docstring, file


def test_the_stopwatch_says_what_each_of_its_groups_asks() -> None:
    table = (
        (ROOT / "benchmarks/README.md")
        .read_text(encoding="utf-8")
        .partition("| group | asks |")[2]
        .partition("\n\n")[0]
    )
    told = [name for row in table.splitlines()[2:] for name in re.findall(r"`([a-z]+)`", row.split("|")[1])]
    assert sorted(told) == sorted(GROUPS)


# --- plain English ----------------------------------------------------------------------------------------------------

RIDDLES = re.compile(
    r"(?i)\b(whoever|whose|whom|nobody|somebody|patience|so many|so long)\b|(?:^|\. )(Of|What is|What was) "
)


def _sentences() -> list[tuple[str, str]]:
    """Every sentence that an operator or a caller reads in a setting or an error, with where it is from."""
    texts = [(name, field.description or "") for name, field in Settings.model_fields.items()]
    texts += [(kind.__name__, kind.detail) for kind in _below(errors.Refusal)]
    return [(name, part) for name, text in texts for part in re.split(r"(?<=[.;:])\s+", text) if part]


def _prose(page: Path) -> list[str]:
    """The sentences of a page, without its headings, tables, code and comments. A list's entries are sentences of their own."""
    text = re.sub(
        r"(?ms)^ *```.*?^ *```$|<!--.*?-->|^ {4}.*?$|^#.*?$|^ *\|.*?$", "\n", page.read_text(encoding="utf-8")
    )
    text = re.sub(r"(?m)^ *(?:[-*]|\d+\.) ", "\n\n", text)
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return [part for block in blocks for part in re.split(r"(?<=[.;:!?])[*)\"]*\s+", block) if part]


def _below(kind: type[errors.Refusal]) -> list[type[errors.Refusal]]:
    return [kind, *(found for one in kind.__subclasses__() for found in _below(one))]


def test_settings_and_errors_are_plain_english() -> None:
    assert len(_sentences()) > 150
    assert [found for found in _sentences() if len(found[1].split()) > 35] == []
    assert [found for found in _sentences() if RIDDLES.search(found[1])] == []


PAGES = sorted(
    page.relative_to(ROOT)
    for pattern in ("*.md", "docs/*.md", "deploy/*/*.md", "benchmarks/*.md")
    for page in ROOT.glob(pattern)
    if page.name != "CHANGELOG.md"
)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_pages_are_plain_english(page: Path) -> None:
    sentences = _prose(ROOT / page)
    assert sentences
    assert [sentence for sentence in sentences if len(sentence.split()) > 35] == []
    assert [sentence for sentence in sentences if RIDDLES.search(sentence)] == []


# Rooms of the app that only experts could read. Add a file once its docstrings and comments are plain.
PLAIN = (
    "api/client_address.py",
    "api/edge.py",
    "api/request_quotas.py",
    "api/server.py",
    "api/validation.py",
    "limits/fair_queue.py",
    "limits/memory_budget.py",
    "limits/quotas.py",
    "runs/carried.py",
    "runs/deleting.py",
    "runs/end_event.py",
    "runs/quotas.py",
    "runs/retry_rules.py",
    "runs/retry_statements.py",
    "scheduling/lanes.py",
    "scheduling/placement.py",
    "scheduling/rounds.py",
    "stores/cursors.py",
    "stores/documents.py",
    "stores/locks.py",
    "stores/pool.py",
    "stores/secrets.py",
    "stores/single_flight.py",
    "stores/together.py",
    "stores/wakeups.py",
    "webhooks/delivery.py",
    "webhooks/queue.py",
)


def _remarks(file: Path) -> list[str]:
    """The docstrings and the comments of a file; comments of adjacent lines are one."""
    text = file.read_text(encoding="utf-8")
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    remarks = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            line, comment = token.start[0], token.string.lstrip("# ")
            if token.line.lstrip().startswith("#") and line == last + 1:
                remarks[-1] += f" {comment}"
            else:
                remarks.append(comment)
            last = line
    return remarks


@pytest.mark.parametrize("name", PLAIN)
def test_docstrings_and_comments_are_plain_english(name: str) -> None:
    remarks = _remarks(ROOT / "app" / name)
    assert remarks
    assert [remark for remark in remarks if RIDDLES.search(" ".join(remark.split()))] == []


def test_every_docstring_begins_with_a_sentence() -> None:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in (ROOT / "app").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, kinds) and (docstring := ast.get_docstring(node)):
                assert re.search(r"[.:]\W*$", docstring.partition("\n\n")[0]), (file, docstring)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_pages_name_files_that_exist(page: str) -> None:
    named = re.findall(r"`([a-z_]+(?:/[a-z_]+)*(?:\.py|/))`", (ROOT / page).read_text(encoding="utf-8"))
    assert len(named) > 20
    assert [name for name in named if not ((ROOT / name).exists() or (ROOT / "app" / name).exists())] == []


# --- commits ----------------------------------------------------------------------------------------------------------


def test_the_subject_of_a_commit_is_short_and_an_order() -> None:
    """.pre-commit-config.yaml checks each new commit with this."""
    for good in (
        "Add a field",
        "Pass the key on\n\nBecause of this.",
        "Re-read the run",
        "Merge branch 'main' into other",
    ):
        assert problems(good) == []
    for bad in (
        "",
        "Added a field",
        "Adds a field",
        "Adding a field",
        "fix: add a field",
        "add a field",
        "Add a field.",
        "Add a field\nbecause of this",
        f"Add {'x' * 69}",
    ):
        assert problems(bad), bad
