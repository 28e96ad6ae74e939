"""The scheduler process: a Ray actor that hosts the core's global scheduler."""
