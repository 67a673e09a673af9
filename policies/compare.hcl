# For `python -m app stores compare`, which lists what the service itself may not: paths and metadata, no value. `secret` is
# VAULT_MOUNT and `runs` is VAULT_PREFIX. Make a token for one run of it:
#
#   bao policy write runs-compare policies/compare.hcl
#   bao token create -policy=runs-compare -ttl=1h -field=token

path "secret/metadata/runs/*" {
  capabilities = ["list", "read"]
}

path "secret/metadata/runs-webhooks/*" {
  capabilities = ["list", "read"]
}
