"""OpenAI's batch API beside any endpoint: files and batches in a database, sent as bulk work.

A process of its own talks to the endpoint over HTTP alone, so that it serves pools of instances,
the proxy, and any other OpenAI server alike. Lines wait in SQLite or PostgreSQL; what is sent and
how many at once follows what the endpoint's scheduler says is free.
"""
