"""The command line and the server as users have them. A package: its servers end with it."""
