"""common: what several tools share: load, latencies, results, tables, figures."""
