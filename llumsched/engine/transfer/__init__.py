"""How the bytes of KV blocks go from one process to another."""
