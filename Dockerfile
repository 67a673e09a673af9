# The service alone; PostgreSQL, Vault and the file store are elsewhere. Runs as 10001, on a read-only root file system
# with a writable /data/files (only for STORAGE_URL=file:///data/files) and a tmpfs on /tmp.
#
#   docker build -t runs-api .
#   docker run --rm --read-only --tmpfs /tmp --cap-drop ALL --env-file settings.env runs-api migrate
#   docker run --detach --init --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
#     --memory 1g --pids-limit 1024 --stop-timeout 30 --env-file settings.env \
#     --publish 127.0.0.1:8000:8000 \
#     --mount type=volume,source=runs-files,target=/data/files \
#     --mount type=bind,source=/etc/runs/vault,target=/run/vault,readonly \
#     runs-api serve
#
# /etc/runs/vault is where settings.env finds what VAULT_ROLE_ID_FILE and VAULT_SECRET_ID_FILE name, readable by 10001.
# The base image goes by its tag. To pin the one you have tried, write FROM python:3.13-slim@sha256:... in both places:
#   docker buildx imagetools inspect python:3.13-slim --format '{{.Manifest.Digest}}'

FROM python:3.13-slim AS build
COPY requirements.lock /tmp/requirements.lock
RUN python -m venv /opt/venv \
    && /opt/venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --compile \
        --require-hashes --only-binary :all: --requirement /tmp/requirements.lock
COPY app /srv/app
# Compiled here: at run time nothing can be written.
RUN /opt/venv/bin/python -m compileall -q /srv/app

FROM python:3.13-slim
RUN groupadd --gid 10001 runs \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /srv --shell /usr/sbin/nologin runs \
    && install --directory --owner=10001 --group=10001 --mode=0700 /data/files
COPY --from=build /opt/venv /opt/venv
COPY --from=build /srv/app /srv/app
COPY migrations /srv/migrations
COPY alembic.ini /srv/alembic.ini
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOST=0.0.0.0 \
    PORT=8000 \
    STORAGE_URL=file:///data/files
WORKDIR /srv
USER 10001:10001
EXPOSE 8000
# Requests under way are finished within SHUTDOWN_SECONDS (20): give `docker stop` more than its 10 s (--stop-timeout).
STOPSIGNAL SIGTERM
# Alive, not ready: a restart would not bring a missing database back.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.build_opener(u.ProxyHandler({})).open(f'http://127.0.0.1:{os.environ[\"PORT\"]}/health/live', timeout=4)"]
ENTRYPOINT ["python", "-m", "app"]
CMD ["serve"]
