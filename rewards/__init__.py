"""Reward functions, one a file, and the loading of the user's own. They run in processes that may be killed."""
