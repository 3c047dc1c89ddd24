"""What the kinds of jobs do differently with a shard: computing, opening and checking it."""
