"""The pure core: statement in, plan out. No I/O, no clock, no threads, no logging."""
