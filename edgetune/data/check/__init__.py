"""What is in a set of rows, before a model learns it: `edgetune data check`."""
