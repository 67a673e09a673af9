"""Webhooks: what a transaction writes (outbox), where it may be sent (addresses), and how (signing, sending, delivery)."""
