"""The queue of deliveries: its statements. Events become deliveries (FAN_OUT), which are leased (LEASE) and then settled.

delivery.py says when each statement runs.
"""

from app.stores.database import Database
from app.stores.statements import loose_scan, statement

# From one organization that has something new to the next, by the index, and of each an equal part of the batch: however much
# one of them has, it is one turn. An endpoint that was made after the event does not get it; one that is disabled can have it
# later (RECOVER). `share` is that part; `last` is where the next batch goes on if there were as many organizations as turns.
FAN_OUT = statement(
    "webhooks.fan_out",
    f"""
    WITH RECURSIVE {
        loose_scan("organizations", "organization_id", "webhook_events WHERE NOT is_fanned_out", after=":after")
    }, turns AS MATERIALIZED (
        SELECT organization_id FROM organizations LIMIT CAST(:batch AS integer)
    ), part AS MATERIALIZED (
        SELECT CAST(:batch AS integer) / greatest(count(*), 1) AS share,
               CASE WHEN count(*) = CAST(:batch AS integer) THEN max(organization_id) END AS last
        FROM turns
    ), taken AS MATERIALIZED (
        SELECT event.* FROM turns CROSS JOIN LATERAL (
            SELECT ctid AS tid, id, organization_id, event_type, occurred_at FROM webhook_events
            WHERE NOT is_fanned_out AND organization_id = turns.organization_id
            ORDER BY occurred_at LIMIT (SELECT share FROM part) FOR UPDATE SKIP LOCKED
        ) AS event
    ), done AS (
        UPDATE webhook_events SET is_fanned_out = true WHERE ctid = ANY (ARRAY(SELECT tid FROM taken))
    ), made AS (
        INSERT INTO webhook_deliveries (id, event_id, endpoint_id, organization_id)
        SELECT gen_random_uuid(), taken.id, e.id, taken.organization_id
        FROM taken CROSS JOIN LATERAL (
            SELECT id FROM webhook_endpoints
            WHERE organization_id = taken.organization_id AND disabled_at IS NULL AND created_at <= taken.occurred_at
              AND taken.event_type = ANY (event_types)
            LIMIT 1000
        ) AS e
        ON CONFLICT (event_id, endpoint_id) DO NOTHING
        RETURNING event_id, endpoint_id
    )
    SELECT taken.id, taken.organization_id, made.endpoint_id, part.share, part.last
    FROM part CROSS JOIN taken LEFT JOIN made ON made.event_id = taken.id
    """,
)

# From one endpoint that has something pending to the next, by the index: however much waits for one, it costs one look.
PENDING_ENDPOINTS = statement(
    "webhooks.lanes",
    f"""
    WITH RECURSIVE {
        loose_scan(
            "lanes",
            "endpoint_id",
            "webhook_deliveries WHERE status = 'pending'",
            after=":after",
            columns="organization_id, due_at",
            order="due_at",
        )
    }
    SELECT endpoint_id, organization_id, due_at <= now() + CAST(:ahead AS interval) AS is_due FROM lanes LIMIT :batch
    """,
)

# Lease deliveries of these endpoints: of each as many as there are places for.
LEASE = statement(
    "webhooks.claim",
    """
    WITH taken AS (
        SELECT due.tid
        FROM unnest(CAST(:endpoint_ids AS uuid[]), CAST(:places AS integer[]), CAST(:places_failing AS integer[]))
            AS wanted (endpoint_id, places, places_failing)
        LEFT JOIN LATERAL (SELECT failing_since FROM webhook_endpoints WHERE id = wanted.endpoint_id LIMIT 1) AS e ON true
        CROSS JOIN LATERAL (
            SELECT ctid AS tid FROM webhook_deliveries
            WHERE endpoint_id = wanted.endpoint_id AND status = 'pending' AND due_at <= now() + CAST(:ahead AS interval)
            ORDER BY due_at
            LIMIT CASE WHEN e.failing_since IS NOT NULL THEN wanted.places_failing ELSE wanted.places END
            FOR UPDATE SKIP LOCKED
        ) AS due
    ), leased AS (
        UPDATE webhook_deliveries
        SET lease = gen_random_uuid(), due_at = now() + CAST(:ahead AS interval) + make_interval(secs => :lease_seconds)
        WHERE ctid = ANY (ARRAY(SELECT tid FROM taken))
        RETURNING id, lease, tries, event_id, endpoint_id, organization_id
    )
    SELECT leased.id, leased.lease, leased.tries, leased.endpoint_id, leased.organization_id,
           e.url, e.disabled_at IS NOT NULL AS is_disabled, e.failing_since IS NOT NULL AS is_failing,
           CASE WHEN e.url IS NOT NULL AND e.disabled_at IS NULL THEN event.body END AS body,
           ARRAY(SELECT path FROM webhook_secrets
                 WHERE endpoint_id = leased.endpoint_id AND (expires_at IS NULL OR expires_at > now())
                 ORDER BY created_at DESC) AS secret_paths
    FROM leased
    CROSS JOIN LATERAL (SELECT body FROM webhook_events WHERE id = leased.event_id LIMIT 1) AS event
    LEFT JOIN LATERAL (
        SELECT url, disabled_at, failing_since FROM webhook_endpoints WHERE id = leased.endpoint_id LIMIT 1
    ) AS e ON true
    """,
)

