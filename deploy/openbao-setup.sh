#!/bin/sh
# Set OpenBao up for the service, once; repeating it changes nothing that works. Needs BAO_ADDR and these folders:
#   KEYS      the answer of the initialization, with the root token, is kept here
#   LOGIN     role-id and secret-id for the app are written here, readable by user OWNER only
#   POLICIES  service.hcl and executor.hcl are read from here
#   EXECUTOR  (optional) a token for executors of ORGANIZATION is written here, new each time
set -eu
umask 077
: "${BAO_ADDR:?}" "${KEYS:?}" "${LOGIN:?}" "${POLICIES:?}" "${OWNER:?}"

if ! bao operator init -status > /dev/null 2>&1; then
  bao operator init -recovery-shares=1 -recovery-threshold=1 -format=json > "$KEYS/init.json"
fi
BAO_TOKEN=$(sed -n 's/.*"root_token": *"\([^"]*\)".*/\1/p' "$KEYS/init.json")
export BAO_TOKEN

tries=0
until bao token lookup > /dev/null 2>&1; do # a fresh node needs a few seconds to elect itself
  tries=$((tries + 1))
  if [ "$tries" -gt 60 ]; then
    echo "OpenBao does not accept the root token in $KEYS/init.json:" >&2
    bao token lookup > /dev/null
  fi
  sleep 1
done

bao secrets list | grep -q '^secret/ ' || bao secrets enable -path=secret -version=2 kv
bao auth list | grep -q '^approle/ ' || bao auth enable approle
bao policy write runs-api "$POLICIES/service.hcl"
bao write auth/approle/role/runs-api token_policies=runs-api token_ttl=1h token_max_ttl=24h

if [ ! -s "$LOGIN/secret-id" ]; then
  bao read -field=role_id auth/approle/role/runs-api/role-id > "$LOGIN/role-id"
  bao write -force -field=secret_id auth/approle/role/runs-api/secret-id > "$LOGIN/secret-id.new"
  mv "$LOGIN/secret-id.new" "$LOGIN/secret-id"
fi
chown -R "$OWNER" "$LOGIN"

if [ -n "${EXECUTOR:-}" ]; then
  sed "s/ORGANIZATION/${ORGANIZATION:?}/" "$POLICIES/executor.hcl" | bao policy write "executor-$ORGANIZATION" -
  bao token create -orphan -period=768h -policy="executor-$ORGANIZATION" -field=token > "$EXECUTOR/token.new"
  mv "$EXECUTOR/token.new" "$EXECUTOR/token"
  chown -R "$OWNER" "$EXECUTOR"
fi
