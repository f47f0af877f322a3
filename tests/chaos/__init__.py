"""Chaos: whether promises hold while servers misbehave. ``python -m tests.chaos``, ``make chaos``.

Replicas are held behind at random; whoever reads knows what it must find at least. A read that
finds less is evidence, and one is too many. ``--break-token`` takes the tokens away, to see that
the detector detects.

:mod:`.promotion` breaks servers, networks and the operator's command around promotions.
"""
