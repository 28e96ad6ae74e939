"""The source's half of the migration protocol."""
