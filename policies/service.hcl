# What the service itself may do: write a fresh secret and destroy one. It can neither read, overwrite nor list any.
# `secret` is VAULT_MOUNT and `runs` is VAULT_PREFIX: change them here if you change the settings.
#
#   bao policy write runs-api policies/service.hcl

path "secret/data/runs/*" {
  capabilities = ["create"]
}

path "secret/metadata/runs/*" {
  capabilities = ["delete"]
}
