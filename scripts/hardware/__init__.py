"""Reading public operator profiles, for :mod:`scripts.fit_hardware`."""
