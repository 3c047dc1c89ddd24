"""Where work is computed: the executor process."""
