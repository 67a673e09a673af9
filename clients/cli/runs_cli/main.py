"""The command line. Exit status: 0 done, 1 refused, 2 wrong usage, 3 the run that was waited for failed, 4 timed out."""

import getpass
import sys
import time
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn

from runs_cli import __version__, inputs, profiles, runs, show
from runs_cli.api import Api, ApiError, Json
from runs_cli.inputs import UsageError
from runs_cli.runs import TimedOutError

REFUSED, USAGE, FAILED, TIMED_OUT = 1, 2, 3, 4
FOREVER = 365 * 86_400.0

# The command `list` takes this name from the built-in type in this module.
Rows = list[Any]
Texts = list[str] | None

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    help="The runs API from the terminal. Start with: [bold]runs login[/bold], [bold]runs list[/bold].",
    epilog="Exit status: 0 done, 1 refused, 2 wrong usage, 3 the run that was waited for failed, 4 timed out.",
)
bulk = typer.Typer(no_args_is_help=True, help="Bulk retries: list, show, pause, resume, abort.")
app.add_typer(bulk, name="bulk")


class Format(StrEnum):
    """How a list is printed."""

    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"


class _State:
    profile: str | None = None


_state = _State()

RunId = Annotated[str, typer.Argument(metavar="RUN_ID", show_default=False)]
Output = Annotated[Format, typer.Option("--output", "-o", help="For people, or for programs.")]
Status = Annotated[str | None, typer.Option(help="Only runs in this status.")]
WorkflowName = Annotated[str | None, typer.Option("--workflow", help="Only runs of this workflow: its id or its name.")]
Since = Annotated[str | None, typer.Option(help="Changed at or after: a time, or how long ago (30m, 24h, 7d).")]
Limit = Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")]
Reason = Annotated[str | None, typer.Option(help="Why; kept with the attempt, at most 500 characters.")]
Timeout = Annotated[float, typer.Option(min=1, help="Wait at most this many seconds.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"runs-cli {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    profile: Annotated[str | None, typer.Option(help="The profile of `runs login` to use.")] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    _state.profile = profile


def _api() -> Api:
    found = profiles.find(_state.profile)
    return Api(found.url, found.key)


# --- looking ----------------------------------------------------------------------------------------------------------


@app.command(epilog="runs list --status error --since 24h")
def list(  # noqa: A001 - the command's name
    status: Status = None,
    since: Since = None,
    search: Annotated[
        str | None, typer.Option(help="Text in inputs, outputs, errors or aliases; or the start of an id.")
    ] = None,
    workflow: WorkflowName = None,
    limit: Limit = 50,
    output: Output = Format.TABLE,
) -> None:
    """List runs, the last changed first."""
    api = _api()
    found = api.pages(
        "/v1/runs",
        limit,
        status=status,
        search=search,
        workflow_id=runs.workflow_id(api, workflow),
        changed_from=inputs.moment(since, "--since") if since else None,
        order=None if search else "changed",
        fields=runs.SHORT,
    )
    if output is Format.JSONL:
        for run in found:
            show.as_json(run, indent=None)
        return
    items = [*found]
    if output is Format.JSON:
        show.as_json(items)
        return
    names = runs.workflow_names(api) if items else {}
    show.out.print(_table(items, names))


def _table(items: Rows, names: dict[str, str]) -> Any:
    columns = ("ID", "STATUS", "ATTEMPT", "CHANGED", "WORKFLOW", "WHY")
    return show.table(
        columns,
        (
            (
                run["id"],
                show.word(run["status"]),
                run["attempt"],
                show.age(run["changed_at"]),
                names.get(run["workflow_id"], run["workflow_id"]),
                run["scheduling_reason"] or show.first_line(run["error"]),
            )
            for run in items
        ),
    )


@app.command(epilog="runs get RUN_ID -o json")
def get(run_id: RunId, output: Output = Format.TABLE) -> None:
    """Show one run."""
    run = runs.get(_api(), run_id)
    if output is not Format.TABLE:
        show.as_json(run, indent=2 if output is Format.JSON else None)
        return
    rows: Rows = [
        ("id", run["id"]),
        ("status", show.word(run["status"])),
        ("attempt", run["attempt"]),
        ("workflow", run["workflow_id"]),
        ("machine", run["assigned_machine_id"] or run["machine_id"] or ""),
        ("waits for", run["scheduling_reason"] or ""),
        ("created", show.local(run["created_at"])),
        ("started", show.local(run["started_at"])),
        ("ended", show.local(run["ended_at"])),
        ("inputs", run["input_values"] or {}),
        ("secrets", ", ".join(run["sensitive_input_aliases"] or {})),
        ("output", run["output_data"] or ""),
    ]
    rows += [("error", line) for line in run["error"] or []]
    show.out.print(show.table(("", ""), [row for row in rows if row[1] not in ("", {})]))


@app.command(epilog="runs attempts RUN_ID")
def attempts(run_id: RunId, output: Output = Format.TABLE) -> None:
    """Show the earlier attempts of a run: who retried them, when, why, and what was changed."""
    items = _api().get(runs.run_path(run_id, "/attempts"), limit=100)["items"]
    _show(
        items,
        output,
        ("ATTEMPT", "STATUS", "RETRIED", "REASON", "CHANGED", "ERROR"),
        lambda one: (
            one["attempt"],
            show.word(one["status"]),
            show.local(one["retried_at"]),
            one["reason"] or "",
            ", ".join(one["overridden"]),
            show.first_line(one["error"]),
        ),
    )


@app.command(epilog="runs events RUN_ID -o jsonl")
def events(run_id: RunId, output: Output = Format.TABLE) -> None:
    """Show what happened to a run, oldest first."""
    items = _api().get(runs.run_path(run_id, "/events"), limit=1000)["items"]
    _show(
        items,
        output,
        ("AT", "EVENT", "ATTEMPT", "STATUS", "REASON"),
        lambda one: (
            show.local(one["at"]),
            one["event"],
            one["attempt"],
            show.word(one["to_status"] or ""),
            one["reason"] or "",
        ),
    )


@app.command(epilog="runs queue")
def queue(output: Output = Format.TABLE) -> None:
    """Show what waits for a machine, the longest wait first."""
    items = _api().get("/v1/queue")["items"]
    _show(
        items,
        output,
        ("WAITING", "SINCE", "REASON", "FIRST RUN", "WANTS"),
        lambda one: (
            one["waiting"],
            show.age(one["oldest_queued_at"]),
            one["reason"] or "",
            one["head_run_id"],
            _wants(one["wants"]),
        ),
    )


def _wants(wants: Json) -> str:
    if wants.get("session_id"):
        return f"session {wants['session_id']}"
    if wants.get("machine_id"):
        return f"machine {wants['machine_id']}"
    return f"pools {', '.join(wants['pool_ids'])}" if wants.get("pool_ids") else "any machine"


@app.command(epilog="runs machines")
def machines(output: Output = Format.TABLE) -> None:
    """List machines and when they were heard of last."""
    items = [*_api().pages("/v1/machines", 1000)]
    _show(
        items,
        output,
        ("ID", "NAME", "STATUS", "AVAILABLE", "LAST SEEN", "RESERVED FOR"),
        lambda one: (
            one["id"],
            one["name"] or one["hostname"] or "",
            show.word(one["status"]),
            "yes" if one["is_available"] else "no",
            show.age(one["last_seen"]),
            one["reserved_session_id"] or "",
        ),
    )


def _show(items: Any, output: Format, columns: tuple[str, ...], row: Any) -> None:
    if output is Format.JSON:
        show.as_json(items)
    elif output is Format.JSONL:
        for item in items:
            show.as_json(item, indent=None)
    else:
        show.out.print(show.table(columns, map(row, items)))


@app.command(epilog="runs watch          # the last changed runs\n\nruns watch RUN_ID   # one run, until it ends")
def watch(
    run_id: Annotated[str | None, typer.Argument(metavar="RUN_ID", show_default=False)] = None,
    limit: Limit = 15,
    timeout: Timeout = FOREVER,
) -> None:
    """Watch one run until it ends, or the last changed runs until Ctrl-C."""
    api = _api()
    try:
        if run_id is not None:
            _exit_with(runs.wait(api, run_id, timeout, _say))
        _watch_all(api, limit, timeout)
    except KeyboardInterrupt:
        raise typer.Exit from None


def _watch_all(api: Api, limit: int, timeout: float) -> None:
    names = runs.workflow_names(api)
    deadline = time.monotonic() + timeout
    with Live(console=show.out, auto_refresh=False, screen=show.out.is_terminal) as live:
        while time.monotonic() < deadline:
            items = [*api.pages("/v1/runs", limit, order="changed", fields=runs.SHORT)]
            live.update(_table(items, names), refresh=True)
            time.sleep(2 * runs.POLL_SECONDS)


def _say(run: Json) -> None:
    why = run["scheduling_reason"] or show.first_line(run["error"])
    show.err.print(show.word(run["status"]), f"attempt {run['attempt']}", show.clean(why or ""), markup=False)


def _exit_with(run: Json) -> None:
    raise typer.Exit(FAILED if run["status"] in runs.FAILED else 0)


# --- changing ---------------------------------------------------------------------------------------------------------


@app.command(epilog='runs cancel RUN_ID --reason "wrong invoice"')
def cancel(run_id: RunId, reason: Reason = None) -> None:
    """Cancel a run that waits or is running."""
    body = {"status": "cancelled"} | ({"reason": reason} if reason else {})
    run = _api().send("PATCH", runs.run_path(run_id), body)
    show.err.print(show.word(run["status"]), run["id"])


@app.command(
    epilog="runs retry RUN_ID --dry-run\n\n"
    'runs retry RUN_ID --secret password --reason "The password was wrong." --wait\n\n'
    "runs retry RUN_ID --set amount=12.50 --file invoice.pdf:C:\\in\\invoice.pdf"
)
def retry(
    run_id: RunId,
    change: Annotated[
        Texts, typer.Option("--set", metavar="NAME=TEXT", help="Change one input value, keep the others; NAME:=JSON.")
    ] = None,
    values: Annotated[str | None, typer.Option(metavar="JSON|@FILE", help="Replace all input values.")] = None,
    secret: Annotated[
        Texts,
        typer.Option(
            metavar="NAME[=@FILE|=-]", help="A secret: asked for without echo, from a file, or from standard input."
        ),
    ] = None,
    drop_secrets: Annotated[bool, typer.Option(help="Remove the run's secrets that are not given.")] = False,
    file: Annotated[
        Texts, typer.Option(metavar="PATH[:TARGET]", help="Replace all input files; may be repeated.")
    ] = None,
    machine: Annotated[str | None, typer.Option(help="Pin this machine.")] = None,
    pool: Annotated[Texts, typer.Option(help="The machine must be in this pool; may be repeated.")] = None,
    not_before: Annotated[str | None, typer.Option(metavar="TIME", help="Start no earlier than this.")] = None,
    reason: Reason = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen, and change nothing.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end of the attempt.")] = False,
    timeout: Timeout = 3600,
) -> None:
    """Retry an ended run in place. What is not given is kept."""
    api = _api()
    run = runs.get(api, run_id)
    body: Json = {"expected_attempt": run["attempt"]}
    if not_before is not None:
        if not api.knows("RunRetry", "not_before"):
            raise ApiError("This server does not know not_before yet. Nothing was changed.", code="not_supported")
        body["not_before"] = inputs.time(not_before, "--not-before")
    if (new_values := inputs.values(change or [], values, run["input_values"])) is not None:
        body["input_values"] = new_values
    if secret or drop_secrets:
        body["sensitive_input_values"] = given = inputs.secrets(secret or [])
        if not drop_secrets and (lost := runs.lost_secrets(run, given)):
            raise UsageError(
                f"A retry replaces all secrets, and this run also has: {', '.join(map(show.clean, lost))}. Give them, too, "
                "or remove them with --drop-secrets."
            )
    if file:
        body["file_inputs"] = inputs.files(file)
    body |= {"machine_id": machine} if machine else {}
    body |= {"pool_ids": pool} if pool else {}
    body |= {"reason": reason} if reason else {}
    if dry_run:
        _print_forecast(api.send("POST", runs.run_path(run_id, "/retry"), body, dry_run="true"))
        return
    retried = api.send("POST", runs.run_path(run_id, "/retry"), body)
    _say(retried)
    if wait:
        _exit_with(runs.wait(api, run_id, timeout, _say))


def _print_forecast(forecast: Json) -> None:
    place = forecast["placement"]
    if forecast["would_retry"]:
        show.out.print(f"It can be retried, as attempt {forecast['attempt']}.", style="green")
    for refusal in forecast["refusals"]:
        show.out.print(f"{refusal['code']}: {show.clean(refusal['detail'])}", style="red", markup=False)
    rows: Rows = [
        ("replaces", ", ".join(forecast["replaced"])),
        ("keeps", ", ".join(forecast["kept"])),
        ("secrets", ", ".join(forecast["secrets"]["names"])),
        ("machines that could start it now", place["eligible_machines"]),
        ("it would then", place["expected_reason"]),
    ]
    show.out.print(show.table(("", ""), [row for row in rows if row[1] != ""]))
    if not forecast["would_retry"]:
        raise typer.Exit(REFUSED)


@app.command(
    "retry-all",
    epilog="runs retry-all --since 24h --dry-run\n\n"
    'runs retry-all --since 24h --first 5 --stop-after-failures 10 --reason "ERP was down"\n\n'
    "runs list --status error -o jsonl | jq -r .id | runs retry-all - --yes",
)
def retry_all(
    run_ids: Annotated[Texts, typer.Argument(metavar="[RUN_ID ...|-]", show_default=False)] = None,
    status: Annotated[Texts, typer.Option(help="Runs in this status; may be repeated. Default: error.")] = None,
    since: Since = None,
    until: Annotated[str | None, typer.Option(help="Changed at or before: a time, or how long ago.")] = None,
    workflow: WorkflowName = None,
    of_machine: Annotated[str | None, typer.Option(help="Runs of this machine.")] = None,
    machine: Annotated[str | None, typer.Option(help="Pin this machine for all of them.")] = None,
    pool: Annotated[Texts, typer.Option(help="Their machines must be in this pool; may be repeated.")] = None,
    values: Annotated[
        str | None, typer.Option(metavar="JSON|@FILE", help="Replace the input values of all of them.")
    ] = None,
    first: Annotated[
        int, typer.Option(min=0, help="Retry so many first, the rest only when all of these have succeeded.")
    ] = 0,
    stop_after_failures: Annotated[int, typer.Option(min=0, help="Pause after so many failures.")] = 0,
    pace: Annotated[float | None, typer.Option(min=0.1, max=1000, help="At most so many retries a second.")] = None,
    reason: Reason = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say in sum what would happen, and change nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    detach: Annotated[bool, typer.Option(help="Start it and return.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the retried runs have ended, too.")] = False,
    timeout: Timeout = 86_400,
) -> None:
    """Retry many runs: those given, or those that match. Shows what would happen and asks first. Ctrl-C pauses."""
    api = _api()
    body: Json = {"first": first, "stop_after_failures": stop_after_failures}
    if run_ids == ["-"]:
        run_ids = sys.stdin.read().split()
    if run_ids:
        body["run_ids"] = run_ids
    else:
        chosen = {
            "status": status or None,
            "workflow_id": runs.workflow_id(api, workflow),
            "machine_id": of_machine,
            "changed_from": inputs.moment(since, "--since") if since else None,
            "changed_to": inputs.moment(until, "--until") if until else None,
        }
        body["filter"] = {name: value for name, value in chosen.items() if value is not None}
        if not body["filter"].keys() - {"status"}:
            raise UsageError("Say which runs: ids, or at least one of --since, --until, --workflow, --of-machine.")
    overrides = {
        "machine_id": machine,
        "pool_ids": pool or None,
        "input_values": inputs.values([], values, None),
    }
    body["overrides"] = {name: value for name, value in overrides.items() if value is not None}
    body |= {"pace_per_second": pace} if pace else {}
    body |= {"reason": reason} if reason else {}
    forecast = api.send("POST", "/v1/bulk-retries", body, dry_run="true")
    _print_sum(forecast)
    if dry_run:
        return
    if forecast["would_retry"] == 0:
        raise typer.Exit(REFUSED)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("This is no terminal to ask on. Say --yes to start.")
        typer.confirm(f"Retry {forecast['would_retry']} runs?", abort=True)
    job = api.send("POST", "/v1/bulk-retries", body)
    show.err.print(f"Bulk retry {job['id']}")
    if detach:
        print(job["id"])
        return
    _follow(api, job, outcomes=wait, timeout=timeout)


def _print_sum(forecast: Json) -> None:
    show.out.print(f"{forecast['would_retry']} of {forecast['total']} can be retried.")
    for code, count in sorted(forecast["refusals"].items()):
        show.out.print(f"  {count} cannot: {show.clean(code)}", markup=False)
    for code, count in sorted(forecast["will_wait"].items()):
        show.out.print(f"  {count} will wait: {show.clean(code)}", markup=False)


def _follow(api: Api, job: Json, *, outcomes: bool, timeout: float) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, console=show.err) as progress:
        bar = progress.add_task("retrying", total=job["total"])

        def changed(now: Json) -> None:
            text = f"{now['retried']} retried, {now['skipped']} skipped, {now['succeeded']} ok, {now['failed']} failed"
            progress.update(bar, completed=now["retried"] + now["skipped"], description=text)

        try:
            job = runs.bulk_wait(api, job, changed, outcomes=outcomes, seconds=timeout)
        except KeyboardInterrupt:
            progress.stop()
            api.send("POST", f"/v1/bulk-retries/{job['id']}/pause")
            show.err.print(f"Paused. Go on with: runs bulk resume {job['id']}")
            raise typer.Exit(TIMED_OUT) from None
    _print_job(job)
    if job["state"] in {"failed", "aborted"}:
        raise typer.Exit(REFUSED)
    if job["state"] == "paused" or (outcomes and job["failed"] + job["cancelled"]):
        raise typer.Exit(FAILED)


def _print_job(job: Json) -> None:
    rows: Rows = [
        ("id", job["id"]),
        ("state", job["state"]),
        ("why", job["pause_reason"] or job.get("failure") or job["waiting_for"] or ""),
        ("runs", job["total"]),
        ("retried", job["retried"]),
        ("skipped", job["skipped"]),
        ("succeeded", job["succeeded"]),
        ("failed", job["failed"]),
        ("cancelled", job["cancelled"]),
        ("created", show.local(job["created_at"])),
        ("reason", job["reason"] or ""),
    ]
    show.out.print(show.table(("", ""), [row for row in rows if row[1] != ""]))


JobId = Annotated[str, typer.Argument(metavar="BULK_RETRY_ID", show_default=False)]


def _job_path(job_id: str, tail: str = "") -> str:
    if not runs.is_id(job_id):
        raise UsageError(f"A bulk retry is named by its id, and {job_id!r} is none. `runs bulk ls` shows ids.")
    return f"/v1/bulk-retries/{job_id}{tail}"


@bulk.command("ls", epilog="runs bulk ls")
def bulk_list(limit: Limit = 20, output: Output = Format.TABLE) -> None:
    """List bulk retries, newest first."""
    items = _api().get("/v1/bulk-retries", limit=limit)["items"]
    _show(
        items,
        output,
        ("ID", "STATE", "RUNS", "RETRIED", "SKIPPED", "OK", "FAILED", "CREATED", "REASON"),
        lambda job: (
            job["id"],
            job["state"],
            job["total"],
            job["retried"],
            job["skipped"],
            job["succeeded"],
            job["failed"],
            show.age(job["created_at"]),
            job["reason"] or "",
        ),
    )


@bulk.command("show", epilog="runs bulk show BULK_RETRY_ID")
def bulk_show(
    job_id: JobId,
    skipped: Annotated[bool, typer.Option("--skipped", help="List the runs that were skipped, and why.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Show one bulk retry."""
    api = _api()
    if skipped:
        items = [*api.pages(_job_path(job_id, "/items"), 10_000, outcome="skipped")]
        _show(items, output, ("RUN", "CODE"), lambda one: (one["run_id"], one["code"] or ""))
        return
    job = api.get(_job_path(job_id))
    if output is Format.TABLE:
        _print_job(job)
    else:
        show.as_json(job, indent=2 if output is Format.JSON else None)


def _command(job_id: str, what: str) -> None:
    _print_job(_api().send("POST", _job_path(job_id, f"/{what}")))


@bulk.command("pause", epilog="runs bulk pause BULK_RETRY_ID")
def bulk_pause(job_id: JobId) -> None:
    """Retry no more of its runs until it is resumed."""
    _command(job_id, "pause")


@bulk.command("resume", epilog="runs bulk resume BULK_RETRY_ID")
def bulk_resume(job_id: JobId) -> None:
    """Go on with a paused one."""
    _command(job_id, "resume")


@bulk.command("abort", epilog="runs bulk abort BULK_RETRY_ID")
def bulk_abort(job_id: JobId) -> None:
    """End it: what was not retried yet is skipped, and nothing is undone."""
    _command(job_id, "abort")


# --- who and where ----------------------------------------------------------------------------------------------------


@app.command(epilog="runs login --url https://runs.example.com\n\nruns --profile staging login --url ... < key.txt")
def login(url: Annotated[str, typer.Option(help="Address of the service.")]) -> None:
    """Store an address and an API key. The key is asked for without echo, or read from standard input."""
    key = getpass.getpass("API key: ") if sys.stdin.isatty() else sys.stdin.readline()
    profile = profiles.Profile(url.rstrip("/"), key.strip())
    if not profile.key:
        raise UsageError("The API key is empty.")
    me = Api(profile.url, profile.key).get("/v1/whoami")
    path = profiles.store(_state.profile, profile)
    show.err.print(
        f"Logged in to {profile.url} for {show.clean(me['organization_id'])}. Stored in {path}.", markup=False
    )


@app.command(epilog="runs mcp                 # for an agent on this machine, over standard input and output")
def mcp(
    allow_writes: Annotated[bool, typer.Option(help="Offer the tools that retry, too.")] = False,
    http: Annotated[
        bool, typer.Option(help="Serve streamable HTTP on 127.0.0.1 instead of standard input and output.")
    ] = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="With --http: the port.")] = 8765,
    secrets_folder: Annotated[
        str | None, typer.Option(help="A folder of files from which a retry may take secrets, by file name.")
    ] = None,
) -> None:
    """A server for agents (Model Context Protocol). Read-only unless told otherwise."""
    try:
        from runs_cli.mcp_server import serve
    except ModuleNotFoundError:
        raise UsageError("`runs mcp` needs the extra: pipx install 'runs-cli[mcp]'.") from None
    serve(_api(), allow_writes=allow_writes, secrets_folder=secrets_folder, port=port if http else None)


def main() -> None:
    """Run a command; every failure is one sentence and an exit status."""
    try:
        app()
    except UsageError as problem:
        _fail(problem, USAGE)
    except profiles.NotLoggedInError as problem:
        _fail(problem, USAGE)
    except ApiError as problem:
        _fail(f"{problem.code}: {problem}", REFUSED)
    except TimedOutError as problem:
        _fail(problem, TIMED_OUT)


def _fail(problem: object, status: int) -> None:
    show.err.print(show.clean(problem), style="red", markup=False)
    sys.exit(status)


if __name__ == "__main__":
    main()
