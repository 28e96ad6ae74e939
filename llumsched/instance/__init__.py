"""The instance process: a Ray actor with an engine core and its llumlet."""
