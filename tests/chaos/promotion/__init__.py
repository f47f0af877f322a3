"""Promotions while servers, networks and the command itself come to harm, and who checks them.

Clients in several processes write and read all the time; :mod:`.history` knows what each of them
was told, and judges. Nothing here asks sqlroute whether it went well.
"""
