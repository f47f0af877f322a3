"""What happens beyond one machine: sqlroute's own pure code, driven by simulated time.

A thousand shards of three nodes and five hundred processes are numbers here; what decides is the
real code of ``sqlroute.health`` and ``sqlroute.routing``. ``python -m tests.simulations`` runs the
full size and writes the figures into ``docs/choosing.md``; the tests run a smaller one.
"""
