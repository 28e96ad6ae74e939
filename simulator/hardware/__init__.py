"""Hardware files: step times, KV capacity and links of an instance."""
