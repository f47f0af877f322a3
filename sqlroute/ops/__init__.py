"""What operators do to servers: promotion, failover, rejoin, fences, replicas."""
