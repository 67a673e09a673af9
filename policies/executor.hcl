# What an executor may do: read the secrets of one organization's runs. Write ORGANIZATION as the organization's id:
#
#   sed 's/ORGANIZATION/acme/' policies/executor.hcl | bao policy write executor-acme -

path "secret/data/runs/ORGANIZATION/*" {
  capabilities = ["read"]
}
