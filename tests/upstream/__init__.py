"""SQLAlchemy's own test suite as the judge of "drop-in": ``python -m tests.upstream``."""
