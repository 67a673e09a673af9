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
# With Temporal or traces: docker build --build-arg REQUIREMENTS=requirements-extras.lock -t runs-api .
# The base image goes by its tag. To pin the one you have tried, write FROM python:3.13-slim@sha256:... in both places:
#   docker buildx imagetools inspect python:3.13-slim --format '{{.Manifest.Digest}}'

FROM python:3.13-slim AS build
ARG REQUIREMENTS=requirements.lock
COPY requirements.lock requirements-extras.lock /tmp/
# The base image's pip installs into the environment, which has none of its own: 11 MB less, and nothing to install with.
RUN python -m venv --without-pip /opt/venv \
    && python -m pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check --compile \
        --require-hashes --only-binary :all: --requirement "/tmp/${REQUIREMENTS}"
COPY alembic.ini /srv/alembic.ini
COPY docs /srv/docs
COPY migrations /srv/migrations
COPY app /srv/app
ARG REVISION=unknown
RUN printf '%s' "${REVISION}" > /srv/app/COMMIT
# Compiled here: at run time nothing can be written. Readable, whatever umask the checkout was made with.
RUN /opt/venv/bin/python -m compileall -q /srv/app /srv/migrations && chmod -R a+rX /srv

# The demo of the development stack: an executor, and a run to retry. Not part of the service's image.
FROM build AS demo-build
COPY requirements-demo.lock /tmp/
RUN python -m pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check --compile \
        --require-hashes --only-binary :all: --requirement /tmp/requirements-demo.lock
COPY examples /srv/examples
COPY dev /srv/dev
RUN chmod -R a+rX /srv

FROM python:3.13-slim AS base
RUN groupadd --gid 10001 runs \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /srv --shell /usr/sbin/nologin runs \
    && install --directory --owner=10001 --group=10001 --mode=0700 /data/files /data/demo
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /srv
USER 10001:10001
STOPSIGNAL SIGTERM

FROM base AS demo
COPY --from=demo-build /opt/venv /opt/venv
COPY --from=demo-build /srv /srv
ENTRYPOINT ["python", "-m", "dev.compose_demo"]

FROM base
ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="runs-api" \
      org.opencontainers.image.description="Runs API for desktop-automation agents: retry an ended run in place" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/venv /opt/venv
COPY --from=build /srv /srv
ENV HOST=0.0.0.0 \
    PORT=8000 \
    STORAGE_URL=file:///data/files
EXPOSE 8000
# Requests that have begun are finished within SHUTDOWN_SECONDS (20): give `docker stop` more than its 10 s (--stop-timeout).
# Alive, not ready: a restart would not bring a missing database back.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.build_opener(u.ProxyHandler({})).open(f'http://127.0.0.1:{os.environ[\"PORT\"]}/health/live', timeout=4)"]
ENTRYPOINT ["python", "-m", "app"]
CMD ["serve"]
