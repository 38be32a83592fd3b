"""Self-training by generalised EM (ExSearch): sample trajectories, weigh them by the gold answer, learn from them."""
