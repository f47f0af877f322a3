"""Sharded answers against those of one PostgreSQL that holds all the data."""
