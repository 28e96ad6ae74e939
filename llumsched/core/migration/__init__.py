"""The protocol of a live migration: pure state machines of both ends, and their tables."""
