#!/bin/sh
# Make the role that the service has, and set its password. What it may do with the tables, `python -m app migrate` says.
# Needs the owner's PG* variables and APP_PASSWORD. Repeating it is harmless.
set -eu
: "${PGHOST:?}" "${PGUSER:?}" "${PGDATABASE:?}" "${APP_PASSWORD:?}"

# The password by way of a variable of psql's, which quotes it; not as an argument, which every user of the machine can read.
psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 <<'SQL'
\getenv password APP_PASSWORD
SELECT 'CREATE ROLE runs_app' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'runs_app') \gexec
ALTER ROLE runs_app LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS PASSWORD :'password';
SQL
