"""PostgreSQL, Vault and the file store, and the list of what is to be deleted there. They know nothing of runs."""
