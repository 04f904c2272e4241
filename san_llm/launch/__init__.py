"""Several processes: started, told apart, watched, stopped together."""
