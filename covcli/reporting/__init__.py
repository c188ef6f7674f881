"""Results for people: tables, the terminal, and the report in HTML and Markdown."""
