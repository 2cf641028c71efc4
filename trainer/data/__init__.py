"""Which sample comes when, from which shard, in which batch."""
