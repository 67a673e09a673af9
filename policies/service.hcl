# What the service itself may do: write a fresh secret of a run and destroy it, without being able to read, overwrite or list
# any; and the same, and read, for what it signs webhooks with. `secret` is VAULT_MOUNT and `runs` is VAULT_PREFIX: change them
# here if you change the settings.
#
#   bao policy write runs-api policies/service.hcl

path "secret/data/runs/*" {
  capabilities = ["create"]
}

path "secret/metadata/runs/*" {
  capabilities = ["delete"]
}

path "secret/data/runs-webhooks/*" {
  capabilities = ["create", "read"]
}

path "secret/metadata/runs-webhooks/*" {
  capabilities = ["delete"]
}
