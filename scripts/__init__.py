"""Programs that the Makefile runs from a checkout; not part of the installed package."""
