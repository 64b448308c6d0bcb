"""The report: one page, one JSON file, one Markdown summary."""
