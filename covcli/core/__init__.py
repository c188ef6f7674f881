"""The ground floor: errors, specifications, files, ranks, progress. No coverage here."""
