"""Flags of `llumsched serve`, checked and turned into plans."""
