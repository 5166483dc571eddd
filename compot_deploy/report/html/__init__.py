"""The report as one page that loads nothing."""
