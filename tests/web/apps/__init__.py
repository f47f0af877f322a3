"""The applications of docs/web.md: the same articles in each framework.

Each module has ``make(router)``, which returns the application for a server.
"""