# Only the holder of the lease may settle. Nothing is written to an endpoint that goes on answering with success. The log keeps
# as many tries as the schedule has, the newest first.
SETTLE = statement(
    "webhooks.settle",
    """
    WITH settled AS (
        UPDATE webhook_deliveries
        SET status = :status, tries = tries + 1, lease = NULL, due_at = now() + make_interval(secs => :delay), tried_at = now(),
            duration_ms = :duration_ms, response_status = :response_status, response_body = :response_body, error = :error,
            last_tries = (jsonb_build_array(jsonb_build_object(
                'tried_at', now(), 'duration_ms', CAST(:duration_ms AS integer), 'response_status',
                CAST(:response_status AS smallint), 'response_body', CAST(:response_body AS text), 'error', CAST(:error AS text)
            )) || last_tries) - CAST(:most_tries AS integer)
        WHERE id = :id AND lease = :lease
        RETURNING endpoint_id
    ), judged AS (
        UPDATE webhook_endpoints e
        SET failing_since = CASE WHEN :is_success THEN NULL ELSE coalesce(e.failing_since, now()) END,
            disabled_at = CASE WHEN verdict.reason IS NULL THEN e.disabled_at ELSE now() END,
            disabled_reason = coalesce(verdict.reason, e.disabled_reason)
        FROM settled CROSS JOIN LATERAL (
            SELECT failing_since, CASE
                WHEN disabled_at IS NOT NULL OR :is_success THEN NULL
                WHEN :is_gone THEN 'gone'
                WHEN failing_since <= now() - CAST(:after AS interval) THEN 'failing' END AS reason
            FROM webhook_endpoints WHERE id = settled.endpoint_id LIMIT 1
        ) AS verdict
        WHERE e.id = (SELECT endpoint_id FROM settled) AND (verdict.failing_since IS NOT NULL OR NOT :is_success)
        RETURNING verdict.reason
    )
    SELECT (SELECT reason FROM judged) AS disabled_because FROM settled
    """,
)

# Give the lease back without a try: the reason was not the receiver.
POSTPONE = statement(
    "webhooks.postpone",
    """
    UPDATE webhook_deliveries SET lease = NULL, due_at = now() + make_interval(secs => :delay)
    WHERE id = :id AND lease = :lease
    """,
)

DROP = statement(
    "webhooks.drop",
    """
    UPDATE webhook_deliveries SET status = 'failed', lease = NULL,
        error = (CAST(:errors AS text[]))[array_position(CAST(:ids AS uuid[]), id)]
    WHERE ctid = ANY (ARRAY(
        SELECT d.tid FROM unnest(CAST(:ids AS uuid[]), CAST(:leases AS uuid[])) AS dropped (id, lease), LATERAL (
            SELECT ctid AS tid, lease FROM webhook_deliveries WHERE id = dropped.id OFFSET 0 FOR NO KEY UPDATE
        ) AS d
        WHERE d.lease = dropped.lease
    ))
    """,
)

# One batch of what an endpoint has missed since a time: what failed is sent again, what it never got is sent.
RECOVER = statement(
    "webhooks.recover",
    """
    WITH job AS (
        SELECT endpoint_id, organization_id, after_at, after_id, until FROM webhook_recoveries
        ORDER BY moved_at LIMIT 1 FOR UPDATE SKIP LOCKED
    ), missed AS (
        SELECT event.id, event.occurred_at FROM job CROSS JOIN LATERAL (
            SELECT id, occurred_at FROM webhook_events
            WHERE organization_id = job.organization_id AND (occurred_at, id) > (job.after_at, job.after_id)
              AND occurred_at <= job.until
            ORDER BY occurred_at, id LIMIT :batch
        ) AS event
    ), again AS (
        INSERT INTO webhook_deliveries (id, event_id, endpoint_id, organization_id)
        SELECT gen_random_uuid(), missed.id, job.endpoint_id, job.organization_id
        FROM job CROSS JOIN missed CROSS JOIN LATERAL (
            SELECT FROM webhook_events event
            WHERE event.id = missed.id AND event.body IS NOT NULL
              AND (event.run_id IS NOT NULL OR event.event_type <> 'run_complete')  -- a test is sent once
              AND event.event_type = ANY (ARRAY(
                  SELECT unnest(event_types) FROM webhook_endpoints WHERE id = job.endpoint_id))
            LIMIT 1
        ) AS real
        ON CONFLICT (event_id, endpoint_id) DO UPDATE SET status = 'pending', tries = 0, due_at = now(), lease = NULL
            WHERE webhook_deliveries.status = 'failed'
    ), moved AS (
        UPDATE webhook_recoveries w SET after_at = last.occurred_at, after_id = last.id, moved_at = clock_timestamp()
        FROM (SELECT id, occurred_at FROM missed ORDER BY occurred_at DESC, id DESC LIMIT 1) AS last
        WHERE w.endpoint_id = (SELECT endpoint_id FROM job)
    ), ended AS (
        DELETE FROM webhook_recoveries
        WHERE endpoint_id = (SELECT endpoint_id FROM job) AND NOT EXISTS (SELECT FROM missed)
    )
    SELECT endpoint_id, organization_id FROM job
    """,
)

# An event takes its deliveries with it. The most that one round removes is 16 MiB of the largest bodies.
PRUNE = statement(
    "webhooks.prune",
    """
    DELETE FROM webhook_events WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM webhook_events WHERE occurred_at <= now() - make_interval(days => :days)
        ORDER BY occurred_at LIMIT 64 FOR UPDATE SKIP LOCKED))
    """,
)


async def prune_webhooks(database: Database, days: int) -> bool:
    """Remove events, and with them deliveries, that are older than the retention time; whether there may be more."""
    async with database.connection() as connection:
        return await connection.execute(PRUNE, days=days) != "DELETE 0"
