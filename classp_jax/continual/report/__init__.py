"""From results to a table, a report in Markdown and pictures."""

from classp_jax.continual.report.markdown import markdown, write_report
from classp_jax.continual.report.pictures import picture
from classp_jax.continual.report.table import SummaryTable

__all__ = ["SummaryTable", "markdown", "picture", "write_report"]
