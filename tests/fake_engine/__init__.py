"""An engine without a model, for tests: exact tokens, real block accounting."""
