"""The statements of a retry (retry.py): what the rules read of runs, and the switch that archives, clears and requeues them.

Each statement takes its retries as arrays, one place for each retry, and is the same for one retry as for many. A row is looked
up by its key for each place (LATERAL ... OFFSET 0), or by its ctid. A join with the arrays would be dangerous: a plan that was
made while the tables were short would read all of a table.

One file: the arrays of the switch and the rows that fill them have one order.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from app.config import Settings
from app.events import record_events
from app.idempotency import STORED, no_twin
from app.runs import carried, projection, quotas, staging
from app.runs.retry_rules import Next, Retry, overridden
from app.runs.staging import Staged
from app.scheduling import rules
from app.stores import deletions
from app.stores.database import Connection, Record
from app.stores.deletions import Name
from app.stores.statements import Statement, json_bytes, statement

# The length of the values that a run keeps and that may be long: the reply shows them.
_KEPT_OCTETS = " + ".join(
    f"coalesce(octet_length(run.{name}::text), 0)"
    for name in ("sensitive_input_aliases", *(one.name for one in carried.CARRIED if one.is_long))
)

_KEPT = (
    f"deletions WHERE store = '{deletions.SECRETS}' AND name = run.secret_path AND condemned_at IS NULL"
    " AND due_at > clock_timestamp()"
)
_POOL = "pools WHERE pools.id = kept.id AND pools.organization_id = run.organization_id"
_SESSION_MACHINE = (
    "machines WHERE reserved_session_id = coalesce(wanted.session_id, run.session_id)"
    " AND machines.organization_id = run.organization_id"
)

# The columns that the rules need. Outputs and history are not read: no megabyte is loaded only to be cleared.
READ = statement(
    "runs.retry.read",
    f"""
    SELECT wanted.place, run.version, run.attempt, run.status, run.pinned_machine_id, run.pin_is_deleted, run.pool_ids,
           run.is_priority, run.session_id, run.session_alias, run.release_session_after, run.secret_path,
           CASE WHEN run.secret_path IS NOT NULL THEN run.sensitive_input_aliases END AS sensitive_input_aliases,
           run.secret_path IS NOT NULL AND {rules.exists(_KEPT)} AS secret_is_kept,
           inputs.count AS input_count, inputs.expire_at AS inputs_expire_at,
           coalesce(inputs.expire_at <= clock_timestamp(), false) AS input_is_expired,
           coalesce(inputs.expire_at <= wanted.not_before, false) AS input_expires_before,
           cardinality(run.pool_ids) > 0 AND EXISTS (
               SELECT FROM unnest(run.pool_ids) AS kept (id) WHERE NOT {rules.exists(_POOL)}
           ) AS pool_is_deleted,
           (run.pin_is_deleted OR cardinality(run.pool_ids) > 0) AND {rules.exists(_SESSION_MACHINE)} AS session_has_machine,
           run.automatic_retries, run.changed_at, clock_timestamp() AS now, {_KEPT_OCTETS} AS kept_octets
    FROM unnest(:run_ids::uuid[], :organization_ids::text[], :session_ids::uuid[], :not_befores::timestamptz[])
        WITH ORDINALITY AS wanted (run_id, organization_id, session_id, not_before, place),
    LATERAL (
        SELECT xmin::text AS version, * FROM runs  -- xmin changes with every UPDATE of the row
        WHERE id = wanted.run_id AND organization_id = wanted.organization_id OFFSET 0
    ) AS run,
    LATERAL (
        SELECT count(*) AS count, min(expires_at) AS expire_at FROM run_attachments
        WHERE run_id = run.id AND attachment_type = 'input'
    ) AS inputs
    """,
)

# A statement of its own: a statement that waited for a lock sees all other tables as they were when it began to wait.
LOCK_RUN = statement(
    "runs.retry.lock",
    "SELECT secret_path FROM runs WHERE id = :run_id AND organization_id = :organization_id FOR NO KEY UPDATE",
)

# The output files that go with the attempt.
_OUTPUTS = "(attachment_type = 'output' AND attempt IS NULL AND NOT :keeps_outputs::boolean)"

# The arrays of every switch, and their types.
COLUMNS = {
    "run_id": "uuid",
    "organization_id": "text",
    "version": "text",
    "key_id": "uuid",
    "user_id": "uuid",
    "request_id": "text",
    "reason": "text",
    "by": "text",
    "bulk_retry_id": "uuid",
    "overridden": "text",  # a list, as PostgreSQL writes it, like the other lists here: arrays of arrays have one length
    "traceparent": "text",
    "lane": "text",
    "queue_rank": "smallint",
    "not_before": "timestamptz",
    "avoids_last_machine": "bool",
    "pinned_machine_id": "uuid",
    "pool_ids": "text",
    "is_priority": "bool",
    "automatic_retries": "smallint",
    "session_id": "uuid",
    "session_alias": "text",
    "release_session_after": "bool",
    **{one.name: one.type for one in carried.REPLACED},
    "inputs_expire_at": "timestamptz",  # when the kept input files expire
    "key": "text",
    "fingerprint": "bytea",
    "most_bytes": "bigint",
    "waiting_seen": "int",
    "organization_room": "int",
    "key_room": "int",
}

# Those of SWITCH_STAGED besides.
STAGED_COLUMNS = {
    "machine_id": "uuid",  # that it is to be pinned to
    "name_count": "int",  # names in `held`
    "sensitive_input_aliases": "json",
    "secret_path": "text",
    "replaces_inputs": "bool",
    "input_ids": "text",
}


def _switch_statement(
    name: str,
    columns: dict[str, str],
    *,
    first: str = "",
    guard: str = "",
    removed: str = _OUTPUTS,
    requeued: str = "",
    input_ids: str = projection.RUN_COLUMNS["input_attachment_ids"],
    also: Sequence[str] = (),
) -> Statement:
    """The statement that makes retries take effect.

    For each run: archive the attempt, put the removed files on the deletion list, mark the outputs as superseded, clear and
    requeue the run, record the event, make the reply, and store it under the key. A run is left out if it is not in the version
    that the rules saw, if another transaction has locked it, if a twin is under way, or if a guard does not hold.

    With `keeps_outputs` the outputs stay as they are, and output files get the number of the attempt.
    `first` is SQL for the guards, before `seen`. The parts in `also` must read from `seen`.
    """
    arrays = ", ".join(f":{name}s::{kind}[]" for name, kind in columns.items())
    # A statement still sees the rows that it removes, and does not see yet the rows that it inserts.
    after = {
        "output_data": "NULL",
        "run_message_history": "NULL",
        "usage_metadata": "NULL",
        "next_retry_at": "NULL",
        "last_report_at": "NULL",
        "is_reporting": "false",
        "output_attachment_ids": "'[]'::json",
        "input_attachment_ids": input_ids,
    }
    recorded = record_events(
        "seen",
        "'retried'",
        attempt="attempt + 1",
        from_status="status",
        to_status="'scheduling'",
        changed="overridden::text[]",
        by="by",
        bulk_retry_id="bulk_retry_id",
        actor="key_id, user_id, request_id, reason",
    )
    return statement(
        name,
        f"""
    WITH wanted AS (
        SELECT * FROM unnest({arrays}) WITH ORDINALITY AS wanted ({", ".join(columns)}, place)
    ), {first} seen AS MATERIALIZED (
        SELECT wanted.*, run.* FROM wanted, LATERAL (
            SELECT id, attempt, status, error, error_code, assigned_machine_id, session_id AS old_session_id,
                   started_at, ended_at, workflow_version, secret_path AS old_secret_path, ctid AS tid
            FROM runs
            WHERE id = wanted.run_id AND organization_id = wanted.organization_id AND xmin::text = wanted.version
            OFFSET 0 FOR NO KEY UPDATE SKIP LOCKED
        ) AS run
        WHERE (inputs_expire_at IS NULL OR inputs_expire_at > clock_timestamp()) AND {quotas.room_of("wanted")}
            AND {no_twin("wanted")} {guard}
    ), archived AS (
        INSERT INTO run_attempts (run_id, attempt, status, error, error_code, machine_id, session_id, started_at,
                                  ended_at, retried_by_key_id, retried_by_user_id, retried_by, bulk_retry_id,
                                  overridden, reason, workflow_version, outputs_are_kept)
        SELECT id, attempt, status, error, error_code, assigned_machine_id, old_session_id, started_at, ended_at,
               key_id, user_id, by, bulk_retry_id, overridden::text[], reason, workflow_version, :keeps_outputs::boolean
        FROM seen
    ), removed AS (
        DELETE FROM run_attachments WHERE ctid = ANY (ARRAY(
            SELECT file.tid FROM seen, LATERAL (
                SELECT ctid AS tid FROM run_attachments WHERE run_id = seen.id AND {removed} OFFSET 0
            ) AS file
        ))
        RETURNING storage_path
    ), listed AS (
        INSERT INTO deletions (store, name, due_at)
        SELECT '{deletions.FILES}', storage_path, now() FROM removed WHERE storage_path IS NOT NULL
    ), superseded AS (
        UPDATE run_outputs SET is_superseded = true WHERE ctid = ANY (ARRAY(
            SELECT output.tid FROM seen, LATERAL (
                SELECT ctid AS tid FROM run_outputs WHERE run_id = seen.id AND attempt = seen.attempt OFFSET 0
            ) AS output
            WHERE NOT :keeps_outputs::boolean
        ))
    ), kept AS (
        UPDATE run_attachments SET attempt = (SELECT seen.attempt FROM seen WHERE seen.id = run_attachments.run_id)
        WHERE ctid = ANY (ARRAY(
            SELECT file.tid FROM seen, LATERAL (
                SELECT ctid AS tid FROM run_attachments
                WHERE run_id = seen.id AND attachment_type = 'output' AND attempt IS NULL OFFSET 0
            ) AS file
            WHERE :keeps_outputs::boolean
        ))
    ), recorded AS ({recorded}), {"".join(f"{part}, " for part in also)} r AS (
        UPDATE runs
        SET status = 'scheduling', changed_at = clock_timestamp(), attempt = runs.attempt + 1,
            queued_at = greatest(clock_timestamp(), seen.not_before), queued_by_key_id = seen.key_id,
            traceparent = seen.traceparent, lane = seen.lane, queue_rank = seen.queue_rank,
            avoided_machine_id = CASE WHEN seen.avoids_last_machine THEN seen.assigned_machine_id END,
            error = NULL, error_code = NULL, workflow_version = NULL, started_at = NULL, ended_at = NULL,
            reported_at = NULL, assigned_machine_id = NULL,
            pinned_machine_id = seen.pinned_machine_id, pool_ids = coalesce(seen.pool_ids::uuid[], runs.pool_ids),
            pin_is_deleted = runs.pin_is_deleted AND seen.pinned_machine_id IS NULL AND seen.pool_ids IS NULL,
            is_priority = seen.is_priority, automatic_retries = seen.automatic_retries,
            session_id = seen.session_id, session_alias = seen.session_alias,
            release_session_after = seen.release_session_after,
            {carried.REPLACE} {requeued}
        FROM seen WHERE runs.ctid = ANY (ARRAY(SELECT tid FROM seen)) AND runs.id = seen.id
        RETURNING runs.*, seen.place, seen.key, seen.fingerprint, seen.most_bytes {", seen.input_ids" if also else ""}
    ), shown AS MATERIALIZED (
        SELECT r.place, r.organization_id, r.key, r.fingerprint, r.most_bytes, 200 AS http_status, ARRAY[r.id] AS ids,
               {projection.document(after)} AS body
        FROM r {projection.RUN_SOURCE}
    ), stored AS ({STORED})
    SELECT place, body FROM shown
    """,
    )


# For a retry that clears the run, changes values in the run's row, or keeps input files.
SWITCH = _switch_statement("runs.retry.switch", COLUMNS)

# The same with guards outside the run's row: the names of staged secrets and files and of a kept secret on the deletion list,
# and the machine to pin. Each of them must be free. The run gets the staged secret and files, and the replaced secret is due.
SWITCH_STAGED = _switch_statement(
    "runs.retry.switch_staged",
    COLUMNS | STAGED_COLUMNS,
    first=f"held AS MATERIALIZED ({deletions.FREE}),",
    guard="""
        AND (SELECT count(*) FROM held WHERE held.place = wanted.place) = name_count
        AND (machine_id IS NULL OR (SELECT true FROM (
            SELECT id FROM machines
            WHERE machines.id = wanted.machine_id AND machines.organization_id = wanted.organization_id
            OFFSET 0 FOR KEY SHARE SKIP LOCKED
        ) AS machine))
    """,
    removed=f"({_OUTPUTS} OR (attachment_type = 'input' AND seen.replaces_inputs))",
    requeued="""
            , sensitive_input_aliases = coalesce(seen.sensitive_input_aliases, runs.sensitive_input_aliases)
            , secret_path = CASE WHEN seen.sensitive_input_aliases IS NULL THEN runs.secret_path ELSE seen.secret_path END
    """,
    input_ids=f"coalesce(r.input_ids::text[], {projection.RUN_COLUMNS['input_attachment_ids']})",
    also=[
        """adopted AS (
            DELETE FROM deletions
            WHERE ctid = ANY (ARRAY(SELECT held.tid FROM held JOIN seen ON seen.place = held.place))
        )""",
        f"""due AS (
            INSERT INTO deletions (store, name, due_at)
            SELECT '{deletions.SECRETS}', old_secret_path, now() FROM seen
            WHERE old_secret_path IS NOT NULL AND sensitive_input_aliases IS NOT NULL ORDER BY old_secret_path
            {deletions.DUE_EARLIER}
        )""",
        f"""attached AS (
            {staging.attached("seen.organization_id", "seen.user_id")} JOIN seen ON seen.id = file.run_id
        )""",
    ],
)

# --- their rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """The values that the switch writes for one retry, as the rules decided on `run`."""

    retry: Retry
    staged: Staged
    run: Record
    following: Next
    room: quotas.Room = quotas.NO_QUOTA

    @property
    def run_id(self) -> UUID:
        return self.retry.run_id

    def is_plain(self) -> bool:
        """Whether the run's row has all that it depends on."""
        options = self.retry.options
        keeps_or_replaces = self.run["secret_path"] is not None or options.sensitive_input_values is not None
        return not keeps_or_replaces and options.file_inputs is None and options.machine_id is None

    def names(self) -> list[tuple[Name, bool]]:
        """The names to take off the deletion list, each with whether the run has it already (a kept secret)."""
        names = [(name, False) for name in self.staged.names()]
        if self.retry.options.sensitive_input_values is None and self.run["secret_path"] is not None:
            names.append((Name.secret(self.run["secret_path"]), True))
        return names

    def row(self) -> tuple[Any, ...]:
        """In the order of COLUMNS."""
        retry, run, following = self.retry, self.run, self.following
        options, actor, session = retry.options, retry.actor, following.session
        write = retry.write if retry.write is not None and retry.write.key is not None else None
        return (
            retry.run_id,
            retry.organization_id,
            run["version"],
            actor.key_id,
            actor.user_id,
            actor.request_id,
            actor.reason,
            actor.by,
            actor.bulk_retry_id,
            _listed(overridden(options)),
            retry.traceparent,
            following.lane,
            following.queue_rank,
            following.not_before,
            bool(options.avoid_last_machine),
            following.pinned_machine_id,
            None if options.pool_ids is None else _listed(options.pool_ids),
            following.is_priority,
            _automatic_retries(retry, run),
            session.id,
            session.alias,
            session.release_after,
            *(one.bound(options) for one in carried.REPLACED),
            run["inputs_expire_at"] if options.file_inputs is None else None,
            None if write is None else write.key,
            None if write is None else write.fingerprints[0],
            0 if write is None else write.most_bytes,
            *self.room,
        )

    def more(self) -> tuple[Any, ...]:
        """In the order of STAGED_COLUMNS."""
        options, staged = self.retry.options, self.staged
        replaces_inputs = options.file_inputs is not None
        return (
            options.machine_id,
            len(self.names()),
            json_bytes(staged.aliases),
            staged.secret_path,
            replaces_inputs,
            _listed(file.id for file in staged.files) if replaces_inputs else None,
        )


