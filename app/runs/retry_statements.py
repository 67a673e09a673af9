"""The statements of a retry (retry.py): what the rules read of a run, and the switch that archives, clears and requeues it."""

from collections.abc import Sequence

from sqlalchemy import (
    CTE,
    JSON,
    Boolean,
    ColumnElement,
    Integer,
    Text,
    TextClause,
    bindparam,
    case,
    cast,
    delete,
    exists,
    func,
    insert,
    literal_column,
    null,
    or_,
    select,
    update,
)

from app.events import record
from app.idempotency import store_reply
from app.models import Deletion, Run, RunAttachment, RunAttempt, RunOutput
from app.runs import projection, quotas, staging
from app.stores import deletions
from app.stores.statements import Statement, constant, fragment, statement

_THE_RUN = (Run.id == bindparam("run_id"), Run.organization_id == bindparam("organization_id"))
_VERSION = literal_column("runs.xmin::text", Text)  # changes with every UPDATE of the row

_INPUTS = (
    select(func.count().label("count"), func.min(RunAttachment.expires_at).label("expires_first"))
    .where(RunAttachment.run_id == Run.id, RunAttachment.attachment_type == constant("input"))
    .lateral("inputs")
)

# What may be long of what the run keeps: the reply shows it.
_KEPT_OCTETS: ColumnElement[int] = sum(
    (
        func.coalesce(func.octet_length(cast(column, Text)), literal_column("0"))
        for column in (Run.input_values, Run.sensitive_input_aliases, Run.main_prompt, Run.model_metadata)
    ),
    start=literal_column("0", Integer),
)

# What the rules need to know of a run. Outputs and history are not read: a megabyte is never loaded to be cleared.
READ = statement(
    "runs.retry.read",
    select(
        _VERSION.label("version"),
        Run.attempt,
        Run.status,
        Run.pinned_machine_id,
        Run.pool_ids,
        Run.is_priority,
        Run.session_id,
        Run.session_alias,
        Run.release_session_after,
        Run.secret_path,
        case((Run.secret_path.is_not(None), Run.sensitive_input_aliases)).label("sensitive_input_aliases"),
        (
            Run.secret_path.is_not(None)
            & exists()
            .where(
                Deletion.store == constant("vault"),
                Deletion.name == Run.secret_path,
                Deletion.condemned_at.is_(None),
                Deletion.due_at > func.clock_timestamp(),
            )
            .correlate(Run)
        ).label("secret_is_kept"),
        _INPUTS.c.count.label("input_count"),
        func.coalesce(_INPUTS.c.expires_first <= func.clock_timestamp(), literal_column("false")).label(
            "input_is_expired"
        ),
        Run.changed_at,
        func.clock_timestamp().label("now"),
        _KEPT_OCTETS.label("kept_octets"),
    )
    .select_from(Run)
    .join(_INPUTS, literal_column("true"))
    .where(*_THE_RUN),
)

# A statement of its own: one that had to wait for a lock sees all other tables as they were when it began to wait.
LOCK = statement("runs.retry.lock", select(Run.id).where(*_THE_RUN).with_for_update(key_share=True))

# A statement still sees what it removes, and not yet what takes its place.
_AFTER = {
    "output_data": "NULL",
    "run_message_history": "NULL",
    "usage_metadata": "NULL",
    "output_attachment_ids": "'[]'::json",
    "input_attachment_ids": f"coalesce(:input_ids::text[], {projection.RUN_COLUMNS['input_attachment_ids']})",
}


def _part(name: str, written: str) -> CTE:
    """A part of the statement in SQL, which speaks of the others by their names."""
    return fragment(written).columns().cte(name)


