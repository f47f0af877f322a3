"""The pitfalls of routing a Session by ``get_bind``, as scenarios for any router.

``cases.py`` holds the scenarios, ``contenders.py`` what they are run against, ``servers.py`` the
real primary and replicas. ``test_pitfalls.py`` asserts what sqlroute promises for each;
``python -m tests.pitfalls`` runs them against three contenders and writes ``docs/comparison.md``.
"""
