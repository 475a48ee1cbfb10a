"""From results to a table, a report in Markdown and pictures."""
