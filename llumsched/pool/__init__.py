"""The launcher process: instances and the scheduler started, watched and replaced."""
