"""Data of an experiment: readers, and the streams of tasks that are made of them."""
