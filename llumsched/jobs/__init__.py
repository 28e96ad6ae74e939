"""Scheduled work: jobs with times, windows, shards, retries, dependencies and a history.

Jobs and their runs are in the database of batches, and are done by the process that does batches.
"""