def _automatic_retries(retry: Retry, run: Record) -> int | None:
    """How many automatic retries the run will have had. A retry by request or in bulk starts again at 0."""
    if retry.actor.by == "policy":
        before: int | None = run["automatic_retries"]
        return None if before is None else before + 1
    return None if retry.options.automatic_retries is False else 0


async def read(connection: Connection, retries: Sequence[Retry]) -> list[Record | None]:
    rows = await connection.fetch(
        READ,
        run_ids=[one.run_id for one in retries],
        organization_ids=[one.organization_id for one in retries],
        session_ids=[one.options.session_id for one in retries],
        not_befores=[one.options.not_before for one in retries],
    )
    return _in_order(rows, len(retries))


async def write(connection: Connection, changes: Sequence[Change], settings: Settings) -> list[bytes | None]:
    """The replies of those that have taken effect."""
    always = {"keeps_outputs": settings.attempt_outputs == "all"}
    plain = [change for change in changes if change.is_plain()]
    staged = [change for change in changes if not change.is_plain()]
    bodies: dict[UUID, bytes] = {}
    if plain:
        rows = await connection.fetch(SWITCH, **_arrays(COLUMNS, _rows(plain)), ttl_seconds=_ttl(plain), **always)
        bodies |= {plain[row["place"] - 1].run_id: row["body"] for row in rows}
    if staged:
        named = [(place, name, kept) for place, one in enumerate(staged, 1) for name, kept in one.names()]
        named.sort(key=lambda entry: entry[1])  # one order everywhere: two writers of the same rows cannot deadlock
        rows = await connection.fetch(
            SWITCH_STAGED,
            **_arrays(COLUMNS, _rows(staged)),
            **_arrays(STAGED_COLUMNS, [one.more() for one in staged]),
            ttl_seconds=_ttl(staged),
            **always,
            name_places=[place for place, _, _ in named],
            stores=[name.store for _, name, _ in named],
            names=[name.name for _, name, _ in named],
            names_are_kept=[kept for _, _, kept in named],
            **staging.columns({one.run_id: one.staged for one in staged}),
        )
        bodies |= {staged[row["place"] - 1].run_id: row["body"] for row in rows}
    return [bodies.get(change.run_id) for change in changes]


