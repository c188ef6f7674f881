"""The lowest layer: errors, specifications, files, ranks and progress. Nothing about coverage."""
