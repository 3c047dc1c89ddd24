"""Keeping a job's log: the author's, the committee member's and the follower's side."""
