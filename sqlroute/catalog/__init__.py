"""The ``sqlroute`` schema in each shard's database: shard map with its epoch, commit records."""
