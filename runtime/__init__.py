"""The yardstick: engines, latency, accuracy, statistics, evidence and the report."""
