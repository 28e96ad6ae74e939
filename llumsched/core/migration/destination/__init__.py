"""The destination's half of the migration protocol."""
