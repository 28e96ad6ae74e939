"""Results of a simulation: records, metrics, tables, pages."""
