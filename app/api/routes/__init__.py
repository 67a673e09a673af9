"""The routes: one file per resource, and nothing in them but parse, call once, return. `operation()` lists every refusal."""

from app.api.routes import (
    attachments,
    bulk_retries,
    events,
    health,
    keys,
    machines,
    pools,
    queue,
    runs,
    webhooks,
    whoami,
    workflows,
)

ROUTERS = (
    runs.router,
    bulk_retries.router,
    attachments.router,
    workflows.router,
    machines.router,
    machines.health_router,
    pools.router,
    events.router,
    queue.router,
    whoami.router,
    keys.router,
    webhooks.router,
    health.router,
)
