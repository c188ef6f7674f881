"""Tools around a monitor: check images, watch drift, inspect files, list, export and compare."""
