"""Choosing a base model: candidates judged on the customers' own task.

choice    candidates with figures and intervals, in order, and the reason in a sentence
"""
