"""What a simulation gives: records, metrics, tables, pages."""
