"""What fits sqlroute into other programs, each in a module that imports only that one."""
