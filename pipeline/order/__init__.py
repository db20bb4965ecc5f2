"""The order of work: what is missing, in what order, in this process or in several."""
