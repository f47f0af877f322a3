"""Everything that does I/O: engines, the monitor, scatter, commit."""
