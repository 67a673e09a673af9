# OpenBao of the development profile: durable, and unsealing itself with a key from a file.
# For production use TLS, and a seal backed by a key service or hardware.

storage "raft" {
  path                   = "/openbao/file"
  node_id                = "development"
  performance_multiplier = 1 # a node that is alone need not wait for others before it elects itself
}

listener "tcp" {
  address         = "0.0.0.0:8200"
  cluster_address = "127.0.0.1:8201"
  tls_disable     = true
}

seal "static" {
  current_key_id = "development"
  current_key    = "file:///run/secrets/openbao-seal-key"
}

api_addr     = "http://openbao:8200"
cluster_addr = "http://127.0.0.1:8201"
