"""What can be computed: programs and their operators, datasets, and how each kind of job splits."""
