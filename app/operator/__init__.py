"""Work for operators: checks at the start, comparing the stores, deleting an organization, numbers for /metrics."""
