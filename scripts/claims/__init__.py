"""What compare_methods.py runs: a small base, cells of training, claims and what they need to be judged."""