def _switch_statement(name: str, *guards: TextClause, first: Sequence[CTE] = (), also: Sequence[CTE] = ()) -> Statement:
    """All that a retry always does, in one round trip, if the run is still in the version that the rules saw, and the guards
    hold, which may look at what comes `first`: archive the attempt, list and remove the attachments that go, leave the outputs
    behind (a run has those of its own attempt number), clear and requeue the run, record the event, make the reply and store
    it under the key. What is done `also` must depend on `seen`, which is empty if nothing is to happen.
    """
    archive = (
        Run.id,
        Run.attempt,
        Run.status,
        Run.error,
        Run.error_code,
        Run.assigned_machine_id,
        Run.session_id,
        Run.started_at,
        Run.ended_at,
    )
    seen = (
        select(*archive, Run.organization_id, Run.secret_path)
        .where(*_THE_RUN, bindparam("version", type_=Text) == _VERSION, fragment(quotas.ROOM), *guards)
        .with_for_update(key_share=True)
        .cte("seen")
        .prefix_with("MATERIALIZED")
    )
    # What follows is looked up by the key that was seen. Joined with it, by a plan that was made while the tables were empty,
    # they would all be read.
    run_id = select(seen.c.id).scalar_subquery()
    attempt = select(seen.c.attempt).scalar_subquery()
    archived = (
        insert(RunAttempt)
        .from_select(
            [
                RunAttempt.run_id,
                RunAttempt.attempt,
                RunAttempt.status,
                RunAttempt.error,
                RunAttempt.error_code,
                RunAttempt.machine_id,
                RunAttempt.session_id,
                RunAttempt.started_at,
                RunAttempt.ended_at,
                RunAttempt.retried_by_key_id,
                RunAttempt.retried_by_user_id,
                RunAttempt.retried_by,
                RunAttempt.bulk_retry_id,
                RunAttempt.overridden,
                RunAttempt.reason,
            ],
            select(
                *(seen.c[column.key] for column in archive),
                bindparam("key_id", type_=RunAttempt.retried_by_key_id.type),
                bindparam("user_id", type_=RunAttempt.retried_by_user_id.type),
                bindparam("by", type_=RunAttempt.retried_by.type),
                bindparam("bulk_retry_id", type_=RunAttempt.bulk_retry_id.type),
                bindparam("overridden", type_=RunAttempt.overridden.type),
                bindparam("reason", type_=RunAttempt.reason.type),
            ),
        )
        .cte("archived")
    )
    removed = (
        delete(RunAttachment)
        .where(
            RunAttachment.run_id == run_id,
            or_(RunAttachment.attachment_type == constant("output"), bindparam("replaces_inputs", type_=Boolean)),
        )
        .returning(RunAttachment.storage_path)
        .cte("removed")
    )
    listed = (
        insert(Deletion)
        .from_select(
            [Deletion.store, Deletion.name, Deletion.due_at],
            select(constant("storage"), removed.c.storage_path, func.now()).where(removed.c.storage_path.is_not(None)),
            include_defaults=False,
        )
        .cte("listed")
    )
    superseded = (
        update(RunOutput)
        .values(is_superseded=literal_column("true"))
        .where(RunOutput.run_id == run_id, RunOutput.attempt == attempt)
        .cte("superseded")
    )
    recorded = _part(
        "recorded",
        record(
            "seen",
            "'retried'",
            attempt="attempt + 1",
            from_status="status",
            to_status="'scheduling'",
            changed=":overridden::text[]",
            by=":by::text",
            bulk_retry_id=":bulk_retry_id::uuid",
        ),
    )
    aliases = bindparam("sensitive_input_aliases", type_=JSON)
    # A null override keeps what the run has.
    requeued = (
        update(Run)
        .where(Run.id == run_id)
        .values(
            {
                Run.status: constant("scheduling"),
                Run.attempt: Run.attempt + literal_column("1"),
                Run.queued_at: func.clock_timestamp(),
                Run.queued_by_key_id: bindparam("key_id"),
                Run.traceparent: bindparam("traceparent", type_=Run.traceparent.type),
                Run.lane: bindparam("lane"),
                Run.queue_rank: bindparam("queue_rank"),
                Run.error: null(),
                Run.error_code: null(),
                Run.started_at: null(),
                Run.ended_at: null(),
                Run.reported_at: null(),
                Run.changed_at: func.clock_timestamp(),
                Run.assigned_machine_id: null(),
                Run.pinned_machine_id: bindparam("pinned_machine_id"),
                Run.pool_ids: func.coalesce(bindparam("pool_ids", type_=Run.pool_ids.type), Run.pool_ids),
                Run.is_priority: bindparam("is_priority"),
                Run.session_id: bindparam("session_id"),
                Run.session_alias: bindparam("session_alias"),
                Run.release_session_after: bindparam("release_session_after"),
                Run.input_values: func.coalesce(bindparam("input_values", type_=JSON), Run.input_values),
                Run.sensitive_input_aliases: func.coalesce(aliases, Run.sensitive_input_aliases),
                Run.secret_path: case(
                    (aliases.is_(None), Run.secret_path), else_=bindparam("secret_path", type_=Run.secret_path.type)
                ),
            }
        )
        .returning(Run)
        .cte("r")
    )
    # Made here, and not by a statement after it, because it must be stored by the same one.
    shown = (
        select(fragment(f"{projection.document(_AFTER)} AS body, ARRAY[r.id] AS ids"))
        .select_from(fragment(f"r {projection.RUN_SOURCE}"))
        .add_cte(requeued)
        .cte("shown")
        .prefix_with("MATERIALIZED")
    )
    parts = [*first, seen, archived, removed, listed, superseded, recorded, *also, store_reply(shown, status=200)]
    return statement(name, select(literal_column("body")).select_from(shown).add_cte(*parts))


SWITCH = _switch_statement("runs.retry.switch")

# The same, and what was staged becomes the run's: its names go off the list, a secret that it had goes on it, and its new files
# are attached.
SWITCH_STAGED = _switch_statement(
    "runs.retry.switch_staged",
    fragment("(SELECT count(*) FROM held) = cardinality(:names::text[])"),  # all are on the list, and none is condemned
    first=[_part("held", deletions.HELD)],
    also=[
        _part(
            "adopted",
            "DELETE FROM deletions WHERE ctid = ANY (ARRAY(SELECT tid FROM held WHERE EXISTS (SELECT FROM seen)))",
        ),
        _part(
            "due",
            f"""
            INSERT INTO deletions (store, name, due_at)
            SELECT 'vault', secret_path, now() FROM seen WHERE secret_path IS NOT NULL {deletions.DUE_EARLIER}
            """,
        ),
        _part("attached", f"{staging.ATTACHED} WHERE EXISTS (SELECT FROM seen)"),
    ],
)
