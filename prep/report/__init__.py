"""What prep shows: a page, contact sheets, tables on the console."""
