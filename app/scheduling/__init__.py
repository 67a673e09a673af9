"""Where a run may go, and which run gets which machine."""