def _rows(changes: Sequence[Change]) -> list[tuple[Any, ...]]:
    """Each counts those of its organization and its key that come before it, as if they waited already."""
    before: dict[object, int] = {}
    rows = []
    for change in changes:
        room, retry = change.room, change.retry
        if room.waiting_seen is not None:
            organization, key = before.get(retry.organization_id, 0), before.get(retry.actor.key_id, 0)
            change = replace(change, room=room.after(organization, key))
        before[retry.organization_id] = before.get(retry.organization_id, 0) + 1
        before[retry.actor.key_id] = before.get(retry.actor.key_id, 0) + 1
        rows.append(change.row())
    return rows


def _arrays(names: Iterable[str], rows: Iterable[tuple[Any, ...]]) -> dict[str, list[Any]]:
    """The parameters of a statement by their columns."""
    return {f"{name}s": list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def _in_order(rows: Iterable[Record], count: int) -> list[Record | None]:
    """The row of each place; None where there is none."""
    found: list[Record | None] = [None] * count
    for row in rows:
        found[row["place"] - 1] = row
    return found


def _listed(values: Iterable[object]) -> str:
    """A list of plain words as PostgreSQL writes it."""
    return "{" + ",".join(map(str, values)) + "}"


def _ttl(changes: Sequence[Change]) -> int:
    """How long replies are kept: the same for all that are stored."""
    return max(0 if (write := change.retry.write) is None else write.ttl_seconds for change in changes)
