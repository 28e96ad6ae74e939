"""The global scheduler: pure, events in and actions out."""
