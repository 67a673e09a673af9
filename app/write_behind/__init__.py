"""Notes that requests make in memory and that one statement writes later, outside of any request."""
