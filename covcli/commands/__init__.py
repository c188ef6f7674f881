"""What the commands share: their options, declared once, and what surrounds their work."""
