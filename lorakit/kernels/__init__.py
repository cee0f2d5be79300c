"""The fast paths, each with a plain twin that it is tested against."""
