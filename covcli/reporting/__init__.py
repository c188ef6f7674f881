"""What people read: tables, the terminal, and the report in HTML and Markdown."""
