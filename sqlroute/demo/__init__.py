"""The demo: New York's flights, sharded by aircraft, on real servers of this machine.

:mod:`sqlroute.demo.dataset` reads the data that comes with the package. Nothing outside of this
package imports it.
"""
