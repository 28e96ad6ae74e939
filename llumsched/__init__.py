"""llumsched: many vLLM instances served as one pool, with running requests migrated between them.

Importing the package costs nothing: every part (core, engine, runtime, frontend, simulator) is
imported by whoever needs it, since some run where neither vLLM nor Ray is installed.
"""

__version__ = "0.1.0"
